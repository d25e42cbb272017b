"""One section per object handed over: a branch of the tree, read from it and matched to it.

Guarantees:
- `capture` reads; it steps no optimizer and launches nothing but the copies it declares.
- `match` changes no live value; it says where stored tensors go and what is left to do after they arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from ..tree import Matching
from .spread import with_live_shards


@runtime_checkable
class Stateful(Protocol):
    """Anything with torch's pair of methods."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


class Section(Protocol):
    """One branch of the tree."""

    def capture(self) -> Any:
        """The branch as it is now."""

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        """Say where the stored branch goes."""


class SteadyPart(NamedTuple):
    """Tensors of a branch that training changes in place, most of the time.

    Attributes:
        prefix: of their names in the branch, which ends with a dot or is empty.
        names: the same object as before if they are the same as before.
    """

    prefix: str
    names: tuple[str, ...]
    tensors: list[torch.Tensor]


class SteadyBranch(NamedTuple):
    """A branch in two: steady tensors, each a leaf of it, and the rest.

    Attributes:
        rest: makes the branch without them; without the branches that would be empty, too.
        volatile: what may change before the next step of an optimizer, of the rest and elsewhere.
    """

    parts: list[SteadyPart]
    rest: Callable[[], Any]
    volatile: list[torch.Tensor]


class SteadySection(Section, Protocol):
    """A branch of thousands of tensors, which can be had without a call of python for each."""

    def steady(self) -> SteadyBranch | None:
        """None where that cannot be: then there is `capture`."""


def steady_of(section: Section) -> SteadyBranch | None:
    """What a section has that is steady, if it is a `SteadySection`."""
    steady: Callable[[], SteadyBranch | None] | None = getattr(section, "steady", None)
    return steady() if steady is not None else None  # isinstance() of a protocol is slow


@runtime_checkable
class SharedSection(Section, Protocol):
    """The branch of files that ranks write together: a list of `SharedFile`; stored, contents by path."""

    def paths(self) -> tuple[str, ...]:
        """Of the files of which this rank has something, relative to the step directory."""


@runtime_checkable
class BringsSections(Protocol):
    """Something that knows itself how it is saved."""

    def sections(self) -> Mapping[str, Section]:
        """Its branches of the tree; one called "model" takes the place of those of all models."""

    def optimizers(self) -> list[Any]:
        """The optimizers of torch whose steps change it."""


class StatefulSection:
    """Anything else: what state_dict() returns is what load_state_dict() gets back."""

    def __init__(self, owner: Stateful) -> None:
        self.owner = owner

    def capture(self) -> Any:
        return self.owner.state_dict()

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        value = matching.fresh(name, with_live_shards(name, self.owner, stored, matching))
        matching.afterwards.append(lambda: self.owner.load_state_dict(value) and None)


class GroupSection:
    """Several sections under their names."""

    def __init__(self, sections: Mapping[str, Section]) -> None:
        self.sections = dict(sections)

    def capture(self) -> Any:
        return {key: section.capture() for key, section in self.sections.items()}

    def steady(self) -> SteadyBranch | None:
        found = {key: steady_of(section) for key, section in self.sections.items()}
        known = {key: one for key, one in found.items() if one is not None}
        parts = [
            SteadyPart(f"{key}.{part.prefix}", part.names, part.tensors)
            for key, one in known.items()
            for part in one.parts
        ]

        def rest() -> Any:
            return {
                key: known[key].rest() if key in known else section.capture()
                for key, section in self.sections.items()
            }

        return (
            SteadyBranch(parts, rest, [t for one in known.values() for t in one.volatile]) if parts else None
        )

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        stored = stored if isinstance(stored, Mapping) else {}
        matching.unexpected += [f"{name}.{key}" for key in stored if key not in self.sections]
        for key, section in self.sections.items():
            if key in stored:
                section.match(f"{name}.{key}", stored[key], matching)
            else:
                matching.missing.append(f"{name}.{key}")
