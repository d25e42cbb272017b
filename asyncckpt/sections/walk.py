"""What a module's state_dict() would hold, without asking module by module.

`state_dict()` of a model with 12,500 modules takes 70 ms. Nearly always it comes to what the modules' own
dictionaries hold, and those can be gone through level by level, each step over all modules of it at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, compress, repeat
from operator import contains, is_not, itemgetter, methodcaller
from typing import Any, NamedTuple

import torch
from torch import nn

_DEPTH_MAX = 100  # levels; beyond that, a module may contain itself

_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")
_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")


class Walk(NamedTuple):
    """What a walk found.

    Attributes:
        shape: all but the tensors: equal for equal names in an equal order.
        parameters, buffers: in the order of `names`; buffers also where they are not saved.
    """

    shape: tuple[Any, ...]
    parameters: list[torch.Tensor]
    buffers: list[torch.Tensor]


class Names(NamedTuple):
    """Keys in state_dict(), in the order of the walk; None for a buffer that it does not hold."""

    parameters: tuple[str, ...]
    buffers: tuple[str | None, ...]


class Walker:
    """Walks through one module, time and again."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root

    def walk(self) -> Walk | None:
        """None if some module says itself what its state is, in whatever way."""
        try:
            return self._walk()
        except (KeyError, AttributeError, TypeError):  # not even the dictionaries are torch's
            return None

    def _walk(self) -> Walk | None:
        shape: list[Any] = []
        parameters: list[torch.Tensor] = []
        buffers: list[torch.Tensor] = []
        level: list[nn.Module] = [self._root]
        while level:
            of_each = list(map(vars, level))
            if len(shape) > _DEPTH_MAX or not _are_plain(level, of_each):
                return None
            modules, own, volatile = (_column(of_each, f"_{what}") for what in _KINDS)
            unsaved = [
                (index, frozenset(module["_non_persistent_buffers_set"]))
                for index, module in enumerate(of_each)
                if module["_buffers"]
            ]
            shape.append((modules[:3], own[:3], volatile[:3], unsaved))
            parameters += own.values
            buffers += volatile.values
            level = modules.values
        return Walk(tuple(shape), parameters, buffers)

    def names(self) -> Names:
        """Of what `walk` finds now."""
        parameters: list[str] = []
        buffers: list[str | None] = []
        level: list[tuple[str, nn.Module]] = [("", self._root)]
        while level:
            below: list[tuple[str, nn.Module]] = []
            for prefix, module in level:
                has = vars(module)
                unsaved = has["_non_persistent_buffers_set"]
                parameters += (prefix + key for key, one in has["_parameters"].items() if one is not None)
                buffers += (
                    None if key in unsaved else prefix + key
                    for key, one in has["_buffers"].items()
                    if one is not None
                )
                below += ((f"{prefix}{k}.", one) for k, one in has["_modules"].items() if one is not None)
            level = below
        return Names(tuple(parameters), tuple(buffers))


def _are_plain(level: list[nn.Module], of_each: list[dict[str, Any]]) -> bool:
    """Whether state_dict() of these modules is torch's own."""
    kinds = set(map(type, level))
    if not all(getattr(kind, name) is getattr(nn.Module, name) for kind in kinds for name in _METHODS):
        return False
    if any(any(map(contains, of_each, repeat(name))) for name in _METHODS):
        return False
    return not any(any(map(itemgetter(name), of_each)) for name in _HOOKS)


_KINDS = ("modules", "parameters", "buffers")


class _Column(NamedTuple):
    """One of the dictionaries that each module has, over all modules of a level."""

    lengths: list[int]
    keys: list[str]
    is_there: list[bool]  # whether there is something under a key
    values: list[Any]  # what is there


def _column(of_each: Iterable[dict[str, Any]], name: str) -> _Column:
    dicts = list(map(itemgetter(name), of_each))
    lengths = list(map(len, dicts))
    if not any(lengths):  # leaves have no modules, and most no buffers
        return _Column(lengths, [], [], [])
    values = list(chain.from_iterable(map(methodcaller("values"), dicts)))
    is_there = list(map(is_not, values, repeat(None)))
    return _Column(lengths, list(chain.from_iterable(dicts)), is_there, list(compress(values, is_there)))
