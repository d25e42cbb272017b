"""How much host memory a save takes beyond what training had.

Each measurement is a process of its own: training makes its state and everything that it will hold; the
kernel's high-water mark is reset; a checkpointer is made and saves a few times while training goes on; the
mark is read. So all that our side ever takes is in it, whether it was given back or not. A huge state is
among them, where there is room for it: it is remembered by checksums, all its weights share a gradient, and
it is read back weight by weight, so that there is never a second one in memory.

    extra_bytes     the most that was resident, less what was resident before (VmHWM, VmRSS of proc(5))
    over_bytes      what of it is beyond `host_memory`

    python -m benchmarks.memory [--tiny] [--dir DISK] [--out DIRECTORY] [--rounds COUNT]
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from . import machine
from .results import Options, summary, target, verdicts
from .savers import Asyncckpt
from .workload import FULL, HUGE, TINY, Checksums, Size, Workload

TARGET_OVER_BYTES = 64 << 20
_HOST_MEMORY_MIN = 1 << 20
_ROOM_BYTES = 2 << 30  # for python, torch and all others
_RESET_PEAK = "5"  # proc(5), clear_refs


@dataclass(frozen=True)
class Case:
    """One kind of process.

    Attributes:
        part: the host memory is the state, or this part of it.
        huge: the state has no room for a copy of it.
        rounds: at most; sizes vary less than times.
    """

    size: Size
    part: int
    saves: int = 3
    huge: bool = False
    rounds: int = 3

    @property
    def where(self) -> str:
        """What the page calls it."""
        of_state = "host_memory = state" + (f" / {self.part}" if self.part > 1 else "")
        return f"{of_state}, huge state" if self.huge else of_state

    def cannot_run(self, directory: Path) -> str | None:
        """Why not on this machine, if it is so."""
        if not self.huge:
            return None
        needed = self.size.nbytes + self.size.nbytes // self.part + _ROOM_BYTES
        if (available := machine.available_bytes()) < needed:
            return f"{available >> 20} MiB of memory are available, {needed >> 20} MiB are needed"
        needed = self.size.nbytes + _ROOM_BYTES
        if (free := shutil.disk_usage(directory).free) < needed:
            return f"{free >> 20} MiB of disk are free, {needed >> 20} MiB are needed"
        return None


CASES = (
    *(Case(FULL, part) for part in (1, 2, 4, 10)),
    Case(HUGE, 10, saves=2, huge=True, rounds=1),
)
_TINY_CASES = (*(Case(TINY, part) for part in (1, 10)), Case(TINY, 10, saves=2, huge=True, rounds=1))


def run(options: Options) -> dict[str, Any]:
    """Measure and return the document."""
    cases = _TINY_CASES if options.tiny else CASES
    rows: list[dict[str, Any]] = []
    cannot: dict[str, str] = {}
    with options.scratch(2 * cases[0].size.nbytes) as scratch:
        facts = machine.describe(scratch)
        for number in range(options.rounds_or(3)):
            for case in cases:
                if number >= case.rounds:
                    continue
                if reason := case.cannot_run(scratch):
                    cannot[case.where] = reason
                    continue
                directory = scratch / f"{number}-{len(rows)}"
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    row = process.submit(measure, case, directory).result()
                print(
                    f"memory {number + 1} {case.where}: {row['extra_bytes'] >> 20} MiB extra for "
                    f"{row['host_memory'] >> 20} MiB, contents {row['contents']}",
                    file=sys.stderr,
                )
                rows.append({"round": number, "where": case.where, **row})
    measured = [case for case in cases if case.where not in cannot]
    summaries = {
        case.where: _summarise([row for row in rows if row["where"] == case.where]) for case in measured
    }
    return {
        "benchmark": "memory",
        "tiny": options.tiny,
        "machine": facts,
        "config": {case.where: {**asdict(case), "nbytes": case.size.nbytes} for case in cases},
        "targets": [
            target("host memory beyond `host_memory`", where, "bytes", TARGET_OVER_BYTES, one["over_bytes"])
            for where, one in summaries.items()
        ],
        "cannot_run": cannot,
        "summary": summaries,
        "rows": rows,
    }


def measure(case: Case, directory: Path) -> dict[str, Any]:
    """In a fresh process: a few saves under training. Leaves no files."""
    workload = Workload(case.size, Checksums() if case.huge else None)
    host_memory = max(_HOST_MEMORY_MIN, workload.nbytes // case.part)
    last = case.saves - 1
    workload.step()
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    before_bytes = machine.process_bytes("VmRSS")
    saver = Asyncckpt("asyncckpt", workload, directory, host_memory)
    try:
        for step in range(case.saves):
            if step:
                saver.delete(step - 1)
            if step == last:
                workload.remember()
            pending = saver.save(step)
            workload.step()
            pending.wait()
        extra_bytes = machine.process_bytes("VmHWM") - before_bytes
        loaded = saver.load_each(last) if case.huge else saver.load(last).items()
        contents = workload.judge_each(loaded)
        saver.delete(last)
    finally:
        saver.close()
        workload.close()
    return {
        "part": case.part,
        "nbytes": workload.nbytes,
        "host_memory": host_memory,
        "extra_bytes": extra_bytes,
        "over_bytes": extra_bytes - host_memory,
        "contents": contents,
    }


def _summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("nbytes", "host_memory", "extra_bytes", "over_bytes")
    result: dict[str, Any] = {key: summary(row[key] for row in rows) for key in keys}
    return result | verdicts(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write memory.json."""
    options = Options.parse(__doc__.splitlines()[0], arguments)
    print(options.write("memory", run(options)))


if __name__ == "__main__":
    main()
