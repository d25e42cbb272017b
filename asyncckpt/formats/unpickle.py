"""Unpickling that runs nothing: the pickles inside checkpoints, read as plain data.

A pickle is a program: it names globals, calls them, and sets attributes on whatever it holds. So here

- a global is looked up by its exact name in a table of harmless ones; any other becomes a fresh `Inert`
  class. Nothing is imported because a pickle says so.
- what the table hands out cannot be changed: immutable built-in types, or a `_Door`, a callable that
  refuses attributes. Otherwise a pickle could rewire the classes of this process.
- a tensor becomes a `TensorRef`; numpy arrays are built by numpy's constructors, not by the pickle.

Not promised: to withstand a pickle that is made to exhaust memory or the stack.
"""

from __future__ import annotations

import copyreg
import datetime
import decimal
import fractions
import io
import pathlib
import pickle
import pickletools
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import IO, Any, NoReturn

import torch

from asyncckpt.formats import refs, safe_numpy
from asyncckpt.formats.inert import Inert, InertType, brief, inert_type
from asyncckpt.formats.refs import BadPickleError, StorageRef

_BUFFER_BYTES = 1 << 17  # as much as the C unpickler asks for at a time

# (key, dtype, location, nbytes) -> where that storage lies
FindStorage = Callable[[str, torch.dtype, str, int], StorageRef]


def unpickle(data: bytes, find_storage: FindStorage | None = None, *, trusted: bool = False) -> Any:
    """The object that `data` describes.

    Args:
        find_storage: asked once for every mention of a storage; without it a storage is an error.
        trusted: import and call what the pickle names, which lets it run any code. Tensors come back as
            `TensorRef` either way.

    Raises:
        BadPickleError: the pickle is damaged, or asks for what cannot be had.
    """
    if not data:
        raise BadPickleError("the pickle is empty")
    kind = _TrustedUnpickler if trusted else _SafeUnpickler
    try:
        if not trusted:
            _refuse_extensions(data)
        # buffered, for its peek(): without one the C unpickler asks for every opcode with a call of its own
        file = io.BufferedReader(io.BytesIO(data), buffer_size=min(len(data), _BUFFER_BYTES))
        unpickler = kind(file, find_storage)
        tree = unpickler.load()
        return safe_numpy.settled(tree) if unpickler.has_numpy else tree
    except BadPickleError:
        raise
    except Exception as error:  # a garbled pickle can end in any exception there is, MemoryError too
        cause = error.__cause__ if isinstance(error.__cause__, ValueError) else error
        raise BadPickleError(f"cannot be unpickled: {type(cause).__name__}: {cause}") from error


class _SafeUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], find_storage: FindStorage | None) -> None:
        super().__init__(file)
        self.has_numpy = False
        self._find_storage = find_storage
        self._inert: dict[tuple[str, str], type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = _RENAMED.get(module, module), name
        if key in _NUMPY_TABLE:
            self.has_numpy = True
            return _NUMPY_TABLE[key]
        if key in _TENSOR_TABLE:
            return _TENSOR_TABLE[key]
        if key in _PLAIN_TABLE:
            return _PLAIN_TABLE[key]
        return self._inert_type(module, name)

    def _inert_type(self, module: str, name: str) -> type[Inert]:
        kind = self._inert.get((module, name))
        if kind is None:
            kind = self._inert[module, name] = inert_type(module, name)
        return kind

    def persistent_load(self, pid: Any) -> StorageRef:
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise BadPickleError("a reference to something that is not a storage")
        _, kind, key, location, elements = pid
        if type(kind) is not _StorageKind or type(key) is not str or type(elements) is not int:
            raise BadPickleError(f"a storage of an unknown kind: {brief(kind)}")
        if self._find_storage is None:
            raise BadPickleError("a storage, where only plain objects belong")
        return self._find_storage(key, kind.dtype, str(location), elements * kind.dtype.itemsize)


class _TrustedUnpickler(_SafeUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        key = _RENAMED.get(module, module), name
        if key in _TENSOR_TABLE:
            return _TENSOR_TABLE[key]
        if module == "torch._utils" and name.startswith("_rebuild_"):
            return self._inert_type(module, name)  # quantised and the like: they need the bytes
        return pickle.Unpickler.find_class(self, module, name)


def _refuse_extensions(data: bytes) -> None:
    """Extension codes name globals by number, past `find_class`; few processes ever registered one."""
    if getattr(copyreg, "_inverted_registry", None) and any(
        opcode.name.startswith("EXT") for opcode, _, _ in pickletools.genops(data)
    ):
        raise BadPickleError("it names a global by its extension code")


# ---------------------------------------------------------------------------- what may be named


class _Door:
    """A callable that a pickle may use but not change."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise TypeError("a global cannot be changed")


class _StorageKind:
    """Stands for a storage class, of which only the dtype matters."""

    __slots__ = ("dtype",)
    dtype: torch.dtype

    def __init__(self, dtype: torch.dtype) -> None:
        object.__setattr__(self, "dtype", dtype)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise TypeError("a storage class cannot be changed")


def _from_type(function: Any, kind: Any, args: Any, state: Any = None) -> Any:
    """A tensor with attributes or of a subclass: a plain tensor that leaves them behind."""
    return function(*args) if isinstance(function, (_Door, InertType)) else Inert(function, kind, args)


def _layout(name: Any) -> torch.layout:
    found = vars(torch).get(str(name).rpartition(".")[2])
    if not isinstance(found, torch.layout):
        raise BadPickleError(f"no layout {brief(name)}")
    return found


def _device(kind: Any, index: Any = None) -> torch.device:
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise BadPickleError("not a device")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _encode(text: Any, encoding: Any = None) -> bytes:
    # protocol 2 spells bytes as latin1 text; any other encoding would import a codec by name
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise BadPickleError("bytes in an unknown encoding")
    return text.encode("latin1")


def _path(kind: type[pathlib.PurePath]) -> _Door:
    def build(*parts: Any) -> pathlib.PurePath:
        if not all(type(part) is str for part in parts):
            raise BadPickleError("not a path")
        return kind(*parts)

    return _Door(build)


def _plain_table() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {}
    kinds: tuple[type, ...] = (
        bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, slice, range,
        object, OrderedDict, defaultdict, deque, Counter, types.SimpleNamespace, torch.Size,
        datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone,
        decimal.Decimal, fractions.Fraction,
    )  # fmt: skip
    for kind in kinds:
        table[kind.__module__, kind.__name__] = kind if _is_immutable(kind) else _Door(kind)
    for python2, name in {"xrange": "range", "long": "int", "unicode": "str"}.items():
        table["builtins", python2] = table["builtins", name]
    table["builtins", "Ellipsis"] = ...
    table["builtins", "NotImplemented"] = NotImplemented
    table["_codecs", "encode"] = _Door(_encode)
    native = type(pathlib.Path())
    for pure in (pathlib.PurePosixPath, pathlib.PureWindowsPath):
        for module in ("pathlib", "pathlib._local"):  # the second in Python 3.13
            table[module, pure.__name__] = _path(pure)
            # a path of the other system cannot be opened here, but it can be read
            table[module, pure.__name__[len("Pure") :]] = _path(native if issubclass(native, pure) else pure)
    return table


def _is_immutable(kind: type) -> bool:
    heap_type, immutable_type = 1 << 9, 1 << 8  # Py_TPFLAGS_HEAPTYPE, Py_TPFLAGS_IMMUTABLETYPE
    return not kind.__flags__ & heap_type or bool(kind.__flags__ & immutable_type)


def _tensor_table() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {}
    for name, value in vars(torch).items():
        if isinstance(value, torch.dtype):
            table["torch", name] = value
        elif name.endswith("Storage") and isinstance(dtype := getattr(value, "_dtype", None), torch.dtype):
            table["torch", name] = _StorageKind(dtype)
    for module in ("torch", "torch.storage"):
        table[module, "UntypedStorage"] = _StorageKind(torch.uint8)
    table["torch", "device"] = _Door(_device)
    table["torch.serialization", "_get_layout"] = _Door(_layout)
    table["torch._utils", "_rebuild_tensor"] = _Door(refs.rebuild_tensor)
    table["torch._utils", "_rebuild_tensor_v2"] = _Door(refs.rebuild_tensor)
    table["torch._utils", "_rebuild_tensor_v3"] = _Door(refs.rebuild_tensor_v3)
    table["torch._utils", "_rebuild_parameter"] = _Door(refs.rebuild_parameter)
    table["torch._utils", "_rebuild_parameter_with_state"] = _Door(refs.rebuild_parameter)
    table["torch._utils", "_rebuild_sparse_tensor"] = _Door(refs.rebuild_sparse_tensor)
    for module in ("torch._tensor", "torch.tensor"):  # the second until torch 1.9
        table[module, "_rebuild_from_type"] = table[module, "_rebuild_from_type_v2"] = _Door(_from_type)
    return table


def _numpy_table() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {}
    for core in ("numpy.core.multiarray", "numpy._core.multiarray"):  # the first until numpy 2
        table[core, "_reconstruct"] = _Door(safe_numpy.ArrayDescription)
        table[core, "scalar"] = _Door(safe_numpy.scalar)
    table["numpy", "dtype"] = _Door(safe_numpy.DtypeDescription)
    return table


_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg", "torch.tensor": "torch._tensor"}
_PLAIN_TABLE = _plain_table()
_TENSOR_TABLE = _tensor_table()
_NUMPY_TABLE = _numpy_table()
