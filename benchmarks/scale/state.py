"""A GPT's training state as one rank of a large world has it, in one process: torch's fake process group
stands in for the others. Tensors have the shapes of that rank's shards; nobody touches their memory.

`layouts` says where the items of *every* rank lie without planning 16,384 times. It follows the same rules;
whoever uses it compares it with some real plans, byte for byte.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from asyncckpt.formats import distcp
from asyncckpt.formats.image import ImageBuilder
from asyncckpt.layouts.dcp import data_path
from asyncckpt.plan import WritePlan
from asyncckpt.planners.dcp import DcpPlanner
from asyncckpt.shards import boxes, share
from asyncckpt.tree import StateTree

_ITEMSIZE = 4  # all is float32
_CUT_NBYTES = 4096  # how far a share may begin before its even part

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Gpt:
    """A GPT-2 of some size, trained by AdamW: weights, two moments and a step counter to each."""

    layers: int
    width: int
    vocabulary: int
    context: int

    def weights(self) -> Iterator[tuple[str, Shape]]:
        d = self.width
        yield from (("wte.weight", (self.vocabulary, d)), ("wpe.weight", (self.context, d)))
        for layer in range(self.layers):
            for name, shape in (
                *(("ln_1.weight", (d,)), ("ln_1.bias", (d,))),
                *(("attn.c_attn.weight", (3 * d, d)), ("attn.c_attn.bias", (3 * d,))),
                *(("attn.c_proj.weight", (d, d)), ("attn.c_proj.bias", (d,))),
                *(("ln_2.weight", (d,)), ("ln_2.bias", (d,))),
                *(("mlp.c_fc.weight", (4 * d, d)), ("mlp.c_fc.bias", (4 * d,))),
                *(("mlp.c_proj.weight", (d, 4 * d)), ("mlp.c_proj.bias", (d,))),
            ):
                yield f"h.{layer}.{name}", shape
        yield from (("ln_f.weight", (d,)), ("ln_f.bias", (d,)))

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.weights())


XL = Gpt(layers=48, width=1600, vocabulary=50257, context=1024)
TINY = Gpt(layers=2, width=64, vocabulary=512, context=32)


@dataclass(frozen=True)
class Spread:
    """How a state lies over ranks: rows over `shards` of them, and that over `replicas`; rank = replica *
    shards + shard. What is no weight and no moment (step counters) all have alike."""

    shards: int
    replicas: int

    @property
    def world_size(self) -> int:
        return self.shards * self.replicas

    def rows(self, count: int, shard: int) -> tuple[int, int]:
        """First row and number of rows of a shard, as torch cuts: all of one size, the last ones fewer."""
        each = -(-count // self.shards)
        first = min(count, shard * each)
        return first, min(each, count - first)


def spreads(world_size: int, shards_max: int = 64) -> dict[str, Spread]:
    """The ways a world may hold a state."""
    shards = min(shards_max, world_size // 2)
    return {
        "FSDP": Spread(world_size, 1),
        "HSDP": Spread(shards, world_size // shards),
        "DDP": Spread(1, world_size),
    }


@contextmanager
def standing_at(rank: int, world_size: int) -> Iterator[None]:
    """A process group of any size, of which only this rank exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def tree_of(gpt: Gpt, spread: Spread, rank: int) -> StateTree:
    """The tree that a save would capture there. Inside `standing_at`."""
    shard = rank % spread.shards
    grid = torch.arange(spread.world_size)
    mesh = DeviceMesh("cpu", grid.view(-1, spread.shards).squeeze(0), _init_backend=False)
    placements = (Shard(0),) if spread.replicas == 1 else (Replicate(), Shard(0))

    def tensor(shape: Shape) -> torch.Tensor:
        if spread.shards == 1:
            return torch.empty(shape)
        local = torch.empty(spread.rows(shape[0], shard)[1], *shape[1:])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )

    weights = dict(gpt.weights())
    state = {
        name: {"step": torch.zeros(()), "exp_avg": tensor(shape), "exp_avg_sq": tensor(shape)}
        for name, shape in weights.items()
    }
    group = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
    tree: dict[str, Any] = {
        "model": {name: tensor(shape) for name, shape in weights.items()},
        "optimizer": {"state": state, "param_groups": [{**group, "params": list(weights)}]},
        "lr_scheduler": {"last_epoch": 1000, "base_lrs": [3e-4]},
        "rng": {"python": random.getstate(), "torch": torch.get_rng_state()},
        "step": 1000,
    }
    found = StateTree(tree)
    found.parameters = frozenset(weights)
    return found


def plan_at(gpt: Gpt, spread: Spread, rank: int) -> WritePlan:
    """A real plan of one rank."""
    with standing_at(rank, spread.world_size):
        planner = DcpPlanner(rank, spread.world_size)
        return planner.plan(tree_of(gpt, spread, rank)).plan


# ---------------------------------------------------------------------------- where items lie, of all ranks


@cache
def _item_nbytes(shape: Shape) -> int:
    """Of a tensor item in a `.distcp` file."""
    spec = distcp.ItemSpec("", torch.float32, (), (), _ITEMSIZE).cut(shape)
    return distcp.lay_out_tensor(ImageBuilder("item"), spec, 0).nbytes


class _Held:
    """Tensors that the same ranks hold: in the order of the tree, with the bytes before each."""

    def __init__(self, places: Sequence[int], shapes: Sequence[Shape], offsets: Sequence[Shape]) -> None:
        self._places, self._shapes, self._offsets = places, shapes, offsets
        sizes = [math.prod(shape) * _ITEMSIZE for shape in shapes]
        self._begins = list(accumulate(sizes, initial=0))
        self._total = self._begins.pop()
        self._ends = np.array(self._begins, dtype=np.int64) + np.array(sizes, dtype=np.int64)

    def pieces(self, place: int, count: int) -> Iterator[tuple[int, Shape, Shape]]:
        """What the holder at `place` of `count` writes: (place in the tree, offsets, shape)."""
        first_byte = self._total * place // count - _CUT_NBYTES
        at = int(np.searchsorted(self._ends, first_byte))
        while at < len(self._places) and self._begins[at] <= self._total * (place + 1) // count:
            shape, offsets = self._shapes[at], self._offsets[at]
            elements = math.prod(shape)
            if elements:
                begin = self._begins[at]
                for part in share(elements, _ITEMSIZE, True, begin, self._total, place, count):
                    for piece in boxes(shape, *part):
                        moved = tuple(a + b for a, b in zip(offsets, piece.offsets, strict=True))
                        yield self._places[at], moved, piece.shape
            at += 1


def layouts(gpt: Gpt, spread: Spread, first: WritePlan) -> Iterator[bytes]:
    """`WritePlan.layout` of every rank, by rank; of rank 0, which writes python leaves too, from its plan."""
    weights = list(gpt.weights())
    shapes = [shape for _, shape in weights] + [shape for _, shape in weights for _ in range(2)]
    step_at = range(len(weights), 4 * len(weights), 3)  # the step counter, then the moments
    others = [place for place in range(4 * len(weights)) if place not in step_at]
    if spread.shards == 1:
        ordered = sorted([*zip(others, shapes, strict=True), *((place, ()) for place in step_at)])
        places, shapes = [place for place, _ in ordered], [shape for _, shape in ordered]
        both = [_Held(places, shapes, [(0,) * len(shape) for shape in shapes])]
    else:
        both = [_Held(step_at, [()] * len(step_at), [()] * len(step_at))]

    @cache
    def sharded(shard: int) -> list[_Held]:
        if spread.shards == 1:
            return []
        cuts = [spread.rows(shape[0], shard) for shape in shapes]
        here = [(rows, *shape[1:]) for (_, rows), shape in zip(cuts, shapes, strict=True)]
        offsets = [(row, *(0,) * (len(shape) - 1)) for (row, _), shape in zip(cuts, shapes, strict=True)]
        return [_Held(others, here, offsets)]

    yield first.layout
    paths: dict[str, Any] = {str(place): () for place in range(4 * len(weights))}
    for rank in range(1, spread.world_size):
        replica, shard = divmod(rank, spread.shards)
        found = [piece for held in both for piece in held.pieces(rank, spread.world_size)]
        found += [piece for held in sharded(shard) for piece in held.pieces(replica, spread.replicas)]
        if spread.replicas == 1:
            sharded.cache_clear()  # of no use to another rank
        yield distcp.pack_layout(data_path(rank), _entries(rank, sorted(found)), paths)


def _entries(rank: int, pieces: Sequence[tuple[int, Shape, Shape]]) -> Iterator[distcp.Entry]:
    offset = 0
    for place, offsets, shape in pieces:
        nbytes = _item_nbytes(shape)
        spec = distcp.ItemSpec("", torch.float32, shape, (), 0)
        yield distcp.Entry(str(place), data_path(rank), distcp.Span(offset, nbytes), spec, offsets=offsets)
        offset += nbytes
