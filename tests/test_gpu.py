"""`pytest -m gpu`: the suites of the driver double on the real driver, and what only that can show.

A test that asks for `world` runs on CUDA, skipped where there is none, and over the driver double, where
its mistakes show on any machine. `cuda` is the real one alone. What the double's own suites run already is
run here on CUDA alone, and over the double as well with ASYNCCKPT_REHEARSE=1.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
import types
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from asyncckpt import AsyncCheckpointer, _native, capture
from asyncckpt.errors import CaptureError, DeviceError, TornStateError
from tests import test_cuda_training as training
from tests import test_torn as suite
from tests.real_cuda import ComparesOnHost, RealCuda, World, begin, entered
from tests.test_cuda_training import same
from tests.test_torn import (  # noqa: F401 -- the fixtures go for this file too
    copying_held,
    no_faults_left,
    one_torch_thread,
    stored,
)
from tests.test_torn_on_devices import move

pytestmark = [
    # Of torch, about how these tests use it: a graph may be empty, gradients may come from any stream.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream"),
]

LAYOUTS = ["dcp", "megatron"]
DEADLINE_S = 60  # far beyond what anything here takes: an expiry is a failure
ROOT = Path(__file__).parents[1]
REHEARSE = bool(os.environ.get("ASYNCCKPT_REHEARSE"))

ON_CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    ],
)
BOTH = [ON_CUDA, "double"]
REPLAYED = BOTH if REHEARSE else [ON_CUDA]


# ---------------------------------------------------------------------------- worlds


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        busy_s: a stream is kept busy for so long where the host must be through before.
        pinned_nbytes: takes far longer to pin than a capture takes to begin.
    """

    rounds: int
    width: int
    busy_s: float
    state_nbytes: int
    pinned_nbytes: int


SCALE = {
    "cuda": Scale(100, 512, 0.05, 512 << 20, 4 << 30),
    "double": Scale(5, 192, 20.0, 16 << 20, 4 << 20),
}


@pytest.fixture(params=BOTH)
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield from entered(request.param, len(request.node.name), monkeypatch)


@pytest.fixture(params=[ON_CUDA])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[RealCuda]:
    for real in entered(request.param, 0, monkeypatch):
        assert isinstance(real, RealCuda)
        yield real


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> Scale:
    """Of the test's world."""
    found = [request.getfixturevalue(name) for name in ("world", "cuda") if name in request.fixturenames]
    return SCALE[found[0].name]


# ---------------------------------------------------------------------------- a job


class Job:
    """A model on device 0, its inputs there too, so that a step makes the host wait for nothing."""

    def __init__(self, world: World, width: int, **options: Any) -> None:
        torch.manual_seed(0)
        self.world = world
        self.width = width
        self.model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width))
        world.module_to(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **{"lr": 0.01, "fused": True, **options})
        self.inputs = self.draw()

    def draw(self) -> torch.Tensor:
        """Other inputs, by the host's generator."""
        return self.world.to_device(torch.randn(8, self.width))

    def forward_backward(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.inputs).square().mean().backward()

    def step(self) -> None:
        self.forward_backward()
        self.optimizer.step()

    def live(self) -> dict[str, torch.Tensor]:
        """All tensors, by the names under which DCP stores them."""
        found = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        for name, param in self.model.named_parameters():
            for key, value in self.optimizer.state[param].items():
                found[f"optimizer.state.{name}.{key}"] = value
        return found

    def clones(self) -> dict[str, torch.Tensor]:
        """Copies where the tensors are, enqueued on the current stream: the host waits for nothing."""
        return {name: value.detach().clone() for name, value in self.live().items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies on the host."""
        return {name: self.world.to_host(value) for name, value in self.live().items()}

    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.live().values())

    def checkpointer(self, root: Path, **options: Any) -> AsyncCheckpointer:
        return AsyncCheckpointer(root, model=self.model, optimizer=self.optimizer, **options)


def plenty(job: Job) -> int:
    """Host memory that never makes a fence wait."""
    return 2 * job.nbytes() + (16 << 20)


def differences(world: World, root: Path, step: int, expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that a step holds other bytes of than expected; read by stock torch."""
    assert expected
    found = stored(root, "dcp", step, lambda _, name: name in expected)
    return [
        name
        for name, value in expected.items()
        if not torch.equal(world.to_host(found[name]), world.to_host(value))
    ]


@contextmanager
def on_stream(world: World, side: bool) -> Iterator[None]:
    """On the default stream, or on another that comes after it."""
    with ExitStack() as stack:
        if side:
            stream = world.new_stream()
            world.wait_stream(stream, behind=0)
            stack.enter_context(world.stream(stream))
        yield


# ---------------------------------------------------------------------------- the suite of torn states


def inputs_to(device: torch.device, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook: the suite makes inputs on the host."""
    return tuple([item.to(device) if isinstance(item, torch.Tensor) else item for item in inputs])


def set_elsewhere(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.set_(torch.full((10,), 9.0, device=parameter.device))


# Only leaves of python change there, wherever tensors are.
NOT_OF_DEVICES = {"test_python_leaves_may_change_right_after_save"}
# The double lives in a dispatch mode of Python's: torch traces nothing there, and pickles raw memory.
NOT_IN_A_MODE = {
    "test_a_compiled_step_is_fenced_and_compiles_once",
    "test_a_model_compiles_into_one_graph_while_it_is_checkpointed",
    "test_a_model_can_still_be_pickled_and_copied",
}


class TestTornStates:
    """`test_torn` with what is handed to a checkpointer on the device."""

    @pytest.fixture(params=REPLAYED)
    def world(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
        yield from entered(request.param, len(request.node.name), monkeypatch)

    @pytest.fixture(autouse=True)
    def placed(self, world: World, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
        if world.name == "double" and request.node.originalname in NOT_IN_A_MODE:
            pytest.skip("needs a torch that traces and pickles")
        construct = AsyncCheckpointer.__init__

        def place(self: AsyncCheckpointer, root: Path, **options: Any) -> None:
            for name in ("model", "optimizer", "extra"):
                move(world, options.get(name))
            model = options.get("model")
            if isinstance(model, nn.Module) and world.name == "cuda":
                model.register_forward_pre_hook(partial(inputs_to, torch.device("cuda", 0)))
            construct(self, root, **options)

        monkeypatch.setattr(AsyncCheckpointer, "__init__", place)
        monkeypatch.setattr(suite, "torch", ComparesOnHost(world))
        monkeypatch.setattr(suite, "ROUNDS", 60 if world.name == "cuda" else 5)

    # -- what differs

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("by", ["data", "kernel"])
    def test_writes_that_no_counter_sees_are_caught_by_the_full_guard(
        self, tmp_path: Path, layout: str, by: str, world: World
    ) -> None:
        def write(tensor: torch.Tensor) -> None:
            if by == "data":
                suite.write_through_data(tensor)
            else:
                world.kernel(lambda alias: alias.add_(1), tensor)
            world.synchronize()  # it has happened before the first copy

        suite.test_writes_that_no_counter_sees_are_caught_by_the_full_guard(tmp_path, layout, write)

    def test_what_the_version_guard_is_documented_not_to_see(self, tmp_path: Path, world: World) -> None:
        model = nn.Linear(64, 64)
        with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
            with copying_held() as reached:
                handle = checkpointer.save(1)
                reached()
                world.kernel(lambda alias: alias.fill_(3), model.weight)
                world.synchronize()
            handle.wait()
        assert bool((stored(tmp_path, "dcp", 1)["model.weight"] == 3).all())

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("guard", ["versions", "full"])
    @pytest.mark.parametrize("nbytes", [16 << 10, 8 << 20], ids=["small pool", "large pool"])
    @pytest.mark.parametrize(
        "change",
        [suite.resized_to_nothing, suite.data_replaced, set_elsewhere, suite.resized_and_back],
    )
    def test_storage_that_goes_away_in_flight(
        self, tmp_path: Path, layout: str, guard: str, nbytes: int, change: Callable[[nn.Parameter], None]
    ) -> None:
        suite.test_storage_that_goes_away_in_flight(tmp_path, layout, guard, nbytes, change)

    @pytest.mark.parametrize("fused", [False, True])
    def test_an_optimizer_over_aliases_of_our_memory_tears_nothing(
        self, tmp_path: Path, world: World, fused: bool
    ) -> None:
        """On the device from the beginning, so that the alias is one of what is saved."""
        model = world.module_to(nn.Linear(64, 64))
        alias = nn.Parameter(model.weight.data)
        alias.grad = torch.ones_like(alias)
        outsider = torch.optim.AdamW([alias], lr=1.0, fused=fused)
        expected = world.to_host(model.weight)
        with suite.Watched(tmp_path, model=model) as checkpointer:
            with copying_held() as reached:
                handle = checkpointer.save(1)
                reached()
                outsider.step()
                assert checkpointer.fenced == 1
            try:
                handle.wait()
            except TornStateError:
                return
            found = world.to_host(stored(tmp_path, "dcp", 1)["model.weight"])
            assert torch.equal(found, expected)
            assert not torch.equal(world.to_host(model.weight), expected)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_buffers_beyond_the_reserve_are_fenced_before_the_next_forward(
        self, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(capture, "_DEVICE_NBYTES_MAX", 8 << 10)
        suite.test_buffers_beyond_the_reserve_are_fenced_before_the_next_forward(tmp_path, layout)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("container", suite.CONTAINERS)
    def test_a_sampler_may_advance_right_after_save(
        self, tmp_path: Path, layout: str, container: str, world: World
    ) -> None:
        """One with its tensors on the device: they are copied there, on the stream that changes them."""
        wrap, unwrap = suite.CONTAINERS[container]
        sampler = suite.Sampler()
        sampler.order = world.to_device(sampler.order)
        sampler.wrapped = wrap(sampler.order)
        expected = world.to_host(unwrap(sampler.wrapped))
        with AsyncCheckpointer(
            tmp_path, dataloader=sampler, layout=layout, host_memory=suite.PLENTY, save_rng=False
        ) as checkpointer:
            with copying_held() as reached:
                handle = checkpointer.save(1)
                reached()
                sampler.order.add_(1000)
            handle.wait()
            checkpointer.load(1, trusted=True)
        assert torch.equal(world.to_host(unwrap(sampler.wrapped)), expected)


def adopt(into: type, source: types.ModuleType, names: set[str]) -> None:
    """Tests of another file become tests of a class here, where it has none of that name."""
    for name in names - vars(into).keys():
        setattr(into, name, staticmethod(getattr(source, name)))


adopt(TestTornStates, suite, {name for name in vars(suite) if name.startswith("test_")} - NOT_OF_DEVICES)
assert vars(suite).keys() >= NOT_OF_DEVICES | NOT_IN_A_MODE


class TestTraining:
    """Of `test_cuda_training`, what needs no hold on the double."""

    @pytest.fixture(params=REPLAYED)
    def world(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
        for world in entered(request.param, len(request.node.name), monkeypatch):
            monkeypatch.setattr(training, "torch", ComparesOnHost(world))
            yield world


adopt(
    TestTraining,
    training,
    {
        "test_stock_torch_reads_what_was_on_devices",
        "test_an_explicit_fence_waits_until_memory_may_be_freed",
        "test_the_host_is_not_blocked_by_memory_it_does_not_hold",
        "test_save_and_fence_refuse_to_be_captured",
        "test_a_write_between_save_and_fence_is_named",
    },
)


# ---------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arena", ["plenty", "the least"])
@pytest.mark.parametrize(
    "variant", [{"fused": True}, {"fused": False, "foreach": True}], ids=["fused", "foreach"]
)
def test_resuming_continues_bit_for_bit(
    world: World, scale: Scale, tmp_path: Path, layout: str, arena: str, variant: dict[str, bool]
) -> None:
    def steps(job: Job) -> None:
        for _ in range(3):
            job.inputs = job.draw()  # by a generator that is part of the state
            job.step()

    job = Job(world, scale.width, **variant)
    options = {"layout": layout, "host_memory": plenty(job) if arena == "plenty" else 1 << 16}
    with job.checkpointer(tmp_path, **options) as checkpointer:
        steps(job)
        checkpointer.save(3)
        saved = job.tensors()
        steps(job)
        expected = job.tensors()
    again = Job(world, scale.width, **variant)
    with again.checkpointer(tmp_path, **options) as checkpointer:
        resume = checkpointer.load_latest()
        assert resume is not None
        assert resume.step == 3
        assert resume.verified
        assert same(again.tensors(), saved)
        assert all(world.device_of(param) == 0 for param in again.model.parameters())
        state = again.optimizer.state[again.model[0].weight]
        assert world.device_of(state["exp_avg"]) == 0
        if world.name == "cuda":  # torch goes by what `tensor.device` says
            assert (world.device_of(state["step"]) == 0) is variant["fused"]
        steps(again)
        assert same(again.tensors(), expected)


def test_state_over_every_device_and_the_host(world: World, tmp_path: Path) -> None:
    count = world.devices
    model = nn.ParameterList([nn.Parameter(torch.arange(3000.0) + index) for index in range(count + 1)])
    for index in range(count):  # the last one stays on the host
        model[index].data = world.to_device(model[index].data, index)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=False)
    for param in model:
        param.grad = torch.ones_like(param)
    expected = {f"model.{index}": world.to_host(param) for index, param in enumerate(model)}
    with AsyncCheckpointer(tmp_path, model=model, optimizer=optimizer, host_memory=1 << 20) as checkpointer:
        for step in range(1, 4):
            busy = [world.occupy(0.01, index) for index in range(count)]
            handle = checkpointer.save(step)
            optimizer.step()
            handle.wait()
            assert not any(is_busy() for is_busy in busy)
            assert differences(world, tmp_path, step, expected) == []
            checkpointer.load(step)
            for index, param in enumerate(model):
                assert torch.equal(world.to_host(param), expected[f"model.{index}"])


def test_generators_of_every_device_come_back(cuda: RealCuda, tmp_path: Path) -> None:
    def draw() -> list[torch.Tensor]:
        return [torch.rand(4, device=torch.device("cuda", index)).cpu() for index in range(cuda.devices)]

    torch.cuda.manual_seed_all(7)
    draw()
    with AsyncCheckpointer(tmp_path, model=cuda.module_to(nn.Linear(4, 4))) as checkpointer:
        checkpointer.save(1)
        expected = draw()
        torch.cuda.manual_seed_all(99)
        checkpointer.load(1)
        for found, drawn in zip(draw(), expected, strict=True):
            assert torch.equal(found, drawn)


def test_a_grad_scaler_in_extra_comes_back(world: World, scale: Scale, tmp_path: Path) -> None:
    """Its state_dict() calls item(), and waits for the device: its own wait, and the report shows whose."""
    job = Job(world, scale.width)
    where = "cuda" if world.name == "cuda" else "cpu"
    scaler = torch.amp.GradScaler(where, init_scale=1024.0, growth_interval=2)

    def step() -> None:
        job.optimizer.zero_grad()
        dtype = torch.float16 if where == "cuda" else torch.bfloat16
        with torch.autocast(where, dtype=dtype, enabled=where == "cuda"):
            loss = job.model(job.inputs).square().mean()
        scaler.scale(loss).backward()
        scaler.step(job.optimizer)
        scaler.update()

    step()
    with job.checkpointer(tmp_path, extra={"scaler": scaler}, host_memory=plenty(job)) as checkpointer:
        checkpointer.save(1).wait()
        step()
        scaler_state, tensors = scaler.state_dict(), job.tensors()
        handle = checkpointer.save(2)
        report = handle.report
        assert report.blocked_s >= report.state_dict_s["extra"] > 0
        for _ in range(4):
            step()
        grown, expected = scaler.state_dict(), job.tensors()
        assert grown["scale"] > scaler_state["scale"]
        handle.wait()
        checkpointer.load(2)
        assert scaler.state_dict() == scaler_state
        assert same(job.tensors(), tensors)
        for _ in range(4):
            step()
        assert scaler.state_dict() == grown
        assert same(job.tensors(), expected)


# ---------------------------------------------------------------------------- what comes when


@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
@pytest.mark.parametrize("arena", ["plenty", "an eighth"])
@pytest.mark.parametrize("guard", ["versions", "full"])
def test_training_goes_on_over_busy_streams(
    world: World, scale: Scale, tmp_path: Path, arena: str, side: bool, guard: Any
) -> None:
    """The stream is busy at save(), so the host is through the step before the first byte is copied; with
    an arena smaller than the state, or checksums to take, it must wait instead."""
    with on_stream(world, side):
        job = Job(world, scale.width)
        job.step()
        host_memory = plenty(job) if arena == "plenty" else job.nbytes() // 8
        runs_ahead = arena == "plenty" and guard == "versions"
        rounds = scale.rounds if guard == "versions" else scale.rounds // 5
        ahead = 0
        with job.checkpointer(tmp_path, host_memory=host_memory, guard=guard, keep_last=2) as checkpointer:
            for step in range(1, rounds + 1):
                job.forward_backward()
                expected = job.clones()
                is_busy = world.occupy(scale.busy_s if runs_ahead else 0.001)
                handle = checkpointer.save(step)
                job.optimizer.step()
                ahead += is_busy()
                handle.wait(DEADLINE_S)
                assert differences(world, tmp_path, step, expected) == []
                assert differences(world, tmp_path, step, job.live())
    if runs_ahead:
        assert ahead > rounds // 2


def test_without_a_fence_the_same_rounds_tear(cuda: RealCuda, tmp_path: Path) -> None:
    """The planted misuse that shows what the fence is for: fencing is manual, and nobody fences."""
    job = Job(cuda, 2048)
    job.step()
    torn = 0
    with job.checkpointer(tmp_path, host_memory=plenty(job), fencing="manual", on_error="warn") as ckpt:
        ckpt.save(0).wait()
        for step in range(1, 6):
            job.forward_backward()
            expected = job.clones()
            cuda.occupy(0.05)
            handle = ckpt.save(step)
            job.optimizer.step()
            cuda.synchronize()
            try:
                handle.wait(DEADLINE_S)
            except TornStateError:  # a torch whose fused optimizers count
                torn += 1
            else:
                torn += bool(differences(cuda, tmp_path, step, expected))
    assert torn


def test_neither_save_nor_step_waits_for_the_device(world: World, scale: Scale, tmp_path: Path) -> None:
    job = Job(world, scale.width)
    job.step()
    with job.checkpointer(tmp_path, host_memory=plenty(job)) as checkpointer:
        checkpointer.save(1).wait()
        for step in range(2, 5):
            job.forward_backward()
            is_busy = world.occupy(20 * scale.busy_s)
            handle = checkpointer.save(step)
            job.optimizer.step()
            assert "released" not in handle.report.phases
            assert is_busy()
            handle.wait(DEADLINE_S)


def test_torch_waits_for_nothing_in_save_and_step(cuda: RealCuda, scale: Scale, tmp_path: Path) -> None:
    job = Job(cuda, scale.width)
    job.step()
    with job.checkpointer(tmp_path, host_memory=plenty(job)) as checkpointer:
        checkpointer.save(1).wait()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError, match="synchroniz"):
                job.inputs.sum().item()
            for step in range(2, 8):
                checkpointer.save(step)
                job.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        checkpointer.wait()
        assert checkpointer.steps() == list(range(1, 8))


def test_buffers_are_copied_on_their_device(world: World, scale: Scale, tmp_path: Path) -> None:
    """Forward changes them before the optimizer's step; nobody fences a forward."""
    job = Job(world, scale.width)
    job.step()
    with job.checkpointer(tmp_path, host_memory=plenty(job)) as checkpointer:
        for step in range(1, 11):
            job.inputs = job.draw()
            expected = {name: value for name, value in job.clones().items() if name.startswith("model.1.")}
            assert len(expected) == 5
            world.occupy(0.002)
            handle = checkpointer.save(step)
            with torch.no_grad():
                job.model(job.inputs)
            handle.wait(DEADLINE_S)
            assert differences(world, tmp_path, step, expected) == []
            assert "model.1.running_mean" in differences(world, tmp_path, step, job.live())


def test_a_state_larger_than_host_memory(world: World, scale: Scale, tmp_path: Path) -> None:
    """Chunks of the full size, many times over, and the step's fence waits for the disk."""
    torch.manual_seed(0)
    model = nn.Module()
    model.big = nn.Parameter(world.to_device(torch.randn(scale.state_nbytes // 4)))
    model.small = nn.Parameter(world.to_device(torch.randn(1001)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    host_memory = scale.state_nbytes // 8
    with AsyncCheckpointer(
        tmp_path, model=model, optimizer=optimizer, host_memory=host_memory, keep_last=1
    ) as checkpointer:
        for step in range(1, 4):
            expected = {f"model.{name}": world.to_host(value) for name, value in model.named_parameters()}
            handle = checkpointer.save(step)
            optimizer.step()
            report = handle.wait(DEADLINE_S)
            assert report.nbytes > host_memory * 8
            assert differences(world, tmp_path, step, expected) == []
            assert differences(world, tmp_path, step, {"model.big": model.big})


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4 << 20, (9 << 20) + 5])
def test_checksums_of_device_memory(world: World, nbytes: int) -> None:
    """Of what is there once the caller's stream has come so far."""
    memory = world.to_device(torch.zeros(nbytes + 1, dtype=torch.uint8))
    with on_stream(world, side=True):
        world.occupy(0.01)
        world.kernel(lambda alias: alias.fill_(nbytes % 251), memory)
        stream = world.current_stream()
        crc = _native.device_crc32(world.driver, 0, stream, memory.data_ptr(), nbytes)
        world.synchronize()
    assert crc == zlib.crc32(bytes([nbytes % 251]) * nbytes)


# ---------------------------------------------------------------------------- memory


@pytest.mark.parametrize("held", [True, False], ids=["held", "planted misuse"])
def test_tensors_are_held_until_their_bytes_are_copied(cuda: RealCuda, tmp_path: Path, held: bool) -> None:
    """Their only other owner lets go right after save(), and the allocator gives memory away at once."""
    expected = torch.arange(16.0 * (1 << 20))  # 64 MiB: longer on the link than a kernel takes to fill
    model = nn.Module()
    model.big = nn.Parameter(cuda.to_device(expected))
    with AsyncCheckpointer(tmp_path, model=model, host_memory=256 << 20) as checkpointer:
        checkpointer.save(1).wait()
        cuda.occupy(0.05)
        handle = checkpointer.save(2)
        if not held:
            snapshot = handle._save.snapshot
            assert snapshot is not None
            snapshot.let_go()
            del snapshot
        address = model.big.data_ptr()
        model.big = None
        thief = torch.full((expected.numel(),), -1.0, device="cuda")
        assert (thief.data_ptr() == address) is not held
        cuda.synchronize()
        handle.wait()
    assert torch.equal(cuda.to_host(stored(tmp_path, "dcp", 2)["model.big"]), expected) is held


def offload(world: World, tensor: torch.Tensor, how: str) -> Callable[[], None]:
    """Takes a tensor's memory away from the device; the result brings it back."""
    if how == "data":
        away = world.to_host(tensor)
        tensor.data = away

        def bring_back() -> None:
            tensor.data = world.to_device(away)
    else:
        storage, away = tensor.untyped_storage(), world.to_host(tensor)
        nbytes = storage.nbytes()
        storage.resize_(0)

        def bring_back() -> None:
            storage.resize_(nbytes)
            with torch.no_grad():
                tensor.copy_(away)

    return bring_back


@pytest.mark.parametrize("arena", ["plenty", "an eighth"])
@pytest.mark.parametrize("how", ["resize", "data"])
def test_offloading_after_an_explicit_fence(
    world: World, scale: Scale, tmp_path: Path, how: str, arena: str
) -> None:
    """What training and inference on the same devices do: all of it leaves while the save is in flight, and
    the memory goes to others, or back to the driver."""
    job = Job(world, scale.width)
    job.step()
    host_memory = plenty(job) if arena == "plenty" else job.nbytes() // 8
    with job.checkpointer(tmp_path, host_memory=host_memory, keep_last=2) as checkpointer:
        for step in range(1, 2 + scale.rounds // 5):
            job.step()
            expected = job.tensors()
            world.occupy(0.005)
            handle = checkpointer.save(step)
            checkpointer.fence()
            large = [t for t in job.live().values() if t.dim() and world.device_of(t) == 0]
            assert len(large) >= 9
            back = [offload(world, tensor, how) for tensor in large]
            world.empty_cache()
            thieves = [world.to_device(torch.full_like(value, 7.0)) for value in expected.values()]
            world.synchronize()
            handle.wait(DEADLINE_S)
            del thieves
            assert differences(world, tmp_path, step, expected) == []
            for bring_back in back:
                bring_back()
            assert same(job.tensors(), expected)


def test_segments_are_as_the_environment_says(cuda: RealCuda) -> None:
    memory = cuda.to_device(torch.ones(32 << 20))
    segments = torch.cuda.memory_snapshot()
    expandable = [segment.get("is_expandable", False) for segment in segments]
    assert any(expandable) is ("expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))
    del memory


def test_device_memory_is_let_go(cuda: RealCuda, scale: Scale, tmp_path: Path) -> None:
    job = Job(cuda, scale.width)
    job.step()
    with job.checkpointer(tmp_path, host_memory=plenty(job), keep_last=2) as checkpointer:

        def allocated_after_a_save(step: int) -> int:
            handle = checkpointer.save(step)
            job.step()
            handle.wait()
            cuda.synchronize()
            return torch.cuda.memory_allocated()

        allocated_after_a_save(1)
        gc.collect()
        gc.disable()
        try:
            found = {allocated_after_a_save(step) for step in range(2, 12)}
        finally:
            gc.enable()
        assert len(found) == 1


def test_host_memory_is_pinned(cuda: RealCuda, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = cuda.module_to(nn.Linear(1024, 1024))
    with AsyncCheckpointer(tmp_path, model=model, host_memory=512 << 20) as checkpointer:
        engine = checkpointer._stager._engine
        deadline_s = time.monotonic() + DEADLINE_S
        while engine.pin_s < 0 and time.monotonic() < deadline_s:  # nothing tells when all of it is
            checkpointer.save(len(checkpointer.steps())).wait()
        assert engine.pin_s > 0
        assert engine.pin_failure == ""
        checkpointer.save(1000).wait()
    assert "pinned" not in caplog.text


# ---------------------------------------------------------------------------- graphs, compiled steps


@pytest.mark.parametrize("how", ["unfenced", "fenced", "manual"])
def test_a_captured_step_is_fenced_around_its_replay(
    world: World, scale: Scale, tmp_path: Path, how: str
) -> None:
    options: dict[str, Any] = {"fencing": "manual"} if how == "manual" else {}
    job = Job(world, scale.width, capturable=world.name == "cuda")
    with on_stream(world, side=True):
        job.step()
        job.step()
        with job.checkpointer(tmp_path, host_memory=plenty(job), keep_last=2, **options) as checkpointer:
            checkpointer.save(1)
            checkpointer.fence()
            with world.capture() as graph:  # raises at its end if the hook had enqueued anything
                job.optimizer.step()
            if how == "unfenced":
                with pytest.raises(CaptureError, match="fenced"):
                    checkpointer.save(2)
                return
            replay = checkpointer.fenced(graph.replay) if how == "fenced" else graph.replay
            for step in range(2, 12):
                expected = job.tensors()
                world.occupy(0.005)
                handle = checkpointer.save(step)
                if how == "manual":
                    checkpointer.fence(on_host=False)
                replay()
                handle.wait(DEADLINE_S)
                assert differences(world, tmp_path, step, expected) == []
                assert "model.0.weight" in differences(world, tmp_path, step, job.live())


def test_a_capture_while_the_engine_pins_and_copies(world: World, scale: Scale, tmp_path: Path) -> None:
    """Global mode: the driver refuses what is unsafe on every thread but those that said they care."""
    written = threading.Event()
    model = nn.Module()
    model.big = nn.Parameter(world.to_device(torch.randn(scale.state_nbytes // 4)))
    counter = world.to_device(torch.zeros(1000))
    with AsyncCheckpointer(
        tmp_path,
        model=model,
        host_memory=scale.pinned_nbytes,
        on_phase=lambda _, phase: written.set() if phase == "written" else None,
    ) as checkpointer:
        handle = checkpointer.save(1)
        with world.capture("global") as graph:
            counter.add_(1)
            pinning = checkpointer._stager._engine.pin_s < 0
            copying = not written.is_set()
            assert written.wait(DEADLINE_S)  # all was copied and written meanwhile
            counter.add_(1)
        assert copying
        assert pinning or world.name == "double"
        graph.replay()
        handle.wait(DEADLINE_S)
    assert differences(world, tmp_path, 1, {"model.big": model.big}) == []
    assert bool((world.to_host(counter) == 2).all())


@pytest.mark.filterwarnings("default")  # compilers have much to say
@pytest.mark.timeout(300)
def test_a_compiled_step_is_fenced(cuda: RealCuda, scale: Scale, tmp_path: Path) -> None:
    torch._dynamo.reset()
    backend = "inductor" if importlib.util.find_spec("triton") else "aot_eager"
    job = Job(cuda, scale.width, fused=False, foreach=True, capturable=True)
    step_compiled = torch.compile(job.optimizer.step, backend=backend)
    with job.checkpointer(tmp_path, host_memory=plenty(job), keep_last=2) as checkpointer:
        for _ in range(2):
            job.forward_backward()
            step_compiled()
        for step in range(1, 11):
            job.forward_backward()
            expected = job.clones()
            cuda.occupy(0.01)
            handle = checkpointer.save(step)
            step_compiled()
            handle.wait(DEADLINE_S)
            assert differences(cuda, tmp_path, step, expected) == []
            assert "model.0.weight" in differences(cuda, tmp_path, step, job.live())
    torch._dynamo.reset()


# ---------------------------------------------------------------------------- other processes


def run_suite(request: pytest.FixtureRequest, tmp_path: Path, selection: str, **environment: str) -> int:
    """Runs tests of this file in a process of their own; returns how many passed."""
    config = request.config
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-k", selection]
    command += [
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(config.rootpath),
        "--basetemp",
        str(tmp_path / "t"),
    ]
    if config.inipath is not None:
        command += ["-c", str(config.inipath)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-2000:]
    return int(passed[1])


@pytest.fixture(params=REPLAYED)
def kind(request: pytest.FixtureRequest) -> str:
    """Of the world in which another process is to live."""
    return str(request.param)


@pytest.mark.timeout(300)
def test_one_hardware_queue(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    """As Megatron sets it; whatever waits on the device for something not enqueued yet would hang."""
    selection = (
        "(busy_streams and versions) or larger_than_host_memory or captured_step_is_fenced "
        "or pins_and_copies or an_arena_of_an_eighth or do_not_deadlock or during_backward "
        "or over_every_device"
    )
    passed = run_suite(request, tmp_path, f"{kind} and ({selection})", CUDA_DEVICE_MAX_CONNECTIONS="1")
    assert passed >= 14


@pytest.mark.timeout(300)
@pytest.mark.parametrize("expandable", [False, True])
def test_offloading_with_and_without_expandable_segments(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, expandable: bool
) -> None:
    """Whose memory, once unused, is unmapped page by page."""
    allocator = f"expandable_segments:{expandable}"
    passed = run_suite(
        request,
        tmp_path,
        f"{kind} and (offloading_after or segments_are or goes_away_in_flight or let_go or busy_streams)",
        PYTORCH_ALLOC_CONF=allocator,  # this name since torch 2.9, the other before
        PYTORCH_CUDA_ALLOC_CONF=allocator,
    )
    assert passed >= 12


def in_another_process(function: Callable[..., None], *arguments: str) -> str:
    """Runs one of the functions below in a new interpreter, to its very end; returns what it printed."""
    script = f"import sys; from tests.test_gpu import {function.__name__} as f; f(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def leave_with_saves_in_flight(kind: str, root: str) -> None:
    world = begin(kind)
    job = Job(world, SCALE[kind].width)
    job.step()
    torch.save(job.tensors(), f"{root}.expected")
    checkpointer = job.checkpointer(Path(root), host_memory=job.nbytes() // 8)
    checkpointer.save(1)
    job.step()
    checkpointer.save(2)


@pytest.mark.timeout(180)
def test_leaving_with_saves_in_flight(tmp_path: Path, kind: str) -> None:
    """The interpreter ends, the driver with it; what was in flight is durable by then."""
    root = tmp_path / "root"
    in_another_process(leave_with_saves_in_flight, kind, str(root))
    expected = torch.load(f"{root}.expected")
    found = {name: value.cpu() for name, value in stored(root, "dcp", 1).items() if name in expected}
    assert same(found, expected)
    assert sorted(path.name for path in root.glob("step-*")) == ["step-1", "step-2"]


def lose_the_device(kind: str, root: str) -> None:
    world = begin(kind)
    model = world.module_to(nn.Linear(256, 256))
    checkpointer = AsyncCheckpointer(root, model=model, host_memory=1 << 22)
    checkpointer.save(1).wait(DEADLINE_S)
    world.lose()
    try:
        checkpointer.save(2).wait(DEADLINE_S)
    except (DeviceError, RuntimeError) as error:  # torch's own, if it is the first to hear
        print(f"save: {error}")  # noqa: T201
    try:
        world.synchronize()
        world.to_host(model.weight)
    except RuntimeError as error:
        print(f"training: {error}")  # noqa: T201
    assert checkpointer.steps() == [1]
    checkpointer.close()
    print("closed")  # noqa: T201


@pytest.mark.timeout(180)
def test_a_lost_device_is_heard_and_hangs_nobody(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "root"
    said = in_another_process(lose_the_device, kind, str(root))
    assert re.findall("^(save|training|closed)", said, re.MULTILINE) == ["save", "training", "closed"]
    assert stored(root, "dcp", 1)["model.weight"].any()
    assert [path.name for path in root.glob("step-*")] == ["step-1"]
