"""Who writes a step together: groups of processes ("parts"), declared up front, in one numbering.

    parts={"data": 1, "actor": 2, "critic": 1}        data rank 0 | actor rank 0, 1 | critic rank 0
    place among all participants                           0      |        1  2     |       3

The first rank of the first part publishes. Without a declaration there is one part, and places are ranks.

Pure: no I/O, no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import OptionError

MAIN = "main"  # what the manifest calls the part of those who declare none

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_SHOWN = 8  # ranks named in one message


@dataclass(frozen=True)
class Parts:
    """All participants of a step.

    Attributes:
        world_sizes: ranks in each part, in the order declared.
        declared: whether somebody declared them; else it is one part, MAIN.
    """

    world_sizes: Mapping[str, int]
    declared: bool = True

    def __post_init__(self) -> None:
        if not self.world_sizes:
            raise OptionError("parts: at least one is needed")
        for name, size in self.world_sizes.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name) or name.startswith("asyncckpt"):
                raise OptionError(f"parts: {name!r} is no plain directory name that we leave to you")
            if self.declared and name == MAIN:
                raise OptionError(f"parts: {MAIN!r} is what a step without parts is called; use another name")
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise OptionError(f"parts: {name} needs a number of ranks from 1, got {size!r}")

    @classmethod
    def none(cls, world_size: int) -> Parts:
        """Of ranks that declare no parts."""
        return cls({MAIN: world_size}, declared=False)

    @property
    def world_size(self) -> int:
        """Participants in all."""
        return sum(self.world_sizes.values())

    def places(self, part: str) -> range:
        """Where a part's ranks stand among all participants."""
        first = 0
        for name, size in self.world_sizes.items():
            if name == part:
                return range(first, first + size)
            first += size
        raise OptionError(f"no part {part!r}; there are: {', '.join(self.world_sizes)}")

    def called(self, *places: int) -> str:
        """Participants, as messages name them: "rank 3"; where parts are declared "actor rank 2"."""
        shown = places[:_SHOWN]
        words = []
        for part in self.world_sizes:
            ranks = [place - self.places(part)[0] for place in shown if place in self.places(part)]
            if ranks:
                kind = "rank" if len(ranks) == 1 else "ranks"
                numbers = f"{kind} {', '.join(map(str, ranks))}"
                words.append(f"{part} {numbers}" if self.declared else numbers)
        return " and ".join(words) + (f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else "")

    def __str__(self) -> str:
        return ", ".join(f"{name}: {size}" for name, size in self.world_sizes.items())


@dataclass(frozen=True)
class Member:
    """One participant: the `rank`-th of a part.

    Raises:
        OptionError: there is no such part, or rank in it.
    """

    parts: Parts
    part: str
    rank: int

    def __post_init__(self) -> None:
        size = len(self.parts.places(self.part))
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or not 0 <= self.rank < size:
            of = f" of part {self.part!r}" if self.parts.declared else ""
            raise OptionError(f"rank {self.rank!r} of {size} ranks{of}")

    @property
    def world_size(self) -> int:
        """Ranks in its part."""
        return self.parts.world_sizes[self.part]

    @property
    def place(self) -> int:
        """Its place among all participants."""
        return self.parts.places(self.part)[self.rank]

    def __str__(self) -> str:
        return self.parts.called(self.place)
