"""Training that saves at each step: does it run at its own pace, or at the disk's?

Some steps with a save after each, until waiting for the last save ends; as many quiet steps before them, and
after them again; as many bytes written raw. Of both the last two are kept and older ones deleted meanwhile,
since to delete takes the disk's time too, most of all where the filesystem is mounted with `discard`. The
last save is compared with the state that it left; a step from what the last but one saved must lead to the
same state, so that a save during which training went on is verified too.

    best_s      what could be reached: all steps and then the last write, or the first step and then all
                writes, whichever is longer; nothing is written before a step, and no step after the last
    x_best      seconds of all that, by best_s; the limit is one tenth more
    beside_s    seconds of the same steps and of the raw writes, all at the same time, the first write after
                the first step: what the steps and the disk's traffic cost each other, with nothing saved
    x_quiet     the same, by seconds of the quiet steps
    x_raw       the same, by seconds of the raw writes and deletions
    blocked_s   of one save, from its SaveReport; starved_s too
    unreported  what training lost but no report told: until the last save() returned, less the quiet steps,
                less what blocked until then; as a share of that time. Steps that run slower beside a save are
                in it

    python -m benchmarks.every_step [--tiny] [--dir DISK] [--out DIRECTORY] [--rounds COUNT]
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import machine
from .raw_disk import RAW_THREADS, RawDisk, settle
from .results import Options, summary, target, verdicts
from .savers import Asyncckpt
from .workload import FULL, TINY, Workload

STEPS = 8
_TINY_STEPS = 3
_KEEP_LAST = 2
TARGET_RATIO = 1.10
TARGET_UNREPORTED = 0.05
_PARTS = (1, 4)  # the host memory is the state, or this part of it


def run(options: Options) -> dict[str, Any]:
    """Measure and return the document."""
    workload = Workload(TINY if options.tiny else FULL)
    try:
        # Kept, in flight and to be deleted; for each part of the memory, and raw files.
        with options.scratch((6 * len(_PARTS) + _KEEP_LAST + 1) * workload.nbytes) as scratch:
            return _run(options, workload, scratch)
    finally:
        workload.close()


def _run(options: Options, workload: Workload, scratch: Path) -> dict[str, Any]:
    facts = machine.describe(scratch)
    rounds = options.rounds_or(8)
    disk = RawDisk(scratch)
    steps = _TINY_STEPS if options.tiny else STEPS
    savers = []
    for part in _PARTS:
        name = "asyncckpt" if part == 1 else f"asyncckpt, 1/{part} of the memory"
        memory = workload.nbytes // part
        savers.append(Asyncckpt(name, workload, scratch / f"part-{part}", memory, keep_last=_KEEP_LAST))
    rows: list[dict[str, Any]] = []
    try:
        for number in range(rounds + 1):  # the first warms up
            for saver in savers:
                row = {"round": number, **_measure(workload, saver, disk, number * steps + 1, steps)}
                print(
                    f"every_step {number}/{rounds} {saver.name}: {row['seconds']:.2f} s = "
                    f"{row['x_quiet']:.2f} quiet = {row['x_raw']:.2f} raw, contents {row['contents']}",
                    file=sys.stderr,
                )
                if number:
                    rows.append(row)
    finally:
        for saver in savers:
            saver.close()
    summaries = {
        saver.name: _summarise([row for row in rows if row["saver"] == saver.name]) for saver in savers
    }
    return {
        "benchmark": "every_step",
        "tiny": options.tiny,
        "machine": facts,
        "config": {
            "nbytes": workload.nbytes,
            "steps": steps,
            "raw_threads": RAW_THREADS,
            "rounds": rounds,
            "notes": {saver.name: saver.note for saver in savers},
        },
        "targets": [one for name, found in summaries.items() for one in _targets(name, found)],
        "summary": summaries,
        "rows": rows,
    }


def _measure(workload: Workload, saver: Asyncckpt, disk: RawDisk, first: int, steps: int) -> dict[str, Any]:
    """Quiet steps, steps with a save after each, raw writes of as many bytes."""
    quiet_before_s = _quiet(workload, steps)
    began_s = time.perf_counter()
    pending = []
    for step in range(first, first + steps):
        workload.step()
        pending.append(saver.save(step))
    training_s = time.perf_counter() - began_s
    reported_s = sum(one.blocked_so_far_s for one in pending)  # waiting for the last is no part of training
    reports = [report for one in pending if (report := one.wait()) is not None]
    seconds = time.perf_counter() - began_s
    contents = _judge(workload, saver, first + steps - 1)
    quiet_s = (quiet_before_s + _quiet(workload, steps)) / 2
    beside_s = _beside(workload, disk, reports[-1].nbytes, steps)
    settle()
    raw_s = disk.rolling(reports[-1].nbytes, steps, _KEEP_LAST)
    best_s = max(quiet_s + raw_s / steps, quiet_s / steps + raw_s)
    return {
        "saver": saver.name,
        "seconds": seconds,
        "training_s": training_s,
        "quiet_s": quiet_s,
        "raw_s": raw_s,
        "best_s": best_s,
        "x_best": seconds / best_s,
        "beside_s": beside_s,
        "x_beside": seconds / beside_s,
        "lost_s": training_s - quiet_s,
        "unreported": (training_s - quiet_s - reported_s) / training_s,
        "x_quiet": seconds / quiet_s,
        "x_raw": seconds / raw_s,
        "reported_s": reported_s,
        "blocked_s": [report.blocked_s for report in reports],
        "starved_s": [report.starved_s for report in reports],
        "contents": contents,
    }


def _beside(workload: Workload, disk: RawDisk, nbytes: int, steps: int) -> float:
    """Steps and raw writes at the same time."""
    prepared, first_step_over = threading.Event(), threading.Event()

    def begin() -> None:
        prepared.set()
        first_step_over.wait()

    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(disk.rolling, nbytes, steps, _KEEP_LAST, begin)
        writing.add_done_callback(lambda _: prepared.set())  # also if it failed before
        prepared.wait()
        began_s = time.perf_counter()
        try:
            workload.step()
        finally:
            first_step_over.set()  # the thread is waited for, whatever happens
        for _ in range(steps - 1):
            workload.step()
        writing.result()
        return time.perf_counter() - began_s


def _quiet(workload: Workload, steps: int) -> float:
    settle()
    began_s = time.perf_counter()
    for _ in range(steps):
        workload.step()
    return time.perf_counter() - began_s


def _judge(workload: Workload, saver: Asyncckpt, last: int) -> str:
    """Whether the last two saves are right. The live state is the last one's before and after."""
    workload.remember()
    found = workload.judge(saver.load(last))
    workload.adopt(saver.load(last - 1))
    workload.step()
    again = workload.judge(dict(workload.tensors()))
    return found if found != "right" else again if again == "right" else f"a step before the last: {again}"


def _summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    keys = (
        "seconds",
        "training_s",
        "quiet_s",
        "raw_s",
        "best_s",
        "x_best",
        "beside_s",
        "x_beside",
        "lost_s",
        "unreported",
        "x_quiet",
        "x_raw",
    )
    result: dict[str, Any] = {key: summary(row[key] for row in rows) for key in keys}
    for key in ("blocked_s", "starved_s"):
        result[key] = summary(value for row in rows for value in row[key])
    return result | verdicts(rows)


def _targets(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Only the disk slows training down, and what it costs is reported."""
    return [
        target("time beside the best of steps and raw writes", name, "x", TARGET_RATIO, found["x_best"]),
        target("lost time that no report tells", name, "%", TARGET_UNREPORTED, found["unreported"]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write every_step.json."""
    options = Options.parse(__doc__.splitlines()[0], arguments)
    print(options.write("every_step", run(options)))


if __name__ == "__main__":
    main()
