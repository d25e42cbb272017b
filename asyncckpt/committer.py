"""The thread that turns written snapshots into visible steps, one at a time, in order; and the
heartbeat of the lease beside it, which nothing holds up.

    written and fenced -> shared files closed -> fragment -> ballot    every rank
    all ballots -> .metadata, manifest -> lease still ours -> rename -> tracker -> retention    rank 0
    outcome                                                     every rank

Where ranks write to the disks of several nodes, the first rank of each does there what rank 0 does on its own
node, when rank 0 says so:

    all ballots -> "prepare" -> .metadata, manifest    rank 0: all prepared -> lease still ours -> rename
    -> "publish" -> lease still ours, rename, tracker  rank 0: all published -> outcome -> retention, on each

Guarantees:
- A save ends, durable or failed, whatever happens to it; whoever waits for it is woken. One that has
  failed ends soon, also if a device hangs that copies for it: what that may still read is held on.
- A save that nobody fenced is never committed.
- Every save() that was called gets a ballot, also if it failed at once: no rank waits for one in vain.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from . import closing
from .ballots import Ballot, Outcome, digest
from .commit import Attempt, CheckpointRoot
from .errors import CheckpointError, RankError, RootError, SaveError
from .formats.distcp import merged_metadata, pickled_names
from .formats.manifest import FileEntry, FragmentRef
from .inflight import ABORT_S, Save
from .lease import RootLease
from .node_root import NodeRoot
from .parts import Member
from .plan import Apart, SharedPart
from .ranks import PREPARE, PUBLISH, Ranks
from .snapshot import CHUNK_NBYTES, Snapshot, crc32_combine
from .transfer import Parcel, Pipes

_log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
_LOOK_S = 0.1  # how often a save that waits for its copies is looked at: it may have failed


class Committer:
    """Commits saves in the background.

    Args:
        lease: None on all ranks but the first, and the first of each node.
        keep: keep_last and keep_every of retention.
        on_failure: told of a save that failed, before anybody who waits for it is woken.
        fence_timeout_s: how long a fence waits; a failed save has no longer to let go of training's memory.
        silence_s: a rank that we exchange slices with, and that does nothing for so long, is given up.
    """

    def __init__(
        self,
        root: CheckpointRoot,
        lease: RootLease | None,
        keep: tuple[int | None, int | None],
        on_failure: Callable[[Save], None],
        fence_timeout_s: float,
        ranks: Ranks,
        member: Member,
        silence_s: float,
    ) -> None:
        self._root = root
        self._lease = lease
        self._ranks = ranks
        self._member = member
        # Of each part the last .metadata, and the digests of what it was made of.
        self._metadata: dict[str, tuple[list[tuple[str, str]], bytes]] = {}
        self._pipes = Pipes(ranks, silence_s)
        self._undecided: list[tuple[int, Attempt]] = []  # prepared here; rank 0 did not say in time what then
        self._said_different = False
        self._keep = keep
        self._on_failure = on_failure
        self._release_timeout_s = min(fence_timeout_s, ABORT_S)
        self._said_buffered = self._said_unchecked = self._said_unpinned = self._said_unbatched = False
        self._in_flight: list[Save] = []  # oldest first; replaced, never changed, so reading needs no lock
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Save | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="asyncckpt-heartbeat", daemon=True)
        self._thread = threading.Thread(target=self._run, name="asyncckpt-committer", daemon=True)
        self._heart.start()
        try:
            self._thread.start()
        except BaseException:
            self._stopped.set()
            self._heart.join()
            raise

    @property
    def in_flight(self) -> list[Save]:
        """Saves that have not ended, oldest first."""
        return self._in_flight

    def take(self, save: Save) -> None:
        """Finish `save`, whose snapshot has begun; or, if it has failed already, tell the other ranks."""
        with self._lock:
            self._in_flight = [*self._in_flight, save]
        self._queue.put(save)

    def stop(self) -> None:
        """End the threads, once everything taken has ended."""
        self._queue.put(None)
        self._thread.join()
        self._pipes.close()
        self._stopped.set()
        self._heart.join()

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S):
            try:
                if self._lease is not None:
                    self._lease.renew()
            except Exception as error:  # noqa: BLE001 -- the heart goes on; the check before a publish decides
                _log.warning("the lease was not renewed: %s", error)

    def _run(self) -> None:
        while (save := self._queue.get()) is not None:
            try:
                self._commit(save)
            except CheckpointError as error:
                save.fail(error)
            except BaseException as error:  # noqa: BLE001 -- a bug of ours must not become a hang of theirs
                failure = SaveError(f"step {save.step} was not saved: {type(error).__name__}: {error}")
                failure.__cause__ = error
                save.fail(failure)
            finally:
                self._end(save)

    def _commit(self, save: Save) -> None:
        if self._ranks.is_first:
            try:
                files = self._in_step(save, self._closed(save, self._written(save)))
            except BaseException as error:
                self._give_up(save, save.error or error)  # the first reason; what follows says "given up"
                raise
            self._publish(save, files)
            return
        try:
            files = self._in_step(save, self._closed(save, self._written(save)))
            ballot = self._part(save, files)
        except BaseException as error:
            # Rank 0 removes what has failed for another rank, also what is being written here.
            ended = self._ranks.ended_early(save.call)
            if ended is None:
                self._give_up(save, save.error or error)
                raise
            raise self._failed_elsewhere(save, ended) from error
        self._take_part(save, ballot, files)

    def _written(self, save: Save) -> tuple[FileEntry, ...]:
        """What was written, once all of it is fsynced and known to be whole."""
        if save.refused is not None:
            raise save.refused
        snapshot, _ = save.begun()
        self._await_release(save, snapshot)
        if save.checked.is_set():
            snapshot.let_go()
        snapshot.wait_written()
        save.note_written(snapshot)
        self._warn_once(snapshot)
        save.checked.wait()
        if save.error is not None:
            raise save.error
        save.mark("checked")
        return snapshot.files()

    def _in_step(self, save: Save, files: Sequence[FileEntry]) -> tuple[FileEntry, ...]:
        """What the plan has written, as files of the step; and what the layout adds for the part."""
        _, attempt = save.begun()
        base = f"{attempt.base}/" if attempt.base else ""
        found = [replace(file, path=base + file.path) if base else file for file in files]
        if self._ranks.here(self._member.part)[0] == self._member.rank:
            for path, data in self._root.layout.added_files(save.step, self._member.part).items():
                found.append(self._root.add_file(attempt, path, data, files[0].block_nbytes))
        return tuple(found)

    def _closed(self, save: Save, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        """With the files that ranks write together and this one closes, once all wrote their parts."""
        snapshot, attempt = save.begun()
        parts = snapshot.plan.shared
        if not parts:
            return files
        places = self._ranks.parts.places(self._member.part)  # plans count within the part
        handed = {part.path: snapshot.handed(part) for part in parts}
        written = [part for part in parts if part.inside is not None or part.edges is not None]
        for closer in sorted({part.closer for part in written}):
            own = {part.path: handed[part.path] for part in written if part.closer == closer}
            self._ranks.hand_over(save.call, places[closer], closing.to_bytes(own))
        ours = [part for part in parts if part.closer == self._member.rank]
        contributors = sorted({places[rank] for part in ours for rank in part.contributors()})
        here = self._ranks.nodes.of(self._ranks.rank).places
        others = self._exchanged(save, parts, [place for place in contributors if place not in here])
        near = [place for place in contributors if place in here]
        for place, data in self._ranks.take_over(save.call, near).items():
            others[places.index(place)] = closing.from_bytes(data)
        for part in ours:
            of_all = {rank: said[part.path] for rank, said in others.items() if part.path in said}
            of_all[self._member.rank] = handed[part.path]
            entry = closing.close_file(
                self._root.fs,
                attempt,
                part,
                of_all,
                CHUNK_NBYTES,
                crc32_combine,
                lambda rank: self._ranks.called(places[rank]),
            )
            files = (*files, entry)
        if ours:
            save.mark("closed")
        return files

    def _exchanged(self, save: Save, parts: Sequence[SharedPart], far: Sequence[int]) -> dict[int, Any]:
        """What ranks on other nodes have of the files that we close, as if they had written it here."""
        snapshot, attempt = save.begun()

        def parcel(part: SharedPart, apart: Apart) -> Parcel:
            crcs = snapshot.record_crcs(apart.number)
            path = attempt.files / snapshot.plan.images[apart.number].path
            return Parcel(part, apart, path, [crcs[record] for record in apart.records])

        parcels = [parcel(part, part.apart) for part in parts if part.apart is not None]
        if not parcels and not far:
            return {}
        places = self._ranks.parts.places(self._member.part)
        ours = [part for part in parts if part.closer == self._member.rank]
        handed = self._pipes.exchange(
            save.call, self._root.fs, attempt, places, parcels, ours, far, CHUNK_NBYTES
        )
        for one in parcels:
            if not one.apart.is_kept:
                self._root.fs.unlink(one.path)
        save.mark("exchanged")
        return handed

    def _await_release(self, save: Save, snapshot: Snapshot) -> None:
        while not snapshot.wait_released(_LOOK_S):
            if save.error is not None:
                snapshot.give_up(self._release_timeout_s)
                raise save.error

    def _warn_once(self, snapshot: Snapshot) -> None:
        if not snapshot.direct and not self._said_buffered:
            self._said_buffered = True
            _log.warning("%s: no O_DIRECT here; files are written through the page cache", self._root.path)
        if snapshot.batch_failure and not self._said_unbatched:
            self._said_unbatched = True
            _log.warning(
                "copies from devices go one by one, small tensors are slow: %s", snapshot.batch_failure
            )
        if snapshot.pin_failure and not self._said_unpinned:
            self._said_unpinned = True
            _log.warning("host_memory is not pinned, copies from devices are slow: %s", snapshot.pin_failure)

    def _give_up(self, save: Save, error: BaseException) -> None:
        """Tell the other ranks that the save has failed for all; rank 0 removes what was written."""
        if self._ranks.is_first:
            self._announce(save, f"{self._member}: {error}")
            self._pipes.hang_up()
            if save.attempt is not None:
                self._root.discard(save.attempt)
            return
        try:
            self._ranks.vote(save.call, Ballot(self._ranks.rank, save.step, str(error)))
            self._pipes.hang_up()
            if self._ranks.nodes.of(self._ranks.rank).places[0] == 0:
                return  # rank 0 removes what is on its disk
            self._ranks.outcome(save.call)
        except RankError as silent:
            _log.warning("the other ranks could not be told: %s", silent)
        if save.attempt is not None:
            self._root.discard(save.attempt)  # it never had this rank's vote: nobody can publish it

    # -- rank 0

    def _publish(self, save: Save, files: tuple[FileEntry, ...]) -> None:
        _, attempt = save.begun()
        visible = False

        def mark(phase: str) -> None:
            nonlocal visible
            visible = visible or phase == "renamed"
            save.mark(phase)

        try:
            self._prepare(save, attempt, files)
            mark("manifest")
            # The last look: a suspended process may have lost the lease, or the trust of others.
            self._check_lease(save)
            self._ranks.claim(save.call)
            self._root.publish(attempt, mark)
            if self._ranks.nodes.are_several:
                self._publish_elsewhere(save)
            save.report.durable_s = save.elapsed_s()
        except BaseException as error:
            self._announce(save, str(error), visible)  # first: whose files vanish shall find out why
            if not visible:
                self._root.discard(attempt)
            raise
        self._announce(save, None)
        self._retain(save)

    def _prepare(self, save: Save, attempt: Attempt, files: tuple[FileEntry, ...]) -> None:
        """On all nodes, once all ranks have voted."""
        nodes = self._ranks.nodes
        ballots = self._ranks.collect(save.call, self._ballot(save))
        if not self._ranks.alone:
            save.mark("voted")
        ordinal = self._root.next_ordinal()
        if nodes.are_several:
            self._ranks.lead(save.call, PREPARE, {"ordinal": ordinal, "metadata": save.metadata})
        here = [ballots[place] for place in nodes.of(self._ranks.rank).places]
        fragments = self._fragments(save, attempt, files, here)
        self._root.prepare(
            attempt, fragments, parts=self._ranks.parts, metadata=save.metadata, ordinal=ordinal
        )
        if nodes.are_several:
            self._ranks.await_done(save.call, PREPARE)

    def _publish_elsewhere(self, save: Save) -> None:
        self._ranks.lead(save.call, PUBLISH, {})
        try:
            self._ranks.await_done(save.call, PUBLISH)
        except RankError as error:
            raise RankError(
                f"step {save.step} is whole, and published on some nodes alone; the others follow with the "
                f"next save or start: {error}"
            ) from error
        save.mark("everywhere")

    def _retain(self, save: Save) -> None:
        try:
            if self._root.retain(*self._keep):
                save.mark("retained")
        except CheckpointError as error:
            _log.warning("older steps could not be removed, the next save tries again: %s", error)

    def _announce(self, save: Save, error: str | None, is_published: bool = False) -> None:
        try:
            self._ranks.announce(save.call, Outcome(error, is_published))
        except RankError as silent:  # they will find out by themselves
            _log.warning("the other ranks could not be told: %s", silent)

    def _fragments(
        self, save: Save, attempt: Attempt, files: tuple[FileEntry, ...], ballots: Sequence[Ballot]
    ) -> list[FragmentRef]:
        """Of all ranks on this disk, ours last written: it lists each `.metadata` that describes several."""
        described = []
        for part in self._ranks.parts.world_sizes:
            places = self._ranks.parts.places(part)
            of_part = [ballot for ballot in ballots if ballot.rank in places]
            if of_part and of_part[0].layout:  # else each of its ranks describes what it wrote
                path = self._root.layout.place(save.step, part)
                data = self._described(save, part, of_part)
                described.append(
                    self._root.add_file(attempt, path.path(path.metadata), data, files[0].block_nbytes)
                )
        fragments = [self._root.write_fragment(attempt, self._ranks.rank, (*files, *described))]
        for ballot in ballots[1:]:
            if ballot.fragment is None:
                raise RankError(f"{self._ranks.called(ballot.rank)} voted for files that it did not name")
            self._root.check_fragment(attempt, ballot.fragment)
            fragments.append(ballot.fragment)
        return fragments

    def _described(self, save: Save, part: str, ballots: Sequence[Ballot]) -> bytes:
        """The `.metadata` of what the ranks of a part have written."""
        made_of = [(ballot.tree, ballot.layout) for ballot in ballots]
        known, data = self._metadata.get(part, ([], b""))
        if made_of != known:
            plan = save.begun()[0].plan
            layouts = self._ranks.layouts(ballots, plan.tree, plan.layout)
            data = merged_metadata(layouts, of_all=not self._ranks.nodes.are_several)
            self._metadata[part] = (made_of, data)
        self._warn_of_differences(ballots)
        return data

    def _warn_of_differences(self, ballots: Sequence[Ballot]) -> None:
        """Python leaves are saved once. What differs is most likely a rank's own."""
        first, *others = ballots
        for ballot in others:
            if self._said_different or ballot.pickles == first.pickles:
                continue
            pairs = zip(first.pickles, ballot.pickles, strict=False)
            number = next((index for index, (here, there) in enumerate(pairs) if here != there), None)
            if number is not None:
                self._said_different = True
                _log.warning(
                    "%s is not the same on %s as on %s, whose is saved; hand over in per_rank "
                    "what is a rank's own",
                    pickled_names(self._ranks.tree_of(first))[number],
                    self._ranks.called(ballot.rank),
                    self._ranks.called(first.rank),
                )

    # -- the others

    def _part(self, save: Save, files: tuple[FileEntry, ...]) -> Ballot:
        snapshot, attempt = save.begun()
        if self._ranks.leads:  # its fragment comes last
            return self._ballot(save)
        fragment = self._root.write_fragment(attempt, self._ranks.rank, files)
        self._root.settle_part(attempt)
        ballot = self._ballot(save, fragment)
        if snapshot.plan.layout:
            self._ranks.say_layout(ballot, snapshot.plan.tree, snapshot.plan.layout)
        return ballot

    def _take_part(self, save: Save, ballot: Ballot, files: tuple[FileEntry, ...]) -> None:
        self._ranks.vote(save.call, ballot)
        save.mark("voted")
        if self._ranks.leads:
            self._follow(save, ballot, files)
        outcome = self._ranks.outcome(save.call)
        if outcome.error is not None:
            raise self._failed_elsewhere(save, outcome)
        self._root.note_published(save.step)
        save.report.durable_s = save.elapsed_s()
        save.mark("durable" if not self._ranks.leads else "everywhere")
        if self._ranks.leads:
            self._retain(save)

    def _follow(self, save: Save, own: Ballot, files: tuple[FileEntry, ...]) -> None:
        """The first rank of another node than rank 0's: prepare and publish there, when rank 0 says so."""
        root, attempt = self._root, save.begun()[1]
        assert isinstance(root, NodeRoot)
        what = self._ranks.led(save.call, PREPARE)
        if what is None:
            return
        with self._telling(save, PREPARE):
            try:
                self._check_lease(save)
                self._decide_late(root)
                ballots = self._ranks.ballots(save.call, own)
                fragments = self._fragments(save, attempt, files, ballots)
                root.prepare(attempt, fragments, parts=self._ranks.parts, **what)
            except BaseException:
                root.discard(attempt)
                raise
        save.mark("manifest")
        try:
            what = self._ranks.led(save.call, PUBLISH)
        except RankError:
            self._undecided.append((save.call, attempt))
            raise
        if what is None:
            if self._ranks.outcome_of(save.call).is_published:
                root.owe(attempt)
            return
        root.owe(attempt)
        with self._telling(save, PUBLISH):
            self._check_lease(save)
            root.pay(save.mark)

    def _decide_late(self, root: NodeRoot) -> None:
        """What became of saves that rank 0 did not decide in time."""
        for call, attempt in list(self._undecided):
            outcome = self._ranks.ended_early(call)
            if outcome is None:
                continue
            self._undecided.remove((call, attempt))
            if outcome.error is None or outcome.is_published:
                root.owe(attempt)
            else:
                root.discard(attempt)

    @contextmanager
    def _telling(self, save: Save, what: str) -> Iterator[None]:
        """Tell rank 0 how it went."""
        try:
            yield
        except BaseException as error:
            self._ranks.did(save.call, what, str(error) or repr(error))
            raise
        self._ranks.did(save.call, what)

    def _failed_elsewhere(self, save: Save, outcome: Outcome) -> RankError:
        if save.attempt is not None and not outcome.is_published:
            self._root.discard(save.attempt)  # whoever wrote last removes what rank 0 could not
        return RankError(f"step {save.step} was not saved: {outcome.error}")

    def _ballot(self, save: Save, fragment: FragmentRef | None = None) -> Ballot:
        snapshot, _ = save.begun()
        return Ballot(
            rank=self._ranks.rank,
            step=save.step,
            fragment=fragment,
            groups=snapshot.plan.groups,
            tree=digest(snapshot.plan.tree) if snapshot.plan.layout else "",
            layout=digest(snapshot.plan.layout) if snapshot.plan.layout else "",
            pickles=snapshot.shared_crcs,
        )

    def _check_lease(self, save: Save) -> None:
        if self._lease is None:
            return
        try:
            self._lease.check()
        except RootError as error:
            raise SaveError(f"step {save.step} was not saved: {error}") from error

    def _end(self, save: Save) -> None:
        try:
            self._pipes.hang_up()
            if save.error is not None:
                # Whatever failed, the engine may still be looking at the memory that the save holds.
                if save.snapshot is not None and not save.snapshot.released:
                    save.snapshot.give_up(0)
                self._on_failure(save)
        finally:
            with self._lock:
                self._in_flight = [other for other in self._in_flight if other is not save]
            save.finish()
