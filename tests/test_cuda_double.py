"""The driver double and the torch world on it keep what they promise: else tests over them prove nothing."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ctypes import byref, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.cuda_double import (
    ALREADY_REGISTERED,
    CAPTURE_INVALIDATED,
    CAPTURE_ISOLATION,
    CAPTURE_MODES,
    CAPTURE_UNSUPPORTED,
    CAPTURED_EVENT,
    DEINITIALIZED,
    ILLEGAL_ADDRESS,
    INVALID_CONTEXT,
    INVALID_HANDLE,
    INVALID_VALUE,
    LAUNCH_FAILED,
    NOT_INITIALIZED,
    NOT_READY,
    NOT_REGISTERED,
    NOT_SUPPORTED,
    PORTABLE,
    SUCCESS,
    VARIANTS,
    Double,
    DriverError,
    Kernel,
)
from tests.fake_cuda import HOST, FakeCuda, exchange_memory

ROOT = Path(__file__).parents[1]
WAIT_S = 30  # far beyond what anything here takes: an expiry is a failure


@pytest.fixture(scope="module")
def shared() -> Double:
    return Double()


@pytest.fixture
def double(shared: Double) -> Iterator[Double]:
    shared.reset()
    yield shared
    shared.release_copies()
    shared.reset()


@pytest.fixture
def context(double: Double) -> Iterator[int]:
    with double.context() as context:
        yield context


@pytest.fixture
def world(double: Double) -> Iterator[FakeCuda]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # streams' threads split reductions as this one does
    with FakeCuda(double) as world:
        yield world
    torch.set_num_threads(before)


@contextmanager
def pinned(double: Double, nbytes: int, flags: int = PORTABLE) -> Iterator[Any]:
    memory = ctypes.create_string_buffer(nbytes)
    double.driver("cuMemHostRegister_v2", memory, nbytes, flags)
    try:
        yield memory
    finally:
        double.drain()
        double.result_of("cuMemHostUnregister", memory)


@contextmanager
def on_device(double: Double, content: bytes, device: int = 0) -> Iterator[int]:
    address = double.allocate(len(content), device)
    double.bytes_at(address, len(content))[:] = content
    try:
        yield address
    finally:
        try:
            double.free(address)
        except DriverError:
            pass  # of a context that the test lost


class Gate:
    """A kernel that stands still until the host opens it."""

    def __init__(self, double: Double, stream: int) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        self._kernel = Kernel(self._run)
        double.launch(stream, self._kernel)

    def _run(self, _: Any) -> None:
        self.reached.set()
        assert self._open.wait(WAIT_S)

    def open(self) -> None:
        self._open.set()

    def __enter__(self) -> Gate:
        assert self.reached.wait(WAIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.open()


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from tests.cuda_double import *\n" + code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=WAIT_S * 2,
        check=False,
    )


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("touch", ["ctypes.string_at(address, 1)", "ctypes.memset(address, 1, 1)"])
def test_host_dies_when_it_touches_device_memory(touch: str) -> None:
    done = run_python(f"double = Double(); address = double.allocate(4096); {touch}")
    assert done.returncode == -signal.SIGSEGV, done.stderr


def test_kernel_refuses_device_memory_as_a_source(double: Double) -> None:
    class Vector(ctypes.Structure):
        _fields_ = (("base", c_void_p), ("nbytes", c_size_t))

    libc = ctypes.CDLL(None, use_errno=True)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    target = ctypes.create_string_buffer(16)
    with on_device(double, b"x" * 16) as address:
        local, remote = Vector(ctypes.addressof(target), 16), Vector(address, 16)
        assert libc.process_vm_readv(os.getpid(), byref(local), 1, byref(remote), 1, 0) == -1
        assert ctypes.get_errno() == errno.EFAULT


def test_addresses_know_their_device(double: Double) -> None:
    with on_device(double, bytes(1000)) as first, on_device(double, bytes(1000), 1) as second:
        assert (double.device_of(first), double.device_of(second)) == (0, 1)
        assert first % 256 == second % 256 == 0
        assert double.live_nbytes(0) >= 1000
        assert double.device_of(ctypes.addressof(ctypes.create_string_buffer(1))) == HOST


@pytest.mark.usefixtures("context")
def test_free_waits_for_the_device_and_spoils_what_was_there(double: Double) -> None:
    address = double.allocate(4096)
    memory = double.bytes_at(address, 4096)
    memory.raw = b"m" * 4096

    def free() -> None:
        with double.context():
            double.driver("cuMemFree_v2", address)

    thread = threading.Thread(target=free)
    with Gate(double, double.new_stream()):
        thread.start()
        while not double.count("cuMemFree_v2"):
            os.sched_yield()
        assert (thread.is_alive(), memory.raw) == (True, b"m" * 4096)
    thread.join(WAIT_S)
    assert memory.raw == b"\xdb" * 4096
    assert double.result_of("cuMemFree_v2", address) == INVALID_VALUE


def test_memory_ends(double: Double) -> None:
    with pytest.raises(MemoryError):
        double.allocate(1 << 40)


@pytest.mark.usefixtures("context")
def test_registration_remembers(double: Double) -> None:
    memory = ctypes.create_string_buffer(8192)
    at = ctypes.addressof(memory)
    before = double.registered_nbytes()
    double.driver("cuMemHostRegister_v2", at, 4096, PORTABLE)
    assert double.registered_flags(at) == PORTABLE
    assert double.registered_nbytes() == before + 4096
    assert double.result_of("cuMemHostRegister_v2", at + 4095, 4096, PORTABLE) == ALREADY_REGISTERED
    assert double.result_of("cuMemHostRegister_v2", at + 4096, 4096, 0) == SUCCESS
    assert double.result_of("cuMemHostUnregister", at + 1) == NOT_REGISTERED
    for begin in (at, at + 4096):
        double.driver("cuMemHostUnregister", begin)
    assert double.result_of("cuMemHostUnregister", at) == NOT_REGISTERED
    assert double.result_of("cuMemHostRegister_v2", 1 << 46, 4096, 0) == INVALID_VALUE  # nothing is there


@pytest.mark.usefixtures("context")
def test_unregistering_under_a_copy_is_counted(double: Double) -> None:
    stream = double.new_stream()
    with on_device(double, bytes(64)) as address, pinned(double, 64) as memory:
        with double.holding_copies():
            double.driver("cuMemcpyDtoHAsync_v2", memory, address, 64, stream)
            double.wait_copies_held()
            double.driver("cuMemHostUnregister", memory)
        assert double.counter("unregistered_in_use") == 1
        double.drain()
        double.driver("cuMemHostRegister_v2", memory, 64, PORTABLE)
        double.driver("cuMemHostUnregister", memory)
        assert double.counter("unregistered_in_use") == 1


# ---- streams and events ------------------------------------------------------------------------


def copied_behind_a_kernel(double: Double, *, wait: bool) -> bytes:
    """A kernel writes on one stream, a copy on another reads: after it only if it waits for the event."""
    compute, copying = double.new_stream(), double.new_stream()
    with on_device(double, b"old" * 100) as address, pinned(double, 300) as memory:
        alias = double.bytes_at(address, 300)
        kernel = Kernel(lambda _: ctypes.memmove(alias, b"new" * 100, 300) and None)
        double.launch(compute, kernel)
        event = double.event()
        double.driver("cuEventRecord", event, compute)
        if wait:
            double.driver("cuStreamWaitEvent", copying, event, 0)
        double.driver("cuMemcpyDtoHAsync_v2", memory, address, 300, copying)
        double.driver("cuEventRecord", event, copying)
        double.driver("cuEventSynchronize", event)
        double.driver("cuEventDestroy_v2", event)
        for stream in (compute, copying):
            double.driver("cuStreamDestroy_v2", stream)
        return bytes(memory.raw)


@pytest.mark.usefixtures("context")
def test_only_events_order_streams(double: Double) -> None:
    outcomes: dict[bool, set[bytes]] = {True: set(), False: set()}
    for seed in range(200):
        double.reset(seed, delay_us_max=100)
        for wait, seen in outcomes.items():
            seen.add(copied_behind_a_kernel(double, wait=wait))
    assert outcomes[True] == {b"new" * 100}
    assert b"old" * 100 in outcomes[False]


@pytest.mark.usefixtures("context")
def test_ignored_wait_is_a_wait_left_out(double: Double) -> None:
    outcomes = set()
    for seed in range(50):
        double.reset(seed, delay_us_max=100)
        with double.ignoring("cuStreamWaitEvent"):
            outcomes.add(copied_behind_a_kernel(double, wait=True))
        assert double.count("cuStreamWaitEvent") == 1
    assert b"old" * 100 in outcomes


@pytest.mark.usefixtures("context")
def test_wait_takes_the_record_that_was_last_when_it_was_called(double: Double) -> None:
    first, second, waiting = (double.new_stream() for _ in range(3))
    event, after = double.event(), double.event()
    double.driver("cuStreamWaitEvent", waiting, event, 0)  # never recorded: nothing to wait for
    double.finish(waiting)
    assert double.result_of("cuEventQuery", event) == SUCCESS
    with Gate(double, first) as gate:
        double.driver("cuEventRecord", event, first)
        double.driver("cuStreamWaitEvent", waiting, event, 0)
        double.driver("cuEventRecord", after, waiting)
        double.driver("cuEventRecord", event, second)
        double.driver("cuEventSynchronize", event)  # the second record, which nothing holds
        assert double.result_of("cuEventQuery", after) == NOT_READY
        gate.open()
        double.driver("cuEventSynchronize", after)


@pytest.mark.usefixtures("context")
def test_waits_that_would_spin_are_counted(double: Double) -> None:
    for blocking, spinning in ((True, 0), (False, 1)):
        double.driver("cuEventSynchronize", double.event(blocking=blocking))
        assert double.counter("spinning_waits") == spinning


@pytest.mark.usefixtures("context")
def test_streams_that_would_block_are_counted(double: Double) -> None:
    stream = c_void_p()
    for flags, blocking in ((1, 0), (0, 1)):
        double.driver("cuStreamCreateWithPriority", byref(stream), flags, 0)
        assert double.counter("blocking_streams") == blocking
    double.driver("cuStreamDestroy_v2", stream)
    assert double.result_of("cuStreamDestroy_v2", stream) == INVALID_HANDLE


def test_events_belong_to_a_device(double: Double) -> None:
    with double.context(0):
        event = double.event()
        assert double.result_of("cuEventRecord", event, double.new_stream(1)) == INVALID_HANDLE
        double.driver("cuStreamWaitEvent", double.new_stream(1), event, 0)


@pytest.mark.usefixtures("context")
def test_one_connection_blocks_what_comes_later(double: Double) -> None:
    """And it is what comes later alone: with a queue for each stream, the bystander goes on."""
    for connections in (8, 1):
        double.set_connections(connections)
        busy, waiting, bystander = (double.new_stream() for _ in range(3))
        event, bystanders = double.event(), double.event()
        with Gate(double, busy) as gate:
            double.driver("cuEventRecord", event, busy)
            double.driver("cuStreamWaitEvent", waiting, event, 0)
            double.driver("cuEventRecord", bystanders, bystander)
            if connections > 1:
                double.driver("cuEventSynchronize", bystanders)
            assert double.result_of("cuEventQuery", bystanders) == (SUCCESS if connections > 1 else NOT_READY)
            gate.open()
        double.driver("cuEventSynchronize", bystanders)
        assert double.counter("deadlocks") == 0


@pytest.mark.usefixtures("context")
def test_deadlock_of_one_connection_is_found(double: Double) -> None:
    for connections in (8, 1):
        double.set_connections(connections)
        waiting, recording = double.new_stream(), double.new_stream()
        event, after = double.event(), double.event()
        double.wait_next(waiting, event)
        double.driver("cuEventRecord", after, waiting)
        double.driver("cuEventRecord", event, recording)
        result = double.result_of("cuEventSynchronize", after)
        assert result == (SUCCESS if connections > 1 else LAUNCH_FAILED)
    assert double.counter("deadlocks") == 1


# ---- copies ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("context")
def test_held_copies_stand_still_until_released(double: Double) -> None:
    stream, event = double.new_stream(), double.event()
    with on_device(double, b"y" * 64) as address, pinned(double, 64) as memory:
        double.hold_copies()
        double.driver("cuMemcpyDtoHAsync_v2", memory, address, 64, stream)
        double.driver("cuEventRecord", event, stream)
        double.wait_copies_held(1)
        assert (double.copies_held(), memory.raw) == (1, bytes(64))
        assert double.result_of("cuEventQuery", event) == NOT_READY
        double.release_copies()
        double.driver("cuEventSynchronize", event)
        assert (double.copies_held(), memory.raw) == (0, b"y" * 64)
        assert double.copied_nbytes(to_host=True) == 64


@pytest.mark.usefixtures("context")
def test_memory_that_is_not_pinned_is_copied_before_the_call_returns(double: Double) -> None:
    stream = double.new_stream()
    memory = ctypes.create_string_buffer(64)
    with on_device(double, b"z" * 64) as address:
        double.driver("cuMemcpyDtoHAsync_v2", memory, address, 64, stream)
        assert memory.raw == b"z" * 64
        double.driver("cuMemcpyHtoDAsync_v2", address, ctypes.create_string_buffer(b"h" * 63), 64, stream)
        assert double.bytes_at(address, 63).raw == b"h" * 63
        assert double.counter("pageable") == 2
        with pinned(double, 64) as half:  # reaching beyond the range
            double.driver("cuMemHostUnregister", half)
            double.driver("cuMemHostRegister_v2", half, 32, PORTABLE)
            double.driver("cuMemcpyDtoHAsync_v2", half, address, 64, stream)
        assert double.counter("pageable") == 3


def test_pinned_for_all_devices_only_if_portable(double: Double) -> None:
    for flags, pageable in ((PORTABLE, 0), (0, 1)):
        with double.context(0), pinned(double, 64, flags) as memory, on_device(double, bytes(64), 1) as there:
            double.driver("cuMemcpyDtoHAsync_v2", memory, there, 64, double.new_stream(1))
            assert double.counter("pageable") == pageable


@pytest.mark.usefixtures("context")
def test_writer_beside_a_long_copy_tears_it(double: Double) -> None:
    nbytes, torn = 1 << 20, 0
    writing, copying = double.new_stream(), double.new_stream()
    with on_device(double, b"\1" * nbytes) as address, pinned(double, nbytes) as memory:
        alias = double.backdoor(address)
        kernel = Kernel(lambda value: ctypes.memset(alias, value or 0, nbytes) and None)
        for seed in range(1, 60):
            double.reset(seed, delay_us_max=300)
            double.launch(writing, kernel, seed % 200 + 1)
            double.driver("cuMemcpyDtoHAsync_v2", memory, address, nbytes, copying)
            double.drain()
            torn += len(set(memory.raw)) > 1
    assert torn


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_driver(variant: str) -> None:
    double = Double(variant)
    assert double.has("cuMemcpyBatchAsync") == (variant in {"", "BATCH_V1_ONLY", "OLD_DRIVER"})
    assert double.has("cuMemcpyBatchAsync_v2") == (variant in {"", "BATCH_V2_ONLY", "OLD_DRIVER"})
    assert double.has("cuThreadExchangeStreamCaptureMode") == (variant != "OLD_DRIVER")


class Batch:
    """Copies from consecutive device words to consecutive host words, in one call of either ABI."""

    def __init__(self, double: Double, count: int = 16) -> None:
        self.count = count
        self.double = double

    def run(
        self, address: int, memory: Any, stream: int | None, *, v2: bool, order: int = 1, firsts: Any = (0,)
    ) -> int:
        addresses = ctypes.c_ulonglong * self.count
        targets = addresses(*(ctypes.addressof(memory) + 8 * i for i in range(self.count)))
        sources = addresses(*(address + 8 * i for i in range(self.count)))
        sizes = (c_size_t * self.count)(*[8] * self.count)
        attributes = (c_int * (6 * len(firsts)))(*([order, 0, 0, 0, 0, 0] * len(firsts)))
        indices = (c_size_t * len(firsts))(*firsts)
        failed = c_size_t(7)
        name, tail = ("cuMemcpyBatchAsync_v2", []) if v2 else ("cuMemcpyBatchAsync", [byref(failed)])
        result = self.double.result_of(
            name, targets, sources, sizes, self.count, attributes, indices, len(firsts), *tail, stream
        )
        assert v2 or failed.value == c_size_t(-1).value
        return result


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.usefixtures("context")
def test_batches(double: Double, v2: bool) -> None:
    content = bytes(range(128))
    stream, batch = double.new_stream(), Batch(double)
    with on_device(double, content) as address, pinned(double, 128) as memory:
        for seed in range(20):
            double.reset(seed, delay_us_max=20)
            ctypes.memset(memory, 0, 128)
            assert batch.run(address, memory, stream, v2=v2, firsts=(0, 5)) == SUCCESS
            double.finish(stream)
            assert memory.raw == content
        assert batch.run(address, memory, None, v2=v2) == INVALID_VALUE  # refuses the default stream
        assert batch.run(address, memory, stream, v2=v2, order=0) == INVALID_VALUE
        assert batch.run(address, memory, stream, v2=v2, firsts=(1,)) == INVALID_VALUE
        assert batch.run(address, memory, stream, v2=v2, firsts=(0, 16)) == INVALID_VALUE
        double.set_batch_abis(v1=v2, v2=not v2)
        assert batch.run(address, memory, stream, v2=v2) == NOT_SUPPORTED


@pytest.mark.usefixtures("context")
def test_batch_has_no_order_within(double: Double) -> None:
    """Copies to one place: whichever comes last is seen, and over seeds that is not always the same."""
    stream, addresses = double.new_stream(), ctypes.c_ulonglong * 4
    sizes, attributes, firsts = (c_size_t * 4)(1, 1, 1, 1), (c_int * 6)(1), (c_size_t * 1)(0)
    last = set()
    with on_device(double, b"abcd") as address, pinned(double, 1) as memory:
        targets = addresses(*[ctypes.addressof(memory)] * 4)
        sources = addresses(*(address + i for i in range(4)))
        for seed in range(50):
            double.reset(seed)
            batch = (targets, sources, sizes, 4, attributes, firsts, 1, stream)
            double.driver("cuMemcpyBatchAsync_v2", *batch)
            double.finish(stream)
            last.add(memory.raw)
    assert last == {b"a", b"b", b"c", b"d"}


@pytest.mark.usefixtures("context")
def test_batch_runs_in_stream_order_unless_its_sources_may_be_read_at_once(double: Double) -> None:
    stream, batch = double.new_stream(), Batch(double)
    for order, seen in ((1, b"new"), (3, b"old")):
        with on_device(double, b"old" * 43) as address, pinned(double, 128) as memory:
            alias = double.bytes_at(address, 129)
            with Gate(double, stream):
                kernel = Kernel(lambda _, alias=alias: ctypes.memmove(alias, b"new" * 43, 129) and None)
                double.launch(stream, kernel)
                assert batch.run(address, memory, stream, v2=True, order=order) == SUCCESS
            double.finish(stream)
            assert memory.raw == (seen * 43)[:128]


# ---- failures ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("context")
def test_copy_from_memory_that_is_gone_loses_the_context(double: Double) -> None:
    stream, pending = double.new_stream(), double.event()
    with pinned(double, 64) as memory:
        address = double.allocate(64)
        double.free(address)
        with Gate(double, stream):
            double.driver("cuMemcpyDtoHAsync_v2", memory, address, 64, stream)
            double.driver("cuEventRecord", pending, stream)
        assert double.result_of("cuEventSynchronize", pending) == ILLEGAL_ADDRESS
        for name, arguments in (
            ("cuEventQuery", (pending,)),
            ("cuEventRecord", (pending, stream)),
            ("cuStreamWaitEvent", (stream, pending, 0)),
            ("cuMemcpyDtoHAsync_v2", (memory, address, 64, stream)),
            ("cuMemHostUnregister", (memory,)),
        ):
            assert double.result_of(name, *arguments) == ILLEGAL_ADDRESS, name
        with double.context(1):
            double.driver("cuEventSynchronize", double.event())  # the other device lives
        double.reset()
        double.driver("cuEventSynchronize", pending)


@pytest.mark.usefixtures("context")
def test_lost_context_ends_every_wait(double: Double) -> None:
    stream, event = double.new_stream(), double.event()
    results = []
    with on_device(double, b"l" * 64) as address, pinned(double, 64) as memory:
        double.hold_copies()
        double.driver("cuMemcpyDtoHAsync_v2", memory, address, 64, stream)
        double.driver("cuEventRecord", event, stream)
        double.wait_copies_held()

        def wait() -> None:
            with double.context():
                results.append(double.result_of("cuEventSynchronize", event))

        thread = threading.Thread(target=wait)
        thread.start()
        double.poison(0, 999)
        thread.join(WAIT_S)
        assert results == [999]
        double.drain()  # copies that are held, too
        assert memory.raw == bytes(64)
        double.reset()


@pytest.mark.usefixtures("context")
def test_lost_context_pins_nothing_after_a_reset(double: Double) -> None:
    """Its program could unpin nothing; what is mapped there next must be nobody's."""
    before = double.registered_nbytes()
    memory = ctypes.create_string_buffer(64)
    double.driver("cuMemHostRegister_v2", memory, 64, PORTABLE)
    double.poison()
    assert double.result_of("cuMemHostUnregister", memory) == ILLEGAL_ADDRESS
    double.reset()
    assert double.result_of("cuMemHostUnregister", memory) == NOT_REGISTERED

    mapping = mmap.mmap(-1, 4096)
    view = (ctypes.c_char * 4096).from_buffer(mapping)
    double.driver("cuMemHostRegister_v2", view, 4096, PORTABLE)
    double.reset()
    assert double.registered_nbytes() == before + 4096  # it is there: it stays
    del view
    mapping.close()
    double.reset()
    assert double.registered_nbytes() == before


@pytest.mark.usefixtures("context")
def test_failures_to_order(double: Double) -> None:
    event = double.event()
    double.fail("cuEventQuery", 999, nth=1)
    assert [double.result_of("cuEventQuery", event) for _ in range(3)] == [SUCCESS, 999, SUCCESS]
    assert double.count("cuEventQuery") == 3
    stream = double.new_stream()
    with on_device(double, bytes(64)) as address, pinned(double, 64) as memory:
        double.fail_async("cuMemcpyDtoHAsync_v2", 214, nth=1)
        for expected in (SUCCESS, 214):
            double.driver("cuMemcpyDtoHAsync_v2", memory, address, 64, stream)
            assert double.result_of("cuStreamSynchronize", stream) == expected
    double.reset()
    double.fail("cuEventQuery", 700, sticky=True)
    assert [double.result_of(name, event) for name in ("cuEventQuery", "cuEventSynchronize")] == [700, 700]


def test_calls_need_a_context_and_a_living_driver(double: Double) -> None:
    event = c_void_p()
    assert double.result_of("cuEventCreate", byref(event), 2) == INVALID_CONTEXT
    with double.context():
        double.deinitialize()
        assert double.result_of("cuEventCreate", byref(event), 2) == DEINITIALIZED
        double.reset()
        assert double.result_of("cuEventCreate", byref(event), 2) == SUCCESS


def test_before_init_and_in_a_child_there_is_no_driver() -> None:
    done = run_python(
        "import os\n"
        "raw = ctypes.CDLL(str(build()))\n"
        f"assert raw.cuDeviceGetCount(byref(c_int())) == {NOT_INITIALIZED}\n"
        "double = Double(); context = double.context(); context.__enter__(); event = double.event()\n"
        "if child := os.fork():\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "else:\n"
        f"    refused = {{double.result_of('cuEventQuery', event), double._library.double_drain()}}\n"
        f"    os._exit(refused != {{{NOT_INITIALIZED}}})\n"
    )
    assert done.returncode == 0, done.stderr


def test_process_ends_with_work_pending() -> None:
    """Even if a stream's thread is in Python right then."""
    done = run_python(
        "import threading\n"
        "double = Double(); double.hold_copies(); stream, other = double.new_stream(), double.new_stream()\n"
        "reached = threading.Event()\n"
        "kernel = Kernel(lambda _: reached.set() or threading.Event().wait())\n"
        "double.launch(stream, kernel); double.launch(stream, kernel); reached.wait()\n"
        "print('end')\n"
    )
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


@pytest.mark.usefixtures("context")
def test_log_names_calls_and_threads(double: Double) -> None:
    double.clear_log()
    double.driver("cuCtxSynchronize")
    thread = threading.Thread(target=lambda: double.result_of("cuStreamSynchronize", None))
    thread.start()
    thread.join()
    (first, first_thread), (second, second_thread) = double.log()
    assert (first, second) == ("cuCtxSynchronize", "cuStreamSynchronize")
    assert first_thread == double.thread_number() != second_thread


# ---- capture -----------------------------------------------------------------------------------


def disturb(double: Double, event: int, own_mode: str | None) -> int:
    """Queries an event from another thread, in its own capture mode."""
    results: list[int] = []

    def query() -> None:
        with double.context():
            if own_mode is not None:
                double.driver("cuThreadExchangeStreamCaptureMode", byref(c_int(CAPTURE_MODES[own_mode])))
            results.append(double.result_of("cuEventQuery", event))

    thread = threading.Thread(target=query)
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize(
    ("mode", "own_mode", "spoiled"),
    [
        ("global", None, True),
        ("global", "thread_local", False),
        ("global", "relaxed", False),
        ("thread_local", None, False),
        ("relaxed", None, False),
    ],
)
@pytest.mark.usefixtures("context")
def test_calls_of_other_threads_during_a_capture(
    double: Double, mode: str, own_mode: str | None, spoiled: bool
) -> None:
    stream, event, status = double.new_stream(), double.event(), c_int()
    double.begin_capture(stream, mode)
    assert disturb(double, event, own_mode) == (CAPTURE_UNSUPPORTED if spoiled else SUCCESS)
    double.driver("cuStreamIsCapturing", stream, byref(status))
    assert status.value == (2 if spoiled else 1)
    with ExitStack() as stack:
        if spoiled:
            error = stack.enter_context(pytest.raises(DriverError))
        double.end_capture(stream)
    if spoiled:
        assert error.value.result == CAPTURE_INVALIDATED
    double.driver("cuStreamIsCapturing", stream, byref(status))
    assert status.value == 0


@pytest.mark.parametrize(("mode", "spoiled"), [("global", True), ("thread_local", True), ("relaxed", False)])
@pytest.mark.usefixtures("context")
def test_calls_of_the_thread_that_captures(double: Double, mode: str, spoiled: bool) -> None:
    """Its own capture forbids them even to a thread that cares for no other's; nothing, to a relaxed one."""
    stream, event = double.new_stream(), double.event()
    double.begin_capture(stream, mode)
    results = []
    for own_mode in ("relaxed", "thread_local"):
        exchanged = c_int(CAPTURE_MODES[own_mode])
        double.driver("cuThreadExchangeStreamCaptureMode", byref(exchanged))
        results.append(double.result_of("cuEventQuery", event))
        double.driver("cuThreadExchangeStreamCaptureMode", byref(exchanged))
    assert results == [SUCCESS, CAPTURE_UNSUPPORTED if spoiled else SUCCESS]


@pytest.mark.usefixtures("context")
def test_captured_work_is_counted_and_not_run(double: Double) -> None:
    stream, other, event = double.new_stream(), double.new_stream(), double.event()
    with on_device(double, b"c" * 64) as address, pinned(double, 64) as memory:
        double.begin_capture(stream, "relaxed")
        double.driver("cuMemcpyDtoHAsync_v2", memory, address, 64, stream)
        double.driver("cuEventRecord", event, stream)
        double.driver("cuStreamWaitEvent", other, event, 0)  # joins
        double.driver("cuMemcpyDtoHAsync_v2", memory, address, 64, other)
        double.end_capture(stream)
        double.drain()
        assert double.counter("captured") == 4
        assert memory.raw == bytes(64)
        assert double.result_of("cuEventQuery", event) == CAPTURED_EVENT


@pytest.mark.usefixtures("context")
def test_capture_must_not_wait_for_what_is_outside(double: Double) -> None:
    stream, event = double.new_stream(), double.event()
    double.driver("cuEventRecord", event, double.new_stream())
    double.begin_capture(stream)
    assert double.result_of("cuStreamWaitEvent", stream, event, 0) == CAPTURE_ISOLATION
    with pytest.raises(DriverError) as error:
        double.end_capture(stream)
    assert error.value.result == CAPTURE_INVALIDATED


# ---- torch on it: training ---------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(10, 16),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.BatchNorm1d(32),
        nn.LayerNorm(32),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(32, 10),
    )


def train(net: nn.Module, optimizer: Any, place: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
    torch.manual_seed(1)  # for dropout, too
    losses = []
    for _ in range(5):
        inputs, labels = torch.randint(0, 10, (8, 4)), torch.randint(0, 10, (8,))
        loss = nn.functional.cross_entropy(net(place(inputs)), place(labels))
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, foreach=False),
    "adamw-foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("delay_us_max", [0, 200])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_on_a_device_is_bit_equal(world: FakeCuda, kind: str, delay_us_max: int) -> None:
    world.double.reset(1, delay_us_max)
    here, there = network(), world.module_to(network(), 1)
    identities = [id(parameter) for parameter in there.parameters()]
    optimizers = [OPTIMIZERS[kind](net.parameters()) for net in (here, there)]
    assert train(here, optimizers[0], lambda tensor: tensor) == train(
        there, optimizers[1], lambda tensor: world.to_device(tensor, 1)
    )
    assert [id(parameter) for parameter in there.parameters()] == identities
    for (name, ours), theirs in zip(here.state_dict().items(), there.state_dict().values(), strict=True):
        assert world.device_of(theirs) == 1, name
        assert torch.equal(ours, world.to_host(theirs)), name
    for ours, theirs in zip(here.parameters(), there.parameters(), strict=True):
        assert theirs._version == ours._version  # bumped as often as by kernels that the host runs itself
        for key, value in optimizers[0].state[ours].items():
            if isinstance(value, torch.Tensor):
                moved = optimizers[1].state[theirs][key]
                assert world.device_of(moved) == (HOST if key == "step" else 1)
                assert torch.equal(value, world.to_host(moved)), key
    assert not world.double.log()  # the training program is not in the log of driver calls


def test_host_runs_ahead_of_kernels(world: FakeCuda) -> None:
    """A whole step is enqueued, versions are bumped, and no kernel has run yet."""
    net = world.module_to(nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(net.parameters(), foreach=True)
    inputs = world.to_device(torch.randn(2, 4))
    before = world.to_host(net.weight)
    with Gate(world.double, world.double.default_stream()):
        for _ in range(2):
            net(inputs).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert net.weight._version == 1 + 2 * 2
        assert torch.equal(world.peek(net.weight), before)
    assert not torch.equal(world.to_host(net.weight), before)


def test_versions_move_as_on_a_gpu(world: FakeCuda) -> None:
    tensor = world.to_device(torch.zeros(4))
    versions = [tensor._version]

    def moved() -> bool:
        versions.append(tensor._version)
        return versions[-1] != versions[-2]

    tensor.add_(1)
    assert moved()
    tensor[1:].mul_(2)
    assert moved()
    torch._foreach_add_([tensor], 1)
    assert moved()
    host = torch.zeros(4)
    torch._foreach_add_([host], 1)
    assert host._version == 1
    torch.add(tensor, 1, out=tensor)
    assert moved()
    tensor.data.add_(1)
    assert not moved()
    world.kernel(lambda alias: alias.add_(1), tensor)
    assert not moved()
    parameter = world.to_device(torch.zeros(4, requires_grad=True))
    parameter.grad = world.to_device(torch.ones(4))
    version = parameter._version
    torch.optim.AdamW([parameter], fused=True).step()
    assert parameter._version == version
    assert world.to_host(parameter).tolist() != [0.0] * 4
    assert world.to_host(tensor).tolist() == [5.0, 6.0, 6.0, 6.0]


# ---- torch on it: memory -----------------------------------------------------------------------


def test_views_share_memory(world: FakeCuda) -> None:
    base = world.to_device(torch.arange(12.0).reshape(3, 4))
    row, turned = base[1], base.t()
    row.fill_(7)
    assert turned.data_ptr() == base.data_ptr()
    assert world.to_host(turned)[:, 1].tolist() == [7.0] * 4
    assert torch.equal(world.to_host(base.reshape(-1)[4:8]), torch.full((4,), 7.0))
    assert world.to_host(base.reshape(2, 6).view(-1)).tolist() == world.to_host(base).flatten().tolist()


def test_device_tensors_can_be_printed(world: FakeCuda) -> None:
    tensor = world.to_device(torch.arange(3))
    world.synchronize()
    assert repr(tensor) == "tensor([0, 1, 2]) on device 0"
    world.free_storage(tensor)
    assert "resized to nothing" in repr(tensor)
    assert repr(torch.arange(3)) == "tensor([0, 1, 2])"


def test_strides_and_results(world: FakeCuda) -> None:
    host = torch.randn(5, 3).t()
    moved = world.to_device(host)
    assert (moved.stride(), moved.shape) == (host.stride(), host.shape)
    for operation in (torch.clone, torch.nonzero, torch.unique, lambda t: t.topk(2)[1], lambda t: t @ t.t()):
        result = operation(moved)
        assert world.device_of(result) == 0
        assert torch.equal(world.to_host(result), operation(host))
    assert moved[1, 2].item() == host[1, 2].item()
    assert torch.equal(moved, world.to_device(host))
    target = torch.empty(3, 5)
    target.copy_(moved)  # to the host: it waits
    assert torch.equal(target, host)


def test_kernels_take_host_tensors_as_they_were(world: FakeCuda) -> None:
    source, target = torch.ones(4), world.to_device(torch.zeros(4))
    with Gate(world.double, world.double.default_stream()):
        target.copy_(source)
        source.fill_(5)
    assert world.to_host(target).tolist() == [1.0] * 4


def test_freed_blocks_serve_the_next_at_once(world: FakeCuda) -> None:
    tensor = world.to_device(torch.zeros(1000))
    address = tensor.data_ptr()
    del tensor
    other = world.to_device(torch.ones(1000))
    assert other.data_ptr() == address
    with world.stream(world.new_stream()):
        del other
        assert world.to_device(torch.ones(1000)).data_ptr() != address  # blocks belong to streams


def test_storage_resized_to_nothing_and_back(world: FakeCuda) -> None:
    tensor = world.to_device(torch.ones(1000))
    held, version, address = tensor.detach(), tensor._version, tensor.data_ptr()
    tensor.untyped_storage().resize_(0)
    assert (held.untyped_storage().nbytes(), held._version) == (0, version)
    assert world.device_of(tensor) == world.device_of(held) == 0
    with pytest.raises(RuntimeError, match="resized to nothing"):
        tensor.add_(1)
    other = world.to_device(torch.zeros(1000))
    assert other.data_ptr() == address
    tensor.untyped_storage().resize_(4000)
    assert tensor.data_ptr() not in {0, address}
    tensor.fill_(3)
    assert world.to_host(held).tolist() == [3.0] * 1000
    tensor.untyped_storage().resize_(8000)
    assert world.to_host(tensor).tolist() == [3.0] * 1000
    world.free_storage(tensor)
    assert held.untyped_storage().nbytes() == 0
    host = torch.ones(10)
    host.untyped_storage().resize_(0)  # the host's own still go torch's way
    assert host.untyped_storage().nbytes() == 0


def test_storages_trade_memory_both_ways() -> None:
    one, other = torch.UntypedStorage(16), torch.UntypedStorage(64)
    before = one.data_ptr(), other.data_ptr()
    exchange_memory(one, other)
    assert (other.data_ptr(), one.data_ptr()) == before
    assert (one.nbytes(), other.nbytes()) == (64, 16)


def test_data_of_a_parameter_moves(world: FakeCuda) -> None:
    parameter = nn.Parameter(torch.ones(4))
    parameter.data = world.to_device(parameter.data)
    assert world.device_of(parameter) == 0
    parameter.data = world.to_host(parameter.data)
    assert world.device_of(parameter) == HOST
    assert parameter.tolist() == [1.0] * 4


# ---- torch on it: streams, capture, errors -----------------------------------------------------


def test_streams_of_torch_are_ordered_only_when_told(world: FakeCuda) -> None:
    side = world.new_stream()
    tensor, target = world.to_device(torch.zeros(1)), world.to_device(torch.zeros(1))

    def seen_on_the_side() -> float:
        with world.stream(side):
            assert world.current_stream() == side
            target.copy_(tensor)
            return world.to_host(target).item()

    for seed in range(40):
        world.double.reset(seed, delay_us_max=300)
        tensor.zero_()
        tensor.add_(1)
        world.wait_stream(side, behind=0)
        assert seen_on_the_side() == 1.0
    world.synchronize()
    gate = threading.Event()
    world.launch(0, lambda: gate.wait(WAIT_S))
    tensor.add_(1)
    assert seen_on_the_side() == 1.0  # nobody told
    gate.set()
    assert world.to_host(tensor).item() == 2.0
    assert world.current_stream() == 0


def test_replay_runs_what_was_captured_and_bumps_nothing(world: FakeCuda) -> None:
    tensor = world.to_device(torch.zeros(4))
    with world.capture() as graph:
        assert world.is_capturing([0])
        tensor.add_(1)
        doubled = tensor * 2
    assert not world.is_capturing([0])
    version = tensor._version
    assert world.to_host(tensor).tolist() == [0.0] * 4
    for _ in range(3):
        graph.replay()
    assert (world.to_host(doubled).tolist(), tensor._version) == ([6.0] * 4, version)


def test_reading_a_value_ends_a_capture(world: FakeCuda) -> None:
    tensor = world.to_device(torch.zeros(4))
    with pytest.raises(DriverError) as error, world.capture():
        tensor.sum().item()
    assert error.value.result == CAPTURE_UNSUPPORTED
    assert world.to_host(tensor + 1).tolist() == [1.0] * 4


def test_kernels_error_is_raised_where_the_host_waits(world: FakeCuda) -> None:
    tensor = world.to_device(torch.zeros(4))

    def broken(_: torch.Tensor) -> None:
        raise ArithmeticError

    world.kernel(broken, tensor)
    with pytest.raises(ArithmeticError):
        world.to_host(tensor)


def test_lost_device_is_an_error_of_torch(world: FakeCuda) -> None:
    tensor = world.to_device(torch.zeros(4))
    world.synchronize()
    world.double.poison()
    with pytest.raises(RuntimeError, match="700"):
        tensor.add_(1)
    world.double.reset()
    assert world.to_host(tensor).tolist() == [0.0] * 4


def test_devices_do_not_mix(world: FakeCuda) -> None:
    with pytest.raises(RuntimeError, match=r"devices \[0, 1\]"):
        torch.add(world.to_device(torch.ones(2)), world.to_device(torch.ones(2), 1))


def test_other_threads_take_part(double: Double) -> None:
    begin, done = threading.Event(), threading.Event()

    def add_when_told() -> None:
        assert begin.wait(WAIT_S)
        with world.on_this_thread():
            tensor.add_(1)
        done.set()

    older = threading.Thread(target=add_when_told)
    older.start()
    with FakeCuda(double) as world:
        tensor = world.to_device(torch.zeros(4))
        begin.set()
        assert done.wait(WAIT_S)
        younger = threading.Thread(target=lambda: tensor.add_(2))
        younger.start()
        younger.join(WAIT_S)
        assert world.to_host(tensor).tolist() == [3.0] * 4
    older.join()


@pytest.mark.usefixtures("context")
def test_gigabyte_takes_seconds(double: Double) -> None:
    """The double must not be what tests of large states wait for."""
    chunk, total = 4 << 20, 1 << 30
    stream, event = double.new_stream(), double.event()
    with on_device(double, bytes(chunk)) as address, pinned(double, chunk) as memory:
        begin = time.monotonic()
        for _ in range(total // chunk):
            double.driver("cuMemcpyDtoHAsync_v2", memory, address, chunk, stream)
        double.driver("cuEventRecord", event, stream)
        double.driver("cuEventSynchronize", event)
        assert time.monotonic() - begin < 10
    assert double.copied_nbytes(to_host=True) == total
