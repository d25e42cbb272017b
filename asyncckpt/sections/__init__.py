"""One section per object handed over: a branch of the tree, read from it and matched to it.

Guarantees:
- `capture` reads; it steps no optimizer and launches nothing but the copies it declares.
- `match` changes no live value; it says where stored tensors go and what is left to do after they arrived.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

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

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        stored = stored if isinstance(stored, Mapping) else {}
        matching.unexpected += [f"{name}.{key}" for key in stored if key not in self.sections]
        for key, section in self.sections.items():
            if key in stored:
                section.match(f"{name}.{key}", stored[key], matching)
            else:
                matching.missing.append(f"{name}.{key}")
