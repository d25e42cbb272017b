"""Objects of classes that were not imported: they remember what a pickle did to them, and do nothing."""

from __future__ import annotations

import types
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any, NoReturn


class InertType(type):
    """Class of the classes that stand for unknown globals: nothing can be set on them."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise TypeError(f"{cls.__name__} is inert")

    def __delattr__(cls, name: str) -> NoReturn:
        raise TypeError(f"{cls.__name__} is inert")


class Inert(metaclass=InertType):
    """An object of a class that was not imported.

    Attributes:
        module, name: the global that the pickle asked for.
        args: what it was called with.
        state: what would have gone into `__setstate__` or `__dict__`: of a Namespace, its attributes.
        pairs, elements: what would have been set by key, or appended.
    """

    __slots__ = ("args", "elements", "pairs", "state")
    module: str = ""
    name: str = ""

    args: tuple[Any, ...]
    state: Any
    pairs: list[tuple[Any, Any]]
    elements: list[Any]

    # In __new__, since pickles create objects without calling __init__
    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = object.__new__(cls)
        self.args = (*args, kwargs) if kwargs else args
        self.state = None
        self.pairs = []
        self.elements = []
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return type(self)(self, *args, **kwargs)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.pairs.append((key, value))

    def append(self, element: Any) -> None:
        """Remember an element of what may have been a list."""
        self.elements.append(element)

    def extend(self, elements: Any) -> None:
        """Remember elements of what may have been a list."""
        self.elements.extend(elements)

    def add(self, element: Any) -> None:
        """Remember an element of what may have been a set."""
        self.elements.append(element)

    def __repr__(self) -> str:
        return f"<inert {self.module}.{self.name}>"


def inert_type(module: str, name: str) -> type[Inert]:
    """A fresh class that stands for the global `module.name`."""
    kind: Any = InertType("Inert", (Inert,), {"__slots__": (), "module": module, "name": name})
    return kind  # type: ignore[no-any-return]


def find_inert(tree: Any) -> tuple[str, str] | None:
    """Path and class of the first object in `tree` that was not imported; None if there is none."""
    if not _holds_inert(tree):
        return None
    seen: set[int] = set()
    rest: list[tuple[str, Any]] = [("", tree)]
    while rest:
        path, value = rest.pop()
        if _is_inert(value):
            return path, f"{value.module}.{value.name}"
        if id(value) not in seen:
            seen.add(id(value))
            rest += reversed([(path + step, child) for step, child in children(value)])
    return None


def _holds_inert(tree: Any) -> bool:
    """Whether there is one; most trees have none, and paths take long to spell."""
    seen: set[int] = set()
    rest = [tree]
    while rest:
        value = rest.pop()
        if type(value) in _BARREN or id(value) in seen:
            continue
        if _is_inert(value):
            return True
        seen.add(id(value))
        if isinstance(value, dict):
            rest += value
            rest += value.values()
        elif isinstance(value, (list, tuple, deque, set, frozenset)):
            rest += value
        if type(value) in (OrderedDict, types.SimpleNamespace):
            rest += vars(value).values()
    return False


_BARREN = frozenset((str, bytes, int, float, bool, complex, type(None)))


def _is_inert(value: Any) -> bool:
    return isinstance(value, Inert) or (isinstance(value, type) and issubclass(value, Inert))


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container holds, each with the step that leads there: ".name", "[0]", "['a b']"."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield step_to(key), child
        for key in value:
            if not isinstance(key, (str, int)):
                yield f".key({brief(key)})", key
    elif isinstance(value, (list, tuple, deque)):
        for index, child in enumerate(value):
            yield f"[{index}]", child
    elif isinstance(value, (set, frozenset)):
        for child in value:
            yield f".element({brief(child)})", child
    if type(value) in (OrderedDict, types.SimpleNamespace):
        for name, child in vars(value).items():
            yield f".{name}", child


def step_to(key: Any) -> str:
    """How a path goes on to the value of `key`."""
    return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{brief(key)}]"


def brief(value: Any) -> str:
    """repr for names in messages; of foreign objects only the class, as their repr may do anything."""
    if type(value) in (str, bytes, int, float, bool, complex, type(None)):
        text = repr(value)
        return text if len(text) <= 80 else text[:77] + "..."
    return type(value).__name__
