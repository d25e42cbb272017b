"""Megatron-core's objects as sections: optimizers' groups and parameters, generators, schedulers.

What is the same whichever of Megatron's formats they are saved in.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...errors import LeafError, LoadError, OptionError
from ...sections import Section
from ...tree import Matching, StoredTensor

STATES = ("param", "exp_avg", "exp_avg_sq")  # of each parameter, in the order of the file
PLAIN = ("Float16OptimizerWithFloat16Params", "FP32Optimizer")
_SHARDED = ("DistributedOptimizer",)
_ADAMS = ("Adam", "AdamW", "FusedAdam")  # torch's, Apex's, Transformer Engine's
_GROUP_NAMES = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")  # what tells groups apart


def innermost(chunk: Any) -> Any:
    """The model itself, without what Megatron wraps around it."""
    while type(chunk).__name__ in ("DistributedDataParallel", "Float16Module") and hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


# ---------------------------------------------------------------------------- optimizers


def chained(optimizer: Any) -> list[Any]:
    """The optimizers that one is made of, all of kinds that are known."""
    each = list(getattr(optimizer, "chained_optimizers", [optimizer]))
    for one in each:
        _check_known(one)
    names = {type(one).__name__ in PLAIN for one in each}
    if len(names) > 1 or type(optimizer).__name__ not in ("ChainedOptimizer", *PLAIN, *_SHARDED):
        kinds = ", ".join(type(one).__name__ for one in [optimizer, *each])
        raise OptionError(f"optimizer: this combination is not known here: {kinds}")
    return each


def _check_known(optimizer: Any) -> None:
    kind, config = type(optimizer).__name__, getattr(optimizer, "config", None)
    inner = type(inner_of(optimizer)).__name__
    if kind not in (*PLAIN, *_SHARDED):
        raise OptionError(f"optimizer: {kind} is not known here; there are: {', '.join((*_SHARDED, *PLAIN))}")
    if kind in _SHARDED and inner not in _ADAMS:
        raise OptionError(f"optimizer: {kind} over {inner}; Megatron's file has room for Adam's state alone")
    if getattr(config, "use_precision_aware_optimizer", False):
        raise OptionError(
            f"optimizer: {kind} with use_precision_aware_optimizer scales its state; not known here"
        )
    if getattr(getattr(optimizer, "ddp_config", None), "use_megatron_fsdp", False):
        raise OptionError(f"optimizer: {kind} with use_megatron_fsdp has no legacy tree; use layout 'dcp'")


def inner_of(optimizer: Any) -> Any:
    """The optimizer of torch inside."""
    return optimizer.optimizer


def _counts_in_groups(inner: Any) -> bool:
    """Whether steps are counted there, as Apex and Transformer Engine do; torch does so in each state."""
    return type(inner).__name__ == "FusedAdam"


class Sync:
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


class Synced:
    """A section before whose capture parameters are made whole."""

    def __init__(self, section: Section, sync: Sync) -> None:
        self._section = section
        self._sync = sync

    def capture(self) -> Any:
        self._sync()
        return _with_own_scaler(self._section.capture())

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        self._section.match(name, stored, matching)


class Groups:
    """What a distributed optimizer has besides its parameters' state: groups, step, loss scale."""

    def __init__(self, optimizer: Any, each: Sequence[Any]) -> None:
        self._optimizer = optimizer
        self._each = each

    def capture(self) -> Any:
        for one in self._each:
            if not inner_of(one).state and any(group["params"] for group in inner_of(one).param_groups):
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
            self.match_one(where, one, values, matching)

    @staticmethod
    def match_one(name: str, optimizer: Any, stored: Any, matching: Matching) -> None:
        inner, live = inner_of(optimizer), inner_of(optimizer).param_groups
        groups = below(below(stored, "optimizer"), "param_groups")
        if not isinstance(groups, list) or len(groups) != len(live):
            count = len(groups) if isinstance(groups, list) else 0
            matching.differences.append(f"{name}: {len(live)} groups here, {count} in the checkpoint")
            return
        if not all(isinstance(group, Mapping) for group in groups):
            matching.differences.append(f"{name}: a group in the checkpoint is no group")
            return
        by_name = {name_of(group): group for group in groups}
        if len(by_name) == len(groups) and {*by_name} != {name_of(group) for group in live}:
            matching.differences.append(f"{name}: other groups in the checkpoint: {sorted(by_name, key=str)}")
            return
        if len(by_name) == len(groups):
            groups = [by_name[name_of(group)] for group in live]
        for group, saved in zip(live, groups, strict=True):
            counts = "step" in group or (group["params"] and not _counts_in_groups(inner))
            if counts and not _is_count(saved.get("step")):
                matching.differences.append(f"{name}: no step of group {name_of(group)} in the checkpoint")
                return
        values = matching.fresh(name, groups)
        scaler = matching.fresh(f"{name}.grad_scaler", below(stored, "grad_scaler"))

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

        matching.afterwards.append(told(name, apply))


def below(value: Any, key: Any) -> Any:
    """What a file has below a key; None where it has nothing, or something else than a dict."""
    return value.get(key) if isinstance(value, Mapping) else None


def told(name: str, act: Callable[[], None]) -> Callable[[], None]:
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


def name_of(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a group from others; NeMo has another word for some of it."""
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in _GROUP_NAMES)


# ---------------------------------------------------------------------------- parameters


class ParameterStates:
    """What a distributed optimizer has for each parameter of which this rank has a part; flat tensors."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._mains: dict[Any, torch.Tensor] = {}

    def main(self, param: torch.nn.Parameter) -> Any:
        """The optimizer's own part of a model's parameter."""
        # Not by model_param_group_index_map, which is wrong where a group has parameters of two dtypes.
        if param not in self._mains:
            one = self._optimizer
            pairs = (
                (one.model_float16_groups, one.shard_fp32_from_float16_groups),
                (one.model_fp32_groups, one.shard_fp32_groups),
            )
            self._mains = {
                model: main
                for models, mains in pairs
                for of_group in zip(models, mains, strict=True)
                for model, main in zip(*of_group, strict=True)
            }
        return self._mains[param]

    def saved(self, param: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        main = self.main(param)
        state = inner_of(self._optimizer).state.get(main, {})
        for key in STATES[1:]:
            if key not in state:
                raise LeafError(f"optimizer: a parameter has no {key}; Megatron's tree has no place for that")
        return {"param": main, **{key: state[key] for key in STATES[1:]}}

    def to_load(self, param: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """What a load fills; made where the optimizer has made no step. Not the part itself where it is the
        model's memory: that comes with the model."""
        main = self.main(param)
        state = inner_of(self._optimizer).state
        values = {key: state.get(main, {}).get(key) for key in STATES[1:]}
        made = {key: torch.zeros_like(main.detach()) for key, value in values.items() if value is None}
        values |= made
        if made:  # as it is before Adam's first step, should nothing come of the load
            state[main] = {**self._counter(main), **values}
        if main.untyped_storage().data_ptr() != param.untyped_storage().data_ptr():
            return {"param": main.detach(), **values}
        return values

    def _counter(self, main: torch.Tensor) -> dict[str, torch.Tensor]:
        """Where torch's Adam counts."""
        inner = inner_of(self._optimizer)
        if _counts_in_groups(inner):
            return {}
        on_device = inner.defaults.get("capturable") or inner.defaults.get("fused")
        return {"step": torch.zeros((), device=main.device if on_device else "cpu")}


# ---------------------------------------------------------------------------- the rest


class Generators:
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
        matching.afterwards.append(told(name, restore))


class Scheduler:
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

        matching.afterwards.append(told(name, apply))


class ForMegatron:
    """What is in the file for Megatron-LM's own load; nothing of ours reads it."""

    write_only = True

    def __init__(self, value: Callable[[], Any]) -> None:
        self._value = value

    def capture(self) -> Any:
        return self._value()

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        """Nothing: whoever trains has values of its own."""
