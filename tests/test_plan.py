"""One plan serves as long as the structure stays."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from asyncckpt import AsyncCheckpointer
from asyncckpt.errors import LeafError
from asyncckpt.formats.pickles import Pickled
from asyncckpt.plan import WritePlan, span_nbytes
from asyncckpt.planners import planner_for
from asyncckpt.state import TrainingState

LAYOUTS = ["dcp", "megatron"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_thirty_saves_make_one_plan_although_generators_pickle_to_many_lengths(layout: str) -> None:
    model = nn.Linear(8, 8)
    state = TrainingState(model=model, extra={"loss": 0.0, "epoch": 0})
    planner = planner_for(layout)
    lengths = set()
    for step in range(30):
        random.seed(step)
        random.gauss(0, 1)
        np.random.seed(step)  # noqa: NPY002
        torch.manual_seed(step)
        planned = planner.plan(state.capture(step))
        slots = np.split(planned.held[0], np.cumsum(planned.plan.slots)[:-1])
        lengths.add(tuple(int(np.flatnonzero(slot)[-1]) for slot in slots))
        assert planned.replanned == (step == 0)
    assert planner.plans_made == 1
    assert len(lengths) > 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_leaf_that_outgrows_its_slot_is_planned_once_more(tmp_path: Path, layout: str) -> None:
    extra: dict[str, Any] = {"log": [], "after": "intact", "tensor": torch.arange(5)}
    with AsyncCheckpointer(tmp_path, extra=extra, layout=layout) as checkpointer:
        checkpointer.save(1).wait()
        extra["log"] = list(range(5000))
        assert checkpointer.save(2).wait().replanned
        assert checkpointer.plans_made == 2
        extra["log"] = list(range(100))  # shorter again: the larger slot stays
        assert not checkpointer.save(3).wait().replanned
        assert checkpointer.plans_made == 2
        for step, length in ((1, 0), (2, 5000), (3, 100)):
            extra.update(log=None, after=None, tensor=None)
            checkpointer.load(step)
            assert extra["log"] == list(range(length))
            assert extra["after"] == "intact"
            assert torch.equal(extra["tensor"], torch.arange(5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_leaf_that_was_huge_once_leaves_no_room_behind(tmp_path: Path, layout: str) -> None:
    extra: dict[str, Any] = {"log": "a" * (8 << 20), "tensor": torch.arange(5)}
    with AsyncCheckpointer(tmp_path, extra=extra, layout=layout) as checkpointer:
        assert checkpointer.save(1).wait().pickled_nbytes > 8 << 20
        extra["log"] = "small"
        report = checkpointer.save(2).wait()
        assert report.replanned
        assert report.pickled_nbytes < 1 << 20
        assert not checkpointer.save(3).wait().replanned
        extra["log"] = "b" * (1 << 19)  # and shrinks by too little to plan anew
        assert checkpointer.save(4).wait().replanned
        extra["log"] = "c"
        assert not checkpointer.save(5).wait().replanned
        for step, log in ((1, "a" * (8 << 20)), (2, "small"), (4, "b" * (1 << 19)), (5, "c")):
            extra["log"] = None
            checkpointer.load(step)
            assert extra["log"] == log


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_memory_for_pickles_is_said(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra: dict[str, Any] = {"log": "a" * 5000}
    with AsyncCheckpointer(tmp_path, extra=extra, layout=layout, save_rng=False) as checkpointer:
        with monkeypatch.context() as patched:
            patched.setattr(WritePlan, "pickled_nbytes", property(lambda plan: 1 << 50))
            with pytest.raises(
                LeafError, match=r"no memory for the pickles .* the largest is .* with 5\d\d\d"
            ):
                checkpointer.save(1)
        checkpointer.save(2).wait()
        assert checkpointer.load(2).step == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_holds_each_pickle_once(layout: str) -> None:
    state = TrainingState(extra={"log": "a" * 5000, "hidden": Holder(torch.arange(5))})
    planned = planner_for(layout).plan(state.capture(1))
    rest, found = [planned.held], []
    while rest:
        one = rest.pop()
        found.append(one)
        rest += list(one) if isinstance(one, tuple | list) else []
    assert not [one for one in found if isinstance(one, bytes | Pickled)]
    assert [one for one in found if isinstance(one, torch.UntypedStorage)]


class Holder:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "change",
    [
        lambda t: torch.zeros(7, 6),
        lambda t: t.to(torch.bfloat16),
        lambda t: t.t().contiguous().t(),
        lambda t: torch.zeros(3),
    ],
    ids=["grown", "dtype", "strides", "rank"],
)
def test_another_form_is_another_plan(tmp_path: Path, layout: str, change: Any) -> None:
    extra = {"a": torch.randn(6, 6), "b": torch.randn(4)}
    with AsyncCheckpointer(tmp_path, extra=extra, layout=layout) as checkpointer:
        checkpointer.save(1).wait()
        first, extra["a"] = extra["a"], change(extra["a"])
        checkpointer.save(2).wait()
        second, b = extra["a"], extra["b"]
        for step, expected in ((1, first), (2, second)):
            checkpointer.load(step)
            assert extra["a"].dtype == expected.dtype
            assert torch.equal(extra["a"], expected)
            assert torch.equal(extra["b"], b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tie_that_is_cut_is_another_plan(tmp_path: Path, layout: str) -> None:
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    model[1].weight = model[0].weight
    with AsyncCheckpointer(tmp_path, model=model, layout=layout) as checkpointer:
        checkpointer.save(1).wait()
        model[1].weight = nn.Parameter(torch.ones(4, 4))
        assert checkpointer.save(2).wait().replanned
        with torch.no_grad():
            model[1].weight.zero_()
        checkpointer.load(2)
    assert bool((model[1].weight == 1).all())
    assert not torch.equal(model[0].weight, model[1].weight)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_tied_weights_are_stored_once_and_load_in_stock_tools(tmp_path: Path) -> None:
    model = nn.ModuleList([nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False)])
    model[1].weight = model[0].weight
    with AsyncCheckpointer(tmp_path / "a", model=model) as checkpointer:
        report = checkpointer.save(1).wait()
    assert report.nbytes < 1.5 * model[0].weight.nbytes
    step = tmp_path / "a" / "step-1"
    target = {"model": {"0.weight": torch.zeros(256, 256), "1.weight": torch.zeros(256, 256)}}
    torch.distributed.checkpoint.load(target, checkpoint_id=step, no_dist=True)
    for name in ("0.weight", "1.weight"):
        assert torch.equal(target["model"][name], model[0].weight)
    dcp_to_torch_save(step, tmp_path / "all.pt")
    tree = torch.load(tmp_path / "all.pt", weights_only=False)
    assert torch.equal(tree["model"]["1.weight"], model[0].weight)


def test_views_that_overlap_keep_their_own_values(tmp_path: Path) -> None:
    base = torch.arange(20.0)
    extra = {"a": base[2:12], "b": base[8:18], "c": base[::3], "d": base, "e": base.view(4, 5).t()}
    expected = {name: value.clone() for name, value in extra.items()}
    for layout in LAYOUTS:
        with AsyncCheckpointer(tmp_path / layout, extra=extra, layout=layout) as checkpointer:
            checkpointer.save(1).wait()
            extra.update(dict.fromkeys(extra))  # type: ignore[arg-type]
            checkpointer.load(1)
        for name, value in expected.items():
            assert torch.equal(extra[name], value), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lazily_conjugated_and_negated_tensors_keep_their_values(tmp_path: Path, layout: str) -> None:
    """They share address, dtype, shape and strides with what they are views of."""
    z = torch.tensor([1 + 2j, 3 - 4j])
    extra = {"z": z, "conj": z.conj(), "imag": z.imag, "neg": z.conj().imag}
    expected = {name: value.resolve_conj().resolve_neg().clone() for name, value in extra.items()}
    with AsyncCheckpointer(tmp_path, extra=extra, layout=layout) as checkpointer:
        checkpointer.save(1).wait()
        extra.update(dict.fromkeys(extra))  # type: ignore[arg-type]
        checkpointer.load(1)
    for name, value in expected.items():
        assert torch.equal(extra[name], value), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "leaf",
    [lambda: 0, (i for i in range(3)), torch.empty(2, device="meta")],
    ids=["lambda", "generator", "meta"],
)
def test_a_leaf_that_cannot_be_saved_is_named(tmp_path: Path, layout: str, leaf: Any) -> None:
    extra = {"deep": {"leaf": leaf}, "fine": 1}
    with AsyncCheckpointer(tmp_path, extra=extra, layout=layout) as checkpointer:
        with pytest.raises(LeafError, match=r"deep\S*leaf"):
            checkpointer.save(1)
        assert not [path for path in tmp_path.iterdir() if "step" in path.name or "iter" in path.name]
        extra["deep"]["leaf"] = 3  # type: ignore[index]
        checkpointer.save(1).wait()
        assert checkpointer.steps() == [1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_tensor_is_saved_or_refused_by_name(tmp_path: Path, layout: str) -> None:
    extra: dict[str, Any] = {"sparse": torch.eye(3).to_sparse()}
    with AsyncCheckpointer(tmp_path, extra=extra, layout=layout) as checkpointer:
        try:
            checkpointer.save(1).wait()
        except LeafError as error:
            assert "extra.sparse" in str(error)  # noqa: PT017 -- saving it is as good
        else:
            extra["sparse"] = None
            checkpointer.load(1)
            assert torch.equal(extra["sparse"].to_dense(), torch.eye(3))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3),
        torch.arange(6.0).view(2, 3).t(),
        torch.ones(1).expand(5),
        torch.tensor(1.0),
        torch.ones(0, 3),
        torch.arange(9.0)[::2],
        torch.arange(6.0).as_strided((3, 3), (1, 1)),
    ],
)
def test_span_reaches_the_last_element(tensor: torch.Tensor) -> None:
    addresses = torch.arange(tensor.untyped_storage().nbytes() // 4).as_strided(tensor.shape, tensor.stride())
    assert span_nbytes(tensor) == (4 * (int(addresses.max()) + 1) if tensor.numel() else 0)
