"""Megatron-core's `torch_dist` format: sharded state dicts as boxes, written and read without a collective.

The model's boxes are those of its own `sharded_state_dict`, and load at any parallelism; parameters that all
ranks of a data-parallel group have, they write in equal shares. What an optimizer has is in
`optimizer`, what both are made of in `sharded`. Generators are there twice: a rank's own,
and, for Megatron-LM, one rank's for each data-parallel group.

Sources: megatron/core/dist_checkpointing (serialization.py, strategies/torch.py) of 0.16.1, Megatron-LM's
megatron/training/checkpointing.py (generate_state_dict, get_rng_state, _build_sharded_state_dict_metadata).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from ...errors import OptionError
from ...layouts.megatron_tree import CONTENT_KEY, pack_rng, unpack_rng
from ...sections import Section
from ...shards import Block, Boxed, Holders, boxes, shares
from ...tree import Keyed, Matching
from .optimizer import BY_BUCKET, BY_PARAMETER, ShardedOptimizer
from .sections import (
    PLAIN,
    ForMegatron,
    Generators,
    Scheduler,
    Sync,
    below,
    chained,
    inner_of,
    innermost,
    told,
)
from .sharded import boxed, leaves_of, only, owned, rng_key

_log = logging.getLogger(__name__)

_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}  # as Megatron-LM's main


def dist_state_of(
    model: Any,
    optimizer: Any,
    scheduler: Any,
    args: Any,
    also: Mapping[str, Callable[[], Any]] | None,
    fully_reshardable: bool | None,
) -> dict[str, Any]:
    """What an AsyncCheckpointer is to be given for Megatron's objects; see `megatron.checkpointer`."""
    chunks = list(model) if isinstance(model, list | tuple) else [model]
    inner = [innermost(chunk) for chunk in chunks]
    state = MegatronDistState(chunks, optimizer, scheduler, args, also, fully_reshardable)
    return {"model": inner if len(inner) > 1 else inner[0], "optimizer": state}


class MegatronDistState:
    """All that is saved of a rank.

    Args:
        fully_reshardable: whether the optimizer is to load at another tensor or pipeline parallelism; see
            `optimizer`. None: what `args` say.

    Raises:
        OptionError: something that this format has no place for, or that nobody here knows.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        optimizer: Any,
        scheduler: Any,
        args: Any,
        also: Mapping[str, Callable[[], Any]] | None = None,
        fully_reshardable: bool | None = None,
    ) -> None:
        if getattr(args, "data_parallel_random_init", False):
            raise OptionError("--data-parallel-random-init gathers generators' states; not known here")
        if fully_reshardable is None:
            fully_reshardable = bool(getattr(args, "dist_ckpt_optim_fully_reshardable", False))
        content: dict[str, Any] = dict(_CONTENT)
        model = _Model([innermost(one) for one in chunks], Sync(chunks), content)
        self._sections: dict[str, Section] = {"model": model}
        self._optimizers: list[Any] = []
        sharded = None
        if optimizer is not None:
            each = chained(optimizer)
            for one in each:
                if type(one).__name__ in PLAIN:
                    raise OptionError(
                        f"optimizer: {type(one).__name__} is not saved in format 'torch_dist' here, the "
                        f"DistributedOptimizer alone; use format 'torch'"
                    )
            form = BY_PARAMETER if fully_reshardable else BY_BUCKET
            content["distrib_optim_sharding_type"] = form
            if fully_reshardable:
                content["distrib_optim_fully_reshardable_mem_efficient"] = False
            sharded = ShardedOptimizer(optimizer, each, form, model.parameters)
            self._optimizers = [inner_of(one) for one in each]
            self._sections["optimizer"] = sharded
        self._sections["common"] = _Common(content, sharded.common if sharded is not None else None)
        self._sections["rng"] = _OwnGenerators()
        self._sections["rng_state"] = _SharedGenerators()
        if scheduler is not None:
            self._sections["lr_scheduler"] = Scheduler(scheduler)
        for_megatron = ({} if args is None else {"args": lambda: args}) | dict(also or {})
        self._sections.update({name: ForMegatron(value) for name, value in for_megatron.items()})

    def sections(self) -> Mapping[str, Section]:
        return self._sections

    def optimizers(self) -> list[Any]:
        return self._optimizers


# ---------------------------------------------------------------------------- the model


class _Model:
    """All chunks of a model: what each says in its `sharded_state_dict`."""

    def __init__(self, chunks: Sequence[Any], sync: Sync, content: Mapping[str, Any]) -> None:
        self._chunks = chunks
        self._sync = sync
        self._content = content

    def capture(self) -> dict[str, Boxed | Keyed]:
        from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

        self._sync()
        branch: dict[str, Boxed | Keyed] = {}
        replicated: dict[str, tuple[Boxed, Holders]] = {}
        for _, _, value, name, sharded in self._sharded():
            holders = _holders(value.data, sharded) if isinstance(sharded, ShardedTensor) else None
            if holders is not None:
                replicated[name] = boxed(name, sharded), holders
            elif is_main_replica(sharded.replica_id):
                if isinstance(sharded, ShardedTensor):
                    branch[name] = boxed(name, sharded)
                else:
                    branch[name] = Keyed(sharded.unique_key, owned(sharded.data))
        branch.update(_own_shares(replicated))
        return branch

    def parameters(self) -> dict[torch.Tensor, tuple[str, Any]]:
        """What the sharded state dicts say of each parameter, and under which name."""
        return {value.data: (where, value) for _, _, value, where in self._values() if hasattr(value, "data")}

    def _sharded(self) -> Iterator[tuple[Any, str, Any, str, Any]]:
        """Chunk, name in it, its value there, name here, and the ShardedTensor or ShardedObject."""
        for chunk, name, value, where in self._values():
            for path, sharded in leaves_of(where, value):
                yield chunk, name, value, path, sharded

    def _values(self) -> Iterator[tuple[Any, str, Any, str]]:
        """The same, before factories have made of a tensor what they do."""
        from megatron.core import parallel_state

        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        for index, chunk in enumerate(self._chunks):
            prefix = f"{index}." if len(self._chunks) > 1 else ""
            for name, value in chunk.sharded_state_dict(
                metadata={**self._content, "dp_cp_group": group}
            ).items():
                yield chunk, name, value, f"{prefix}{name}"

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        objects: dict[Any, dict[str, Any]] = {}
        met: dict[str, int] = {}
        for chunk, own, _, where, sharded in self._sharded():
            is_tensor = isinstance(sharded, ShardedTensor)
            key = sharded.key if is_tensor else sharded.unique_key
            if key not in stored:
                matching.missing.append(f"{name}.{where}")
            elif is_tensor:
                box = boxed(where, sharded)
                matching.into_box(
                    f"{name}.{where}", stored[key], box, resized=bool(sharded.allow_shape_mismatch)
                )
            elif isinstance(stored[key], list) and stored[key]:
                values, place = stored[key], met.get(key, 0)
                met[key] = place + 1
                value = matching.fresh(f"{name}.{where}", values[min(place, len(values) - 1)])
                objects.setdefault(chunk, {})[own] = value
            else:
                matching.differences.append(f"{name}.{where}: no list of objects in the checkpoint")

        def apply() -> None:
            for chunk, state in objects.items():  # all at once: layers take what is not there for None
                if any(value is not None for value in state.values()):
                    chunk.load_state_dict(state, strict=False)

        matching.afterwards.append(told(name, apply))


def _holders(param: Any, sharded: Any) -> Holders | None:
    """The data-parallel group whose ranks all have this box, so that each may write a share; None of what
    training does not keep equal there (buffers), and of replicas of another kind."""
    from megatron.core import parallel_state

    if not isinstance(param, torch.nn.Parameter) or len(sharded.replica_id) != 3:
        return None
    if getattr(param, "allreduce", True):
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    else:  # an expert's
        group = parallel_state.get_expert_data_parallel_group()
    of_pipeline, of_tensor, of_data = sharded.replica_id
    if (of_pipeline, of_tensor) != (0, 0) or of_data != group.rank():
        return None
    return Holders.of(sorted(dist.get_process_group_ranks(group)))


def _own_shares(replicated: Mapping[str, tuple[Boxed, Holders]]) -> Iterator[tuple[str, Boxed]]:
    """Of boxes that several ranks have, what this one writes: about as many bytes as each of the others."""
    table = [
        (Block(box.whole, box.offsets, tuple(box.tensor.shape), holders), box.tensor.element_size(),
         box.tensor.is_contiguous())
        for box, holders in replicated.values()
    ]  # fmt: skip
    mine = shares(table, dist.get_rank())
    for (name, (box, _)), runs in zip(replicated.items(), mine, strict=True):
        for begin, end in runs:
            if (begin, end) == (0, box.tensor.numel()):
                yield name, box
                continue
            for piece in boxes(tuple(box.tensor.shape), begin, end):
                memory = box.tensor.view(-1)[piece.begin : piece.begin + prod(piece.shape)]
                offsets = tuple(a + b for a, b in zip(box.offsets, piece.offsets, strict=True))
                yield (
                    f"{name}{list(piece.offsets)}",
                    replace(box, tensor=memory.view(piece.shape), offsets=offsets),
                )


# ---------------------------------------------------------------------------- the rest


class _Common:
    """What common.pt has besides our own branches, for Megatron-LM's load."""

    write_only = True

    def __init__(self, content: Mapping[str, Any], optimizer: Callable[[], Any] | None) -> None:
        self._content = content
        self._optimizer = optimizer

    def capture(self) -> Any:
        common: dict[str, Any] = {CONTENT_KEY: dict(self._content)}
        if self._optimizer is not None:
            common["optimizer"] = self._optimizer()
        return common

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        """Nothing: what is read of it, the reader of the files has read."""


class _SharedGenerators:
    """The generators as Megatron-LM has them: one rank's for each data-parallel group."""

    write_only = True

    def capture(self) -> Any:
        from megatron.core import parallel_state

        if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
            return {}
        key = rng_key()
        return {key: Keyed(key, [pack_rng(Generators().capture())])}

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        """Nothing: a rank's own are better; where there are none, `_OwnGenerators` reads these."""


class _OwnGenerators(Generators):
    """This rank's; of a checkpoint without them, those of its data-parallel group.

    Where another tensor or pipeline parallelism saved them they are left alone, as Megatron-LM does: ranks
    that share a tensor must draw alike in some places and differently in others.
    """

    def capture(self) -> Any:
        return {**super().capture(), "place": rng_key()}

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        key = rng_key()
        if below(stored, "place") == key:
            super().match(name, stored, matching)
        elif below(stored, key) is not None:
            super().match(name, unpack_rng(only(stored[key])), matching)
        else:
            _log.warning("%s: left as it is, since another tensor or pipeline parallelism saved it", name)
