"""torchtitan's directories for torch.distributed.checkpoint: `step-50/`, no tracker.

The highest number that holds `.metadata` wins: torchtitan, components/checkpoint.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..errors import OptionError, StepError
from .place import NOTHING_THERE, Place, SizeOf, directory_of

METADATA_PATH = ".metadata"

_STEP = re.compile(r"step-([0-9]{1,18})")


def data_path(rank: int, index: int = 0) -> str:
    """The `index`-th data file of a rank, relative to the step directory."""
    return f"__{rank}_{index}.distcp"


def own_path(rank: int) -> str:
    """The file of what is a rank's own (generators, sampler), relative to the step directory."""
    return f"rank_{rank:05d}.pt"


@dataclass(frozen=True)
class DcpLayout:
    """`step-N/`; DCP writes `.metadata` last, so its presence is what makes a step."""

    name: str = "dcp"
    tracker_name: str | None = None

    def step_name(self, step: int) -> str:
        if step < 0:
            raise StepError(f"step {step} is negative")
        return f"step-{step}"

    def parse_step(self, name: str) -> int | None:
        match = _STEP.fullmatch(name)
        step = int(match[1]) if match else None
        return step if step is not None and self.step_name(step) == name else None

    def tracker_bytes(self, step: int) -> bytes:
        raise OptionError(f"layout {self.name} has no tracker")

    def parse_tracker(self, data: bytes) -> int:
        raise OptionError(f"layout {self.name} has no tracker")

    def place(self, step: int, part: str) -> Place:
        directory = directory_of(part)
        return Place(directory, directory, "dcp", METADATA_PATH)

    def added_files(self, step: int, part: str) -> Mapping[str, bytes]:
        return {}

    def foreign_problem(
        self,
        step: int,
        names: Collection[str],
        tracked: int | None,
        size_of: SizeOf = NOTHING_THERE,
        parts: Collection[str] = (),
    ) -> str | None:
        for path in (f"{part}/{METADATA_PATH}" for part in parts):
            if not size_of(path):
                return f"no {path}: its writer never finished it"
        if parts or METADATA_PATH in names:
            return None
        return f"no {METADATA_PATH}: its writer never finished it"
