"""CUDA tensors for a torch that knows no CUDA: ordinary CPU tensors whose bytes lie in device memory.

Their storages are at addresses of the driver double, where the host may not look. While a `FakeCuda` is
entered, operations of torch on them run as kernels on the current stream of their device, over aliases of
the same pages; everything above the dispatcher (autograd, version counters, optimizers, modules) is torch's
own and unchanged. As on a GPU, the host does not wait for a kernel unless it needs a value.

What differs from a GPU: `tensor.device` says "cpu", and with it `.to()`, `.cpu()` and factories that name a
device mean the host: use `to_device`, `to_host`, `zeros_like`, `new_zeros`. Tensors without elements are
the host's. Reading a device tensor in C++ behind the dispatcher (`tolist`, `numpy`) kills the process.
Kernels that draw random numbers, or whose results' shapes depend on values, make the host wait. Threads that
are older than the world must enter it by `on_this_thread`.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from ctypes import c_char, c_uint64
from types import TracebackType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.cuda_double import Double, Kernel

HOST = -1
_BLOCK_NBYTES = 512  # of which sizes are multiples, as with torch's allocator
# Aliases by nature that their schemas call fresh.
_VIEWS = {torch.ops.aten._unsafe_view.default}
# Their results, or how they draw random numbers, depend on when they run: the host waits.
_WAITING_TAGS = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}


class CachingAllocator:
    """Device memory that is never given back to the driver, as with torch's: what a storage leaves behind
    serves the next one of the same size on the same stream, at once, while kernels may still use it."""

    def __init__(self, double: Double) -> None:
        self.double = double
        self._free: dict[tuple[int, int, int], list[int]] = defaultdict(list)

    def new_storage(self, nbytes: int, device: int, stream: int) -> torch.UntypedStorage:
        """Uninitialised memory; back in the cache when the storage dies."""
        rounded = -(-nbytes // _BLOCK_NBYTES) * _BLOCK_NBYTES
        free = self._free[device, stream, rounded]
        address = free.pop() if free else self.double.allocate(rounded, device)
        memory = (c_char * nbytes).from_address(address)
        weakref.finalize(memory, free.append, address).atexit = False
        return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def exchange_memory(one: torch.UntypedStorage, other: torch.UntypedStorage) -> None:
    """Two storages trade what they hold. torch can do no such thing to one that it did not allocate.

    Behind vtable and reference counts, c10::StorageImpl has its DataPtr (address, context, deleter, device)
    and its size, eight bytes each: checked here, before they are touched.
    """
    fields = [(c_uint64 * 5).from_address(storage._cdata + 16) for storage in (one, other)]
    for storage, words in zip((one, other), fields, strict=True):
        if (words[0], words[4]) != (storage.data_ptr(), storage.nbytes()):
            raise NotImplementedError("this torch lays out c10::StorageImpl in another way")
    fields[0][:], fields[1][:] = fields[1][:], fields[0][:]


# By the library whose memory it is: what one world leaves behind, the next may use.
_allocators: dict[str, CachingAllocator] = {}


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether an operation touches no bytes: its results alias arguments, or it changes only metadata."""
    if func in _VIEWS or torch.Tag.inplace_view in func.tags:
        return True
    infos = [result.alias_info for result in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


@functools.cache
def _is_in_place(func: Any) -> bool:
    """Whether all that comes out is arguments that were written to."""
    schema = func._schema
    writes = any(argument.alias_info and argument.alias_info.is_write for argument in schema.arguments)
    return writes and all(result.alias_info and result.alias_info.is_write for result in schema.returns)


@functools.cache
def _must_wait(func: Any) -> bool:
    plain = all("Tensor" in str(result.type) for result in func._schema.returns)
    return not plain or bool(_WAITING_TAGS & set(func.tags))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, list[Any]]:
    """Alias set -> the arguments in it that the operation writes to."""
    written = {}
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        if argument.alias_info and argument.alias_info.is_write and value is not None:
            # Lists have no set, and nothing that writes to lists returns them.
            written[min(argument.alias_info.before_set, default=argument.name)] = value
    return written


def _alias_storage(double: Double, storage: torch.UntypedStorage) -> torch.UntypedStorage:
    address, nbytes = storage.data_ptr(), storage.nbytes()
    if address == 0:
        raise RuntimeError("the storage of a device tensor was resized to nothing")
    memory = (c_char * nbytes).from_address(double.backdoor(address))
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def _alias(double: Double, tensor: torch.Tensor) -> torch.Tensor:
    alias = torch.empty(0, dtype=tensor.dtype)
    storage = _alias_storage(double, tensor.untyped_storage())
    return alias.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


_repr_of_torch = torch.Tensor.__repr__


def _repr(tensor: torch.Tensor, **options: Any) -> str:
    """Printing reads bytes behind every mode's back, and a failing test prints long after its world ended."""
    if tensor.layout is torch.strided and not tensor.is_meta:
        storage = tensor.untyped_storage()
        if tensor.numel() and not storage.nbytes():
            return f"tensor(shape={tuple(tensor.shape)}, its storage was resized to nothing)"
        for allocator in _allocators.values():
            device = allocator.double.device_of(storage.data_ptr())
            if device != HOST:
                return f"{_repr_of_torch(_alias(allocator.double, tensor), **options)} on device {device}"
    return _repr_of_torch(tensor, **options)


torch.Tensor.__repr__ = _repr


class Graph:
    """Kernels that were captured; `replay` runs them again and bumps no version."""

    def __init__(self, world: FakeCuda, device: int) -> None:
        self._world = world
        self._device = device
        self.kernels: list[Callable[[], None]] = []
        self.held: list[Any] = []  # what the kernels use: its memory must not serve others

    def replay(self) -> None:
        for kernel in self.kernels:
            self._world.launch(self._device, kernel)


class _Mode(TorchDispatchMode):
    def __init__(self, world: FakeCuda) -> None:
        super().__init__()
        self._world = world

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._world.dispatch(func, args, kwargs or {})


class FakeCuda:
    """A world with CUDA devices, while it is entered; what `asyncckpt.devices.seam` asks, it answers.

    Attributes:
        driver: path of the library in place of libcuda.so.1.
    """

    def __init__(self, double: Double) -> None:
        self.double = double
        self.driver = str(double.path)
        self._allocator = _allocators.setdefault(self.driver, CachingAllocator(double))
        self._trampoline = Kernel(self._run)
        self._tokens = itertools.count(1)
        self._pending: dict[int, Callable[[], None]] = {}
        self._errors: list[BaseException] = []
        self._modes: list[_Mode] = []
        self._current = threading.local()
        self._device_of_stream: dict[int, int] = {}
        self._graphs: dict[int, Graph] = {}  # by the stream that captures
        # Device storages that were resized to nothing: they are a device's still. A weak reference keeps
        # the address that is the key from being given to another.
        self._emptied: dict[int, tuple[StorageWeakRef, int]] = {}

    # -- entering and leaving

    def __enter__(self) -> FakeCuda:
        self._modes.append(_Mode(self))
        self._modes[-1].__enter__()
        torch.UntypedStorage.resize_ = functools.partialmethod(_resize, self)
        bootstrap = self._bootstrap = threading.Thread._bootstrap_inner

        def bootstrap_in_world(thread: threading.Thread) -> None:
            with self.on_this_thread():
                bootstrap(thread)

        threading.Thread._bootstrap_inner = bootstrap_in_world
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._modes.pop().__exit__(kind, error, trace)
        del torch.UntypedStorage.resize_  # ours: the base class's own is seen again
        threading.Thread._bootstrap_inner = self._bootstrap
        self.double.release_copies()
        self.double.drain()
        self._pending.clear()  # of kernels that a lost context never ran
        if error is None:
            self._raise_errors()

    def on_this_thread(self) -> TorchDispatchMode:
        """To enter on a thread that is older than the world; those that it starts have entered."""
        return _Mode(self)

    # -- where things are

    def device_of(self, memory: torch.Tensor | torch.UntypedStorage) -> int:
        """Ordinal of the device; HOST for the host's."""
        if isinstance(memory, torch.Tensor):
            if memory.is_meta or memory.layout is not torch.strided:
                return HOST
            memory = memory.untyped_storage()
        address = memory.data_ptr()
        if address == 0 and self._emptied:
            return self._emptied.get(memory._cdata, (None, HOST))[1]
        return self.double.device_of(address)

    def to_device(self, tensor: torch.Tensor, device: int = 0) -> torch.Tensor:
        """A detached copy there, strides kept where memory is dense; the tensor itself if it is there."""
        here = self.device_of(tensor)
        if here == device or tensor.numel() == 0:
            return tensor
        source = tensor.detach()
        copy = self._new_tensor(torch.empty_like(source, device="meta"), device)
        copy.copy_(source if here == HOST else self.to_host(source))
        return copy.requires_grad_(tensor.requires_grad)

    def module_to(self, module: torch.nn.Module, device: int = 0) -> torch.nn.Module:
        """Parameters, gradients and buffers go to the device; Parameters stay the same objects."""
        return module._apply(lambda tensor: self.to_device(tensor, device))

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, taken when all work on the device's current stream is done."""
        device = self.device_of(tensor)
        if device == HOST:
            return tensor.detach().clone()
        self.synchronize(device)
        return self.peek(tensor).clone()

    def free_storage(self, tensor: torch.Tensor) -> None:
        """What `tensor.untyped_storage().resize_(0)` does while the world is entered."""
        self.resize(tensor.untyped_storage(), 0)

    def resize(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        """Of a device's storage. To nothing: its block may serve the next allocation at once."""
        device = self.device_of(storage)
        assert device != HOST
        self._emptied = {key: entry for key, entry in self._emptied.items() if not entry[0].expired()}
        if nbytes == 0:
            replacement = torch.UntypedStorage(0)
            self._emptied[storage._cdata] = (StorageWeakRef(storage), device)
        else:
            replacement = self._allocator.new_storage(nbytes, device, self.current_stream(device))
            kept = min(nbytes, storage.nbytes())
            if kept:
                target, source = (_alias_storage(self.double, each) for each in (replacement, storage))
                self.launch(device, lambda: _bytes(target, kept).copy_(_bytes(source, kept)))
            self._emptied.pop(storage._cdata, None)
        exchange_memory(storage, replacement)

    # -- streams

    def new_stream(self, device: int = 0) -> int:
        handle = self.double.new_stream(device)
        self._device_of_stream[handle] = device
        return handle

    def current_stream(self, device: int = 0) -> int:
        """Handle of this thread's current stream; 0 is the device's default stream."""
        return self._streams().get(device, 0)

    @contextmanager
    def stream(self, handle: int, device: int | None = None) -> Iterator[int]:
        """Makes a stream current on this thread. The default stream, 0, needs its device named."""
        at = self._device_of_stream[handle] if device is None else device
        before = self.current_stream(at)
        self._streams()[at] = handle
        try:
            yield handle
        finally:
            self._streams()[at] = before

    def wait_for(self, device: int, stream: int) -> None:
        self.wait_stream(self.current_stream(device), stream, device)

    def wait_stream(self, handle: int, behind: int, device: int = 0) -> None:
        """What comes later on one stream waits for what was enqueued on the other so far."""
        default = self.double.default_stream(device)
        self.double.order(handle or default, behind or default)

    def synchronize(self, device: int = 0) -> None:
        """Waits for this thread's current stream. Raises what a kernel raised."""
        self.double.finish(self._handle(device))
        self._raise_errors()

    def kernel(self, fn: Callable[..., Any], *tensors: torch.Tensor) -> None:
        """Enqueues `fn` over aliases of device tensors: a write that bumps no version counter."""
        aliases = [self.peek(tensor) for tensor in tensors]
        self.launch(self.device_of(tensors[0]), lambda: fn(*aliases))

    def launch(self, device: int, kernel: Callable[[], Any]) -> None:
        """Enqueues a kernel on the device's current stream, or adds it to the graph captured there."""
        handle = self._handle(device)
        token = next(self._tokens)
        if graph := self._graphs.get(handle):
            graph.kernels.append(kernel)
        else:
            self._pending[token] = kernel
        self.double.launch(handle, self._trampoline, token)

    # -- capture

    @contextmanager
    def capture(self, mode: str = "global", device: int = 0) -> Iterator[Graph]:
        """Captures the current stream, or a new one that is current within where that is the default
        stream. Raises DriverError at the end if something forbidden happened meanwhile."""
        handle = self.current_stream(device) or self.new_stream(device)
        graph = Graph(self, device)
        with self.stream(handle, device):
            self.double.begin_capture(handle, mode)
            self._graphs[handle] = graph
            try:
                yield graph
            except BaseException:
                del self._graphs[handle]
                self._end_capture_quietly(handle)
                raise
            del self._graphs[handle]
            self.double.end_capture(handle)

    def is_capturing(self, used: Collection[int]) -> bool:
        """Whether one of this thread's current streams of these devices, or of the first, is captured."""
        return any(self._handle(device) in self._graphs for device in {0, *used})

    # -- operations of torch

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation of torch, its result as torch expects it."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        used = {self.device_of(tensor) for tensor in tensors} - {HOST}
        if func._schema.name.startswith("aten::_foreach_"):
            # Kernels bump these versions themselves, at enqueue; for the host's, a mode hides that from
            # torch. Those of fused optimizers bump nothing.
            torch.autograd.graph.increment_version(tree_leaves(_written(func, args, kwargs)))
        if not used or _is_view(func):
            return func(*args, **kwargs)
        if len(used) > 1:
            raise RuntimeError(f"{func}: tensors are on devices {sorted(used)}, not on one")
        (device,) = used
        if _is_in_place(func):
            results = self._run_in_place(func, args, kwargs, device)
        elif (expected := _expected(func, args, kwargs)) is not None:
            results = self._run_ahead(func, args, kwargs, device, expected)
        else:
            results = self._run_and_wait(func, args, kwargs, device)
        if graph := self._graphs.get(self._handle(device)):
            graph.held.append((args, kwargs, results))
        return results

    def _run_in_place(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: int) -> Any:
        written = _written(func, args, kwargs)
        targets = [leaf for leaf in tree_leaves(written) if isinstance(leaf, torch.Tensor)]
        waits = _must_wait(func) or any(self.device_of(target) == HOST for target in targets)
        aliases, named = self._aliases((args, kwargs), snapshot=not waits)
        self.launch(device, lambda: func(*aliases, **named))
        if waits:
            self.synchronize(device)
        results = [written[min(result.alias_info.before_set)] for result in func._schema.returns]
        return results[0] if len(results) == 1 else tuple(results) or None

    def _run_ahead(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: int, expected: Any
    ) -> Any:
        """Results are known but for their bytes: the host goes on."""
        aliases, named = self._aliases((args, kwargs), snapshot=True)
        results = tree_map_only(torch.Tensor, lambda meta: self._new_tensor(meta, device), expected)
        targets = tree_map_only(torch.Tensor, self.peek, results)

        def kernel() -> None:
            for target, value in zip(tree_leaves(targets), tree_leaves(func(*aliases, **named)), strict=True):
                if value is not None:
                    assert target.shape == value.shape, f"{func}: {value.shape}, meta said {target.shape}"
                    target.copy_(value)

        self.launch(device, kernel)
        return results

    def _run_and_wait(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: int) -> Any:
        aliases, named = self._aliases((args, kwargs), snapshot=False)
        out: list[Any] = []
        self.launch(device, lambda: out.append(func(*aliases, **named)))
        self.synchronize(device)

        def to_device(value: torch.Tensor) -> torch.Tensor:
            result = self._new_tensor(value.to("meta"), device)
            self.peek(result).copy_(value)  # the stream is at rest
            return result

        return tree_map_only(torch.Tensor, to_device, out[0])

    # -- memory

    def _new_tensor(self, meta: torch.Tensor, device: int) -> torch.Tensor:
        """Uninitialised device memory in the shape of a meta tensor."""
        if meta.numel() == 0:
            return torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype)
        span = 1 + sum((size - 1) * stride for size, stride in zip(meta.shape, meta.stride(), strict=True))
        nbytes = span * meta.element_size()
        storage = self._allocator.new_storage(nbytes, device, self.current_stream(device))
        return torch.empty(0, dtype=meta.dtype).set_(storage, 0, meta.shape, meta.stride())

    def peek(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same elements through the back door, as they are now; a host's tensor itself."""
        if self.device_of(tensor) == HOST:
            return tensor.detach()
        return _alias(self.double, tensor)

    def _aliases(self, arguments: Any, *, snapshot: bool) -> Any:
        """Arguments as a kernel gets them; `snapshot`: of the host's tensors, what they hold now."""

        def alias(tensor: torch.Tensor) -> torch.Tensor:
            if snapshot and self.device_of(tensor) == HOST:
                return tensor.detach().clone()
            return self.peek(tensor)

        return tree_map_only(torch.Tensor, alias, arguments)

    # -- inside

    def _streams(self) -> dict[int, int]:
        if not hasattr(self._current, "streams"):
            self._current.streams = {}
        streams: dict[int, int] = self._current.streams
        return streams

    def _handle(self, device: int) -> int:
        return self.current_stream(device) or self.double.default_stream(device)

    def _run(self, token: int) -> None:
        """On a stream's thread, which has neither modes nor gradients."""
        kernel = self._pending.pop(token)
        try:
            with torch.no_grad():
                kernel()
        except BaseException as error:  # noqa: BLE001 - it is raised where the host waits
            self._errors.append(error)

    def _raise_errors(self) -> None:
        if self._errors:
            errors, self._errors = self._errors, []
            raise errors[0]

    def _end_capture_quietly(self, handle: int) -> None:
        try:
            self.double.end_capture(handle)
        except RuntimeError:
            pass  # what ended it is on its way already


def _expected(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Meta tensors like the operation's results; None if it cannot tell without the bytes."""
    if _must_wait(func):
        return None

    def meta(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    args, kwargs = tree_map_only(torch.Tensor, meta, (args, kwargs))
    if "device" in kwargs:
        kwargs["device"] = torch.device("meta")
    try:
        return func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):
        return None


def _bytes(storage: torch.UntypedStorage, nbytes: int) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (nbytes,), (1,))


def _resize(storage: torch.UntypedStorage, world: FakeCuda, nbytes: int) -> torch.UntypedStorage:
    """In place of UntypedStorage.resize_, which refuses memory that torch did not allocate."""
    if world.device_of(storage) == HOST:
        resized: torch.UntypedStorage = torch._C.StorageBase.resize_(storage, nbytes)
        return resized
    world.resize(storage, nbytes)
    return storage
