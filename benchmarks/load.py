"""How near a load comes to reading as many bytes.

load() brings a step into the live tensors and checks every byte. Beside it, files of the same sizes are read
raw: four threads, O_DIRECT, blocks of huge pages. A round is two pairs, one in each order; nothing is in the
page cache before any of them, and training is idle. Stock dcp.load reads the same step once in each round.

That raw read fills the same few blocks over and over. On the other side of each load, the same is read to
where it would belong, into as much memory.

    ratio       seconds of load() by seconds of the raw read next to it
    x_apart    the same, by seconds of that one

    python -m benchmarks.load [--tiny] [--dir DISK] [--out DIRECTORY] [--rounds COUNT]
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import machine
from .raw_disk import BLOCK_NBYTES, RAW_THREADS, RawDisk, forget
from .results import Options, summary, target
from .savers import Asyncckpt, DcpReader
from .workload import FULL, TINY, Workload, tensors_of

TARGET_RATIO = 1.10
_STEP = 1


def run(options: Options) -> dict[str, Any]:
    """Measure and return the document."""
    warnings.filterwarnings("ignore", module="torch")  # as in stall.py
    workload = Workload(TINY if options.tiny else FULL)
    try:
        with options.scratch(3 * workload.nbytes) as scratch:
            saver = Asyncckpt("asyncckpt", workload, scratch / "ours", workload.nbytes + (64 << 20))
            try:
                return _run(options, workload, saver, scratch)
            finally:
                saver.close()
    finally:
        workload.close()


def _run(options: Options, workload: Workload, saver: Asyncckpt, scratch: Path) -> dict[str, Any]:
    facts = machine.describe(scratch)
    rounds = options.rounds_or(10)
    workload.remember()
    saver.save(_STEP).wait()
    step_files = [path for path in sorted(saver.directory(_STEP).rglob("*")) if path.is_file()]
    sizes = [path.stat().st_size for path in step_files]
    disk = RawDisk(scratch, sizes)
    raw_files = [disk.keep(scratch / f"raw-{index}", nbytes) for index, nbytes in enumerate(sizes)]

    def ours() -> dict[str, Any]:
        workload.step()  # what is loaded is not what is there
        forget(step_files)
        began_s = time.perf_counter()
        resume = saver.resume(_STEP)
        seconds = time.perf_counter() - began_s
        assert resume.verified
        return {
            "ours_s": seconds,
            "phases": dict(resume.phases),
            "contents": workload.judge(dict(workload.tensors())),
        }

    def raw() -> dict[str, Any]:
        forget(raw_files)
        read = disk.read(raw_files)
        return {"raw_s": read.seconds, "raw_direct": read.direct}

    def apart() -> dict[str, Any]:
        forget(raw_files)
        read = disk.read(raw_files, apart=True)
        return {"apart_s": read.seconds, "apart_direct": read.direct}

    rows: list[dict[str, Any]] = []
    stock: list[dict[str, Any]] = []
    for number in range(rounds + 1):  # the first warms up
        for turns in ((apart, ours, raw), (raw, ours, apart)):
            row: dict[str, Any] = {"round": number, "first": turns[0].__name__}
            for measure in turns:
                row |= measure()
            row["ratio"] = row["ours_s"] / row["raw_s"]
            row["x_apart"] = row["ours_s"] / row["apart_s"]
            print(
                f"load {number}/{rounds}: {row['ours_s']:.3f} s = {row['ratio']:.2f} raw "
                f"= {row['x_apart']:.2f} raw into as much memory, contents {row['contents']}",
                file=sys.stderr,
            )
            if number:
                rows.append(row)
        read = {"round": number, **_stock(workload, saver, step_files)}
        if number:
            stock.append(read)
    ratio = summary(row["ratio"] for row in rows)
    return {
        "benchmark": "load",
        "tiny": options.tiny,
        "machine": facts,
        "config": {
            "nbytes": sum(sizes),
            "files": len(sizes),
            "raw_threads": RAW_THREADS,
            "block_bytes": BLOCK_NBYTES,
            "rounds": rounds,
        },
        "targets": [target("load beside the paired raw read", "cold, verified", "x", TARGET_RATIO, ratio)],
        "summary": {
            "ours_s": summary(row["ours_s"] for row in rows),
            "raw_s": summary(row["raw_s"] for row in rows),
            "apart_s": summary(row["apart_s"] for row in rows),
            "stock_s": summary(row["stock_s"] for row in stock),
            "ratio": ratio,
            "x_apart": summary(row["x_apart"] for row in rows),
            "phases": {name: summary(row["phases"][name] for row in rows) for name in rows[0]["phases"]},
            "contents_right": sum(row["contents"] == "right" for row in rows),
            "stock_contents_right": sum(row["contents"] == "right" for row in stock),
            "direct": all(row["raw_direct"] and row["apart_direct"] for row in rows),
        },
        "rows": rows,
        "stock_rows": stock,
    }


def _stock(workload: Workload, saver: Asyncckpt, step_files: Iterable[Path]) -> dict[str, Any]:
    """One cold dcp.load into tensors that were made before."""
    reader = DcpReader(workload)
    into = reader.target()
    forget(step_files)
    began_s = time.perf_counter()
    reader.fill(into, saver.directory(_STEP))
    seconds = time.perf_counter() - began_s
    return {"stock_s": seconds, "contents": workload.judge(dict(tensors_of(into)))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write load.json."""
    options = Options.parse(__doc__.splitlines()[0], arguments)
    print(options.write("load", run(options)))


if __name__ == "__main__":
    main()
