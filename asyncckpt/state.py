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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from .errors import LeafError, OptionError

Path = tuple[str | int, ...]


@runtime_checkable
class Stateful(Protocol):
    """Anything with torch's pair of methods."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


class Leaf(NamedTuple):
    """A value of the tree that is saved as one: a tensor, or python that is pickled."""

    name: str  # the path, joined with "."
    path: Path
    value: Any


def flatten(tree: Mapping[str, Any]) -> list[Leaf]:
    """The leaves of a tree, in its order.

    Branches are mappings with string keys, and lists that hold a tensor or a branch; all else is a leaf.
    The rule is stock DCP's (torch/distributed/checkpoint/_traverse.py), but nothing is lost here: an
    empty mapping is a leaf, and so is a mapping whose keys are not all strings.

    Raises:
        LeafError: two leaves have the same name.
    """
    leaves: list[Leaf] = []
    names: dict[str, Path] = {}

    def visit(path: Path, value: Any) -> None:
        if _is_branch(value):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, child in items:
                visit((*path, key), child)
            return
        name = ".".join(map(str, path))
        if name in names:
            raise LeafError(f"two leaves are called {name!r}: {names[name]} and {path}; rename one key")
        names[name] = path
        leaves.append(Leaf(name, path, value))

    for key, child in tree.items():
        visit((key,), child)
    return leaves


def _is_branch(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(type(key) is str for key in value)
    if type(value) is list:
        return any(isinstance(item, torch.Tensor) or _is_branch(item) for item in value)
    return False


def unflatten(leaves: Iterator[tuple[Path, Any]]) -> dict[str, Any]:
    """The tree that `flatten` would have taken apart into these leaves; integer keys make lists."""
    root: dict[Any, Any] = {}
    lists: list[tuple[dict[Any, Any], Any]] = []  # (parent, key) of every list, parents first

    for path, value in leaves:
        node = root
        for key, following in pairwise(path):
            if key not in node:
                node[key] = {}
                if type(following) is int:
                    lists.append((node, key))
            node = node[key]
        node[path[-1]] = value
    for parent, key in reversed(lists):  # innermost first, so that a list's items are final
        children = parent[key]
        parent[key] = [children[index] for index in sorted(children)]
    return root


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested mappings, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from tensors_in(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from tensors_in(child)


# ---------------------------------------------------------------------------- loading's vocabulary


class StoredPart(NamedTuple):
    """One stored block of a tensor.

    Attributes:
        file: relative to the step directory.
        data_offset: of the block's first element, in the file.
        nbytes: from there to the end of its last element.
        offsets, shape: which part of the whole tensor this is, in elements.
        stride: of the stored elements.
        conj, neg: the values are the conjugate, the negative, of the stored bytes.
    """

    file: str
    data_offset: int
    nbytes: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    conj: bool = False
    neg: bool = False


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint, not read yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[StoredPart, ...]


@dataclass
class Matching:
    """What a load has to do.

    Attributes:
        reads: stored tensors and the live memory they go to.
        afterwards: run in order once every read was verified.
        missing: leaves that the live objects have and the checkpoint has not.
        unexpected: leaves that only the checkpoint has.
        differences: leaves that both have but that do not fit.
    """

    reads: list[tuple[str, StoredTensor, torch.Tensor]] = field(default_factory=list)
    afterwards: list[Callable[[], None]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def into(self, name: str, stored: Any, live: torch.Tensor) -> None:
        """Plan to read `stored` into `live`, if it fits."""
        if not isinstance(stored, StoredTensor):
            self.differences.append(f"{name}: a tensor here, {type(stored).__name__} in the checkpoint")
        elif live.device.type == "meta":
            self.differences.append(f"{name}: lives on the meta device; call to_empty() before loading")
        elif tuple(live.shape) != stored.shape or live.dtype != stored.dtype:
            self.differences.append(
                f"{name}: {_describe(live.dtype, live.shape)} here, "
                f"{_describe(stored.dtype, stored.shape)} in the checkpoint"
            )
        else:
            self.reads.append((name, stored, live))

    def fresh(self, name: str, stored: Any, device: torch.device | None = None) -> Any:
        """`stored` with new tensors in place of stored ones, to be filled by the reads."""
        made: dict[StoredTensor, torch.Tensor] = {}

        def make(where: str, value: Any) -> Any:
            if isinstance(value, StoredTensor):
                if value not in made:
                    made[value] = torch.empty(value.shape, dtype=value.dtype, device=device)
                    self.reads.append((where, value, made[value]))
                return made[value]
            if isinstance(value, Mapping):
                pairs = [(key, make(f"{where}.{key}", child)) for key, child in value.items()]
                if type(value) is dict:
                    return dict(pairs)
                copy = value.copy()  # type: ignore[attr-defined]
                for key, child in pairs:
                    copy[key] = child
                return copy
            if type(value) is list:
                return [make(f"{where}.{index}", child) for index, child in enumerate(value)]
            if isinstance(value, tuple) and any(isinstance(child, StoredTensor) for child in value):
                children = [make(f"{where}.{index}", child) for index, child in enumerate(value)]
                return type(value)(*children) if hasattr(value, "_fields") else type(value)(children)
            return value

        return make(name, stored)


def _describe(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


# ---------------------------------------------------------------------------- one section per object


class Section(Protocol):
    """One branch of the tree."""

    def capture(self) -> Any:
        """The branch as it is now."""

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        """Say where the stored branch goes."""


class ModelSection:
    """A module's state_dict."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def capture(self) -> Any:
        return self.model.state_dict()

    def buffers(self) -> set[int]:
        """Addresses of the tensors that forward may change."""
        if not isinstance(self.model, torch.nn.Module):
            return set()
        return {buffer.data_ptr() for buffer in self.model.buffers()}

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        live = self.model.state_dict()
        stored = _by_key(stored, live)
        own = None
        if isinstance(self.model, torch.nn.Module):
            own = {t.data_ptr() for t in self.model.parameters()} | {
                t.data_ptr() for t in self.model.buffers()
            }
        rest: dict[str, Any] = {}  # what only the module itself can put in its place
        for key, value in live.items():
            if key not in stored:
                matching.missing.append(f"{name}.{key}")
            elif isinstance(value, torch.Tensor) and (own is not None and value.data_ptr() in own):
                matching.into(f"{name}.{key}", stored[key], value)
            elif isinstance(value, torch.Tensor) != isinstance(stored[key], StoredTensor):
                matching.differences.append(f"{name}.{key}: a tensor on one side only")
            else:
                rest[key] = matching.fresh(f"{name}.{key}", stored[key])
        matching.unexpected += [f"{name}.{key}" for key in stored if key not in live]
        if rest:
            kwargs = {"strict": False} if isinstance(self.model, torch.nn.Module) else {}
            matching.afterwards.append(lambda: self.model.load_state_dict(rest, **kwargs))


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
        state = {
            names[param]: dict(values) for param, values in self.optimizer.state.items() if param in names
        }
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
                    if isinstance(value, StoredTensor) and value.shape not in ((), (1,), tuple(param.shape)):
                        self._check_shape(leaf, value, here, matching)
                    values[key] = matching.fresh(leaf, value, _device_of_state(value, param, group_of[param]))
            matching.afterwards.append(lambda param=param, values=values: _replace(state, param, values))  # type: ignore[misc]

    @staticmethod
    def _check_shape(leaf: str, value: StoredTensor, here: Any, matching: Matching) -> None:
        # State of a shape of its own (factored moments) is only checked against what is live.
        if isinstance(here, torch.Tensor):
            matching.into(leaf, value, here)


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


def _device_of_state(stored: Any, param: torch.Tensor, group: Mapping[str, Any]) -> torch.device:
    # torch keeps `step` on the host unless the optimizer runs on the device as a whole
    # (torch/optim/adam.py, _init_group).
    on_host = isinstance(stored, StoredTensor) and stored.shape == ()
    if on_host and not (group.get("capturable") or group.get("fused")):
        return torch.device("cpu")
    return param.device


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
    """A plain mapping that the user handed over: saved as it is, updated in place on load."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def capture(self) -> Any:
        return {key: v.state_dict() if isinstance(v, Stateful) else v for key, v in self.values.items()}

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        stored = stored if isinstance(stored, Mapping) else {}
        matching.missing += [f"{name}.{key}" for key in self.values if key not in stored]
        matching.unexpected += [f"{name}.{key}" for key in stored if key not in self.values]
        for key, value in stored.items():
            owner = self.values.get(key)
            fresh = matching.fresh(f"{name}.{key}", value)
            if isinstance(owner, Stateful):
                matching.afterwards.append(lambda owner=owner, fresh=fresh: owner.load_state_dict(fresh))  # type: ignore[misc]
            else:
                matching.afterwards.append(lambda key=key, fresh=fresh: self.values.update({key: fresh}))  # type: ignore[misc]


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
        if torch.cuda.is_available():
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
        rng: bool = True,
    ) -> None:
        self.sections: dict[str, Section] = {}
        self.model = ModelSection(_stateful("model", model)) if model is not None else None
        if self.model is not None:
            self.sections["model"] = self.model
        names: dict[torch.Tensor, str] = {}
        if isinstance(model, torch.nn.Module):
            names = {param: name for name, param in model.named_parameters()}
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
        if isinstance(extra, dict) and not isinstance(extra, Stateful):
            self.sections["extra"] = ValueSection(extra)
        else:
            self._add("extra", extra, StatefulSection)
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
        tree: dict[str, Any] = {name: section.capture() for name, section in self.sections.items()}
        tree["step"] = step
        return tree

    def match(self, tree: Mapping[str, Any]) -> Matching:
        """Where everything in a stored tree goes. Changes nothing yet."""
        matching = Matching()
        for name, section in self.sections.items():
            if name in tree:
                section.match(name, tree[name], matching)
            else:
                matching.missing.append(name)
        matching.unexpected += [name for name in tree if name not in self.sections and name != "step"]
        return matching

    def parameters(self) -> Iterator[torch.Tensor]:
        """Every parameter that a step of some optimizer would change under a save."""
        if self.model is not None and isinstance(self.model.model, torch.nn.Module):
            yield from self.model.model.parameters()
        for optimizer in self.optimizers:
            for group in getattr(optimizer, "param_groups", ()):
                yield from group["params"]


def _stateful(name: str, value: Any) -> Any:
    if not isinstance(value, Stateful):
        raise OptionError(f"{name}: {type(value).__name__} has no state_dict() and load_state_dict()")
    return value
