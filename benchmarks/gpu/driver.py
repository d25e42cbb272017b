"""The CUDA driver by ctypes: what the probes call, each result checked and named.

Signatures and numbers are those of the driver API's documentation. Entry points are looked up when they
are first called, so that one which a driver lacks spoils nothing but the probe that needs it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

LIBRARY = "libcuda.so.1"
REGISTER_PORTABLE = 1
CAPTURE_RELAXED = 2
_IN_STREAM_ORDER = 1

_INT, _UNSIGNED, _SIZE = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t
_HANDLE, _ADDRESS = ctypes.c_void_p, ctypes.c_uint64  # a CUdeviceptr has 64 bits everywhere
_OUT_INT, _OUT_HANDLE = ctypes.POINTER(_INT), ctypes.POINTER(_HANDLE)


class _Location(ctypes.Structure):
    _fields_ = (("type", _INT), ("id", _INT))


class _CopyAttributes(ctypes.Structure):
    _fields_ = (
        ("source_access_order", _INT),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", _UNSIGNED),
    )


_BATCH: list[Any] = [
    *(ctypes.POINTER(_ADDRESS), ctypes.POINTER(_ADDRESS), ctypes.POINTER(_SIZE), _SIZE),
    *(ctypes.POINTER(_CopyAttributes), ctypes.POINTER(_SIZE), _SIZE),
]
_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [_UNSIGNED],
    "cuDriverGetVersion": [_OUT_INT],
    "cuDeviceGetCount": [_OUT_INT],
    "cuDeviceGet": [_OUT_INT, _INT],
    "cuDeviceGetName": [ctypes.c_char_p, _INT, _INT],
    "cuDeviceTotalMem_v2": [ctypes.POINTER(_SIZE), _INT],
    "cuDeviceGetAttribute": [_OUT_INT, _INT, _INT],
    "cuDevicePrimaryCtxRetain": [_OUT_HANDLE, _INT],
    "cuCtxSetCurrent": [_HANDLE],
    "cuMemHostRegister_v2": [_HANDLE, _SIZE, _UNSIGNED],
    "cuMemHostUnregister": [_HANDLE],
    "cuMemHostAlloc": [_OUT_HANDLE, _SIZE, _UNSIGNED],
    "cuMemFreeHost": [_HANDLE],
    "cuMemcpyDtoHAsync_v2": [_HANDLE, _ADDRESS, _SIZE, _HANDLE],
    "cuMemcpyBatchAsync": [*_BATCH, ctypes.POINTER(_SIZE), _HANDLE],
    "cuMemcpyBatchAsync_v2": [*_BATCH, _HANDLE],
    "cuEventCreate": [_OUT_HANDLE, _UNSIGNED],
    "cuEventRecord": [_HANDLE, _HANDLE],
    "cuEventQuery": [_HANDLE],
    "cuThreadExchangeStreamCaptureMode": [_OUT_INT],
    "cuGetErrorName": [_INT, ctypes.POINTER(ctypes.c_char_p)],
}
ATTRIBUTES = {
    "copy engines": 40,
    "pageable memory access": 88,
    "host pointer for registered memory": 91,
    "host registration": 99,
    "stream-ordered allocation": 115,
}


class CudaError(RuntimeError):
    """A call that the driver refused, or does not have.

    Attributes:
        name: as in the documentation, CUDA_ERROR_INVALID_VALUE for one.
    """

    def __init__(self, call: str, name: str) -> None:
        super().__init__(f"{call}: {name}")
        self.name = name


class Driver:
    """The driver, initialised. Raises CudaError if there is none, or no device for it."""

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as problem:
            raise CudaError("loading the driver", str(problem)) from None
        self._functions: dict[str, Any] = {}
        self.call("cuInit", 0)
        if not self._integer("cuDeviceGetCount"):
            raise CudaError("cuDeviceGetCount", "no device")

    def has(self, name: str) -> bool:
        """Whether the driver exports it."""
        return hasattr(self._library, name)

    def function(self, name: str) -> Any:
        """The bare entry point: returns a CUresult that nobody has checked."""
        if name not in self._functions:
            if not self.has(name):
                raise CudaError(name, "this driver does not have it")
            function = getattr(self._library, name)
            function.argtypes, function.restype = _SIGNATURES[name], _INT
            self._functions[name] = function
        return self._functions[name]

    def call(self, name: str, *arguments: Any) -> None:
        """Call, and raise CudaError unless CUDA_SUCCESS. Other threads of python run meanwhile."""
        result = self.function(name)(*arguments)
        if result:
            raise CudaError(name, self.result_name(result))

    def result_name(self, result: int) -> str:
        """CUDA_SUCCESS and so on."""
        name = ctypes.c_char_p()
        known = self.function("cuGetErrorName")(result, ctypes.byref(name)) == 0 and name.value
        return name.value.decode() if known and name.value else f"CUresult {result}"

    def _integer(self, name: str, *arguments: Any) -> int:
        value = _INT()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value

    def facts(self, ordinal: int = 0) -> dict[str, Any]:
        """What the driver says of itself and of a device; needs no context."""
        device = self._integer("cuDeviceGet", ordinal)
        name, memory = ctypes.create_string_buffer(256), _SIZE()
        self.call("cuDeviceGetName", name, len(name), device)
        self.call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        version = self._integer("cuDriverGetVersion")
        batch = [one for one in ("cuMemcpyBatchAsync_v2", "cuMemcpyBatchAsync") if self.has(one)]
        return {
            "gpu": name.value.decode(),
            "gpu memory": memory.value,
            "gpus": self._integer("cuDeviceGetCount"),
            "CUDA of the driver": f"{version // 1000}.{version % 1000 // 10}",
            "batched copies": ", ".join(batch) or "none",
            **{what: self._attribute(number, device) for what, number in ATTRIBUTES.items()},
        }

    def _attribute(self, number: int, device: int) -> int | str:
        try:
            return self._integer("cuDeviceGetAttribute", number, device)
        except CudaError as problem:
            return problem.name

    def use_primary_context(self, ordinal: int = 0) -> None:
        """Make torch's context current on this thread. Never released: it lives as long as the process."""
        context = _HANDLE()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._integer("cuDeviceGet", ordinal))
        self.call("cuCtxSetCurrent", context)

    def register(self, address: int, nbytes: int) -> None:
        """Pin memory of ours."""
        self.call("cuMemHostRegister_v2", address, nbytes, REGISTER_PORTABLE)

    def unregister(self, address: int) -> None:
        """Undo one register()."""
        self.call("cuMemHostUnregister", address)

    def host_alloc(self, nbytes: int) -> int:
        """Pinned memory of the driver's: what cudaHostAlloc gives."""
        memory = _HANDLE()
        self.call("cuMemHostAlloc", ctypes.byref(memory), nbytes, REGISTER_PORTABLE)
        return memory.value or 0

    def host_free(self, address: int) -> None:
        """Give host_alloc()'s memory back."""
        self.call("cuMemFreeHost", address)

    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueue one copy."""
        self.call("cuMemcpyDtoHAsync_v2", target, source, nbytes, stream)

    def batch(self, targets: Sequence[int], sources: Sequence[int], nbytes: int) -> Batch:
        """Prepare copies of the same size that one call enqueues."""
        return Batch(self, targets, sources, nbytes)

    def new_event(self) -> int:
        """An event without timing. Never destroyed."""
        event = _HANDLE()
        self.call("cuEventCreate", ctypes.byref(event), 2)
        return event.value or 0

    def exchange_capture_mode(self, mode: int) -> int:
        """Set this thread's mode; returns the one before."""
        value = _INT(mode)
        self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(value))
        return value.value


class Batch:
    """Arrays for cuMemcpyBatchAsync, in whichever of its two ABIs the driver has."""

    def __init__(self, driver: Driver, targets: Sequence[int], sources: Sequence[int], nbytes: int) -> None:
        count = len(targets)
        addresses = _ADDRESS * count
        self._driver = driver
        # The second ABI dropped the index of the copy that failed, so the two cannot be told apart by a try.
        self._modern = driver.has("cuMemcpyBatchAsync_v2")
        self._copies = (addresses(*targets), addresses(*sources), (_SIZE * count)(*[nbytes] * count), count)
        self._attributes = _CopyAttributes(source_access_order=_IN_STREAM_ORDER)
        self._first = _SIZE(0)

    def enqueue(self, stream: int) -> None:
        """All of them, in no order; not on the default stream."""
        arguments = (*self._copies, ctypes.byref(self._attributes), ctypes.byref(self._first), 1)
        if self._modern:
            self._driver.call("cuMemcpyBatchAsync_v2", *arguments, stream)
        else:
            failed = _SIZE()
            self._driver.call("cuMemcpyBatchAsync", *arguments, ctypes.byref(failed), stream)


def absent() -> str | None:
    """Why nothing can be measured here; None where a GPU, its driver and a torch for it are at hand."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    try:
        Driver()
    except CudaError as problem:
        return str(problem)
    return None if torch.cuda.is_available() else "torch sees no CUDA device"
