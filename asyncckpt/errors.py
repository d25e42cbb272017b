"""Everything that can go wrong, one class for each thing a caller would do next.

    CheckpointError
    |-- OptionError            an argument is wrong: fix the call
    |-- ClosedError            the checkpointer was closed: make a new one
    |-- ForkedError            used in a forked child: make a new one there
    |-- RootError              the root cannot be used: a file, not writable
    |   `-- RootBusyError      another live run owns it: stop that run first
    |-- StepError              this step number cannot be saved: negative, going backwards
    |   `-- StepExistsError    it is already there, in this timeline
    |-- CaptureError           a CUDA graph is in the way: fence outside of it
    |-- LeafError              a leaf of the state cannot be saved: it is named
    |-- SaveError              a save failed; the last good step is untouched
    |   |-- TornStateError     a tensor changed before it was copied: fence before you mutate
    |   |-- WriteError         the operating system refused: path, offset, errno
    |   |-- DeviceError        a CUDA device or its driver refused: most likely the process must end
    |   |-- RankError          another rank failed, died or does something else: it is named
    |   `-- SaveTimeoutError   a deadline passed: the save was given up, training was not
    `-- LoadError
        |-- DeviceError, RankError   the same, while loading
        |-- StepNotFoundError  no such step
        |-- CorruptStepError   bytes on disk are not the bytes that were written
        |-- NoIntactStepError  steps exist, none is good
        |-- MismatchError      the checkpoint does not fit the live objects: every difference is listed
        `-- UntrustedError     reading it would run code: pass trusted=True if you trust the file

A save that failed never touches an older step. It leaves nothing visible, with two exceptions, which its
message names: a step that is whole, but whose name was not proven to survive a power cut; and, on node-local
disks, one that is whole and published on some nodes, which the others follow with the next save or start.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Iterable


class CheckpointError(Exception):
    """Base of every error that asyncckpt raises on purpose."""


class OptionError(CheckpointError, ValueError):
    """An option or argument has no meaning here."""


class ClosedError(CheckpointError):
    """The checkpointer was closed."""


class ForkedError(CheckpointError):
    """The object belongs to the parent process; its threads do not exist in this child."""


class RootError(CheckpointError):
    """The checkpoint root cannot be used."""


class RootBusyError(RootError):
    """Another live run owns the root."""


class StepError(CheckpointError, ValueError):
    """This step number cannot be saved now."""


class StepExistsError(StepError):
    """The step is already committed in this timeline."""


class CaptureError(CheckpointError, RuntimeError):
    """A CUDA graph is being captured, or its replay would change the state without a fence."""


class LeafError(CheckpointError, TypeError):
    """A leaf of the state cannot be saved; the message names it."""


class SaveError(CheckpointError):
    """A save failed. Older steps are untouched; see the top of this module for what may be visible."""


class TornStateError(SaveError):
    """A tensor changed between `save()` and the moment its bytes were copied."""


class SaveTimeoutError(SaveError):
    """A deadline passed. The save was given up; training was not."""


class WriteError(SaveError):
    """The operating system refused an operation.

    Attributes:
        operation: what was tried ("pwrite", "fsync", "rename", ...).
        path: the file or directory concerned.
        offset: byte offset in the file, or None.
        errno: the error number.
    """

    def __init__(
        self, operation: str, path: str, errno: int, offset: int | None = None, hint: str = ""
    ) -> None:
        self.operation = operation
        self.path = path
        self.offset = offset
        self.errno = errno
        where = f", offset {offset}" if offset is not None else ""
        name = _errno.errorcode.get(errno, str(errno))
        tail = f". {hint}" if hint else ""
        super().__init__(f"{operation} failed: {path}{where}: {name} ({os.strerror(errno)}){tail}")


class LoadError(CheckpointError):
    """A load failed."""


class DeviceError(SaveError, LoadError):
    """A CUDA device or its driver refused an operation. After most of its errors (an illegal address,
    say, whoever's kernel it was) a process cannot use the device again."""


class RankError(SaveError, LoadError):
    """Another rank failed, died or disagrees, or the store in which ranks agree is gone. Every rank raises it
    at the same call, but for the one that failed: that one raises what happened to it."""


class StepNotFoundError(LoadError):
    """No such step under this root."""


class CorruptStepError(LoadError):
    """Bytes on disk are not the bytes that were written.

    Attributes:
        path: the damaged file.
        block: index of the first damaged block, or None when the file as a whole is unusable.
    """

    def __init__(self, path: str, detail: str, block: int | None = None) -> None:
        self.path = path
        self.block = block
        where = f"{path}, block {block}" if block is not None else path
        super().__init__(f"corrupt: {where}: {detail}")


class NoIntactStepError(LoadError):
    """Steps exist under the root, but none of them is good."""


class MismatchError(LoadError):
    """The checkpoint does not fit the live objects.

    Attributes:
        differences: one line for every difference found, in the order of the state.
    """

    def __init__(self, where: str, differences: Iterable[str]) -> None:
        self.differences = tuple(differences)
        lines = "\n  ".join(self.differences)
        super().__init__(
            f"{where} does not fit the live objects, {len(self.differences)} difference(s):\n  {lines}"
        )


class UntrustedError(LoadError):
    """Reading this would run code that the file chooses; pass `trusted=True` to allow it."""
