"""How the installed torch pickles a plain dense tensor, learned per dtype from an empty one.

`Tensor.__reduce_ex__` goes a long way round: it doubles the time that pickling a state dict takes. For the
ordinary tensor its answer depends on the dtype alone, apart from shape, strides and the like. So an empty
tensor is asked once, and the answer is filled in for all others. What does not look as expected is left to
torch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch.serialization import normalize_storage_type
from torch.storage import TypedStorage


class Elsewhere:
    """A contiguous tensor on the host with a storage of its own, whose bytes are not at hand."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.shape = shape

    def nbytes(self) -> int:
        """Of its storage, as `UntypedStorage.nbytes`."""
        return prod(self.shape) * self.dtype.itemsize


class TypedView(NamedTuple):
    """A storage as a pickle mentions it: the bytes, the dtype they are seen as, the class named for it."""

    storage: torch.UntypedStorage | Elsewhere | None
    dtype: torch.dtype
    kind: type
    elements: int


class TensorForm(NamedTuple):
    """What `Tensor.__reduce_ex__` returns for tensors of one dtype."""

    rebuild: Callable[..., torch.Tensor]
    tail: tuple[Any, ...]  # arguments after the usual six
    storage_dtype: torch.dtype
    storage_kind: type

    def reduce(
        self,
        storage: torch.UntypedStorage | Elsewhere | None,
        storage_nbytes: int,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool,
        metadata: tuple[dict[str, bool], ...] = (),
    ) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
        """The pair that `__reduce_ex__` would return, with a `TypedView` for the storage."""
        elements = storage_nbytes // self.storage_dtype.itemsize
        view = TypedView(storage, self.storage_dtype, self.storage_kind, elements)
        hooks: OrderedDict[int, Any] = OrderedDict()  # a new one each time: pickle remembers identities
        return self.rebuild, (view, offset, shape, stride, requires_grad, hooks, *self.tail, *metadata)


@cache
def form_of(dtype: torch.dtype) -> TensorForm | None:
    """The form of `dtype`, or None if torch pickles it in some other way or not at all."""
    try:
        empty: Any = torch.empty(0, dtype=dtype)
        rebuild, args = empty.__reduce_ex__(2)
        storage, *middle = args[:6]
        tail = args[6:]
        if middle != [0, (0,), (1,), False, OrderedDict()] or tail not in ((), (dtype,)):
            return None
        kind: Any
        if isinstance(storage, TypedStorage):
            kind = getattr(torch, storage._pickle_storage_type())  # type: ignore[no-untyped-call]
            return TensorForm(rebuild, tail, storage.dtype, kind)
        kind = normalize_storage_type(type(storage))  # type: ignore[no-untyped-call]
        return TensorForm(rebuild, tail, torch.uint8, kind)
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError, NotImplementedError):
        return None
