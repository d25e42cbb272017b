"""What the first save of a process costs beside the later ones, when nothing is warm yet.

Each measurement is a process of its own: training makes its state; a checkpointer is made, and its memory is
made present in the background while training goes on; then some saves under training, the first of which
finds nothing that an earlier one left. Once with the memory present before the first save, as it is in any
run that trains longer than that takes, and once with a save as soon as the constructor has returned. No save
has told yet that the memory is present: the process is seen to grow (VmRSS of proc(5)). The last save is read
back and compared.

    x_later     seconds until the first save is durable, by the median of the later ones of that process
    present_s   from the call of the constructor until its memory was there, as seen after each step

    python -m benchmarks.first_save [--tiny] [--dir DISK] [--out DIRECTORY] [--rounds COUNT]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from . import machine
from .raw_disk import settle
from .results import Options, summary, target, verdicts
from .savers import Asyncckpt
from .workload import FULL, TINY, Size, Workload

TARGET_RATIO = 1.3
WHEN = {"memory present": True, "at once": False}
_SAVES = 4
_PRESENT = 0.8  # of `host_memory`: a part of it is no arena, see Stager
_PRESENT_DEADLINE_S = 30.0


def run(options: Options) -> dict[str, Any]:
    """Measure and return the document."""
    size = TINY if options.tiny else FULL
    rounds = 1 if options.tiny else options.rounds_or(4)
    rows: list[dict[str, Any]] = []
    with options.scratch(3 * size.nbytes) as scratch:
        facts = machine.describe(scratch)
        for number in range(rounds):
            for when, present in WHEN.items():
                directory = scratch / f"{number}-{present}"
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    row = process.submit(measure, size, directory, present).result()
                print(
                    f"first_save {number + 1}/{rounds} {when}: {row['durable_s'][0]:.3f} s = "
                    f"{row['x_later']:.2f} of the later ones, contents {row['contents']}",
                    file=sys.stderr,
                )
                rows.append({"round": number, "when": when, **row})
    summaries = {when: _summarise([row for row in rows if row["when"] == when]) for when in WHEN}
    return {
        "benchmark": "first_save",
        "tiny": options.tiny,
        "machine": facts,
        "config": {"nbytes": size.nbytes, "saves": _SAVES, "rounds": rounds},
        "targets": [
            target("first save beside the later ones", when, "x", TARGET_RATIO, found["x_later"])
            for when, found in summaries.items()
        ],
        "summary": summaries,
        "rows": rows,
    }


def measure(size: Size, directory: Path, present: bool) -> dict[str, Any]:
    """In a fresh process: some saves under training. Leaves no files."""
    workload = Workload(size)
    host_memory = workload.nbytes + (64 << 20)
    workload.step()
    before_bytes = machine.process_bytes("VmRSS")
    settle()
    began_s = time.perf_counter()
    saver = Asyncckpt("asyncckpt", workload, directory, host_memory)
    present_s = None
    durable_s, blocked_s = [], []
    contents = "not saved"
    try:
        if present:
            grown_bytes = before_bytes + int(_PRESENT * host_memory)
            present_s = _train_until_grown(workload, grown_bytes, began_s) - began_s
        for step in range(_SAVES):
            if step or present:
                settle()
                workload.step()
            last = step == _SAVES - 1
            if last:
                workload.remember()
            pending = saver.save(step)
            while True:
                workload.step()
                if pending.done():
                    break
            report = pending.wait()
            assert report is not None
            assert report.durable_s is not None
            durable_s.append(report.durable_s)
            blocked_s.append(report.blocked_s)
            if last:
                contents = workload.judge(saver.load(step))
            saver.delete(step)
    finally:
        saver.close()
        workload.close()
    return {
        "host_memory": host_memory,
        "present_s": present_s,
        "durable_s": durable_s,
        "blocked_s": blocked_s,
        "x_later": durable_s[0] / median(durable_s[1:]),
        "contents": contents,
    }


def _train_until_grown(workload: Workload, resident_bytes: int, began_s: float) -> float:
    """Steps until so much is resident, and one more, in which the rest follows. When it was so much."""
    while machine.process_bytes("VmRSS") < resident_bytes:
        if time.perf_counter() - began_s > _PRESENT_DEADLINE_S:
            raise TimeoutError(f"the checkpointer's memory is not present after {_PRESENT_DEADLINE_S:g} s")
        workload.step()
    grown_s = time.perf_counter()
    workload.step()
    return grown_s


def _summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {"x_later": summary(row["x_later"] for row in rows)}
    for key in ("durable_s", "blocked_s"):
        result[f"first_{key}"] = summary(row[key][0] for row in rows)
        result[f"later_{key}"] = summary(seconds for row in rows for seconds in row[key][1:])
    if rows[0]["present_s"] is not None:
        result["present_s"] = summary(row["present_s"] for row in rows)
    return result | verdicts(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write first_save.json."""
    options = Options.parse(__doc__.splitlines()[0], arguments)
    print(options.write("first_save", run(options)))


if __name__ == "__main__":
    main()
