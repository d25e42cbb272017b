"""Megatron-core's ShardedTensor, ShardedObject and ShardedTensorFactory, as leaves that planners know.

Source: megatron/core/dist_checkpointing/mapping.py (0.16.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...errors import LeafError
from ...shards import Boxed
from ...tree import rebuilt


def leaves_of(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The sharded tensors and objects in a value of a sharded state dict."""
    from megatron.core.dist_checkpointing.mapping import (
        LocalNonpersistentObject,
        ShardedObject,
        ShardedTensor,
        ShardedTensorFactory,
    )

    if isinstance(value, ShardedTensorFactory):
        memory = value.data.untyped_storage().data_ptr()
        for path, made in leaves_of(name, value.build()):
            if isinstance(made, ShardedTensor) and made.data.untyped_storage().data_ptr() != memory:
                raise LeafError(
                    f"{path}: its factory copies {value.key} instead of viewing it; not known here"
                )
            yield path, made
    elif isinstance(value, Mapping | list | tuple):
        for key, child in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from leaves_of(f"{name}.{key}", child)
    elif isinstance(value, ShardedTensor | ShardedObject):
        yield name, value
    elif not isinstance(value, LocalNonpersistentObject):
        raise LeafError(
            f"{name}: a {type(value).__name__} in a sharded state dict of a model; not known here"
        )


def boxed(name: str, sharded: Any) -> Boxed:
    if sharded.flattened_range is not None:
        raise LeafError(f"{name}: {sharded.key} is a flattened range of a tensor, which is no box of it")
    tensor = sharded.data.detach()[(None,) * sharded.prepend_axis_num]
    return Boxed(sharded.key, tensor, tuple(sharded.global_shape), tuple(sharded.global_offset))


def owned(value: Any) -> Any:
    """`value` with copies of its tensors: loss scalers and groups change before the step that is fenced."""
    return rebuilt(value, torch.Tensor, lambda tensor: tensor.detach().clone(), objects=False)


def only(stored: Any) -> Any:
    """The object in a list that has one, which is how objects are stored; None for anything else."""
    return stored[0] if isinstance(stored, list) and len(stored) == 1 else None


def rng_key() -> str:
    """Of the generators of this rank's data-parallel group; tells one parallelism of a model from another."""
    from megatron.core import parallel_state as state

    place = state.get_pipeline_model_parallel_rank(), state.get_tensor_model_parallel_rank()
    sizes = state.get_pipeline_model_parallel_world_size(), state.get_tensor_model_parallel_world_size()
    return f"rng_state/shard_{place[0]}.{place[1]}_{sizes[0]}.{sizes[1]}"
