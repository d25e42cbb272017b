"""Megatron-core: its parallel groups, optimizers and generators, in Megatron-LM's own tree.

    ckpt = megatron.checkpointer(root, model=chunks, optimizer=optimizer, opt_param_scheduler=scheduler)

`distrib_optim.pt` is written without a gather: every rank of a data-parallel group writes its slice. Which
elements those are follows from what each rank knows of its buffers; what it does not know of other ranks
(which of them writes which file) is exchanged once, when the checkpointer is made.

Sources: megatron/core/optimizer/distrib_optimizer.py (get_parameter_state_dp_zero), optimizer.py
(ChainedOptimizer.save_parameter_state), Megatron-LM's megatron/training/checkpointing.py. Read from 0.13 to
0.19, run with 0.16.1.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..checkpointer import AsyncCheckpointer
from ..errors import LeafError, LoadError, OptionError
from ..formats.image import Int64Array
from ..layouts.megatron import ModelRank
from ..sections import Section, StatefulSection
from ..shared import SHARED_BRANCH, SharedFile, SlicedTensor
from ..tree import Matching, StoredTensor

_STATES = ("param", "exp_avg", "exp_avg_sq")  # of each parameter, in the order of the file
_SHARDED = ("DistributedOptimizer",)
_PLAIN = ("Float16OptimizerWithFloat16Params", "FP32Optimizer")
_ADAMS = ("Adam", "AdamW", "FusedAdam")  # torch's, Apex's, Transformer Engine's
_GROUP_NAMES = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")  # what tells groups apart


def checkpointer(
    root: str | os.PathLike[str],
    *,
    model: Any,
    optimizer: Any = None,
    opt_param_scheduler: Any = None,
    args: Any = None,
    also: Mapping[str, Callable[[], Any]] | None = None,
    **options: Any,
) -> AsyncCheckpointer:
    """An AsyncCheckpointer over Megatron's own tree. Collective: every rank calls it.

    Args:
        root: where `iter_0000050/` and the tracker are.
        model: the list of chunks that Megatron's get_model returns, or one of them.
        optimizer: of get_megatron_optimizer; with Adam, distributed or not, chained or not.
        opt_param_scheduler: OptimizerParamScheduler.
        args: Megatron-LM's arguments, kept in the model's file for its own load.
        also: further keys of that file, and what gives their values at a save; only Megatron-LM reads them.
        options: of AsyncCheckpointer.

    Raises:
        OptionError: an optimizer that nobody here knows; it is named.
    """
    state = state_of(model, optimizer, opt_param_scheduler, args, also)
    return AsyncCheckpointer(root, layout="megatron", **state, **options)


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
    inner = [_innermost(chunk) for chunk in chunks]
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


def _innermost(chunk: Any) -> Any:
    """The model itself, without what Megatron wraps around it."""
    while type(chunk).__name__ in ("DistributedDataParallel", "Float16Module") and hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


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
            each = _chained(optimizer)
            self._optimizers = [_inner(one) for one in each]
            sync = _Sync(chunks)
            if all(type(one).__name__ in _PLAIN for one in each):
                self._sections["optimizer"] = _Synced(StatefulSection(optimizer), sync)
            else:
                sharded = _Sharded(each, place)
                self._sections["optimizer"] = _Synced(_Groups(optimizer, each), sync)
                self._sections[SHARED_BRANCH] = sharded
        self._sections["rng"] = _Generators()
        if scheduler is not None:
            self._sections["lr_scheduler"] = _Scheduler(scheduler)
        self._sections.update({name: _ForMegatron(value) for name, value in for_megatron.items()})

    def sections(self) -> Mapping[str, Section]:
        return self._sections

    def optimizers(self) -> list[Any]:
        return self._optimizers


# ---------------------------------------------------------------------------- optimizers


def _chained(optimizer: Any) -> list[Any]:
    """The optimizers that one is made of, all of kinds that are known."""
    each = list(getattr(optimizer, "chained_optimizers", [optimizer]))
    for one in each:
        _check_known(one)
    names = {type(one).__name__ in _PLAIN for one in each}
    if len(names) > 1 or type(optimizer).__name__ not in ("ChainedOptimizer", *_PLAIN, *_SHARDED):
        kinds = ", ".join(type(one).__name__ for one in [optimizer, *each])
        raise OptionError(f"optimizer: this combination is not known here: {kinds}")
    return each


def _check_known(optimizer: Any) -> None:
    kind, config = type(optimizer).__name__, getattr(optimizer, "config", None)
    inner = type(_inner(optimizer)).__name__
    if kind not in (*_PLAIN, *_SHARDED):
        raise OptionError(
            f"optimizer: {kind} is not known here; there are: {', '.join((*_SHARDED, *_PLAIN))}"
        )
    if kind in _SHARDED and inner not in _ADAMS:
        raise OptionError(f"optimizer: {kind} over {inner}; Megatron's file has room for Adam's state alone")
    if getattr(config, "use_precision_aware_optimizer", False):
        raise OptionError(
            f"optimizer: {kind} with use_precision_aware_optimizer scales its state; not known here"
        )
    if getattr(getattr(optimizer, "ddp_config", None), "use_megatron_fsdp", False):
        raise OptionError(f"optimizer: {kind} with use_megatron_fsdp has no legacy tree; use layout 'dcp'")


def _inner(optimizer: Any) -> Any:
    """The optimizer of torch inside."""
    return optimizer.optimizer


def _counts_in_groups(inner: Any) -> bool:
    """Whether steps are counted there, as Apex and Transformer Engine do; torch does so in each state."""
    return type(inner).__name__ == "FusedAdam"


class _Sync:
    """Makes parameters whole whose gathers wait for the next forward (overlap_param_gather)."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._chunks = [
            chunk
            for chunk in chunks
            if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False)
        ]

    def __call__(self) -> None:
        for chunk in self._chunks:
            chunk.start_param_sync(force_sync=True)


class _Synced:
    """A section before whose capture parameters are made whole."""

    def __init__(self, section: Section, sync: _Sync) -> None:
        self._section = section
        self._sync = sync

    def capture(self) -> Any:
        self._sync()
        return _with_own_scaler(self._section.capture())

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        self._section.match(name, stored, matching)


class _Groups:
    """What a distributed optimizer has besides its parameters' state: groups, step, loss scale."""

    def __init__(self, optimizer: Any, each: Sequence[Any]) -> None:
        self._optimizer = optimizer
        self._each = each

    def capture(self) -> Any:
        for one in self._each:
            if not _inner(one).state and any(group["params"] for group in _inner(one).param_groups):
                raise LeafError(
                    "optimizer: it has made no step yet; Megatron's tree has no place for one without state"
                )
        return self._optimizer.state_dict()

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        several = stored if isinstance(stored, list) else [stored]
        if len(several) != len(self._each):
            matching.differences.append(
                f"{name}: {len(self._each)} optimizers here, {len(several)} in the checkpoint"
            )
            return
        for index, (one, values) in enumerate(zip(self._each, several, strict=True)):
            where = name if len(several) == 1 else f"{name}.{index}"
            self._match_one(where, one, values, matching)

    @staticmethod
    def _match_one(name: str, optimizer: Any, stored: Any, matching: Matching) -> None:
        inner, live = _inner(optimizer), _inner(optimizer).param_groups
        groups = _at(_at(stored, "optimizer"), "param_groups")
        if not isinstance(groups, list) or len(groups) != len(live):
            count = len(groups) if isinstance(groups, list) else 0
            matching.differences.append(f"{name}: {len(live)} groups here, {count} in the checkpoint")
            return
        if not all(isinstance(group, Mapping) for group in groups):
            matching.differences.append(f"{name}: a group in the checkpoint is no group")
            return
        by_name = {_name_of(group): group for group in groups}
        if len(by_name) == len(groups) and {*by_name} != {_name_of(group) for group in live}:
            matching.differences.append(f"{name}: other groups in the checkpoint: {sorted(by_name, key=str)}")
            return
        if len(by_name) == len(groups):
            groups = [by_name[_name_of(group)] for group in live]
        for group, saved in zip(live, groups, strict=True):
            counts = "step" in group or (group["params"] and not _counts_in_groups(inner))
            if counts and not _is_count(saved.get("step")):
                matching.differences.append(f"{name}: no step of group {_name_of(group)} in the checkpoint")
                return
        values = matching.fresh(name, groups)
        scaler = matching.fresh(f"{name}.grad_scaler", _at(stored, "grad_scaler"))

        def apply() -> None:
            for group, saved in zip(live, values, strict=True):
                group.update({key: value for key, value in saved.items() if key not in ("params", "step")})
                if "step" in group:  # of Apex and Transformer Engine; torch's Adam has it in its state
                    group["step"] = saved["step"]
                for param in group["params"]:
                    if "step" in inner.state.get(param, ()):
                        inner.state[param]["step"].fill_(saved["step"])
            if scaler is not None and getattr(optimizer, "grad_scaler", None) is not None:
                optimizer.grad_scaler.load_state_dict(scaler)

        matching.afterwards.append(_told(name, apply))


def _at(value: Any, key: Any) -> Any:
    """What a file has below a key; None where it has nothing, or something else than a dict."""
    return value.get(key) if isinstance(value, Mapping) else None


def _told(name: str, act: Callable[[], None]) -> Callable[[], None]:
    """`act`, which says whose it is, should an object of Megatron not take what a file has."""

    def told() -> None:
        try:
            act()
        except Exception as error:
            raise LoadError(
                f"{name} does not take what the checkpoint has, {type(error).__name__}: {error}"
            ) from error

    return told


def _is_count(value: Any) -> bool:
    """Whether a number of steps, perhaps in a tensor; a file may have anything there."""
    return isinstance(value, int | float) or (isinstance(value, StoredTensor) and value.shape in ((), (1,)))


def _with_own_scaler(state: Any) -> Any:
    """The state of optimizers; a loss scaler changes before the step that the fence holds."""
    if isinstance(state, list):
        return [_with_own_scaler(one) for one in state]
    if "grad_scaler" not in state:
        return state
    scaler = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state["grad_scaler"].items()}
    return {**state, "grad_scaler": scaler}


def _name_of(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a group from others; NeMo has another word for some of it."""
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in _GROUP_NAMES)


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
        self._mains: list[dict[Any, torch.Tensor]] = [{} for _ in each]
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
                        for state in _STATES
                    },
                    "numel_unpadded": buffer.elements,
                }
            }
        return record

    def _pieces(self, index: int, number: int) -> Iterator[tuple[str, tuple[tuple[int, torch.Tensor], ...]]]:
        placed = sorted(self._placed(index, number), key=lambda one: one[0])
        states = [(begin, self._states(index, param)) for begin, param in placed]
        for state in _STATES:
            yield state, tuple((begin, tensors[state]) for begin, tensors in states)

    def _placed(self, index: int, number: int) -> Iterator[tuple[int, torch.nn.Parameter]]:
        """Parameters of which this rank has a part: where that begins in the file, in elements."""
        begins = self._buffers[index][number].begins()
        for of_dtypes in self._each[index].gbuf_ranges[number].values():
            for begin, of_bucket in zip(begins, of_dtypes, strict=True):
                for param, ranges in of_bucket["param_map"].items():
                    yield begin + ranges["gbuf_world_in_bucket"].start, param

    def _main(self, index: int, param: torch.nn.Parameter) -> Any:
        """The optimizer's own, flat part of a model's parameter."""
        # Not by model_param_group_index_map, which is wrong where a group has parameters of two dtypes.
        if param not in self._mains[index]:
            one = self._each[index]
            pairs = (
                (one.model_float16_groups, one.shard_fp32_from_float16_groups),
                (one.model_fp32_groups, one.shard_fp32_groups),
            )
            self._mains[index] = {
                model: main
                for models, mains in pairs
                for of_group in zip(models, mains, strict=True)
                for model, main in zip(*of_group, strict=True)
            }
        return self._mains[index][param]

    def _states(self, index: int, param: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        main = self._main(index, param)
        state = _inner(self._each[index]).state.get(main, {})
        for key in _STATES[1:]:
            if key not in state:
                raise LeafError(f"optimizer: a parameter has no {key}; Megatron's tree has no place for that")
        return {"param": main, **{key: state[key] for key in _STATES[1:]}}

    def match(self, _: str, stored: Any, matching: Matching) -> None:
        for index, ranks in enumerate(self._ranks):
            where = path = self._closers[ranks[0]].path
            content = stored[path]
            if len(self._each) > 1:
                where = f"{path}: optimizer {index}"
                content = content[index] if isinstance(content, list) and len(content) > index else None
            self._match_one(where, index, content, matching)

    def _match_one(self, name: str, index: int, content: Any, matching: Matching) -> None:
        if _at(content, "buckets_coalesced") is not True:
            matching.differences.append(
                f"{name}: not the state of a distributed optimizer, whole and in buckets"
            )
            return
        for number, buffer in enumerate(self._buffers[index]):
            flat = _at(_at(content, number), buffer.dtypes)
            elements = _at(flat, "numel_unpadded")
            if elements != buffer.elements:
                matching.differences.append(
                    f"{name}.{number}: {buffer.elements} elements of {buffer.dtypes[0]} here, "
                    f"{elements} in the checkpoint"
                )
                continue
            wrong = [state for state in _STATES if not _is_flat(_at(flat, state), elements)]
            matching.differences += [
                f"{name}.{number}: no {state} of {elements} float32 in the checkpoint" for state in wrong
            ]
            for begin, param in () if wrong else self._placed(index, number):
                self._match_param(f"{name}.{number}", index, begin, param, flat, matching)

    def _match_param(
        self, name: str, index: int, begin: int, param: torch.nn.Parameter, flat: Any, matching: Matching
    ) -> None:
        main = self._main(index, param)
        state = _inner(self._each[index]).state
        if (
            main.untyped_storage().data_ptr() != param.untyped_storage().data_ptr()
        ):  # else the model's file has it
            matching.into_slice(f"{name}.param", flat["param"], begin, main.detach())
        values = {key: state.get(main, {}).get(key) for key in _STATES[1:]}
        made = {key: torch.zeros_like(main.detach()) for key, value in values.items() if value is None}
        for key, value in {**values, **made}.items():
            matching.into_slice(f"{name}.{key}", flat[key], begin, value)
        if made:  # as it is before Adam's first step, should nothing come of the load
            state[main] = {**self._counter(index, main), **values, **made}

    def _counter(self, index: int, main: torch.Tensor) -> dict[str, torch.Tensor]:
        """Where torch's Adam counts."""
        inner = _inner(self._each[index])
        if _counts_in_groups(inner):
            return {}
        on_device = inner.defaults.get("capturable") or inner.defaults.get("fused")
        return {"step": torch.zeros((), device=main.device if on_device else "cpu")}


def _own_or_all(slices: Int64Array, closer: int, rank: int) -> Int64Array:
    """All slices on the rank that closes the file; on others theirs, so that their plans do not grow."""
    return slices if rank == closer else slices[slices[:, 2] == rank]


def _is_flat(stored: Any, elements: int) -> bool:
    is_tensor = isinstance(stored, StoredTensor)
    return is_tensor and stored.shape == (elements,) and stored.dtype == torch.float32


def _buffer_of(buffer: Any) -> _Buffer:
    buckets = tuple((int(b.grad_data.numel()), int(b.numel_unpadded)) for b in buffer.buckets)
    return _Buffer((buffer.param_dtype, buffer.grad_dtype), buckets)


# ---------------------------------------------------------------------------- the rest


class _Generators:
    """Every generator that a step of Megatron draws from; of CUDA's, those of this rank's device."""

    def capture(self) -> Any:
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=True),  # noqa: NPY002 -- the global one is what Megatron saves
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state()],
            "tracker": get_cuda_rng_tracker().get_states(),
        }

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        states = matching.fresh(name, stored)

        def restore() -> None:
            version, internal, gauss = states["python"]
            random.setstate((version, tuple(internal), gauss))
            np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
            torch.set_rng_state(states["torch"])
            torch.cuda.set_rng_state(states["cuda"][0])
            get_cuda_rng_tracker().set_states(states["tracker"])

        missing = [key for key in ("python", "numpy", "torch", "cuda", "tracker") if key not in states]
        if missing:
            matching.differences.append(f"{name}: no state of {', '.join(missing)} in the checkpoint")
        matching.afterwards.append(_told(name, restore))


class _Scheduler:
    """OptimizerParamScheduler, whose load adds the steps in a checkpoint to those it has made."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def capture(self) -> Any:
        return self._scheduler.state_dict()

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        values = matching.fresh(name, stored)

        def apply() -> None:
            self._scheduler.num_steps = 0
            self._scheduler.load_state_dict(values)

        matching.afterwards.append(_told(name, apply))


class _ForMegatron:
    """What is in the file for Megatron-LM's own load; nothing of ours reads it."""

    write_only = True

    def __init__(self, value: Callable[[], Any]) -> None:
        self._value = value

    def capture(self) -> Any:
        return self._value()

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        """Nothing: whoever trains has values of its own."""
