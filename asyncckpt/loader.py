"""Choosing a step, matching it to the live objects, and bringing it in.

    candidates -> fragments -> stored tree -> matching -> one verified pass -> what is left to do

Guarantees:
- Until the verified pass begins, nothing live has changed: a step that does not fit leaves no trace.
- Schedulers, samplers and generators are only touched after every byte was found good.
- If a load does not finish, `must_load` says why: the live tensors may be half overwritten.
- Of several ranks, all load the same step, or none does: each says how it went before anything live changes,
  after it read its part, and when all is in place.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from . import restore
from .commit import CheckpointRoot
from .errors import (
    CorruptStepError,
    LoadError,
    MismatchError,
    NoIntactStepError,
    RankError,
    StepNotFoundError,
)
from .formats.manifest import FileEntry
from .garbage import no_garbage_collection
from .layouts.dcp import own_path
from .layouts.megatron import ModelRank
from .layouts.place import Place
from .node_root import NodeRoot
from .nodes import Inventory, numbered
from .parts import Member
from .ranks import Ranks
from .state import TrainingState
from .steps import StepEntry, attempt_of
from .tree import OWN_SECTIONS, Matching

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


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
        left: sections that are a rank's own (generators, sampler), left as they are because another number of
            ranks saved the step.
        phases: seconds from the beginning of the load until each phase was reached: listed (files are known,
            and what they must be), parsed (what is no tensor was read), matched (every tensor has a place in
            live memory), read (all bytes are there; checked, where they can be), applied.
    """

    step: int
    path: Path
    verified: bool
    passed_over: tuple[str, ...]
    seconds: float
    metadata: Mapping[str, Any]
    left: tuple[str, ...] = ()
    phases: Mapping[str, float] = field(default_factory=dict)


_LISTINGS = 3  # in a row without a step to try, before we believe that there is none


_DAMAGED = "damaged: "  # a rank's word for a step that may be passed over
_FAILED = "failed: "  # and for what ends the load


def _attempt_of(entry: StepEntry) -> tuple[int, str]:
    return entry.step, attempt_of(entry)


class Loader:
    """Loads steps under a root into one training state.

    Attributes:
        must_load: why the live state is not to be trusted until a load succeeds; None if it is.
    """

    def __init__(
        self,
        root: CheckpointRoot,
        state: TrainingState,
        ranks: Ranks,
        member: Member,
        model_rank: ModelRank | None = None,
    ) -> None:
        self._model_rank = model_rank
        self._root = root
        self._state = state
        self._ranks = ranks
        self._member = member
        self.must_load: str | None = None

    def latest(self, strict: bool, trusted: bool) -> Resume | None:
        """See `AsyncCheckpointer.load_latest`."""
        passed_over: list[str] = []
        tried: set[tuple[int, str]] = set()
        self._ranks.converse()

        def choose(said: list[bytes]) -> dict[str, Any]:
            return self._choose(tried, passed_over, [Inventory.from_bytes(word) for word in said])

        while True:
            chosen = self._ranks.consult(
                self._inventory(),
                self._ranks.nodes.leaders if self._ranks.nodes.are_several else (),
                choose,
            )
            passed_over += chosen["lacking"]
            if chosen["bad"] is not None:
                self.must_load = f"no step under {self._root.path} is good"
                raise NoIntactStepError(chosen["bad"])
            if chosen["step"] is None:
                return None
            step, attempt = chosen["step"], chosen["attempt"]
            tried.add((step, attempt))

            def find(step: int = step, attempt: str = attempt) -> StepEntry:
                return self._find(step, attempt)

            try:
                return self._load(find, strict, trusted, tuple(passed_over))
            except (CorruptStepError, StepNotFoundError) as error:
                _log.warning("step %d is passed over: %s", step, error)
                passed_over.append(f"step {step}: {error}")

    def _inventory(self) -> bytes:
        """What lies on this node's disk, where there are several; its first rank looks, and all hear if it
        cannot."""
        root = self._root
        if not isinstance(root, NodeRoot):
            return b""
        return self._together(lambda: root.inventory().to_bytes() if self._ranks.leads else b"")

    def _choose(
        self, tried: set[tuple[int, str]], passed_over: list[str], nodes: list[Inventory]
    ) -> dict[str, Any]:
        """The next step to try, or none, or why none is good; for all ranks.

        Args:
            nodes: what lies on each node, where there are several.
        """
        promise = self._root.broken_promise()  # before the listing: a tracker moves when its step is there
        lacking: list[str] = []
        entry = self._next(tried)
        while entry is not None and not all(node.has(*_attempt_of(entry)) for node in nodes):
            lacking.append(f"step {entry.step}: {self._lacking(entry, nodes)}")
            tried.add(_attempt_of(entry))
            entry = self._next(tried)
        ever = entry is not None or bool(tried) or self._root.ever_committed()
        ever = ever or any(node.ever for node in nodes)
        if entry is None and ever:
            entry = self._next(tried)  # the first step may have come in between
        chosen: dict[str, Any] = {"step": None, "bad": None, "lacking": lacking}
        if entry is not None:
            step, attempt = _attempt_of(entry)
            return {**chosen, "step": step, "attempt": attempt}
        if not ever:
            self._root.refuse_other_layout()
            for entry in self._root.entries():
                _log.warning("%s is not loaded: %s", entry.path, entry.problem)
            return {**chosen, "bad": promise}
        elsewhere = {found.step for node in nodes for found in node.published.values()}
        lacking += [
            f"step {step}: on the disks of other nodes, not on that of {self._ranks.called(0)}"
            for step in sorted(elsewhere - {number for number, _ in tried})
        ]
        reasons = "\n  ".join([*passed_over, *lacking]) or "all were abandoned or removed"
        return {**chosen, "bad": f"no step under {self._root.path} is good:\n  {reasons}"}

    def _lacking(self, entry: StepEntry, nodes: list[Inventory]) -> str:
        """Why a step is not good on all nodes."""
        if entry.problem is not None:
            return entry.problem
        of_nodes = zip(self._ranks.nodes.groups, nodes, strict=True)
        without = [numbered(places) for places, node in of_nodes if not node.has(*_attempt_of(entry))]
        return f"not on the disk of rank(s) {' nor on that of '.join(without)}"

    def _next(self, tried: set[tuple[int, str]]) -> StepEntry | None:
        """The best step not tried yet. The root is listed anew each time: retention of the run that owns it
        may overtake us, and a listing in which all has just vanished is no proof that nothing is there."""
        for _ in range(_LISTINGS):
            for entry in self._root.candidates():
                if _attempt_of(entry) not in tried:
                    return entry
        return None

    def _find(self, step: int, attempt: str) -> StepEntry:
        """The step that was chosen, if this rank sees the same one."""
        entry = self._root.find(step)
        if _attempt_of(entry) != (step, attempt):
            raise StepNotFoundError(f"{entry.path} is another save than the one that was chosen")
        return entry

    def step(self, step: int, strict: bool, trusted: bool, verify_first: bool) -> Resume:
        """See `AsyncCheckpointer.load`."""
        self._ranks.converse()
        chosen = self._ranks.choose(lambda: {"step": step, "attempt": self._attempt_here(step)})

        def find() -> StepEntry:
            if chosen["step"] != step:
                first = self._ranks.called(0)
                raise RankError(f"{self._member} loads step {step} where {first} loads step {chosen['step']}")
            return self._root.find(step) if chosen["attempt"] is None else self._find(step, chosen["attempt"])

        return self._load(find, strict, trusted, (), verify_first)

    def _load(
        self,
        find: Callable[[], StepEntry],
        strict: bool,
        trusted: bool,
        passed_over: tuple[str, ...],
        verify_first: bool = False,
    ) -> Resume:
        began_s = time.perf_counter()
        phases: dict[str, float] = {}

        def mark(phase: str) -> None:
            phases[phase] = time.perf_counter() - began_s

        with no_garbage_collection(), ExitStack() as opened:

            def prepare() -> tuple[StepEntry, restore.StepFiles, tuple[str, ...], Matching]:
                entry = find()
                files = opened.enter_context(self._files(entry))
                left = self._left(entry)
                mark("listed")
                matching = self._match(files, entry, left, strict, trusted, mark)
                mark("matched")
                if verify_first:
                    restore.read_tensors(files, [], verify_only=True, share=self._share)
                return entry, files, left, matching

            entry, files, left, matching = self._together(prepare)

            def read() -> None:
                self.must_load = f"the load of step {entry.step} did not finish"
                restore.read_tensors(files, matching.reads, share=self._share)
                matching.reads.clear()

            self._together(read)
            mark("read")

        def apply() -> None:
            for action in matching.afterwards:
                action()

        self._together(apply)
        mark("applied")
        self.must_load = None
        self._root.resume_from(entry.step)
        if entry.foreign:
            _log.warning("step %d was not written by asyncckpt: loaded unverified", entry.step)
        if left:
            _log.warning("%s: left as it is, since another number of ranks saved it", ", ".join(left))
        metadata = entry.manifest.metadata if entry.manifest is not None else {}
        seconds = time.perf_counter() - began_s
        return Resume(entry.step, entry.path, not entry.foreign, passed_over, seconds, metadata, left, phases)

    def _files(self, entry: StepEntry) -> restore.StepFiles:
        all_here = self._share[1] == 1 and not self._state.devices()
        return restore.StepFiles(entry.path, self._listed(entry), all_here=all_here)

    def _attempt_here(self, step: int) -> str | None:
        try:
            return attempt_of(self._root.find(step))
        except StepNotFoundError:
            return None

    @property
    def _share(self) -> tuple[int, int]:
        """This rank's, of what the ranks of its part that see the same disk verify."""
        here = self._ranks.here(self._member.part)
        return here.index(self._member.rank), len(here)

    def _place(self, entry: StepEntry) -> Place:
        return self._root.layout.place(entry.step, self._member.part)

    def _together(self, act: Callable[[], _Result]) -> _Result:
        """Do this rank's part of something, and return once all ranks did theirs.

        Raises what `act` raised, if that is as grave as what other ranks have to say; else their worst.
        """
        try:
            result = act()
            failure: Exception | None = None
        except Exception as error:
            if self._ranks.alone:
                raise
            failure = error
        passable = isinstance(failure, (CorruptStepError, StepNotFoundError))
        word = "" if failure is None else f"{_DAMAGED if passable else _FAILED}{failure}"
        said = self._ranks.all_say(word)
        if not any(said):
            return result
        grave = _FAILED if any(word.startswith(_FAILED) for word in said) else _DAMAGED
        if failure is not None and word.startswith(grave):
            raise failure
        rank = next(rank for rank, other in enumerate(said) if other.startswith(grave))
        text = said[rank].removeprefix(grave)
        if grave == _DAMAGED:
            raise CorruptStepError(
                str(self._root.path), f"on {self._ranks.called(rank)}: {text}"
            ) from failure
        raise RankError(f"{self._ranks.called(rank)} could not load: {text}") from failure

    def _check_world(self, entry: StepEntry) -> None:
        """A tree with a part per model-parallel rank is loaded by as many ranks as saved it."""
        if self._model_rank is None or entry.manifest is None:
            return
        saved, here = entry.manifest.world_sizes[self._member.part], self._member.world_size
        if saved != here:
            raise LoadError(
                f"{entry.path} was saved by {saved} ranks and is loaded by {here}: layout "
                f"{self._root.layout.name!r} is not resharded. A checkpoint in the dcp layout can be"
            )

    def _listed(self, entry: StepEntry) -> dict[str, FileEntry] | None:
        """What the files of this part must be in a step; None where nobody says."""
        if entry.too_new:
            raise LoadError(f"{entry.problem}")
        if entry.problem is not None:
            raise CorruptStepError(str(entry.path), entry.problem)
        if entry.manifest is None:
            return None
        if self._member.part not in entry.manifest.world_sizes:
            there = ", ".join(entry.manifest.world_sizes)
            raise LoadError(f"{entry.path} has no part {self._member.part!r}; it was saved by: {there}")
        self._check_world(entry)
        holds = self._place(entry).holds
        fragments = self._root.read_fragments(entry)
        return {file.path: file for fragment in fragments for file in fragment.files if holds(file.path)}

    def _left(self, entry: StepEntry) -> tuple[str, ...]:
        """Sections that the ranks which saved it cannot give to those that are here."""
        if entry.manifest is None or self._has_as_many_ranks(entry):
            return ()
        return tuple(name for name in OWN_SECTIONS if name in self._state.sections)

    def _has_as_many_ranks(self, entry: StepEntry) -> bool:
        sizes = entry.manifest.world_sizes if entry.manifest is not None else {}
        return sizes.get(self._member.part) == self._member.world_size

    def _match(
        self,
        files: restore.StepFiles,
        entry: StepEntry,
        left: tuple[str, ...],
        strict: bool,
        trusted: bool,
        mark: Callable[[str], None],
    ) -> Matching:
        """What goes where; nothing is changed yet."""
        try:
            place = self._place(entry)
            tree = restore.read_tree(
                files,
                place,
                trusted=trusted,
                model_rank=self._model_rank,
                shared=self._state.shared_paths(),
                is_whole=entry.manifest is None or not entry.manifest.nodes,
                rank=self._member.rank,
            )
            own = place.path(own_path(self._member.rank))
            if own in (files.entries or ()) and self._has_as_many_ranks(entry):
                tree.update(restore.read_zip(files, own, trusted=trusted))
            files.begin_early()
            mark("parsed")
            tree = {name: branch for name, branch in tree.items() if name not in left}
            restore.refuse_inert(tree, self._state.restored())
            matching = self._state.match(tree)
            matching.missing_sections = [name for name in matching.missing_sections if name not in left]
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
