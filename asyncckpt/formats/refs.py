"""Where the tensors of a file lie, before any of them is read.

A `TensorRef` is what a rebuild call in a pickle comes to when it is given a `StorageRef` for a storage:
plain, immutable data. That a tensor lies inside its storage is checked here, whoever wrote the pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch


class BadPickleError(ValueError):
    """This pickle cannot be read."""


@dataclass(frozen=True)
class StorageRef:
    """Where the bytes of one storage lie: absolute offset in the file, size in bytes."""

    __slots__ = ("data_offset", "nbytes", "key", "dtype", "location")
    data_offset: int
    nbytes: int
    key: str
    dtype: torch.dtype
    location: str


@dataclass(frozen=True)
class TensorRef:
    """A tensor whose bytes are still in the file.

    Attributes:
        data_offset: absolute offset in the file of the first byte of its storage.
        storage_nbytes: size of that storage; the tensor lies inside it (checked).
        key: the storage's key; tensors that share a storage share its key.
        storage_offset, stride: in elements.
        conj, neg: the values are the conjugate, the negative, of what is stored.
    """

    __slots__ = (
        "data_offset", "storage_nbytes", "key", "dtype", "shape", "stride", "storage_offset",
        "requires_grad", "is_parameter", "conj", "neg",
    )  # fmt: skip
    data_offset: int
    storage_nbytes: int
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int
    requires_grad: bool
    is_parameter: bool
    conj: bool
    neg: bool


@dataclass(frozen=True)
class SparseRef:
    """A sparse tensor: its layout, its shape and the dense tensors that it is made of.

    `parts` are (indices, values) for COO, (compressed indices, plain indices, values) for the others.
    """

    __slots__ = ("layout", "shape", "parts", "is_coalesced")
    layout: torch.layout
    shape: tuple[int, ...]
    parts: tuple[TensorRef, ...]
    is_coalesced: bool | None


def sizes_of(values: Any) -> tuple[int, ...]:
    """A shape or strides, if that is what `values` is."""
    sizes = tuple(values)
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise BadPickleError(f"not the shape or the strides of a tensor: {type(values).__name__}")
    return sizes


def span_elements(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last that these strides reach: 0 for an empty tensor."""
    reach = 1
    for size, step in zip(shape, stride, strict=True):
        if size == 0:
            return 0
        reach += (size - 1) * step
    return reach


# The functions below take the place of those in torch._utils and take the same arguments.


def rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False,
    hooks: Any = None, metadata: Any = None,
) -> TensorRef:  # fmt: skip
    """A tensor with the dtype of its storage."""
    if type(storage) is not StorageRef:
        raise BadPickleError("a tensor without a storage")
    return rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, storage.dtype, metadata)


def rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any,
    hooks: Any, dtype: Any, metadata: Any = None,
) -> TensorRef:  # fmt: skip
    """A tensor with a dtype of its own; refused if it leaves its storage."""
    if type(storage) is not StorageRef or type(offset) is not int or offset < 0:
        raise BadPickleError("a tensor without a storage")
    shape, strides = sizes_of(size), sizes_of(stride)
    if type(dtype) is not torch.dtype or len(shape) != len(strides):
        raise BadPickleError("a tensor without a dtype, or with strides that do not fit its shape")
    reach = span_elements(shape, strides)
    if reach and (offset + reach) * dtype.itemsize > storage.nbytes:
        raise BadPickleError(
            f"a {dtype} tensor of shape {list(shape)} does not fit the {storage.nbytes} bytes "
            f"of its storage {storage.key!r}"
        )
    flags = metadata if isinstance(metadata, dict) else {}
    return TensorRef(
        storage.data_offset, storage.nbytes, storage.key, dtype, shape, strides, offset,
        requires_grad is True, False, flags.get("conj") is True, flags.get("neg") is True,
    )  # fmt: skip


def rebuild_parameter(data: Any, requires_grad: Any, hooks: Any = None, state: Any = None) -> Any:
    """A Parameter; its python attributes are left behind."""
    if type(data) is not TensorRef:
        return data  # of a tensor class that nobody knows: it stays what it is
    return replace(data, requires_grad=requires_grad is True, is_parameter=True)


def rebuild_sparse_tensor(layout: Any, data: Any) -> SparseRef:
    """A sparse tensor of any layout."""
    parts = tuple(part for part in data if type(part) is TensorRef)
    if type(layout) is not torch.layout or len(parts) not in (2, 3) or len(data) == len(parts):
        raise BadPickleError("a sparse tensor of an unknown layout")
    shape, *rest = data[len(parts) :]
    return SparseRef(layout, sizes_of(shape), parts, rest[0] is True if rest else None)
