"""A GPU as the probes and the report see it: torch for tensors and streams, the driver for the rest.

Whatever runs on a device goes through here, so that tests can stand in for it where there is none.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .driver import CudaError, Driver

_cuda: Any = torch.cuda  # half of it is not typed
_CLOCK_HZ = 2e9  # a little above what current GPUs run at: spins last at least as long as asked


class Gpu:
    """Device 0. The thread that makes this has torch's context current; others call use_on_this_thread()."""

    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        self.driver = Driver()
        _cuda.init()
        self.bytes(1).zero_()
        self.driver.use_primary_context()

    def bytes(self, nbytes: int) -> torch.Tensor:
        """Device memory, as it comes."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def stream(self) -> Any:
        """A stream that does not wait for the legacy default stream."""
        return _cuda.Stream(self.device)

    def current(self) -> Any:
        """The stream that kernels of this thread go to: the legacy default stream, if nobody changed it."""
        return _cuda.current_stream(self.device)

    def on(self, stream: Any) -> Any:
        """Context in which kernels of this thread go to `stream`."""
        return _cuda.stream(stream)

    def event(self, blocking: bool = False) -> Any:
        """With timing; not recorded yet. `blocking`: who waits sleeps."""
        return _cuda.Event(enable_timing=True, blocking=blocking)

    def synchronize(self) -> None:
        """Wait for everything."""
        _cuda.synchronize(self.device)

    def empty_cache(self) -> None:
        """Have torch give free device memory back to the driver."""
        _cuda.empty_cache()

    def has_expandable_segments(self) -> bool:
        """Whether torch's allocator maps memory page by page now."""
        segments = _cuda.memory_snapshot()
        return any(one.get("is_expandable", False) for one in segments)

    def spin(self, seconds: float, stream: Any) -> None:
        """Keep `stream` busy with a kernel that touches no memory, for about that long or longer."""
        with self.on(stream):
            _cuda._sleep(int(seconds * _CLOCK_HZ))  # noqa: SLF001 -- torch has no public one

    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Enqueue a copy to the host."""
        self.driver.copy_to_host(target, source, nbytes, stream.cuda_stream)

    def use_on_this_thread(self) -> None:
        """Make torch's context current on a thread that python started."""
        _cuda.set_device(self.device)
        self.driver.use_primary_context()

    @contextlib.contextmanager
    def registered(self, address: int, nbytes: int) -> Iterator[None]:
        """Pinned while inside."""
        self.driver.register(address, nbytes)
        try:
            yield
        finally:
            with contextlib.suppress(CudaError):  # after a fault nothing succeeds, and that was told
                self.driver.unregister(address)

    @contextlib.contextmanager
    def host_alloc(self, nbytes: int) -> Iterator[int]:
        """Pinned memory of the driver's; the address."""
        address = self.driver.host_alloc(nbytes)
        try:
            yield address
        finally:
            self.driver.host_free(address)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture `work` into a graph in global mode; the replay. Raises RuntimeError if that fails."""
        graph = _cuda.CUDAGraph()
        with _cuda.graph(graph, capture_error_mode="global"):
            work()
        replay: Callable[[], None] = graph.replay
        return replay


def host_tensor(address: int, nbytes: int) -> torch.Tensor:
    """Host memory as a tensor that does not own it."""
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
