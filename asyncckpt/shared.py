"""Files that several ranks write together: tensors of which each has slices, in one file of a stock tool.

A section that knows of such files puts them into the branch `SHARED_BRANCH` of its tree, on every rank that
has any of what is in them. One rank *closes* a file: it writes what is nobody's own. See `formats.slices` for
who writes which bytes, `closing` for how it ends.

Pure: no communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

SHARED_BRANCH = "shared_files"

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SlicedTensor:
    """A tensor that is contiguous in the file, and of which ranks have slices.

    Attributes:
        dtype, shape: of the whole.
        slices: int64 [n, 3]: first element, first behind, rank; in row-major order. On the rank that closes
            the file they tile the tensor; on others it is enough that theirs are there.
        pieces: (first element, tensor) of what this rank has; contiguous tensors of the same dtype, in order,
            within its slices. What is missing of its slices is zeros.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    slices: Int64Array
    pieces: tuple[tuple[int, torch.Tensor], ...]

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class SharedFile:
    """A file of torch.save that several ranks write.

    Attributes:
        path: relative to the step directory.
        closer: the rank that writes what is nobody's own.
        content: what is saved, the same on all ranks but for the pieces: tensors are `SlicedTensor`, at any
            depth of dicts, lists and tuples; all else is pickled.
        is_loaded: whether ranks load what they have of it; else it is for other tools alone.
    """

    path: str
    closer: int
    content: Any
    is_loaded: bool = True


def slices_path(path: str, rank: int) -> str:
    """The file of what a rank has of a shared one that lies on another node."""
    return f"{path}.slices_{rank:05d}"


_SLICES = {"dtype", "shape", "begins", "slices"}


def to_slices(
    dtype: torch.dtype, shape: Sequence[int], begins: Sequence[int], slices: Sequence[Any]
) -> dict[str, Any]:
    """What stands there for a tensor: some slices of it, each beginning at an element in row-major order."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
        "begins": list(begins),
        "slices": list(slices),
    }


def is_slices(value: Any) -> bool:
    """Whether it is what `to_slices` made."""
    return type(value) is dict and set(value) == _SLICES


def sliced_in(value: Any) -> Iterator[SlicedTensor]:
    """Every sliced tensor in nested mappings, lists and tuples, in the order of torch.save."""
    if isinstance(value, SlicedTensor):
        yield value
    elif isinstance(value, SharedFile):
        yield from sliced_in(value.content)
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from sliced_in(child)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for child in value:
            yield from sliced_in(child)
