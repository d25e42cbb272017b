"""Where the files of a part lie inside a step, and in what form: what a layout tells planners and readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..parts import MAIN

SizeOf = Callable[[str], int | None]  # bytes of a file inside a step; None if it is not there


def NOTHING_THERE(name: str) -> None:  # noqa: N802 -- a constant that is called
    """The SizeOf of an empty directory."""


@dataclass(frozen=True)
class Place:
    """Of one part, in one step. Paths have "/" between their parts; "" is the step's own directory.

    Attributes:
        directory: holds all that belongs to the part, relative to the step's.
        base: what the plans of its ranks are relative to, relative to the step's. Plans outlive a step, and
            know no step number; this may hold one.
        format: of the files: which planner and which reader.
        metadata: the `.metadata` of DCP files, relative to `base`; "" where there are none.
    """

    directory: str
    base: str
    format: str
    metadata: str = ""

    def path(self, name: str) -> str:
        """Of a plan's file, relative to the step's directory."""
        return f"{self.base}/{name}" if self.base else name

    def holds(self, path: str) -> bool:
        """Whether a file of the step is the part's."""
        return not self.directory or path.startswith(f"{self.directory}/")


def directory_of(part: str) -> str:
    """A part's own directory in a step; that of the step where no parts were declared."""
    return "" if part == MAIN else part
