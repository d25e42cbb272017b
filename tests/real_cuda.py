"""The world of CUDA devices as it is, with the face of `fake_cuda.FakeCuda`: one scenario runs on both.

Streams go by their handles, as the driver and our seam know them; 0 is a device's default stream. `Rehearsal`
is the driver double's world with what `RealCuda` has besides: there a scenario shows its own mistakes, where
there is no GPU.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType, TracebackType
from typing import Any

import pytest
import torch

from asyncckpt import devices
from tests.cuda_double import Double
from tests.fake_cuda import HOST, FakeCuda

_CYCLES_PER_S = 2e9  # no faster than this runs a multiprocessor's clock: what spins, spins at least as long


class RealCuda:
    """torch.cuda. Needs a device; `asyncckpt.devices.seam` stays the real one.

    Attributes:
        driver: the library that the engine loads.
        name: of this kind of world.
        devices: how many there are.
    """

    driver = "libcuda.so.1"
    name = "cuda"

    def __init__(self) -> None:
        self.devices = torch.cuda.device_count()
        self._streams: dict[int, torch.cuda.Stream] = {}  # by handle; keeps those that we made

    def __enter__(self) -> RealCuda:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # what a kernel did wrong is this test's, not the next one's
            for device in range(self.devices):
                torch.cuda.synchronize(device)

    # -- where things are

    def device_of(self, memory: torch.Tensor | torch.UntypedStorage) -> int:
        """Ordinal of the device; HOST for the host's."""
        return (memory.device.index or 0) if memory.device.type == "cuda" else HOST

    def to_device(self, tensor: torch.Tensor, device: int = 0) -> torch.Tensor:
        """A detached copy there; the tensor itself if it is there."""
        if self.device_of(tensor) == device:
            return tensor
        return tensor.detach().to(self._device(device)).requires_grad_(tensor.requires_grad)

    def module_to(self, module: torch.nn.Module, device: int = 0) -> torch.nn.Module:
        """Parameters, gradients and buffers go to the device; Parameters stay the same objects."""
        return module.to(self._device(device))

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, taken when all work on the device's current stream is done."""
        return tensor.detach().to("cpu", copy=True)

    def empty_cache(self) -> None:
        """Memory that no tensor uses goes back to the driver: whoever still reads it, faults."""
        torch.cuda.empty_cache()

    # -- streams

    def new_stream(self, device: int = 0) -> int:
        stream = torch.cuda.Stream(self._device(device))
        handle = int(stream.cuda_stream)
        self._streams[handle] = stream
        return handle

    def current_stream(self, device: int = 0) -> int:
        """Handle of this thread's current stream; 0 is the device's default stream."""
        return int(torch.cuda.current_stream(device).cuda_stream)

    def stream(self, handle: int, device: int = 0) -> AbstractContextManager[Any]:
        """Makes a stream, and its device, current on this thread. The default's needs `device`."""
        return torch.cuda.stream(self._stream(handle, device))

    def wait_stream(self, handle: int, behind: int, device: int = 0) -> None:
        """What comes later on one stream waits for what was enqueued on the other so far."""
        self._stream(handle, device).wait_stream(self._stream(behind, device))

    def synchronize(self, device: int = 0) -> None:
        """Waits for this thread's current stream. Raises what a kernel raised."""
        torch.cuda.current_stream(device).synchronize()

    def kernel(self, fn: Callable[..., Any], *tensors: torch.Tensor) -> None:
        """Enqueues `fn` over aliases that share no version counter: a write that nobody sees."""
        with torch.cuda.device(tensors[0].device), torch.no_grad():
            fn(*(tensor.data for tensor in tensors))

    def occupy(self, seconds: float, device: int = 0) -> Callable[[], bool]:
        """Keeps the current stream busy for at least so long; the result tells whether it still is.

        What is enqueued later cannot begin before.
        """
        with torch.cuda.device(device):
            torch.cuda._sleep(int(seconds * _CYCLES_PER_S))
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
        return lambda: not event.query()

    def lose(self, device: int = 0) -> None:
        """A kernel fails an assertion of its own: the context is lost, for the whole process."""
        memory = torch.zeros(1, device=self._device(device))
        memory[torch.full((1,), 1 << 20, device=self._device(device))]

    # -- capture

    @contextmanager
    def capture(self, mode: str = "global", device: int = 0) -> Iterator[torch.cuda.CUDAGraph]:
        """Captures the current stream, or a new one that is current within where that is the default
        stream. Raises at the end if something forbidden happened meanwhile."""
        handle = self.current_stream(device) or self.new_stream(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream(handle, device), capture_error_mode=mode):
            yield graph

    def is_capturing(self, used: Collection[int] = ()) -> bool:
        """Whether this thread's current stream is being captured."""
        return torch.cuda.is_current_stream_capturing()

    # -- inside

    def _device(self, device: int) -> torch.device:
        return torch.device("cuda", device)

    def _stream(self, handle: int, device: int) -> torch.cuda.Stream:
        return self._streams[handle] if handle else torch.cuda.default_stream(device)


class Rehearsal(FakeCuda):
    """The double's world, with what `RealCuda` has besides."""

    name = "double"
    devices = 2

    def empty_cache(self) -> None:
        """Its allocator gives nothing back."""

    def occupy(self, seconds: float, device: int = 0) -> Callable[[], bool]:
        """Keeps the current stream busy for so long, or until asked whether it still is."""
        asked, ended = threading.Event(), threading.Event()

        def kernel() -> None:
            asked.wait(seconds)
            ended.set()

        def is_busy() -> bool:
            busy = not ended.is_set()
            asked.set()
            return busy

        self.launch(device, kernel)
        return is_busy

    def lose(self) -> None:
        """The context is lost: whoever calls the driver is told."""
        self.double.poison()


World = RealCuda | Rehearsal


def begin(kind: str, seed: int = 1) -> World:
    """A world, "cuda" or "double", for a process that leaves it by ending."""
    if kind == "cuda":
        return RealCuda()
    double = Double()
    double.reset(seed=seed, delay_us_max=50)
    world = Rehearsal(double)
    world.__enter__()
    devices.seam = world
    return world


def entered(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world, "cuda" or "double", for one test."""
    if kind == "cuda":
        with RealCuda() as real:
            yield real
        gc.collect()
        real.empty_cache()
        return
    double = Double()
    double.reset(seed=seed, delay_us_max=50)
    with Rehearsal(double) as world:
        monkeypatch.setattr(devices, "seam", world)
        yield world
    double.reset()


class ComparesOnHost(ModuleType):
    """torch, but that `equal` takes tensors from wherever they are."""

    def __init__(self, world: World) -> None:
        super().__init__("torch")
        self._world = world

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def equal(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        return torch.equal(self._world.to_host(one), self._world.to_host(other))
