"""Choosing a step, matching it to the live objects, and bringing it in.

    candidates -> fragments -> stored tree -> matching -> one verified pass -> what is left to do

Guarantees:
- Until the verified pass begins, nothing live has changed: a step that does not fit leaves no trace.
- Schedulers, samplers and generators are only touched after every byte was found good.
- If a load does not finish, `must_load` says why: the live tensors may be half overwritten.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import restore
from .commit import CheckpointRoot
from .errors import CorruptStepError, LoadError, MismatchError, NoIntactStepError, StepNotFoundError
from .state import TrainingState
from .steps import StepEntry
from .tree import Matching

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resume:
    """What a load found.

    Attributes:
        step: the step whose state the live objects have now.
        path: its directory.
        verified: every byte was checked; False for steps that another tool wrote.
        passed_over: newer steps that were not good, and why.
        seconds: the load took.
        metadata: what save() was given.
    """

    step: int
    path: Path
    verified: bool
    passed_over: tuple[str, ...]
    seconds: float
    metadata: Mapping[str, Any]


_LISTINGS = 3  # in a row without a step to try, before we believe that there is none


def _attempt_of(entry: StepEntry) -> tuple[int, str]:
    return entry.step, entry.manifest.attempt if entry.manifest is not None else ""


class Loader:
    """Loads steps under a root into one training state.

    Attributes:
        must_load: why the live state is not to be trusted until a load succeeds; None if it is.
    """

    def __init__(self, root: CheckpointRoot, state: TrainingState) -> None:
        self._root = root
        self._state = state
        self.must_load: str | None = None

    def latest(self, strict: bool, trusted: bool) -> Resume | None:
        """See `AsyncCheckpointer.load_latest`."""
        passed_over: list[str] = []
        tried: set[tuple[int, str]] = set()
        while (entry := self._next(tried)) is not None:
            tried.add(_attempt_of(entry))
            try:
                return self._load(entry, strict, trusted, tuple(passed_over))
            except (CorruptStepError, StepNotFoundError) as error:
                _log.warning("step %d is passed over: %s", entry.step, error)
                passed_over.append(f"step {entry.step}: {error}")
        if not tried and not self._root.ever_committed():
            self._root.refuse_other_layout()
            return None
        reasons = "\n  ".join(passed_over) or "all were abandoned or removed"
        self.must_load = f"no step under {self._root.path} is good"
        raise NoIntactStepError(f"no step under {self._root.path} is good:\n  {reasons}")

    def _next(self, tried: set[tuple[int, str]]) -> StepEntry | None:
        """The best step not tried yet. The root is listed anew each time: retention of the run that owns it
        may overtake us, and a listing in which all has just vanished is no proof that nothing is there."""
        for _ in range(_LISTINGS):
            for entry in self._root.candidates():
                if _attempt_of(entry) not in tried:
                    return entry
        return None

    def step(self, step: int, strict: bool, trusted: bool, verify_first: bool) -> Resume:
        """See `AsyncCheckpointer.load`."""
        return self._load(self._root.find(step), strict, trusted, (), verify_first)

    def _load(
        self,
        entry: StepEntry,
        strict: bool,
        trusted: bool,
        passed_over: tuple[str, ...],
        verify_first: bool = False,
    ) -> Resume:
        began_s = time.perf_counter()
        if entry.too_new:
            raise LoadError(f"{entry.problem}")
        if entry.problem is not None:
            raise CorruptStepError(str(entry.path), entry.problem)
        listed = None
        if not entry.foreign:
            fragments = self._root.read_fragments(entry)
            listed = {file.path: file for fragment in fragments for file in fragment.files}
        with restore.StepFiles(entry.path, listed) as files:
            matching = self._match(files, strict, trusted)
            if verify_first:
                restore.read_tensors(files, [], verify_only=True)
            self.must_load = f"the load of step {entry.step} did not finish"
            restore.read_tensors(files, matching.reads)
        for action in matching.afterwards:
            action()
        self.must_load = None
        self._root.resume_from(entry.step)
        if entry.foreign:
            _log.warning("step %d was not written by asyncckpt: loaded unverified", entry.step)
        metadata = entry.manifest.metadata if entry.manifest is not None else {}
        seconds = time.perf_counter() - began_s
        return Resume(entry.step, entry.path, not entry.foreign, passed_over, seconds, metadata)

    def _match(self, files: restore.StepFiles, strict: bool, trusted: bool) -> Matching:
        """What goes where; nothing is changed yet."""
        try:
            tree = restore.read_tree(files, self._root.layout.name, trusted=trusted)
            restore.refuse_inert(tree, tuple(self._state.sections))
            matching = self._state.match(tree)
        except Exception as error:
            # Damaged bytes can look like anything. Checksums know better than parsers.
            damage = restore.find_damage(files)
            if damage is not None:
                raise damage from error
            if isinstance(error, OSError | OverflowError | LookupError | TypeError | ValueError):
                raise CorruptStepError(str(files.directory), f"cannot be read: {error}") from error
            raise
        lines = list(matching.differences)
        missing, unexpected = list(matching.missing), list(matching.unexpected)
        if strict and files.entries is not None:  # other tools have sections of their own
            missing += matching.missing_sections
            unexpected += matching.unexpected_sections
        if strict:
            lines += [f"{name}: not in the checkpoint" for name in missing]
            lines += [f"{name}: only in the checkpoint" for name in unexpected]
        if lines:
            damage = restore.find_damage(files)
            if damage is not None:
                raise damage
            raise MismatchError(str(files.directory), lines)
        sections = (*matching.missing_sections, *matching.unexpected_sections)
        for name in (*matching.missing, *matching.unexpected, *sections):
            _log.warning("%s: only in the live state or only in the checkpoint: left as it is", name)
        return matching
