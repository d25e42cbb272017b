"""Pickling a tree the way torch.save does, without touching a tensor's bytes.

Storages leave the stream by persistent id, in the order in which they are first met; their bytes are
somebody else's business. The stream equals torch.save's to the byte (torch/serialization.py, `_save`).
"""

from __future__ import annotations

import copyreg
import io
import pickle
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.serialization import location_tag, normalize_storage_type
from torch.storage import TypedStorage

from asyncckpt.errors import LeafError
from asyncckpt.formats.inert import Inert, children, find_inert
from asyncckpt.formats.refs import BadPickleError, SparseRef, StorageRef, TensorRef
from asyncckpt.formats.tensor_form import Elsewhere, TypedView, form_of
from asyncckpt.formats.unpickle import unpickle

__all__ = [
    "BadPickleError", "Elsewhere", "Inert", "Pickled", "SparseRef", "StorageRef", "TensorRef",
    "find_inert", "pickle_tree", "unpickle",
]  # fmt: skip

_PROTOCOL = 2  # torch.save's
_DEPTH_MAX = 16  # arbitrary: steps into a tree that is nested too deeply, for the message


@dataclass(frozen=True, eq=False)
class Pickled:
    """A pickled tree and the memory it speaks of.

    Attributes:
        data: the pickle; `data.pkl` of an archive.
        storages: by key; held, so that their memory stays.
        tensors: every tensor met on the way, once each, for guards that watch version counters.
        elsewhere: in place of storages, also by key, those whose bytes are not at hand. A tree has the one or
            the other.
    """

    data: bytes
    storages: tuple[torch.UntypedStorage, ...]
    tensors: tuple[torch.Tensor, ...]
    elsewhere: tuple[Elsewhere, ...] = ()


def pickle_tree(tree: Any, *, where: str) -> Pickled:
    """Pickle `tree` as torch.save would.

    Args:
        where: what the tree is called in messages, such as "extra".

    Raises:
        LeafError: a leaf cannot be pickled, is quantised, or shares memory with one of another dtype.
            The message names it.
    """
    try:
        if _is_plain(tree) or (type(tree) in (tuple, list) and all(map(_is_plain, tree))):
            return Pickled(pickle.dumps(tree, _PROTOCOL), (), ())
        sink = io.BytesIO()
        pickler = TreePickler(sink)
        pickler.dump(tree)
    except Exception as error:  # a leaf's own code may raise anything
        raise LeafError(_blame(tree, where, error)) from error
    return Pickled(
        sink.getvalue(),
        tuple(pickler.storages),
        tuple(pickler.tensors.values()),
        tuple(pickler.elsewhere),
    )


_ATOMS = frozenset((str, bytes, int, float, bool, type(None)))


def _is_plain(value: Any) -> bool:
    """Whether there is nothing in it to look at: a generator's 625 numbers, a group's thousands of names."""
    return type(value) in _ATOMS or (type(value) in (tuple, list) and _ATOMS.issuperset(map(type, value)))


class _QuantisedError(Exception):
    pass


class _DtypeConflictError(Exception):
    def __init__(self, data_ptr: int) -> None:
        super().__init__("the same memory is seen as two dtypes; torch.load could not restore that")
        self.data_ptr = data_ptr


_PLAIN, _TENSOR, _PARAMETER, _STORAGE, _TYPED_STORAGE, _TYPED_VIEW = range(6)


def _kind_of(cls: type) -> int:
    if cls is TypedView:
        return _TYPED_VIEW
    if issubclass(cls, TypedStorage):
        return _TYPED_STORAGE
    if cls in torch._storage_classes:
        return _STORAGE
    if cls is torch.nn.Parameter:
        return _PARAMETER
    return _TENSOR if issubclass(cls, torch.Tensor) else _PLAIN


class TreePickler(pickle.Pickler):
    """Pickles as torch.save does; several values too, one by one.

    Args:
        key: of the first storage that is met.
    """

    def __init__(self, sink: io.BytesIO, key: int = 0) -> None:
        super().__init__(sink, protocol=_PROTOCOL)
        self._first_key = key
        self.storages: list[torch.UntypedStorage] = []
        self.elsewhere: list[Elsewhere] = []
        self.tensors: dict[int, torch.Tensor] = {}
        self._keys: dict[int, str] = {}
        self._dtypes: dict[int, torch.dtype] = {}  # of the first storage seen at an address
        self._kinds: dict[type, int] = {}
        self._skip_data = False

        self._is_tensor_plain = torch.Tensor not in copyreg.dispatch_table

    def persistent_id(self, obj: Any) -> tuple[str, type, str, str, int] | None:
        cls = type(obj)
        kind = self._kinds.get(cls)  # asked for every object: one look-up for the many plain ones
        if kind is None:
            kind = self._kinds[cls] = _kind_of(cls)
        if kind == _PLAIN:
            return None
        if kind == _TYPED_VIEW and isinstance(obj.storage, Elsewhere):
            return self._elsewhere_id(obj, obj.storage)
        if kind == _TYPED_VIEW:
            return self._storage_id(obj.storage, obj.dtype, obj.kind, obj.elements, None)
        if kind == _TYPED_STORAGE:
            named = getattr(torch, obj._pickle_storage_type())
            fake = getattr(obj, "_fake_device", None)
            return self._storage_id(obj._untyped_storage, obj.dtype, named, obj._size(), fake)
        if kind == _STORAGE:
            named = normalize_storage_type(cls)  # type: ignore[no-untyped-call]
            fake = getattr(obj, "_fake_device", None)
            return self._storage_id(obj, torch.uint8, named, obj.nbytes(), fake)
        self._see(obj, kind)
        return None

    def _see(self, tensor: torch.Tensor, kind: int) -> None:
        if self._skip_data:  # a Parameter pickles its `.data`: an alias whose counter nobody moves
            self._skip_data = False
            return
        if id(tensor) in self.tensors:
            return
        if tensor.is_quantized:
            raise _QuantisedError("a quantised tensor; dequantise it, or save its int_repr() and its scales")
        self.tensors[id(tensor)] = tensor
        self._skip_data = kind == _PARAMETER

    def _elsewhere_id(self, view: TypedView, storage: Elsewhere) -> tuple[str, type, str, str, int]:
        key = self._keys.get(id(storage))
        if key is None:
            key = self._keys[id(storage)] = str(self._first_key + len(self._keys))
            self.elsewhere.append(storage)
        return ("storage", view.kind, key, "cpu", view.elements)

    def _storage_id(
        self, storage: torch.UntypedStorage, dtype: torch.dtype, kind: type, elements: int, fake_device: Any
    ) -> tuple[str, type, str, str, int]:
        device = storage.device.type
        data_ptr = storage.data_ptr() if device != "meta" else 0
        if data_ptr and self._dtypes.setdefault(data_ptr, dtype) != dtype:
            raise _DtypeConflictError(data_ptr)
        key = self._keys.get(storage._cdata)
        if key is None:
            key = self._keys[storage._cdata] = str(self._first_key + len(self._keys))
            self.storages.append(storage)
        if fake_device is not None:
            location = str(fake_device)
        else:
            location = "cpu" if device == "cpu" else location_tag(storage)
        return ("storage", kind, key, location, elements)

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Elsewhere:
            return _reduce_elsewhere(obj)
        if type(obj) is not torch.Tensor or not self._is_tensor_plain:
            return NotImplemented
        if (
            obj.layout is not torch.strided
            or obj.is_nested
            or obj.is_conj()
            or obj.is_neg()
            or obj.device.type not in ("cpu", "cuda")
            or obj._backward_hooks
            or obj.__dict__
        ):
            return NotImplemented
        form = form_of(obj.dtype)
        if form is None:
            return NotImplemented
        storage = obj.untyped_storage()
        shape, stride = tuple(obj.shape), obj.stride()
        offset = int(obj.storage_offset())
        return form.reduce(storage, storage.nbytes(), offset, shape, stride, obj.requires_grad)


def _reduce_elsewhere(tensor: Elsewhere) -> Any:
    form = form_of(tensor.dtype)
    if form is None:
        raise TypeError(f"a tensor of {tensor.dtype} whose bytes are not at hand")
    stride = tuple(prod(tensor.shape[dim + 1 :]) for dim in range(len(tensor.shape)))
    return form.reduce(tensor, tensor.nbytes(), 0, tensor.shape, stride, False)


# ---------------------------------------------------------------------------- naming the culprit


def _blame(tree: Any, where: str, error: Exception) -> str:
    """A message that names the leaf on which pickling failed."""
    if isinstance(error, _DtypeConflictError):
        paths = [
            f"{where}{path} ({tensor.dtype})"
            for path, tensor in _tensors(tree)
            if tensor.untyped_storage().data_ptr() == error.data_ptr
        ]
        return f"{' and '.join(paths[:4]) or where} cannot be saved: {error}"
    path, leaf, cause = where, tree, error
    for _ in range(_DEPTH_MAX if isinstance(error, RecursionError) else 1000):
        failing = _first_failing(leaf)
        if failing is None:
            break
        step, leaf, cause = failing
        path += step
    if isinstance(error, RecursionError):
        return f"{path} cannot be saved: it is nested too deeply for pickle"
    return f"{path} cannot be saved: {type(leaf).__name__}: {str(cause) or type(cause).__name__}"


def _first_failing(parent: Any) -> tuple[str, Any, Exception] | None:
    for step, child in _parts(parent):
        try:
            TreePickler(io.BytesIO()).dump(child)
        except Exception as error:  # noqa: BLE001 - a leaf's own code may raise anything
            return step, child, error
    return None


def _parts(parent: Any) -> list[tuple[str, Any]]:
    parts = list(children(parent))
    if not isinstance(parent, (type, torch.Tensor)) and isinstance(getattr(parent, "__dict__", None), dict):
        parts += [(f".{name}", child) for name, child in vars(parent).items()]
    return parts


def _tensors(tree: Any) -> list[tuple[str, torch.Tensor]]:
    found: list[tuple[str, torch.Tensor]] = []
    seen: set[int] = set()
    rest = [("", tree)]
    while rest:
        path, value = rest.pop()
        if isinstance(value, torch.Tensor):
            found.append((path, value))
        elif id(value) not in seen:
            seen.add(id(value))
            rest += reversed([(path + step, child) for step, child in _parts(value)])
    return found
