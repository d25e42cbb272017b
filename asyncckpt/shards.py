"""What torch knows of tensors that are spread over ranks: which block of the whole is here, who else has it.

A DTensor is a handle: its memory, and what may be changed behind it, is its local tensor. A plain tensor is
on every rank, as torch.distributed.checkpoint has it.

Pure: no communication.
"""

from __future__ import annotations

import hashlib
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import LeafError

_SPLIT_NBYTES_MIN = 64 << 10  # smaller tensors are not worth cutting
_CUT_NBYTES = 4096  # where tensors are cut; keeps pieces aligned, and costs no balance


@dataclass(frozen=True)
class Holders:
    """The ranks that have the same box. What is asked of them takes no longer for 16,384 than for 8.

    Attributes:
        key: their name, the same on every rank; short, since ballots carry it. Equal keys, equal holders.
        ranks: ascending.
    """

    key: str
    ranks: range | tuple[int, ...] = field(compare=False, repr=False)

    @classmethod
    def of(cls, ranks: Sequence[int]) -> Holders:
        """Of ranks in ascending order. Those of one dimension of a mesh are evenly spaced."""
        step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
        even = range(ranks[0], ranks[-1] + 1, step)
        if even == ranks or tuple(even) == tuple(ranks):
            return cls(f"{even[0]}-{even[-1]}" + (f":{step}" if step > 1 else ""), even)
        named = hashlib.sha256(",".join(map(str, ranks)).encode()).hexdigest()[:16]
        return cls(f"{ranks[0]}-{ranks[-1]} {named}", tuple(ranks))

    def __len__(self) -> int:
        return len(self.ranks)

    def __contains__(self, rank: int) -> bool:
        if isinstance(self.ranks, range):
            return rank in self.ranks
        place = bisect_left(self.ranks, rank)
        return place < len(self.ranks) and self.ranks[place] == rank

    def place_of(self, rank: int) -> int:
        """How many of them come before `rank`, which is one of them."""
        return self.ranks.index(rank) if isinstance(self.ranks, range) else bisect_left(self.ranks, rank)


@dataclass(frozen=True)
class Block:
    """A box of a tensor.

    Attributes:
        whole: shape of the tensor.
        offsets, shape: of the box in it, in elements.
        holders: the ranks that have this very box.
    """

    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    holders: Holders


@dataclass(frozen=True, eq=False)
class Boxed:
    """A leaf: a plain tensor that its owner says is a box of a larger one, for this rank to write.

    Attributes:
        key: what the larger one is called; several boxes of it may be here.
        tensor: the box. It has as many dimensions as the whole.
        whole: shape of the larger one.
        offsets: of the box in it, in elements.
    """

    key: str
    tensor: torch.Tensor
    whole: tuple[int, ...]
    offsets: tuple[int, ...]


def _dtensor() -> Any:
    """The class, if this process has any such tensor; importing it takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a handle of something spread over ranks."""
    kind = _dtensor()
    return kind is not None and isinstance(tensor, kind)


def is_partial(tensor: torch.Tensor) -> bool:
    """Whether its value is a sum over ranks that was not formed yet; copying it would be a collective."""
    return is_sharded(tensor) and any(p.is_partial() for p in tensor.placements)  # type: ignore[attr-defined]


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor whose memory it is; itself, most of the time."""
    if type(tensor) is torch.Tensor or not is_sharded(tensor):
        return tensor
    local: torch.Tensor = tensor._local_tensor  # type: ignore[attr-defined]  # noqa: SLF001 -- to_local() is autograd's
    return local


class Blocks:
    """Finds the block that is here of each tensor; remembers, since torch takes its time.

    Args:
        world_size: of the ranks that have the plain tensors.
    """

    def __init__(self, world_size: int) -> None:
        self._all = Holders.of(range(world_size))
        self._known: dict[Any, Block] = {}
        self._replicas: dict[Any, Holders] = {}  # of each mesh, by the dimensions that do not shard

    def of(self, name: str, tensor: torch.Tensor) -> Block:
        """The block of `tensor` that is on this rank.

        Raises:
            LeafError: partial sums, or placements that are no boxes.
        """
        if not is_sharded(tensor):
            shape = tuple(tensor.shape)
            return Block(shape, (0,) * len(shape), shape, self._all)
        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        key = (mesh, placements, tuple(tensor.shape), tuple(local_of(tensor).shape))
        if key not in self._known:
            offsets, local = _box(name, tensor, mesh, placements)
            self._known[key] = Block(tuple(tensor.shape), offsets, local, self._holders_in(mesh, placements))
        return self._known[key]

    def _holders_in(self, mesh: Any, placements: Sequence[Any]) -> Holders:
        from torch.distributed.tensor import Replicate

        replicated = tuple(isinstance(placement, Replicate) for placement in placements)
        if (mesh, replicated) not in self._replicas:
            ranks, coordinate = mesh.mesh, mesh.get_coordinate()
            for dim in reversed(range(ranks.ndim)):
                if not replicated[dim]:
                    ranks = ranks.select(dim, coordinate[dim])
            self._replicas[mesh, replicated] = Holders.of(sorted(ranks.flatten().tolist()))
        return self._replicas[mesh, replicated]


def _box(
    name: str, tensor: torch.Tensor, mesh: Any, placements: Sequence[Any]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and shape of what is here."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if is_partial(tensor):
        raise LeafError(f"{name} cannot be saved: it holds partial sums ({placements}); redistribute it")
    if mesh.get_coordinate() is None:
        raise LeafError(f"{name} cannot be saved: this rank is not in its mesh")
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    local = tuple(local_of(tensor).shape)
    if tuple(shape) != local:
        raise LeafError(
            f"{name} cannot be saved: {local} of it is here where {placements} says {tuple(shape)}"
        )
    if not all(_is_run(tensor.shape[dim], dim, mesh, placements) for dim in _strided_dims(placements)):
        raise LeafError(
            f"{name} cannot be saved: what is here of it is no box of the whole ({placements}); "
            "redistribute it"
        )
    return tuple(offsets), local


def _strided_dims(placements: Sequence[Any]) -> set[int]:
    """Dimensions along which a rank may have elements that are apart."""
    return {placement.dim for placement in placements if hasattr(placement, "split_factor")}


def _is_run(size: int, dim: int, mesh: Any, placements: Sequence[Any]) -> bool:
    """Whether the elements that are here along `dim`, which has `size` of them, follow each other.

    Of one dimension alone, torch does not say: FSDP2 makes runs together with tensor parallelism,
    `DTensor.flatten` of a column-wise tensor makes none, and both call it strided.
    """
    here = torch.arange(size)
    for mesh_dim, placement in enumerate(placements):
        if getattr(placement, "dim", None) == dim:
            along = _along_first(placement)
            ranks, coordinate = mesh.size(mesh_dim), mesh.get_coordinate()[mesh_dim]
            here = along._split_tensor(here, ranks, with_padding=False, contiguous=False)[0][coordinate]  # noqa: SLF001
    return bool((here.diff() == 1).all())


def _along_first(placement: Any) -> Any:
    """The same of a tensor's first dimension."""
    if hasattr(placement, "split_factor"):
        return type(placement)(0, split_factor=placement.split_factor)
    return type(placement)(0)


# ---------------------------------------------------------------------------- who writes what


@dataclass(frozen=True)
class Piece:
    """A run of a contiguous tensor's memory that is a box of it.

    Attributes:
        begin: of its first element, counted over the tensor in row-major order.
        offsets, shape: of the box, in elements.
    """

    begin: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def shares(blocks: Sequence[tuple[Block, int, bool]], rank: int) -> list[tuple[tuple[int, int], ...]]:
    """Which elements of each tensor this rank writes, as (begin, end) in row-major order of its block.

    Holders of the same blocks write about as many bytes each. All ranks compute the same, from sizes alone.

    Args:
        blocks: each with its itemsize, and whether it can be cut.
    """
    totals: dict[Holders, int] = {}
    for block, itemsize, _ in blocks:
        totals[block.holders] = totals.get(block.holders, 0) + _elements(block.shape) * itemsize
    passed: dict[Holders, int] = dict.fromkeys(totals, 0)
    mine = []
    for block, itemsize, can_cut in blocks:
        elements = _elements(block.shape)
        begin = passed[block.holders]
        passed[block.holders] = begin + elements * itemsize
        place, count = block.holders.place_of(rank), len(block.holders)
        mine.append(share(elements, itemsize, can_cut, begin, totals[block.holders], place, count))
    return mine


def share(
    elements: int, itemsize: int, can_cut: bool, begin: int, total: int, place: int, count: int
) -> tuple[tuple[int, int], ...]:
    """Which elements of one tensor the holder at `place` of `count` writes; at most one (begin, end).

    Args:
        begin: bytes of the tensors before it that they hold too.
        total: bytes of all those tensors.
    """
    if count == 1:
        return ((0, elements),)
    nbytes = elements * itemsize
    if not can_cut or nbytes < _SPLIT_NBYTES_MIN:
        # Whole, to whoever writes the byte in its middle; of nothing, to the first.
        middle = begin + nbytes // 2
        writer = min(count - 1, middle * count // total) if total else 0
        return ((0, elements),) if writer == place else ()
    first, last = (_cut(total * index // count - begin, nbytes, itemsize) for index in (place, place + 1))
    return ((first, last),) if first < last else ()


def _cut(at_nbytes: int, nbytes: int, itemsize: int) -> int:
    """An element near a byte of a tensor; its ends are never moved inwards."""
    if at_nbytes <= 0:
        return 0
    if at_nbytes >= nbytes:
        return nbytes // itemsize
    return at_nbytes // _CUT_NBYTES * _CUT_NBYTES // itemsize


def boxes(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Piece]:
    """Elements [begin, end) of a row-major tensor as few boxes, each a run of memory.

    Of a [4, 10] tensor, 7 to 35 are the end of row 0 (7 to 10), rows 1 and 2, and the beginning of row 3.
    """
    if not shape:
        if begin < end:
            yield Piece(0, (), ())
        return
    row = _elements(shape[1:])
    if (begin, end) == (0, row * shape[0]):
        yield Piece(0, (0,) * len(shape), shape)
        return
    while begin < end:
        index, into = divmod(begin, row)
        if into == 0 and end - begin >= row:  # whole rows
            count = (end - begin) // row
            yield Piece(begin, (index, *(0,) * (len(shape) - 1)), (count, *shape[1:]))
            begin += count * row
        else:
            stop = min(end, (index + 1) * row)
            for piece in boxes(shape[1:], into, into + stop - begin):
                yield Piece(index * row + piece.begin, (index, *piece.offsets), (1, *piece.shape))
            begin = stop


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
