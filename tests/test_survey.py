"""Thousands of objects asked in one native call: the same answers as object by object."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from asyncckpt import survey as survey_room
from asyncckpt.sections.walk import Walker
from asyncckpt.survey import NotSurveyedError, columns, entries_of, identities, survey

ROOT = Path(__file__).resolve().parent.parent

surveyed = pytest.mark.skipif(
    survey_room._EXCHANGE_API is None, reason="this torch has no table of functions to ask tensors by"
)


asked_inside = pytest.mark.skipif(
    not survey_room.inside_agrees(), reason="torch's functions are not found in this torch"
)


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


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 100])
def test_entries_are_what_the_dictionaries_have(count: int) -> None:
    values = [torch.zeros(1), None, 3, torch.nn.Parameter(torch.zeros(1)), torch.zeros(2), Subclass(2)]
    dicts: list[dict[Any, Any]] = [
        {f"k{i}" if i % 2 else i: values[(number + i) % 6] for i in range(number % 7)}
        for number in range(count)
    ]
    for one in dicts[::3]:
        one.pop("k1", None)  # a hole in its table
    found = entries_of(dicts, torch.Tensor)
    assert found is not None
    lengths, keys, are_tensors, tensors, others = found
    assert np.frombuffer(lengths, np.int64).tolist() == list(map(len, dicts))
    every = [item for one in dicts for item in one.items()]
    assert keys == [key for key, _ in every]
    assert [bool(one) for one in are_tensors] == [type(value) is torch.Tensor for _, value in every]
    ids = [id(value) for _, value in every if type(value) is torch.Tensor]
    assert list(map(id, tensors)) == ids
    assert list(map(id, others)) == [id(value) for _, value in every if type(value) is not torch.Tensor]
    assert identities(tensors) == np.array(ids, np.int64).tobytes()


@pytest.mark.parametrize("place", [0, 40])
@pytest.mark.parametrize("odd", [OrderedDict(a=1), SimpleNamespace(a=1), None])
def test_entries_are_of_plain_dictionaries_alone(place: int, odd: Any) -> None:
    dicts: list[Any] = [{"a": 1} for _ in range(50)]
    assert entries_of(dicts, int) is not None
    dicts[place] = odd
    assert entries_of(dicts, int) is None


@surveyed
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


PATCHES: dict[str, Any] = {
    "_version": property(lambda self: 7),
    "requires_grad": property(lambda self: True),
    "is_neg": lambda self: True,
    "untyped_storage": lambda self: "a storage",
}


@surveyed
@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
@pytest.mark.parametrize("name", PATCHES)
def test_what_somebody_put_in_place_of_torchs_own_is_asked(
    monkeypatch: pytest.MonkeyPatch, kind: type, name: str
) -> None:
    """On either class; also where it is a function and torch's is none."""
    tensors = [torch.nn.Parameter(torch.zeros(2), requires_grad=False) for _ in range(20)]
    before = survey(tensors, forms=True, storages=True)
    monkeypatch.setattr(kind, name, PATCHES[name])
    if name == "is_neg":
        with pytest.raises(NotSurveyedError):
            survey(tensors, forms=True)
        return
    found = survey(tensors, forms=True, storages=True)
    *_, was_inside = survey_room._native.survey(
        tensors, survey_room.PLAIN, survey_room._EXCHANGE_API, inside=True
    )
    assert was_inside == (name == "untyped_storage" and survey_room.inside_agrees())
    assert found.addresses.tolist() == before.addresses.tolist()
    assert (found.versions == 7).all() == (name == "_version")
    assert (found.forms != before.forms) == (name == "requires_grad")
    assert (found.storages == ["a storage"] * 20) == (name == "untyped_storage")


def of_every_kind() -> list[torch.Tensor]:
    """More than are read ahead; every answer that torch has to what a survey asks."""
    base = torch.zeros(4, 6)
    kinds = [
        base, base[1:], torch.nn.Parameter(base.clone()),
        torch.nn.Parameter(base.clone(), requires_grad=False),
        (torch.nn.Parameter(base.clone()) * 2).contiguous(), base.detach(), base.clone().requires_grad_(),
        torch.zeros(3, dtype=torch.bfloat16), torch.zeros(()), torch.zeros(0), torch.arange(3),
    ]  # fmt: skip
    tensors = [kind.clone() if kind.is_leaf and not kind.requires_grad else kind for kind in kinds * 10]
    for number, tensor in enumerate(tensors):
        with torch.no_grad():
            for _ in range(number % 9):
                tensor.add_(0)
    return tensors


@asked_inside
def test_torch_is_asked_past_python_and_says_the_same() -> None:
    """A mode sees every call that python makes of torch: of those that have been found it sees none."""

    class Seen(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: set[str] = set()

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            owner = getattr(func, "__self__", None)  # of a property, its getter is what is called
            self.names.add(getattr(owner, "__name__", func.__name__))
            return func(*args, **(kwargs or {}))

    tensors = of_every_kind()
    native = (survey_room.PLAIN, survey_room._EXCHANGE_API, True, False)
    with Seen() as outside:
        expected = survey_room._native.survey(tensors, *native, False)
    assert outside.names >= {"_version", "requires_grad", "is_neg"}
    assert survey_room.inside_agrees()
    with Seen() as inside:
        found = survey(tensors, forms=True)
    assert not inside.names & {"_version", "requires_grad", "is_neg"}
    assert expected is not None
    assert found.versions.tolist() == expected[1].tolist() == [tensor._version for tensor in tensors]
    assert found.forms == expected[2]


def test_the_torch_that_is_built_for_is_asked_past_python() -> None:
    """Should a torch rename them, all else still works, and nobody would notice that it is slower."""
    if f"torch=={torch.__version__.partition('+')[0]}\n" not in (ROOT / "constraints.txt").read_text():
        pytest.skip("another torch")
    assert survey_room.inside_agrees()


@asked_inside
@pytest.mark.parametrize("version", [255, 256, 65536, 2**31 - 1, 2**31, 2**32 - 1])
def test_versions_past_python_are_whole(version: int) -> None:
    tensor = torch.zeros(2)
    torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
    assert tensor._version == version
    assert survey([tensor]).versions.tolist() == [version]


@asked_inside
@pytest.mark.parametrize("place", [0, 10, 99])
@pytest.mark.parametrize("forms", [True, False])
def test_past_python_tensors_without_a_version_are_refused(place: int, forms: bool) -> None:
    tensors = [torch.zeros(2) for _ in range(100)]
    survey(tensors, forms=forms)
    with torch.inference_mode():
        tensors[place] = torch.zeros(2)
    with pytest.raises(NotSurveyedError) as refusal:
        survey(tensors, forms=forms)
    assert str(refusal.value.__cause__) == "Inference tensors do not track version counter."


@asked_inside
@pytest.mark.parametrize("place", [0, 10, 99])
def test_past_python_negated_tensors_are_refused_where_forms_matter(place: int) -> None:
    tensors = [torch.zeros(2) for _ in range(100)]
    tensors[place] = torch._neg_view(torch.zeros(2))
    assert len(survey(tensors).addresses) == 100
    with pytest.raises(NotSurveyedError) as refusal:
        survey(tensors, forms=True)
    assert str(refusal.value.__cause__) == "a tensor is not dense"


LIES: dict[str, Any] = {
    "nothing": lambda found: found,
    "another version": lambda found: (found[0], np.where(found[1] == 300, 44, found[1]), *found[2:]),
    "another form": lambda found: (*found[:2], found[2][:-8] + b"\1" + bytes(7), *found[3:]),
    "not asked": lambda found: (*found[:4], False),
}


@asked_inside
@pytest.mark.parametrize("lie", LIES)
def test_functions_that_say_something_else_than_attributes_are_not_called(
    monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    real = survey_room._native.survey
    monkeypatch.setattr(
        survey_room._native, "survey", lambda *of: LIES[lie](real(*of)) if of[-1] else real(*of)
    )
    assert survey_room.inside_agrees.__wrapped__() == (lie == "nothing")


@asked_inside
@pytest.mark.parametrize("kind", ["inference", "negated"])
def test_functions_that_refuse_nothing_are_not_called(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    real = survey_room._native.survey

    def credulous(tensors: Any, *of: Any) -> Any:
        odd = [one.is_inference() if kind == "inference" else one.is_neg() for one in tensors]
        return real(
            [torch.zeros(1) if is_odd else one for one, is_odd in zip(tensors, odd, strict=True)], *of
        )

    monkeypatch.setattr(survey_room._native, "survey", credulous)
    assert not survey_room.inside_agrees.__wrapped__()


@asked_inside
def test_whether_functions_agree_is_found_out_whatever_mode_the_caller_is_in() -> None:
    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError("seen by the caller's mode")

    find_out = survey_room.inside_agrees.__wrapped__
    with Refusing():
        assert find_out()
    with FakeTensorMode():
        assert find_out()
    with torch.inference_mode(), torch.device("meta"):
        assert find_out()
    asked = []
    torch.func.grad(lambda x: (asked.append(find_out()), x * 2)[1])(torch.zeros(()))
    assert asked == [True]


def test_where_no_thread_can_be_had_attributes_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert not survey_room.inside_agrees.__wrapped__()


@asked_inside
@pytest.mark.parametrize("name", ["_version", "requires_grad", "is_neg"])
def test_attributes_that_somebody_replaced_do_not_stand_for_torchs(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.Tensor, name, getattr(torch.nn.Parameter, name))
    assert survey_room.inside_agrees.__wrapped__()  # it is the same one, in another place
    monkeypatch.setattr(torch.Tensor, name, PATCHES[name])
    assert not survey_room.inside_agrees.__wrapped__()


def test_modules_that_are_not_pythons_say_themselves_what_they_hold() -> None:
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    assert Walker(torch.nn.Sequential(torch.nn.Linear(2, 2))).walk() is not None
    assert Walker(scripted).walk() is None
    assert Walker(torch.nn.Sequential(scripted)).walk() is None


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_module_that_contains_itself_is_no_walk(times: int) -> None:
    outer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    for index in range(times):
        outer[0].add_module(f"again{index}", outer)
    assert Walker(outer).walk() is None


def test_a_module_that_is_there_many_times_is_one() -> None:
    shared = torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(*(shared for _ in range(100)))
    for _ in range(12):  # as deep as modules that contain themselves are looked for
        model = torch.nn.Sequential(model)
    walk = Walker(model).walk()
    assert walk is not None
    assert len(walk.parameters) == 200


@surveyed
def test_nothing_keeps_a_reference() -> None:
    tensors = [torch.zeros(2) for _ in range(40)]
    objects = with_dictionaries(40)
    for one in objects:
        one.own["tensor"] = tensors[0]

    def ask() -> None:
        survey(tensors, forms=True, storages=True)
        columns(objects, ("own",), ("absent",), ("hooks",))
        entries_of([one.own for one in objects], torch.Tensor)
        assert entries_of([*(one.own for one in objects), None], torch.Tensor) is None
        identities(tensors)
        with pytest.raises(KeyError):
            columns(objects, ("own", "another"), (), ())

    ask()
    counts = [sys.getrefcount(one) for one in (*tensors, *objects, objects[3].own, objects[3].hooks)]
    for _ in range(20):
        ask()
    assert [sys.getrefcount(one) for one in (*tensors, *objects, objects[3].own, objects[3].hooks)] == counts
