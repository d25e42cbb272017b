"""How fast this disk takes a file of the same size, and how near a whole save comes to it.

Raw: four threads write blocks of huge pages with O_DIRECT into a new, preallocated file, and fsync it.
One buffered writer with fsync, which is what serializers do, is beside it for information. Training is
idle here. Identical raw runs differ by a quarter, so each save is compared with the raw write next to it.

    python -m benchmarks.ceiling [--tiny] [--dir DISK] [--out DIRECTORY]
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import machine
from .results import Options, summary
from .savers import Asyncckpt
from .workload import FULL, TINY, Workload

_PAGE = 4096
_HUGE_PAGE = 2 << 20
_BLOCK_NBYTES = 4 << 20
RAW_THREADS = 4


@dataclass(frozen=True)
class RawWrite:
    """One raw write: open to fsync, preallocation included."""

    seconds: float
    nbytes: int
    direct: bool


class RawDisk:
    """Writes without anything to save: what the disk takes."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "raw"
        # From small pages the same writes take half as long again: their every page is one more segment
        # of the transfer. A ceiling lower than what it is compared with would flatter.
        memory = mmap.mmap(-1, _BLOCK_NBYTES + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE_PAGE
        self._block = memoryview(memory)[start : start + _BLOCK_NBYTES]
        self._block[:] = random.Random(0).randbytes(_BLOCK_NBYTES)

    def direct(self, nbytes: int, threads: int = RAW_THREADS) -> RawWrite:
        """Many writers, past the page cache, whole pages; buffered where O_DIRECT is refused."""
        nbytes = -(-nbytes // _PAGE) * _PAGE
        began_s = time.perf_counter()
        fd, direct = self._create()
        offsets = itertools.count(0, _BLOCK_NBYTES)  # next() on it is atomic
        failures: list[OSError] = []

        def write() -> None:
            try:
                for offset in offsets:
                    if offset >= nbytes:
                        return
                    self._pwrite(fd, self._block[: nbytes - offset], offset)
            except OSError as problem:
                failures.append(problem)

        try:
            os.posix_fallocate(fd, 0, nbytes)  # fallocate(2) on every filesystem that takes O_DIRECT
            writers = [threading.Thread(target=write) for _ in range(threads)]
            for writer in writers:
                writer.start()
            for writer in writers:
                writer.join()
            if failures:
                raise failures[0]
            os.fsync(fd)
        finally:
            os.close(fd)
        seconds = time.perf_counter() - began_s
        self._path.unlink()
        return RawWrite(seconds, nbytes, direct)

    def buffered(self, nbytes: int) -> RawWrite:
        """One writer through the page cache, and fsync."""
        began_s = time.perf_counter()
        with self._path.open("xb", buffering=0) as file:
            for offset in range(0, nbytes, _BLOCK_NBYTES):
                self._pwrite(file.fileno(), self._block[: nbytes - offset], offset)
            os.fsync(file.fileno())
        seconds = time.perf_counter() - began_s
        self._path.unlink()
        return RawWrite(seconds, nbytes, direct=False)

    @staticmethod
    def _pwrite(fd: int, block: memoryview, offset: int) -> None:
        written = 0
        while written < len(block):
            written += os.pwrite(fd, block[written:], offset + written)

    def _create(self) -> tuple[int, bool]:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(self._path, flags | os.O_DIRECT, 0o600), True
        except OSError as problem:
            if problem.errno != errno.EINVAL:
                raise
            self._path.unlink(missing_ok=True)  # some filesystems create first and refuse then
            return os.open(self._path, flags, 0o600), False


def settle() -> None:
    """Let earlier writes, deletions and their journal reach the disk, so that they disturb nobody."""
    os.sync()


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
            "block_bytes": _BLOCK_NBYTES,
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
