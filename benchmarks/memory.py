"""How much host memory a save takes beyond what training had.

Each measurement is a process of its own: training makes its state and everything that it will hold; the
kernel's high-water mark is reset; a checkpointer is made and saves a few times while training goes on; the
mark is read. So all that our side ever takes is in it, whether it was given back or not.

    extra_bytes     the most that was resident, less what was resident before (VmHWM, VmRSS of proc(5))
    over_bytes      what of it is beyond `host_memory`

    python -m benchmarks.memory [--tiny] [--dir DISK] [--out DIRECTORY] [--rounds COUNT]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from . import machine
from .results import Options, summary, target
from .savers import Asyncckpt
from .workload import FULL, TINY, Size, Workload

PARTS = (1, 2, 4, 10)  # the host memory is the state, or this part of it
_TINY_PARTS = (1, 10)
TARGET_OVER_BYTES = 64 << 20
_SAVES = 3
_HOST_MEMORY_MIN = 1 << 20
_RESET_PEAK = "5"  # proc(5), clear_refs


def run(options: Options) -> dict[str, Any]:
    """Measure and return the document."""
    size = TINY if options.tiny else FULL
    parts = _TINY_PARTS if options.tiny else PARTS
    rounds = options.rounds_or(3)  # sizes vary less than times
    nbytes = size.nbytes
    rows: list[dict[str, Any]] = []
    with options.scratch(4 * nbytes) as scratch:
        facts = machine.describe(scratch)
        for number in range(rounds):
            for part in parts:
                directory = scratch / f"{number}-{part}"
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    row = process.submit(measure, size, directory, part).result()
                print(
                    f"memory {number + 1}/{rounds} 1/{part}: {row['extra_bytes'] >> 20} MiB extra for "
                    f"{row['host_memory'] >> 20} MiB, contents {row['contents']}",
                    file=sys.stderr,
                )
                rows.append({"round": number, **row})
    summaries = {part: _summarise([row for row in rows if row["part"] == part]) for part in parts}
    return {
        "benchmark": "memory",
        "tiny": options.tiny,
        "machine": facts,
        "config": {"nbytes": nbytes, "saves": _SAVES, "rounds": rounds},
        "targets": [
            target(
                "host memory beyond `host_memory`",
                _where(part),
                "bytes",
                TARGET_OVER_BYTES,
                one["over_bytes"],
            )
            for part, one in summaries.items()
        ],
        "summary": {_where(part): one for part, one in summaries.items()},
        "rows": rows,
    }


def measure(size: Size, directory: Path, part: int) -> dict[str, Any]:
    """In a fresh process: a few saves under training. Leaves no files."""
    workload = Workload(size)
    host_memory = max(_HOST_MEMORY_MIN, workload.nbytes // part)
    workload.step()
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    before_bytes = machine.process_bytes("VmRSS")
    saver = Asyncckpt("asyncckpt", workload, directory, host_memory)
    try:
        for step in range(_SAVES):
            workload.remember()
            pending = saver.save(step)
            workload.step()
            pending.wait()
            if step:
                saver.delete(step - 1)
        extra_bytes = machine.process_bytes("VmHWM") - before_bytes
        contents = workload.judge(saver.load(_SAVES - 1))
        saver.delete(_SAVES - 1)
    finally:
        saver.close()
        workload.close()
    return {
        "part": part,
        "host_memory": host_memory,
        "extra_bytes": extra_bytes,
        "over_bytes": extra_bytes - host_memory,
        "contents": contents,
    }


def _where(part: int) -> str:
    return "host_memory = state" if part == 1 else f"host_memory = state / {part}"


def _summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("host_memory", "extra_bytes", "over_bytes")
    result: dict[str, Any] = {key: summary(row[key] for row in rows) for key in keys}
    result["contents_right"] = sum(row["contents"] == "right" for row in rows)
    result["contents_wrong"] = sorted({row["contents"] for row in rows} - {"right"})
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write memory.json."""
    options = Options.parse(__doc__.splitlines()[0], arguments)
    print(options.write("memory", run(options)))


if __name__ == "__main__":
    main()
