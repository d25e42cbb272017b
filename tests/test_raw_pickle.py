"""Pickles put together from parts are read as those that pickle wrote itself."""

from __future__ import annotations

import io
import pickle
import pickletools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.formats.raw_pickle import RawPickle


@dataclass(frozen=True)
class Place:
    name: str
    offset: int | None = None
    sizes: torch.Size = field(default_factory=torch.Size)


@given(st.integers(-(1 << 70), 1 << 70))
def test_integers(value: int) -> None:
    out = RawPickle()
    assert pickle.loads(out.to_bytes(out.integer(value))) == value


@pytest.mark.parametrize("value", [(1 << 31) - 1, 1 << 31, -(1 << 31), -(1 << 31) - 1, 0, -1, 255, 1 << 63])
def test_integers_where_their_form_changes(value: int) -> None:
    out = RawPickle()
    assert pickle.loads(out.to_bytes(out.integer(value))) == value


@given(st.lists(st.tuples(st.text(), st.integers(0, 1 << 40), st.lists(st.integers(0, 99), max_size=3))))
def test_a_template_makes_equal_objects(values: list[tuple[str, int, list[int]]]) -> None:
    out = RawPickle()
    before, between, behind = out.template(Place("", 0, torch.Size((7,))), "name", "offset")
    objects = [
        before + out.shared(name) + between + out.integer(offset) + behind for name, offset, _ in values
    ]
    sizes = [out.shared(torch.Size(numbers)) for _, _, numbers in values]
    found = pickle.loads(out.to_bytes(out.sequence([out.sequence(objects), out.sequence(sizes)])))
    assert found[0] == [Place(name, offset, torch.Size((7,))) for name, offset, _ in values]
    assert found[1] == [torch.Size(numbers) for _, _, numbers in values]


def test_equal_values_are_one_object_and_parts_do_not_disturb_each_other() -> None:
    out = RawPickle()
    long = "long enough not to be interned, by chance"
    parts: list[Any] = [out.shared(long), out.plain([long, long]), out.shared(long), out.plain({"a": (1, 2)})]
    once, twice, again, plain = pickle.loads(out.to_bytes(out.sequence(parts)))
    assert once is again
    assert twice == [long, long]
    assert plain == {"a": (1, 2)}


def test_an_instance_and_a_dictionary() -> None:
    out = RawPickle()
    items = [
        out.shared("k"),
        out.instance(Place("", 3), name=out.plain("n"), sizes=out.plain(torch.Size((4, 5)))),
    ]
    data = out.to_bytes(out.dictionary(items))
    assert pickle.loads(data) == {"k": Place("n", 3, torch.Size((4, 5)))}
    pickletools.dis(data, out=io.StringIO())  # raises where the stack does not work out
