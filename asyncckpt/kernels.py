"""The one kernel of ours: it gathers many small places of a device's memory into one buffer there.

Guarantees:
- The kernel comes after all that torch's current stream of that device has, and before all that is enqueued
  there later. The host waits for nothing: the table goes up from pinned memory (from pageable memory, the
  upload itself would wait for the stream).
- CuPy is imported, and the kernel compiled, when a save first packs: never where nothing is packed.

CuPy brings the compiler and the launch; without it there is no gatherer, and all else works. The source is
plain enough for a C++ compiler: `tests/gather_on_cpu.cpp` runs the same text on a CPU.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

Table = npt.NDArray[np.uint64]

# A block copies one tensor at a time. Vectors where both ends are aligned to them; files of DCP begin items
# at any byte, so that there most go by bytes, which neighbouring threads fetch from one line of the cache.
SOURCE = r"""
typedef unsigned char Byte;
typedef unsigned long long Count;

template <class Unit>
__device__ void copy_units(const Byte* from, Byte* to, Count nbytes) {
  const Count units = nbytes / sizeof(Unit);
  for (Count i = threadIdx.x; i < units; i += blockDim.x) ((Unit*)to)[i] = ((const Unit*)from)[i];
  for (Count i = units * sizeof(Unit) + threadIdx.x; i < nbytes; i += blockDim.x) to[i] = from[i];
}

// Rows of the table: address of the source, offset in the target, bytes.
extern "C" __global__ void gather(const Count* table, Byte* target, Count rows) {
  for (Count row = blockIdx.x; row < rows; row += gridDim.x) {
    const Byte* from = (const Byte*)table[3 * row];
    Byte* to = target + table[3 * row + 1];
    const Count nbytes = table[3 * row + 2];
    const Count aligned = (Count)from | (Count)to;
    if (aligned % 16 == 0) copy_units<uint4>(from, to, nbytes);
    else if (aligned % 4 == 0) copy_units<unsigned>(from, to, nbytes);
    else copy_units<Byte>(from, to, nbytes);
  }
}
"""

_THREADS = 128  # of a block: the tensors are small
_BLOCKS_MAX = 4096  # some thirty for each multiprocessor of the largest devices; blocks go on to later rows


class Gatherer(Protocol):
    """Packs on devices."""

    def gather(self, device: int, table: Table, nbytes: int) -> torch.Tensor:
        """A new buffer of `nbytes` bytes on the device, filled by a kernel on this thread's current stream.

        To be kept until whoever reads it is done: torch's allocator serves it to others at once. What no
        row covers is uninitialised.

        Args:
            table: uint64 [n, 3]: address on the device, offset in the buffer, bytes.

        Raises:
            Exception: of whatever kind; nothing was changed.
        """


def gatherer() -> Gatherer | None:
    """CuPy's; None where CuPy is not installed. Raises what importing a broken CuPy raises."""
    try:
        import cupy  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            return None
        raise
    return CupyGatherer(cupy)


class CupyGatherer:
    """Launches the kernel by CuPy, over memory of torch's.

    Args:
        cupy: the module.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._kernel = cupy.RawKernel(SOURCE, "gather")  # compiles at the first launch on each device

    def gather(self, device: int, table: Table, nbytes: int) -> torch.Tensor:
        """See `Gatherer`."""
        cuda = self._cupy.cuda
        place = torch.device("cuda", device)
        with torch.cuda.device(place), cuda.Device(device):
            stream = torch.cuda.current_stream(place).cuda_stream
            target = torch.empty(nbytes, dtype=torch.uint8, device=place)
            # Both may be freed right after the launch: torch reuses them behind what their stream has.
            pinned = torch.from_numpy(table.view(np.int64)).pin_memory()
            uploaded = pinned.to(place, non_blocking=True)
            pointers = (np.uint64(uploaded.data_ptr()), np.uint64(target.data_ptr()))
            with _on(cuda, stream):
                self._kernel((min(len(table), _BLOCKS_MAX),), (_THREADS,), (*pointers, np.uint64(len(table))))
        return target


class _Stream:
    """A stream of torch's, by the protocol that CuPy asks for from version 14 on."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle  # version of the protocol


def _on(cuda: Any, handle: int) -> Any:
    """Makes the stream CuPy's current one; a context manager."""
    if hasattr(cuda.Stream, "from_external"):
        return cuda.Stream.from_external(_Stream(handle))
    return cuda.ExternalStream(handle)


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch, CuPy or the driver says that a device, or pinned memory, is full."""
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()
