"""Megatron-LM's directories: `iter_0000050/mp_rank_00/`, and a tracker that names the latest.

Stock Megatron never scans directories: it loads what `latest_checkpointed_iteration.txt` says, and
moves that file only after all ranks wrote. So the tracker is the only witness that an iteration
of its making is whole (megatron/training/checkpointing.py, read_metadata and save_checkpoint).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from ..errors import CorruptStepError, LoadError, StepError
from .dcp import METADATA_PATH
from .place import NOTHING_THERE, Place, SizeOf, directory_of

TRACKER_NAME = "latest_checkpointed_iteration.txt"

_STEP = re.compile(r"iter_([0-9]{7,18})")
_ITERATION = re.compile(rb"[0-9]{1,18}")


@dataclass(frozen=True)
class ModelRank:
    """Where a rank stands in a model that is spread over ranks, and so which files are its.

    Attributes:
        tensor, pipeline, expert: its ranks in these groups.
        tensor_size, pipeline_size, expert_size: how many there are.
        writes_model: whether it is the rank of its data-parallel group that writes `model_optim_rng.pt`.
    """

    tensor: int = 0
    pipeline: int = 0
    expert: int = 0
    tensor_size: int = 1
    pipeline_size: int = 1
    expert_size: int = 1
    writes_model: bool = True

    @property
    def directory(self) -> str:
        """Of its files, relative to the step directory; as get_checkpoint_name in Megatron-LM has it."""
        pipeline = f"_{self.pipeline:03d}" if self.pipeline_size > 1 else ""
        expert = f"_{self.expert:03d}" if self.expert_size > 1 else ""
        return f"mp_rank_{self.tensor:02d}{pipeline}{expert}"

    @property
    def model_path(self) -> str:
        """Of the file with the model."""
        return f"{self.directory}/model_optim_rng.pt"

    @property
    def optimizer_path(self) -> str:
        """Of the file with what a distributed optimizer has for each parameter."""
        return f"{self.directory}/distrib_optim.pt"

    def directories(self) -> set[str]:
        """Of all ranks."""
        return {
            replace(self, tensor=tensor, pipeline=pipeline, expert=expert).directory
            for tensor in range(self.tensor_size)
            for pipeline in range(self.pipeline_size)
            for expert in range(self.expert_size)
        }


# The first rank of a model, whichever way it is spread; which, a directory does not say.
_FIRSTS = tuple(ModelRank(pipeline_size=p, expert_size=e) for p in (1, 2) for e in (1, 2))


@dataclass(frozen=True)
class MegatronLayout:
    """`iter_%07d/`, named by a tracker."""

    name: str = "megatron"
    tracker_name: str | None = TRACKER_NAME

    def step_name(self, step: int) -> str:
        if step < 0:
            raise StepError(f"step {step} is negative")
        return f"iter_{step:07d}"

    def parse_step(self, name: str) -> int | None:
        match = _STEP.fullmatch(name)
        step = int(match[1]) if match else None
        return step if step is not None and self.step_name(step) == name else None

    def tracker_bytes(self, step: int) -> bytes:
        return str(step).encode()  # without newline, as Megatron writes it

    def parse_tracker(self, data: bytes) -> int:
        text = data.strip()  # Megatron strips too: a tracker edited by hand ends in a newline
        if text == b"release":
            raise LoadError(
                f"{TRACKER_NAME} names 'release': converted weights, which hold no training state to resume"
            )
        if not _ITERATION.fullmatch(text):
            raise CorruptStepError(TRACKER_NAME, f"an iteration number expected, got {data[:40]!r}")
        return int(text)

    def place(self, step: int, part: str) -> Place:
        directory = directory_of(part)
        return Place(directory, directory, "megatron")

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
        if tracked is None:
            return f"no {TRACKER_NAME} vouches for it"
        if step > tracked:
            return f"beyond the tracker, which names {tracked}: its writer never finished it"
        for part in parts:
            if not any(size_of(f"{part}/{model.model_path}") for model in _FIRSTS):
                return f"no {part}/{_FIRSTS[0].model_path}"
        if not parts and not any(name.startswith("mp_rank_") for name in names):
            return "no mp_rank_* directory"
        return None


COMMON_PATH = "common.pt"
COMMON_ITEM = "common_state/shard_0_1"  # instead, in .metadata: since Megatron-core 0.19
CONFIG_PATH = "metadata.json"
CONFIG = (  # as megatron/core/dist_checkpointing/core.py (save_config) writes it, byte for byte
    b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
    b'"common_backend": "torch", "common_backend_version": 1}'
)


@dataclass(frozen=True)
class MegatronDistLayout(MegatronLayout):
    """The same directories with the files of megatron-core's dist_checkpointing in them: `torch_dist`."""

    name: str = "megatron-dist"

    def place(self, step: int, part: str) -> Place:
        directory = directory_of(part)
        return Place(directory, directory, "megatron-dist", METADATA_PATH)

    def foreign_problem(
        self,
        step: int,
        names: Collection[str],
        tracked: int | None,
        size_of: SizeOf = NOTHING_THERE,
        parts: Collection[str] = (),
    ) -> str | None:
        if tracked is None or step > tracked:
            return super().foreign_problem(step, names, tracked)
        files = (CONFIG_PATH, METADATA_PATH)  # common.pt, older versions alone have
        missing = [f"{part}/{name}" for part in parts for name in files if not size_of(f"{part}/{name}")]
        if not parts:
            missing = [name for name in files if name not in names]
        return f"no {', '.join(missing)}: not a whole checkpoint of format torch_dist" if missing else None
