"""Which steps lie under a root, and which of them counts. Looks, never writes.

A step is *committed* once its writer finished it; ours are from the moment their name is visible.
It is *foreign* without our manifest, *damaged* if that cannot be read, and *stale* if a later
commit has a smaller number: somebody went back behind it, and its timeline is not the current one.

Guarantees: a directory that vanishes while it is looked at was never there; damage is reported as
an entry's `problem`, so that one bad step never hides the others.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import CorruptStepError, LoadError, OptionError, RootError, StepNotFoundError
from .filesystem import OF_THIS_PROCESS, Filesystem
from .formats.manifest import FRAGMENT_PREFIX, MANIFEST_NAME, Fragment, Manifest
from .layouts import LAYOUTS, Layout
from .nodes import Node, numbered
from .parts import Parts

ABANDONED_PREFIX = ".abandoned-"

_ABANDONED = re.compile(r"\.abandoned-(.+)-[0-9a-f]{16}-[0-9]{6,}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepEntry:
    """A visible step.

    Attributes:
        manifest: None for a step of another tool, and for one whose manifest cannot be read.
        foreign: another tool wrote it: no manifest of ours is there.
        too_new: a newer version of asyncckpt wrote it; nothing is wrong with it.
        problem: why it cannot be loaded, as far as a look at its manifest tells; None if it looks good.
    """

    step: int
    path: Path
    manifest: Manifest | None
    foreign: bool
    problem: str | None
    too_new: bool = False

    @property
    def ordinal(self) -> int | None:
        """Its place in the order of commits, where a manifest says so."""
        return self.manifest.ordinal if self.manifest is not None else None

    @property
    def committed(self) -> bool:
        """Somebody finished writing it once, whatever became of it since."""
        return not self.foreign or self.problem is None


def attempt_of(entry: StepEntry) -> str:
    """Which save it is; empty where no manifest says so."""
    return entry.manifest.attempt if entry.manifest is not None else ""


class RootView:
    """The steps under one root, for those who only read. Thread-safe: it keeps nothing."""

    def __init__(
        self,
        path: Path,
        layout: Layout,
        fs: Filesystem | None = None,
        parts: Parts | None = None,
        node: Node | None = None,
    ) -> None:
        """An absent root is an empty one.

        Args:
            parts: who reads; a step of another tool must have those that were declared.
            node: where the root is on a node's own disk, that node.
        """
        self.path = path
        self.node = node
        self._readers = parts
        self._parts = tuple(parts.world_sizes) if parts is not None and parts.declared else ()
        self.layout = layout
        self.fs = fs if fs is not None else Filesystem()
        self._tracker = None if layout.tracker_name is None else path / layout.tracker_name

    def entries(self) -> list[StepEntry]:
        """All visible steps, by step number; one that vanishes meanwhile is left out.

        Raises:
            RootError: the root cannot be listed.
        """
        tracked = self._tracked_or_none()
        found = []
        for name in self._names():
            step = self.layout.parse_step(name)
            entry = self._look_at(step, self.path / name, tracked) if step is not None else None
            if entry is not None:
                found.append(entry)
        return sorted(found, key=lambda entry: entry.step)

    def candidates(self, below: int | None = None) -> list[StepEntry]:
        """The steps to try when loading the latest, best first, of the current timeline alone.

        Damaged steps are among them, with `problem` set, so that falling back past one can be
        reported. `below` keeps only smaller step numbers.
        """
        committed = [entry for entry in self.entries() if entry.committed]
        # A step is stale if a later commit has a smaller number: somebody went back behind it.
        stale: set[int] = set()
        lowest: int | None = None
        ours = [entry for entry in committed if entry.manifest is not None and entry.problem is None]
        for entry in sorted(ours, key=lambda entry: entry.ordinal or 0, reverse=True):
            if lowest is not None and entry.step > lowest:
                stale.add(entry.step)
            else:
                lowest = entry.step
        return [
            entry
            for entry in reversed(committed)
            if entry.step not in stale and (below is None or entry.step < below)
        ]

    def ever_committed(self) -> bool:
        """Whether any step was ever finished here, damaged and abandoned ones included."""
        return any(entry.committed for entry in self.entries()) or bool(self._abandoned())

    def broken_promise(self) -> str | None:
        """What to say where nothing is there to load, but a tracker: somebody has finished something."""
        try:
            tracked = self.tracked()
        except LoadError as problem:
            return str(problem)
        if tracked is None:
            return None
        return f"{self._tracker} names step {tracked}, which is not there; without that file all begins anew"

    def refuse_other_layout(self) -> None:
        """Raise OptionError if steps of ours lie here in another layout: somebody mixed them up."""
        for other in LAYOUTS.values():
            if other.name == self.layout.name:
                continue
            for name in self._names():
                # Layouts may share names. Of ours, every look says which it is; one may have come just now.
                if self.layout.parse_step(name) is not None:
                    continue
                if other.parse_step(name) is not None and self._has_manifest(self.path / name):
                    raise OptionError(
                        f"{self.path} holds steps of layout {other.name!r}, not {self.layout.name!r}"
                    )

    def _has_manifest(self, path: Path) -> bool:
        try:
            return MANIFEST_NAME in self.fs.listdir(path)
        except OSError:
            return False

    def find(self, step: int) -> StepEntry:
        """The visible step of that number, damaged or not.

        Raises:
            StepNotFoundError: there is none.
        """
        path = self.path / self.layout.step_name(step)
        entry = self._look_at(step, path, self._tracked_or_none())
        if entry is None:
            there = ", ".join(str(entry.step) for entry in self.entries()) or "none"
            raise StepNotFoundError(f"no step {step} under {self.path}; there are: {there}")
        return entry

    def read_fragments(self, entry: StepEntry) -> list[Fragment]:
        """What the files of a step must be.

        Raises:
            StepNotFoundError: the step was deleted meanwhile: choose again.
            CorruptStepError: a fragment is missing or damaged.
            LoadError: this process may open no more files, or has no memory.
        """
        if entry.manifest is None:
            raise CorruptStepError(str(entry.path / MANIFEST_NAME), entry.problem or "there is none")
        fragments = []
        owners: dict[str, str] = {}
        for ref in entry.manifest.fragments:
            path = entry.path / ref.path
            try:
                data = self.fs.read(path)
            except OSError as problem:
                if isinstance(problem, FileNotFoundError) and not entry.path.exists():
                    raise StepNotFoundError(f"step {entry.step} was deleted while it was read") from None
                _raise_if_ours(path, problem)
                raise CorruptStepError(str(path), f"cannot be read: {problem}") from problem
            ref.verify(data, str(path))
            fragment = Fragment.from_bytes(data, str(path))
            if fragment.attempt != entry.manifest.attempt:
                raise CorruptStepError(str(path), f"belongs to attempt {fragment.attempt}")
            for file in fragment.files:
                if owners.setdefault(file.path, ref.path) != ref.path:
                    raise CorruptStepError(str(path), f"{file.path} is listed by {owners[file.path]} too")
            fragments.append(fragment)
        return fragments

    def tracked(self) -> int | None:
        """The step that the tracker names; None without a tracker.

        Raises:
            LoadError: the tracker names no training step, or cannot be read.
        """
        if self._tracker is None:
            return None
        try:
            return self.layout.parse_tracker(self.fs.read(self._tracker))
        except FileNotFoundError:
            return None
        except OSError as problem:
            raise LoadError(f"{self._tracker} cannot be read: {problem}") from problem

    def _names(self) -> list[str]:
        try:
            return self.fs.listdir(self.path)
        except FileNotFoundError:
            return []
        except OSError as problem:
            raise RootError(f"{self.path} cannot be listed: {problem}") from problem

    def _tracked_or_none(self) -> int | None:
        try:
            return self.tracked()
        except LoadError as problem:
            _log.warning("%s", problem)
            return None

    def _look_at(self, step: int, path: Path, tracked: int | None) -> StepEntry | None:
        """The entry at `path`, or None if it is no directory, or gone."""
        try:
            data = self.fs.read(path / MANIFEST_NAME)
        except FileNotFoundError:
            return self._look_at_foreign(step, path, tracked)
        except NotADirectoryError:
            return None
        except OSError as problem:
            _raise_if_ours(path / MANIFEST_NAME, problem)
            return StepEntry(step, path, None, False, f"{MANIFEST_NAME} cannot be read: {problem}")
        try:
            manifest = Manifest.from_bytes(data, str(path / MANIFEST_NAME))
        except CorruptStepError as problem:
            return StepEntry(step, path, None, False, str(problem))
        except LoadError as problem:
            return StepEntry(step, path, None, False, str(problem), too_new=True)
        wrong = None
        if manifest.step != step:
            wrong = f"{path} holds step {manifest.step}: it was renamed"
        elif manifest.layout != self.layout.name:
            wrong = f"{path} has layout {manifest.layout}, not {self.layout.name}"
        elif manifest.nodes:
            wrong = self._other_node(path, manifest)
        return StepEntry(step, path, manifest, False, wrong)

    def _other_node(self, path: Path, manifest: Manifest) -> str | None:
        """Why what ranks have saved to their node's own disk is not for who reads it; None if it is."""
        saved = f"{path} is what ranks {numbered(manifest.node_ranks)} of {manifest.world_size} saved"
        if self.node is None:
            return f'{saved} to the disk of their node; load it there, with disks="node-local"'
        sizes = self._readers.world_sizes if self._readers is not None else {}
        if self.node.place not in manifest.node_ranks or dict(sizes) != manifest.world_sizes:
            here = f"rank {self.node.place} of {sum(sizes.values())}"
            return f"{saved} to the disk of their node, and this is {here}: each must be where it saved"
        return None

    def _look_at_foreign(self, step: int, path: Path, tracked: int | None) -> StepEntry | None:
        try:
            names = self.fs.listdir(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as problem:
            return StepEntry(step, path, None, True, f"{path} cannot be listed: {problem}")
        if any(name == MANIFEST_NAME or name.startswith(FRAGMENT_PREFIX) for name in names):
            return StepEntry(step, path, None, False, f"{path / MANIFEST_NAME} is missing")
        wrong = self.layout.foreign_problem(
            step, names, tracked, lambda name: self._nbytes(path / name), self._parts
        )
        return StepEntry(step, path, None, True, wrong)

    def _nbytes(self, path: Path) -> int | None:
        try:
            return self.fs.stat(path).st_size
        except OSError:
            return None

    def _abandoned(self) -> list[StepEntry]:
        found = []
        for name in self._names():
            match = _ABANDONED.fullmatch(name)
            step = self.layout.parse_step(match[1]) if match else None
            entry = self._look_at(step, self.path / name, None) if step is not None else None
            if entry is not None:
                found.append(entry)
        return found


def _raise_if_ours(path: Path, problem: OSError) -> None:
    """Raise LoadError where nothing is known of the step: an older one would be refused as well."""
    if problem.errno in OF_THIS_PROCESS:
        raise LoadError(f"{path} cannot be read: {problem}; the step may be good") from problem
