"""The steps on a node's own disk: prepared here, published once the first rank's node has published.

Guarantee: what is published on one node is published on all, at the latest when a run starts: so no rank of
a job ever loads a step that another rank has not. See `nodes` for what becomes of what.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

from .commit import TEMPORARY_PREFIX, Attempt, CheckpointRoot, OnPhase, attempt_id
from .errors import LoadError, RootError, StepExistsError
from .formats.manifest import Manifest
from .nodes import Found, Inventory, Verdict
from .steps import StepEntry, attempt_of

_PREPARED = re.compile(re.escape(TEMPORARY_PREFIX) + r"(?P<step>.+)-(?P<attempt>[0-9a-f]{16}-[0-9]{6,})")

_log = logging.getLogger(__name__)


class NodeRoot(CheckpointRoot):
    """As `CheckpointRoot`, of one node of several. The first participant on it publishes there."""

    _owed: tuple[Attempt, ...] = ()  # prepared here, and published elsewhere
    _left: frozenset[str] = frozenset()  # of these, what belongs to a timeline that was left

    def inventory(self) -> Inventory:
        """What lies here."""
        return Inventory(
            published={attempt_of(e): _found(e.manifest) for e in self._whole() if e.manifest is not None},
            prepared={a.id: _found(m) for a, m in self._prepared() if self._is_here(m)},
            abandoned={
                attempt_of(e): _found(e.manifest) for e in self._abandoned() if e.manifest is not None
            },
            misplaced={m.attempt: _found(m) for m in self._manifests() if not self._is_here(m)},
            foreign=tuple(entry.step for entry in self._whole() if entry.foreign),
            ever=self.ever_committed(),
        )

    def recover(self, verdict: Verdict, incarnation: str) -> None:
        """Bring what lies here to the state that all nodes have agreed on; only for the holder of the lease.

        Raises:
            WriteError: the operating system refused; the next start goes on.
            RootError: something is in the way.
        """
        stale = [entry for entry in self.entries() if attempt_of(entry) in verdict.abandon]
        numbers = {entry.step for entry in stale}
        if stale:
            self._move_tracker_back(attempt_id(incarnation, 0), lambda n: n in numbers, self.entries())
        self._abandon(stale, attempt_id(incarnation, 0))
        prepared = {attempt.id: attempt for attempt, manifest in self._prepared() if self._is_here(manifest)}
        for name in verdict.forward:
            if name in prepared:
                self._catch_up(prepared[name])
        with self._lock:
            self._partial = frozenset(verdict.partial)
            self._ordinal = max(self._ordinal, verdict.ordinal)
        self._track(verdict.newest, incarnation)
        self.sweep(incarnation, verdict.spared)
        for entry in self.entries():
            if attempt_of(entry) in verdict.partial:
                _log.warning("%s is not loaded: other nodes lack it", entry.path)

    def _catch_up(self, attempt: Attempt) -> None:
        self._stage(attempt)
        try:
            self.publish(attempt, keep=True)
        except StepExistsError as error:
            raise RootError(f"{error}; other nodes have published what is prepared here: move it") from error
        _log.warning("%s was published on another node, and now is here", self._target(attempt))

    def _stage(self, attempt: Attempt) -> None:
        """Its tracker; an earlier try may have used it up, or thrown it away."""
        if self._tracker is not None:
            self.fs.unlink(self._staged_tracker(attempt))
            self.fs.write_file(self._staged_tracker(attempt), self.layout.tracker_bytes(attempt.step))

    def _track(self, newest: str, incarnation: str) -> None:
        """The tracker is the same on all nodes: it names the step that was committed last; or what some other
        tool has written since."""
        entries = self.entries()
        entry = next((entry for entry in entries if newest and attempt_of(entry) == newest), None)
        if self._tracker is None or entry is None:
            return
        try:
            tracked = self.tracked()
        except LoadError:
            return  # 'release', or garbled: not by us
        named = next((other for other in entries if other.step == tracked), None)
        is_good = named is not None and named.problem is None and attempt_of(named) not in self._partial
        is_old = named is not None and not named.foreign and (named.ordinal or 0) < (entry.ordinal or 0)
        if not is_good or is_old:
            temporary = self.path / f"{TEMPORARY_PREFIX}forward-{attempt_id(incarnation, 0)}"
            self.fs.replace_file(self._tracker, self.layout.tracker_bytes(entry.step), temporary)

    def resume_from(self, step: int) -> None:
        super().resume_from(step)
        self._left = frozenset(attempt.id for attempt in self._owed if attempt.step > step)

    def owe(self, attempt: Attempt) -> None:
        """What is prepared here was published elsewhere, and is not published here yet."""
        self._owed = (*self._owed, attempt)

    def pay(self, on_phase: OnPhase = lambda phase: None) -> None:
        """Publish what is owed, oldest first. `on_phase` hears of the newest.

        What belongs to a timeline that was left is removed instead: elsewhere it is abandoned now.

        Raises:
            StepExistsError, WriteError: see `publish`; what was not published is still owed.
        """
        for attempt in self._owed:
            if attempt.id in self._left:
                self.discard(attempt)
        self._owed = tuple(attempt for attempt in self._owed if attempt.id not in self._left)
        self._left = frozenset()
        while self._owed:
            attempt, *rest = self._owed
            self._stage(attempt)
            self.publish(attempt, (lambda phase: None) if rest else on_phase, keep=True)
            self._owed = tuple(rest)

    def _whole(self) -> list[StepEntry]:
        return [entry for entry in self.entries() if entry.problem is None]

    def _prepared(self) -> list[tuple[Attempt, Manifest]]:
        found = []
        for name in self._names():
            match = _PREPARED.fullmatch(name)
            step = self.layout.parse_step(match["step"]) if match else None
            if match is None or step is None:
                continue
            manifest = self._manifest_in(self.path / name)
            if manifest is not None and (manifest.attempt, manifest.step) == (match["attempt"], step):
                found.append((Attempt(manifest.attempt, step, self.path / name, ()), manifest))
        return found

    def _manifests(self) -> Iterator[Manifest]:
        """Of all that is published or prepared here, for whomever."""
        yield from (entry.manifest for entry in self.entries() if entry.manifest is not None)
        yield from (manifest for _, manifest in self._prepared())

    def _is_here(self, manifest: Manifest) -> bool:
        """Whether it is of ranks that are on this node now."""
        return not manifest.nodes or self._other_node(self.path, manifest) is None


def _found(manifest: Manifest) -> Found:
    return Found(manifest.step, manifest.ordinal, manifest.nodes)
