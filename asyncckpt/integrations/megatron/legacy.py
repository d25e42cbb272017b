"""Megatron-LM's legacy tree (--ckpt-format torch): what a rank has of it.

`distrib_optim.pt` is written without a gather: every rank of a data-parallel group writes its slice. Which
elements those are follows from what each rank knows of its buffers; what it does not know of other ranks
(which of them writes which file) is exchanged once, when the checkpointer is made.

Sources: megatron/core/optimizer/distrib_optimizer.py (get_parameter_state_dp_zero), optimizer.py
(ChainedOptimizer.save_parameter_state), Megatron-LM's megatron/training/checkpointing.py. Read from 0.13 to
0.19, run with 0.16.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ...errors import OptionError
from ...formats.image import Int64Array
from ...layouts.megatron import ModelRank
from ...sections import Section, StatefulSection
from ...shared import SHARED_BRANCH, SharedFile, SlicedTensor
from ...tree import Matching, StoredTensor
from .sections import (
    PLAIN,
    STATES,
    ForMegatron,
    Generators,
    Groups,
    ParameterStates,
    Scheduler,
    Sync,
    Synced,
    below,
    chained,
    inner_of,
    innermost,
)


def state_of(
    model: Any,
    optimizer: Any = None,
    opt_param_scheduler: Any = None,
    args: Any = None,
    also: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Any]:
    """What an AsyncCheckpointer is to be given for Megatron's objects; see `checkpointer` for these."""
    chunks = list(model) if isinstance(model, list | tuple) else [model]
    place = model_rank()
    inner = [innermost(chunk) for chunk in chunks]
    for_megatron = ({} if args is None else {"args": lambda: args}) | dict(also or {})
    return {
        "model": inner if len(inner) > 1 else inner[0],
        "optimizer": MegatronState(chunks, optimizer, opt_param_scheduler, place, for_megatron),
        "model_rank": place,
    }


def model_rank() -> ModelRank:
    """Where this rank stands, as megatron.core.parallel_state says.

    Raises:
        OptionError: experts are spread over other tensor-parallel ranks than the rest of the model.
    """
    from megatron.core import parallel_state as state

    tensor = state.get_tensor_model_parallel_world_size()
    expert = state.get_expert_model_parallel_world_size()
    of_experts = getattr(state, "get_expert_tensor_parallel_world_size", lambda: tensor)()
    if expert > 1 and of_experts != tensor:
        raise OptionError(
            f"expert tensor parallelism of {of_experts} with tensor parallelism of {tensor}: Megatron's "
            f"legacy tree has no names for these parts"
        )
    return ModelRank(
        tensor=state.get_tensor_model_parallel_rank(),
        pipeline=state.get_pipeline_model_parallel_rank(),
        expert=state.get_expert_model_parallel_rank(),
        tensor_size=tensor,
        pipeline_size=state.get_pipeline_model_parallel_world_size(),
        expert_size=expert,
        writes_model=state.get_expert_data_parallel_rank() == 0,
    )


class MegatronState:
    """All that is saved of a rank besides its model.

    Raises:
        OptionError: an optimizer that nobody here knows.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        optimizer: Any,
        scheduler: Any,
        place: ModelRank,
        for_megatron: Mapping[str, Callable[[], Any]],
    ) -> None:
        self._sections: dict[str, Section] = {}
        self._optimizers: list[Any] = []
        if optimizer is not None:
            each = chained(optimizer)
            self._optimizers = [inner_of(one) for one in each]
            sync = Sync(chunks)
            if all(type(one).__name__ in PLAIN for one in each):
                self._sections["optimizer"] = Synced(StatefulSection(optimizer), sync)
            else:
                sharded = _Sharded(each, place)
                self._sections["optimizer"] = Synced(Groups(optimizer, each), sync)
                self._sections[SHARED_BRANCH] = sharded
        self._sections["rng"] = Generators()
        if scheduler is not None:
            self._sections["lr_scheduler"] = Scheduler(scheduler)
        self._sections.update({name: ForMegatron(value) for name, value in for_megatron.items()})

    def sections(self) -> Mapping[str, Section]:
        return self._sections

    def optimizers(self) -> list[Any]:
        return self._optimizers


# ---------------------------------------------------------------------------- what ranks have slices of


@dataclass(frozen=True)
class _Buffer:
    """One of an optimizer's flat buffers: of all parameters of one dtype, in buckets that ranks share out.

    Attributes:
        dtypes: of parameters and of gradients.
        buckets: (elements, elements without the padding at the end) of each. The file has no such padding.
    """

    dtypes: tuple[torch.dtype, torch.dtype]
    buckets: tuple[tuple[int, int], ...]

    @property
    def elements(self) -> int:
        """In the file."""
        return sum(unpadded for _, unpadded in self.buckets)

    def begins(self) -> list[int]:
        """Of each bucket in the file."""
        return [sum(unpadded for _, unpadded in self.buckets[:index]) for index in range(len(self.buckets))]

    def slices(self, ranks: Sequence[int]) -> Int64Array:
        """Who has what of the flat tensors in the file; see `SlicedTensor`."""
        rows = []
        for begin, (padded, unpadded) in zip(self.begins(), self.buckets, strict=True):
            share = padded // len(ranks)
            bounds = np.minimum(np.arange(len(ranks) + 1, dtype=np.int64) * share, unpadded) + begin
            rows.append(np.stack([bounds[:-1], bounds[1:], np.array(ranks, np.int64)], axis=1))
        table = np.concatenate(rows) if rows else np.zeros((0, 3), np.int64)
        return table[table[:, 0] < table[:, 1]]


@dataclass(frozen=True)
class _Known:
    """What other ranks must know of one, to lay out a file that it closes.

    Attributes:
        path: of its file.
        buffers: of each of its optimizers; None of one whose state another rank's file has.
    """

    path: str
    buffers: tuple[tuple[_Buffer, ...] | None, ...]


class _Sharded:
    """The state that distributed optimizers have for each parameter: `distrib_optim.pt`."""

    def __init__(self, each: Sequence[Any], place: ModelRank) -> None:
        self._each = list(each)
        self._ranks = [dist.get_process_group_ranks(one.data_parallel_group) for one in each]
        rank = dist.get_rank()
        self._buffers = [tuple(map(_buffer_of, one.buffers)) for one in each]
        own = [
            buffers if ranks[0] == rank else None
            for buffers, ranks in zip(self._buffers, self._ranks, strict=True)
        ]
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, _Known(place.optimizer_path, tuple(own)))
        self._states = [ParameterStates(one) for one in each]
        self._closers = {ranks[0]: said[ranks[0]] for ranks in self._ranks}
        self._slices = [
            [_own_or_all(buffer.slices(ranks), ranks[0], rank) for buffer in buffers]
            for buffers, ranks in zip(self._buffers, self._ranks, strict=True)
        ]

    def paths(self) -> tuple[str, ...]:
        return tuple(known.path for known in self._closers.values())

    def capture(self) -> list[SharedFile]:
        return [
            SharedFile(known.path, closer, self._content(closer, known))
            for closer, known in self._closers.items()
        ]

    def _content(self, closer: int, known: _Known) -> Any:
        records = [
            None if buffers is None else self._record(index, buffers, self._ranks[index][0] == closer)
            for index, buffers in enumerate(known.buffers)
        ]
        return records if len(records) > 1 else records[0]

    def _record(self, index: int, buffers: Sequence[_Buffer], mine: bool) -> dict[Any, Any]:
        """What get_parameter_state_dp_zero gathers; `mine`: this rank has slices of it."""
        record: dict[Any, Any] = {"buckets_coalesced": True}
        for number, buffer in enumerate(buffers):
            pieces = dict(self._pieces(index, number)) if mine else {}
            slices = self._slices[index][number] if mine else np.zeros((0, 3), np.int64)
            record[number] = {
                buffer.dtypes: {
                    **{
                        state: SlicedTensor(torch.float32, (buffer.elements,), slices, pieces.get(state, ()))
                        for state in STATES
                    },
                    "numel_unpadded": buffer.elements,
                }
            }
        return record

    def _pieces(self, index: int, number: int) -> Iterator[tuple[str, tuple[tuple[int, torch.Tensor], ...]]]:
        placed = sorted(self._placed(index, number), key=lambda one: one[0])
        states = [(begin, self._states[index].saved(param)) for begin, param in placed]
        for state in STATES:
            yield state, tuple((begin, tensors[state]) for begin, tensors in states)

    def _placed(self, index: int, number: int) -> Iterator[tuple[int, torch.nn.Parameter]]:
        """Parameters of which this rank has a part: where that begins in the file, in elements."""
        begins = self._buffers[index][number].begins()
        for of_dtypes in self._each[index].gbuf_ranges[number].values():
            for begin, of_bucket in zip(begins, of_dtypes, strict=True):
                for param, ranges in of_bucket["param_map"].items():
                    yield begin + ranges["gbuf_world_in_bucket"].start, param

    def match(self, _: str, stored: Any, matching: Matching) -> None:
        for index, ranks in enumerate(self._ranks):
            where = path = self._closers[ranks[0]].path
            content = stored[path]
            if len(self._each) > 1:
                where = f"{path}: optimizer {index}"
                content = content[index] if isinstance(content, list) and len(content) > index else None
            self._match_one(where, index, content, matching)

    def _match_one(self, name: str, index: int, content: Any, matching: Matching) -> None:
        if below(content, "buckets_coalesced") is not True:
            matching.differences.append(
                f"{name}: not the state of a distributed optimizer, whole and in buckets"
            )
            return
        for number, buffer in enumerate(self._buffers[index]):
            flat = below(below(content, number), buffer.dtypes)
            elements = below(flat, "numel_unpadded")
            if elements != buffer.elements:
                matching.differences.append(
                    f"{name}.{number}: {buffer.elements} elements of {buffer.dtypes[0]} here, "
                    f"{elements} in the checkpoint"
                )
                continue
            wrong = [state for state in STATES if not _is_flat(below(flat, state), elements)]
            matching.differences += [
                f"{name}.{number}: no {state} of {elements} float32 in the checkpoint" for state in wrong
            ]
            for begin, param in () if wrong else self._placed(index, number):
                for key, live in self._states[index].to_load(param).items():
                    matching.into_slice(f"{name}.{number}.{key}", flat[key], begin, live)


def _own_or_all(slices: Int64Array, closer: int, rank: int) -> Int64Array:
    """All slices on the rank that closes the file; on others theirs, so that their plans do not grow."""
    return slices if rank == closer else slices[slices[:, 2] == rank]


def _is_flat(stored: Any, elements: int) -> bool:
    is_tensor = isinstance(stored, StoredTensor)
    return is_tensor and stored.shape == (elements,) and stored.dtype == torch.float32


def _buffer_of(buffer: Any) -> _Buffer:
    buckets = tuple((int(b.grad_data.numel()), int(b.numel_unpadded)) for b in buffer.buckets)
    return _Buffer((buffer.param_dtype, buffer.grad_dtype), buckets)
