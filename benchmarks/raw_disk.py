"""The disk without anything to save or load: what it takes, and what it gives.

Four threads move blocks of huge pages past the page cache, with O_DIRECT where the filesystem takes it. They
use the same few blocks over and over, so that memory costs as little as can be; or, `apart`, memory of its
own for every byte.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_PAGE = 4096
_HUGE_PAGE = 2 << 20
BLOCK_NBYTES = 4 << 20
RAW_THREADS = 4
_TRIMS_NBYTES = (
    96 << 10
)  # more than the 64 KiB from which on free() looks; less than what is mapped by itself


@dataclass(frozen=True)
class RawWrite:
    """One raw write: open to fsync, preallocation included."""

    seconds: float
    nbytes: int
    direct: bool


@dataclass(frozen=True)
class RawRead:
    """One raw read of some files: open to the last byte."""

    seconds: float
    nbytes: int
    direct: bool


class RawDisk:
    """Writes and reads without anything to save: what the disk takes, and gives."""

    def __init__(self, directory: Path, apart: Iterable[int] = ()) -> None:
        """`apart`: sizes of files; there is memory of its own for every byte of them."""
        self._path = directory / "raw"
        self._blocks = [_huge_pages(BLOCK_NBYTES) for _ in range(RAW_THREADS)]
        self._block = _huge_pages(BLOCK_NBYTES)
        self._apart = _huge_pages(BLOCK_NBYTES * sum(-(-nbytes // BLOCK_NBYTES) for nbytes in apart))
        contents = random.Random(0)
        for memory in (self._block, self._apart):
            for offset in range(0, len(memory), BLOCK_NBYTES):
                memory[offset : offset + BLOCK_NBYTES] = contents.randbytes(BLOCK_NBYTES)

    def direct(self, nbytes: int, *, apart: bool = False) -> RawWrite:
        """Many writers, past the page cache, whole pages; buffered where O_DIRECT is refused."""
        nbytes = -(-nbytes // _PAGE) * _PAGE
        if apart and nbytes > len(self._apart):
            raise ValueError(f"memory for {len(self._apart)} bytes, not for {nbytes}")
        began_s = time.perf_counter()
        direct = self._write(self._path, nbytes, self._apart if apart else self._block)
        seconds = time.perf_counter() - began_s
        self._path.unlink()
        return RawWrite(seconds, nbytes, direct)

    def rolling(
        self, nbytes: int, count: int, kept: int, begin: Callable[[], object] = lambda: None
    ) -> float:
        """Seconds for `count` such writes one after the other where only the last files are kept, as many as
        that; each file that is one too many is deleted in that time, while the next is written. They begin
        once `begin` has returned."""
        paths = [self._path.with_name(f"raw-{index}") for index in range(kept + count)]
        for path in paths[:kept]:
            self.keep(path, nbytes)
        settle()
        begin()
        began_s = time.perf_counter()
        with ThreadPoolExecutor(1) as deleting:
            gone = []
            for old, new in zip(paths, paths[kept:], strict=False):
                self.keep(new, nbytes)
                gone.append(deleting.submit(old.unlink))
            for one in gone:
                one.result()
        seconds = time.perf_counter() - began_s
        for path in paths[count:]:
            path.unlink()
        return seconds

    def keep(self, path: Path, nbytes: int) -> Path:
        """A file to read, written as above."""
        self._write(path, -(-nbytes // _PAGE) * _PAGE, self._block)
        os.truncate(path, nbytes)
        return path

    def buffered(self, nbytes: int) -> RawWrite:
        """One writer through the page cache, and fsync."""
        began_s = time.perf_counter()
        with self._path.open("xb", buffering=0) as file:
            for offset in range(0, nbytes, BLOCK_NBYTES):
                _pwrite(file.fileno(), self._block[: nbytes - offset], offset)
            os.fsync(file.fileno())
        seconds = time.perf_counter() - began_s
        self._path.unlink()
        return RawWrite(seconds, nbytes, direct=False)

    def read(self, paths: Sequence[Path], *, apart: bool = False) -> RawRead:
        """Many readers, past the page cache; buffered if O_DIRECT is refused. Each fills a block of its own,
        or each block has its own place."""
        began_s = time.perf_counter()
        opened = [_open(path, os.O_RDONLY) for path in paths]
        sizes = [os.fstat(fd).st_size for fd, _ in opened]
        blocks = enumerate(
            [
                (fd, offset, min(BLOCK_NBYTES, size - offset))
                for (fd, _), size in zip(opened, sizes, strict=True)
                for offset in range(0, size, BLOCK_NBYTES)
            ]
        )  # next() on it is atomic

        def read(thread: int) -> None:
            for number, (fd, offset, expected) in blocks:
                place = number * BLOCK_NBYTES
                into = self._apart[place : place + BLOCK_NBYTES] if apart else self._blocks[thread]
                got = os.preadv(fd, [into], offset)
                if got != expected:
                    raise OSError(errno.EIO, f"{got} bytes read where {expected} are")

        try:
            _in_threads(RAW_THREADS, read)
        finally:
            for fd, _ in opened:
                os.close(fd)
        seconds = time.perf_counter() - began_s
        return RawRead(seconds, sum(sizes), all(direct for _, direct in opened))

    def _write(self, path: Path, nbytes: int, memory: memoryview) -> bool:
        """A new file of whole pages, on the disk, of what is in `memory`, over and over;
        whether O_DIRECT was taken."""
        fd, direct = _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        offsets = itertools.count(0, BLOCK_NBYTES)  # next() on it is atomic

        def write(thread: int) -> None:
            for offset in offsets:
                if offset >= nbytes:
                    return
                place = offset % len(memory)
                _pwrite(fd, memory[place : place + min(BLOCK_NBYTES, nbytes - offset)], offset)

        try:
            if nbytes:
                os.posix_fallocate(fd, 0, nbytes)  # fallocate(2) on every filesystem that takes O_DIRECT
            _in_threads(RAW_THREADS, write)
            os.fsync(fd)
        finally:
            os.close(fd)
        return direct


def settle() -> None:
    """Let the past disturb nobody: writes, deletions and their journal reach the disk; garbage is collected;
    memory that was freed is given back, which takes a tenth of a second for each GiB."""
    gc.collect()
    _trim_heap()
    os.sync()


def _trim_heap() -> None:
    """Have what lies free above glibc's heap given back now: else the next to free much waits for it, whoever
    that is. No more than that: what peers use again from save to save stays theirs."""
    bytes(_TRIMS_NBYTES)


def forget(paths: Iterable[Path]) -> None:
    """Settle, and have nothing of these files in the page cache."""
    settle()
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _huge_pages(nbytes: int) -> memoryview:
    # From small pages the same writes take half as long again: their every page is one more segment
    # of the transfer. A ceiling lower than what it is compared with would flatter.
    memory = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.madvise(mmap.MADV_DONTFORK)  # direct I/O from what a child shares splits it into small pages
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE_PAGE
    block = memoryview(memory)[start : start + nbytes]
    block[:] = bytes(nbytes)  # there before it is timed
    return block


def _in_threads(count: int, work: Callable[[int], None]) -> None:
    failures: list[Exception] = []

    def run(thread: int) -> None:
        try:
            work(thread)
        except Exception as problem:  # noqa: BLE001 -- whatever it is, nothing was measured
            failures.append(problem)

    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _pwrite(fd: int, block: memoryview, offset: int) -> None:
    written = 0
    while written < len(block):
        written += os.pwrite(fd, block[written:], offset + written)


def _open(path: Path, flags: int) -> tuple[int, bool]:
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o600), True
    except OSError as problem:
        if problem.errno != errno.EINVAL:
            raise
        if flags & os.O_CREAT:
            path.unlink(missing_ok=True)  # some filesystems create first and refuse then
        return os.open(path, flags | os.O_CLOEXEC, 0o600), False
