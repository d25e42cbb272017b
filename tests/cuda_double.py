"""Builds the double of the CUDA driver (`cuda_double.cpp`) and speaks to it.

The engine loads the same file by the same path and so shares its state with this module.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")
BUILT = SOURCE.parents[1] / "build" / "tests"
FLAGS = ["-std=c++17", "-O1", "-g", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror"]
# Drivers with and without batched copies, and one that lacks an entry point the engine cannot do without.
VARIANTS = ("", "NO_BATCH", "BATCH_V1_ONLY", "BATCH_V2_ONLY", "OLD_DRIVER")

SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, DEINITIALIZED = 0, 1, 2, 3, 4
NO_DEVICE, INVALID_CONTEXT, INVALID_HANDLE, NOT_READY = 100, 201, 400, 600
ILLEGAL_ADDRESS, ALREADY_REGISTERED, NOT_REGISTERED, LAUNCH_FAILED, NOT_SUPPORTED = 700, 712, 713, 719, 801
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, CAPTURE_ISOLATION, CAPTURED_EVENT = 900, 901, 905, 907
PORTABLE = 1  # flag of cuMemHostRegister
CAPTURE_MODES = {"global": 0, "thread_local": 1, "relaxed": 2}

Kernel = CFUNCTYPE(None, c_void_p)


def build(variant: str = "") -> Path:
    """The compiled double; compiled at most once for each source and set of flags."""
    assert variant in VARIANTS, variant
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or "g++"]
    command = [*compiler, *FLAGS, *([f"-D{variant}"] if variant else [])]
    key = hashlib.sha256("\0".join(command).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    target = BUILT / f"libcuda_double-{variant.lower() or 'full'}-{key}.so"
    if not target.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}")
        try:
            subprocess.run(
                [*command, str(SOURCE), "-o", str(temporary)], check=True, capture_output=True, text=True
            )
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"the driver double does not compile:\n{error.stderr}") from error
        temporary.replace(target)  # other test processes may be building it too
    return target


class DriverError(RuntimeError):
    """An entry point answered with an error.

    Attributes:
        result: the CUresult.
    """

    def __init__(self, name: str, result: int) -> None:
        super().__init__(f"{name}: CUDA error {result}")
        self.result = result


# Arguments of the driver's entry points as tests call them.
_DRIVER: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDeviceGetCount": [c_void_p],
    "cuDevicePrimaryCtxRetain": [c_void_p, c_int],
    "cuDevicePrimaryCtxRelease_v2": [c_int],
    "cuCtxSetCurrent": [c_void_p],
    "cuCtxGetCurrent": [c_void_p],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [c_void_p],
    "cuCtxSynchronize": [],
    "cuStreamCreate": [c_void_p, c_uint],
    "cuStreamCreateWithPriority": [c_void_p, c_uint, c_int],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamWaitEvent": [c_void_p, c_void_p, c_uint],
    "cuStreamIsCapturing": [c_void_p, c_void_p],
    "cuStreamSynchronize": [c_void_p],
    "cuEventCreate": [c_void_p, c_uint],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventQuery": [c_void_p],
    "cuEventSynchronize": [c_void_p],
    "cuEventDestroy_v2": [c_void_p],
    "cuMemcpyDtoHAsync_v2": [c_void_p, c_ulonglong, c_size_t, c_void_p],
    "cuMemcpyHtoDAsync_v2": [c_ulonglong, c_void_p, c_size_t, c_void_p],
    "cuMemcpyDtoDAsync_v2": [c_ulonglong, c_ulonglong, c_size_t, c_void_p],
    "cuMemcpyDtoH_v2": [c_void_p, c_ulonglong, c_size_t],
    "cuMemcpyHtoD_v2": [c_ulonglong, c_void_p, c_size_t],
    "cuMemcpyBatchAsync": [*[c_void_p] * 3, c_size_t, c_void_p, c_void_p, c_size_t, c_void_p, c_void_p],
    "cuMemcpyBatchAsync_v2": [*[c_void_p] * 3, c_size_t, c_void_p, c_void_p, c_size_t, c_void_p],
    "cuMemAlloc_v2": [c_void_p, c_size_t],
    "cuMemFree_v2": [c_ulonglong],
    "cuMemHostRegister_v2": [c_void_p, c_size_t, c_uint],
    "cuMemHostUnregister": [c_void_p],
    "cuThreadExchangeStreamCaptureMode": [c_void_p],
    "cuGetErrorName": [c_int, c_void_p],
    "cuGetErrorString": [c_int, c_void_p],
}

# Of the control interface: result and arguments.
_CONTROL: dict[str, tuple[Any, list[Any]]] = {
    "double_drain": (c_int, []),
    "double_reset": (c_int, [c_uint, c_uint]),
    "double_deinitialize": (None, []),
    "double_set_devices": (c_int, [c_int]),
    "double_set_connections": (c_int, [c_int]),
    "double_set_batch_abi": (None, [c_int]),
    "double_allocate": (c_ulonglong, [c_int, c_size_t]),
    "double_free": (c_int, [c_ulonglong]),
    "double_new_stream": (c_void_p, [c_int]),
    "double_default_stream": (c_void_p, [c_int]),
    "double_backdoor": (c_void_p, [c_ulonglong]),
    "double_device_of": (c_int, [c_ulonglong]),
    "double_launch": (c_int, [c_void_p, Kernel, c_void_p]),
    "double_order": (c_int, [c_void_p, c_void_p]),
    "double_finish": (c_int, [c_void_p]),
    "double_wait_next": (c_int, [c_void_p, c_void_p]),
    "double_begin_capture": (c_int, [c_void_p, c_int]),
    "double_end_capture": (c_int, [c_void_p]),
    "double_fail": (None, [c_char_p, c_uint64, c_int, c_int]),
    "double_fail_async": (None, [c_char_p, c_uint64, c_int]),
    "double_poison": (c_int, [c_int, c_int]),
    "double_ignore": (None, [c_char_p, c_int]),
    "double_stall": (None, [c_char_p, c_int]),
    "double_wait_stalled": (c_int, [c_int, c_uint]),
    "double_hold_copies": (None, []),
    "double_release_copies": (None, []),
    "double_copies_held": (c_int, []),
    "double_wait_copies_held": (c_int, [c_int, c_uint]),
    "double_copied_nbytes": (c_uint64, [c_int]),
    "double_count": (c_uint64, [c_char_p]),
    "double_counter": (c_uint64, [c_char_p]),
    "double_registered_nbytes": (c_uint64, []),
    "double_registered_flags": (c_int, [c_void_p]),
    "double_live_nbytes": (c_uint64, [c_int]),
    "double_log": (c_size_t, [c_void_p, c_size_t]),
    "double_clear_log": (None, []),
    "double_thread_number": (c_int, []),
}
_LOG_NBYTES = 1 << 22


class Double:
    """The control interface, and the entry points of the driver that tests call themselves.

    Loading initialises the driver: two devices unless `devices` says otherwise. There is one state per
    process and library, however many of these objects; `reset` begins a test with a clean one.
    """

    def __init__(self, variant: str = "", *, devices: int = 2) -> None:
        self.path = build(variant)
        self._library = ctypes.CDLL(str(self.path))
        for name, (result, arguments) in _CONTROL.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        for name, arguments in _DRIVER.items():
            if function := getattr(self._library, name, None):  # variants lack some
                function.restype, function.argtypes = c_int, arguments
        # These two never block: a call that keeps the interpreter's lock costs a tenth.
        quick = ctypes.PyDLL(str(self.path))
        self._device_of, self._backdoor = quick.double_device_of, quick.double_backdoor
        for function in (self._device_of, self._backdoor):
            function.restype, function.argtypes = _CONTROL[function.__name__]
        self.driver("cuInit", 0)
        self.set_devices(devices)

    # -- the driver

    def result_of(self, name: str, *arguments: Any) -> int:
        """Calls an entry point of the driver; its CUresult."""
        return int(getattr(self._library, name)(*arguments))

    def driver(self, name: str, *arguments: Any) -> None:
        """Calls an entry point of the driver. Raises DriverError unless it succeeds."""
        if result := self.result_of(name, *arguments):
            raise DriverError(name, result)

    def has(self, name: str) -> bool:
        return hasattr(self._library, name)

    @contextmanager
    def context(self, device: int = 0) -> Iterator[int]:
        """The device's primary context, current on this thread within."""
        context = c_void_p()
        self.driver("cuDevicePrimaryCtxRetain", byref(context), device)
        self.driver("cuCtxPushCurrent_v2", context)
        try:
            yield context.value or 0
        finally:
            self.driver("cuCtxPopCurrent_v2", byref(c_void_p()))

    def event(self, *, blocking: bool = True) -> int:
        """A new event of the current context."""
        event = c_void_p()
        self.driver("cuEventCreate", byref(event), 3 if blocking else 2)
        assert event.value
        return event.value

    # -- devices

    def new_stream(self, device: int = 0) -> int:
        return int(self._library.double_new_stream(device))

    def default_stream(self, device: int = 0) -> int:
        """The default stream as a handle of its own, which needs no current context."""
        return int(self._library.double_default_stream(device))

    def allocate(self, nbytes: int, device: int = 0) -> int:
        """Address of new device memory, in no log. Raises MemoryError."""
        address = int(self._library.double_allocate(device, nbytes))
        if not address:
            raise MemoryError(f"device {device} has no {nbytes} bytes")
        return address

    def free(self, address: int) -> None:
        self._check("double_free", address)

    def device_of(self, address: int) -> int:
        """Ordinal of the device; -1 for host memory."""
        return int(self._device_of(address))

    def backdoor(self, address: int) -> int:
        """Where the bytes of a device address can be read and written."""
        alias = self._backdoor(address)
        assert alias, f"{address:#x} is not in device memory"
        return int(alias)

    def bytes_at(self, address: int, nbytes: int) -> Any:
        """The bytes of device memory, live, as a ctypes array."""
        return (ctypes.c_char * nbytes).from_address(self.backdoor(address))

    def live_nbytes(self, device: int = 0) -> int:
        return int(self._library.double_live_nbytes(device))

    # -- work

    def launch(self, stream: int, kernel: Any, argument: int = 0) -> None:
        """Runs `kernel`, a `Kernel` that the caller keeps alive, on the stream, in its order."""
        self._check("double_launch", stream, kernel, argument)

    def order(self, stream: int, behind: int) -> None:
        """What comes later on `stream` waits for what was submitted to `behind` so far."""
        self._check("double_order", stream, behind)

    def finish(self, stream: int) -> None:
        """Waits for all that was submitted to the stream so far."""
        self._check("double_finish", stream)

    def drain(self) -> None:
        """Waits for all work of all devices."""
        self._check("double_drain")

    def wait_next(self, stream: int, event: int) -> None:
        """The stream waits for a record of the event that is still to come."""
        self._check("double_wait_next", stream, event)

    def begin_capture(self, stream: int, mode: str = "global") -> None:
        self._check("double_begin_capture", stream, CAPTURE_MODES[mode])

    def end_capture(self, stream: int) -> None:
        """Raises DriverError (CAPTURE_INVALIDATED) if something forbidden happened meanwhile."""
        self._check("double_end_capture", stream)

    # -- the test's hand

    def reset(self, seed: int = 0, delay_us_max: int = 0) -> None:
        """A clean state: nothing held, failing, poisoned, captured, counted or logged; two devices.

        Contexts, streams, events, allocations and pinned ranges stay: the program keeps its own.
        """
        self._check("double_reset", seed, delay_us_max)

    def deinitialize(self) -> None:
        """From now on every call answers that the driver is shutting down; until the next reset."""
        self._library.double_deinitialize()

    def set_devices(self, count: int) -> None:
        self._check("double_set_devices", count)

    def set_connections(self, count: int) -> None:
        """1: all streams of a device share one queue, as with CUDA_DEVICE_MAX_CONNECTIONS=1."""
        self._check("double_set_connections", count)

    def set_batch_abis(self, *, v1: bool, v2: bool) -> None:
        """Which batched copies work; the others answer that they are not supported."""
        self._library.double_set_batch_abi(1 * v1 + 2 * v2)

    def fail(self, entry_point: str, result: int, *, nth: int = 0, sticky: bool = False) -> None:
        """The nth call from now fails; `sticky`: and with it the calling thread's context, for good."""
        self._library.double_fail(entry_point.encode(), nth, result, sticky)

    def fail_async(self, entry_point: str, result: int = ILLEGAL_ADDRESS, *, nth: int = 0) -> None:
        """The nth copy from now that came in through `entry_point` poisons its context when it runs."""
        self._library.double_fail_async(entry_point.encode(), nth, result)

    def poison(self, device: int = 0, result: int = ILLEGAL_ADDRESS) -> None:
        """The device's context is lost, at once."""
        self._check("double_poison", device, result)

    @contextmanager
    def ignoring(self, entry_point: str) -> Iterator[None]:
        """A misuse to be caught: the entry point does nothing, successfully."""
        self._library.double_ignore(entry_point.encode(), 1)
        try:
            yield
        finally:
            self._library.double_ignore(entry_point.encode(), 0)

    @contextmanager
    def stalling(self, entry_point: str) -> Iterator[None]:
        """Calls of the entry point stand still, as they do while the device's queue is full."""
        self._library.double_stall(entry_point.encode(), 1)
        try:
            yield
        finally:
            self._library.double_stall(entry_point.encode(), 0)

    def wait_stalled(self, count: int = 1, timeout_s: float = 30) -> None:
        assert self._library.double_wait_stalled(count, round(timeout_s * 1000)), "no call stands still"

    def hold_copies(self) -> None:
        """Copies to the host stand still before their first byte until `release_copies`."""
        self._library.double_hold_copies()

    def release_copies(self) -> None:
        self._library.double_release_copies()

    @contextmanager
    def holding_copies(self) -> Iterator[None]:
        self.hold_copies()
        try:
            yield
        finally:
            self.release_copies()

    def copies_held(self) -> int:
        """How many copies, or batches of them, stand still right now: one for each stream at most."""
        return int(self._library.double_copies_held())

    def wait_copies_held(self, count: int = 1, timeout_s: float = 30) -> None:
        held = self._library.double_wait_copies_held(count, round(timeout_s * 1000))
        assert held, f"{self.copies_held()} copies are held, not {count}, after {timeout_s} s"

    # -- what happened

    def copied_nbytes(self, *, to_host: bool) -> int:
        return int(self._library.double_copied_nbytes(to_host))

    def count(self, entry_point: str) -> int:
        """Calls since the last reset, refused ones included."""
        return int(self._library.double_count(entry_point.encode()))

    def counter(self, name: str) -> int:
        """copies_to_host, pageable, spinning_waits, blocking_streams, unregistered_in_use, deadlocks or
        captured."""
        return int(self._library.double_counter(name.encode()))

    def registered_nbytes(self) -> int:
        return int(self._library.double_registered_nbytes())

    def registered_flags(self, address: int) -> int | None:
        """Flags of the pinned range that begins at `address`."""
        flags = int(self._library.double_registered_flags(address))
        return None if flags < 0 else flags

    def log(self) -> list[tuple[str, int]]:
        """The latest calls, oldest first: entry point, number of the calling thread."""
        buffer = ctypes.create_string_buffer(_LOG_NBYTES)
        nbytes = self._library.double_log(buffer, _LOG_NBYTES)
        lines = buffer.raw[:nbytes].decode().splitlines()
        return [(name, int(thread)) for name, thread in map(str.split, lines)]

    def clear_log(self) -> None:
        self._library.double_clear_log()

    def thread_number(self) -> int:
        """This thread's number in the log."""
        return int(self._library.double_thread_number())

    def _check(self, name: str, *arguments: Any) -> None:
        function: Callable[..., int] = getattr(self._library, name)
        if result := function(*arguments):
            raise DriverError(name, result)
