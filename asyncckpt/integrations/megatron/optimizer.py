"""A distributed optimizer's state in Megatron-core's `torch_dist` format: two forms, neither with a gather.

dp_reshardable      by bucket: what a rank has of each of the optimizer's flat buffers, under the buffer's
                    name. Fits any number of data-parallel ranks, at the same parallelism of the model.
fully_reshardable   by parameter: what a rank has of each, as boxes of the parameter's shape. Fits any
                    parallelism.

Stock megatron-core gathers over the data-parallel group before it saves the second form. It need not: a
slice of a parameter's memory is a few boxes of it, and DCP takes any boxes that tile a tensor. What 0.16.1
gathers is right for buffers of one bucket alone: it looks for parameters where they are in buckets with their
paddings, in tensors without them, and warns of those at the end. Such files cannot be told from good ones.
Of its other forms, 'dp_zero_gather_scatter' gathers too, and 'fully_sharded_model_space' wants
`ShardedTensor.flattened_range`, which it refuses.

Boxes are made here, not by the optimizer's own `sharded_state_dict`: that asks for a step that fresh
optimizers have not made, changes them where it is to load, and saves paddings as they are found in memory.
Keys, shapes and offsets are the same. Sources, read in 0.16.1: megatron/core/optimizer/distrib_optimizer.py
(sharded_param_state_dp_reshardable, sharded_param_state_fully_reshardable), optimizer.py
(ChainedOptimizer.sharded_state_dict).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from ...errors import LeafError
from ...layouts.megatron_tree import COMMON_KEY, CONTENT_KEY, PLACES_KEY
from ...shards import Boxed, boxes
from ...tree import Keyed, Matching
from .sections import STATES, Groups, ParameterStates, inner_of, name_of
from .sharded import leaves_of, only, owned, rng_key

BY_BUCKET, BY_PARAMETER = "dp_reshardable", "fully_reshardable"  # Megatron-core's words

_ONE_SHARD = "/shard_0_1"  # ends the key of an object that is no part of a larger one
_Leaves = Iterator[tuple[str, Boxed | Keyed]]


class ShardedOptimizer:
    """One distributed optimizer, or several that are chained: saved in one form, loaded in either.

    Args:
        parameters: each of the model's, with its name and what the model's sharded state dict says of it.
    """

    def __init__(
        self,
        optimizer: Any,
        each: Sequence[Any],
        form: str,
        parameters: Callable[[], Mapping[torch.Tensor, tuple[str, Any]]],
    ) -> None:
        self._each = each
        self._groups = Groups(optimizer, each)
        states = [ParameterStates(one) for one in each]
        self._by_bucket = _ByBucket(each, states)
        self._by_parameter = _ByParameter(each, states, parameters)
        self._form = form

    def capture(self) -> dict[str, Boxed | Keyed]:
        if self._form == BY_PARAMETER:
            return dict(self._by_parameter.leaves())
        return dict(self._by_bucket.leaves(self._groups_of_each()))

    def common(self) -> Any:
        """What all ranks have alike."""
        kinds = [{"param_state_sharding_type": self._form} for _ in self._each]
        if self._form == BY_PARAMETER:
            kinds = [
                {**owned(groups), **kind} for groups, kind in zip(self._groups_of_each(), kinds, strict=True)
            ]
        return dict(enumerate(kinds)) if len(kinds) > 1 else kinds[0]

    def _groups_of_each(self) -> list[Any]:
        groups = self._groups.capture()
        return groups if isinstance(groups, list) else [groups]

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        described = stored.get(CONTENT_KEY)
        form = described.get("distrib_optim_sharding_type") if isinstance(described, Mapping) else None
        for index, one in enumerate(self._each):
            where = name if len(self._each) == 1 else f"{name}.{index}"
            if form == BY_BUCKET:
                self._by_bucket.match(where, index, stored, matching)
            elif form == BY_PARAMETER:
                common = stored.get(COMMON_KEY)
                groups = common.get(index) if len(self._each) > 1 and isinstance(common, Mapping) else common
                if not isinstance(groups, Mapping):
                    matching.differences.append(f"{where}: no groups of it in the checkpoint")
                    continue
                Groups.match_one(where, one, _known_groups(one, groups), matching)
                self._by_parameter.match(where, index, stored, matching)
            else:
                matching.differences.append(
                    f"{where}: saved with sharding type {form!r}; only {BY_BUCKET!r} and {BY_PARAMETER!r} "
                    f"are read here"
                )


def _known_groups(one: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored, with those groups alone that are here: another pipeline stage may have others."""
    inside = stored.get("optimizer")
    groups = inside.get("param_groups") if isinstance(inside, Mapping) else None
    if not isinstance(groups, list):
        return {}
    here = {name_of(group) for group in inner_of(one).param_groups}
    known = [group for group in groups if isinstance(group, Mapping) and name_of(group) in here]
    return {**stored, "optimizer": {"param_groups": known}}


# ---------------------------------------------------------------------------- by bucket


@dataclass(frozen=True)
class _Shard:
    """What a rank has of a bucket of an optimizer's flat buffer.

    Attributes:
        key: of the bucket, without the state's name.
        whole: elements of the bucket, without the padding at its end, which depends on the number of ranks.
        begin, end: of the rank's share in it, in elements.
        placed: parameters of which it has a part: begin, end in the bucket; in order.
    """

    key: str
    whole: int
    begin: int
    end: int
    placed: tuple[tuple[int, int, torch.nn.Parameter], ...]

    def gaps(self) -> Iterator[tuple[int, int]]:
        """What of the share no parameter has."""
        at = self.begin
        for begin, end, _ in self.placed:
            if at < begin:
                yield at, begin
            at = end
        if at < self.end:
            yield at, self.end


class _ByBucket:
    """What a rank has of each bucket, in the order of memory; what no parameter has is zeros."""

    def __init__(self, each: Sequence[Any], states: Sequence[ParameterStates]) -> None:
        self._each = each
        self._states = states
        prefixes = [f"chained_{index}." if len(each) > 1 else "" for index in range(len(each))]
        self._keys = [
            f"{prefix}optimizer.distributed.dp_group_idx_{one.data_parallel_group_idx}"
            for prefix, one in zip(prefixes, each, strict=True)
        ]
        self._shards = [list(_shards(key, one)) for key, one in zip(self._keys, each, strict=True)]
        gaps = [end - begin for shards in self._shards for shard in shards for begin, end in shard.gaps()]
        self._zeros = torch.zeros(max(gaps, default=0))

    def leaves(self, groups: Sequence[Mapping[str, Any]]) -> _Leaves:
        for index, one in enumerate(self._each):
            if one.distributed_optimizer_instance_id != 0:  # another instance has the same
                continue
            if one.data_parallel_group.rank() == 0:
                yield from self._objects(index, groups[index])
            for shard in self._shards[index]:
                yield from self._boxes(index, shard)

    def _objects(self, index: int, groups: Mapping[str, Any]) -> Iterator[tuple[str, Keyed]]:
        one = self._each[index]
        numbers = {name: getattr(one, name) for name in ("per_bucket_numel", "per_bucket_numel_unpadded")}
        for name, value in {**groups, **numbers}.items():
            key = f"{self._keys[index]}.{name}{_ONE_SHARD}"
            yield key, Keyed(key, owned(value))

    def _boxes(self, index: int, shard: _Shard) -> Iterator[tuple[str, Boxed]]:
        parts = [
            (begin, {state: tensor.detach() for state, tensor in self._states[index].saved(param).items()})
            for begin, _, param in shard.placed
        ]
        parts += [(begin, dict.fromkeys(STATES, self._zeros[: end - begin])) for begin, end in shard.gaps()]
        for begin, tensors in sorted(parts, key=lambda part: part[0]):
            for state, tensor in tensors.items():
                key = f"{shard.key}.{state}"
                yield f"{key}[{begin}]", Boxed(key, tensor, (shard.whole,), (begin,))

    def match(self, name: str, index: int, stored: Mapping[str, Any], matching: Matching) -> None:
        one, key = self._each[index], self._keys[index]
        groups = only(stored.get(f"{key}.optimizer{_ONE_SHARD}"))
        numbers = only(stored.get(f"{key}.per_bucket_numel_unpadded{_ONE_SHARD}"))
        places = stored.get(PLACES_KEY) or [rng_key()]  # none where generators were not saved
        if groups is None or numbers != one.per_bucket_numel_unpadded or rng_key() not in places:
            matching.differences.append(
                f"{name}: other buckets in the checkpoint: another model or another parallelism of it was "
                f"saved, with sharding type {BY_BUCKET!r}, which is not resharded; load the model alone "
                f"(optimizer=None, strict=False)"
            )
            return
        scaler = only(stored.get(f"{key}.grad_scaler{_ONE_SHARD}"))
        saved = {"optimizer": groups, **({} if scaler is None else {"grad_scaler": scaler})}
        Groups.match_one(name, one, saved, matching)
        for shard in self._shards[index]:
            self._match_shard(name, index, shard, stored, matching)

    def _match_shard(self, name: str, index: int, shard: _Shard, stored: Any, matching: Matching) -> None:
        for begin, _, param in shard.placed:
            for state, live in self._states[index].to_load(param).items():
                key = f"{shard.key}.{state}"
                if key in stored:
                    box = Boxed(key, live, (shard.whole,), (begin,))
                    matching.into_box(f"{name}: {key}[{begin}]", stored[key], box)
                else:
                    matching.missing.append(f"{name}: {key}")


def _shards(prefix: str, one: Any) -> Iterator[_Shard]:
    """What this rank has of each bucket of an optimizer's buffers."""
    rank, ranks = one.data_parallel_group.rank(), one.data_parallel_group.size()
    for number, of_buffer in enumerate(one.gbuf_ranges):
        for dtypes, of_buckets in of_buffer.items():
            for index, of_bucket in enumerate(of_buckets):
                bucket = one.buffers[number].buckets[index]
                share, whole = bucket.grad_data.numel() // ranks, int(bucket.numel_unpadded)
                begin = min(rank * share, whole)
                placed = sorted(
                    (
                        rank * share + ranges["gbuf_local"].start,
                        rank * share + ranges["gbuf_local"].end,
                        param,
                    )
                    for param, ranges in of_bucket["param_map"].items()
                )
                key = f"{prefix}.gbuf_idx_{number}.dtype_{dtypes}.bucket_idx_{index}"
                yield _Shard(key, whole, begin, min(begin + share, whole), tuple(placed))


# ---------------------------------------------------------------------------- by parameter


@dataclass(frozen=True)
class _Run:
    """A run of a parameter's memory that this rank's optimizer has, and that is a box of something saved.

    Attributes:
        keys: of what it is a box of, for each state.
        begin: of its first element, in the optimizer's part of the parameter.
        shape: of the box.
        whole, offsets: see `Boxed`.
        resized: see `Matching.into_box`.
        writes: nobody else writes it.
    """

    keys: Mapping[str, str]
    begin: int
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    resized: bool
    writes: bool

    def box(self, state: str, part: torch.Tensor) -> Boxed:
        memory = part.detach()[self.begin : self.begin + prod(self.shape)]
        return Boxed(self.keys[state], memory.view(self.shape), self.whole, self.offsets)


class _ByParameter:
    """What a rank has of each parameter, as boxes of what the model saves of it."""

    def __init__(
        self,
        each: Sequence[Any],
        states: Sequence[ParameterStates],
        parameters: Callable[[], Mapping[torch.Tensor, tuple[str, Any]]],
    ) -> None:
        self._each = each
        self._states = states
        self._parameters = parameters
        self._known: list[list[tuple[torch.nn.Parameter, list[_Run]]]] = []

    def leaves(self) -> _Leaves:
        for index, of_optimizer in enumerate(self._runs()):
            for param, runs in of_optimizer:
                for state, part in self._states[index].saved(param).items():
                    for run in runs:
                        if run.writes:
                            yield f"{run.keys[state]}{list(run.offsets)}", run.box(state, part)

    def match(self, name: str, index: int, stored: Mapping[str, Any], matching: Matching) -> None:
        for param, runs in self._runs()[index]:
            for state, part in self._states[index].to_load(param).items():
                for run in runs:
                    key = run.keys[state]
                    if key in stored:
                        box = run.box(state, part)
                        where = f"{name}: {key}{list(run.offsets)}"
                        matching.into_box(where, stored[key], box, resized=run.resized)
                    else:
                        matching.missing.append(f"{name}: {key}")

    def _runs(self) -> list[list[tuple[torch.nn.Parameter, list[_Run]]]]:
        """For each optimizer, its parameters and what it has of them; the same for the whole of training."""
        if not self._known:
            described = self._parameters()
            self._known = [
                [
                    (param, list(_runs_of(one, param, ranges["param"].start, ranges["param"].end, described)))
                    for of_buffer in one.gbuf_ranges
                    for of_buckets in of_buffer.values()
                    for of_bucket in of_buckets
                    for param, ranges in of_bucket["param_map"].items()
                ]
                for one in self._each
            ]
        return self._known


def _runs_of(
    one: Any,
    param: torch.nn.Parameter,
    begin: int,
    end: int,
    described: Mapping[torch.Tensor, tuple[str, Any]],
) -> Iterator[_Run]:
    """Elements [begin, end) of a parameter's memory.

    Of a [4, 10] parameter that is half of a [8, 10] one, 7 to 35 are three runs: the end of its row 0, rows
    1 and 2, and the beginning of row 3; see `shards.boxes`.
    """
    if param not in described:
        raise LeafError(
            "optimizer: it steps a parameter of which the model's sharded state dict says nothing"
        )
    name, sharded = described[param]
    keyed = {
        state: list(leaves_of(name, replace(sharded, key=f"optimizer.state.{state}.{sharded.key}")))
        for state in STATES
    }
    for leaf, view in enumerate(view for _, view in keyed["param"]):
        if not view.data.is_contiguous():
            raise LeafError(f"optimizer: {name}: {view.key} is no run of the parameter's memory")
        first = view.data.storage_offset() - param.storage_offset()
        low, high = max(begin, first), min(end, first + view.data.numel())
        shape = (1,) * view.prepend_axis_num + tuple(view.data.shape)
        # The last of (pipeline, tensor, data) counts data-parallel replicas, of which each has another part.
        replicas = (*view.replica_id[:2], one.distributed_optimizer_instance_id)
        for piece in boxes(shape, low - first, high - first) if low < high else ():
            yield _Run(
                {state: found[leaf][1].key for state, found in keyed.items()},
                first + piece.begin - begin,
                piece.shape,
                tuple(view.global_shape),
                tuple(a + b for a, b in zip(view.global_offset, piece.offsets, strict=True)),
                bool(view.allow_shape_mismatch),
                not any(replicas),
            )
