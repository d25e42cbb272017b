"""States off the beaten path: ties that differ, loose parameters, odd optimizers, odd containers."""

from __future__ import annotations

import pickle
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from asyncckpt import AsyncCheckpointer, _native
from asyncckpt.errors import CorruptStepError, LeafError, MismatchError, UntrustedError

LAYOUTS = ["dcp", "megatron"]
SMALL = 1 << 16  # of host memory: blocks of 4 KiB, so that a tensor has many


@pytest.fixture(autouse=True)
def no_faults_left() -> Iterator[None]:
    yield
    _native.faults.disarm()


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def values_of(tensor: torch.Tensor) -> list[float]:
    return sorted(set(tensor.flatten().tolist()))


def save(root: Path, layout: str, step: int = 1, **parts: Any) -> None:
    with AsyncCheckpointer(root, layout=layout, host_memory=SMALL, save_rng=False, **parts) as checkpointer:
        checkpointer.save(step).wait()


def load(root: Path, layout: str, *, trusted: bool = False, **parts: Any) -> None:
    with AsyncCheckpointer(root, layout=layout, save_rng=False, read_only=True, **parts) as checkpointer:
        assert checkpointer.load_latest(trusted=trusted) is not None


def round_trip(root: Path, layout: str, value: Any, *, trusted: bool = False) -> Any:
    """What comes back for `value` in extra."""
    save(root, layout, extra={"value": value})
    extra: dict[str, Any] = {"value": None}
    load(root, layout, trusted=trusted, extra=extra)
    return extra["value"]


# ---------------------------------------------------------------------------- ties


class Pair(nn.Module):
    """Two weights, or two names of one."""

    def __init__(self, first: float, second: float, *, tied: bool) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((2500, 1000), float(first)))
        self.b = self.a if tied else nn.Parameter(torch.full((2500, 1000), float(second)))


def test_two_weights_into_one_the_last_wins(tmp_path: Path, layout: str) -> None:
    pair = Pair(1, 2, tied=False)
    with AsyncCheckpointer(tmp_path, model=pair, layout=layout, save_rng=False) as checkpointer:
        checkpointer.save(1)  # a few large blocks, which several threads read at a time
    for _ in range(3):
        model = Pair(0, 0, tied=True)
        load(tmp_path, layout, model=model)
        assert values_of(model.a) == [2]
        assert model.a is model.b
    stock = Pair(0, 0, tied=True)
    stock.load_state_dict(Pair(1, 2, tied=False).state_dict())
    assert torch.equal(model.a, stock.a)


def test_one_weight_into_two(tmp_path: Path, layout: str) -> None:
    save(tmp_path, layout, model=Pair(3, 3, tied=True))
    model = Pair(0, 0, tied=False)
    load(tmp_path, layout, model=model)
    assert values_of(model.a) == values_of(model.b) == [3]
    assert model.a.data_ptr() != model.b.data_ptr()


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_ties_that_differ_on_both_sides(tmp_path: Path, layout: str, order: str) -> None:
    """a and b are one in the checkpoint, a and c in the live model; whoever comes last wins."""

    def make(stored_tie: str, values: dict[str, float]) -> nn.ParameterDict:
        model = nn.ParameterDict()
        for name in order:
            model[name] = nn.Parameter(torch.full((5000,), values[name]))
        model[stored_tie[1]] = model[stored_tie[0]]
        return model

    saved = make("ab", {"a": 1.0, "b": 1.0, "c": 2.0})
    save(tmp_path, layout, model=saved)
    model, stock = (make("ac", dict.fromkeys("abc", 0.0)) for _ in range(2))
    load(tmp_path, layout, model=model)
    stock.load_state_dict(saved.state_dict())
    for name in "abc":
        assert torch.equal(model[name], stock[name]), name


def test_memory_that_two_names_share_in_part(tmp_path: Path, layout: str) -> None:
    """`window` is a view of `flat` in the live model, and has a value of its own in the checkpoint."""

    class Flat(nn.Module):
        def __init__(self, flat: float, window: float, *, shared: bool) -> None:
            super().__init__()
            self.flat = nn.Parameter(torch.full((200_000,), float(flat)))
            view = self.flat.detach()[50_000:150_000]
            self.register_buffer("window", view if shared else torch.full((100_000,), float(window)))

    save(tmp_path, layout, model=Flat(1, 2, shared=False))
    for _ in range(5):
        model = Flat(0, 0, shared=True)
        load(tmp_path, layout, model=model)
        assert values_of(model.flat[:50_000]) == [1]
        assert values_of(model.flat[50_000:150_000]) == [2]
        assert values_of(model.flat[150_000:]) == [1]


# ---------------------------------------------------------------------------- extra


def test_a_loose_parameter_is_loaded_in_place(tmp_path: Path, layout: str) -> None:
    def make(value: float) -> tuple[nn.Parameter, torch.optim.Optimizer, dict[str, Any]]:
        log_alpha = nn.Parameter(torch.full((3,), float(value)))
        return log_alpha, torch.optim.Adam([log_alpha], lr=0.1), {"log_alpha": log_alpha, "note": "", "n": 0}

    log_alpha, optimizer, extra = make(5)
    log_alpha.grad = torch.ones(3)
    optimizer.step()
    extra.update(note="seen", n=[1, 2])
    save(tmp_path, layout, optimizer=optimizer, extra=extra)
    again, its_optimizer, its_extra = make(0)
    load(tmp_path, layout, optimizer=its_optimizer, extra=its_extra)
    assert its_extra["log_alpha"] is again
    assert its_optimizer.param_groups[0]["params"][0] is again
    assert again.requires_grad
    assert torch.equal(again, log_alpha)
    assert (its_extra["note"], its_extra["n"]) == ("seen", [1, 2])
    for param, its in ((log_alpha, optimizer), (again, its_optimizer)):
        param.grad = torch.ones(3)
        its.step()
    assert torch.equal(again, log_alpha)


def test_a_tensor_in_extra_is_loaded_in_place(tmp_path: Path, layout: str) -> None:
    save(tmp_path, layout, extra={"ema": torch.ones(1000)})
    ema = torch.zeros(1000)
    view, extra = ema[10:20], {"ema": ema}
    load(tmp_path, layout, extra=extra)
    assert extra["ema"] is ema
    assert bool((view == 1).all())


def test_a_value_that_changed_its_kind_is_replaced(tmp_path: Path, layout: str) -> None:
    save(tmp_path, layout, extra={"best": 0.5, "history": [1, 2], "when": "noon"})
    extra: dict[str, Any] = {"best": None, "history": (), "when": 12}
    load(tmp_path, layout, extra=extra)
    assert extra == {"best": 0.5, "history": [1, 2], "when": "noon"}


# ---------------------------------------------------------------------------- optimizers


def trained(optimizer: torch.optim.Optimizer, model: nn.Linear, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, model.in_features)).square().sum().backward()
        optimizer.step()


class Global(torch.optim.SGD):
    """Keeps something that belongs to no parameter."""

    key: Any = "global"

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state[self.key] = {"count": 1}
        super().step(closure)


class Bare(torch.optim.SGD):
    """Keeps a tensor where a mapping is usual."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for param in self.param_groups[0]["params"]:
            self.state[param] = torch.zeros_like(param)


@pytest.mark.parametrize(("kind", "named"), [(Global, "global"), (Bare, "weight")])
def test_optimizer_state_that_would_be_lost_is_refused_by_name(
    tmp_path: Path, layout: str, kind: Callable[..., torch.optim.Optimizer], named: str
) -> None:
    model = nn.Linear(8, 8)
    optimizer = kind(model.parameters(), lr=0.1)
    trained(optimizer, model)
    with AsyncCheckpointer(tmp_path, model=model, optimizer=optimizer, layout=layout) as checkpointer:
        with pytest.raises(LeafError, match=named) as caught:
            checkpointer.save(1)
        assert kind.__name__ in str(caught.value)
        assert not list(tmp_path.glob(".asyncckpt-tmp-*"))
        optimizer.state.clear()
        checkpointer.save(1).wait()


class LowRank(torch.optim.Optimizer):
    """Moments in a subspace, as optimizers that project gradients have them; and a list that grows."""

    def __init__(self, params: Any, rank: int = 2) -> None:
        super().__init__(params, {"lr": 0.1, "rank": rank})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros(group["rank"], *param.shape[1:]))
                    state["history"] = torch.zeros(0)
                state["step"] += 1
                state["exp_avg"].add_(param.grad[: group["rank"]])
                state["history"] = torch.cat([state["history"], torch.ones(1)])
                param.sub_(state["exp_avg"].mean())


@pytest.mark.parametrize("steps_before_load", [0, 1, 5])
def test_state_in_a_subspace_comes_back(tmp_path: Path, layout: str, steps_before_load: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = LowRank(model.parameters())
    trained(optimizer, model)
    save(tmp_path, layout, model=model, optimizer=optimizer)
    again = nn.Linear(8, 8)
    its_optimizer = LowRank(again.parameters())
    trained(its_optimizer, again, steps_before_load)
    load(tmp_path, layout, model=again, optimizer=its_optimizer)
    trained(optimizer, model)
    trained(its_optimizer, again)
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for key, value in optimizer.state[theirs].items():
            found = its_optimizer.state[mine][key]
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, key


@pytest.mark.parametrize("steps_before_load", [0, 1])
def test_torch_optimizers_do_not_take_state_of_another_shape(
    tmp_path: Path, layout: str, steps_before_load: int
) -> None:
    def make(width: int) -> tuple[nn.Linear, torch.optim.Optimizer]:
        model = nn.Linear(width, width)
        return model, torch.optim.Adam(model.parameters())

    model, optimizer = make(4)
    trained(optimizer, model)
    save(tmp_path, layout, optimizer=optimizer)
    model, optimizer = make(8)
    trained(optimizer, model, steps_before_load)
    with pytest.raises(MismatchError, match="exp_avg"):
        load(tmp_path, layout, optimizer=optimizer)


# ---------------------------------------------------------------------------- hooks


class Derived(nn.Module):
    """Keeps something that is computed from its weight, and freshens it after a load."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), float(value)))
        self.twice = self.weight.detach() * 2
        self.refreshed = 0
        self.register_load_state_dict_post_hook(Derived._refresh)  # type: ignore[no-untyped-call]

    @staticmethod
    def _refresh(module: nn.Module, _: Any) -> None:
        assert isinstance(module, Derived)
        module.twice = module.weight.detach() * 2
        module.refreshed += 1


def test_modules_hear_once_that_they_were_loaded(tmp_path: Path, layout: str) -> None:
    save(tmp_path, layout, model=nn.Sequential(Derived(1), nn.Sequential(Derived(2))))
    model = nn.Sequential(Derived(0), nn.Sequential(Derived(0)))
    roots: list[nn.Module] = []
    note = cast("Any", model.register_load_state_dict_post_hook)
    note(lambda module, _: roots.append(module))
    load(tmp_path, layout, model=model)
    derived = [module for module in model.modules() if isinstance(module, Derived)]
    assert [module.refreshed for module in derived] == [1, 1]
    assert [module.twice.tolist() for module in derived] == [[2.0] * 3, [4.0] * 3]
    assert roots == [model]
    load(tmp_path, layout, model=model)
    assert [module.refreshed for module in derived] == [2, 2]


def test_modules_hear_nothing_of_a_load_that_was_refused(tmp_path: Path, layout: str) -> None:
    save(tmp_path, layout, model=Derived(1), extra={"x": 1})
    model = Derived(0)
    with pytest.raises(MismatchError):
        load(tmp_path, layout, model=model, extra={"x": 1, "y": 2})
    assert model.refreshed == 0


def test_hooks_beside_extra_state_run_once(tmp_path: Path, layout: str) -> None:
    """Extra state goes through load_state_dict(), which runs the hooks itself."""

    class Stateful(Derived):
        extra = 0

        def get_extra_state(self) -> dict[str, int]:
            return {"extra": self.extra}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.extra = state["extra"]

    saved = Stateful(1)
    saved.extra = 7
    save(tmp_path, layout, model=saved)
    model = Stateful(0)
    load(tmp_path, layout, model=model)
    assert model.extra == 7
    assert model.refreshed == 1
    assert model.twice.tolist() == [2.0] * 3


def test_optimizers_hear_that_they_were_loaded(tmp_path: Path, layout: str) -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.25)
    trained(optimizer, model)
    save(tmp_path, layout, model=model, optimizer=optimizer)
    again = nn.Linear(4, 4)
    its_optimizer = torch.optim.Adam(again.parameters(), lr=0.5)
    heard: list[tuple[float, bool]] = []
    its_optimizer.register_load_state_dict_post_hook(
        lambda it: heard.append((it.param_groups[0]["lr"], again.weight in it.state))
    )
    load(tmp_path, layout, model=again, optimizer=its_optimizer)
    assert heard == [(0.25, True)]


# ---------------------------------------------------------------------------- containers


@pytest.mark.parametrize(
    "value",
    [
        defaultdict(int, a=1),
        defaultdict(list, {"a": [1], 2: ["x"]}),
        defaultdict(None, a=1),
        defaultdict(int),
        Counter("mississippi"),
        Counter(),
        {"deep": [defaultdict(int, a=1), (Counter(a=2),)]},
    ],
    ids=str,
)
def test_mappings_come_back_as_what_they_were(tmp_path: Path, layout: str, value: Any) -> None:
    found = round_trip(tmp_path, layout, value)
    assert type(found) is type(value)
    assert found == value
    assert list(found) == list(value)
    if isinstance(value, defaultdict):
        assert found.default_factory is value.default_factory
    if "deep" in value:
        assert type(found["deep"][0]) is defaultdict
        assert type(found["deep"][1][0]) is Counter


@pytest.mark.parametrize("make", [lambda: defaultdict(int), Counter], ids=["defaultdict", "Counter"])
def test_mappings_of_tensors_come_back_as_what_they_were(
    tmp_path: Path, layout: str, make: Callable[[], Any]
) -> None:
    value = make()
    value["a"] = torch.arange(5)
    found = round_trip(tmp_path, layout, value)
    assert type(found) is type(value)
    assert torch.equal(found["a"], value["a"])


class Range(tuple[int, ...]):
    """A tuple with a constructor of its own."""

    def __new__(cls, low: Any, high: Any) -> Range:
        return super().__new__(cls, (low, high))

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)


class Plain(tuple[Any, ...]):
    """A tuple under another name."""


class Window(NamedTuple):
    low: Any
    high: Any


@pytest.mark.parametrize("value", [Range(1, 2), Plain((1, "x")), Window(1, 2)], ids=repr)
def test_tuples_of_other_classes_survive(tmp_path: Path, layout: str, value: Any) -> None:
    found = round_trip(tmp_path, layout, value, trusted=True)
    assert type(found) is type(value)
    assert found == value


@pytest.mark.parametrize(
    "kind", [Range, Window, lambda *items: Plain(items)], ids=["range", "window", "plain"]
)
def test_tuples_of_other_classes_survive_with_tensors(
    tmp_path: Path, layout: str, kind: Callable[..., Any]
) -> None:
    value = kind(torch.arange(3), torch.arange(2000))
    found = round_trip(tmp_path, layout, value, trusted=True)
    assert type(found) is type(value)
    assert all(torch.equal(a, b) for a, b in zip(found, value, strict=True))


def _dict_in_itself() -> Any:
    value: dict[str, Any] = {"a": 1}
    value["me"] = value
    return value


def _list_in_itself() -> Any:
    value: list[Any] = [1]
    value.append(value)
    return value


def _through_a_tuple() -> Any:
    value: list[Any] = [1]
    value.append((2, value))
    return value


def _with_a_tensor() -> Any:
    value: dict[str, Any] = {"t": torch.arange(3)}
    value["items"] = [value, torch.arange(4)]
    return value


def _not_by_strings() -> Any:
    value: dict[Any, Any] = {1: torch.arange(3)}
    value[2] = value
    return value


@pytest.mark.parametrize(
    "make", [_dict_in_itself, _list_in_itself, _through_a_tuple, _with_a_tensor, _not_by_strings]
)
def test_what_contains_itself_is_saved_or_refused(
    tmp_path: Path, layout: str, make: Callable[[], Any]
) -> None:
    extra: dict[str, Any] = {"value": make()}
    with AsyncCheckpointer(tmp_path, extra=extra, layout=layout, save_rng=False) as checkpointer:
        try:
            checkpointer.save(1).wait()
        except LeafError:
            extra["value"] = "simple"
            checkpointer.save(1).wait()
        before = extra["value"]
        checkpointer.load(1)
        assert type(extra["value"]) is type(before)
        if not isinstance(before, str):
            assert len(extra["value"]) == len(before)


def test_what_is_too_deep_is_refused(tmp_path: Path, layout: str) -> None:
    value: Any = {}
    for depth in range(5000):
        value = {"x": value} if depth % 2 else [value]
    with (
        AsyncCheckpointer(tmp_path, extra={"value": value}, layout=layout) as checkpointer,
        pytest.raises(LeafError),
    ):
        checkpointer.save(1)


# ---------------------------------------------------------------------------- trust


@dataclass
class Config:
    """A class that no loader imports unasked."""

    width: int


def test_what_will_need_trust_is_told_once_when_it_is_saved(
    tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"config": Config(3), "note": "x"}
    with AsyncCheckpointer(tmp_path, layout=layout, extra=extra, keep_last=1) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step).wait()
        told = [record.getMessage() for record in caplog.records if "trusted" in record.getMessage()]
        assert len(told) == 1
        assert "config" in told[0]
        assert "Config" in told[0]
        with pytest.raises(UntrustedError):
            checkpointer.load_latest()
        assert checkpointer.load_latest(trusted=True)
    assert extra["config"] == Config(3)


def test_what_needs_no_trust_is_not_warned_about(
    tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    trained(optimizer, model)
    with AsyncCheckpointer(
        tmp_path, model=model, optimizer=optimizer, layout=layout, extra={"c": Counter("abc")}
    ) as checkpointer:
        checkpointer.save(1).wait()
    assert "trusted" not in caplog.text


# ---------------------------------------------------------------------------- foreign chunks


def forge_chunks(root: Path, size: tuple[int, ...], *chunks: tuple[tuple[int, ...], torch.Tensor]) -> None:
    """A DCP step of another tool: model.w of `size`, in chunks given as (offsets, values)."""
    directory = root / "step-10"
    dcp.save(  # type: ignore[attr-defined]
        {f"part.{index}": values for index, (_, values) in enumerate(chunks)},
        checkpoint_id=directory,
        no_dist=True,
    )
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    infos = {index.fqn: info for index, info in metadata.storage_data.items()}
    properties = metadata.state_dict_metadata["part.0"].properties
    metadata.state_dict_metadata = {
        "model.w": TensorStorageMetadata(
            properties,
            torch.Size(size),
            [ChunkStorageMetadata(torch.Size(offsets), values.shape) for offsets, values in chunks],
        )
    }
    metadata.planner_data = {"model.w": ("model", "w")}
    metadata.storage_data = {
        MetadataIndex("model.w", torch.Size(offsets), index): infos[f"part.{index}"]
        for index, (offsets, _) in enumerate(chunks)
    }
    path.write_bytes(pickle.dumps(metadata))


class Holder(nn.Module):
    def __init__(self, size: tuple[int, ...]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full(size, -1.0))


TILINGS = [
    ((8,), [(0,), (4,)], (4,)),
    ((8,), [(4,), (0,)], (4,)),
    ((4, 4), [(0, 0), (0, 2), (2, 0), (2, 2)], (2, 2)),
    ((4, 4), [(0, 2), (0, 0)], (4, 2)),
]
OVERLAPS = [
    ((8,), [(0,), (2,)], (4,)),
    ((8,), [(2,), (0,)], (4,)),
    ((8,), [(0,), (0,)], (4,)),
    ((4, 4), [(0, 0), (0, 2), (2, 0), (1, 2)], (2, 2)),
    ((4, 4), [(0, 0), (0, 1)], (4, 2)),
    ((6, 2), [(0, 0), (1, 0), (3, 0)], (2, 2)),
]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("size", "places", "shape"), TILINGS, ids=str)
def test_foreign_chunks_that_tile_are_put_together(
    tmp_path: Path, size: tuple[int, ...], places: list[tuple[int, ...]], shape: tuple[int, ...]
) -> None:
    chunks = [(place, torch.full(shape, float(index))) for index, place in enumerate(places)]
    forge_chunks(tmp_path, size, *chunks)
    model, expected = Holder(size), torch.empty(size)
    for place, values in chunks:
        expected[tuple(slice(o, o + n) for o, n in zip(place, shape, strict=True))] = values
    with AsyncCheckpointer(tmp_path, model=model, save_rng=False, read_only=True) as checkpointer:
        checkpointer.load(10)
    assert torch.equal(model.w, expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("size", "places", "shape"), OVERLAPS, ids=str)
def test_foreign_chunks_that_overlap_are_corrupt(
    tmp_path: Path, size: tuple[int, ...], places: list[tuple[int, ...]], shape: tuple[int, ...]
) -> None:
    forge_chunks(
        tmp_path, size, *((place, torch.full(shape, float(index))) for index, place in enumerate(places))
    )
    model = Holder(size)
    with AsyncCheckpointer(tmp_path, model=model, save_rng=False, read_only=True) as checkpointer:
        with pytest.raises(CorruptStepError, match=r"model\.w"):
            checkpointer.load(10)
        assert checkpointer._loader.must_load is None
    assert bool((model.w == -1).all())
