"""A file that all ranks write together: Megatron's distrib_optim.pt, from the plan to its closing."""

from __future__ import annotations

import time
import zlib
from typing import Any

import numpy as np
import torch

from asyncckpt import closing
from asyncckpt.formats import slices
from asyncckpt.formats.manifest import FileEntry
from asyncckpt.formats.slices import Run
from asyncckpt.layouts.megatron import ModelRank
from asyncckpt.planners.megatron import MegatronPlanner
from asyncckpt.shared import SHARED_BRANCH, SharedFile, SlicedTensor
from asyncckpt.snapshot import CHUNK_NBYTES, crc32_combine

from .plans import no_collector
from .state import Gpt

_STATES = ("param", "exp_avg", "exp_avg_sq")
_SERVED_PER_ROUND = 3
_ALIGNMENT = 64  # elements, of every parameter in a bucket; Megatron's


def together(gpt: Gpt, world_size: int, rounds: int) -> dict[str, Any]:
    """One data-parallel group of all ranks: a contributor's plans, the closer's, and its closing."""
    buckets = _buckets(gpt, world_size)
    contributor = _plan_times(gpt, buckets, world_size // 2, world_size, rounds)
    closer = _plan_times(gpt, buckets, 0, world_size, rounds)
    return {
        "world_size": world_size,
        "buckets": len(buckets),
        "contributor": contributor,
        "closer": closer,
        **_closed(gpt, buckets, world_size),
    }


def _buckets(gpt: Gpt, world_size: int) -> list[list[tuple[int, int]]]:
    """Parameters (begin, elements) in buckets of Megatron's default size, each a multiple of the ranks."""
    limit = max(40_000_000, 1_000_000 * world_size)
    found: list[list[tuple[int, int]]] = [[]]
    end = 0
    for _, shape in gpt.weights():
        if end >= limit:
            found.append([])
            end = 0
        elements = int(np.prod(shape))
        found[-1].append((end, elements))
        end = -(-(end + elements) // _ALIGNMENT) * _ALIGNMENT
    return found


def _sizes(buckets: list[list[tuple[int, int]]], world_size: int) -> list[tuple[int, int]]:
    """Elements of each bucket, padded for the ranks and not."""
    unpadded = [bucket[-1][0] + bucket[-1][1] for bucket in buckets]
    grid = int(np.lcm(world_size, 128))
    return [(-(-size // grid) * grid, size) for size in unpadded]


def _file(buckets: list[list[tuple[int, int]]], rank: int, world_size: int) -> SharedFile:
    rows, pieces, base = [], [], 0
    for bucket, (padded, unpadded) in zip(buckets, _sizes(buckets, world_size), strict=True):
        share = padded // world_size
        bounds = np.minimum(np.arange(world_size + 1, dtype=np.int64) * share, unpadded)
        table = np.stack([base + bounds[:-1], base + bounds[1:], np.arange(world_size)], axis=1)
        rows.append(table[table[:, 0] < table[:, 1]])
        begin, end = int(bounds[rank]), int(bounds[rank + 1])
        pieces += [
            (base + max(begin, at), min(end, at + elements) - max(begin, at))
            for at, elements in bucket
            if max(begin, at) < min(end, at + elements)
        ]
        base += unpadded
    all_slices = np.concatenate(rows)
    known = all_slices if rank == 0 else all_slices[all_slices[:, 2] == rank]
    flat = {
        state: SlicedTensor(
            torch.float32, (base,), known, tuple((at, torch.empty(elements)) for at, elements in pieces)
        )
        for state in _STATES
    }
    dtypes = (torch.bfloat16, torch.float32)
    content = {"buckets_coalesced": True, 0: {dtypes: {**flat, "numel_unpadded": base}}}
    return SharedFile(ModelRank().optimizer_path, 0, content)


def _plan_times(
    gpt: Gpt, buckets: list[list[tuple[int, int]]], rank: int, world_size: int, rounds: int
) -> dict[str, Any]:
    """Nobody touches the tensors' memory, as no plan does."""
    tree = {SHARED_BRANCH: [_file(buckets, rank, world_size)], "step": 1}
    place = ModelRank(writes_model=False)
    MegatronPlanner(rank, world_size, place).plan(tree)
    first_s, served_s = [], []
    with no_collector():
        for _ in range(rounds):
            planner = MegatronPlanner(rank, world_size, place)
            first_s.append(_timed(planner, tree))
            served_s += [_timed(planner, tree) for _ in range(_SERVED_PER_ROUND)]
            assert planner.plans_made == 1
    return {"first_s": first_s, "served_s": served_s, "written_bytes": planner.plan(tree).plan.nbytes}


def _timed(planner: MegatronPlanner, tree: dict[str, Any]) -> float:
    began_s = time.perf_counter()
    planner.plan(tree)
    return time.perf_counter() - began_s


def _closed(gpt: Gpt, buckets: list[list[tuple[int, int]]], world_size: int) -> dict[str, Any]:
    """What the closer computes once all have handed over, without the disk; and what they hand over."""
    tree = {SHARED_BRANCH: [_file(buckets, 0, world_size)], "step": 1}
    plan = MegatronPlanner(0, world_size, ModelRank(writes_model=False)).plan(tree).plan
    (part,) = plan.shared
    assert part.image is not None
    assert part.spans is not None
    handed, message_bytes, edge_bytes = {}, [], []
    for rank, own in slices.by_rank(part.spans):
        runs = tuple(_runs(slices.inside(own)))
        table = slices.edges(own)
        edges = bytes(int((table[:, 1] - table[:, 0]).sum()))
        handed[rank] = (runs, edges)
        entry = FileEntry("edges", len(edges), CHUNK_NBYTES, closing.crcs_of(edges, CHUNK_NBYTES))
        said = closing.to_bytes({part.path: closing.Handed(part.digest, runs, entry if edges else None)})
        message_bytes.append(len(said))
        edge_bytes.append(len(edges))
    began_s = time.perf_counter()
    written = {rank: runs for rank, (runs, _) in handed.items()}
    closed = slices.close(
        part.image, part.spans, written, lambda rank: handed[rank][1], CHUNK_NBYTES, crc32_combine
    )
    return {
        "close_s": time.perf_counter() - began_s,
        "file_bytes": part.image.nbytes,
        "closer_writes_bytes": sum(len(data) for _, data in closed.writes),
        "closer_writes": len(closed.writes),
        "message_bytes": max(message_bytes),
        "messages_bytes": sum(message_bytes),
        "edge_bytes": max(edge_bytes),
        "edges_bytes": sum(edge_bytes),
    }


def _runs(blocks: Any) -> list[Run]:
    """As the engine cuts them; of zeros, whose CRC takes no memory to know."""
    found = []
    for begin, end in blocks.tolist():
        at = begin
        while at < end:
            until = min(end, (at // CHUNK_NBYTES + 1) * CHUNK_NBYTES)
            found.append(Run(at, until - at, _zeros_crc(until - at)))
            at = until
    return found


_CRCS: dict[int, int] = {}


def _zeros_crc(nbytes: int) -> int:
    if nbytes not in _CRCS:
        _CRCS[nbytes] = zlib.crc32(bytes(nbytes))
    return _CRCS[nbytes]
