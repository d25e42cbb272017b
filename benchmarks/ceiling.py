"""How fast this disk takes a file of the same size, and how near a whole save comes to it.

Raw: four threads write blocks of huge pages with O_DIRECT into a new, preallocated file, and fsync it.
One buffered writer with fsync, which is what serializers do, is beside it for information. Training is
idle here. Identical raw runs differ by a quarter, so each save is compared with the raw write next to it.

    python -m benchmarks.ceiling [--tiny] [--dir DISK] [--out DIRECTORY]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from . import machine
from .raw_disk import BLOCK_NBYTES, RAW_THREADS, RawDisk, settle
from .results import Options, summary
from .savers import Asyncckpt
from .workload import FULL, TINY, Workload


def run(options: Options) -> dict[str, Any]:
    """Measure and return the document."""
    workload = Workload(TINY if options.tiny else FULL)
    rows: list[dict[str, Any]] = []
    try:
        with options.scratch(4 * workload.nbytes) as scratch:
            machine_facts = machine.describe(scratch)
            disk, saver = (
                RawDisk(scratch),
                Asyncckpt("asyncckpt", workload, scratch / "ours", workload.nbytes + (64 << 20)),
            )
            try:
                nbytes = workload.nbytes
                for number in range(options.rounds + 1):  # the first warms up
                    measures = ["raw", "ours"] if number % 2 else ["ours", "raw"]
                    row: dict[str, Any] = {"round": number}
                    for what in (*measures, "buffered"):
                        settle()
                        if what == "ours":
                            workload.remember()
                            report = saver.save(number).wait()
                            assert report is not None
                            row["ours_s"], row["phases"], row["direct"] = (
                                report.durable_s,
                                report.phases,
                                report.direct,
                            )
                            nbytes = report.nbytes
                            row["contents"] = workload.judge(saver.load(number))
                            saver.delete(number)
                        else:
                            row[what] = asdict(
                                disk.direct(nbytes) if what == "raw" else disk.buffered(nbytes)
                            )
                    row["ratio"] = row["ours_s"] / row["raw"]["seconds"]
                    print(
                        f"ceiling {number}/{options.rounds}: {row['ours_s']:.3f} s = {row['ratio']:.2f} raw",
                        file=sys.stderr,
                    )
                    if number:
                        rows.append(row)
            finally:
                saver.close()
    finally:
        workload.close()
    return {
        "benchmark": "ceiling",
        "tiny": options.tiny,
        "machine": machine_facts,
        "config": {
            "nbytes": nbytes,
            "raw_threads": RAW_THREADS,
            "block_bytes": BLOCK_NBYTES,
            "rounds": options.rounds,
        },
        "summary": {
            "ours_s": summary(row["ours_s"] for row in rows),
            "raw_s": summary(row["raw"]["seconds"] for row in rows),
            "buffered_s": summary(row["buffered"]["seconds"] for row in rows),
            "ratio": summary(row["ratio"] for row in rows),
            "contents_right": sum(row["contents"] == "right" for row in rows),
            "direct": all(row["direct"] and row["raw"]["direct"] for row in rows),
        },
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write ceiling.json."""
    options = Options.parse(__doc__.splitlines()[0], arguments)
    print(options.write("ceiling", run(options)))


if __name__ == "__main__":
    main()
