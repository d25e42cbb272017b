"""How near a whole save comes to writing as many bytes.

A save makes a step durable, with everything that makes it crash-safe. Beside it as many bytes are written
raw: four threads, O_DIRECT, blocks of huge pages, one new preallocated file, fsync. A round is two pairs, one
in each order; training is idle. Identical raw writes differ by a quarter, so each save is compared with the
raw write next to it. One buffered writer with fsync, which is what serializers do, is beside them.

That raw write sends the same block over and over. On the other side of each save, as many bytes are written
raw out of as much memory as a save has.

    ratio       seconds until a save is durable, by seconds of the raw write next to it
    x_apart    the same, by seconds of that one

    python -m benchmarks.write [--tiny] [--dir DISK] [--out DIRECTORY] [--rounds COUNT]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import machine
from .raw_disk import BLOCK_NBYTES, RAW_THREADS, RawDisk, settle
from .results import Options, summary, target
from .savers import Asyncckpt
from .workload import FULL, TINY, Workload

TARGET_RATIO = 1.10


def run(options: Options) -> dict[str, Any]:
    """Measure and return the document."""
    workload = Workload(TINY if options.tiny else FULL)
    try:
        with options.scratch(4 * workload.nbytes) as scratch:
            saver = Asyncckpt("asyncckpt", workload, scratch / "ours", _arena_nbytes(workload))
            try:
                return _run(options, workload, saver, scratch)
            finally:
                saver.close()
    finally:
        workload.close()


def _arena_nbytes(workload: Workload) -> int:
    """For all that a save writes."""
    return workload.nbytes + (64 << 20)


def _run(options: Options, workload: Workload, saver: Asyncckpt, scratch: Path) -> dict[str, Any]:
    facts = machine.describe(scratch)
    disk = RawDisk(scratch, [_arena_nbytes(workload)])
    rounds = options.rounds_or(10)
    nbytes = workload.nbytes
    step = 0

    def ours() -> dict[str, Any]:
        nonlocal nbytes, step
        step += 1
        workload.step()
        workload.remember()
        settle()
        began_s = time.perf_counter()
        report = saver.save(step).wait()
        seconds = time.perf_counter() - began_s
        assert report is not None
        nbytes = report.nbytes
        contents = workload.judge(saver.load(step))
        saver.delete(step)
        return {
            "ours_s": seconds,
            "reported_s": report.durable_s,
            "phases": report.phases,
            "direct": report.direct,
            "contents": contents,
        }

    def raw() -> dict[str, Any]:
        settle()
        return {"raw": asdict(disk.direct(nbytes))}

    def apart() -> dict[str, Any]:
        settle()
        return {"apart": asdict(disk.direct(nbytes, apart=True))}

    rows: list[dict[str, Any]] = []
    buffered: list[dict[str, Any]] = []
    for number in range(rounds + 1):  # the first warms up
        for turns in ((apart, ours, raw), (raw, ours, apart)):
            row: dict[str, Any] = {"round": number, "first": turns[0].__name__}
            for measure in turns:
                row |= measure()
            row["ratio"] = row["ours_s"] / row["raw"]["seconds"]
            row["x_apart"] = row["ours_s"] / row["apart"]["seconds"]
            print(
                f"write {number}/{rounds}: {row['ours_s']:.3f} s = {row['ratio']:.2f} raw "
                f"= {row['x_apart']:.2f} raw out of as much memory, contents {row['contents']}",
                file=sys.stderr,
            )
            if number:
                rows.append(row)
        settle()
        serial = {"round": number, **asdict(disk.buffered(nbytes))}
        if number:
            buffered.append(serial)
    ratio = summary(row["ratio"] for row in rows)
    return {
        "benchmark": "write",
        "tiny": options.tiny,
        "machine": facts,
        "config": {
            "nbytes": nbytes,
            "arena_bytes": _arena_nbytes(workload),
            "raw_threads": RAW_THREADS,
            "block_bytes": BLOCK_NBYTES,
            "rounds": rounds,
        },
        "targets": [
            target("whole save beside the paired raw write", "training idle", "x", TARGET_RATIO, ratio)
        ],
        "summary": {
            "ours_s": summary(row["ours_s"] for row in rows),
            "reported_s": summary(row["reported_s"] for row in rows),
            "raw_s": summary(row["raw"]["seconds"] for row in rows),
            "apart_s": summary(row["apart"]["seconds"] for row in rows),
            "buffered_s": summary(row["seconds"] for row in buffered),
            "ratio": ratio,
            "x_apart": summary(row["x_apart"] for row in rows),
            "contents_right": sum(row["contents"] == "right" for row in rows),
            "direct": all(row["direct"] and row["raw"]["direct"] and row["apart"]["direct"] for row in rows),
        },
        "rows": rows,
        "buffered_rows": buffered,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write write.json."""
    options = Options.parse(__doc__.splitlines()[0], arguments)
    print(options.write("write", run(options)))


if __name__ == "__main__":
    main()
