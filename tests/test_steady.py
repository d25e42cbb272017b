"""A save that takes what is steady at once writes what a save that asks for every tensor would have written.

Each change is made between two saves of one checkpointer; what it writes is compared, byte for byte, with
what a checkpointer writes that has never seen the state before, and with the state.
"""

from __future__ import annotations

import gc
import itertools
import random
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from asyncckpt import AsyncCheckpointer
from asyncckpt import state as state_room
from asyncckpt.errors import TornStateError
from asyncckpt.plan import Planned, Spans
from asyncckpt.planners import dcp, megatron
from asyncckpt.planners.dcp import DcpPlanner
from asyncckpt.planners.megatron import MegatronPlanner
from asyncckpt.sections import model as model_section
from asyncckpt.sections.walk import Walker
from asyncckpt.tree import StateTree


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.absent: nn.Module | None
        self.register_module("absent", None)
        self.register_parameter("nothing", None)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.linear(x))
        return result


class State:
    """A model with all that modules can have, and its optimizers; it trains a step at a time."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        random.seed(0)  # the length of its pickled state varies, and with it the room that a plan leaves
        self.model = nn.Sequential(Block(), Block(), nn.Linear(8, 8))
        self.model[2].weight = self.model[0].linear.weight  # tied
        self.optimizers: dict[str, Any] = {
            "adam": torch.optim.AdamW(list(self.model.parameters())[:4], lr=1e-3),
            "sgd": torch.optim.SGD(list(self.model.parameters())[4:], lr=1e-3, momentum=0.9),
        }
        self.extra = {"values": [1, 2], "tensor": torch.arange(4.0)}
        self.train()

    def train(self) -> None:
        self.model(torch.randn(4, 8)).square().sum().backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()

    def checkpointer(
        self, root: Path, layout: str = "dcp", *, with_optimizers: bool = True
    ) -> AsyncCheckpointer:
        optimizer = self.optimizers if with_optimizers else None
        return AsyncCheckpointer(root, model=self.model, optimizer=optimizer, extra=self.extra, layout=layout)


@pytest.fixture(params=["dcp", "megatron"])
def layout(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each save that tried the last plan again, whether it served."""
    served: list[bool] = []
    for kind in (DcpPlanner, MegatronPlanner):
        original: Any = kind.plan_again

        def noted(planner: Any, tree: StateTree, original: Any = original) -> Planned | None:
            planned: Planned | None = original(planner, tree)
            served.append(planned is not None)
            return planned

        monkeypatch.setattr(kind, "plan_again", noted)
    return served


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.suffix != ".json"  # ours, of this attempt
    }


STEPS = itertools.count(1)


STEP_NAMES = {"dcp": "step-{}", "megatron": "iter_{:07d}"}
FILES = {"dcp": {".metadata", "__0_0.distcp"}, "megatron": {"mp_rank_00/model_optim_rng.pt"}}


def compare(
    state: State, checkpointer: AsyncCheckpointer, root: Path, fresh: Path, layout: str, **options: bool
) -> None:
    """What `checkpointer` writes now, and what one writes that knows nothing."""
    step = next(STEPS)
    checkpointer.save(step).wait()
    with state.checkpointer(fresh, layout, **options) as other:
        other.save(step).wait()
    name = STEP_NAMES[layout].format(step)
    ours, theirs = contents(root / name), contents(fresh / name)
    assert ours.keys() == theirs.keys() >= FILES[layout]
    if layout == "megatron":
        path = root / name / "mp_rank_00/model_optim_rng.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that storages are typed
            stored = torch.load(path, weights_only=False)["model"]
        for key, value in state.model.state_dict().items():
            assert (
                torch.equal(stored[key], value) if isinstance(value, torch.Tensor) else stored[key] == value
            )
    assert [name for name in ours if ours[name] != theirs[name]] == []


# ---------------------------------------------------------------------------- changes


def nothing(state: State) -> None:
    pass


def trained(state: State) -> None:
    state.train()


def parameter_moved(state: State) -> None:
    state.model[1].linear.weight.data = state.model[1].linear.weight.data.clone()


def parameter_of_another_dtype(state: State) -> None:
    state.model[1].linear.weight.data = state.model[1].linear.weight.data.half()


def parameter_of_another_shape(state: State) -> None:
    state.model[1].linear.bias.data = state.model[1].linear.bias.data[:4].clone()


def parameter_reshaped_where_it_is(state: State) -> None:
    state.model[1].linear.weight.data = state.model[1].linear.weight.data.view(4, 16)


def parameter_transposed_where_it_is(state: State) -> None:
    state.model[1].linear.weight.data = state.model[1].linear.weight.data.t()


def parameter_replaced(state: State) -> None:
    state.model[1].linear.bias = nn.Parameter(torch.full((8,), 3.0))


def untied(state: State) -> None:
    state.model[2].weight = nn.Parameter(state.model[2].weight.detach().clone())


def tied_by_memory_alone(state: State) -> None:
    second = nn.Parameter(torch.empty(0))
    second.data = state.model[2].weight.data
    state.model[2].weight = second


def tied_anew(state: State) -> None:
    state.model[1].linear.weight.data = state.model[0].linear.weight.data


def module_added(state: State) -> None:
    state.model.append(nn.Linear(8, 2))


def module_renamed(state: State) -> None:
    state.model[1].other = state.model[1].linear
    del state.model[1].linear


def modules_swapped(state: State) -> None:
    state.model[0], state.model[1] = state.model[1], state.model[0]


def module_in_an_empty_place(state: State) -> None:
    state.model[1].absent = nn.Linear(2, 2)


def parameter_in_an_empty_place(state: State) -> None:
    state.model[1].nothing = nn.Parameter(torch.ones(2))


def buffer_added(state: State) -> None:
    state.model[0].register_buffer("seen", torch.ones(2))


def buffer_saved_from_now_on(state: State) -> None:
    state.model[0]._non_persistent_buffers_set.clear()


def buffer_over_a_parameter(state: State) -> None:
    state.model[0].register_buffer("alias", state.model[1].linear.weight.data)


def hook_added(state: State) -> None:
    def hook(module: nn.Module, found: dict[str, Any], prefix: str, metadata: Any) -> None:
        found[f"{prefix}linear.weight"] = found[f"{prefix}linear.weight"] * 2

    state.model[1]._register_state_dict_hook(hook)


def state_dict_replaced(state: State) -> None:
    original = state.model.state_dict

    def doubled(self: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: 2 * value for name, value in original(*args, **kwargs).items()}

    state.model.state_dict = types.MethodType(doubled, state.model)  # type: ignore[method-assign]


def extra_state(state: State) -> None:
    class Counting(nn.Module):
        def get_extra_state(self) -> Any:
            return {"count": 5}

    state.model.append(Counting())


def moments_moved(state: State) -> None:
    for values in state.optimizers["adam"].state.values():
        values["exp_avg"] = values["exp_avg"].clone()


def moments_of_another_dtype(state: State) -> None:
    for values in state.optimizers["adam"].state.values():
        values["exp_avg"] = values["exp_avg"].double()


def moment_that_is_python(state: State) -> None:
    for number, values in enumerate(state.optimizers["adam"].state.values()):
        values["step"] = number


def moment_that_is_none(state: State) -> None:
    for values in state.optimizers["adam"].state.values():
        values["step"] = None


def moments_in_another_order(state: State) -> None:
    for values in state.optimizers["adam"].state.values():
        values["step"] = values.pop("step")


def moments_in_a_dictionary_of_its_own_kind(state: State) -> None:
    saved = state.optimizers["adam"].state
    for param, values in saved.items():
        saved[param] = OrderedDict(values)


def moment_that_is_negated(state: State) -> None:
    for values in state.optimizers["adam"].state.values():
        values["step"] = torch.tensor(complex(1, 3)).conj().imag


def moment_that_is_negated_where_it_is(state: State) -> None:
    for values in state.optimizers["adam"].state.values():
        values["exp_avg"] = torch._neg_view(values["exp_avg"])  # type: ignore[attr-defined]


def moment_whose_data_is_negated(state: State) -> None:
    for values in state.optimizers["adam"].state.values():
        values["exp_avg"].data = torch._neg_view(values["exp_avg"].clone())  # type: ignore[attr-defined]


def moment_that_wants_a_gradient(state: State) -> None:
    for values in state.optimizers["adam"].state.values():
        values["exp_avg"].requires_grad_(True)


def moments_gone(state: State) -> None:
    state.optimizers["adam"].state.clear()


def one_moment_gone(state: State) -> None:
    next(iter(state.optimizers["adam"].state.values())).clear()


def keys_that_are_numbers(state: State) -> None:
    next(iter(state.optimizers["adam"].state.values()))[5] = 6


def group_added(state: State) -> None:
    state.optimizers["adam"].add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": 5.0})


def rate_changed(state: State) -> None:
    state.optimizers["adam"].param_groups[0]["lr"] = 0.25


def rate_that_is_a_tensor(state: State) -> None:
    state.optimizers["adam"].param_groups[0]["lr"] = torch.tensor(0.25)


def steps_another_order(state: State) -> None:
    state.optimizers["adam"].param_groups[0]["params"].reverse()


def extra_changed(state: State) -> None:
    state.extra["tensor"] = torch.arange(5.0)
    state.extra["more"] = "python"


RENAMING = {parameter_replaced, module_renamed, modules_swapped}  # optimizers keep to the names of before
SERVED = {
    nothing, trained, parameter_moved, parameter_replaced, tied_by_memory_alone, moments_moved, rate_changed,
}  # fmt: skip
CHANGES = [
    *SERVED, parameter_of_another_dtype, parameter_of_another_shape, parameter_reshaped_where_it_is,
    parameter_transposed_where_it_is, untied, tied_anew, module_added, module_renamed, modules_swapped,
    module_in_an_empty_place, parameter_in_an_empty_place, buffer_added, buffer_saved_from_now_on,
    buffer_over_a_parameter, hook_added, state_dict_replaced, extra_state, moments_of_another_dtype,
    moment_that_is_python, moment_that_is_none, moments_in_another_order,
    moments_in_a_dictionary_of_its_own_kind, moment_that_is_negated, moments_gone, one_moment_gone,
    moment_that_is_negated_where_it_is, moment_whose_data_is_negated, moment_that_wants_a_gradient,
    keys_that_are_numbers,
    group_added, rate_that_is_a_tensor, steps_another_order, extra_changed,
]  # fmt: skip


def test_a_tensor_and_a_number_change_places(tmp_path: Path, layout: str, again: list[bool]) -> None:
    """The same keys, and as many tensors of the same forms: under other names."""
    state = State()
    root, fresh = tmp_path / "ours", tmp_path / "fresh"
    with state.checkpointer(root, layout) as checkpointer:
        for values in state.optimizers["adam"].state.values():
            values["exp_avg_sq"] = 7
        for _ in range(3):
            compare(state, checkpointer, root, fresh, layout)
        for values in state.optimizers["adam"].state.values():
            values["exp_avg"], values["exp_avg_sq"] = values["exp_avg_sq"], values["exp_avg"]
        for _ in range(3):
            compare(state, checkpointer, root, fresh, layout)
        assert again == [True, True, True, True]  # not asked where they changed places


@pytest.mark.parametrize("other", [2.5, None, "text", [1, 2], nn.Parameter(torch.ones(2))], ids=type)
def test_a_number_becomes_something_else(tmp_path: Path, layout: str, other: Any) -> None:
    state = State()
    root, fresh = tmp_path / "ours", tmp_path / "fresh"
    with state.checkpointer(root, layout) as checkpointer:
        for value in (7, other, 7, other):
            for values in state.optimizers["adam"].state.values():
                values["exp_avg_sq"] = value
            for _ in range(2):
                compare(state, checkpointer, root, fresh, layout)


@pytest.mark.parametrize("change", sorted(CHANGES, key=lambda one: one.__name__))
def test_a_change_between_two_saves(
    tmp_path: Path, layout: str, change: Callable[[State], None], again: list[bool]
) -> None:
    state = State()
    root, fresh = tmp_path / "ours", tmp_path / "fresh"
    options = {"with_optimizers": change not in RENAMING}
    with state.checkpointer(root, layout, **options) as checkpointer:
        for _ in range(3):
            compare(state, checkpointer, root, fresh, layout, **options)
        assert again == [True, True]
        change(state)
        compare(state, checkpointer, root, fresh, layout, **options)
        assert (again == [True, True, True]) == (change in SERVED)
        for _ in range(2):
            compare(state, checkpointer, root, fresh, layout, **options)


def test_a_pickle_that_outgrows_its_slot(tmp_path: Path, layout: str, again: list[bool]) -> None:
    state = State()
    with state.checkpointer(tmp_path, layout) as checkpointer:
        for step, length in enumerate((1, 1, 5000, 5000), 1):
            state.extra["values"] = list(range(length))
            checkpointer.save(step).wait()
            state.train()
        assert again == [True, False, True]
    loaded = State()
    with loaded.checkpointer(tmp_path, layout) as checkpointer:
        checkpointer.load(4)
    assert loaded.extra["values"] == list(range(5000))


def test_nothing_is_held_between_saves(tmp_path: Path, layout: str) -> None:
    """Who offloads needs the memory."""
    state = State()
    with state.checkpointer(tmp_path, layout) as checkpointer:
        for step in range(1, 4):
            checkpointer.save(step).wait()
            checkpointer.fence()
        moments = [values["exp_avg"] for values in state.optimizers["adam"].state.values()]
        gone = [weakref.ref(moment) for moment in moments]
        for values in state.optimizers["adam"].state.values():
            values["exp_avg"] = torch.zeros(1)
        del moments
        gc.collect()
        assert [one() for one in gone] == [None] * len(gone)


def test_what_is_written_to_before_it_was_copied_is_named(
    tmp_path: Path, layout: str, again: list[bool]
) -> None:
    state = State()
    with state.checkpointer(tmp_path, layout) as checkpointer:
        checkpointer.save(1).wait()
        for name, tensor in (
            ("model.1.linear.weight", state.model[1].linear.weight),
            ("optimizer.adam.state.0.linear.weight.exp_avg", moment_of(state)),
        ):
            handle = checkpointer.save(checkpointer.steps()[-1] + 1)
            with torch.no_grad():
                tensor.add_(1)
            with pytest.raises(TornStateError, match=name.replace(".", r"\.")):
                handle.wait()
        assert again == [True, True]


def moment_of(state: State) -> torch.Tensor:
    moment: torch.Tensor = state.optimizers["adam"].state[state.model[0].linear.weight]["exp_avg"]
    return moment


def test_a_group_that_is_gone_is_held_by_nobody(tmp_path: Path, layout: str) -> None:
    state = State()
    adam = state.optimizers["adam"]
    with state.checkpointer(tmp_path, layout) as checkpointer:
        added = nn.Parameter(torch.zeros(3))
        adam.add_param_group({"params": [added]})
        for step in (1, 2):
            checkpointer.save(step).wait()
        checkpointer.fence()
        gone = weakref.ref(added)
        adam.param_groups.pop()
        del added
        gc.collect()
        assert gone() is None
        checkpointer.save(3).wait()


def interrupted(owner: Any, name: str) -> None:
    """Its next call is interrupted, as by a signal."""

    def interrupt(*_: Any, **__: Any) -> Any:
        patch.undo()
        raise KeyboardInterrupt

    patch = pytest.MonkeyPatch()
    patch.setattr(owner, name, interrupt)


@pytest.mark.parametrize("place", ["_remember", "of", "planned_with", "_keep"])
def test_a_plan_that_was_not_finished_is_not_served(tmp_path: Path, layout: str, place: str) -> None:
    state = State()
    root, fresh = tmp_path / "ours", tmp_path / "fresh"
    module = {"dcp": dcp, "megatron": megatron}[layout]
    planner = {"dcp": DcpPlanner, "megatron": MegatronPlanner}[layout]
    with state.checkpointer(root, layout) as checkpointer:
        for _ in range(2):
            compare(state, checkpointer, root, fresh, layout)
        state.extra["tensor"] = torch.arange(1 << 12)
        owner: Any = planner if place.startswith("_") else Spans if place == "of" else module
        interrupted(owner, place)
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save(next(STEPS))
        state.extra["tensor"] = torch.arange(4.0)
        for _ in range(2):
            compare(state, checkpointer, root, fresh, layout)


@pytest.mark.parametrize("owner", [model_section, state_room], ids=["model", "state"])
def test_names_that_were_not_finished_are_not_used(tmp_path: Path, layout: str, owner: Any) -> None:
    state = State()
    root, fresh = tmp_path / "ours", tmp_path / "fresh"
    with state.checkpointer(root, layout, with_optimizers=False) as checkpointer:
        for _ in range(2):
            compare(state, checkpointer, root, fresh, layout, with_optimizers=False)
        module_renamed(state)
        interrupted(owner, "Names" if owner is model_section else "Structure")
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save(next(STEPS))
        for _ in range(2):
            compare(state, checkpointer, root, fresh, layout, with_optimizers=False)


def test_leaves_are_pickled_once_for_a_plan(tmp_path: Path, layout: str) -> None:
    state = State()
    counted = Counted()
    state.extra["counted"] = counted
    with state.checkpointer(tmp_path, layout) as checkpointer:
        checkpointer.save(1).wait()
        assert counted.times == 1
        checkpointer.save(2).wait()
        assert counted.times == 2


class Counted:
    times = 0

    def __reduce__(self) -> Any:
        self.times += 1
        return int, (5,)


# ---------------------------------------------------------------------------- the walk


def modules() -> Iterator[nn.Module]:
    yield nn.Linear(2, 3)
    yield nn.TransformerDecoderLayer(8, 2, 16)
    yield State().model
    shared = nn.Linear(2, 2)
    yield nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.LSTM(2, 2))})
    yield nn.ParameterDict({"x": torch.zeros(2), "y": torch.zeros(3)})
    yield nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))


@pytest.mark.parametrize("module", list(modules()), ids=lambda module: type(module).__name__)
def test_a_walk_finds_what_state_dict_holds(module: nn.Module) -> None:
    walker = Walker(module)
    walk, names = walker.walk(), walker.names()
    assert walk is not None
    found = dict(zip(names.parameters, walk.parameters, strict=True))
    found |= {k: v for k, v in zip(names.buffers, walk.buffers, strict=True) if k is not None}
    expected = module.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].data_ptr() == value.data_ptr() for name, value in expected.items())
    again = walker.walk()
    assert again is not None
    assert again.shape == walk.shape


def test_modules_that_say_themselves_what_their_state_is_are_left_to_it() -> None:
    class Own(nn.Linear):
        def _save_to_state_dict(self, *args: Any) -> None:
            pass

    contains_itself = nn.Module()
    contains_itself.inner = contains_itself
    no_module = nn.Linear(2, 2)
    del no_module.__dict__["_buffers"]
    patched = type("Patched", (nn.Linear,), {})
    walker = Walker(nn.Sequential(patched(2, 2)))
    assert walker.walk() is not None
    patched._save_to_state_dict = Own._save_to_state_dict
    assert walker.walk() is None
    hooked = nn.Linear(2, 2)
    hooked.register_state_dict_pre_hook(lambda *_: None)
    for module in (Own(2, 2), nn.Sequential(nn.Linear(2, 2), Own(2, 2)), contains_itself, no_module, hooked):
        assert Walker(module).walk() is None


def test_parameters_and_moments_may_be_swapped_between_saves(tmp_path: Path) -> None:
    """Torch refuses that for tensors to which there are weak references."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with AsyncCheckpointer(tmp_path, model=model, optimizer=optimizer) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step).wait()
        for parameter, values in optimizer.state.items():
            torch.utils.swap_tensors(parameter, nn.Parameter(torch.full_like(parameter, 7.0)))
            torch.utils.swap_tensors(values["exp_avg"], torch.full_like(values["exp_avg"], 8.0))
        checkpointer.save(3).wait()
        with torch.no_grad():
            model[0].weight.zero_()
        checkpointer.load(3)
    assert (model[0].weight == 7).all()
    assert all((values["exp_avg"] == 8).all() for values in optimizer.state.values())
