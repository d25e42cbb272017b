"""What torch knows of CUDA and the engine must be told: where memory lives, which stream is current.

The one seam between torch's view of devices and ours. Tests put a fake in place of `seam`, since a CPU
build of torch has neither streams nor captures.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Protocol

import torch

HOST = -1  # in place of a device's ordinal; the same as kHost in csrc/device.h

_DRIVER = "libcuda.so.1"


class Seam(Protocol):
    """How torch sees devices.

    Attributes:
        driver: the library that the engine loads when it first meets a device.
    """

    driver: str

    def device_of(self, memory: torch.Tensor | torch.UntypedStorage) -> int:
        """Ordinal of the device where the memory is; HOST for ours. Raises ValueError for other kinds."""

    def current_stream(self, device: int) -> int:
        """Handle of the stream on which this thread enqueues work for the device."""

    def wait_for(self, device: int, stream: int) -> None:
        """Let this thread's current stream of the device wait for what `stream` has now."""

    def is_capturing(self, used: Collection[int]) -> bool:
        """Whether this thread's current stream of any of these devices is being captured into a graph."""


class TorchSeam:
    """The real one."""

    driver = _DRIVER

    def device_of(self, memory: torch.Tensor | torch.UntypedStorage) -> int:
        device = memory.device
        if device.type == "cpu":
            return HOST
        if device.type != "cuda" or torch.version.hip is not None:
            raise ValueError(f"memory of device {device} cannot be copied")
        return device.index or 0

    def current_stream(self, device: int) -> int:
        return int(torch.cuda.current_stream(device).cuda_stream)

    def wait_for(self, device: int, stream: int) -> None:
        other = (
            torch.cuda.ExternalStream(stream, device)  # type: ignore[no-untyped-call]
            if stream
            else torch.cuda.default_stream(device)  # ExternalStream(0) is some stream of torch's pool
        )
        torch.cuda.current_stream(device).wait_stream(other)

    def is_capturing(self, used: Collection[int]) -> bool:
        if not in_use():
            return False
        if torch.cuda.is_current_stream_capturing():
            return True
        for device in used:
            if device != torch.cuda.current_device():
                with torch.cuda.device(device):  # of a device in use: this makes no context
                    if torch.cuda.is_current_stream_capturing():
                        return True
        return False


seam: Seam = TorchSeam()


def in_use() -> bool:
    """Whether this process has begun to use CUDA."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def is_capturing(used: Collection[int]) -> bool:
    """Whether work that this thread enqueues on any of these devices goes into a graph.

    A device that is lost, and says so at every call, captures nothing; whoever uses it next is told.
    """
    try:
        return seam.is_capturing(used)
    except RuntimeError:
        return False


def current_streams(devices: Iterable[int]) -> list[tuple[int, int]]:
    """(device, current stream there) of each device."""
    return [(device, seam.current_stream(device)) for device in devices]


def devices_of(tensors: Iterable[Any]) -> set[int]:
    """The CUDA devices that any of `tensors` lives on."""
    found = {seam.device_of(t) for t in tensors if isinstance(t, torch.Tensor) and is_reachable(t)}
    return found - {HOST}


def is_reachable(tensor: torch.Tensor) -> bool:
    """Whether the engine can copy from where the tensor is."""
    try:
        seam.device_of(tensor)
    except ValueError:
        return False
    return True
