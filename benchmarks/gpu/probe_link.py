"""Probes of the way to the host: by size of copy and kind of memory, beside disk writes, many small ones."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .child import described
from .device import host_tensor
from .journal import Emit, Row
from .pages import HUGE, SMALL, pages

_COPIES_MAX = 256  # well below what a stream queues before an enqueue waits for the GPU
_ROUNDS = 3
_GATE_S = 0.005
_BLOCK_NBYTES = 4 << 20
_WRITERS = 4

REGISTERED, REGISTERED_SMALL = f"registered: {HUGE}", f"registered: {SMALL}"
ALLOCATED, PAGEABLE = "cuMemHostAlloc", f"pageable: {HUGE}"


def link_gb_per_s(gpu: Any, target: int, source: int, nbytes: int, chunk: int) -> tuple[float, float]:
    """(10^9 bytes per second on the GPU's clock, seconds of host time to enqueue one copy); medians."""
    count = max(1, min(_COPIES_MAX, nbytes // chunk))
    stream, began, ended = gpu.stream(), gpu.event(), gpu.event()
    rates, hosts = [], []
    for _ in range(_ROUNDS + 1):  # the first warms up
        gpu.spin(_GATE_S, stream)  # all is enqueued before the first copy begins: no gaps of ours
        began.record(stream)
        host_s = time.perf_counter()
        for index in range(count):
            gpu.copy(target + index * chunk, source + index * chunk, chunk, stream)
        hosts.append((time.perf_counter() - host_s) / count)
        ended.record(stream)
        ended.synchronize()
        rates.append(count * chunk / began.elapsed_time(ended) / 1e6)
    return median(rates[1:]), median(hosts[1:])


@contextlib.contextmanager
def _host(gpu: Any, kind: str, nbytes: int) -> Iterator[int]:
    if kind == ALLOCATED:
        with gpu.host_alloc(nbytes) as address:
            yield address
        return
    with pages(SMALL if kind == REGISTERED_SMALL else HUGE, nbytes) as memory:
        memory.touch()
        if kind == PAGEABLE:
            yield memory.address
            return
        with gpu.registered(memory.address, nbytes):
            yield memory.address


def chunks(gpu: Any, emit: Emit, nbytes: int, smallest: int) -> None:
    """Speed to the host by kind of memory and size of copy; one stream."""
    source = gpu.bytes(nbytes)
    source.fill_(1)
    gpu.synchronize()
    for kind in (REGISTERED, REGISTERED_SMALL, ALLOCATED, PAGEABLE):
        try:
            with _host(gpu, kind, nbytes) as target:
                chunk = smallest
                while chunk <= nbytes:
                    rate, host_s = link_gb_per_s(gpu, target, source.data_ptr(), nbytes, chunk)
                    emit({"kind": kind, "chunk": chunk, "gb_per_s": rate, "enqueue_s": host_s})
                    chunk *= 4
        except (OSError, RuntimeError) as problem:
            emit({"kind": kind, "error": described(problem)})


class Copier:
    """Copies to the host without a pause on a thread and a stream of its own. A context manager.

    Two copies are always enqueued, into two targets.
    """

    def __init__(self, gpu: Any, targets: tuple[int, int], source: int, nbytes: int) -> None:
        self._gpu = gpu
        self._targets, self._source, self._nbytes = targets, source, nbytes
        self._stop = threading.Event()
        self._running = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.failure: Exception | None = None
        self.gb_per_s = 0.0

    def _run(self) -> None:
        try:
            self._copy()
        except Exception as problem:  # noqa: BLE001 -- raised again on the thread that asked
            self.failure = problem
        finally:
            self._running.set()

    def _copy(self) -> None:
        self._gpu.use_on_this_thread()
        stream = self._gpu.stream()
        done = [self._gpu.event(blocking=True) for _ in self._targets]
        began_s, count = time.perf_counter(), 0
        for number in itertools.count():
            which = number % 2
            if number >= 2:
                done[which].synchronize()
                count += 1
                self._running.set()
                if self._stop.is_set():
                    break
            self._gpu.copy(self._targets[which], self._source, self._nbytes, stream)
            done[which].record(stream)
        done[1 - which].synchronize()
        self.gb_per_s = (count + 1) * self._nbytes / (time.perf_counter() - began_s) / 1e9

    def __enter__(self) -> Copier:
        self._thread.start()
        self._running.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        if self.failure is not None:
            raise self.failure


class _Writers:
    """Writes one region over and over into a preallocated file, four threads. A context manager."""

    def __init__(self, fd: int, region: memoryview, file_nbytes: int) -> None:
        self._fd, self._region, self._file_nbytes = fd, region, file_nbytes
        self._stop = threading.Event()
        self._numbers = itertools.count()  # next() on it is atomic
        self._written = [0] * _WRITERS
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(_WRITERS)]
        self.failure: Exception | None = None
        self.gb_per_s = 0.0

    def _run(self, number: int) -> None:
        blocks = len(self._region) // _BLOCK_NBYTES
        try:
            while not self._stop.is_set():
                index = next(self._numbers)
                start = index % blocks * _BLOCK_NBYTES
                offset = index * _BLOCK_NBYTES % self._file_nbytes
                block = self._region[start : start + _BLOCK_NBYTES]
                self._written[number] += os.pwrite(self._fd, block, offset)
        except OSError as problem:
            self.failure = problem

    def __enter__(self) -> _Writers:
        self._began_s = time.perf_counter()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        self.gb_per_s = sum(self._written) / (time.perf_counter() - self._began_s) / 1e9
        if self.failure is not None:
            raise self.failure


def disk(gpu: Any, emit: Emit, directory: str, nbytes: int, file_nbytes: int, seconds: float) -> None:
    """Writes with O_DIRECT from registered pages, and copies into other such pages: alone, and together."""
    path = Path(directory) / "disk"
    source = gpu.bytes(nbytes)
    source.random_(0, 256)
    gpu.synchronize()
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
    try:
        fd, direct = os.open(path, flags | os.O_DIRECT, 0o600), True
    except OSError:
        fd, direct = os.open(path, flags, 0o600), False
    try:
        os.posix_fallocate(fd, 0, file_nbytes)
        with pages(HUGE, 3 * nbytes) as memory:
            memory.touch()
            with gpu.registered(memory.address, 3 * nbytes):
                gpu.copy(memory.address, source.data_ptr(), nbytes, gpu.stream())  # not zeros to the disk
                gpu.synchronize()
                targets = (memory.address + nbytes, memory.address + 2 * nbytes)
                for what in ("warming up", "writes alone", "copies alone", "together"):
                    with contextlib.ExitStack() as stack:
                        writers = copier = None
                        if what != "copies alone":
                            writers = stack.enter_context(_Writers(fd, memory.view[:nbytes], file_nbytes))
                        if what != "writes alone":
                            copier = stack.enter_context(Copier(gpu, targets, source.data_ptr(), nbytes))
                        time.sleep(seconds)  # the duration of the measurement
                    emit(
                        {
                            "what": what,
                            "disk_gb_per_s": writers.gb_per_s if writers else None,
                            "link_gb_per_s": copier.gb_per_s if copier else None,
                            "direct": direct,
                        }
                    )
    finally:
        os.close(fd)
        path.unlink()


# ---- many small copies

_PACK = """
extern "C" __global__ void pack(const unsigned long long* sources, unsigned char* target,
                                unsigned long long nbytes, unsigned long long count) {
  const unsigned long long which = (blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x) / 32;
  if (which >= count) return;
  const uint4* from = (const uint4*)sources[which];
  uint4* to = (uint4*)(target + which * nbytes);
  for (unsigned long long i = threadIdx.x % 32; i < nbytes / 16; i += 32) to[i] = from[i];
}
"""
Submit = Callable[[], None]


class Small:
    """Many tensors of one size, apart from one another, and a place on the host that holds them all."""

    def __init__(self, gpu: Any, host: int, count: int, nbytes: int) -> None:
        self.gpu, self.host, self.count, self.nbytes = gpu, host, count, nbytes
        self.stream = gpu.stream()
        memory = gpu.bytes(2 * count * nbytes).view(count, 2 * nbytes)
        memory.random_(0, 256)
        self.tensors = list(memory[:, :nbytes].unbind())
        self.addresses = [memory.data_ptr() + 2 * nbytes * index for index in range(count)]
        self.expected = memory[:, :nbytes].contiguous().cpu()
        self.packed = gpu.bytes(count * nbytes)
        gpu.synchronize()

    def loop(self) -> Submit:
        """One driver call per tensor."""
        enqueue = self.gpu.copy

        def submit() -> None:
            for index, address in enumerate(self.addresses):
                enqueue(self.host + index * self.nbytes, address, self.nbytes, self.stream)

        return submit

    def batch(self, per_call: int) -> Submit:
        """The driver's batched copies, so many to a call."""
        batches = []
        for start in range(0, self.count, per_call):
            sources = self.addresses[start : start + per_call]
            targets = [self.host + (start + index) * self.nbytes for index in range(len(sources))]
            batches.append(self.gpu.driver.batch(targets, sources, self.nbytes))

        def submit() -> None:
            for one in batches:
                one.enqueue(self.stream.cuda_stream)

        return submit

    def cat(self) -> Submit:
        """Packed by torch.cat, then one copy."""

        def submit() -> None:
            with self.gpu.on(self.stream):
                torch.cat(self.tensors, out=self.packed)
            self._copy_packed()

        return submit

    def kernel(self) -> Submit:
        """Packed by one CuPy kernel, its table of addresses uploaded each time, then one copy."""
        import cupy  # type: ignore[import-not-found, import-untyped, unused-ignore]
        import numpy as np

        pack = cupy.RawKernel(_PACK, "pack")
        table = torch.tensor(self.addresses, dtype=torch.int64).pin_memory()
        on_device = torch.empty_like(table, device=self.gpu.device)
        grid = (self.count * 32 + 255) // 256
        outside = cupy.cuda.ExternalStream(self.stream.cuda_stream)

        def submit() -> None:
            with self.gpu.on(self.stream):
                on_device.copy_(table, non_blocking=True)
            with outside:
                pointers = (np.uint64(on_device.data_ptr()), np.uint64(self.packed.data_ptr()))
                pack((grid,), (256,), (*pointers, np.uint64(self.nbytes), np.uint64(self.count)))
            self._copy_packed()

        return submit

    def _copy_packed(self) -> None:
        self.gpu.copy(self.host, self.packed.data_ptr(), self.count * self.nbytes, self.stream)

    def measure(self, submit: Submit) -> Row:
        """Host time to enqueue, time until all is there, and whether it is right."""
        landed = host_tensor(self.host, self.count * self.nbytes)
        submits, totals = [], []
        done = self.gpu.event()
        for _ in range(_ROUNDS + 1):
            landed.zero_()
            began_s = time.perf_counter()
            submit()
            submits.append(time.perf_counter() - began_s)
            done.record(self.stream)
            done.synchronize()
            totals.append(time.perf_counter() - began_s)
        wrong = int((landed.view(self.count, self.nbytes) != self.expected).any(dim=1).sum())
        return {
            "submit_s": median(submits[1:]),
            "total_s": median(totals[1:]),
            "contents": f"wrong in {wrong} tensors" if wrong else "right",
        }


_WAYS: dict[str, Callable[[Small], Submit]] = {
    "loop": Small.loop,
    "batch": lambda small: small.batch(small.count),
    "batches of 1024": lambda small: small.batch(1024),
    "torch.cat": Small.cat,
    "kernel": Small.kernel,
}


def small(gpu: Any, emit: Emit, ways: list[str], count: int, sizes: list[int]) -> None:
    """Many small copies, in each of some ways."""
    for nbytes in sizes:
        with pages(HUGE, count * nbytes) as memory:
            memory.touch()
            with gpu.registered(memory.address, memory.nbytes):
                tensors = Small(gpu, memory.address, count, nbytes)
                for way in ways:
                    labels = {"way": way, "nbytes_each": nbytes, "count": count}
                    try:
                        emit({**labels, **tensors.measure(_WAYS[way](tensors))})
                    except Exception as problem:  # noqa: BLE001 -- CuPy has errors of its own
                        emit({**labels, "error": described(problem)})
