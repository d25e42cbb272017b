"""Checkpoints that do not stop training and never resume from half a step."""

from .checkpointer import AsyncCheckpointer
from .errors import CheckpointError
from .inflight import SaveHandle
from .loader import Resume
from .report import SaveReport

__all__ = ["AsyncCheckpointer", "CheckpointError", "Resume", "SaveHandle", "SaveReport"]
__version__ = "0.1.0"
