"""Trees to leaves and back; live objects to trees and back."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from asyncckpt import AsyncCheckpointer
from asyncckpt.errors import LeafError, OptionError
from asyncckpt.state import TrainingState
from asyncckpt.tree import flatten, unflatten

KEYS = st.text("abc", min_size=1, max_size=3)
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=3)
)
VALUES = st.recursive(
    PLAIN | st.builds(lambda n: torch.arange(float(n)), st.integers(0, 3)),
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=4),
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.integers(0, 3), inner, min_size=1, max_size=3),
    ),
    max_leaves=15,
)


def same(a: Any, b: Any) -> bool:
    """Equal in type and value; a mapping's order is not part of its value."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_flatten_is_undone_by_unflatten(tree: dict[str, Any]) -> None:
    leaves = flatten(tree)
    assert len({leaf.name for leaf in leaves}) == len(leaves)
    assert same(unflatten((leaf.path, leaf.value) for leaf in leaves), tree)


def test_lists_longer_than_ten_keep_their_order() -> None:
    tree = {"a": [torch.tensor(i) for i in range(12)]}
    assert same(unflatten((leaf.path, leaf.value) for leaf in flatten(tree)), tree)


@pytest.mark.parametrize(
    "tree",
    [
        {"a.b": 1, "a": {"b": 2}},
        {"a": {"0": 1}, "a.0": 2},
        {"a": [torch.ones(1)], "a.0": 2},
        {"a": {"b.c": 1, "b": {"c": 2}}},
    ],
)
def test_two_leaves_of_one_name_are_refused(tree: dict[str, Any]) -> None:
    with pytest.raises(LeafError, match="two leaves are called 'a"):
        flatten(tree)


def test_empty_and_odd_mappings_are_leaves() -> None:
    tree = {"empty": {}, "odd": {1: {"a": 2}}, "mixed": {"a": 1, 2: 3}, "lists": [[], [{}]], "none": None}
    leaves = flatten(tree)
    assert {leaf.name for leaf in leaves} == {"empty", "odd", "mixed", "lists", "none"}
    assert same(unflatten((leaf.path, leaf.value) for leaf in leaves), tree)


@pytest.mark.parametrize("value", [3, "x", object(), [1], {"a": 3}])
@pytest.mark.parametrize("argument", ["model", "optimizer", "lr_scheduler", "dataloader"])
def test_what_has_no_state_is_refused_by_name(argument: str, value: Any) -> None:
    if argument == "model" or not isinstance(value, list | dict):
        with pytest.raises(OptionError, match=argument):
            TrainingState(**{argument: value})
    else:
        with pytest.raises(OptionError, match=rf"{argument}\["):
            TrainingState(**{argument: value})


def test_nothing_to_save_is_refused() -> None:
    with pytest.raises(OptionError, match="nothing to save"):
        TrainingState()


def test_capture_names_parameters_as_the_model_does() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(
        [{"params": model[1].parameters()}, {"params": model[0].parameters(), "lr": 1}]
    )
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    tree = TrainingState(model=model, optimizer=optimizer).capture(7)
    assert list(tree) == ["model", "optimizer", "rng", "step"]
    assert [group["params"] for group in tree["optimizer"]["param_groups"]] == [
        ["1.weight", "1.bias"],
        ["0.weight", "0.bias"],
    ]
    assert set(tree["optimizer"]["state"]) == {name for name, _ in model.named_parameters()}
    assert tree["step"] == 7


class WithExtraState(nn.Module):
    """Modules may keep anything in their extra state; Transformer Engine does."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("layout", ["dcp", "megatron"])
@pytest.mark.parametrize(
    "extra",
    [
        None,
        3,
        {},
        {"a": 1, "b": {"c": torch.arange(3)}},
        [1, torch.ones(2)],
        torch.arange(4),
        OrderedDict(x=1),
    ],
    ids=["none", "int", "empty", "dict", "list", "tensor", "ordered"],
)
def test_extra_state_of_modules(tmp_path: Path, layout: str, extra: Any) -> None:
    model = nn.Sequential(WithExtraState(extra))
    with AsyncCheckpointer(tmp_path, model=model, layout=layout) as checkpointer:
        checkpointer.save(1).wait()
        model[0].extra = type(extra)() if isinstance(extra, dict | list | int) else extra
        if isinstance(extra, torch.Tensor):
            model[0].extra = torch.zeros_like(extra)
        checkpointer.load(1)
    found = model[0].extra
    if isinstance(extra, OrderedDict):  # other mappings come back as a dict where they are a branch
        assert dict(found) == dict(extra)
    else:
        assert same(found, extra)


@pytest.mark.parametrize("layout", ["dcp", "megatron"])
@pytest.mark.parametrize(
    "value",
    [
        (1, {"b": [torch.arange(3)]}),
        ((torch.arange(2), 1), [(torch.arange(3),)]),
        {1: (torch.arange(3), {"x": torch.ones(2)})},
        [[torch.arange(2)], []],
        {"a": {}, "b": [{}, torch.ones(1)]},
        torch.Size([1, 2]),
        [{"a": 1}, {"b": (2, 3)}],
    ],
)
def test_nested_values_come_back(tmp_path: Path, layout: str, value: Any) -> None:
    extra = {"value": value}
    with AsyncCheckpointer(tmp_path, extra=extra, layout=layout) as checkpointer:
        checkpointer.save(1).wait()
        extra["value"] = None
        checkpointer.load(1)
    assert same(extra["value"], value)


def test_a_state_hook_that_hands_out_copies_is_served_by_load_state_dict(tmp_path: Path) -> None:
    class Halved(nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {name: value / 2 for name, value in super().state_dict(*args, **kwargs).items()}

        def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict(
                {name: value * 2 for name, value in state.items()}, *args, **kwargs
            )

    model = Halved(4, 4)
    expected = model.weight.detach().clone()
    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        checkpointer.save(1).wait()
        with torch.no_grad():
            model.weight.zero_()
        checkpointer.load(1)
    assert torch.equal(model.weight, expected)


class Lookalike(nn.Module):
    """Names that only contain what torch calls its wrappers."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.net_orig_mod = nn.Linear(2, 2, bias=False)
        self.netweight = nn.Parameter(torch.full((2, 2), value))
        nn.init.constant_(self.net_orig_mod.weight, value + 1)


def test_names_that_only_look_like_wrappers_stay(tmp_path: Path) -> None:
    model = Lookalike(1.0)
    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        checkpointer.save(1).wait()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        checkpointer.load(1)
    assert bool((model.netweight == 1).all())
    assert bool((model.net_orig_mod.weight == 2).all())


def test_names_that_are_one_without_wrappers_are_refused(tmp_path: Path) -> None:
    model = nn.Module()
    model.net = nn.Module()
    model.net.register_parameter("weight", nn.Parameter(torch.zeros(2)))
    model.net._orig_mod = nn.Linear(2, 1, bias=False)
    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        with pytest.raises(LeafError, match=r"model\.net\.weight and model\.net\._orig_mod\.weight"):
            checkpointer.save(1)
        assert not [path for path in tmp_path.iterdir() if "step" in path.name]
