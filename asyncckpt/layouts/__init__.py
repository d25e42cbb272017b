"""Where a step's directory lies, what it is called, and what names the latest.

A layout is the convention of one ecosystem for *directories*; what goes into the files is decided
by `formats`. Layouts are pure: they turn numbers into names and judge listings they are handed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from ..errors import OptionError
from .dcp import DcpLayout
from .megatron import MegatronDistLayout, MegatronLayout
from .place import NOTHING_THERE, Place, SizeOf
from .rlinf import RlinfFsdpLayout, RlinfMegatronLayout

__all__ = ["LAYOUTS", "DcpLayout", "Layout", "MegatronDistLayout", "MegatronLayout", "Place", "layout_named"]


class Layout(Protocol):
    """The directory convention of one ecosystem."""

    @property
    def name(self) -> str:
        """What the user writes as `layout=`, and what the manifest says."""

    @property
    def tracker_name(self) -> str | None:
        """The file under the root that names the latest step; None where there is no such file."""

    def step_name(self, step: int) -> str:
        """Directory name of `step`. Raises StepError if it is negative."""

    def parse_step(self, name: str) -> int | None:
        """The step whose `step_name` is exactly `name`, or None: the strict inverse."""

    def tracker_bytes(self, step: int) -> bytes:
        """What the tracker holds when it names `step`."""

    def parse_tracker(self, data: bytes) -> int:
        """The step that a tracker names.

        Raises:
            CorruptStepError: it names none.
            LoadError: it names something that is not a training step.
        """

    def place(self, step: int, part: str) -> Place:
        """Where a part's files of `step` lie. Raises OptionError if the layout has no such part."""

    def added_files(self, step: int, part: str) -> Mapping[str, bytes]:
        """Small files that the tools of a part expect besides its plan: paths in the step's directory."""

    def foreign_problem(
        self,
        step: int,
        names: Collection[str],
        tracked: int | None,
        size_of: SizeOf = NOTHING_THERE,
        parts: Collection[str] = (),
    ) -> str | None:
        """Why a step without our manifest must not be trusted, or None if its own tool would load it.

        `names` are the entries of its directory, `tracked` is what the tracker names, `size_of` tells the
        bytes of a file in it, `parts` are those declared.
        """


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        DcpLayout(),
        MegatronLayout(),
        MegatronDistLayout(),
        RlinfFsdpLayout(),
        RlinfMegatronLayout(),
    )
}


def layout_named(name: str) -> Layout:
    """The layout called `name`.

    Raises:
        OptionError: there is none; the message lists those there are.
    """
    try:
        return LAYOUTS[name]
    except KeyError:
        raise OptionError(f"unknown layout {name!r}; there are: {', '.join(sorted(LAYOUTS))}") from None
