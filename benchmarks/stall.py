"""What training loses to a save: blocked, slowed down, and how long until the save is durable.

Each measurement: quiet steps; save(); steps until the save is durable; the files are read with stock
tools and compared with the state at the call, although training changed every tensor meanwhile; deleted.
A raw write of the same size stands next to each, before and after in turn. Once in a round, as many bytes are
written raw beside training, with nothing to save: what the disk's traffic alone costs the steps.

    blocked     inside save(), and what the optimizer's hooks made it wait afterwards; both timed from
                outside, whatever the saver reports. What the hooks take in a quiet step is not in it: those
                of all our checkpointers are called in everybody's steps
    slowdown    steps that began before the save was durable, against the quiet steps just before; the
                waits in hooks are in `blocked`, not here
    lost        everything: from the call to the end of the last of those steps, less the same number of
                quiet steps

    python -m benchmarks.stall [--tiny] [--dir DISK] [--out DIRECTORY]
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from . import machine
from .lineup import Lineup
from .peers import PEERS
from .raw_disk import RAW_THREADS, RawDisk, settle
from .results import Options, best_peer_target, summary, target
from .savers import Asyncckpt, Saver
from .workload import FULL, TINY, StepTime, Workload

BLOCKED_TARGET_S = 0.005
BEST_PEER_TARGET_RATIO = 0.2  # five times less
SLOWDOWN_TARGET = 0.05
DURABLE_TARGET_RATIO = 1.10
OURS = ("asyncckpt", "asyncckpt, small arena")
SAVERS = (*OURS, *PEERS)
_SMALL_PART = 4  # the second checkpointer gets a quarter of the state: 256 MiB for 1 GiB
_QUIET_STEPS = 3


def measure(workload: Workload, saver: Saver, step: int) -> dict[str, Any]:
    """One save under training. Leaves no files."""
    settle()
    quiet = [workload.step() for _ in range(_QUIET_STEPS)]
    quiet_s = median(one.total_s for one in quiet)
    idle_fence_s = median(one.fence_s for one in quiet)
    workload.remember()
    workload.all_threads()
    began_s = time.perf_counter()
    pending = saver.save(step)
    call_s = time.perf_counter() - began_s
    workload.one_thread()
    flying = [workload.step()]
    while not pending.done():
        flying.append(workload.step())
    elapsed_s = time.perf_counter() - began_s
    report = pending.wait()
    fence_s = sum(one.fence_s - idle_fence_s for one in flying)
    row: dict[str, Any] = {
        "saver": saver.name,
        "call_s": call_s,
        "fence_s": fence_s,
        "idle_fence_s": idle_fence_s,
        "blocked_s": call_s + fence_s,
        "durable_s": pending.durable_at_s - began_s,
        "quiet_step_s": quiet_s,
        "steps_in_flight_s": [one.total_s for one in flying],
        "slowdown": _slowdown(flying, quiet_s),
        "lost_s": elapsed_s - len(flying) * quiet_s,
    }
    if report is not None:
        row |= {
            "reported_blocked_s": report.blocked_s,
            "phases": report.phases,
            "starved_s": report.starved_s,
            "replanned": report.replanned,
            "direct": report.direct,
        }
    row["contents"] = workload.judge(saver.load(step))
    saver.delete(step)
    return row


def measure_beside_raw(workload: Workload, disk: RawDisk) -> dict[str, Any]:
    """Steps while as many bytes are written raw: nothing is copied, checksummed or waited for."""
    settle()
    quiet_s = median(workload.step().total_s for _ in range(_QUIET_STEPS))
    with ThreadPoolExecutor(1) as thread:
        began_s = time.perf_counter()
        writing = thread.submit(disk.direct, workload.nbytes)
        flying = [workload.step()]
        while not writing.done():
            flying.append(workload.step())
        elapsed_s = time.perf_counter() - began_s
    return {
        "raw_s": writing.result().seconds,
        "quiet_step_s": quiet_s,
        "steps_in_flight_s": [one.total_s for one in flying],
        "slowdown": _slowdown(flying, quiet_s),
        "lost_s": elapsed_s - len(flying) * quiet_s,
    }


def _slowdown(flying: list[StepTime], quiet_s: float) -> float:
    """Of steps in flight, without their waits."""
    return mean(one.total_s - one.fence_s for one in flying) / quiet_s - 1


def run(options: Options) -> dict[str, Any]:
    """Measure and return the document."""
    warnings.filterwarnings("ignore", module="torch")  # of its own insides, and of being a single process
    workload = Workload(TINY if options.tiny else FULL)
    try:
        with options.scratch(6 * workload.nbytes) as scratch:
            return _run(options, workload, scratch)
    finally:
        workload.close()


def _run(options: Options, workload: Workload, scratch: Path) -> dict[str, Any]:
    facts = machine.describe(scratch)
    rounds = options.rounds_or(8)  # of each order of savers as many with each order of pairs
    disk = RawDisk(scratch)
    whole = Asyncckpt(OURS[0], workload, scratch / "whole", workload.nbytes + (64 << 20))
    part = Asyncckpt(OURS[1], workload, scratch / "part", workload.nbytes // _SMALL_PART)
    lineup = Lineup([whole, part], workload, scratch)
    rows: list[dict[str, Any]] = []
    raw_rows: list[dict[str, Any]] = []
    try:
        for number in range(rounds + 1):  # the first warms up
            beside_raw = measure_beside_raw(workload, disk)
            if number:
                raw_rows.append({"round": number, **beside_raw})
            for saver in lineup.turns(number):
                raw = None
                if number // 2 % 2:  # not in the rounds that go backwards, nor in all others
                    settle()
                    raw = disk.direct(workload.nbytes)
                found = lineup.measure(saver, partial(measure, workload, saver, number + 1))
                if found is None:
                    continue
                if raw is None:
                    settle()
                    raw = disk.direct(workload.nbytes)
                row = {"round": number, **found, "raw": asdict(raw)}
                row["ratio"] = row["durable_s"] / raw.seconds
                print(
                    f"stall {number}/{rounds} {saver.name}: blocked {row['blocked_s'] * 1e3:.1f} ms, "
                    f"slowdown {row['slowdown']:.1%}, "
                    f"durable {row['durable_s']:.3f} s = {row['ratio']:.2f} raw, contents {row['contents']}",
                    file=sys.stderr,
                )
                if number:
                    rows.append(row)
    finally:
        lineup.close()
    savers = lineup.savers
    rows = lineup.kept(rows)
    summaries = {
        saver.name: _summarise([row for row in rows if row["saver"] == saver.name]) for saver in savers
    }
    return {
        "benchmark": "stall",
        "tiny": options.tiny,
        "machine": facts,
        "config": {
            "nbytes": workload.nbytes,
            "tensors": workload.tensor_count,
            "weights": [workload.size.weights, workload.size.rows, workload.size.columns],
            "compute_s": workload.size.compute_s,
            "step_s": mean(row["quiet_step_s"] for row in rows),
            "raw_threads": RAW_THREADS,
            "rounds": rounds,
            "notes": {saver.name: saver.note for saver in savers},
        },
        "targets": _targets(summaries[whole.name], whole.note, rows),
        "cannot_run": lineup.cannot_run,
        "summary": summaries,
        "beside_raw": {key: summary(row[key] for row in raw_rows) for key in ("raw_s", "slowdown", "lost_s")},
        "rows": rows,
        "raw_rows": raw_rows,
    }


def _summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    keys = [
        "blocked_s",
        "call_s",
        "fence_s",
        "idle_fence_s",
        "reported_blocked_s",
        "durable_s",
        "slowdown",
        "lost_s",
        "ratio",
    ]
    result: dict[str, Any] = {key: summary(row[key] for row in rows) for key in keys if key in rows[0]}
    result["raw_s"] = summary(row["raw"]["seconds"] for row in rows)
    result["contents_right"] = sum(row["contents"] == "right" for row in rows)
    result["contents_wrong"] = sorted({row["contents"] for row in rows} - {"right"})
    if "phases" in rows[0]:
        names = [name for name in rows[0]["phases"] if all(name in row["phases"] for row in rows)]
        result["phases"] = {name: summary(row["phases"][name] for row in rows) for name in names}
        result["replanned"] = sum(row["replanned"] for row in rows)
        result["direct"] = all(row["direct"] for row in rows)
    return result


def _targets(ours: dict[str, Any], note: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        target("blocked per save, warm", note, "s", BLOCKED_TARGET_S, ours["blocked_s"]),
        best_peer_target(note, BEST_PEER_TARGET_RATIO, rows, OURS[0], PEERS),
        target(
            "slowdown of steps in flight",
            "one core left to the engine",
            "%",
            SLOWDOWN_TARGET,
            ours["slowdown"],
        ),
        target("durable beside the paired raw write", note, "x", DURABLE_TARGET_RATIO, ours["ratio"]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write stall.json."""
    options = Options.parse(__doc__.splitlines()[0], arguments)
    print(options.write("stall", run(options)))


if __name__ == "__main__":
    main()
