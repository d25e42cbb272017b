"""Probes of what may run beside what: streams and their order, memory that goes away, captures of graphs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from .child import described
from .device import host_tensor
from .driver import CAPTURE_RELAXED, CudaError
from .journal import Emit, Row
from .pages import HUGE, pages
from .probe_link import Copier

_OLD, _NEW = 1, 2
_PATIENCE_S = 20.0


def order(gpu: Any, emit: Emit, nbytes: int, trials: int, slices: int) -> None:
    """Whether a copy on another stream sees what kernels on the legacy default stream write before it.

    The kernels fill one slice after the other, in about twice the time that the copy takes.
    """
    source = gpu.bytes(nbytes)
    size = nbytes // slices
    with pages(HUGE, nbytes) as memory:
        memory.touch()
        with gpu.registered(memory.address, nbytes):
            landed = host_tensor(memory.address, nbytes).view(slices, size)
            for waits in (True, False):
                found = {"new": 0, "old": 0, "torn": 0}
                for _ in range(trials):
                    source.fill_(_OLD)
                    gpu.synchronize()
                    _write_and_copy(gpu, source.view(slices, size), memory.address, waits)
                    ends = landed[:, :: max(1, size - 1)]  # the first and the last byte of each slice
                    kind = "new" if bool((ends == _NEW).all()) else "torn"
                    found["old" if bool((ends == _OLD).all()) else kind] += 1
                emit({"waits": waits, "trials": trials, **found})


def _write_and_copy(gpu: Any, source: torch.Tensor, target: int, waits: bool) -> None:
    compute, copies, written = gpu.current(), gpu.stream(), gpu.event()
    for part in source:
        part.fill_(_NEW)
        gpu.spin(source.nbytes / len(source) / 25e9, compute)
    written.record(compute)
    if waits:
        copies.wait_event(written)
    gpu.copy(target, source.data_ptr(), source.nbytes, copies)
    gpu.synchronize()


def slowdown(gpu: Any, emit: Emit, nbytes: int, side: int, steps: int, rounds: int) -> None:
    """How much longer kernels take while blocks are copied to the host without a pause."""
    source = gpu.bytes(nbytes).fill_(3)
    left, right = (torch.randn(side, side, device=gpu.device).bfloat16() for _ in range(2))
    product = torch.empty_like(left)
    tiny = torch.zeros(64, device=gpu.device)
    wide = torch.zeros(nbytes // 4, device=gpu.device)
    works: dict[str, Callable[[], object]] = {
        "matmul": lambda: [torch.mm(left, right, out=product) for _ in range(16)],
        "elementwise": lambda: [wide.add_(1) for _ in range(32)],
        "1000 tiny kernels": lambda: [tiny.add_(1) for _ in range(1000)],
    }
    with pages(HUGE, 2 * nbytes) as memory:
        memory.touch()
        with gpu.registered(memory.address, 2 * nbytes):
            targets = (memory.address, memory.address + nbytes)
            for what, work in works.items():
                _steps_s(gpu, work, 3)  # warm-up
                quiet, busy, rates = [], [], []
                for _ in range(rounds):
                    quiet += _steps_s(gpu, work, steps)
                    with Copier(gpu, targets, source.data_ptr(), nbytes) as copier:
                        busy += _steps_s(gpu, work, steps)
                    rates.append(copier.gb_per_s)
                emit(
                    {
                        "work": what,
                        "quiet_s": median(quiet),
                        "busy_s": median(busy),
                        "slowdown": median(busy) / median(quiet) - 1,
                        "quiet_spread": (max(quiet) - min(quiet)) / median(quiet),
                        "gb_per_s": median(rates),
                    }
                )


def _steps_s(gpu: Any, work: Callable[[], object], steps: int) -> list[float]:
    took = []
    stream, began, ended = gpu.current(), gpu.event(), gpu.event()
    for _ in range(steps):
        began.record(stream)
        work()
        ended.record(stream)
        ended.synchronize()
        took.append(began.elapsed_time(ended) / 1e3)
    return took


def freed(gpu: Any, emit: Emit, nbytes: int, give_back: bool) -> None:
    """What a copy in flight brings when its source is freed under it and the memory is used again.

    Args:
        give_back: torch gives the memory back to the driver (empty_cache) before it takes some again.
    """
    source = gpu.bytes(nbytes).fill_(_OLD)
    expandable = gpu.has_expandable_segments()
    with pages(HUGE, nbytes) as memory:
        memory.touch()
        with gpu.registered(memory.address, nbytes):
            gpu.synchronize()
            row: Row = {"expandable": expandable, "empty_cache": give_back}
            try:
                _free(gpu, source, memory.address, give_back, row)
            except Exception as problem:  # noqa: BLE001 -- a fault of the device is what is looked for
                emit({**row, "contents": "lost", "fault": described(problem)})
                return
            landed = host_tensor(memory.address, nbytes)
            wrong = nbytes - int((landed == _OLD).sum())
            emit({**row, "contents": f"wrong in {wrong} of {nbytes} bytes" if wrong else "right"})


def _free(gpu: Any, source: torch.Tensor, target: int, give_back: bool, row: Row) -> None:
    nbytes, stream, copied = source.nbytes, gpu.stream(), gpu.event()
    gpu.spin(0.02, stream)  # the copy begins when all that follows has been enqueued, if nothing waits
    gpu.copy(target, source.data_ptr(), nbytes, stream)
    copied.record(stream)
    source.untyped_storage().resize_(0)
    row["in_flight_after_resize"] = not copied.query()
    if give_back:
        began_s = time.perf_counter()
        gpu.empty_cache()
        row["empty_cache_s"] = time.perf_counter() - began_s
        row["in_flight_after_empty_cache"] = not copied.query()
    again = gpu.bytes(nbytes).fill_(_NEW)
    copied.synchronize()
    gpu.synchronize()
    del again


# ---- what another thread may do while a graph is captured


class _Bystander:
    """A thread with the context current, one event recorded, and one thing to do when told."""

    def __init__(self, gpu: Any, operation: str, relaxed: bool, address: int, nbytes: int) -> None:
        self._gpu = gpu
        self._operation, self._relaxed = operation, relaxed
        self._address, self._nbytes = address, nbytes
        self.ready, self.go, self.acted = threading.Event(), threading.Event(), threading.Event()
        self.outcome = "did nothing"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._gpu.use_on_this_thread()
            self._stream, self._source = self._gpu.stream(), self._gpu.bytes(4096).zero_()
            self._event = self._gpu.driver.new_event()
            self._gpu.driver.call("cuEventRecord", self._event, self._stream.cuda_stream)
            self._gpu.synchronize()
            self.ready.set()
            if self.go.wait(_PATIENCE_S):
                self._act()
        except Exception as problem:  # noqa: BLE001 -- it is the finding
            self.outcome = described(problem)
        finally:
            self.ready.set()
            self.acted.set()

    def _act(self) -> None:
        driver = self._gpu.driver
        try:
            if self._relaxed:
                driver.exchange_capture_mode(CAPTURE_RELAXED)
            if self._operation == "cuEventQuery":
                driver.call("cuEventQuery", self._event)
            elif self._operation == "cuMemHostRegister_v2":
                driver.register(self._address, self._nbytes)
            else:
                self._gpu.copy(self._address, self._source.data_ptr(), 64, self._stream)
                driver.call("cuEventRecord", self._event, self._stream.cuda_stream)
            self.outcome = "CUDA_SUCCESS"
        except CudaError as problem:
            self.outcome = problem.name

    def join(self) -> None:
        """Let it go, whatever became of the capture."""
        self.go.set()
        self._thread.join(_PATIENCE_S)


OPERATIONS = ("cuEventQuery", "cuMemHostRegister_v2", "copy and event")


def capture(gpu: Any, emit: Emit, operation: str, relaxed: bool, nbytes: int) -> None:
    """Whether a graph that is captured in global mode survives what another thread does meanwhile."""
    numbers = torch.arange(1024, device=gpu.device, dtype=torch.float32)
    result = torch.zeros_like(numbers)
    torch.add(numbers, 1, out=result)  # warm-up
    gpu.synchronize()
    row: Row = {"operation": operation, "relaxed": relaxed}
    with pages(HUGE, nbytes) as memory:
        memory.touch()
        other = _Bystander(gpu, operation, relaxed, memory.address, nbytes)
        other.ready.wait(_PATIENCE_S)

        def work() -> None:
            torch.add(numbers, 1, out=result)
            other.go.set()
            other.acted.wait(_PATIENCE_S)
            result.mul_(2)

        try:
            replay = gpu.capture(work)
            row["survived"] = True
            result.zero_()
            replay()
            gpu.synchronize()
            row["replayed"] = "right" if bool((result == (numbers + 1) * 2).all()) else "wrong"
        except RuntimeError as problem:
            row["survived"], row["why"] = False, described(problem)
        finally:
            other.join()
        emit({**row, "outcome": other.outcome})
