"""Who takes part in a save, and how they agree: ballots in a torch.distributed store.

    every rank: written, checked -> ballot      rank 0: all ballots -> publish -> outcome      every rank

No collectives, no NCCL: a dead rank must not hang the others. What crosses ranks in a save is one ballot per
rank and one outcome, and, of files that ranks write together, the CRCs of what each wrote, to the rank that
closes the file; what rank 0 must know besides (where each rank's items lie) crosses once per structure.

Guarantees:
- Every wait has a deadline, also one for a store whose host has stopped to answer: its calls run on a thread
  of their own, on a client of their own.
- A rank that shows no life for `silence_s` is named in the error of all others. The observer's own clock
  decides.
- Keys carry the run's incarnation, and keys or ballots the save's number: a straggler cannot vote in a later
  save.
- What waiting costs the store does not grow with the ranks, and what a save leaves there is its outcome, and
  a number that says who decided it; one that fails while files are closed, also a number per closer.
"""

from __future__ import annotations

import atexit
import json
import logging
import threading
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed

from .ballots import Ballot, Outcome, check_alike, digest
from .errors import OptionError, RankError
from .nodes import Nodes
from .parts import MAIN, Member, Parts
from .patience import Pauses, Watch
from .store import CALL_TIMEOUT_S, StoreClient

_log = logging.getLogger(__name__)

_BEATS_PER_SILENCE = 6
_CLAIMED = 1 << 32  # more than ranks can count
_EAGER_S = 0.05  # between two signs of life while ranks are still joining
_WORD_LENGTH_MAX = 4096  # n ranks fetch the words of n

PREPARE, PUBLISH = "prepare", "publish"  # what nodes do together, in this order


class Ranks:
    """The ranks that write one step together, seen from one of them.

    Args:
        store: of torch.distributed; every rank reaches the same. None for one rank alone.
        rank, world_size: among all participants, whatever part they belong to.
        name: tells several checkpointers over one store apart; the same on every rank.
        timeout_s: how long a rank that is alive may take for its part of anything.
        silence_s: a rank that shows no sign of life for so long is taken for dead.
        parts: what participants are called, and what all of them must have declared.

    From `begin` to `close` a thread gives signs of life. What belongs to saves is for one thread at a time;
    so is what belongs to loads.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        name: str,
        timeout_s: float,
        silence_s: float,
        parts: Parts | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise OptionError(f"rank {rank} of {world_size} ranks")
        if world_size > 1 and store is None:
            raise OptionError(f"{world_size} ranks need a store to agree in")
        self.rank = rank
        self.world_size = world_size
        self.parts = parts or Parts.none(world_size)
        self._first = self.called(0)
        self._timeout_s = timeout_s
        self._silence_s = silence_s
        host = "the process that hosts it" + (f", usually {self._first}," if self.parts.declared else "")
        self._client = StoreClient(store, f"asyncckpt/{name}/", host) if world_size > 1 else None
        # A thread that is inside the store when the interpreter goes takes the process down with it.
        atexit.register(self.close)
        self._run = "-"  # the incarnation, once it is agreed on
        self._beats = 0
        self._said = 0  # by rank 0, to each of the others
        self._closed = threading.Event()
        self._heart: threading.Thread | None = None
        self._layouts: dict[int, tuple[str, bytes]] = {}  # rank 0: of each rank, by digest; compressed
        self._trees: dict[str, bytes] = {}  # rank 0: what ranks hold, by digest; most of them the same
        self._layout_said = self._tree_said = ""
        self._generation = 0  # of conversations; rank 0 counts them, the others follow
        self._turn = 0  # in this conversation
        self.nodes = Nodes.one(world_size)  # until somebody knows better
        self._leading: list[str] = []  # rank 0: keys of what nodes told each other in this save
        self._led_before: list[str] = []  # and in the one before
        self._joined = threading.Event()

    @property
    def alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return self.world_size == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that publishes."""
        return self.rank == 0

    def here(self, part: str) -> Sequence[int]:
        """Ranks of a part that write to the same disk as this participant, ascending."""
        places = self.parts.places(part)
        if not self.nodes.are_several:
            return range(len(places))
        return [places.index(place) for place in self.nodes.of(self.rank).places if place in places]

    @property
    def leads(self) -> bool:
        """Whether this is the first rank of a node."""
        return self.nodes.of(self.rank).places[0] == self.rank

    def called(self, *ranks: int) -> str:
        """What messages call them."""
        return self.parts.called(*ranks)

    def close(self) -> None:
        """Leave. Rank 0, in whose process the store may live, first lets the others hear its last words."""
        if self._client is not None and self.is_first and self._said:
            try:
                self._await_heard(self._client)
            except RankError as silent:
                _log.warning("left before all ranks had heard how it ended: %s", silent)
        atexit.unregister(self.close)
        self._closed.set()
        if self._heart is not None:
            self._heart.join(CALL_TIMEOUT_S)
        if self._client is not None:
            self._client.close()

    def _await_heard(self, client: StoreClient) -> None:
        deadline = Pauses(self._silence_s)
        while (heard := client.add(f"{self._run}/heard", 0)) < self._said * (self.world_size - 1):
            if not deadline.pause():
                raise RankError(f"{self._said * (self.world_size - 1) - heard} words were not heard")

    def _hear(self) -> None:
        if self._client is not None:
            self._client.add(f"{self._run}/heard", 1)

    # -- beginning

    def begin(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Rank 0 makes something (JSON), all get it. `make` runs there alone.

        The others believe a beginning only while they see rank 0 live on it, and only if they have not been
        part of it before: one that was left in the store by a rank 0 that failed or died is nobody's, and one
        that this rank has left already, before rank 0 did, is over.

        Raises:
            RankError: rank 0 failed, or does not answer; on rank 0 whatever `make` raises.
            OptionError: this rank has declared other parts than rank 0.
        """
        if self._client is None:
            made = make()
            self._run = str(made["incarnation"])
            return made
        client = self._client
        # By name, not by number: who has declared other parts is counted otherwise.
        attempt = client.add(f"begin/{self.called(self.rank)}", 1)
        if self.is_first:
            try:
                made = make()
            except BaseException as error:
                client.set(f"refused/{attempt}", f"{type(error).__name__}: {error}".encode())
                raise
            client.set(f"{made['incarnation']}/parts", str(self.parts).encode())
            client.set("begun", json.dumps(made).encode())
        else:
            made = self._await_beginning(client, f"refused/{attempt}")
        self._run = str(made["incarnation"])
        if not self.is_first:
            self._check_parts(client)
        self._heart = threading.Thread(target=self._beat_on, name="asyncckpt-rank", daemon=True)
        self._heart.start()
        return dict(made)

    def _check_parts(self, client: StoreClient) -> None:
        theirs, ours = client.get(f"{self._run}/parts").decode(), str(self.parts)
        if theirs != ours:
            problem = f"{self.called(self.rank)} has parts {ours} where {self._first} has {theirs}"
            client.set(f"{self._run}/other parts", problem.encode())
            client.add(f"{self._run}/other parts/told", 1)
            raise OptionError(f"parts: {problem}")

    def _told_of_other_parts(self, others: Collection[int], enough: bool) -> str | None:
        """Rank 0, before all have joined: what a rank with other parts has said, once all others are there to
        hear of it; or at once, if it is `enough`."""
        assert self._client is not None
        key = f"{self._run}/other parts"
        if self._joined.is_set() or not self.is_first or not self._client.has(key):
            return None
        come = sum(1 for beat in self.beats_of(list(others)) if beat)
        if not enough and come + self._client.add(f"{key}/told", 0) < len(others):
            return None
        return self._client.get(key).decode()

    def _await_beginning(self, client: StoreClient, refused: str) -> dict[str, Any]:
        deadline = Pauses(self._timeout_s, polling=self.world_size)
        seen: dict[str, bytes] = {}  # beats of rank 0, by incarnation
        was = f"was/{self.called(self.rank)}"
        over = client.get(was).decode() if client.has(was) else ""
        while True:
            if client.has(refused):
                raise RankError(f"{self._first} could not begin: {client.get(refused).decode()}")
            if client.has("begun"):
                made: dict[str, Any] = json.loads(client.get("begun"))
                key = f"{made['incarnation']}/beat/0"
                if made["incarnation"] != over and client.has(key):
                    beat = client.get(key)
                    if seen.setdefault(key, beat) != beat:
                        client.set(was, str(made["incarnation"]).encode())
                        return made
            if not deadline.pause():
                raise RankError(
                    f"{self._first} took longer than {self._timeout_s:g} s to begin: has it a "
                    f"checkpointer over a root of this very name?"
                )

    def join(self, problem: str) -> None:
        """All have begun, or none has.

        Args:
            problem: why this rank cannot take part; empty if it can.

        Raises:
            RankError: another rank cannot, or does not come.
        """
        if self._client is None:
            return
        try:
            self.converse()
            said = self.all_say(problem)
        finally:
            self._joined.set()
        for rank, word in enumerate(said):
            if word:
                raise RankError(f"{self.called(rank)} cannot take part: {word}")

    def _beat_on(self) -> None:
        assert self._client is not None
        while not self._closed.is_set():
            self._beats += 1
            try:
                self._client.set(f"{self._run}/beat/{self.rank}", str(self._beats).encode())
            except RankError as problem:  # whoever needs the store will hear of it; it may come back
                _log.debug("no sign of life: %s", problem)
            self._closed.wait(
                self._silence_s / _BEATS_PER_SILENCE
                if self._joined.is_set() or not self.is_first
                else _EAGER_S
            )

    # -- a save

    def vote(self, save: int, ballot: Ballot) -> None:
        """Say how this rank's part of its `save`-th save went. Rank 0 knows its own."""
        if self._client is not None and not self.is_first:
            # In the place of its last one: nobody has to delete ballots.
            self._client.set(f"{self._run}/ballot/{self.rank}", b"%d " % save + ballot.to_bytes())
            if ballot.error is not None:
                if not self._client.has(
                    f"{self._run}/{save}/failed"
                ):  # what comes later is most likely its doing
                    self._client.set(f"{self._run}/{save}/failed", ballot.to_bytes())
                if self.nodes.of(self.rank).places[0] == 0:
                    self._hear()  # whatever the others make of it; on other nodes it is heard to the end
            self._client.add(f"{self._run}/{save}/voted", 1)  # last: when all have voted, all is there

    def hand_over(self, save: int, closer: int, data: bytes) -> None:
        """Tell the rank that closes shared files what this one wrote of them; once, before the vote."""
        if self._client is None or closer == self.rank:
            return
        # In the place of the last one, as ballots.
        self._client.put_large(f"{self._run}/handed/{closer}/{self.rank}", b"%d " % save + data)
        self._client.add(f"{self._run}/{save}/handed/{closer}", 1)

    def take_over(self, save: int, ranks: Sequence[int]) -> dict[int, bytes]:
        """What these ranks, all but this one, hand over to it.

        Raises:
            RankError: the save has failed elsewhere, or a rank does not hand over in time; it is named.
        """
        others = [rank for rank in ranks if rank != self.rank]
        if self._client is None or not others:
            return {}
        client, key = self._client, f"{self._run}/{save}/handed/{self.rank}"
        slots = [f"{self._run}/handed/{self.rank}/{rank}" for rank in others]
        deadline = Pauses(self._timeout_s)
        watch = self._watch(others)
        while client.add(key, 0) < len(others):
            self.raise_if_failed(save)
            silent = watch.silent(lambda late: self._not_said(save, slots, others, late))
            if silent is not None:
                raise self._silence_of(silent)
            if not deadline.pause():
                missing = self._not_said(save, slots, others, others)
                raise RankError(
                    f"{self.called(*missing)} wrote no part of its files within {self._timeout_s:g} s"
                )
        client.delete(key)
        found = {}
        for rank, slot in zip(others, slots, strict=True):
            number, _, data = client.get_large(slot).partition(b" ")
            if int(number) != save:
                raise RankError(f"{self.called(rank)} went on to its next save before this one was decided")
            found[rank] = data
        return found

    def rendezvous(self, save: int, other: int, word: int) -> int:
        """Wait until another rank wants to exchange slices in this save; a number to it, and its own.

        Raises:
            RankError: it does not come in time, shows no sign of life, or the save has failed elsewhere.
        """
        assert self._client is not None
        client, pair = self._client, f"{self._run}/{save}/pair"
        failed, outcome = f"{self._run}/{save}/failed", f"{self._run}/{save}/outcome"
        theirs = f"{pair}/{other}-{self.rank}"
        client.set(f"{pair}/{self.rank}-{other}", str(word).encode())
        self._await([theirs], [other], "to exchange slices", or_any=(failed, outcome))
        self.raise_if_failed(save)
        word = int(client.get(theirs))
        client.delete(theirs)
        return word

    def raise_if_failed(self, save: int) -> None:
        """Raise RankError if some rank has failed already; the others do once rank 0 has said who it was."""
        assert self._client is not None
        failed, outcome = f"{self._run}/{save}/failed", f"{self._run}/{save}/outcome"
        if self._client.has(failed):
            if self.is_first:
                ballot = Ballot.from_bytes(self._client.get(failed))
                raise RankError(f"{self.called(ballot.rank)}: {ballot.error}")
            self._await([outcome], [0], "to say who has failed")  # and removes what we just found
        if self._client.has(outcome):
            raise RankError("another rank's part has failed")

    def store_between(self, other: int, generation: int) -> Any:
        """A store for this rank and another, the same on both."""
        assert self._client is not None
        first, last = sorted((self.rank, other))
        return self._client.raw(f"{self._run}/pipe/{first}-{last}/{generation}")

    def _not_said(
        self, save: int, slots: Sequence[str], of: Sequence[int], among: Sequence[int]
    ) -> list[int]:
        """Those of `among` whose slot holds nothing of this save."""
        assert self._client is not None
        asked = {slot: rank for slot, rank in zip(slots, of, strict=True) if rank in set(among)}
        absent = set(self._client.absent(list(asked)))
        there = [slot for slot in asked if slot not in absent]
        heads = [data.partition(b" ")[2] for data in self._client.get_all(there)]
        said = {
            asked[slot]
            for slot, head in zip(there, heads, strict=True)
            if int(head.partition(b" ")[0]) >= save
        }
        return [rank for rank in among if rank not in said]

    def say_layout(self, ballot: Ballot, tree: bytes, layout: bytes) -> None:
        """Tell rank 0 where this rank's items lie, unless it knows, and what the leaves are, unless some rank
        has told it the same. Before the vote: whoever dies in between fails the save of all."""
        if self._client is None or self.leads or not ballot.layout:
            return
        if ballot.tree != self._tree_said:
            key = f"{self._run}/tree/{ballot.tree}"
            if self._client.add(f"{key}/told", 1) == 1:
                self._client.put_large(key, zlib.compress(tree))
            self._tree_said = ballot.tree
        if ballot.layout != self._layout_said:
            key = f"{self._run}/layout/{self.rank}/{ballot.layout}"
            self._client.put_large(key, zlib.compress(layout))
            self._layout_said = ballot.layout

    def collect(self, save: int, own: Ballot) -> list[Ballot]:
        """Rank 0: all ballots, by rank.

        Raises:
            RankError: a rank failed, saved something else, or did not vote in time; it is named.
        """
        if self._client is None:
            return [own]
        client, key = self._client, f"{self._run}/{save}"
        deadline = Pauses(self._timeout_s)
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        watch = self._watch(others)
        while client.add(f"{key}/voted", 0) < len(others):
            if client.has(f"{key}/failed"):
                break
            silent = watch.silent(lambda ranks: self._not_voted(save, ranks))
            if silent is not None:
                raise self._silence_of(silent)
            if not deadline.pause():
                missing = self._not_voted(save, others)
                raise RankError(f"{self.called(*missing)} did not vote within {self._timeout_s:g} s")
        if client.has(f"{key}/failed"):
            ballot = Ballot.from_bytes(client.get(f"{key}/failed"))
            raise RankError(f"{self.called(ballot.rank)}: {ballot.error}")
        ballots = [own]
        for rank, data in zip(others, client.get_all([self._slot(rank) for rank in others]), strict=True):
            number, _, said = data.partition(b" ")
            if int(number) != save:
                raise RankError(f"{self.called(rank)} went on to its next save before this one was decided")
            ballots.append(Ballot.from_bytes(said))
        check_alike(ballots, self.parts)
        return ballots

    def _slot(self, rank: int) -> str:
        return f"{self._run}/ballot/{rank}"

    def _not_voted(self, save: int, ranks: Sequence[int]) -> list[int]:
        assert self._client is not None
        absent = set(self._client.absent([self._slot(rank) for rank in ranks]))
        there = [rank for rank in ranks if self._slot(rank) not in absent]
        ballots = self._client.get_all([self._slot(rank) for rank in there])
        voted = {
            rank for rank, data in zip(there, ballots, strict=True) if int(data.partition(b" ")[0]) >= save
        }
        return [rank for rank in ranks if rank not in voted]

    def ballots(self, save: int, own: Ballot) -> list[Ballot]:
        """The first rank of a node, once all ranks have voted: the ballots of that node."""
        assert self._client is not None
        places = self.nodes.of(self.rank).places
        others = [place for place in places if place != self.rank]
        said = self._client.get_all([self._slot(place) for place in others])
        parts = [data.partition(b" ") for data in said]
        if any(int(number) != save for number, _, _ in parts):
            raise RankError(f"a rank of this node went on before save {save} was decided")
        return [own, *(Ballot.from_bytes(ballot) for _, _, ballot in parts)]

    def layouts(self, ballots: Sequence[Ballot], tree: bytes, layout: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The first rank of a node: what the leaves of each rank are, and where its items lie, by rank; its
        own are handed in. Fetched only where they changed, unpacked one by one: all would be gigabytes."""
        assert self._client is not None
        others = [ballot for ballot in ballots if ballot.rank != self.rank]
        self._trees.update({ballot.tree: tree for ballot in ballots if ballot.rank == self.rank})
        for name in dict.fromkeys(ballot.tree for ballot in others):
            if name not in self._trees:
                data = self._client.get_large(f"{self._run}/tree/{name}")
                self._trees[name] = zlib.decompress(data)
        new = [b for b in others if self._layouts.get(b.rank, ("", b""))[0] != b.layout]
        keys = [f"{self._run}/layout/{ballot.rank}/{ballot.layout}" for ballot in new]
        for ballot, data in zip(new, self._client.take_large(keys), strict=True):
            self._layouts[ballot.rank] = (ballot.layout, data)
        for ballot in ballots:
            own = ballot.rank == self.rank
            yield self._trees[ballot.tree], layout if own else zlib.decompress(self._layouts[ballot.rank][1])

    def tree_of(self, ballot: Ballot) -> bytes:
        """What the leaves of a rank are, of which `layouts` has told before."""
        return self._trees[ballot.tree]

    def claim(self, save: int) -> None:
        """Rank 0, right before the step becomes visible: from here on the others wait for the outcome.

        Raises:
            RankError: too late, another rank took this one for dead and has failed the save.
        """
        if self._client is None:
            return
        if self._client.add(f"{self._run}/{save}/decided", _CLAIMED) != _CLAIMED:
            raise RankError(f"another rank took {self._first} for dead and gave the save up")

    def announce(self, save: int, outcome: Outcome) -> None:
        """Rank 0: tell all how it ended."""
        if self._client is None:
            return
        self._client.set(f"{self._run}/{save}/outcome", outcome.to_bytes())
        self._said += 1
        # The outcome stays: a rank may come late to a save that another rank's failure has ended.
        self._client.delete(f"{self._run}/{save}/voted", f"{self._run}/{save}/failed", *self._led_before)
        # What nodes were told goes one save later: one may be about to read it.
        self._led_before, self._leading = self._leading, []

    def ended_early(self, save: int) -> Outcome | None:
        """The others: how it ended, if it has ended before this rank has voted."""
        key = f"{self._run}/{save}/outcome"
        if self._client is None or self.is_first or not self._client.has(key):
            return None
        return self.outcome(save)

    def outcome(self, save: int) -> Outcome:
        """The others: how it ended.

        Raises:
            RankError: rank 0 does not say so in time, or shows no sign of life.
        """
        assert self._client is not None
        key = f"{self._run}/{save}/outcome"
        self._await_first(save, [key])
        outcome = self.outcome_of(save)
        self._hear()
        return outcome

    def outcome_of(self, save: int) -> Outcome:
        """The others: how it ended, which is known to be said."""
        assert self._client is not None
        return Outcome.from_bytes(self._client.get(f"{self._run}/{save}/outcome"))

    def _await_first(self, save: int, keys: Sequence[str]) -> None:
        """Until rank 0 has set one of the keys."""
        assert self._client is not None
        try:
            self._await(keys[:1], [0], "to publish", or_any=keys[1:])
        except RankError:
            # Rank 0 may only be slow. Whoever comes first decides: it to publish, or we to go on without.
            if self._client.add(f"{self._run}/{save}/decided", 1) < _CLAIMED:
                raise
            try:
                self._await(keys[:1], [0], "to publish", or_any=keys[1:])
            except RankError as silent:
                raise RankError(f"{silent} It was about to publish: the step may be there, whole") from silent

    # -- a save to disks of several nodes

    def lead(self, save: int, to: str, what: Mapping[str, Any]) -> None:
        """Rank 0: tell the first ranks of the other nodes what to do next."""
        assert self._client is not None
        self._leading += self._client.put_large(f"{self._run}/{save}/{to}", json.dumps(what).encode())

    def led(self, save: int, to: str) -> dict[str, Any] | None:
        """The first ranks of the other nodes: what to do next; None if the save ended instead.

        Raises:
            RankError: rank 0 does not say so in time, or shows no sign of life.
        """
        assert self._client is not None
        key, outcome = f"{self._run}/{save}/{to}", f"{self._run}/{save}/outcome"
        self._await_first(save, [key, outcome])
        if self._client.has(outcome):
            return None
        what: dict[str, Any] = json.loads(self._client.get_large(key))
        return what

    def did(self, save: int, to: str, problem: str = "") -> None:
        """The first ranks of the other nodes: it is done, or why not."""
        assert self._client is not None
        self._client.set(f"{self._run}/{save}/did {to}/{self.rank}", problem[:_WORD_LENGTH_MAX].encode())
        if problem:
            self._hear()  # whatever the others make of it

    def await_done(self, save: int, to: str) -> None:
        """Rank 0: until the first ranks of all other nodes did it.

        Raises:
            RankError: one could not, or did not in time; it is named.
        """
        assert self._client is not None
        others = [place for place in self.nodes.leaders if place != self.rank]
        keys = [f"{self._run}/{save}/did {to}/{place}" for place in others]
        self._leading += keys
        self._await(keys, others, f"to {to} on its node")
        for place, problem in zip(others, self._client.get_all(keys), strict=True):
            if problem:
                raise RankError(f"{self.called(place)}: {problem.decode()}")

    # -- a load

    def converse(self) -> None:
        """Begin a conversation: calls of `choose` and `all_say` that come in the same order on every rank.

        A new one is rank 0's to begin. So whoever gave an earlier one up, at another turn than the others,
        meets them again.

        Raises:
            RankError: rank 0 does not begin one.
        """
        if self._client is None:
            return
        self._turn = 0
        if self.is_first:
            self._generation += 1
            self._client.set(f"{self._run}/generation", str(self._generation).encode())
            return
        deadline = Pauses(self._timeout_s, polling=self.world_size)
        watch = self._watch([0])
        key = f"{self._run}/generation"
        while not self._client.has(key) or int(self._client.get(key)) <= self._generation:
            if watch.silent(list) is not None:
                raise self._silence_of(0)
            if not deadline.pause():
                raise RankError(f"{self._first} took longer than {self._timeout_s:g} s to begin to load")
        self._generation = int(self._client.get(key))

    def choose(self, choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Rank 0 decides (JSON), all get it.

        Raises:
            RankError: rank 0 does not answer; or it failed: then rank 0 raises what `choose` raised.
        """
        return self.consult(b"", (), lambda _: choose())

    def consult(
        self, word: bytes, among: Sequence[int], decide: Callable[[list[bytes]], dict[str, Any]]
    ) -> dict[str, Any]:
        """Rank 0 decides (JSON) from what ranks `among` all say, in their order; all get it.

        Raises:
            RankError: one says nothing in time, rank 0 does not answer; or it failed: then rank 0 raises what
                `decide` raised.
        """
        if self._client is None:
            return decide([word] if among else [])
        key = self._next_turn()
        if self.is_first:
            try:
                chosen = decide(self._words(key, word, among))
            except BaseException as error:
                self._tell(key, {"error": f"{type(error).__name__}: {error}"})
                raise
            self._tell(key, chosen)
            return chosen
        if self.rank in among:
            self._client.put_large(f"{key}/{self.rank}", word)
        return dict(self._told(key, "to decide"))

    def _words(self, key: str, own: bytes, among: Sequence[int]) -> list[bytes]:
        assert self._client is not None
        others = [rank for rank in among if rank != self.rank]
        if others:
            self._await([f"{key}/{rank}" for rank in others], others, "to say what it has")
        words = iter(self._client.take_large([f"{key}/{rank}" for rank in others]))
        return [own if rank == self.rank else next(words) for rank in among]

    def all_say(self, word: str) -> list[str]:
        """What every rank says, by rank, on every rank; the first few thousand letters of it.

        Raises:
            RankError: a rank says nothing in time, or shows no sign of life: the same on every rank.
        """
        if self._client is None:
            return [word]
        key = self._next_turn()
        word = word[:_WORD_LENGTH_MAX]
        if not self.is_first:
            self._client.set(f"{key}/{self.rank}", word.encode())
            return list(self._told(key, "to sum up")["said"])
        others = range(1, self.world_size)
        keys = [f"{key}/{rank}" for rank in others]
        try:
            self._await(keys, others, "to load")
        except RankError as error:
            self._tell(key, {"error": str(error)})
            raise
        said = [word, *(data.decode() for data in self._client.get_all(keys))]
        self._tell(key, {"said": said})
        return said

    def _next_turn(self) -> str:
        self._turn += 1
        return f"{self._run}/load/{self._generation}/{self._turn}"

    def _tell(self, key: str, what: dict[str, Any]) -> None:
        assert self._client is not None
        self._client.put_large(key, json.dumps(what).encode())
        self._said += 1

    def _told(self, key: str, to: str) -> dict[str, Any]:
        assert self._client is not None
        self._await([key], [0], to)
        told: dict[str, Any] = json.loads(self._client.get_large(key))
        self._hear()
        if "error" in told:
            raise RankError(f"{self._first}: {told['error']}")
        return told

    # -- waiting

    def _await(
        self, keys: Sequence[str], ranks: Collection[int], to: str, or_any: Sequence[str] = ()
    ) -> None:
        """Wait until the keys are there, or one of some others; `ranks` set one each, or one of them all."""
        assert self._client is not None
        # Whoever waits for rank 0 does so with all the others, and it may be waiting for one of them: once,
        # and where there are several nodes, once more for each to prepare and to publish.
        timeout_s = self._timeout_s * (1 if self.is_first else 4 if self.nodes.are_several else 2)
        deadline = Pauses(timeout_s, polling=1 if self.is_first else self.world_size)
        watched = self._watch([rank for rank in ranks if rank != self.rank])
        while not self._client.has(*keys):
            if any(self._client.has(key) for key in or_any):
                return
            silent = watched.silent(lambda late: self._lacking(keys, ranks, late))
            odd = self._told_of_other_parts(ranks, enough=silent is not None)
            if odd is not None:
                raise RankError(odd)
            if silent is not None:
                raise self._silence_of(silent)
            if not deadline.pause():
                raise RankError(
                    f"{self.called(*self._lacking(keys, ranks, ranks))} took longer than {timeout_s:g} s {to}"
                )

    def _silence_of(self, rank: int) -> RankError:
        return RankError(
            f"{self.called(rank)} shows no sign of life since {self._silence_s:g} s: is it dead?"
        )

    def _lacking(self, keys: Sequence[str], ranks: Collection[int], of: Collection[int]) -> list[int]:
        """Those of `of` whose key is not there."""
        assert self._client is not None
        if len(keys) < len(ranks):
            return list(of)
        wanted = set(of)
        absent = set(
            self._client.absent([key for key, rank in zip(keys, ranks, strict=True) if rank in wanted])
        )
        return [rank for key, rank in zip(keys, ranks, strict=True) if key in absent]

    def _watch(self, ranks: Sequence[int]) -> Watch:
        return Watch(self.beats_of, ranks, self.world_size, self._silence_s)

    def beats_of(self, ranks: Sequence[int]) -> list[bytes]:
        """Their last signs of life; b"" of one that gave none yet."""
        assert self._client is not None
        keys = [f"{self._run}/beat/{rank}" for rank in ranks]
        absent = set(self._client.absent(keys))
        beats = iter(self._client.get_all([key for key in keys if key not in absent]))
        return [b"" if key in absent else next(beats) for key in keys]


def member_of(
    store: Any,
    rank: int | None,
    world_size: int | None,
    part: str | None = None,
    parts: Mapping[str, int] | None = None,
) -> tuple[Member, Any]:
    """Which participant a caller means to be, and the store they agree in: those it names, else those of
    torch.distributed, else itself alone.

    Raises:
        OptionError: half of it is said, or torch.distributed says something else.
    """
    if (part is None) != (parts is None):
        raise OptionError("part and parts belong together")
    distributed = torch.distributed
    is_initialized = distributed.is_available() and distributed.is_initialized()
    if parts is not None and part is not None:
        declared = Parts(dict(parts))
        expected = len(declared.places(part))
        if is_initialized and rank is None:
            rank = distributed.get_rank()
            world_size = distributed.get_world_size() if world_size is None else world_size
        if (world_size or expected) != expected:
            raise OptionError(f"part {part!r} is declared with {expected} ranks, here are {world_size}")
        if rank is None and expected > 1:
            raise OptionError(
                f"part {part!r} has {expected} ranks, and nothing says which this is: pass rank"
            )
        return Member(declared, part, rank or 0), store
    if world_size == 1:
        return Member(Parts.none(1), MAIN, 0), None
    if store is None and is_initialized:
        world_size = distributed.get_world_size() if world_size is None else world_size
        rank = distributed.get_rank() if rank is None else rank
        store = distributed.distributed_c10d._get_default_store()  # noqa: SLF001 -- there is no public way to it
    elif store is None and rank is None and world_size is None:
        return Member(Parts.none(1), MAIN, 0), None
    if rank is None or world_size is None:
        raise OptionError("store, rank and world_size belong together")
    return Member(Parts.none(world_size), MAIN, rank), store


def ranks_of(member: Member, store: Any, root: str, *, timeout_s: float, silence_s: float) -> Ranks:
    """All participants, seen from one of them.

    Raises:
        OptionError: they have no store.
    """
    world_size = member.parts.world_size
    shared = store if world_size > 1 else None
    name = digest(root.encode())
    return Ranks(shared, member.place, world_size, name, timeout_s, silence_s, member.parts)
