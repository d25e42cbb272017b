"""RLinf's directories: `global_step_50/{actor,critic,data}/`, no tracker beside them.

Its runner resumes from the highest number (`resume_dir: auto`) or from the directory that it is told, and
trusts either (rlinf/runners/reasoning_runner.py). Below a step:

    data/data.pt                                          what the driver's dataloader says
    actor/dcp_checkpoint/{.metadata, __0_0.distcp, ...}   rlinf-fsdp   (rlinf/hybrid_engines/fsdp/strategy)
    actor/model_state_dict/full_weights.pt                the whole model, for inference
    actor/iter_0000050/mp_rank_00/model_optim_rng.pt      rlinf-megatron, as Megatron-LM has it; and
    actor/latest_checkpointed_iteration.txt               a tracker per part, which names the one iteration
    actor/rank_00003.pt                                   ours: generators and what else is a rank's own
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import OptionError, StepError
from ..parts import MAIN
from .dcp import METADATA_PATH
from .megatron import TRACKER_NAME, MegatronLayout
from .place import NOTHING_THERE, Place, SizeOf

DCP_DIRECTORY = "dcp_checkpoint"
WEIGHTS_PATH = "model_state_dict/full_weights.pt"  # the docs say full_weigths.pt, the code does not
DATA_NAME = "data.pt"
DATA = "data"  # the driver's part, with a dataloader
DRIVER = "driver"  # and without: RLinf knows no such directory, and ignores it

_STEP = re.compile(r"global_step_([0-9]{1,18})")


@dataclass(frozen=True)
class RlinfLayout(ABC):
    """`global_step_N/`, with a directory per part. See its two kinds."""

    name: str = ""
    tracker_name: str | None = None

    def step_name(self, step: int) -> str:
        if step < 0:
            raise StepError(f"step {step} is negative")
        return f"global_step_{step}"

    def parse_step(self, name: str) -> int | None:
        match = _STEP.fullmatch(name)
        step = int(match[1]) if match else None
        return step if step is not None and self.step_name(step) == name else None

    def tracker_bytes(self, step: int) -> bytes:
        raise OptionError(f"layout {self.name} has no tracker")

    def parse_tracker(self, data: bytes) -> int:
        raise OptionError(f"layout {self.name} has no tracker")

    def place(self, step: int, part: str) -> Place:
        if part == MAIN:
            raise OptionError(
                f"layout {self.name!r} has a directory per part: pass part= and parts=, as in "
                f'part="actor", parts={{"data": 1, "actor": 4}}'
            )
        return Place(part, part, "driver") if part in (DATA, DRIVER) else self._trained(step, part)

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
        """RLinf's driver writes `data/data.pt` last; runs without a dataloader have no such part."""
        trained = [part for part in parts if part not in (DATA, DRIVER)] or ["actor"]
        witnesses = [self._witness(step, part) for part in trained]
        if DATA in parts or DATA in names:
            witnesses.append(f"{DATA}/{DATA_NAME}")
        for path in witnesses:
            if not size_of(path):
                return f"no {path}: its writer never finished it"
        return None

    @abstractmethod
    def _trained(self, step: int, part: str) -> Place:
        """The place of a part that is trained."""

    @abstractmethod
    def _witness(self, step: int, part: str) -> str:
        """The file that the tool of such a part writes last."""


@dataclass(frozen=True)
class RlinfFsdpLayout(RlinfLayout):
    """Of the FSDP backend: actor and critic are DCP checkpoints."""

    name: str = "rlinf-fsdp"

    def _trained(self, step: int, part: str) -> Place:
        return Place(part, part, "rlinf-dcp", f"{DCP_DIRECTORY}/{METADATA_PATH}")

    def _witness(self, step: int, part: str) -> str:
        return f"{part}/{DCP_DIRECTORY}/{METADATA_PATH}"


@dataclass(frozen=True)
class RlinfMegatronLayout(RlinfLayout):
    """Of the Megatron backend: actor and critic are roots of Megatron's with one iteration each."""

    name: str = "rlinf-megatron"
    megatron: ClassVar[MegatronLayout] = MegatronLayout()

    def added_files(self, step: int, part: str) -> Mapping[str, bytes]:
        if part in (DATA, DRIVER):
            return {}
        return {self._witness(step, part): self.megatron.tracker_bytes(step)}

    def _trained(self, step: int, part: str) -> Place:
        return Place(part, f"{part}/{self.megatron.step_name(step)}", "megatron")

    def _witness(self, step: int, part: str) -> str:
        return f"{part}/{TRACKER_NAME}"
