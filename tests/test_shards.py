"""Who writes what of tensors that several ranks hold: every element once, in equal shares, as boxes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt.shards import Block, Holders, boxes, local_of, shares

SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@given(st.data(), SHAPES)
@settings(max_examples=300, deadline=None)
def test_boxes_are_runs_of_memory_that_tile_a_range(data: Any, shape: tuple[int, ...]) -> None:
    elements = math.prod(shape)
    begin = data.draw(st.integers(0, elements))
    end = data.draw(st.integers(begin, elements))
    whole = torch.arange(elements).reshape(shape)
    found: list[int] = []
    pieces = list(boxes(shape, begin, end))
    for piece in pieces:
        view = whole
        for dim, (offset, size) in enumerate(zip(piece.offsets, piece.shape, strict=True)):
            view = view.narrow(dim, offset, size)
        run = view.flatten().tolist()
        assert run == list(range(piece.begin, piece.begin + len(run)))
        found += run
    assert found == list(range(begin, end))
    assert len(pieces) <= max(1, 2 * len(shape) - 1)


def test_the_example_of_the_docstring() -> None:
    assert [(p.offsets, p.shape) for p in boxes((4, 10), 7, 35)] == [
        ((0, 7), (1, 3)),
        ((1, 0), (2, 10)),
        ((3, 0), (1, 5)),
    ]


TENSORS = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 3, 1000, 16384, 40000, 300001]), st.sampled_from([1, 2, 4, 8]), st.booleans()
    ),
    max_size=12,
)


def block(elements: int, holders: tuple[int, ...]) -> Block:
    return Block((elements,), (0,), (elements,), Holders.of(sorted(holders)))


@given(TENSORS, st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_every_element_is_written_once(tensors: list[tuple[int, int, bool]], count: int) -> None:
    ranks = tuple(range(2, 2 + count))
    table = [(block(elements, ranks), itemsize, can_cut) for elements, itemsize, can_cut in tensors]
    of_rank = [shares(table, rank) for rank in ranks]
    for index, (elements, _, can_cut) in enumerate(tensors):
        runs = sorted(run for share in of_rank for run in share[index])
        if elements == 0:
            assert runs == [(0, 0)]  # somebody says that it is there
            continue
        assert [begin for begin, _ in runs] == [0, *(end for _, end in runs[:-1])]
        assert runs[-1][1] == elements
        assert can_cut or len(runs) == 1


@pytest.mark.parametrize("count", [2, 3, 4, 8, 64])
def test_shares_are_equal(count: int) -> None:
    """A transformer of 64 MiB and more, and a tensor that is half of it all."""
    ranks = tuple(range(count))
    sizes = [32 << 20, *([1 << 20, 4096, 4] * 32)]
    table = [(block(size // 4, ranks), 4, True) for size in sizes]
    written = [4 * sum(end - begin for runs in shares(table, rank) for begin, end in runs) for rank in ranks]
    mean = sum(written) / count
    assert sum(written) == sum(sizes)
    assert max(abs(nbytes - mean) for nbytes in written) <= 0.05 * mean


def test_those_who_hold_alone_write_all_they_hold() -> None:
    table = [(block(100000, (1,)), 4, True), (block(100000, (0, 1)), 4, True), (block(7, (1,)), 4, False)]
    mine = shares(table, 1)
    assert mine[0] == ((0, 100000),)
    assert mine[2] == ((0, 7),)
    assert mine[1][0][0] > 0


def test_a_plain_tensor_is_its_own_memory() -> None:
    for tensor in (torch.ones(3), torch.nn.Parameter(torch.ones(3))):
        assert local_of(tensor) is tensor
