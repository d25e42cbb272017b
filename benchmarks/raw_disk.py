"""The disk without anything to save or load: what it takes, and what it gives.

Four threads move blocks of huge pages past the page cache, with O_DIRECT where the filesystem takes it.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_PAGE = 4096
_HUGE_PAGE = 2 << 20
BLOCK_NBYTES = 4 << 20
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
        memory = mmap.mmap(-1, BLOCK_NBYTES + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE_PAGE
        self._block = memoryview(memory)[start : start + BLOCK_NBYTES]
        self._block[:] = random.Random(0).randbytes(BLOCK_NBYTES)

    def direct(self, nbytes: int, threads: int = RAW_THREADS) -> RawWrite:
        """Many writers, past the page cache, whole pages; buffered where O_DIRECT is refused."""
        nbytes = -(-nbytes // _PAGE) * _PAGE
        began_s = time.perf_counter()
        fd, direct = self._create()
        offsets = itertools.count(0, BLOCK_NBYTES)  # next() on it is atomic
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
            for offset in range(0, nbytes, BLOCK_NBYTES):
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
