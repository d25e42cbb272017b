"""Live training objects <-> one tree of named leaves.

The tree has one branch per object, in this order, whatever the layout:

    model         fully qualified name -> tensor; model0, model1, ... where it comes in chunks
    optimizer     state: {name of parameter: {...}}, param_groups: [{..., params: [names]}]
    lr_scheduler, dataloader, extra, per_rank    what their state_dict() says
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

import time
from collections.abc import Callable, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from .devices import devices_of
from .errors import OptionError
from .sections import (
    BringsSections,
    GroupSection,
    Section,
    SharedSection,
    Stateful,
    StatefulSection,
    SteadyBranch,
    SteadyPart,
    steady_of,
)
from .sections.generators import RngSection
from .sections.model import ModelSection, own_name, unwrapped
from .sections.optimizer import OptimizerSection
from .sections.values import ValueSection
from .shards import local_of
from .shared import SHARED_BRANCH
from .survey import NotSurveyedError, inside_agrees, is_among, survey
from .tree import Matching, StateTree, Steady, Structure


class Look(NamedTuple):
    """What was found without asking tensor by tensor.

    Attributes:
        seconds: that each section took.
        branches: in two; others have to be captured.
        steady: None if they cannot be told from what they were before.
    """

    seconds: Mapping[str, float] = MappingProxyType({})
    branches: Mapping[str, SteadyBranch] = MappingProxyType({})
    steady: Steady | None = None


NOTHING = Look()


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
        self.models = {
            name: ModelSection(_stateful(name, unwrapped(one))) for name, one in named_models(model).items()
        }
        self.sections: dict[str, Section] = dict(self.models)
        self.capture_s: dict[str, float] = {}
        inside_agrees()  # found out once: here rather than in the first save
        # Of the last look: names of its parts, and what they came to.
        self._looked: tuple[list[tuple[str, tuple[str, ...]]], Structure | None] = ([], None)
        names: dict[torch.Tensor, str] = {}
        for section_name, one in self.models.items():
            prefix = "" if section_name == "model" else f"{section_name}."
            names.update({param: f"{prefix}{own_name(name)}" for name, param in one.named_parameters()})
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
        if rng and "rng" not in self.sections:
            self.sections["rng"] = RngSection()

    def _add(self, name: str, value: Any, make: Callable[[Any], Section]) -> None:
        if value is None:
            return
        if isinstance(value, BringsSections):
            brought = value.sections()
            if "model" in brought:
                self.sections = {k: one for k, one in self.sections.items() if k not in self.models}
            self.sections.update(brought)
            self.optimizers += value.optimizers()
        elif isinstance(value, Stateful):
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

    def look(self) -> Look:
        """What of the state can be had at once; see `Look`."""
        looked_s: dict[str, float] = {}
        branches: dict[str, SteadyBranch] = {}
        for name, section in self.sections.items():
            began_s = time.perf_counter()
            found = steady_of(section)
            if found is not None:
                branches[name] = found
            looked_s[name] = time.perf_counter() - began_s
        parts = [(f"{name}.{part.prefix}", part) for name, one in branches.items() for part in one.parts]
        tensors = list(chain.from_iterable(part.tensors for _, part in parts))
        try:
            found_all = survey(tensors, forms=True, storages=True)
        except NotSurveyedError:
            return Look(looked_s, branches, None)
        volatile = {local_of(one).data_ptr() for branch in branches.values() for one in branch.volatile}
        if is_among(volatile, found_all.addresses):
            return Look(looked_s, branches, None)  # a parameter that is a buffer, too
        return Look(
            looked_s, branches, Steady(self._structure_of(parts, found_all.forms), tensors, found_all)
        )

    def _structure_of(self, parts: list[tuple[str, SteadyPart]], forms: bytes) -> Structure:
        named = [(prefix, part.names) for prefix, part in parts]
        before, structure = self._looked
        same = structure is not None and structure.forms == forms and len(named) == len(before)
        if same and all(a == b and x is y for (a, x), (b, y) in zip(named, before, strict=True)):
            assert structure is not None
            return structure
        structure = Structure(tuple(prefix + one for prefix, names in named for one in names), forms)
        self._looked = (named, structure)
        return structure

    def capture(self, step: int, look: Look = NOTHING, *, whole: bool = True) -> StateTree:
        """The tree at this moment. Tensors are the live ones, or aliases of them.

        Args:
            look: at the same moment.
            whole: with the steady tensors in it.
        """
        tree = StateTree()
        tree.steady, tree.is_whole = look.steady, whole
        if whole and "model" in self.models:
            tree.parameters = self.models["model"].parameters()
        tree.write_only = frozenset(self.sections).difference(self.restored())
        for name, section in self.sections.items():
            began_s = time.perf_counter()
            if whole or name not in look.branches:
                tree[name] = section.capture()
            elif rest := look.branches[name].rest():  # an empty branch would be a leaf
                tree[name] = rest
            self.capture_s[name] = time.perf_counter() - began_s + look.seconds.get(name, 0)
        tree["step"] = step
        return tree

    def completed(self, tree: StateTree, look: Look) -> StateTree:
        """A tree that lacks the steady tensors, with them; of other objects, what they said already."""
        whole = tree.like(
            {
                name: section.capture() if name in look.branches else tree[name]
                for name, section in self.sections.items()
            }
        )
        whole["step"] = tree["step"]
        whole.is_whole = True
        if "model" in self.models:
            whole.parameters = self.models["model"].parameters()
        return whole

    def modules(self) -> list[torch.nn.Module]:
        """The models that are modules."""
        found = (section.model for section in self.models.values())
        return [model for model in found if isinstance(model, torch.nn.Module)]

    def buffers(self, look: Look = NOTHING) -> set[int]:
        """Addresses of what forwards may change."""
        found: set[int] = set()
        for name, section in self.models.items():
            if name in look.branches:
                found |= {local_of(buffer).data_ptr() for buffer in look.branches[name].volatile}
            else:
                found |= section.buffers()
        return found

    def shared_paths(self) -> tuple[str, ...]:
        """Of the files that ranks write together, those of which this one has something."""
        section = self.sections.get(SHARED_BRANCH)
        return section.paths() if isinstance(section, SharedSection) else ()

    def devices(self) -> list[int]:
        """Ordinals of the CUDA devices that hold parameters or buffers now; others may come."""
        tensors: list[Any] = []
        for one in self.modules():
            tensors += [*one.parameters(), *one.buffers()]
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

    def restored(self) -> tuple[str, ...]:
        """Names of the sections that a load brings back; the others are for other tools to read."""
        return tuple(
            name for name, section in self.sections.items() if not getattr(section, "write_only", False)
        )

    def match(self, tree: Mapping[str, Any]) -> Matching:
        """Where everything in a stored tree goes. Changes nothing yet."""
        matching = Matching()
        for name, section in self.sections.items():
            if name not in self.restored():
                continue
            if name in tree:
                section.match(name, tree[name], matching)
            else:
                matching.missing_sections.append(name)
        # Generators may be left alone: save_rng=False.
        known = {*self.sections, "step", "rng"}
        matching.unexpected_sections += [name for name in tree if name not in known]
        return matching


def named_models(model: Any) -> dict[str, Any]:
    """A model, or the chunks that one is made of, by their sections."""
    if isinstance(model, list | tuple):
        return {f"model{index}": chunk for index, chunk in enumerate(model)}
    return {} if model is None else {"model": model}


def _stateful(name: str, value: Any) -> Any:
    if not isinstance(value, Stateful):
        raise OptionError(f"{name}: {type(value).__name__} has no state_dict() and load_state_dict()")
    return value
