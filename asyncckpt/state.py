"""Live training objects <-> one tree of named leaves.

The tree has one branch per object, in this order, whatever the layout:

    model         fully qualified name -> tensor
    optimizer     state: {name of parameter: {...}}, param_groups: [{..., params: [names]}]
    lr_scheduler, dataloader, extra      what their state_dict() says
    rng           python, numpy, torch (and cuda: one state per device)
    step          the step number

Several optimizers (or schedulers) given as a sequence or mapping become one branch each, under their
index or name. The names are those of torch.distributed.checkpoint.state_dict, so that stock tools find
what they expect.

Guarantees:
- `capture` reads; it steps no optimizer and launches nothing but the copies it declares.
- `match` changes no live value; it returns where stored tensors go and what is left to do after they
  arrived. Everything that does not fit is listed at once.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from . import arrays
from .devices import devices_of, in_use
from .errors import LeafError, OptionError
from .formats.inert import brief
from .shards import local_of
from .tree import Matching, StoredTensor, describe, flatten


@runtime_checkable
class Stateful(Protocol):
    """Anything with torch's pair of methods."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


# ---------------------------------------------------------------------------- one section per object


class Section(Protocol):
    """One branch of the tree."""

    def capture(self) -> Any:
        """The branch as it is now."""

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        """Say where the stored branch goes."""


def unwrapped(model: Any) -> Any:
    """The user's own module, without what torch wraps around it."""
    while isinstance(model, torch.nn.Module):
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # noqa: SLF001 -- of torch.compile
            model = model.get_submodule("_orig_mod")
        else:
            break
    return model


_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def own_name(key: str) -> str:
    """A parameter's name as the user's module has it; what stock DCP calls its fully qualified name."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    return key


class ModelSection:
    """A module's state_dict, under its own names: what wraps a module inside it leaves no trace."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def capture(self) -> Any:
        return {own_name(key): value for key, value in self.model.state_dict().items()}

    def buffers(self) -> set[int]:
        """Addresses of the tensors that forward may change."""
        if not isinstance(self.model, torch.nn.Module):
            return set()
        return {local_of(buffer).data_ptr() for buffer in self.model.buffers()}

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        theirs = self.model.state_dict()
        names = {own_name(key): key for key in theirs}
        live = {name: theirs[key] for name, key in names.items()}
        stored = _by_key(stored, live)
        own = None
        if isinstance(self.model, torch.nn.Module):
            own = {local_of(t).data_ptr() for t in [*self.model.parameters(), *self.model.buffers()]}
        rest: dict[str, Any] = {}  # what only the module itself can put in its place
        for key, value in live.items():
            if key not in stored:
                matching.missing.append(f"{name}.{key}")
            elif isinstance(value, torch.Tensor) and (own is not None and local_of(value).data_ptr() in own):
                matching.into(f"{name}.{key}", stored[key], value)
            elif isinstance(value, torch.Tensor) != isinstance(stored[key], StoredTensor):
                matching.differences.append(f"{name}.{key}: a tensor on one side only")
            else:
                rest[names[key]] = matching.fresh(f"{name}.{key}", stored[key])
        matching.unexpected += [f"{name}.{key}" for key in stored if key not in live]
        if not isinstance(self.model, torch.nn.Module):
            matching.afterwards.append(lambda: self.model.load_state_dict(rest))
        elif _minds_loading(self.model):
            # Tensors are in place already; the module only hears of it, as it would from stock torch.
            theirs.update(rest)
            matching.afterwards.append(lambda: self.model.load_state_dict(theirs, strict=False))
        elif rest:
            matching.afterwards.append(lambda: self.model.load_state_dict(rest, strict=False))


def _minds_loading(model: torch.nn.Module) -> bool:
    """Whether some module of the user's does more on load_state_dict than take tensors."""
    return any(
        module._load_state_dict_post_hooks  # noqa: SLF001 -- there is no public way to ask
        or module._load_state_dict_pre_hooks  # noqa: SLF001
        or (
            not type(module).__module__.startswith("torch.")
            and (
                type(module).load_state_dict is not torch.nn.Module.load_state_dict
                or type(module)._load_from_state_dict is not torch.nn.Module._load_from_state_dict  # noqa: SLF001
            )
        )
        for module in model.modules()
    )


def _by_key(stored: Any, live: Mapping[str, Any]) -> dict[str, Any]:
    """A model's branch by the keys of its state_dict, also where a file keeps it nested."""
    if not isinstance(stored, Mapping):
        return {}
    if all(key in stored for key in live):
        return dict(stored)
    nested = {leaf.name: leaf.value for leaf in flatten(stored)}
    return {**nested, **{key: stored[key] for key in live if key in stored}}


class OptimizerSection:
    """A torch optimizer, with parameters called by their names in the model.

    Values go straight into the optimizer's own dictionaries: `Optimizer.load_state_dict` would cast
    every moment to its parameter's dtype, and `_init_optim_state` of stock DCP steps the optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]) -> None:
        self.optimizer = optimizer
        self._names = names

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
        by_name = _by_parameter(stored, set(names.values()))
        matching.unexpected += [f"{where}.{key}" for key in by_name if key not in set(names.values())]
        state = self.optimizer.state
        group_of = {param: group for group in self.optimizer.param_groups for param in group["params"]}
        for param, param_name in names.items():
            values: dict[str, Any] = {}
            live = state.get(param, {})
            for key, value in by_name.get(param_name, {}).items():
                leaf = f"{where}.{param_name}.{key}"
                here = live.get(key)
                if isinstance(here, torch.Tensor) and isinstance(value, StoredTensor) and _fits(here, value):
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


def _fits(live: torch.Tensor, stored: StoredTensor) -> bool:
    return tuple(live.shape) == stored.shape and live.dtype == stored.dtype


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


class StatefulSection:
    """Anything else: what state_dict() returns is what load_state_dict() gets back."""

    def __init__(self, owner: Stateful) -> None:
        self.owner = owner

    def capture(self) -> Any:
        return self.owner.state_dict()

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        value = matching.fresh(name, stored)
        matching.afterwards.append(lambda: self.owner.load_state_dict(value) and None)


class ValueSection:
    """A plain dict that the user handed over: on load, tensors and objects in it are filled in place, other
    values are replaced; so is a tensor of another form, unless it is trained, by one on the same device.
    Tensors are also looked for in dicts and lists inside it.

    CuPy arrays, also in dicts inside it, are saved as tensors and filled in place; one of another form does
    not fit. See `arrays` for what is ordered and where arrays are not looked for.
    """

    def __init__(self, values: dict[str, Any], name: str = "extra") -> None:
        self.values = values
        self._name = name
        self._array_devices: set[int] = set()  # of the last capture

    def capture(self) -> Any:
        self._array_devices = set()
        return {
            key: v.state_dict()
            if isinstance(v, Stateful)
            else arrays.as_tensors(f"{self._name}.{key}", v, self._array_devices)
            for key, v in self.values.items()
        }

    def hold_back_arrays(self) -> None:
        """See `TrainingState.hold_back_arrays`."""
        arrays.order_after_torch(self._array_devices)

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        stored = stored if isinstance(stored, Mapping) else {}
        matching.missing += [f"{name}.{key}" for key in self.values if key not in stored]
        matching.unexpected += [f"{name}.{key}" for key in stored if key not in self.values]
        in_place = _InPlace(matching)
        for key, value in stored.items():
            owner = self.values.get(key)
            value = in_place.visit(f"{name}.{key}", owner, value)  # noqa: PLW2901
            fresh = matching.fresh(f"{name}.{key}", value)
            if isinstance(owner, Stateful):
                matching.afterwards.append(lambda owner=owner, fresh=fresh: owner.load_state_dict(fresh))  # type: ignore[misc]
            else:
                matching.afterwards.append(lambda key=key, fresh=fresh: self.values.update({key: fresh}))  # type: ignore[misc]
        matching.afterwards.append(lambda: arrays.order_after_torch(in_place.used))


class _InPlace:
    """Puts live tensors and arrays into the places of stored ones, to be filled.

    Attributes:
        used: devices of the arrays.
    """

    def __init__(self, matching: Matching) -> None:
        self._matching = matching
        self._seen: dict[int, Any] = {}  # stored containers, which may contain themselves
        self._made: dict[StoredTensor, torch.Tensor] = {}  # what is one tensor stays one
        self.used: set[int] = set()

    def visit(self, name: str, live: Any, stored: Any, *, arrays_too: bool = True) -> Any:
        """`stored` with what is live in it. `arrays_too`: here, arrays are saved as tensors."""
        if isinstance(live, torch.Tensor) and isinstance(stored, StoredTensor):
            if live.requires_grad or _fits(live, stored):
                self._matching.into(name, stored, live.detach())
                return live
            if stored not in self._made:
                self._made[stored] = self._matching.fresh(name, stored, like=live)
            return self._made[stored]
        if arrays_too and arrays.is_array(live):
            self._fill(name, live, stored)
            return live
        if id(stored) in self._seen:
            return self._seen[id(stored)]
        if isinstance(live, dict) and type(stored) in (dict, OrderedDict):
            arrays_too = arrays_too and type(live) is dict and all(type(key) is str for key in live)
            result = self._seen[id(stored)] = type(stored)()
            for key, child in stored.items():
                result[key] = self.visit(f"{name}.{key}", live.get(key), child, arrays_too=arrays_too)
            return result
        if isinstance(live, list) and type(stored) is list:
            items: list[Any] = []
            self._seen[id(stored)] = items
            for index, child in enumerate(stored):
                one = live[index] if index < len(live) else None
                items.append(self.visit(f"{name}.{index}", one, child, arrays_too=False))
            return items
        return stored

    def _fill(self, name: str, array: Any, stored: Any) -> None:
        try:
            tensor = arrays.as_tensor(name, array)
        except LeafError as error:
            self._matching.differences.append(str(error))
        else:
            self._matching.into(name, stored, tensor)
            self.used.add(tensor.get_device())


class GroupSection:
    """Several sections under their names."""

    def __init__(self, sections: Mapping[str, Section]) -> None:
        self.sections = dict(sections)

    def capture(self) -> Any:
        return {key: section.capture() for key, section in self.sections.items()}

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        stored = stored if isinstance(stored, Mapping) else {}
        matching.unexpected += [f"{name}.{key}" for key in stored if key not in self.sections]
        for key, section in self.sections.items():
            if key in stored:
                section.match(f"{name}.{key}", stored[key], matching)
            else:
                matching.missing.append(f"{name}.{key}")


class RngSection:
    """Every generator that a training step may draw from."""

    def capture(self) -> Any:
        states: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=True),  # noqa: NPY002 -- the global one is what there is to save
            "torch": torch.get_rng_state(),
        }
        if in_use():  # a run that uses no device is not made to
            states["cuda"] = torch.cuda.get_rng_state_all()
        return states

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        states = matching.fresh(name, stored)

        def restore() -> None:
            if "python" in states:
                version, internal, gauss = states["python"]
                random.setstate((version, tuple(internal), gauss))
            if "numpy" in states:
                np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
            if "torch" in states:
                torch.set_rng_state(states["torch"])
            if states.get("cuda") and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])

        matching.afterwards.append(restore)


# ---------------------------------------------------------------------------- the whole


class TrainingState:
    """All that a run is made of.

    Attributes:
        capture_s: seconds that each section took at the last capture.

    Raises:
        OptionError: something handed over has no state_dict / load_state_dict.
    """

    def __init__(
        self,
        *,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        dataloader: Any = None,
        extra: Any = None,
        per_rank: Any = None,
        rng: bool = True,
    ) -> None:
        model = unwrapped(model)
        self.sections: dict[str, Section] = {}
        self.capture_s: dict[str, float] = {}
        self.model = ModelSection(_stateful("model", model)) if model is not None else None
        if self.model is not None:
            self.sections["model"] = self.model
        names: dict[torch.Tensor, str] = {}
        if isinstance(model, torch.nn.Module):
            names = {param: own_name(name) for name, param in model.named_parameters()}
        self.optimizers: list[Any] = []

        def section(value: Any) -> Section:
            self.optimizers.append(value)
            plain = isinstance(value, torch.optim.Optimizer) and (
                type(value).load_state_dict is torch.optim.Optimizer.load_state_dict
            )
            return OptimizerSection(value, names) if plain else StatefulSection(value)

        self._add("optimizer", optimizer, section)
        self._add("lr_scheduler", lr_scheduler, StatefulSection)
        self._add("dataloader", dataloader, StatefulSection)
        for name, values in (("extra", extra), ("per_rank", per_rank)):
            if isinstance(values, dict) and not isinstance(values, Stateful):
                self.sections[name] = ValueSection(values, name)
            else:
                self._add(name, values, StatefulSection)
        if not self.sections:
            raise OptionError("there is nothing to save: pass a model, an optimizer, or extra")
        if rng:
            self.sections["rng"] = RngSection()

    def _add(self, name: str, value: Any, make: Callable[[Any], Section]) -> None:
        if value is None:
            return
        if isinstance(value, Stateful):
            self.sections[name] = make(value)
        elif isinstance(value, Mapping):
            self.sections[name] = GroupSection(
                {str(k): make(_stateful(f"{name}[{k!r}]", v)) for k, v in value.items()}
            )
        elif isinstance(value, list | tuple):
            self.sections[name] = GroupSection(
                {str(k): make(_stateful(f"{name}[{k}]", v)) for k, v in enumerate(value)}
            )
        else:
            _stateful(name, value)

    def capture(self, step: int) -> dict[str, Any]:
        """The tree at this moment. Tensors are the live ones, or aliases of them."""
        tree: dict[str, Any] = {}
        for name, section in self.sections.items():
            began_s = time.perf_counter()
            tree[name] = section.capture()
            self.capture_s[name] = time.perf_counter() - began_s
        tree["step"] = step
        return tree

    def devices(self) -> list[int]:
        """Ordinals of the CUDA devices that hold parameters or buffers now; others may come."""
        tensors: list[Any] = []
        if self.model is not None and isinstance(self.model.model, torch.nn.Module):
            tensors += [*self.model.model.parameters(), *self.model.model.buffers()]
        for optimizer in self.optimizers:
            for group in getattr(optimizer, "param_groups", ()):
                tensors += group["params"]
        return sorted(devices_of(tensors))

    def hold_back_arrays(self) -> None:
        """Let the streams on which CuPy works, where `extra` held arrays at the last capture, wait for what
        torch's current streams have now. The host does not wait."""
        for name in ("extra", "per_rank"):
            section = self.sections.get(name)
            if isinstance(section, ValueSection):
                section.hold_back_arrays()

    def match(self, tree: Mapping[str, Any]) -> Matching:
        """Where everything in a stored tree goes. Changes nothing yet."""
        matching = Matching()
        for name, section in self.sections.items():
            if name in tree:
                section.match(name, tree[name], matching)
            else:
                matching.missing_sections.append(name)
        known = {*self.sections, "step", "rng"}  # generators may be left alone: save_rng=False
        matching.unexpected_sections += [name for name in tree if name not in known]
        return matching


def _stateful(name: str, value: Any) -> Any:
    if not isinstance(value, Stateful):
        raise OptionError(f"{name}: {type(value).__name__} has no state_dict() and load_state_dict()")
    return value
