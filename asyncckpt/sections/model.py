"""A module's parameters and buffers, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..errors import LeafError
from ..shards import local_of
from ..tree import Matching, StoredTensor, flatten
from . import SteadyBranch, SteadyPart
from .walk import Names, Walker


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


_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})  # of torch.compile and checkpoint_wrapper


def own_name(key: str) -> str:
    """A parameter's name as the user's module has it; what stock DCP calls its fully qualified name."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _own_names(keys: Iterable[str]) -> dict[str, str]:
    """Keys of a state_dict by their own names.

    Raises:
        LeafError: two have the same; one would be lost.
    """
    found: dict[str, str] = {}
    for key in keys:
        other = found.setdefault(own_name(key), key)
        if other != key:
            raise LeafError(f"model.{other} and model.{key} are the same name without wrappers; rename one")
    return found


class ModelSection:
    """A module's state_dict, under its own names: what wraps a module inside it leaves no trace."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._walker = Walker(model) if isinstance(model, torch.nn.Module) else None
        self._seen: tuple[object, Names] = (None, Names((), ()))  # shape and own names of the last walk

    def steady(self) -> SteadyBranch | None:
        walk = self._walker.walk() if self._walker is not None else None
        if walk is None or self._walker is None:
            return None
        shape, names = self._seen
        if walk.shape != shape:
            parameters, buffers = self._walker.names()
            own = [own_name(name) for name in (*parameters, *buffers) if name is not None]
            if len(set(own)) < len(own):
                return None
            names = Names(
                tuple(map(own_name, parameters)),
                tuple(None if name is None else own_name(name) for name in buffers),
            )
            self._seen = (walk.shape, names)
        saved = {
            name: buffer.detach()
            for name, buffer in zip(names.buffers, walk.buffers, strict=True)
            if name is not None
        }
        part = SteadyPart("", names.parameters, walk.parameters)
        return SteadyBranch([part], lambda: saved, walk.buffers)

    def capture(self) -> Any:
        values = self.model.state_dict()
        return {name: values[key] for name, key in _own_names(values).items()}

    def parameters(self) -> frozenset[str]:
        """Keys of the branch that are parameters, tied ones too; none, if the model is no module."""
        if not isinstance(self.model, torch.nn.Module):
            return frozenset()
        return frozenset(own_name(name) for name, _ in self.model.named_parameters(remove_duplicate=False))

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Under the names of the module that was handed over; none, if it is no module."""
        return list(self.model.named_parameters()) if isinstance(self.model, torch.nn.Module) else []

    def buffers(self) -> set[int]:
        """Addresses of the tensors that forward may change."""
        if not isinstance(self.model, torch.nn.Module):
            return set()
        return {local_of(buffer).data_ptr() for buffer in self.model.buffers()}

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        theirs = self.model.state_dict()
        names = _own_names(theirs)
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
