"""How a step becomes visible and durable, and how old ones go.

Everything of an attempt is built in a hidden directory beside its target. `T` is the step resumed
from, `S` the step being saved; "older" means whatever was there before.

    after                    files    manifest  visible        tracker     a crash here leaves
    -----------------------  -------  --------  -------------  ----------  -------------------------
    begin                    -        -         older          older       older; hidden leftovers
    files written (engine)   fsynced  -         older          older       older; hidden leftovers
    write_fragment           fsynced  fragment  older          older       older; hidden leftovers
      [2] the vote           fsynced  fragments older          older       older; hidden leftovers
    prepare                  fsynced  fsynced   older          older       older; hidden leftovers
      [1] tracker moves back fsynced  fsynced   older          T           T or the old newest
      [1] each step above T  fsynced  fsynced   fewer above T  T           T or the old newest
      [1] "abandoned"        fsynced  fsynced   up to T        T           T; the rest hidden, kept
      "renamed"              fsynced  fsynced   up to S        older or T  S, or as before; S whole
      "durable"              fsynced  fsynced   S              older or T  S
      "tracked"              fsynced  fsynced   S              S           S
    retain: made hidden      -        -         S, less older  S           S; hidden leftovers
    retain: unlinked         -        -         S, less older  S           S; hidden leftovers

    [1] only when steps above T are visible: the first save after loading an older step starts a
        new timeline. The steps go lowest first, each fsynced, so that the highest visible number
        is the old newest until the last of them goes, and from then on T: never one in between.
    [2] where several ranks write: each has fsynced its files, its fragment and the directories before
        it votes; from here on rank 0 acts alone.

An *error* before the rename discards the hidden directory and leaves the row above it. An error
after the rename leaves S visible, because S is whole: every byte of it was fsynced. What is not
proven is that its *name* survives a power cut (or, with a tracker, that the tracker names it). The
save reports that as failed; the next publish repeats the fsync before it shows anything, and moves
the tracker past both; until then nothing is deleted. All that needs disk space, the tracker's new
content too, is written before the rename, so a full disk strikes while nothing is visible.

Guarantees: a step directory under its final name is whole; the tracker names a visible whole step;
nothing is deleted but what carries our readable manifest or our hidden name; a step we did not
write, or whose manifest is damaged, is never deleted. The caller holds the lease of the root.
"""

from __future__ import annotations

import errno
import logging
import re
import secrets
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import (
    CorruptStepError,
    LoadError,
    OptionError,
    RootError,
    SaveError,
    StepError,
    StepExistsError,
    WriteError,
)
from .filesystem import Filesystem
from .formats.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Fragment,
    FragmentRef,
    Manifest,
    check_path,
    fragment_name,
)
from .layouts import Layout
from .nodes import Node
from .parts import Parts
from .steps import ABANDONED_PREFIX, RootView, StepEntry, attempt_of

OnPhase = Callable[[str], None]

TEMPORARY_PREFIX = ".asyncckpt-tmp-"
TRASH_PREFIX = ".asyncckpt-trash-"

_ATTEMPT = re.compile(r"[0-9a-f]{16}-[0-9]{6,}")
_LEFTOVER = re.compile(r"\.asyncckpt-(?:tmp|trash)-.+-([0-9a-f]{16})-[0-9]{6,}")

_log = logging.getLogger(__name__)


def new_incarnation() -> str:
    """An id for one run over a root: 64 random bits."""
    return secrets.token_hex(8)


def attempt_id(incarnation: str, save: int) -> str:
    """The id of a run's `save`-th attempt. No other attempt, retry or run ever has the same."""
    return f"{incarnation}-{save:06d}"


@dataclass(frozen=True)
class Attempt:
    """A save under way: a hidden directory that only this attempt writes into.

    Attributes:
        directories: below `path`, parents first.
        base: where below `path` this process's plan begins; "" is `path` itself.
    """

    id: str
    step: int
    path: Path
    directories: tuple[Path, ...]
    base: str = ""

    @property
    def files(self) -> Path:
        """Where the paths of this process's plan begin."""
        return self.path / self.base


def _ensure_directory(path: Path, fs: Filesystem) -> None:
    try:
        fs.mkdir(path)
    except WriteError:
        if not path.is_dir():  # else another rank of this job was faster
            raise


def prepare_root(path: Path, fs: Filesystem) -> None:
    """Make sure that steps can be written under `path`; creates it, durably, where it is absent.

    Raises:
        RootError: it is a file, or cannot be created or written to.
    """
    absent = []
    directory = path
    try:
        while not directory.is_dir():
            if (directory.exists() or directory.is_symlink()) and not directory.is_dir():  # nor made just now
                raise RootError(f"{directory} is not a directory; checkpoints need a directory of their own")
            absent.append(directory)
            directory = directory.parent
    except PermissionError as problem:
        raise RootError(f"{path} cannot be reached: {problem}") from problem
    probe = path / f"{TEMPORARY_PREFIX}probe-{attempt_id(new_incarnation(), 0)}"
    try:
        for directory in reversed(absent):
            _ensure_directory(directory, fs)
        for directory in absent:
            fs.fsync_dir(directory.parent)
        fs.write_file(probe, b"")
        fs.unlink(probe)
    except WriteError as problem:
        raise RootError(f"{path} is not writable: {problem}") from problem


class CheckpointRoot(RootView):
    """The steps under one root, and the one door through which they become visible.

    Reads the root when constructed: construct it after the lease was taken. One thread at a time
    may publish, retain or sweep; `begin`, `check_step`, `candidates`, `entries` and reading may run
    beside it, and so may `discard` of another attempt.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        fs: Filesystem | None = None,
        parts: Parts | None = None,
        node: Node | None = None,
    ) -> None:
        """Raises RootError if `path` is not a directory that can be listed; absent is as empty."""
        super().__init__(path, layout, fs, parts, node)
        self._lock = threading.Lock()  # guards the fields below; never held during I/O
        self._resumed_from: int | None = None
        self._ceiling: int | None = None  # steps above it belong to a timeline that was left
        self._unproven = False  # the last rename may not survive a power cut
        self._partial: frozenset[str] = frozenset()  # attempts that other nodes lack
        entries = self.entries()
        hidden = self._abandoned()
        self._newest = max((entry.step for entry in entries if entry.committed), default=-1)
        known = [entry.ordinal or 0 for entry in (*entries, *hidden)]
        # A manifest that cannot be read hides its ordinal: leave room for each of them.
        damaged = sum(1 for entry in (*entries, *hidden) if not entry.foreign and entry.manifest is None)
        self._ordinal = max(known, default=0) + damaged

    # -- timelines

    def resume_from(self, step: int) -> None:
        """The live state is now that of `step`: what is saved next continues from there.

        Steps above it stay until the next publish, which hides them.
        """
        with self._lock:
            self._resumed_from = self._ceiling = self._newest = step

    def check_step(self, step: int) -> None:
        """Whether `step` may be saved next. Looks at the disk only when the answer seems to be no.

        Raises:
            StepExistsError: it is there already, in this timeline.
            StepError: it is negative, or older than this timeline's newest.
        """
        if step < 0:
            raise StepError(f"step {step} is negative")
        if self.layout.parse_step(self.layout.step_name(step)) != step:
            raise StepError(f"step {step} is too large for layout {self.layout.name}")
        with self._lock:
            if step > self._newest:
                return
        self._refuse(step)

    def _refuse(self, step: int) -> None:
        entries = self._of_this_timeline()
        for entry in entries:
            if entry.step == step:
                why = "it was not written by asyncckpt; move it away" if entry.foreign else "it is committed"
                raise StepExistsError(f"step {step} exists: {entry.path}: {why}")
        newest = max((entry.step for entry in entries if entry.committed), default=-1)
        with self._lock:
            self._newest = newest  # somebody may have removed steps by hand
        if step < newest:
            raise StepError(
                f"step {step} lies before step {newest}, the newest under {self.path}: "
                f"load an older step first, then its successors give way"
            )

    def _check_target(self, attempt: Attempt, target: Path) -> None:
        self.check_step(attempt.step)
        with self._lock:
            ceiling = self._ceiling
        if target.name in self._names() and (ceiling is None or attempt.step <= ceiling):
            self._refuse(attempt.step)

    def _of_this_timeline(self) -> list[StepEntry]:
        with self._lock:
            ceiling = self._ceiling
        return [entry for entry in self.entries() if ceiling is None or entry.step <= ceiling]

    # -- one attempt

    def begin(
        self,
        step: int,
        attempt: str,
        directories: Iterable[str] = (),
        *,
        base: str = "",
        shared: bool = False,
    ) -> Attempt:
        """Create the hidden directory of an attempt, with `directories` below it.

        Args:
            base: see `Attempt`; `directories` are relative to the attempt's path, as it is.
            shared: several ranks write into it; whoever comes first creates it.

        Raises:
            WriteError: the operating system refused; nothing is left behind.
        """
        if not _ATTEMPT.fullmatch(attempt):
            raise OptionError(f"not an attempt id: {attempt!r}")
        path = self.path / f"{TEMPORARY_PREFIX}{self.layout.step_name(step)}-{attempt}"
        below: set[Path] = set()
        for name in (*directories, *([base] if base else ())):
            directory = path / check_path(name)
            while directory != path:
                below.add(directory)
                directory = directory.parent
        begun = Attempt(attempt, step, path, tuple(sorted(below)), base)  # sorted: parents come first
        try:
            for directory in (path, *begun.directories):
                if shared:
                    _ensure_directory(directory, self.fs)
                else:
                    self.fs.mkdir(directory)
        except BaseException:
            if not shared:
                self.discard(begun)
            raise
        return begun

    def write_fragment(self, attempt: Attempt, rank: int, files: Sequence[FileEntry]) -> FragmentRef:
        """Record what `rank` wrote, all of it fsynced already.

        Raises:
            SaveError: a file is not there, or not as long as its entry says.
            WriteError: the operating system refused.
        """
        for file in files:
            path = attempt.path / file.path
            try:
                nbytes = self.fs.stat(path).st_size
            except OSError as problem:
                raise WriteError("stat", str(path), problem.errno or errno.EIO) from problem
            if nbytes != file.nbytes:
                raise SaveError(f"{path}: {file.nbytes} bytes were to be written, {nbytes} are there")
        name = fragment_name(rank)
        data = Fragment(attempt.id, rank, tuple(files)).to_bytes()
        self.fs.write_file(attempt.path / name, data)
        return FragmentRef(name, len(data), zlib.crc32(data))

    def add_file(self, attempt: Attempt, path: str, data: bytes, block_nbytes: int) -> FileEntry:
        """Add a file that no plan has, in a directory that is there; its entry for the fragment.

        Its directory may be another part's, which has made it durable before: then it is so once more.
        """
        target = attempt.path / check_path(path)
        self.fs.write_file(target, data)
        if target.parent not in (attempt.path, *attempt.directories):
            self.fs.fsync_dir(target.parent)
        blocks = range(0, len(data), block_nbytes)
        crcs = tuple(zlib.crc32(data[begin : begin + block_nbytes]) for begin in blocks)
        return FileEntry(path, len(data), block_nbytes, crcs)

    def settle_part(self, attempt: Attempt) -> None:
        """Make the names of what this rank wrote durable; the first rank's publish does so for its own."""
        for directory in (*reversed(attempt.directories), attempt.path):
            self.fs.fsync_dir(directory)

    def check_fragment(self, attempt: Attempt, ref: FragmentRef) -> None:
        """Raise SaveError unless this process sees a fragment that another rank wrote."""
        path = attempt.path / ref.path
        try:
            nbytes = self.fs.stat(path).st_size
        except OSError as problem:
            raise SaveError(f"{path}, which another rank wrote, is not there: {problem}") from problem
        if nbytes != ref.nbytes:
            raise SaveError(f"{path}: another rank wrote {ref.nbytes} bytes, {nbytes} are there")

    def note_published(self, step: int) -> None:
        """Another rank has published `step` of this timeline."""
        with self._lock:
            self._newest = step
            self._ceiling = None

    def next_ordinal(self) -> int:
        """Of the next commit, in the order of all. A failure may leave a gap: two never share one."""
        with self._lock:
            self._ordinal += 1
            return self._ordinal

    def prepare(
        self,
        attempt: Attempt,
        fragments: Sequence[FragmentRef],
        *,
        parts: Parts | None = None,
        metadata: Mapping[str, Any] | None = None,
        ordinal: int | None = None,
    ) -> Manifest:
        """Write the manifest. When it returns, all of the attempt is durable, and a rename makes it a step.

        Args:
            parts: who wrote it; None is one rank alone.
            ordinal: None is the next one.

        Raises:
            StepError, StepExistsError: see `check_step`.
            WriteError: the operating system refused; nothing is left behind.
        """
        parts = parts or Parts.none(1)
        manifest = Manifest(
            attempt=attempt.id,
            ordinal=self.next_ordinal() if ordinal is None else ordinal,
            step=attempt.step,
            layout=self.layout.name,
            world_size=parts.world_size,
            parts=tuple(parts.world_sizes),
            part_world_sizes=tuple(parts.world_sizes.values()) if parts.declared else (),
            fragments=tuple(fragments),
            metadata=dict(metadata or {}),
            nodes=self.node.count if self.node is not None else 0,
            node_ranks=self.node.places if self.node is not None else (),
        )
        try:
            self._check_target(attempt, self._target(attempt))
            self._write_manifest(attempt, manifest)
        except BaseException:
            self.discard(attempt)
            raise
        return manifest

    def publish(
        self, attempt: Attempt, on_phase: OnPhase = lambda phase: None, *, keep: bool = False
    ) -> None:
        """Make visible what was prepared. When it returns, the step survives a power cut.

        Args:
            keep: what was prepared, should that fail.

        `on_phase` hears "abandoned" (if a timeline was left), "renamed", "durable" and "tracked" (if the
        layout has a tracker), each when that phase has ended. What it raises ends the publish as a
        failure there would.

        Raises:
            StepExistsError: somebody else has made it meanwhile.
            WriteError: the operating system refused; the message says if the step is visible.
        """
        target = self._target(attempt)
        try:
            self._settle()
            if self._leave_timeline(attempt):
                on_phase("abandoned")
            self._rename(attempt, target)
        except BaseException:
            if not keep:
                self.discard(attempt)
            raise
        with self._lock:
            self._newest = attempt.step
            self._ceiling = None
            self._unproven = True
        self._prove(attempt, target, on_phase)

    def _target(self, attempt: Attempt) -> Path:
        return self.path / self.layout.step_name(attempt.step)

    def discard(self, attempt: Attempt) -> None:
        """Give an attempt up. Failing to clean up is logged, not raised: the next start sweeps."""
        self._empty(attempt.path)
        self._empty(self._staged_tracker(attempt))

    def _write_manifest(self, attempt: Attempt, manifest: Manifest) -> None:
        self.fs.write_file(attempt.path / MANIFEST_NAME, manifest.to_bytes())
        if self._tracker is not None:
            self.fs.write_file(self._staged_tracker(attempt), self.layout.tracker_bytes(attempt.step))
        self.settle_part(attempt)

    def _settle(self) -> None:
        # An earlier publish could not fsync the root after its rename. Before more is built on
        # that, it must succeed.
        if self._unproven:
            self.fs.fsync_dir(self.path)
            with self._lock:
                self._unproven = False

    def _leave_timeline(self, attempt: Attempt) -> bool:
        with self._lock:
            ceiling = self._ceiling
        if ceiling is None:
            return False
        entries = self.entries()
        stale = [entry for entry in entries if entry.step > ceiling]
        self._move_tracker_back(attempt.id, lambda step: step > ceiling, entries)
        self._abandon(stale, attempt.id)
        return bool(stale)

    def _abandon(self, stale: Sequence[StepEntry], attempt: str) -> None:
        for entry in stale:  # lowest first, each made durable: see the table
            hidden = self.path / f"{ABANDONED_PREFIX}{entry.path.name}-{attempt}"
            self.fs.rename(entry.path, hidden)
            self.fs.fsync_dir(self.path)

    def _move_tracker_back(
        self, attempt: str, goes: Callable[[int], bool], entries: Collection[StepEntry]
    ) -> None:
        if self._tracker is None:
            return
        try:
            tracked = self.tracked()
        except CorruptStepError:
            return  # stock tools refuse it as it is; this publish will replace it
        except LoadError as problem:
            cause = problem.__cause__
            if isinstance(cause, OSError):
                raise WriteError("read", str(self._tracker), cause.errno or errno.EIO) from problem
            return  # 'release': does not name a step that is about to go
        kept = [entry.step for entry in entries if not goes(entry.step) and entry.problem is None]
        if tracked is not None and goes(tracked) and kept:
            temporary = self.path / f"{TEMPORARY_PREFIX}back-{attempt}"
            try:
                self.fs.replace_file(self._tracker, self.layout.tracker_bytes(max(kept)), temporary)
            except WriteError:
                self._empty(temporary)
                raise

    def _rename(self, attempt: Attempt, target: Path) -> None:
        try:
            self.fs.rename(attempt.path, target)
        except WriteError as problem:
            # NFS repeats a request whose answer was lost; the repetition fails although the
            # first one did it.
            try:
                if Manifest.from_bytes(self.fs.read(target / MANIFEST_NAME)).attempt == attempt.id:
                    return
            except (OSError, LoadError):
                pass
            if problem.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise StepExistsError(f"step {attempt.step} exists: {target} appeared meanwhile") from problem
            raise

    def _prove(self, attempt: Attempt, target: Path, on_phase: OnPhase) -> None:
        hint = f"{target.name} is visible and whole, but a power cut may undo it; the next save tries again"
        try:
            on_phase("renamed")
            self._settle()
            hint = f"{target.name} is committed, only the tracker does not name it; the next save moves it"
            on_phase("durable")
            if self._tracker is not None:
                self.fs.rename(self._staged_tracker(attempt), self._tracker)
                with self._lock:
                    self._unproven = True
                self._settle()
                on_phase("tracked")
        except WriteError as problem:
            self._empty(self._staged_tracker(attempt))
            raise WriteError(problem.operation, problem.path, problem.errno, hint=hint) from problem

    def _staged_tracker(self, attempt: Attempt) -> Path:
        return self.path / f"{TEMPORARY_PREFIX}tracker-{attempt.id}"

    # -- what goes

    def retain(
        self, keep_last: int | None, keep_every: int | None = None, protect: Collection[int] = ()
    ) -> list[int]:
        """Delete old steps; returns their numbers.

        Kept are: the `keep_last` last *committed* (a rollback makes numbers lie), all divisible by
        `keep_every`, those in `protect`, the one resumed from, the one that the tracker names,
        steps of other tools and damaged ones. Abandoned steps, and those that other nodes lack, go once
        `keep_last` steps were committed after them. With `keep_last` None nothing ever goes.

        Raises:
            OptionError: a limit below 1.
            WriteError: a step could not be hidden; it is tried again next time.
        """
        for name, limit in (("keep_last", keep_last), ("keep_every", keep_every)):
            if limit is not None and limit < 1:
                raise OptionError(f"{name} must be at least 1, got {limit}")
        with self._lock:
            undecided = self._ceiling is not None  # steps above it still count, and must not
            keep = {*protect, *([] if self._resumed_from is None else [self._resumed_from])}
        if keep_last is None or undecided:
            return []
        self._settle()
        tracked = self._tracked_or_none()
        all_ours = sorted(
            (entry for entry in self.entries() if entry.manifest is not None and entry.problem is None),
            key=lambda entry: entry.ordinal or 0,
        )
        partial = [entry for entry in all_ours if attempt_of(entry) in self._partial]
        ours = [entry for entry in all_ours if entry not in partial]
        doomed = [
            entry
            for entry in ours[:-keep_last]
            if entry.step not in keep
            and entry.step != tracked
            and not (keep_every is not None and entry.step % keep_every == 0)
        ]
        successors_from = ours[-keep_last].ordinal if len(ours) >= keep_last else None
        outlived = [
            entry
            for entry in (*partial, *self._abandoned())
            if successors_from is not None and entry.ordinal is not None and entry.ordinal < successors_from
        ]
        self._delete(doomed + outlived)
        return sorted(entry.step for entry in doomed)

    def _delete(self, entries: Sequence[StepEntry]) -> None:
        trash = []
        for entry in entries:
            if entry.manifest is None:
                continue  # whose it is, nobody can tell
            hidden = self.path / f"{TRASH_PREFIX}{entry.path.name.lstrip('.')}-{entry.manifest.attempt}"
            self.fs.rename(entry.path, hidden)
            trash.append(hidden)
        if trash:
            self.fs.fsync_dir(self.path)  # first gone, then emptied: never visible and half empty
        for path in trash:
            self._empty(path)

    def sweep(self, incarnation: str, spared: Collection[str] = ()) -> list[Path]:
        """Remove what dead runs left half done; `incarnation` is ours, and is spared, as are some attempts.

        Only for the holder of the lease. Abandoned steps are not leftovers, nor is what was prepared for the
        disks of several nodes by other ranks than are here: it may be published there. What cannot be removed
        is logged.
        """
        leftovers = []
        for name in self._names():
            match = _LEFTOVER.fullmatch(name)
            if match is not None and match[1] != incarnation and not name.endswith(tuple(spared)):
                manifest = self._manifest_in(self.path / name)
                if manifest is None or not manifest.nodes or self._other_node(self.path, manifest) is None:
                    leftovers.append(self.path / name)
                else:
                    _log.warning("%s is left as it is: other nodes may have published it", self.path / name)
        return [path for path in leftovers if self._empty(path)]

    def _manifest_in(self, path: Path) -> Manifest | None:
        """Of a hidden directory, if it was prepared."""
        try:
            return Manifest.from_bytes(self.fs.read(path / MANIFEST_NAME), str(path))
        except (OSError, LoadError):
            return None

    def _empty(self, path: Path) -> bool:
        """Remove something hidden. What resists is logged: the next start sweeps."""
        try:
            self.fs.remove_tree(path)
        except WriteError as problem:
            _log.warning("left behind, swept at the next start: %s", problem)
            return False
        return True
