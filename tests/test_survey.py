"""Thousands of objects asked in one native call: the same answers as object by object."""

from __future__ import annotations

import sys
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from asyncckpt.survey import Known, NotSurveyedError, columns, survey


def with_dictionaries(count: int) -> list[Any]:
    return [
        SimpleNamespace(own={f"k{i}": i if i % 3 else None for i in range(number % 5)}, hooks={})
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 100])
def test_columns_are_what_the_objects_have(count: int) -> None:
    objects = with_dictionaries(count)
    found = columns(objects, ("own",), ("absent",), ("hooks",))
    assert found is not None
    kinds, [(lengths, keys, is_there, values)] = found
    assert kinds == ({SimpleNamespace} if count else set())
    assert np.frombuffer(lengths, np.int64).tolist() == [len(one.own) for one in objects]
    every = [(key, value) for one in objects for key, value in one.own.items()]
    assert keys == [key for key, _ in every]
    assert [bool(one) for one in is_there] == [value is not None for _, value in every]
    assert values == [value for _, value in every if value is not None]


def test_columns_keep_the_order_that_a_dictionary_has_of_its_own() -> None:
    own = OrderedDict(a=1, b=2, c=3)
    own.move_to_end("a")
    found = columns([SimpleNamespace(own=own)], ("own",), (), ())
    assert found is not None
    assert found[1][0][1] == ["b", "c", "a"]
    assert found[1][0][3] == [2, 3, 1]


@pytest.mark.parametrize("place", [0, 40])
def test_columns_say_what_is_odd(place: int) -> None:
    objects = with_dictionaries(50)
    objects[place].hooks["one"] = 1
    assert columns(objects, ("own",), ("absent",), ("hooks",)) is None
    objects[place].hooks = OrderedDict()
    assert columns(objects, ("own",), ("absent",), ("hooks",)) is not None
    objects[place].absent = None
    assert columns(objects, ("own",), ("absent",), ("hooks",)) is None
    del objects[place].absent, objects[place].own
    with pytest.raises(KeyError):
        columns(objects, ("own",), ("absent",), ("hooks",))
    objects[place] = object()
    with pytest.raises(AttributeError):
        columns(objects, ("own",), ("absent",), ("hooks",))
    objects[place] = SimpleNamespace(own=7, hooks={})
    with pytest.raises((AttributeError, TypeError)):
        columns(objects, ("own",), ("absent",), ("hooks",))


def test_a_survey_says_what_each_tensor_says() -> None:
    tensors = [torch.zeros(number % 7, 3) for number in range(100)]
    for tensor in tensors[::3]:
        tensor.add_(1)
    found = survey(tensors, forms=True, storages=True)
    assert found.addresses.tolist() == [tensor.data_ptr() for tensor in tensors]
    assert found.versions.tolist() == [tensor._version for tensor in tensors]
    assert [one.data_ptr() for one in found.storages] == [t.untyped_storage().data_ptr() for t in tensors]
    assert survey(tensors, forms=True).forms == found.forms
    tensors[50].requires_grad_(True)
    assert survey(tensors, forms=True).forms != found.forms


@pytest.mark.parametrize("place", [0, 10, 30, 99])
@pytest.mark.parametrize("odd", [None, 3, "text", [], SimpleNamespace(), torch.Size([1]), torch.Tensor])
def test_what_is_no_tensor_is_refused_and_not_looked_into(place: int, odd: object) -> None:
    tensors: list[Any] = [torch.zeros(2) for _ in range(100)]
    tensors[place] = odd
    with pytest.raises(NotSurveyedError):
        survey(tensors)


@pytest.mark.parametrize("kind", ["another", "the same, elsewhere"])
def test_known_tensors_are_asked_again_if_they_may_be_negated(kind: str) -> None:
    tensors = [torch.ones(2) for _ in range(40)]
    known = Known()
    survey(tensors, forms=True, known=known)
    survey(tensors, forms=True, known=known)
    negated = torch._neg_view(torch.ones(2))  # type: ignore[attr-defined]
    if kind == "another":
        tensors[20] = negated
    else:
        tensors[20].data = negated
    with pytest.raises(NotSurveyedError):
        survey(tensors, forms=True, known=known)


def test_known_tensors_are_not_held() -> None:
    known = Known()
    for turn in range(50):  # new ones are where the old ones were
        tensors = [torch.full((2,), float(turn)) for _ in range(40)]
        survey(tensors, forms=True, known=known)
        tensors[turn % 40] = torch._neg_view(tensors[turn % 40])  # type: ignore[attr-defined]
        with pytest.raises(NotSurveyedError):
            survey(tensors, forms=True, known=known)


def test_nothing_keeps_a_reference() -> None:
    tensors = [torch.zeros(2) for _ in range(40)]
    objects = with_dictionaries(40)
    for one in objects:
        one.own["tensor"] = tensors[0]
    known = Known()

    def ask() -> None:
        survey(tensors, forms=True, storages=True, known=known)
        columns(objects, ("own",), ("absent",), ("hooks",))
        with pytest.raises(KeyError):
            columns(objects, ("own", "another"), (), ())

    ask()
    counts = [sys.getrefcount(one) for one in (*tensors, *objects, objects[3].own, objects[3].hooks)]
    for _ in range(20):
        ask()
    assert [sys.getrefcount(one) for one in (*tensors, *objects, objects[3].own, objects[3].hooks)] == counts
