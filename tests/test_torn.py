"""What is saved is the state at the call of save(), or the save fails and says which tensor changed.

The copying threads are held where a test wants them by a native fault, so nothing here depends on luck.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from asyncckpt import AsyncCheckpointer, _native, survey
from asyncckpt.errors import SaveError, SaveTimeoutError, TornStateError
from asyncckpt.snapshot import Guard

faults = _native.faults
Op, Kind = faults.Op, faults.Kind
LAYOUTS = ["dcp", "megatron"]
ROUNDS = 250  # of each of four variants
PLENTY = 1 << 20  # of host memory, for the small states here: a copier never waits for the disk


@pytest.fixture(autouse=True)
def no_faults_left() -> Iterator[None]:
    yield
    faults.disarm()


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tensors are tiny here; threads that spin for them would only be in the copiers' way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def copying_held(copies: int = 0) -> Iterator[Callable[[], None]]:
    """Copies stop after the first `copies`; the yielded function waits until one has stopped."""
    faults.arm(Op.copy, copies, Kind.pause)

    def reached() -> None:
        assert faults.wait_for_hits(Op.copy, 1)

    try:
        yield reached
    finally:
        faults.disarm()


def stored(
    root: Path, layout: str, step: int, names: Callable[[int, str], bool] = lambda i, n: True
) -> dict[str, Any]:
    """Leaves of a step by name, read by nothing of ours."""
    if layout == "megatron":
        tree = torch.load(root / f"iter_{step:07d}/mp_rank_00/model_optim_rng.pt", weights_only=False)
        leaves = {f"model.{key}": value for key, value in tree["model"].items()}
        for index, values in tree.get("optimizer", {}).get("state", {}).items():
            leaves.update({f"optimizer.{index}.{key}": value for key, value in values.items()})
        for key, value in tree.get("extra", {}).items():
            leaves[f"extra.{key}"] = value
        return leaves
    directory = root / f"step-{step}"
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    data = (directory / "__0_0.distcp").read_bytes()
    return {
        index.fqn: torch.load(io.BytesIO(data[info.offset : info.offset + info.length]), weights_only=False)
        for i, (index, info) in enumerate(metadata.storage_data.items())
        if names(i, index.fqn)
    }


def live(model: nn.Module, optimizer: torch.optim.Optimizer, layout: str) -> dict[str, torch.Tensor]:
    """Copies of what `stored` should find."""
    leaves = {f"model.{key}": value.clone() for key, value in model.state_dict().items()}
    names = {param: name for name, param in model.named_parameters()}
    for index, param in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        where = f"optimizer.{index}" if layout == "megatron" else f"optimizer.state.{names[param]}"
        leaves.update({f"{where}.{key}": value.clone() for key, value in optimizer.state[param].items()})
    return leaves


def agree(found: dict[str, Any], expected: dict[str, torch.Tensor], step: int) -> int:
    """Compares every tensor of `found`; returns how many there were."""
    compared = 0
    for name, value in found.items():
        if name in expected:
            assert torch.equal(value, expected[name]), f"step {step}: {name}"
            compared += 1
    return compared


class Tied(nn.Module):
    """Tied weights, a BatchNorm, and several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(192, 160, bias=False)
        self.norm = nn.BatchNorm1d(160)
        self.middle = nn.Linear(160, 160)
        self.head = nn.Linear(192, 160, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.middle(self.norm(self.embed(x))) @ self.head.weight


def make(variant: dict[str, bool]) -> tuple[Tied, torch.optim.AdamW, Callable[[], None], Callable[[], None]]:
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **variant)

    def forward_backward() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 192)).square().mean().backward()

    def step() -> None:
        forward_backward()
        optimizer.step()

    step()
    return model, optimizer, forward_backward, step


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
def test_training_goes_on_at_once_for_a_thousand_rounds(
    tmp_path: Path, layout: str, variant: dict[str, bool]
) -> None:
    """Two saves in flight; forward changes buffers between them, the optimizer everything after them."""
    model, optimizer, forward_backward, _ = make(variant)
    state_nbytes = 3 * sum(parameter.nbytes for parameter in model.parameters())
    arena = 1 << 16  # the least there is
    assert arena * 8 <= state_nbytes
    pending: deque[tuple[Any, dict[str, torch.Tensor]]] = deque()
    rounds, compared = ROUNDS, 0
    with AsyncCheckpointer(
        tmp_path,
        model=model,
        optimizer=optimizer,
        layout=layout,
        host_memory=arena,
        keep_last=4,
        guard="versions",
    ) as checkpointer:

        def verify() -> None:
            nonlocal compared
            handle, expected = pending.popleft()
            handle.wait()
            turn = handle.step % 20
            everything = turn < 2 or layout == "megatron"
            found = stored(tmp_path, layout, handle.step, lambda i, _: everything or (i - turn) % 7 == 0)
            compared += agree(found, expected, handle.step)

        for step in range(2, 2 * rounds + 2, 2):
            expected = live(model, optimizer, layout)
            first = checkpointer.save(step)
            with torch.no_grad():
                model(torch.randn(4, 192))  # changes the buffers alone
            second = checkpointer.save(step + 1)
            after = live(model, optimizer, layout)
            assert not torch.equal(expected["model.norm.running_mean"], after["model.norm.running_mean"])
            forward_backward()
            optimizer.step()
            pending.extend([(first, expected), (second, after)])
            verify()
            verify()
        assert checkpointer.plans_made == 1
    assert compared > 5 * rounds


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_arena_of_an_eighth(tmp_path: Path, layout: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(1024, 512)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(2, 1024)).sum().backward()
    optimizer.step()
    state_nbytes = sum(t.nbytes for t in live(model, optimizer, layout).values())
    with AsyncCheckpointer(
        tmp_path, model=model, optimizer=optimizer, layout=layout, host_memory=state_nbytes // 8
    ) as checkpointer:
        for step in range(1, 6):
            expected = live(model, optimizer, layout)
            handle = checkpointer.save(step)
            optimizer.step()
            handle.wait()
            assert agree(stored(tmp_path, layout, step), expected, step) == len(expected)


def test_two_unfenced_saves_and_the_smallest_arena_do_not_deadlock(tmp_path: Path) -> None:
    model = nn.Linear(256, 256)
    with AsyncCheckpointer(tmp_path, model=model, host_memory=1 << 16, fence_timeout_s=60) as checkpointer:
        with copying_held(5) as reached:
            first = checkpointer.save(1)
            reached()
            second = checkpointer.save(2)
            assert not first.done()
            assert not second.done()
        checkpointer.fence()
        with torch.no_grad():
            model.weight.zero_()
        checkpointer.wait()
        for step in (1, 2):
            assert stored(tmp_path, "dcp", step)["model.weight"].any()


# ---------------------------------------------------------------------------- mutated without a fence


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("guard", ["versions", "full"])
def test_a_write_without_a_fence_fails_that_save_by_name(tmp_path: Path, layout: str, guard: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with AsyncCheckpointer(tmp_path, model=model, layout=layout, guard=guard) as checkpointer:
        checkpointer.save(1).wait()
        before = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
        with copying_held() as reached:
            handle = checkpointer.save(2)
            reached()
            with torch.no_grad():
                model[1].weight.add_(1)
        with pytest.raises(TornStateError, match=r"model\.1\.weight"):
            handle.wait()
        assert checkpointer.steps() == [1]
        assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == before
        assert not list(tmp_path.glob(".asyncckpt-tmp-*step*")) + list(tmp_path.glob(".asyncckpt-tmp-*iter*"))
        checkpointer.save(2).wait()
        assert checkpointer.steps() == [1, 2]
        assert torch.equal(stored(tmp_path, layout, 2)["model.1.weight"], model[1].weight)


def test_the_next_save_tells_of_a_torn_one(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        with copying_held() as reached:
            handle = checkpointer.save(1)
            reached()
            with torch.no_grad():
                model.bias.add_(1)
        checkpointer.fence()
        assert handle._save.done.wait(30)
        with pytest.raises(TornStateError, match=r"step 1 .*model\.bias"):
            checkpointer.save(2)
        checkpointer.save(2).wait()
        assert checkpointer.steps() == [2]


def write_through_data(tensor: torch.Tensor) -> None:
    tensor.data.add_(1)


def write_through_numpy(tensor: torch.Tensor) -> None:
    tensor.detach().numpy()[...] = 7.0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("write", [write_through_data, write_through_numpy])
def test_writes_that_no_counter_sees_are_caught_by_the_full_guard(
    tmp_path: Path, layout: str, write: Callable[[torch.Tensor], None]
) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with AsyncCheckpointer(tmp_path, model=model, layout=layout, guard="full") as checkpointer:
        with copying_held() as reached:
            handle = checkpointer.save(1)
            reached()
            write(model[1].weight)
        with pytest.raises(TornStateError, match=r"model\.1\.weight"):
            handle.wait()
        assert checkpointer.steps() == []
        checkpointer.save(1).wait()
        assert checkpointer.steps() == [1]


def test_what_the_version_guard_is_documented_not_to_see(tmp_path: Path) -> None:
    """If this fails the guard got better: the documentation of `Guard` is to be changed."""
    model = nn.Linear(64, 64)
    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        with copying_held() as reached:
            handle = checkpointer.save(1)
            reached()
            model.weight.data.fill_(3)
        handle.wait()
    assert "`.data`" in (Guard.__doc__ or "")
    assert bool((stored(tmp_path, "dcp", 1)["model.weight"] == 3).all())


@pytest.mark.parametrize("guard", ["versions", "full"])
def test_the_full_guard_fails_nothing_that_is_fenced(tmp_path: Path, guard: Any) -> None:
    model, optimizer, forward_backward, _ = make({"fused": True})
    with AsyncCheckpointer(
        tmp_path, model=model, optimizer=optimizer, guard=guard, host_memory=1 << 16
    ) as checkpointer:
        for step in range(1, 8):
            checkpointer.save(step)
            forward_backward()
            optimizer.step()
    with AsyncCheckpointer(tmp_path, model=model, optimizer=optimizer, read_only=True) as checkpointer:
        assert checkpointer.steps() == list(range(1, 8))


def test_the_guard_needs_no_table_of_dlpacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older torch has none: tensors are watched one by one, and what is said of them is the same."""
    seen = []
    for _ in range(2):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        with torch.inference_mode():
            frozen = torch.zeros(3)
        live = [*model.state_dict().items(), ("frozen", frozen), ("sparse", torch.eye(3).to_sparse())]
        for some in (live[:4], live[:5], live):
            guard = Guard([named for named in some if named[1].layout == torch.strided])
            seen.append(guard.changed())
            storages = {tensor.untyped_storage().data_ptr() for _, tensor in some[:4]}
            assert guard.storages() >= storages
            with torch.no_grad():
                model[1].weight.add_(1)
            seen.append(guard.changed())
            guard.release()
            assert guard.changed() is None
            assert guard.storages() == frozenset()
        monkeypatch.setattr(survey, "_EXCHANGE_API", None)
    assert seen == [None, "1.weight was written to"] * 6


@pytest.mark.parametrize("looked_at", ["at once", "one by one"])
def test_a_tensor_that_is_pointed_elsewhere_leaves_its_memory_to_the_save(
    looked_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(4, 4)
    guard = Guard(list(model.named_parameters()))
    model.weight.data = torch.empty(5)
    if looked_at == "one by one":  # what is there now, DLPack may have no name for
        monkeypatch.setattr(survey, "_EXCHANGE_API", None)
    assert guard.changed() is None
    held = guard.storages()
    assert len(held) == 2
    model.bias.untyped_storage().resize_(0)
    assert guard.changed() == "the storage of bias was resized or replaced"


# ---------------------------------------------------------------------------- memory that goes away


def resized_to_nothing(parameter: nn.Parameter) -> None:
    parameter.untyped_storage().resize_(0)


def data_replaced(parameter: nn.Parameter) -> None:
    parameter.data = torch.full_like(parameter, 9.0)


def set_elsewhere(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.set_(torch.full((10,), 9.0))


def resized_and_back(parameter: nn.Parameter) -> None:
    """What offloading does."""
    nbytes = parameter.untyped_storage().nbytes()
    parameter.untyped_storage().resize_(0)
    parameter.untyped_storage().resize_(nbytes)
    with torch.no_grad():
        parameter.fill_(9.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("guard", ["versions", "full"])
@pytest.mark.parametrize("nbytes", [16 << 10, 8 << 20], ids=["heap", "mmap"])
@pytest.mark.parametrize("change", [resized_to_nothing, data_replaced, set_elsewhere, resized_and_back])
def test_storage_that_goes_away_in_flight(
    tmp_path: Path, layout: str, guard: Any, nbytes: int, change: Callable[[nn.Parameter], None]
) -> None:
    """No crash; the save fails by name or its bytes are right. Large storages are unmapped at once."""
    model = nn.Module()
    model.first = nn.Parameter(torch.arange(1024.0))
    model.second = nn.Parameter(torch.arange(nbytes / 4))
    expected = model.second.detach().clone()
    with AsyncCheckpointer(
        tmp_path, model=model, layout=layout, guard=guard, host_memory=PLENTY, save_rng=False
    ) as checkpointer:
        with copying_held(1) as reached:  # the pickle or the first tensor is through, the rest is not
            handle = checkpointer.save(1)
            reached()
            change(model.second)
            gc.collect()
        try:
            handle.wait()
        except TornStateError as error:
            assert "model.second" in str(error)  # noqa: PT017 -- not failing is as good
            assert checkpointer.steps() == []
        else:
            assert torch.equal(stored(tmp_path, layout, 1)["model.second"], expected)
        model.second = nn.Parameter(torch.ones(10))
        checkpointer.save(2).wait()
        assert checkpointer.steps()[-1] == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_left_for_the_garbage_collector(tmp_path: Path, layout: str) -> None:
    """A cycle would keep tensors, those that save() copied too, long after the save."""
    model, optimizer, _, step = make({"fused": True})
    extra = {"odd": [torch.ones(3)], "object": SimpleNamespace(t=torch.ones(3))}
    with AsyncCheckpointer(
        tmp_path, model=model, optimizer=optimizer, extra=extra, layout=layout
    ) as checkpointer:
        checkpointer.save(1).wait()
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            handle = checkpointer.save(2)
            step()
            handle.wait()
            gc.collect()
            left = [value for value in gc.garbage if isinstance(value, torch.Tensor)]
            lists = [value for value in gc.garbage if isinstance(value, list | dict | tuple)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert not left
        assert not [
            v
            for each in lists
            for v in (each.values() if isinstance(each, dict) else each)
            if isinstance(v, torch.Tensor)
        ]


# ---------------------------------------------------------------------------- the step fence


class Watched(AsyncCheckpointer):
    """Counts who enters the fence, and lets held copies go then."""

    fenced = 0

    def fence(self, *, on_host: bool = True) -> None:
        self.fenced += 1
        faults.disarm()
        super().fence(on_host=on_host)


def test_an_optimizer_that_was_not_handed_over_is_fenced_if_it_shares_a_parameter(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    outsider = torch.optim.SGD(model[1].parameters(), lr=1.0)
    model(torch.randn(2, 64)).sum().backward()
    expected = model[1].weight.detach().clone()
    with Watched(tmp_path, model=model) as checkpointer:
        with copying_held() as reached:
            handle = checkpointer.save(1)
            reached()
            assert checkpointer.fenced == 0
            outsider.step()
            assert checkpointer.fenced == 1
        handle.wait()
        assert torch.equal(stored(tmp_path, "dcp", 1)["model.1.weight"], expected)
        assert not torch.equal(model[1].weight, expected)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_over_aliases_of_our_memory_tears_nothing(tmp_path: Path, fused: bool) -> None:
    """Flat or master parameters are other objects over the same storage."""
    model = nn.Linear(64, 64)
    alias = nn.Parameter(model.weight.data)
    alias.grad = torch.ones_like(alias)
    outsider = torch.optim.AdamW([alias], lr=1.0, fused=fused)
    expected = model.weight.detach().clone()
    with Watched(tmp_path, model=model) as checkpointer:
        with copying_held() as reached:
            handle = checkpointer.save(1)
            reached()
            outsider.step()
        try:
            handle.wait()
        except TornStateError:
            return
        assert torch.equal(stored(tmp_path, "dcp", 1)["model.weight"], expected)


def test_an_optimizer_over_other_parameters_is_not_blocked(tmp_path: Path) -> None:
    model, stranger = nn.Linear(64, 64), nn.Linear(8, 8)
    other = torch.optim.AdamW(stranger.parameters())
    stranger(torch.randn(2, 8)).sum().backward()
    with Watched(tmp_path, model=model) as checkpointer:
        with copying_held() as reached:
            handle = checkpointer.save(1)
            reached()
            assert checkpointer.fenced == 0
            before = stranger.weight.detach().clone()
            other.step()
            assert not torch.equal(stranger.weight, before)
            assert checkpointer.fenced == 0
            assert not handle.done()
        handle.wait()
        assert checkpointer.steps() == [1]


def test_a_forked_child_steps_without_a_look_at_its_parents_saves(tmp_path: Path) -> None:
    """The engine's lock may have been held when it was forked, and nobody is there to let go of it."""
    stranger = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with AsyncCheckpointer(tmp_path, model=nn.Linear(4, 4)) as checkpointer:
        asked: list[bool] = []
        checkpointer._fence._at_risk = lambda: asked.append(True) or []  # type: ignore[func-returns-value]
        child = os.fork()
        if child == 0:
            stranger.step()
            os._exit(bool(asked))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        stranger.step()
        assert asked


def test_a_parameter_group_added_later_is_fenced(tmp_path: Path) -> None:
    model, late = nn.Linear(64, 64), nn.Parameter(torch.zeros(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    with Watched(tmp_path, model=model, optimizer=optimizer, extra={"late": late}) as checkpointer:
        checkpointer.save(1).wait()
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        optimizer.add_param_group({"params": [late]})
        late.grad = torch.ones_like(late)
        optimizer.step()
        with copying_held() as reached:
            handle = checkpointer.save(2)
            reached()
            before = checkpointer.fenced
            old = late.detach().clone()
            torch.optim.SGD([late], lr=1.0).step()
            assert checkpointer.fenced == before  # what is in `extra` was copied: nothing to wait for
            optimizer.step()
            assert checkpointer.fenced == before + 1
        handle.wait()
    loaded = {"late": torch.empty(64, 64)}
    with AsyncCheckpointer(tmp_path, extra=loaded, save_rng=False, read_only=True) as reader:
        reader.load(2, strict=False)
    assert torch.equal(loaded["late"], old)


def test_optimizers_that_step_during_backward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    optimizers = {name: torch.optim.AdamW([p], fused=True) for name, p in model.named_parameters()}
    threads: set[int] = set()
    for name, parameter in model.named_parameters():

        def step_now(param: torch.Tensor, name: str = name) -> None:
            threads.add(threading.get_ident())
            optimizers[name].step()
            optimizers[name].zero_grad()

        parameter.register_post_accumulate_grad_hook(step_now)
    with AsyncCheckpointer(tmp_path, model=model, optimizer=optimizers, host_memory=1 << 16) as checkpointer:
        model(torch.randn(2, 64)).sum().backward()
        for step in range(1, 21):
            expected = {f"model.{k}": v.clone() for k, v in model.state_dict().items()}
            handle = checkpointer.save(step)
            # Another thread, as autograd uses for devices: the fence must work on it.
            worker = threading.Thread(target=lambda: model(torch.randn(2, 64)).sum().backward())
            worker.start()
            worker.join()
            handle.wait()
            assert agree(stored(tmp_path, "dcp", step), expected, step) == len(expected)
    assert len(threads) >= 1


def test_a_compiled_step_is_fenced_and_compiles_once(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
    model(torch.randn(2, 64)).sum().backward()
    step_compiled = torch.compile(optimizer.step, backend="eager")
    with (
        AsyncCheckpointer(tmp_path, model=model, optimizer=optimizer, host_memory=1 << 16) as checkpointer,
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=4),
    ):
        step_compiled()
        for step in range(1, 21):
            expected = live(model, optimizer, "dcp")
            handle = checkpointer.save(step)
            step_compiled()
            handle.wait()
            assert agree(stored(tmp_path, "dcp", step), expected, step) == len(expected)


def test_a_model_compiles_into_one_graph_while_it_is_checkpointed(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = nn.Linear(8, 8)
    with AsyncCheckpointer(tmp_path, model=model):
        torch.compile(model, fullgraph=True, backend="eager")(torch.ones(1, 8))


def test_a_model_can_still_be_pickled_and_copied(tmp_path: Path) -> None:
    model = nn.Linear(8, 8)
    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        averaged = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))
        checkpointer.save(1).wait()
        averaged(torch.ones(1, 8))
        again(torch.ones(1, 8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_buffers_beyond_the_reserve_are_fenced_before_the_next_forward(tmp_path: Path, layout: str) -> None:
    torch.manual_seed(0)
    model = nn.BatchNorm1d(4096)  # 32 KiB of statistics; the reserve of 64 KiB is 8 KiB
    with Watched(tmp_path, model=model, layout=layout, host_memory=1 << 16) as checkpointer:
        model(torch.randn(4, 4096))
        expected = {f"model.{key}": value.clone() for key, value in model.state_dict().items()}
        with copying_held() as reached:
            handle = checkpointer.save(1)
            reached()
            assert handle.report.captured_nbytes <= (1 << 16) // 8
            assert checkpointer.fenced == 0
            model(torch.randn(4, 4096))
            assert checkpointer.fenced == 1
        handle.wait()
        assert agree(stored(tmp_path, layout, 1), expected, 1) == len(expected)


def test_small_buffers_do_not_make_forward_wait(tmp_path: Path) -> None:
    model = nn.BatchNorm1d(64)
    with Watched(tmp_path, model=model, host_memory=PLENTY) as checkpointer:
        expected = model.running_mean.clone()
        with copying_held() as reached:
            handle = checkpointer.save(1)
            reached()
            assert checkpointer.fenced == 0
            model(torch.randn(4, 64) + 5)
            assert checkpointer.fenced == 0
        handle.wait()
        assert torch.equal(stored(tmp_path, "dcp", 1)["model.running_mean"], expected)


def test_a_fence_that_takes_too_long_gives_up_the_save_not_training(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.randn(2, 64)).sum().backward()
    before = model.weight.detach().clone()
    with AsyncCheckpointer(
        tmp_path, model=model, optimizer=optimizer, fence_timeout_s=0.05, host_memory=1 << 16
    ) as checkpointer:
        faults.arm(Op.pwrite, 0, Kind.pause, repeat=True)  # a disk that hangs; the arena is full at once
        handle = checkpointer.save(1)
        optimizer.step()
        assert not torch.equal(model.weight, before)
        assert isinstance(handle.error, SaveTimeoutError)
        assert handle.report.blocked_s >= 0.05
        faults.disarm()
        with pytest.raises(SaveTimeoutError, match="fence_timeout_s"):
            handle.wait(30)
        assert checkpointer.steps() == []
        checkpointer.fence()
        checkpointer._fence_timeout_s = 60.0
        checkpointer.save(1).wait()
        assert checkpointer.steps() == [1]


# ---------------------------------------------------------------------------- python leaves


class Sampler:
    """Hands out its own lists and tensors, as careless samplers do."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any] = lambda tensor: {"tensor": tensor}) -> None:
        self.order = torch.arange(100.0)
        self.seen = [1, 2, 3]
        self.wrapped = wrap(self.order)

    def state_dict(self) -> dict[str, Any]:
        return {
            "wrapped": self.wrapped,
            "seen": self.seen,
            "array": self.array if hasattr(self, "array") else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.wrapped, self.seen = state["wrapped"], state["seen"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_python_leaves_may_change_right_after_save(tmp_path: Path, layout: str) -> None:
    sampler = Sampler()
    sampler.array = np.arange(5)  # type: ignore[attr-defined]
    extra = {"list": [1, [2, 3]], "nested": {"a": {"b": [1]}}, "odd": {1: [2]}, "array": np.arange(4)}
    with AsyncCheckpointer(
        tmp_path, extra=extra, dataloader=sampler, layout=layout, host_memory=PLENTY
    ) as checkpointer:
        with copying_held() as reached:
            handle = checkpointer.save(1)
            reached()
            extra["list"][1].append(9)  # type: ignore[union-attr]
            extra["nested"]["a"]["b"].clear()  # type: ignore[index,call-overload]
            extra["odd"][1].append(5)  # type: ignore[index]
            extra["array"][:] = 0  # type: ignore[index]
            sampler.seen.append(4)
            sampler.array[:] = 0  # type: ignore[attr-defined]
            sampler.order.zero_()
        handle.wait()
        checkpointer.load(1)
    assert extra["list"] == [1, [2, 3]]
    assert extra["nested"] == {"a": {"b": [1]}}
    assert extra["odd"] == {1: [2]}
    assert np.array_equal(extra["array"], np.arange(4))  # type: ignore[arg-type]
    assert sampler.seen == [1, 2, 3]
    assert torch.equal(sampler.wrapped["tensor"], torch.arange(100.0))


CONTAINERS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "dict": (lambda t: {"t": t}, lambda v: v["t"]),
    "list": (lambda t: [t], lambda v: v[0]),
    "tuple": (lambda t: (0, t), lambda v: v[1]),
    "nested": (lambda t: (1, {"b": [t]}), lambda v: v[1]["b"][0]),
    "int keys": (lambda t: {1: t}, lambda v: v[1]),
    "OrderedDict": (lambda t: OrderedDict(t=t), lambda v: v["t"]),
    "defaultdict": (lambda t: defaultdict(int, t=t), lambda v: v["t"]),
    "deque": (lambda t: deque([t]), lambda v: v[0]),
    "object": (lambda t: SimpleNamespace(t=t), lambda v: v.t),
    "parameter": (nn.Parameter, lambda v: v),
    "view": (lambda t: t[10:20], lambda v: v),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_sampler_may_advance_right_after_save(tmp_path: Path, layout: str, container: str) -> None:
    """Whatever it keeps its tensors in: nobody fences a sampler."""
    wrap, unwrap = CONTAINERS[container]
    sampler = Sampler(wrap)
    expected = unwrap(sampler.wrapped).detach().clone()
    with AsyncCheckpointer(
        tmp_path, dataloader=sampler, layout=layout, host_memory=PLENTY, save_rng=False
    ) as checkpointer:
        with copying_held() as reached:
            handle = checkpointer.save(1)
            reached()
            sampler.order.add_(1000)
        handle.wait()
        checkpointer.load(1, trusted=True)
    found = unwrap(sampler.wrapped)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, expected)


# ---------------------------------------------------------------------------- how many in flight


def test_the_policy_skip(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(64, 64)
    with AsyncCheckpointer(tmp_path, model=model, max_in_flight=1, when_busy="skip") as checkpointer:
        with copying_held() as reached:
            first = checkpointer.save(1)
            reached()
            second = checkpointer.save(2)
            assert second.done()
            assert second.report.skipped
            assert "step 2 is not saved" in caplog.text
            assert second.wait().durable_s is None
        first.wait()
        checkpointer.save(2).wait()
        assert checkpointer.steps() == [1, 2]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_the_policy_wait_bounds_the_number_in_flight(tmp_path: Path, most: int) -> None:
    model = nn.Linear(64, 64)
    with AsyncCheckpointer(tmp_path, model=model, max_in_flight=most) as checkpointer:
        handles = []
        for step in range(12):
            handles.append(checkpointer.save(step))
            assert sum(not handle.done() for handle in handles) <= most
        checkpointer.wait()
        assert checkpointer.steps() == list(range(12))


def test_room_may_be_made_by_the_committer_while_the_fence_waits(tmp_path: Path) -> None:
    """The oldest save may be over by the time the fence has returned."""
    handles: list[Any] = []

    class Slow(AsyncCheckpointer):
        def fence(self, *, on_host: bool = True) -> None:
            super().fence(on_host=on_host)
            for handle in handles:
                assert handle._save.done.wait(30)

    with Slow(tmp_path, model=nn.Linear(8, 8), max_in_flight=1) as checkpointer:
        handles.append(checkpointer.save(0))
        handles.append(checkpointer.save(1))
    assert all(handle.done() for handle in handles)


def test_waiting_for_room_shows_in_blocked_s(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    with AsyncCheckpointer(
        tmp_path, model=model, max_in_flight=1, on_error="warn", fence_timeout_s=0.05
    ) as checkpointer:
        faults.arm(Op.copy, 0, Kind.pause)
        first = checkpointer.save(1)
        assert faults.wait_for_hits(Op.copy, 1)
        timer = threading.Thread(target=lambda: first._save.checked.wait(30) and faults.disarm())
        timer.start()
        second = checkpointer.save(2)
        timer.join()
        assert second.report.blocked_s >= 0.05
        second.wait()
        assert isinstance(first.error, SaveError)
        assert checkpointer.steps() == [2]


def test_who_fences_gets_memory_back_also_if_the_committer_was_letting_go(tmp_path: Path) -> None:
    """Both let go, whoever sees the release first; neither may return while the other is still at it."""
    order: list[str] = []
    dying, go = threading.Event(), threading.Event()

    class Memory:
        def __del__(self) -> None:
            dying.set()
            go.wait(30)
            order.append("freed")

    with AsyncCheckpointer(tmp_path, model=nn.Linear(8, 8), host_memory=PLENTY) as checkpointer:
        with copying_held():
            snapshot = checkpointer.save(1)._save.begun()[0]
        assert snapshot.wait_released(30)
        snapshot._held = Memory()
        committer = threading.Thread(target=snapshot.let_go)
        committer.start()
        assert dying.wait(30)
        fencing = threading.Thread(target=lambda: (snapshot.let_go(), order.append("fenced")))
        fencing.start()
        fencing.join(0.1)  # without the lock, long enough
        go.set()
        fencing.join()
        committer.join()
    assert order == ["freed", "fenced"]
