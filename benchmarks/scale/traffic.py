"""What crosses the store in a save, counted: a TCPStore on loopback, and all ranks' parts said in turn."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from asyncckpt.ballots import Ballot, Outcome, digest
from asyncckpt.formats.manifest import FragmentRef, fragment_name
from asyncckpt.plan import WritePlan
from asyncckpt.ranks import Ranks

HOST = "127.0.0.1"
STEP = 1000
NAME, INCARNATION = digest(b"scale"), "0123456789abcdef"  # as long as they are in a run
TIMEOUT_S = 300.0
SILENCE_S = 60.0  # the default of `rank_timeout_s`


@dataclass
class Traffic:
    """Calls and bytes: keys and values that went up, values that came down."""

    calls: int = 0
    up_bytes: int = 0
    down_bytes: int = 0

    def take(self) -> dict[str, int]:
        """What there was since the last time."""
        taken = {"calls": self.calls, "up_bytes": self.up_bytes, "down_bytes": self.down_bytes}
        self.calls = self.up_bytes = self.down_bytes = 0
        return taken


class CountedStore:
    """A store that a StoreClient takes as it is, since it cannot be cloned, and that counts."""

    def __init__(self, store: Any) -> None:
        self._store = store.clone()
        self.traffic = Traffic()

    def _count(self, up_bytes: int, down_bytes: int) -> None:
        self.traffic.calls += 1
        self.traffic.up_bytes += up_bytes
        self.traffic.down_bytes += down_bytes

    def set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)
        self._count(len(key) + len(value), 0)

    def get(self, key: str) -> bytes:
        value = bytes(self._store.get(key))
        self._count(len(key), len(value))
        return value

    def check(self, keys: list[str]) -> bool:
        found = bool(self._store.check(keys))
        self._count(sum(map(len, keys)), 1)
        return found

    def multi_get(self, keys: list[str]) -> list[bytes]:
        values: list[bytes] = self._store.multi_get(keys)
        self._count(sum(map(len, keys)), sum(map(len, values)))
        return values

    def add(self, key: str, amount: int) -> int:
        result = int(self._store.add(key, amount))
        self._count(len(key) + 8, 8)
        return result

    def delete_key(self, key: str) -> bool:
        gone = bool(self._store.delete_key(key))
        self._count(len(key), 1)
        return gone


@dataclass(frozen=True)
class Part:
    """What a rank says in each save."""

    ballot: Ballot
    tree: bytes
    layout: bytes

    @classmethod
    def of(cls, rank: int, plan: WritePlan, layout: bytes) -> Part:
        """`layout` is this rank's; all else is as in the plan of rank 0, but for its own files."""
        ballot = Ballot(
            rank, STEP, None, FragmentRef(fragment_name(rank), 1000 + rank % 7, zlib.crc32(b"%d" % rank)),
            plan.groups, digest(layout), tuple(zlib.crc32(name.encode()) for name in plan.names[:9]),
            digest(plan.tree),
        )  # fmt: skip
        return cls(ballot, plan.tree, layout)


class Loader(Ranks):
    """Says what ranks would say that are not here: each of them in turn, over one connection."""

    def __init__(self, store: Any, world_size: int) -> None:
        super().__init__(store, 1, world_size, NAME, TIMEOUT_S, SILENCE_S)
        self._run = INCARNATION  # as `begin` would have it
        self._closed.set()  # a heart that beats once

    def beat_for(self, part: Part) -> None:
        """One sign of life."""
        self.rank = part.ballot.rank
        self._beat_on()

    def vote_for(self, save: int, part: Part) -> None:
        self.rank = part.ballot.rank
        if save == 1:
            self._layout_said = self._tree_said = ""
            self.say_layout(part.ballot, part.tree, part.layout)
        self.vote(save, part.ballot)

    def hear_for(self, save: int, part: Part) -> None:
        """The outcome, which is there."""
        self.rank = part.ballot.rank
        outcome = self.outcome(save)
        assert outcome.error is None, outcome.error


def traffic(parts: Sequence[Part]) -> dict[str, Any]:
    """Of rank 0, of one other rank and of all others: in a first save and in a later one. And of one beat.

    Nobody has to wait here. A rank that has to, asks again: `check_bytes` each time.
    """
    hosted = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    of_first, of_others = CountedStore(hosted), CountedStore(hosted)
    first = Ranks(of_first, 0, len(parts), NAME, TIMEOUT_S, SILENCE_S)
    first._run = INCARNATION  # noqa: SLF001 -- as `begin` would have it, without the heart
    others = Loader(of_others, len(parts))
    found: dict[str, Any] = {}
    try:
        for save, name in ((1, "first_save"), (2, "later_save")):
            for part in parts[1:-1]:
                others.vote_for(save, part)
            rest = of_others.traffic.take()
            others.vote_for(save, parts[-1])
            ballots = first.collect(save, parts[0].ballot)
            if save == 1:
                for _ in first.layouts(ballots, parts[0].tree, parts[0].layout):
                    pass
            first.announce(save, Outcome())
            others.hear_for(save, parts[-1])
            one = of_others.traffic.take()
            for part in parts[1:-1]:
                others.hear_for(save, part)
            heard = of_others.traffic.take()
            found[name] = {
                "first_rank": of_first.traffic.take(),
                "one_rank": one,
                "other_ranks": {key: rest[key] + one[key] + heard[key] for key in rest},
            }
        others.beat_for(parts[-1])
        found["beat"] = of_others.traffic.take()
        others.ended_early(3)
        found["check_bytes"] = of_others.traffic.take()["up_bytes"]
    finally:
        first._said = 0  # noqa: SLF001 -- or it would wait until it was heard
        others.close()
        first.close()
    return found


def store_calls_per_s(seconds: float) -> float:
    """How many questions one client has answered by a TCPStore on loopback."""
    hosted: Any = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    store = hosted.clone()
    calls, ends_s = 0, time.monotonic() + seconds
    while time.monotonic() < ends_s:
        for _ in range(100):
            store.check([f"asyncckpt/{NAME}/{INCARNATION}/1/outcome"])
        calls += 100
    return calls / seconds
