"""Ranks that agree, as threads over a real TCPStore: each has a client of its own, as processes have."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from asyncckpt import patience as room
from asyncckpt import store as store_room
from asyncckpt.ballots import Ballot, Outcome, digest
from asyncckpt.errors import OptionError, RankError
from asyncckpt.formats.manifest import FragmentRef
from asyncckpt.ranks import Ranks
from asyncckpt.store import StoreClient

WORLD = 4
SOON_S = 0.4  # a deadline that tests let pass


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def world(store: TCPStore) -> list[Ranks]:
    return make(store)


made_here: list[Ranks] = []


@pytest.fixture(autouse=True)
def nobody_stays() -> Iterator[None]:
    yield
    for ranks in made_here:
        ranks._said = 0  # not all tests let all ranks hear the end
        ranks.close()
    made_here.clear()


def make(store: Any, timeout_s: float = 30, silence_s: float = 30, begun: bool = True) -> list[Ranks]:
    """`timeout_s` is not what a beginning has, which a loaded machine holds up."""
    patience_s = 30 if begun else timeout_s
    made = [Ranks(store, rank, WORLD, "test", patience_s, silence_s) for rank in range(WORLD)]
    made_here.extend(made)
    if begun:
        each(made, lambda ranks: ranks.begin(lambda: {"incarnation": "run"}))
        set_patience(made, timeout_s)
    return made


def set_patience(world: list[Ranks], timeout_s: float) -> None:
    for ranks in world:
        ranks._timeout_s = timeout_s


def start(world: list[Ranks], act: Callable[[Ranks], Any]) -> list[Future[Any]]:
    pool = ThreadPoolExecutor(len(world))
    found = [pool.submit(act, ranks) for ranks in world]
    pool.shutdown(wait=False)
    return found


def each(world: list[Ranks], act: Callable[[Ranks], Any]) -> list[Any]:
    return [future.result(60) for future in start(world, act)]


def ballot(rank: int, **fields: Any) -> Ballot:
    return Ballot(rank, **{"step": 7, **fields})


def decide(world: list[Ranks], save: int, ballots: list[Ballot]) -> list[Any]:
    """What each rank hears of a save in which these are the votes; an error's text from whoever raises."""

    def act(ranks: Ranks) -> Any:
        own = ballots[ranks.rank]
        ranks.vote(save, own)
        if not ranks.is_first:
            return ranks.outcome(save).error
        try:
            if own.error is not None:
                raise RankError(f"rank 0: {own.error}")
            found = ranks.collect(save, own)
        except RankError as error:
            ranks.announce(save, Outcome(str(error)))
            return str(error)
        ranks.announce(save, Outcome())
        return found

    return each(world, act)


# ---------------------------------------------------------------------------- agreeing


def test_ballots_come_back_as_they_were() -> None:
    full = Ballot(3, 7, None, FragmentRef("f", 5, 6), (("all", "x"), ("0,2", "y")), "z", (1, 2))
    assert Ballot.from_bytes(full.to_bytes()) == full
    assert Ballot.from_bytes(Ballot(0, 1, "no").to_bytes()) == Ballot(0, 1, "no")
    assert Outcome.from_bytes(Outcome("bad").to_bytes()) == Outcome("bad")


def test_alone_there_is_nobody_to_ask() -> None:
    alone = Ranks(None, 0, 1, "x", 1, 1)
    assert alone.begin(lambda: {"incarnation": "a", "newest": 3})["newest"] == 3
    own = ballot(0)
    alone.vote(1, own)
    assert alone.collect(1, own) == [own]
    assert alone.all_say("ok") == ["ok"]
    assert alone.choose(lambda: {"step": 1}) == {"step": 1}


def test_all_begin_with_what_the_first_made(store: TCPStore) -> None:
    made = []
    world = make(store, begun=False)

    def begin(ranks: Ranks) -> Any:
        return ranks.begin(lambda: made.append(ranks.rank) or {"incarnation": "a", "newest": 5})

    assert each(world, begin) == [{"incarnation": "a", "newest": 5}] * WORLD
    assert made == [0]


def test_a_first_rank_that_cannot_begin_is_heard_by_all_and_may_try_again(store: TCPStore) -> None:
    world = make(store, begun=False)

    def refuse() -> dict[str, Any]:
        raise OptionError("the root is a file")

    futures = start(world, lambda ranks: ranks.begin(refuse))
    with pytest.raises(OptionError, match="the root is a file"):
        futures[0].result(60)
    for future in futures[1:]:
        with pytest.raises(RankError, match="rank 0 could not begin: OptionError: the root is a file"):
            future.result(60)
    assert (
        each(world, lambda ranks: ranks.begin(lambda: {"incarnation": "b"})) == [{"incarnation": "b"}] * WORLD
    )


@pytest.mark.parametrize("kind", ["tcp", "prefix", "hash"])
def test_a_vote_of_all(store: TCPStore, kind: str) -> None:
    world = make({"tcp": store, "prefix": PrefixStore("job", store), "hash": HashStore()}[kind])
    votes = [ballot(rank, fragment=FragmentRef(f"f{rank}", rank, rank)) for rank in range(WORLD)]
    for save in (1, 2, 3):
        assert decide(world, save, votes) == [votes, None, None, None]


def test_ballots_do_not_stay_in_the_store(store: TCPStore, world: list[Ranks]) -> None:
    for save in range(1, 6):
        decide(world, save, [ballot(rank) for rank in range(WORLD)])
    before = store.num_keys()
    for save in range(6, 16):
        decide(world, save, [ballot(rank) for rank in range(WORLD)])
    assert store.num_keys() == before + 10  # of each save its outcome


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_is_heard_by_all_with_rank_and_cause(world: list[Ranks], failing: int) -> None:
    votes = [ballot(rank, error="disk full" if rank == failing else None) for rank in range(WORLD)]
    assert decide(world, 1, votes) == [f"rank {failing}: disk full"] * WORLD
    votes = [ballot(rank) for rank in range(WORLD)]
    assert decide(world, 2, votes)[1:] == [None] * 3  # the next save is a new one


def test_a_failure_ends_the_vote_before_all_have_voted(world: list[Ranks]) -> None:
    world[3].vote(1, ballot(3, error="gone"))
    with pytest.raises(RankError, match="rank 3: gone"):
        world[0].collect(1, ballot(0))
    world[0].announce(1, Outcome("rank 3: gone"))
    assert world[1].outcome(1) == Outcome("rank 3: gone")  # it comes late, and hears it all the same


def test_different_steps_are_told_apart(world: list[Ranks]) -> None:
    votes = [ballot(rank, step=8 if rank == 2 else 7) for rank in range(WORLD)]
    assert decide(world, 1, votes) == ["rank 2 saves step 8 where rank 0 saves step 7"] * WORLD


def test_different_structures_are_told_apart(world: list[Ranks]) -> None:
    groups = [(("all", "a"),), (("all", "a"), ("1,3", "b")), (("all", "a"),), (("all", "a"), ("1,3", "c"))]
    votes = [ballot(rank, groups=groups[rank]) for rank in range(WORLD)]
    for said in decide(world, 1, votes):
        assert "the state of rank 3 has another structure than that of rank 1" in said


def test_layouts_cross_once_per_structure(store: TCPStore, world: list[Ranks]) -> None:
    layouts = {rank: f"layout {rank}".encode() * 1000 for rank in range(WORLD)}
    fetched: list[str] = []
    take_large = StoreClient.take_large

    def counted(client: StoreClient, keys: Sequence[str]) -> Iterator[bytes]:
        fetched.extend(keys)
        return take_large(client, keys)

    def save(number: int) -> list[bytes]:
        votes = [ballot(rank, tree="tree", layout=digest(layouts[rank])) for rank in range(WORLD)]
        each(world, lambda ranks: ranks.say_layout(votes[ranks.rank], b"tree", layouts[ranks.rank]))
        decide(world, number, votes)
        found = list(world[0].layouts(votes, b"tree", layouts[0]))
        assert {tree for tree, _ in found} == {b"tree"}
        return [layout for _, layout in found]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreClient, "take_large", counted)
        assert save(1) == list(layouts.values())
        assert len(fetched) == 3
        assert save(2) == list(layouts.values())
        assert len(fetched) == 3
        layouts[2] = b"another"
        assert save(3) == list(layouts.values())
        assert len(fetched) == 4
    assert not [key for key in store.list_keys() if "/layout/" in key]


def test_what_all_hold_alike_is_told_once(store: TCPStore, world: list[Ranks]) -> None:
    votes = [ballot(rank, tree="two" if rank == 3 else "one", layout=f"{rank}") for rank in range(WORLD)]
    trees = {"one": b"tree one", "two": b"tree two"}
    for ranks in world:
        ranks.say_layout(votes[ranks.rank], trees[votes[ranks.rank].tree], b"layout")
    told = [key for key in store.list_keys() if "/tree/" in key and not key.endswith("/told")]
    assert len(told) == 2
    found = world[0].layouts(votes, b"tree one", b"layout")
    assert [tree for tree, _ in found] == [trees[vote.tree] for vote in votes]


def test_a_ballot_of_a_later_save_is_not_taken_for_this_one(world: list[Ranks]) -> None:
    for ranks in world:
        ranks.vote(1, ballot(ranks.rank))
    world[3].vote(2, ballot(3, step=8))  # it gave up waiting
    with pytest.raises(RankError, match="rank 3 went on to its next save before this one was decided"):
        world[0].collect(1, ballot(0))


def test_a_failure_is_read_also_from_a_rank_that_went_on(world: list[Ranks]) -> None:
    world[3].vote(1, ballot(3, error="disk full"))
    world[3].vote(2, ballot(3, step=8))
    with pytest.raises(RankError, match="rank 3: disk full"):
        world[0].collect(1, ballot(0))


def test_a_closer_hears_of_a_failure_that_the_first_rank_announces_meanwhile(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_room, "CALL_TIMEOUT_S", 10)  # of a call for what is not there any more
    world = make(store)
    first, closer, failing = world[0], world[1], world[3]
    failing.vote(1, ballot(3, error="no space left"))
    there = closer._client.has  # type: ignore[union-attr]

    def has(*keys: str) -> bool:
        found = there(*keys)
        if found and keys[0].endswith("/failed"):
            with pytest.raises(RankError, match="rank 3: no space left"):
                first.collect(1, ballot(0))
            first.announce(1, Outcome("rank 3: no space left"))
        return found

    monkeypatch.setattr(closer._client, "has", has)
    with pytest.raises(RankError, match="another rank's part has failed"):
        closer.take_over(1, [1, 3])
    ended = closer.ended_early(1)
    assert ended is not None
    assert ended.error == "rank 3: no space left"


def test_many_that_wait_ask_the_store_no_more_often_than_few() -> None:
    def asked_per_s(polling: int) -> float:
        deadline = room.Pauses(10, polling)
        return polling / deadline._longest_s

    assert asked_per_s(8) == 8 / room._POLL_S[1]
    assert asked_per_s(16_384) == pytest.approx(room.POLLS_PER_S)
    assert room.Pauses(10, 16_384)._longest_s < 1


def test_few_that_are_missing_are_found_in_few_calls(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = StoreClient(store, "p/")
    for index in range(64):
        if index != 41:
            client.set(f"{index}", b"")
    calls = []
    has = StoreClient.has
    monkeypatch.setattr(StoreClient, "has", lambda self, *keys: calls.append(keys) or has(self, *keys))
    assert client.absent([f"{index}" for index in range(64)]) == ["41"]
    assert len(calls) <= 2 * 6 + 1
    client.close()


def test_values_larger_than_the_store_takes(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_room, "_VALUE_NBYTES_MAX", 1000)
    client = StoreClient(store, "p/")
    value = bytes(range(256)) * 50
    client.put_large("k", value)
    client.put_large("empty", b"")
    assert client.get_large("k") == value
    assert list(client.take_large(["k", "empty"])) == [value, b""]
    assert client.absent(["k", "k/0", "empty"]) == ["k", "k/0", "empty"]


def test_a_load_is_one_conversation(world: list[Ranks]) -> None:
    def act(ranks: Ranks) -> Any:
        ranks.converse()
        first = ranks.choose(lambda: {"step": 450})
        said = ranks.all_say("corrupt" if ranks.rank == 2 else "ok")
        second = ranks.choose(lambda: {"step": 400})
        return first, said, second, ranks.all_say(f"ok {ranks.rank}")

    expected = ({"step": 450}, ["ok", "ok", "corrupt", "ok"], {"step": 400}, [f"ok {r}" for r in range(4)])
    assert each(world, act) == [expected] * WORLD


def test_who_gave_a_conversation_up_meets_the_others_in_the_next(store: TCPStore) -> None:
    world = make(store, timeout_s=SOON_S)

    def talk(ranks: Ranks) -> Any:
        ranks.converse()
        chosen = ranks.choose(lambda: {"step": 1})
        if ranks.rank == 2:
            return chosen  # an interrupt, say
        return ranks.all_say("ok")

    futures = start(world, talk)
    assert futures[2].result(60) == {"step": 1}
    for rank in (0, 1, 3):
        with pytest.raises(RankError, match="took longer than"):
            futures[rank].result(60)

    def again(ranks: Ranks) -> Any:
        ranks.converse()
        return ranks.choose(lambda: {"step": 2}), ranks.all_say("ok")

    set_patience(world, 30)

    assert each(world, again) == [({"step": 2}, ["ok"] * WORLD)] * WORLD


def test_who_dies_in_a_conversation_is_named_by_all_at_once(store: TCPStore) -> None:
    world = make(store, timeout_s=3600, silence_s=SOON_S)
    stop_heart(world[3])

    def talk(ranks: Ranks) -> Any:
        ranks.converse()
        return ranks.all_say("ok")

    for future in start(world[:3], talk):
        with pytest.raises(RankError, match="rank 3 shows no sign of life"):
            future.result(30)


def test_words_are_cut(world: list[Ranks]) -> None:
    def talk(ranks: Ranks) -> Any:
        ranks.converse()
        return ranks.all_say("long " * 3_000_000)

    for said in each(world, talk):
        assert {len(word) for word in said} == {4096}


def test_a_beginning_that_a_dead_run_left_behind_is_nobodys(store: TCPStore) -> None:
    first = make(store)
    for ranks in first:
        stop_heart(ranks)
    late = Ranks(store, 1, WORLD, "test", SOON_S, 30)
    made_here.append(late)
    with pytest.raises(RankError, match=r"rank 0 took longer than 0.4 s to begin"):
        late.begin(dict)
    again = make(store, begun=False)
    found = each(again, lambda ranks: ranks.begin(lambda: {"incarnation": "second"}))
    assert found == [{"incarnation": "second"}] * WORLD


def test_who_begins_again_before_rank_0_has_left_waits_for_the_new_run(store: TCPStore) -> None:
    first = make(store)  # its rank 0 lives on
    again = [Ranks(store, rank, WORLD, "test", 30, 30) for rank in range(WORLD)]
    made_here.extend(again)
    early = start(again[1:], lambda ranks: ranks.begin(dict))
    threading.Event().wait(SOON_S)  # many signs of life of the old run
    assert not any(future.done() for future in early)
    first[0]._said = 0
    first[0].close()
    again[0].begin(lambda: {"incarnation": "second"})
    assert [future.result(60) for future in early] == [{"incarnation": "second"}] * 3


def test_all_join_or_none(store: TCPStore) -> None:
    world = make(store)
    for ranks, future in zip(
        world, start(world, lambda r: r.join("no disk" if r.rank == 2 else "")), strict=True
    ):
        with pytest.raises(RankError, match="rank 2 cannot take part: no disk"):
            future.result(60)
        assert ranks._joined.is_set()
    each(world, lambda ranks: ranks.join(""))


def test_a_heart_outlives_a_store_that_fails_once(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make(store, timeout_s=3600, silence_s=SOON_S)
    refused = threading.Event()
    plain = StoreClient.set

    def once(client: StoreClient, key: str, value: bytes) -> None:
        if key.endswith("/beat/2") and not refused.is_set():
            refused.set()
            raise RankError("a packet was lost")
        plain(client, key, value)

    monkeypatch.setattr(StoreClient, "set", once)
    assert refused.wait(30)
    before = world[0].beats_of([2])
    threading.Event().wait(SOON_S)
    assert world[0].beats_of([2]) != before


def test_a_first_rank_that_finds_nothing_says_so(world: list[Ranks]) -> None:
    def nothing() -> dict[str, Any]:
        raise OptionError("no step is good")

    each(world, lambda ranks: ranks.converse())
    futures = start(world, lambda ranks: ranks.choose(nothing))
    with pytest.raises(OptionError, match="no step is good"):
        futures[0].result(60)
    for future in futures[1:]:
        with pytest.raises(RankError, match="rank 0: OptionError: no step is good"):
            future.result(60)


# ---------------------------------------------------------------------------- those who are missing


def test_whoever_does_not_vote_is_named(store: TCPStore) -> None:
    world = make(store, timeout_s=SOON_S)
    world[2].vote(1, ballot(2))
    world[0].vote(1, ballot(0))
    with pytest.raises(RankError, match=r"ranks 1, 3 did not vote within 0.4 s"):
        world[0].collect(1, ballot(0))


def test_a_first_rank_that_does_not_answer_is_named(store: TCPStore) -> None:
    world = make(store, timeout_s=SOON_S)
    with pytest.raises(RankError, match=r"rank 0 took longer than 0.8 s to publish"):
        world[1].outcome(1)
    with pytest.raises(RankError, match=r"rank 0 took longer than 0.8 s to decide"):
        world[1].choose(dict)


def stop_heart(ranks: Ranks) -> None:
    """What a kill does, as far as others can see."""
    ranks._closed.set()
    assert ranks._heart is not None
    ranks._heart.join()


def test_the_dead_are_named_long_before_the_deadline(store: TCPStore) -> None:
    world = make(store, timeout_s=3600, silence_s=SOON_S)
    stop_heart(world[3])
    for ranks in world[:3]:
        ranks.vote(1, ballot(ranks.rank))
    with pytest.raises(RankError, match=r"rank 3 shows no sign of life since 0.4 s"):
        world[0].collect(1, ballot(0))
    stop_heart(world[0])
    with pytest.raises(RankError, match="rank 0 shows no sign of life"):
        world[1].outcome(2)
    with pytest.raises(RankError, match="rank 0 shows no sign of life"):
        world[1].all_say("ok")


def test_a_slow_first_rank_may_not_publish_what_others_gave_up(store: TCPStore) -> None:
    world = make(store, timeout_s=3600, silence_s=SOON_S)
    world[1].vote(1, ballot(1))
    stop_heart(world[0])
    with pytest.raises(RankError, match="rank 0 shows no sign of life"):
        world[1].outcome(1)
    with pytest.raises(RankError, match="another rank took rank 0 for dead"):
        world[0].claim(1)
    world[0].claim(2)  # another save


def test_others_wait_on_for_a_first_rank_that_has_begun_to_publish(store: TCPStore) -> None:
    world = make(store, timeout_s=3600, silence_s=SOON_S)
    stop_heart(world[0])
    world[0].claim(1)
    waiting = start(world[1:], lambda ranks: ranks.outcome(1))
    threading.Event().wait(1.2 * SOON_S)  # now they ask who was first, and wait once more
    assert not any(future.done() for future in waiting)
    world[0].announce(1, Outcome())
    assert [future.result(60) for future in waiting] == [Outcome()] * 3
    world[0].claim(2)
    with pytest.raises(RankError, match=r"rank 0 shows no sign .* the step may be there"):
        world[1].outcome(2)


def test_the_living_may_take_their_time(store: TCPStore) -> None:
    world = make(store, timeout_s=3600, silence_s=SOON_S)
    began_s = time.monotonic()

    def vote_late() -> float:
        threading.Event().wait(3 * SOON_S)  # three times as long as silence would be death
        world[1].vote(1, ballot(1))
        return time.monotonic() - began_s

    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(vote_late)
        for rank in (0, 2, 3):
            world[rank].vote(1, ballot(rank))
        assert world[0].collect(1, ballot(0)) == [ballot(rank) for rank in range(WORLD)]
        assert late.result() >= 3 * SOON_S


def test_the_first_rank_leaves_when_all_have_heard(store: TCPStore) -> None:
    """The store may live in its process."""
    world = make(store)
    for ranks in world:
        ranks.vote(1, ballot(ranks.rank))
    world[0].announce(1, Outcome())
    leaving = start(world[:1], lambda ranks: ranks.close())[0]
    for ranks in world[1:]:
        assert not leaving.done()
        assert ranks.outcome(1) == Outcome()
    leaving.result(60)


def test_the_first_rank_does_not_wait_for_the_dead_for_ever(store: TCPStore, caplog: Any) -> None:
    world = make(store, silence_s=SOON_S)
    world[0].announce(1, Outcome("gone"))
    world[1].outcome(1)
    world[2].vote(1, ballot(2, error="gone"))  # it does not ask what the others make of that
    world[0].close()
    assert "1 words were not heard" in caplog.text


def test_a_store_that_hangs_does_not_hang_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_room, "CALL_TIMEOUT_S", 0.2)
    release = threading.Event()

    class Hanging:
        def check(self, keys: list[str]) -> bool:
            return release.wait(60)

    client = StoreClient(Hanging(), "p/")
    with pytest.raises(RankError, match=r"has not answered for 0.2 s"):
        client.has("x")
    release.set()
    assert client.has("y")  # on a new thread; the old one is left behind
    client.close()


def test_a_store_that_is_gone_is_named() -> None:
    class Gone:
        def set(self, key: str, value: bytes) -> None:
            raise ConnectionResetError("Connection reset by peer")

    client = StoreClient(Gone(), "p/")
    with pytest.raises(RankError, match=r"cannot be reached.*Connection reset by peer"):
        client.set("x", b"")
    client.close()


def test_votes_do_not_wait_for_somebody_elses_blocking_get(store: TCPStore) -> None:
    """A TCPStore client that waits in get() holds up all other calls on it; ours is a clone."""
    world = make(store)
    blocked = threading.Thread(target=lambda: store.get("appears at the end"), daemon=True)
    blocked.start()
    votes = [ballot(rank) for rank in range(WORLD)]
    assert decide(world, 1, votes)[0] == votes
    assert blocked.is_alive()
    other = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    other.set("appears at the end", "now")
    blocked.join(60)


@pytest.mark.parametrize(("rank", "world_size", "words"), [(1, 1, "rank 1 of 1"), (-1, 2, "rank -1 of 2")])
def test_impossible_ranks(rank: int, world_size: int, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Ranks(HashStore(), rank, world_size, "x", 1, 1)
    with pytest.raises(OptionError, match="need a store"):
        Ranks(None, 0, 2, "x", 1, 1)


def test_what_is_said_is_json(world: list[Ranks]) -> None:
    assert json.loads(ballot(1).to_bytes())["step"] == 7
