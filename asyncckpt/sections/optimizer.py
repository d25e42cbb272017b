"""A torch optimizer's groups and state, under the names of its parameters."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import LeafError
from ..formats.inert import brief
from ..survey import entries_of, identities
from ..tree import Matching, StoredTensor, describe, fits
from . import SteadyBranch, SteadyPart


class _Seen(NamedTuple):
    """An optimizer's state, all but the values.

    Attributes:
        shape: what it looked like.
        params: names of what is stepped, by group.
        alive: those of them that nobody else here holds, as long as they are: what is at their addresses then
            is them. No others: torch does not swap tensors to which there are weak references.
        names: of the tensors of the state.
        others: (parameter, key) of the other values, in their order; no key where there is no value at all.
    """

    shape: object
    params: list[list[str]]
    alive: list[weakref.ref[torch.Tensor]]
    names: tuple[str, ...]
    others: list[tuple[str, str | None]]


class OptimizerSection:
    """A torch optimizer, with parameters called by their names in the model.

    Values go straight into the optimizer's own dictionaries: `Optimizer.load_state_dict` would cast
    every moment to its parameter's dtype, and `_init_optim_state` of stock DCP steps the optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]) -> None:
        self.optimizer = optimizer
        self._names = names
        self._seen: _Seen | None = None

    def steady(self) -> SteadyBranch | None:
        params = [[*group["params"]] for group in self.optimizer.param_groups]
        owners, values = list(self.optimizer.state), list(self.optimizer.state.values())
        found = entries_of(values, torch.Tensor)
        if not values or found is None:
            return None
        lengths, keys, are_tensors, tensors, others = found
        # Of parameters, the addresses of the objects do, while they are alive; those with names always are.
        shape = (list(map(identities, params)), identities(owners), lengths, keys, are_tensors)
        seen = self._seen
        if seen is None or seen.shape != shape or any(one() is None for one in seen.alive):
            seen = self._look(shape, params, owners, lengths, keys, are_tensors)
            if seen is None:
                return None
            self._seen = seen

        def rest() -> Any:
            groups = [
                {**group, "params": [*names]}
                for group, names in zip(self.optimizer.param_groups, seen.params, strict=True)
            ]
            state: dict[str, dict[str, Any]] = {}
            left = iter(others)
            for name, key in seen.others:
                of_param = state.setdefault(name, {})
                if key is not None:
                    of_param[key] = next(left)
            return {**({"state": state} if state else {}), "param_groups": groups}

        return SteadyBranch([SteadyPart("state.", seen.names, tensors)], rest, [])

    def _look(
        self,
        shape: object,
        params: list[list[torch.Tensor]],
        owners: list[torch.Tensor],
        lengths: bytes,
        keys: list[Any],
        are_tensors: bytes,
    ) -> _Seen | None:
        called = self._named()
        if not all(owner in called for owner in owners) or not all(type(key) is str for key in keys):
            return None  # capture says what is wrong; a mapping with other keys is one leaf
        names: list[str] = []
        others: list[tuple[str, str | None]] = []
        entries = iter(zip(keys, are_tensors, strict=True))
        for owner, length in zip(owners, np.frombuffer(lengths, np.int64).tolist(), strict=True):
            name = called[owner]
            if not length:
                others.append((name, None))
            for key, is_tensor in islice(entries, length):
                if is_tensor:
                    names.append(f"{name}.{key}")
                else:
                    others.append((name, key))
        return _Seen(
            shape,
            [[called[param] for param in group] for group in params],
            [weakref.ref(param) for group in params for param in group if param not in self._names],
            tuple(names),
            others,
        )

    def _named(self) -> dict[torch.Tensor, str]:
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        return {param: self._names.get(param, f"unnamed.{index}") for index, param in enumerate(params)}

    def capture(self) -> Any:
        names = self._named()
        state: dict[str, dict[str, Any]] = {}
        for param, values in self.optimizer.state.items():
            if param not in names or not isinstance(values, Mapping):
                what = names.get(param, brief(param))
                raise LeafError(
                    f"state of {type(self.optimizer).__name__} under {what} is not a mapping that belongs to "
                    f"a parameter; hand the optimizer over in extra, which goes by its state_dict()"
                )
            state[names[param]] = dict(values)
        groups = [
            {**group, "params": [names[param] for param in group["params"]]}
            for group in self.optimizer.param_groups
        ]
        return {"state": state, "param_groups": groups}

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        names = self._named()
        stored = _renamed(stored, list(names.values()))
        groups = stored.get("param_groups", [])
        if len(groups) != len(self.optimizer.param_groups):
            here = len(self.optimizer.param_groups)
            matching.differences.append(f"{name}.param_groups: {here} here, {len(groups)} in the checkpoint")
            return
        for index, (live_group, stored_group) in enumerate(
            zip(self.optimizer.param_groups, groups, strict=True)
        ):
            where = f"{name}.param_groups.{index}"
            ours = [names[param] for param in live_group["params"]]
            if list(stored_group.get("params", [])) != ours:
                there = stored_group.get("params", [])
                odd = sorted(map(str, set(ours) ^ set(there)))[:5]
                matching.differences.append(
                    f"{where}.params: {len(ours)} here, {len(there)} in the checkpoint"
                    + (f"; only on one side: {', '.join(odd)}" if odd else "; their order differs")
                )
                continue
            self._match_group(where, live_group, stored_group, matching)
        self._match_state(f"{name}.state", names, stored.get("state", {}), matching)
        for hook in self.optimizer._optimizer_load_state_dict_post_hooks.values():  # noqa: SLF001
            matching.afterwards.append(lambda hook=hook: hook(self.optimizer))  # type: ignore[misc]

    def _match_group(
        self, where: str, live: dict[str, Any], stored: Mapping[str, Any], matching: Matching
    ) -> None:
        matching.missing += [f"{where}.{key}" for key in live if key not in stored]
        values: dict[str, Any] = {}
        for key, value in stored.items():
            if key == "params":
                continue
            if isinstance(live.get(key), torch.Tensor) and isinstance(value, StoredTensor):
                matching.into(f"{where}.{key}", value, live[key])
            else:
                values[key] = matching.fresh(f"{where}.{key}", value)
        matching.afterwards.append(lambda: live.update(values))

    def _match_state(
        self, where: str, names: Mapping[torch.Tensor, str], stored: Any, matching: Matching
    ) -> None:
        known = set(names.values())
        by_name = _by_parameter(stored, known)
        matching.unexpected += [f"{where}.{key}" for key in by_name if key not in known]
        state = self.optimizer.state
        group_of = {param: group for group in self.optimizer.param_groups for param in group["params"]}
        for param, param_name in names.items():
            values: dict[str, Any] = {}
            live = state.get(param, {})
            for key, value in by_name.get(param_name, {}).items():
                leaf = f"{where}.{param_name}.{key}"
                here = live.get(key)
                if isinstance(here, torch.Tensor) and isinstance(value, StoredTensor) and fits(here, value):
                    matching.into(leaf, value, here)
                    values[key] = here
                else:
                    if isinstance(value, StoredTensor) and not self._plausible(key, value, param, here):
                        matching.differences.append(
                            f"{leaf}: {describe(value.dtype, value.shape)} in the checkpoint does not fit "
                            f"a parameter of {describe(param.dtype, param.shape)}"
                        )
                        continue
                    like = here if isinstance(here, torch.Tensor) else _like(key, param, group_of[param])
                    values[key] = matching.fresh(leaf, value, like)
            matching.afterwards.append(lambda param=param, values=values: _replace(state, param, values))  # type: ignore[misc]

    def _plausible(self, key: str, stored: StoredTensor, param: torch.Tensor, live: Any) -> bool:
        """Whether `stored` can be the state `key` of this parameter."""
        if not type(self.optimizer).__module__.startswith("torch.optim"):
            return True  # its state may have any shape, and change it over time
        if isinstance(live, torch.Tensor):
            return False  # there is such a state, and it has another shape or dtype
        return key not in _ELEMENTWISE or stored.shape in ((), tuple(param.shape))


# State with one value for each element of its parameter, in the optimizers of torch.
_ELEMENTWISE = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg"}
    | {"acc_delta", "sum", "ax", "prev", "step_size", "master_param"}
)


def _renamed(stored: Any, names: Sequence[str]) -> dict[str, Any]:
    """Optimizer state by name, also where a file numbers parameters as `Optimizer.state_dict` does."""
    if not isinstance(stored, Mapping):
        return {}

    def name_of(param: Any) -> Any:
        return names[param] if isinstance(param, int) and 0 <= param < len(names) else param

    groups = [
        {**group, "params": [name_of(param) for param in group.get("params", [])]}
        for group in stored.get("param_groups", [])
    ]
    return {
        "state": {name_of(param): v for param, v in stored.get("state", {}).items()},
        "param_groups": groups,
    }


def _by_parameter(stored: Any, names: set[str]) -> dict[str, dict[str, Any]]:
    """Optimizer state by parameter; files without planner data keep "name.key" flat."""
    result: dict[str, dict[str, Any]] = {}
    for key, value in stored.items() if isinstance(stored, Mapping) else ():
        if isinstance(value, Mapping):
            result[str(key)] = dict(value)
        else:
            param_name, _, state_name = str(key).rpartition(".")
            result.setdefault(param_name if param_name in names else str(key), {})[state_name] = value
    return result


# Numbers that torch keeps on the host, unless the optimizer runs on the device as a whole (_init_group of
# torch/optim/adam.py, of nadam.py).
_COUNTERS = frozenset({"step", "mu_product"})


def _like(key: str, param: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor | None:
    """Where state lives that is not there yet: beside the parameter, or (None) on the host."""
    on_host = key in _COUNTERS and not (group.get("capturable") or group.get("fused"))
    return None if on_host else param


def _replace(state: Any, param: torch.Tensor, values: dict[str, Any]) -> None:
    if values:
        state[param] = values
    else:
        state.pop(param, None)
