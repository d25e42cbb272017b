"""DTensors in what an owner's state_dict() hands out: a load fills them where they are.

What is stored of one is the whole of it. Nothing in a checkpoint says how it was spread over ranks, and made
anew it would be a plain tensor of the whole, which the owner's load_state_dict() has no place for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from ..shards import is_sharded
from ..tree import OWN_SECTIONS, Matching, StoredTensor


def with_live_shards(name: str, owner: Any, stored: Any, matching: Matching) -> Any:
    """`stored` with the owner's DTensors in the places of what is stored of them, to be filled.

    The owner is asked for its state only where there can be such: a sampler may start workers to answer.
    """
    section = name.partition(".")[0]
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    if section in OWN_SECTIONS or not spread or not _holds_tensor(stored):
        return stored
    return _visit(name, owner.state_dict(), stored, matching)


def _holds_tensor(stored: Any) -> bool:
    """Whether a branch holds a tensor in it; not deeper, in python that was pickled whole."""
    if isinstance(stored, Mapping):
        return any(map(_holds_tensor, stored.values()))
    return isinstance(stored, StoredTensor)


def _visit(name: str, live: Any, stored: Any, matching: Matching) -> Any:
    if isinstance(stored, StoredTensor) and isinstance(live, torch.Tensor) and is_sharded(live):
        matching.into(name, stored, live.detach())
        return live
    if type(stored) in (dict, OrderedDict) and isinstance(live, Mapping):
        children = (
            (key, _visit(f"{name}.{key}", live.get(key), child, matching)) for key, child in stored.items()
        )
        return type(stored)(children)
    return stored
