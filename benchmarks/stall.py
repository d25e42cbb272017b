"""What training loses to a save: blocked, slowed down, and how long until the save is durable.

Each measurement: quiet steps; save(); steps until the save is durable; quiet steps again; the files are read
with stock tools and compared with the state at the call, although training changed every tensor meanwhile;
deleted. A raw write of the same size stands next to each, before and after in turn.

First ours alone: what training loses to them, in a process that has no other. Once in such a round, as many
bytes are written raw beside training, with nothing to save: what the disk's traffic alone costs the steps.
Then the peers are made, and all take turns: how ours compare.

    blocked     inside save(), and what the optimizer's hooks made it wait afterwards; both timed from
                outside, whatever the saver reports. What the hooks take in a quiet step is not in it: those
                of all our checkpointers are called in everybody's steps
    call_cpu_s  what of the time inside save() its thread spent on a processor; the rest it waited
    slowdown    how much longer a step takes from the return of save() until the save is durable: what all
                steps that began then took beyond quiet ones, by the rest of that time; the waits in hooks
                are in `blocked`, not here. None if that time is less than half a quiet step
    lost        everything: from the call to the end of the last of those steps, less the same number of
                quiet steps
    stolen      the share of the machine's processors that it was not given meanwhile, though there was
                something to do

    python -m benchmarks.stall [--tiny] [--dir DISK] [--out DIRECTORY]
"""

from __future__ import annotations

import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from . import machine
from .lineup import Lineup
from .peers import PEERS
from .raw_disk import RAW_THREADS, RawDisk, settle
from .results import Options, best_peer_target, summaries, summary, target, verdicts
from .savers import Asyncckpt, Saver
from .workload import FULL, TINY, StepTime, Workload

BLOCKED_TARGET_S = 0.005
BEST_PEER_TARGET_RATIO = 0.2  # five times less
SLOWDOWN_TARGET = 0.05
DURABLE_TARGET_RATIO = 1.10
OURS = ("asyncckpt", "asyncckpt, low priority", "asyncckpt, small arena")
SAVERS = (*OURS, *PEERS)
_SMALL_PART = 4  # one checkpointer gets a quarter of the state: 256 MiB for 1 GiB
_QUIET_STEPS = 3  # before a save, and as many after it
_ROUNDS, _PEER_ROUNDS = 20, 8  # more of ours alone, since limits are set to them
MEASURED = (
    "blocked_s",
    "call_s",
    "call_cpu_s",
    "call_faults",
    "call_switches",
    "fence_s",
    "idle_fence_s",
    "reported_blocked_s",
    "durable_s",
    "slowdown",
    "lost_s",
    "stolen",
)


def measure(workload: Workload, saver: Saver, step: int) -> dict[str, Any]:
    """One save under training. Leaves no files."""
    settle()
    stolen = machine.Stolen()
    before = _quiet_steps(workload)
    workload.remember()
    workload.all_threads()
    so_far = _Spent.so_far()
    began_s = time.perf_counter()
    pending = saver.save(step)
    call_s = time.perf_counter() - began_s
    call = _Spent.so_far() - so_far
    workload.one_thread()
    flying = _steps_until(workload, pending.done)
    elapsed_s = time.perf_counter() - began_s
    report = pending.wait()
    settle()
    quiet = _typical(before, _quiet_steps(workload))
    stolen_share = stolen.share()
    durable_s = pending.durable_at_s - began_s
    fence_s = sum(one.fence_s - quiet.fence_s for one in flying)
    row: dict[str, Any] = {
        "saver": saver.name,
        "call_s": call_s,
        "call_cpu_s": call.cpu_s,
        "call_faults": call.faults,
        "call_switches": call.switches,
        "fence_s": fence_s,
        "idle_fence_s": quiet.fence_s,
        "blocked_s": call_s + fence_s,
        "durable_s": durable_s,
        "quiet_step_s": quiet.total_s,
        "steps_in_flight_s": [one.total_s for one in flying],
        "slowdown": _slowdown(flying, quiet, durable_s - call_s),
        "lost_s": elapsed_s - len(flying) * quiet.total_s,
        "stolen": stolen_share,
    }
    if report is not None:
        row |= {
            "reported_blocked_s": report.blocked_s,
            "phases": report.phases,
            "starved_s": report.starved_s,
        }
    row["contents"] = workload.judge(saver.load(step))
    saver.delete(step)
    return row


def measure_beside_raw(workload: Workload, disk: RawDisk) -> dict[str, Any]:
    """Steps while as many bytes are written raw: nothing is copied, checksummed or waited for."""
    settle()
    stolen = machine.Stolen()
    before = _quiet_steps(workload)
    with ThreadPoolExecutor(1) as thread:
        began_s = time.perf_counter()
        writing = thread.submit(disk.direct, workload.nbytes)
        flying = _steps_until(workload, writing.done)
        elapsed_s = time.perf_counter() - began_s
    raw_s = writing.result().seconds
    settle()
    quiet = _typical(before, _quiet_steps(workload))
    stolen_share = stolen.share()
    return {
        "raw_s": raw_s,
        "quiet_step_s": quiet.total_s,
        "steps_in_flight_s": [one.total_s for one in flying],
        "slowdown": _slowdown(flying, quiet, raw_s),
        "lost_s": elapsed_s - len(flying) * quiet.total_s,
        "stolen": stolen_share,
    }


@dataclass(frozen=True)
class _Spent:
    """What a thread has done: processor time, page faults, and how often it left the processor."""

    cpu_s: float
    faults: int
    switches: int

    @classmethod
    def so_far(cls) -> _Spent:
        """By the calling thread."""
        usage = resource.getrusage(resource.RUSAGE_THREAD)  # its times are in ticks, and too coarse
        return cls(time.thread_time(), usage.ru_minflt + usage.ru_majflt, usage.ru_nvcsw + usage.ru_nivcsw)

    def __sub__(self, earlier: _Spent) -> _Spent:
        return _Spent(
            self.cpu_s - earlier.cpu_s, self.faults - earlier.faults, self.switches - earlier.switches
        )


def _quiet_steps(workload: Workload) -> list[StepTime]:
    return [workload.step() for _ in range(_QUIET_STEPS)]


def _steps_until(workload: Workload, done: Callable[[], bool]) -> list[StepTime]:
    steps = [workload.step()]
    while not done():
        steps.append(workload.step())
    return steps


def _typical(before: Sequence[StepTime], after: Sequence[StepTime]) -> StepTime:
    """A quiet step in between, should the machine have changed."""
    return StepTime(
        mean(median(one.total_s for one in steps) for steps in (before, after)),
        median(one.fence_s for one in (*before, *after)),
    )


def _slowdown(flying: Sequence[StepTime], quiet: StepTime, in_flight_s: float) -> float | None:
    """Of training from the return of save() until durable, `in_flight_s` later, without its waits.

    The last step ends after that: what they took beyond quiet ones was lost in that time alone. At most ten,
    where nearly all of it was lost.
    """
    work_s = sum(one.total_s - one.fence_s for one in flying)
    excess_s = work_s - len(flying) * (quiet.total_s - quiet.fence_s)
    trained_s = in_flight_s - sum(one.fence_s for one in flying)
    if trained_s < quiet.total_s / 2:
        return None
    return min(10.0, excess_s / max(trained_s - excess_s, trained_s / 100))


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
    alone_rounds, peer_rounds = options.rounds_or(_ROUNDS), options.rounds_or(_PEER_ROUNDS)
    rounds = alone_rounds + 1 + peer_rounds
    disk = RawDisk(scratch)
    whole = Asyncckpt(OURS[0], workload, scratch / "whole", workload.nbytes + (64 << 20))
    low = Asyncckpt(OURS[1], workload, scratch / "low", workload.nbytes + (64 << 20), writers_priority="low")
    part = Asyncckpt(OURS[2], workload, scratch / "part", workload.nbytes // _SMALL_PART)
    lineup = Lineup([whole, low, part], workload, scratch)
    rows: list[dict[str, Any]] = []
    raw_rows: list[dict[str, Any]] = []
    try:
        for number in range(rounds + 1):
            warms_up = number in (0, alone_rounds + 1)  # ours; everybody
            is_alone = number <= alone_rounds
            if number == alone_rounds + 1:
                lineup.invite()
            if is_alone:
                beside_raw = measure_beside_raw(workload, disk)
                if not warms_up:
                    raw_rows.append({"round": number, **beside_raw})
            for saver in lineup.turns(number):
                raw = None
                if number % 2:
                    settle()
                    raw = disk.direct(workload.nbytes)
                found = lineup.measure(saver, partial(measure, workload, saver, number + 1))
                if found is None:
                    continue
                if raw is None:
                    settle()
                    raw = disk.direct(workload.nbytes)
                row = {"round": number, "alone": is_alone, **found, "raw": asdict(raw)}
                row["ratio"] = row["durable_s"] / raw.seconds
                print(
                    f"stall {number}/{rounds} {saver.name}: blocked {row['blocked_s'] * 1e3:.1f} ms, "
                    f"lost {row['lost_s'] * 1e3:.0f} ms, "
                    f"durable {row['durable_s']:.3f} s = {row['ratio']:.2f} raw, contents {row['contents']}",
                    file=sys.stderr,
                )
                if not warms_up:
                    rows.append(row)
    finally:
        lineup.close()
    rows = lineup.kept(rows)
    alone, beside = (_by_saver([row for row in rows if row["alone"] == which]) for which in (True, False))
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
            "rounds": alone_rounds,
            "peer_rounds": peer_rounds,
            "notes": {saver.name: saver.note for saver in lineup.savers},
        },
        "targets": _targets(alone[whole.name], whole.note, rows),
        "cannot_run": lineup.cannot_run,
        "alone": alone,
        "beside_raw": summaries(raw_rows, ("raw_s", "slowdown", "lost_s", "stolen")),
        "summary": beside,
        "rows": rows,
        "raw_rows": raw_rows,
    }


def _by_saver(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of each saver that is there."""
    ours_s = {row["round"]: row["blocked_s"] for row in rows if row["saver"] == OURS[0]}
    found: dict[str, Any] = {}
    for saver in SAVERS:
        of_saver = [row for row in rows if row["saver"] == saver]
        if not of_saver:
            continue
        found[saver] = {
            **summaries(of_saver, (*MEASURED, "ratio")),
            "raw_s": summary(row["raw"]["seconds"] for row in of_saver),
            "x_ours": summary(row["blocked_s"] / ours_s[row["round"]] for row in of_saver),
            **verdicts(of_saver),
            **phases(of_saver),
        }
    return found


def phases(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """When each phase was reached that all these saves had; nothing for savers that tell none."""
    if "phases" not in rows[0]:
        return {}
    names = [name for name in rows[0]["phases"] if all(name in row["phases"] for row in rows)]
    return {"phases": {name: summary(row["phases"][name] for row in rows) for name in names}}


def _targets(ours: dict[str, Any], note: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        target("blocked per save, warm", note, "s", BLOCKED_TARGET_S, ours["blocked_s"]),
        best_peer_target(note, BEST_PEER_TARGET_RATIO, rows, OURS[0], PEERS),
        *(
            target(
                "slowdown of steps in flight", "one core left to the engine", "%", SLOWDOWN_TARGET, slowdown
            )
            for slowdown in [ours.get("slowdown")]
            if slowdown is not None  # in a tiny run, saves may be too short to tell
        ),
        target("durable beside the paired raw write", note, "x", DURABLE_TARGET_RATIO, ours["ratio"]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write stall.json."""
    options = Options.parse(__doc__.splitlines()[0], arguments)
    print(options.write("stall", run(options)))


if __name__ == "__main__":
    main()
