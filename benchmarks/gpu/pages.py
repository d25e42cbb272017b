"""Host memory of different making, to be registered with the driver."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_HUGE_PAGE = 2 << 20
_MAP_HUGETLB = 0x40000  # python's mmap does not name it
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


@dataclass(frozen=True)
class Pages:
    """Memory that is mapped but not touched. Valid inside `pages()`."""

    address: int
    nbytes: int
    view: memoryview

    def touch(self, value: int = 0) -> None:
        """Write every byte, so that every page is there. Other threads of python run meanwhile."""
        ctypes.memset(self.address, value, self.nbytes)


def _small(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=_PRIVATE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def _huge(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=_PRIVATE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _memfd(nbytes: int) -> mmap.mmap:
    fd = os.memfd_create("probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, nbytes)
        return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED)
    finally:
        os.close(fd)


def _hugetlb(nbytes: int) -> mmap.mmap:
    return mmap.mmap(-1, nbytes, flags=_PRIVATE | _MAP_HUGETLB)


SMALL, HUGE = "anonymous, 4 KiB pages", "anonymous, transparent huge pages"
KINDS: dict[str, Callable[[int], mmap.mmap]] = {
    SMALL: _small,
    HUGE: _huge,
    "memfd": _memfd,
    "hugetlb, 2 MiB pages": _hugetlb,
}


@contextlib.contextmanager
def pages(kind: str, nbytes: int) -> Iterator[Pages]:
    """Memory of one kind, aligned to 2 MiB. Raises OSError where it is not to be had."""
    memory = KINDS[kind](nbytes + _HUGE_PAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE_PAGE
    view = memoryview(memory)[start : start + nbytes]
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    try:
        yield Pages(address, nbytes, view)
    finally:
        with contextlib.suppress(BufferError):  # a tensor over it may live on; then so does the mapping
            view.release()
            memory.close()


def huge_nbytes() -> int | None:
    """How much of this process is in transparent huge pages; None where the kernel does not tell."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages:")), None)
