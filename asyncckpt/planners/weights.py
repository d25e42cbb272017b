"""A model's whole weights in one file of torch.save, each rank writing what it has of them.

RLinf's `model_state_dict/full_weights.pt`, for which RLinf gathers the model on one rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from ..formats.image import Int64Array
from ..shards import is_sharded, local_of
from ..shared import SharedFile, SlicedTensor
from ..tree import tensors_in

_CLOSER = 0


def weights_file(path: str, weights: Mapping[str, Any], rank: int) -> SharedFile | str:
    """The file; or the name of a value that it cannot have: a tensor of which some rank's part is no run of
    its memory, or a python value with tensors in it."""
    content: dict[str, Any] = {}
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            if any(True for _ in tensors_in(value)):
                return name
            content[name] = value
            continue
        slices = _slices(value)
        local = local_of(value)
        is_run = local.layout == torch.strided and local.is_contiguous()
        if slices is None or not is_run or local.is_conj() or local.is_neg():
            return name
        own = slices[slices[:, 2] == rank]
        pieces = ((int(own[0, 0]), local.detach().view(-1)),) if len(own) else ()
        content[name] = SlicedTensor(value.dtype, tuple(value.shape), slices, pieces)
    return SharedFile(path, _CLOSER, content, is_loaded=False)


def _slices(tensor: torch.Tensor) -> Int64Array | None:
    """Which rank writes which elements: of those that have the same, the first. None if they are no runs."""
    rows, row = (tensor.shape[0], prod(tensor.shape[1:])) if tensor.dim() else (1, 1)
    if not is_sharded(tensor):
        table = [(0, rows * row, _CLOSER)]
    else:
        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        ranks: Any = mesh.mesh
        parts = [(0, rows)]
        for dim, placement in enumerate(placements):
            if placement.is_replicate():
                ranks = ranks.select(len(_sharding(placements[:dim])), 0)
            elif type(placement).__name__ == "Shard" and placement.dim == 0:
                parts = [piece for begin, end in parts for piece in _chunks(begin, end, mesh.size(dim))]
            else:
                return None
        holders = ranks.flatten().tolist()
        table = [
            (begin * row, end * row, holder) for (begin, end), holder in zip(parts, holders, strict=True)
        ]
    found = np.array(table, np.int64).reshape(-1, 3)
    return found[found[:, 0] < found[:, 1]]


def _sharding(placements: Sequence[Any]) -> list[Any]:
    return [placement for placement in placements if not placement.is_replicate()]


def _chunks(begin: int, end: int, count: int) -> list[tuple[int, int]]:
    """As torch.chunk cuts: equal parts, the last ones shorter or empty."""
    size = -(-(end - begin) // count)
    return [(min(begin + i * size, end), min(begin + (i + 1) * size, end)) for i in range(count)]
