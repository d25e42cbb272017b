"""Who holds a box, and who writes which part of it: the same on every rank, at any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from asyncckpt.planners.dcp import DcpPlanner
from asyncckpt.shards import Block, Blocks, Holders, shares
from asyncckpt.tree import StateTree

MANY = 16_384


@pytest.mark.parametrize(
    ("ranks", "key"),
    [
        ([5], "5-5"),
        (range(4), "0-3"),
        ([0, 1, 2, 3], "0-3"),
        ([1, 9, 17], "1-17:8"),
        (range(3, MANY, 64), f"3-{MANY - 61}:64"),
    ],
)
def test_evenly_spaced_holders_are_named_by_their_ends(ranks: Sequence[int], key: str) -> None:
    assert Holders.of(ranks).key == key
    assert isinstance(Holders.of(ranks).ranks, range)


@given(st.sets(st.integers(0, 300), min_size=1), st.sets(st.integers(0, 300), min_size=1))
def test_holders_are_as_good_as_their_ranks(some: set[int], others: set[int]) -> None:
    ranks = sorted(some)
    holders = Holders.of(ranks)
    assert len(holders) == len(ranks)
    assert [holders.place_of(rank) for rank in ranks] == list(range(len(ranks)))
    assert tuple(holders.ranks) == tuple(ranks)
    other = Holders.of(sorted(others))
    assert (holders == other) == (some == others)
    assert (hash(holders) == hash(other)) or some != others


@given(
    st.sets(st.integers(0, 40), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 200_000), st.booleans()), max_size=8),
)
def test_shares_are_the_whole_and_no_byte_twice(ranks: set[int], sizes: list[tuple[int, bool]]) -> None:
    holders = Holders.of(sorted(ranks))
    blocks = [(Block((size,), (0,), (size,), holders), 4, can_cut) for size, can_cut in sizes]
    by_rank = [shares(blocks, rank) for rank in sorted(ranks)]
    for place, (size, _) in enumerate(sizes):
        written = sorted(piece for mine in by_rank for piece in mine[place] if piece[0] < piece[1])
        assert [begin for begin, _ in written] == [0, *(end for _, end in written[:-1])][: len(written)]
        assert sum(end - begin for begin, end in written) == size


@pytest.fixture
def last_of_many() -> Iterator[int]:
    dist.init_process_group("fake", store=FakeStore(), rank=MANY - 1, world_size=MANY)
    yield MANY - 1
    dist.destroy_process_group()


def test_replicas_in_a_mesh_of_many_have_a_short_name(last_of_many: int) -> None:
    mesh = DeviceMesh("cpu", torch.arange(MANY).view(-1, 8, 4), _init_backend=False)
    whole = torch.Size((64, 3))

    def held(*placements: object) -> Holders:
        rows = 64
        for ways, placement in zip(mesh.shape, placements, strict=True):
            rows //= ways if isinstance(placement, Shard) else 1
        tensor = DTensor.from_local(
            torch.zeros(rows, 3), mesh, placements, run_check=False, shape=whole, stride=(3, 1)
        )
        return Blocks(MANY).of("x", tensor).holders

    assert held(Replicate(), Replicate(), Shard(0)).key == f"3-{MANY - 1}:4"
    assert held(Replicate(), Replicate(), Replicate()).key == f"0-{MANY - 1}"
    assert len(held(Replicate(), Shard(0), Replicate()).key) < 48  # runs of four, 32 apart


def test_what_a_ballot_says_of_its_group_does_not_grow_with_the_group() -> None:
    tree = StateTree(model={f"w{index}": torch.zeros(40_000) for index in range(20)})
    tree.parameters = frozenset(tree["model"])
    few, many = (DcpPlanner(0, world).plan(tree).plan.groups for world in (8, MANY))
    assert len(repr(many)) <= len(repr(few)) + len(str(MANY))
    assert [name for _, name in few] == [name for _, name in many]
