"""A training job whose state is on CUDA devices: what is blocked, what is held, what is refused.

Over the driver double. `torch` here knows no CUDA; see `fake_cuda` for what is real and what is not.
"""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from ctypes import byref, c_int
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from asyncckpt import AsyncCheckpointer, _native, capture, devices
from asyncckpt import snapshot as snapshot_room
from asyncckpt.errors import (
    CaptureError,
    DeviceError,
    LeafError,
    MismatchError,
    SaveError,
    SaveTimeoutError,
    TornStateError,
)
from asyncckpt.snapshot import Snapshot
from tests.cuda_double import ILLEGAL_ADDRESS, OUT_OF_MEMORY, Double
from tests.fake_cuda import FakeCuda
from tests.test_torn import stored

faults = _native.faults
LAYOUTS = ["dcp", "megatron"]
SYNCHRONOUS = {"cuCtxSynchronize", "cuStreamSynchronize", "cuMemcpyDtoH_v2", "cuMemcpyHtoD_v2"}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    double = Double()
    double.reset(seed=3, delay_us_max=50)
    with FakeCuda(double) as world:
        monkeypatch.setattr(devices, "seam", world)
        yield world
    double.reset()


class Job:
    """A model over two devices and the host, trained with fused AdamW."""

    def __init__(self, world: FakeCuda, spread: bool = False) -> None:
        torch.manual_seed(0)
        self.world = world
        self.model = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 64))
        world.module_to(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=True)
        self.extra: dict[str, Any] = {"host": torch.arange(10.0), "scale": 3}
        if spread:
            self.extra["far"] = world.to_device(torch.arange(5000.0), 1)

    def step(self) -> None:
        self.forward_backward()
        self.optimizer.step()

    def forward_backward(self) -> None:
        self.optimizer.zero_grad()
        inputs = self.world.to_device(torch.randn(8, 64))
        self.model(inputs).square().mean().backward()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Host copies of all there is."""
        found = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        for name, param in self.model.named_parameters():
            for key, value in self.optimizer.state[param].items():
                found[f"optimizer.state.{name}.{key}"] = value
        return {name: self.world.to_host(value) for name, value in found.items()}

    def checkpointer(self, root: Path, **options: Any) -> AsyncCheckpointer:
        return AsyncCheckpointer(
            root, model=self.model, optimizer=self.optimizer, extra=self.extra, **options
        )


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


# ---------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("host_memory", [1 << 16, 1 << 22])
def test_resuming_continues_bit_for_bit(
    world: FakeCuda, tmp_path: Path, layout: str, host_memory: int
) -> None:
    job = Job(world, spread=True)
    with job.checkpointer(tmp_path, layout=layout, host_memory=host_memory) as checkpointer:
        for step in range(1, 4):
            job.step()
            checkpointer.save(step)
        saved = job.tensors()
        for _ in range(3):
            job.step()
        expected = job.tensors()
    again = Job(world, spread=True)
    world.kernel(lambda alias: alias.zero_(), again.extra["far"])
    with again.checkpointer(tmp_path, layout=layout, host_memory=host_memory) as checkpointer:
        resume = checkpointer.load_latest()
        assert resume is not None
        assert resume.step == 3
        assert resume.verified
        assert same(again.tensors(), saved)
        assert all(world.device_of(param) == 0 for param in again.model.parameters())
        assert torch.equal(world.to_host(again.extra["far"]), torch.arange(5000.0))
        for _ in range(3):
            again.step()
        assert same(again.tensors(), expected)
    log = {name for name, _ in world.double.log()}
    assert not SYNCHRONOUS & log
    assert world.double.counter("pageable") == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stock_torch_reads_what_was_on_devices(world: FakeCuda, tmp_path: Path, layout: str) -> None:
    job = Job(world)
    job.step()
    expected = job.tensors()
    with job.checkpointer(tmp_path, layout=layout) as checkpointer:
        checkpointer.save(1)
        job.step()
    found = stored(tmp_path, layout, 1)
    assert torch.equal(found["model.0.weight"], expected["model.0.weight"])
    assert not torch.equal(found["model.0.weight"], job.tensors()["model.0.weight"])


def test_tensors_deep_in_extra_are_filled_where_they_are(world: FakeCuda, tmp_path: Path) -> None:
    def extra(fill: float, queued: int) -> dict[str, Any]:
        def here(*shape: int) -> torch.Tensor:
            return world.to_device(torch.full(shape, fill))

        return {
            "ema": {"deep": {"w": here(6)}, "host": torch.full((3,), fill)},
            "shadows": [here(4), {"b": here(5)}],
            "queue": here(queued),
            "deep": {"queue": here(queued)},
            1: {"numbered": here(2)},
        }

    with AsyncCheckpointer(tmp_path, extra=extra(3.0, queued=6)) as checkpointer:
        checkpointer.save(1).wait()
    live = extra(0.0, queued=2)
    filled = [live["ema"]["deep"]["w"], live["ema"]["host"], live["shadows"][0], live["shadows"][1]["b"]]
    filled.append(live[1]["numbered"])
    with AsyncCheckpointer(tmp_path, extra=live) as checkpointer:
        assert checkpointer.load_latest() is not None
    found = [live["ema"]["deep"]["w"], live["ema"]["host"], live["shadows"][0], live["shadows"][1]["b"]]
    found.append(live[1]["numbered"])
    assert all(one is other for one, other in zip(found, filled, strict=True))
    assert all((world.to_host(tensor) == 3).all() for tensor in found)
    for queue in (live["queue"], live["deep"]["queue"]):  # of another form: new, on the same device
        assert world.device_of(queue) == 0
        assert torch.equal(world.to_host(queue), torch.full((6,), 3.0))


class Scaled(torch.optim.Optimizer):
    """Keeps a number for each parameter on the parameter's device, as Prodigy and D-Adaptation do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if not state:
                state |= {"d": param.new_ones(()), "step": torch.tensor(0.0)}
            state["d"].add_(1)
            state["step"].add_(1)


@pytest.mark.parametrize("stepped", [True, False])
def test_numbers_of_an_optimizer_come_back_where_it_keeps_them(
    world: FakeCuda, tmp_path: Path, stepped: bool
) -> None:
    def made(step: bool) -> Scaled:
        optimizer = Scaled([nn.Parameter(world.to_device(torch.zeros(3)))])
        if step:
            optimizer.step()
        return optimizer

    with AsyncCheckpointer(tmp_path, optimizer=made(step=True)) as checkpointer:
        checkpointer.save(1).wait()
    again = made(step=stepped)
    with AsyncCheckpointer(tmp_path, optimizer=again) as checkpointer:
        assert checkpointer.load_latest() is not None
    (state,) = again.state.values()
    assert {key: world.device_of(value) for key, value in state.items()} == {"d": 0, "step": devices.HOST}


# ---------------------------------------------------------------------------- what blocks whom


def test_the_step_goes_on_while_the_link_stands_still(world: FakeCuda, tmp_path: Path) -> None:
    """Nothing is copied when the host is through the step: the device waits, the host does not."""
    job = Job(world)
    job.step()
    expected = job.tensors()
    with job.checkpointer(tmp_path, host_memory=1 << 22) as checkpointer:
        checkpointer.save(1).wait()
        world.double.hold_copies()
        handle = checkpointer.save(2)
        job.forward_backward()
        world.double.clear_log()
        job.optimizer.step()  # returns, or the test's deadline ends it
        mine = world.double.thread_number()
        log = world.double.log()
        assert "cuEventSynchronize" not in {name for name, thread in log if thread == mine}
        assert ("cuStreamWaitEvent", mine) in log
        assert not handle.done()
        assert "released" not in handle.report.phases
        world.double.release_copies()
        handle.wait()
        assert not same(job.tensors(), expected)
    assert torch.equal(stored(tmp_path, "dcp", 2)["model.0.weight"], expected["model.0.weight"])


def test_without_the_devices_wait_the_same_test_sees_a_tear(world: FakeCuda, tmp_path: Path) -> None:
    job = Job(world)
    job.step()
    expected = job.tensors()
    with job.checkpointer(tmp_path, host_memory=1 << 22) as checkpointer:
        checkpointer.save(1).wait()
        with world.double.ignoring("cuStreamWaitEvent"), world.double.holding_copies():
            handle = checkpointer.save(2)
            job.step()
            world.synchronize()  # the step has happened, no byte is copied
        handle.wait()
    assert not torch.equal(stored(tmp_path, "dcp", 2)["model.0.weight"], expected["model.0.weight"])


def test_a_fence_that_waits_for_the_last_save_only_tears(
    world: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted misuse: the stream is made to wait before all copies are enqueued."""
    job = Job(world)
    job.step()
    with job.checkpointer(tmp_path, host_memory=1 << 16) as checkpointer:
        checkpointer.save(1).wait()
        monkeypatch.setattr(Snapshot, "wait_enqueued", lambda self, timeout_s: True)
        with world.double.holding_copies():
            handle = checkpointer.save(2)
            world.double.wait_copies_held()
            job.step()
        with pytest.raises(DeviceError, match="not enqueued"):
            handle.wait()


def test_an_explicit_fence_waits_until_memory_may_be_freed(world: FakeCuda, tmp_path: Path) -> None:
    job = Job(world)
    job.step()
    expected = job.tensors()
    weight = job.model[0].weight
    with job.checkpointer(tmp_path, host_memory=1 << 22) as checkpointer:
        for step in range(1, 20):
            handle = checkpointer.save(step)
            checkpointer.fence()
            nbytes = weight.untyped_storage().nbytes()
            weight.untyped_storage().resize_(0)  # offloaded: its memory serves the next who asks
            other = world.to_device(torch.full((nbytes // 4,), 7.0))
            weight.untyped_storage().resize_(nbytes)
            with torch.no_grad():
                weight.copy_(expected["model.0.weight"])
            handle.wait()
            del other
            found = stored(tmp_path, "dcp", step)["model.0.weight"]
            assert torch.equal(found, expected["model.0.weight"])


def test_an_explicit_fence_after_the_steps_waits_too(world: FakeCuda, tmp_path: Path) -> None:
    job = Job(world)
    job.step()
    with job.checkpointer(tmp_path, host_memory=1 << 22) as checkpointer:
        checkpointer.save(1).wait()
        world.double.hold_copies()
        handle = checkpointer.save(2)
        job.step()
        checkpointer._fence_timeout_s = 0.05
        checkpointer.fence()  # finds that the copies do not end
        assert isinstance(handle.error, SaveTimeoutError)
        world.double.release_copies()
        with pytest.raises(SaveTimeoutError):
            handle.wait()
        checkpointer._fence_timeout_s = 60
        checkpointer.save(2).wait()


@pytest.mark.parametrize("held", [True, False], ids=["held", "planted misuse"])
def test_tensors_are_held_until_their_bytes_are_copied(world: FakeCuda, tmp_path: Path, held: bool) -> None:
    """Their only other owner lets go right after save(), and the allocator reuses memory at once."""
    expected = torch.arange(4096.0)
    model = nn.Module()
    model.big = nn.Parameter(world.to_device(expected))
    with AsyncCheckpointer(tmp_path, model=model, host_memory=1 << 22) as checkpointer:
        checkpointer.save(1).wait()
        with world.double.holding_copies():
            handle = checkpointer.save(2)
            if not held:
                assert handle._save.snapshot is not None
                handle._save.snapshot.let_go()
            model.big = None
            thief = world.to_device(torch.full_like(expected, -1))
            world.synchronize()
        handle.wait()
        del thief
    try:
        whole = torch.equal(stored(tmp_path, "dcp", 2)["model.big"], expected)
    except (pickle.UnpicklingError, EOFError, RuntimeError):  # what names the bytes was let go of, too
        whole = False
    assert whole is held


def test_the_host_is_not_blocked_by_memory_it_does_not_hold(world: FakeCuda, tmp_path: Path) -> None:
    """Host leaves are copied, not waited for by a stream: the fence returns only then."""
    job = Job(world)
    host_model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(host_model.parameters(), fused=True)
    host_model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    everything = nn.ModuleDict({"near": host_model, "far": job.model})
    with AsyncCheckpointer(tmp_path, model=everything, optimizer=optimizer, host_memory=1 << 22) as ckpt:
        for step in range(1, 10):
            expected = host_model.weight.detach().clone()
            handle = ckpt.save(step)
            optimizer.step()
            handle.wait()
            assert torch.equal(stored(tmp_path, "dcp", step)["model.near.weight"], expected)


def test_every_stream_that_fences_is_held_back(world: FakeCuda, tmp_path: Path) -> None:
    """Two optimizers on two streams: that the first was fenced is no reason to let the second pass."""
    model = nn.ModuleDict({name: world.module_to(nn.Linear(64, 64)) for name in "ab"})
    optimizers = [torch.optim.AdamW(part.parameters(), lr=0.1, fused=True) for part in model.values()]
    inputs = world.to_device(torch.randn(4, 64))
    with AsyncCheckpointer(tmp_path, model=model, optimizer=optimizers, host_memory=1 << 22) as ckpt:
        for part in model.values():
            part(inputs).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        ckpt.save(1).wait()
        expected = world.to_host(model["b"].weight)
        world.double.hold_copies()
        handle = ckpt.save(2)
        optimizers[0].step()  # this stream waits for the copies now
        with world.stream(world.new_stream()):
            optimizers[1].step()
            threading.Timer(0.3, world.double.release_copies).start()
            world.synchronize()
        handle.wait()
    assert torch.equal(stored(tmp_path, "dcp", 2)["model.b.weight"], expected)


def test_memory_is_let_go_once_it_was_copied(world: FakeCuda, tmp_path: Path) -> None:
    """Offloading in the middle of a slow write must not keep both copies."""
    job = Job(world)
    job.step()
    with job.checkpointer(tmp_path, host_memory=1 << 22) as checkpointer:
        checkpointer.save(1).wait()
        faults.arm(faults.Op.pwrite, 0, faults.Kind.pause)
        try:
            with world.double.holding_copies():
                handle = checkpointer.save(2)
                job.step()
            assert handle._save.snapshot is not None
            assert handle._save.snapshot.wait_released(30)
            checkpointer.fence()
            storage = StorageWeakRef(job.model[0].weight.untyped_storage())
            job.model[0].weight.grad = None
            job.model[0].weight.data = torch.zeros(1)
            assert storage.expired()
        finally:
            faults.disarm()
        handle.wait()


def test_a_captured_step_of_an_optimizer_we_were_not_given(world: FakeCuda, tmp_path: Path) -> None:
    job = Job(world)
    job.step()
    other = torch.optim.SGD(job.model.parameters(), lr=1.0)
    job.forward_backward()
    with AsyncCheckpointer(tmp_path, model=job.model) as ckpt, world.stream(world.new_stream()):
        with world.capture():
            other.step()
        with pytest.raises(CaptureError, match="fenced"):
            ckpt.save(1)


def test_a_state_dict_that_waits_for_the_device_is_reported(world: FakeCuda, tmp_path: Path) -> None:
    """GradScaler's calls item(): that is its own wait, and it shows whose it was."""

    gate = threading.Event()

    class Scaler:
        scale = world.to_device(torch.full((1,), 65536.0))

        def state_dict(self) -> dict[str, Any]:
            threading.Timer(0.2, gate.set).start()
            return {"scale": self.scale.item()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.scale.fill_(state["scale"])

    job = Job(world)
    with AsyncCheckpointer(tmp_path, model=job.model, extra=Scaler()) as checkpointer:
        world.launch(0, lambda: gate.wait(30))  # the device is busy
        report = checkpointer.save(1).wait()
    assert report.state_dict_s["extra"] >= 0.2
    assert report.blocked_s >= report.state_dict_s["extra"]
    assert report.state_dict_s["model"] < report.state_dict_s["extra"]


# ---------------------------------------------------------------------------- other streams


@pytest.mark.parametrize("how", ["step", "fenced", "saved elsewhere", "saved twice"])
@pytest.mark.parametrize("guard", ["versions", "full"])
def test_a_save_comes_after_steps_on_other_streams(
    world: FakeCuda, tmp_path: Path, how: str, guard: Any
) -> None:
    """The stream that is current at save() knows nothing of the step, and the step is late."""
    job = Job(world)
    job.step()
    job.extra["buffer"] = world.to_device(torch.zeros(100))
    world.synchronize()
    with job.checkpointer(tmp_path, host_memory=1 << 22, guard=guard) as checkpointer:
        checkpointer.save(1).wait()
        job.forward_backward()
        world.synchronize()
        gate = threading.Event()
        handles = []
        with world.stream(side := world.new_stream()):
            world.launch(0, lambda: gate.wait(30))
            step = checkpointer.fenced(job.optimizer.step) if how == "fenced" else job.optimizer.step
            step()
            with torch.no_grad():
                job.extra["buffer"].add_(1)  # volatile: it is copied inside save()

        def save() -> None:
            if guard == "full":  # which waits for the bytes
                threading.Timer(0.1, gate.set).start()
            handles.append(checkpointer.save(2))
            if how == "saved twice":
                with world.stream(world.new_stream()):
                    handles.append(checkpointer.save(3))

        if how == "saved elsewhere":
            elsewhere = threading.Thread(target=save)
            elsewhere.start()
            elsewhere.join()
        else:
            save()
        assert guard == "full" or not handles[-1]._save.begun()[0].wait_released(0.05)
        gate.set()
        with world.stream(side):
            expected = job.tensors() | {"extra.buffer": world.to_host(job.extra["buffer"])}
        checkpointer.fence()
        for handle in handles:
            handle.wait()
            found = stored(tmp_path, "dcp", handle.step)
            assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_a_step_on_the_stream_that_saves_costs_no_wait(world: FakeCuda, tmp_path: Path) -> None:
    job = Job(world)
    waited = []
    world.wait_for = lambda device, stream: waited.append((device, stream))  # type: ignore[method-assign]
    with job.checkpointer(tmp_path, host_memory=1 << 22) as checkpointer, world.stream(world.new_stream()):
        for step in range(1, 4):
            job.step()
            checkpointer.save(step)
    assert waited == []


def test_captures_are_looked_for_on_every_device_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch answers for the current device alone, and to make another current would give it a context."""
    current, entered = [0], []

    @contextmanager
    def device(ordinal: int) -> Iterator[None]:
        entered.append(ordinal)
        current.append(ordinal)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 2)
    seam = devices.TorchSeam()
    assert not seam.is_capturing({0, 1})
    assert entered == [1]
    assert seam.is_capturing({0, 1, 2})


# ---------------------------------------------------------------------------- graphs


def test_save_and_fence_refuse_to_be_captured(world: FakeCuda, tmp_path: Path) -> None:
    job = Job(world)
    job.step()
    with job.checkpointer(tmp_path) as checkpointer, world.stream(world.new_stream()):
        handle = checkpointer.save(1)
        with world.capture():
            with pytest.raises(CaptureError, match="capture"):
                checkpointer.save(2)
            if not handle.done():
                with pytest.raises(CaptureError, match="capture"):
                    checkpointer.fence()


@pytest.mark.parametrize("how", ["unfenced", "fenced", "manual"])
def test_a_captured_step_must_be_fenced_around_its_replay(world: FakeCuda, tmp_path: Path, how: str) -> None:
    job = Job(world)
    job.step()
    world.synchronize()  # what comes next is on another stream
    options: dict[str, Any] = {"fencing": "manual"} if how == "manual" else {}
    with (
        job.checkpointer(tmp_path, host_memory=1 << 22, **options) as checkpointer,
        world.stream(world.new_stream()),
    ):
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
            handle = checkpointer.save(step)
            if how == "manual":
                checkpointer.fence(on_host=False)
            replay()
            handle.wait()
            assert not same(job.tensors(), expected)
            found = stored(tmp_path, "dcp", step)["model.0.weight"]
            assert torch.equal(found, expected["model.0.weight"])


@pytest.mark.parametrize("copied", ["in time", "in time, fenced on this stream", "too late"])
def test_a_step_that_is_captured_while_a_save_is_in_flight_tears_nothing(
    world: FakeCuda, tmp_path: Path, copied: str
) -> None:
    """The graph's replay changes the state behind every hook, so nothing may be left to copy by then."""
    job = Job(world)
    job.step()
    job.forward_backward()
    world.synchronize()
    expected = job.tensors()
    timeout_s = 0.1 if copied == "too late" else 60
    checkpointer = job.checkpointer(tmp_path, host_memory=1 << 22, fence_timeout_s=timeout_s)
    checkpointer.save(1).wait()
    with world.stream(world.new_stream()):
        world.double.hold_copies()
        handle = checkpointer.save(2)
        world.double.wait_copies_held()
        if "fenced" in copied:
            checkpointer.fence(on_host=False)  # but replays may come on others
        if "in time" in copied:
            threading.Timer(0.1, world.double.release_copies).start()
        with world.capture() as graph:
            job.optimizer.step()
        graph.replay()
        world.synchronize()
        world.double.release_copies()
    if "in time" in copied:
        checkpointer.close()
        assert handle.error is None
        found = stored(tmp_path, "dcp", 2)
        assert torch.equal(found["model.0.weight"], expected["model.0.weight"])
    else:
        with pytest.raises(TornStateError, match=r"captured .* fence\(\) before the capture"):
            checkpointer.close()
    assert not torch.equal(job.tensors()["model.0.weight"], expected["model.0.weight"])


# ---------------------------------------------------------------------------- devices that fail


def test_a_lost_device_is_heard_everywhere(world: FakeCuda, tmp_path: Path) -> None:
    job = Job(world)
    job.step()
    checkpointer = job.checkpointer(tmp_path, host_memory=1 << 22)
    checkpointer.save(1).wait()
    world.double.fail_async("cuMemcpyDtoHAsync_v2")
    world.double.fail_async("cuMemcpyBatchAsync_v2")
    handle = checkpointer.save(2)
    with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        handle.wait()
    with pytest.raises(Exception, match=r"700|CUDA_ERROR_ILLEGAL_ADDRESS"):
        checkpointer.save(3)  # who meets it first, torch or we, depends on the state
    assert checkpointer.steps() == [1]
    world.double.reset()
    checkpointer.close()


def test_a_lost_device_costs_no_save_that_was_copied_and_hides_no_error(
    world: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch asks the device whether a stream is captured, and a lost one refuses every call."""
    job = Job(world)
    job.step()
    expected = job.tensors()

    def is_capturing(used: Collection[int]) -> bool:
        status = c_int()
        with world.double.context(0):
            world.double.driver("cuStreamIsCapturing", None, byref(status))
        return status.value != 0

    monkeypatch.setattr(world, "is_capturing", is_capturing)
    checkpointer = job.checkpointer(tmp_path, host_memory=1 << 22)
    faults.arm(faults.Op.pwrite, 0, faults.Kind.pause)
    handle = checkpointer.save(1)
    assert handle._save.begun()[0].wait_released(30)  # only the disk is slow
    world.double.poison(0)
    threading.Timer(0.1, faults.disarm).start()
    checkpointer.__exit__(ZeroDivisionError, ZeroDivisionError(), None)  # raises nothing of its own
    assert handle.error is None
    world.double.reset()
    assert torch.equal(stored(tmp_path, "dcp", 1)["model.0.weight"], expected["model.0.weight"])


def test_what_close_raises_never_hides_what_ended_the_block(
    world: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fence(*, on_host: bool = True) -> None:
        raise RuntimeError("CUDA error")

    checkpointer = Job(world).checkpointer(tmp_path)
    checkpointer.save(1).wait()
    monkeypatch.setattr(checkpointer, "fence", fence)
    checkpointer.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert "besides: CUDA error" in caplog.text


def test_with_warn_training_goes_on(world: FakeCuda, tmp_path: Path, caplog: Any) -> None:
    job = Job(world)
    job.step()
    with job.checkpointer(tmp_path, host_memory=1 << 22, on_error="warn") as checkpointer:
        world.double.fail("cuEventRecord", OUT_OF_MEMORY)
        with caplog.at_level(logging.WARNING):
            handle = checkpointer.save(1)
        assert isinstance(handle.error, DeviceError)
        assert "CUDA_ERROR_OUT_OF_MEMORY" in caplog.text
        job.step()
        checkpointer.save(2).wait()
        assert checkpointer.steps() == [2]


def test_a_device_that_fails_while_loading(world: FakeCuda, tmp_path: Path) -> None:
    job = Job(world)
    job.step()
    with job.checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1).wait()
        world.double.fail("cuMemcpyHtoDAsync_v2", ILLEGAL_ADDRESS)
        world.double.fail("cuMemcpyBatchAsync_v2", ILLEGAL_ADDRESS)
        with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
            checkpointer.load_latest()
        with pytest.raises(Exception, match="did not finish"):
            checkpointer.save(2)
        assert checkpointer.load_latest() is not None
        checkpointer.save(2).wait()


def test_a_device_without_room_for_copies_costs_no_save(
    world: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be copied inside save() is watched, as what is too large is."""
    job = Job(world)
    job.step()
    expected = job.tensors()
    job.extra["hidden"] = Hidden(world.to_device(torch.arange(10.0)))
    tried = []

    def refuse(*_: Any) -> Any:
        tried.append(True)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with job.checkpointer(tmp_path, host_memory=1 << 22) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(world._allocator, "new_storage", refuse)
            handle = checkpointer.save(1)
        assert len(tried) == 1  # each try makes torch empty its cache
        assert "CUDA out of memory" in caplog.text
        assert handle.wait().captured_on_devices_nbytes == 0
        handle = checkpointer.save(2)
        assert handle.wait().captured_on_devices_nbytes > 0
    found = stored(tmp_path, "dcp", 1)["model.1.running_mean"]
    assert torch.equal(found, expected["model.1.running_mean"])


class Hidden:
    """A container to nobody but pickle."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_all_saves_in_flight_share_one_reserve_on_devices(
    world: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "_DEVICE_NBYTES_MAX", 1 << 14)
    extra = {
        "plain": world.to_device(torch.zeros(3 << 10)),
        "hidden": Hidden(world.to_device(torch.zeros(3 << 10))),
        "host": torch.zeros(100),
    }
    with AsyncCheckpointer(tmp_path, extra=extra, host_memory=1 << 22) as checkpointer:
        checkpointer.save(1).wait()
        with world.double.holding_copies():
            reports = [checkpointer.save(step).report for step in (2, 3)]
            assert [r.captured_on_devices_nbytes for r in reports] == [12 << 10, 0]
            assert all(r.captured_nbytes - r.captured_on_devices_nbytes >= 400 for r in reports)


def test_memory_that_is_not_pinned_is_said_once(
    world: FakeCuda, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(world)
    job.step()
    world.double.fail("cuMemHostRegister_v2", OUT_OF_MEMORY)
    with job.checkpointer(tmp_path, host_memory=1 << 22) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step).wait()
    assert caplog.text.count("not pinned") == 1
    assert "CUDA_ERROR_OUT_OF_MEMORY" in caplog.text


def test_memory_that_cannot_be_read_to_is_a_mismatch_and_nothing_changes(
    world: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(world)
    job.step()
    with job.checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1).wait()
        job.step()
        expected = job.tensors()
        weight = job.model[0].weight.data_ptr()

        class Seam:
            def __getattr__(self, name: str) -> Any:
                return getattr(world, name)

            def device_of(self, memory: Any) -> int:
                if memory.data_ptr() == weight:
                    raise ValueError("memory of device xpu:0 cannot be copied")
                return world.device_of(memory)

        with monkeypatch.context() as patch:
            patch.setattr(devices, "seam", Seam())
            with pytest.raises(MismatchError, match=r"model\.0\.weight: lives on"):
                checkpointer.load_latest()
        assert same(job.tensors(), expected)
        checkpointer.save(2).wait()


@pytest.mark.parametrize("hangs", [True, False])
def test_an_interrupted_save_holds_what_is_being_copied(world: FakeCuda, tmp_path: Path, hangs: bool) -> None:
    job = Job(world)
    job.step()

    def interrupt() -> None:
        world.double.wait_copies_held()  # else nothing may be under way when the save is given up
        if not hangs:
            threading.Timer(0.1, world.double.release_copies).start()
        raise KeyboardInterrupt

    timeout_s = 0.1 if hangs else 60
    with job.checkpointer(tmp_path, host_memory=1 << 22, fence_timeout_s=timeout_s) as checkpointer:
        checkpointer.save(1).wait()
        jobs = []
        snapshot = checkpointer._stager.snapshot

        def remembered(*args: Any) -> Snapshot:
            jobs.append((made := snapshot(*args))._job)
            return made

        checkpointer._stager.snapshot = remembered
        checkpointer._state.hold_back_arrays = interrupt
        with world.double.holding_copies():
            with pytest.raises(KeyboardInterrupt):
                checkpointer.save(2)
            (native,) = jobs
            assert native.released is not hangs
            assert len(snapshot_room._given_up) == hangs
        del checkpointer._stager.snapshot, checkpointer._state.hold_back_arrays
        assert native.wait_released(60)
        checkpointer._fence_timeout_s = 60
        checkpointer.save(2).wait()
        assert snapshot_room._given_up == {}


def test_no_driver_is_said_at_once(world: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(world)
    monkeypatch.setattr(world, "driver", str(tmp_path / "libcuda.so.1"))
    with pytest.raises(DeviceError, match="loading the CUDA driver"):
        job.checkpointer(tmp_path / "root")
    monkeypatch.undo()


def test_other_kinds_of_devices_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Linear(3, 3, device="meta")
    extra = {"odd": torch.empty(3, device="meta")}
    for options, name in (({"extra": extra}, r"extra\.odd"), ({"model": model}, r"model\.weight")):
        checkpointer = AsyncCheckpointer(tmp_path, **options)
        with checkpointer, pytest.raises(LeafError, match=rf"{name}.*meta"):
            checkpointer.save(1)


# ---------------------------------------------------------------------------- devices that hang


@contextmanager
def hanging(world: FakeCuda) -> Iterator[None]:
    """Within, the current stream of device 0 does not go on: a collective whose peer died, say."""
    gate = threading.Event()
    world.launch(0, lambda: gate.wait(60))
    try:
        yield
    finally:
        gate.set()
        world.double.drain()


@pytest.mark.parametrize("fenced_by", ["wait", "step"])
def test_a_stream_that_hangs_ends_the_wait_and_close(world: FakeCuda, tmp_path: Path, fenced_by: str) -> None:
    job = Job(world)
    job.step()
    checkpointer = job.checkpointer(tmp_path, host_memory=1 << 22, fence_timeout_s=0.3)
    checkpointer.save(1).wait()
    job.forward_backward()
    with hanging(world):
        handle = checkpointer.save(2)
        if fenced_by == "step":
            job.optimizer.step()  # the device waits, not the host
            assert handle.error is None
        with pytest.raises(SaveTimeoutError, match="given up"):
            handle.wait()
        checkpointer.close()
        assert world.double.counter("unregistered_in_use") == 0
    assert checkpointer._root.entries()[0].step == 1
    with job.checkpointer(tmp_path, host_memory=1 << 22) as again:  # the root is free
        assert again.steps() == [1]


def test_close_raises_what_a_stream_that_hangs_did_to_the_saves(
    world: FakeCuda, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(world)
    job.step()
    checkpointer = job.checkpointer(tmp_path, host_memory=1 << 22, fence_timeout_s=0.3)
    with hanging(world):
        handles = [checkpointer.save(step) for step in (1, 2)]
        with pytest.raises(SaveTimeoutError, match="step 1 was given up"):
            checkpointer.close()
        assert "host_memory stays taken" in caplog.text
        assert all(isinstance(handle.error, SaveTimeoutError) for handle in handles)
        assert world.double.counter("unregistered_in_use") == 0
    assert world.double.counter("unregistered_in_use") == 0
    assert list(tmp_path.glob("step-*")) == []


def test_what_a_device_may_still_read_is_held_on(world: FakeCuda, tmp_path: Path) -> None:
    job = Job(world)
    job.step()
    with job.checkpointer(tmp_path, host_memory=1 << 22, fence_timeout_s=0.3) as checkpointer:
        with hanging(world):
            handle = checkpointer.save(1)
            with pytest.raises(SaveTimeoutError):
                handle.wait()
            weight = job.model[0].weight
            storage = StorageWeakRef(weight.untyped_storage())
            weight.grad = None
            weight.data = torch.zeros(1)
            assert not storage.expired()
            job.optimizer.state.clear()
        checkpointer._fence_timeout_s = 60
        checkpointer.save(1).wait()
        assert storage.expired()


_HANGS_AT_EXIT = """
import sys, threading, torch
from asyncckpt import AsyncCheckpointer, devices
from tests.cuda_double import Double
from tests.fake_cuda import FakeCuda
world = FakeCuda(Double()).__enter__()
devices.seam = world
extra = {"weight": world.to_device(torch.arange(1000.0))}
world.synchronize()
checkpointer = AsyncCheckpointer(sys.argv[1], extra=extra, host_memory=1 << 22, fence_timeout_s=0.3)
world.launch(0, lambda: threading.Event().wait(600))
checkpointer.save(1)
"""


def test_a_stream_that_hangs_does_not_keep_a_program_from_ending(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HANGS_AT_EXIT, str(tmp_path / "root")]
    ended = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1]
    )
    assert ended.returncode == 70, ended.stderr
    assert "step 1 was given up" in ended.stderr


# ---------------------------------------------------------------------------- the guard


def test_a_write_between_save_and_fence_is_named(world: FakeCuda, tmp_path: Path) -> None:
    job = Job(world)
    job.step()
    with job.checkpointer(tmp_path, host_memory=1 << 22) as checkpointer:
        handle = checkpointer.save(1)
        with torch.no_grad():
            job.model[2].weight.add_(1)
        with pytest.raises(TornStateError, match=r"model\.2\.weight"):
            handle.wait()
        checkpointer.save(1).wait()


def test_what_the_device_does_after_the_fence_is_no_tear(world: FakeCuda, tmp_path: Path) -> None:
    """The host enqueues the step and counts versions up while the copies are still to come."""
    job = Job(world)
    job.step()
    with job.checkpointer(tmp_path, host_memory=1 << 22) as checkpointer:
        with world.double.holding_copies():
            handle = checkpointer.save(1)
            job.step()
            checkpointer._decide_released()
        handle.wait()
        assert isinstance(handle.error, SaveError) is False
        assert checkpointer.steps() == [1]


def test_buffers_are_copied_on_their_device(world: FakeCuda, tmp_path: Path) -> None:
    """Forward changes them before the optimizer's step; nobody fences a forward."""
    job = Job(world)
    job.step()
    with job.checkpointer(tmp_path, host_memory=1 << 22) as checkpointer:
        checkpointer.save(1).wait()
        for step in range(2, 12):
            expected = job.tensors()["model.1.running_mean"]
            with world.double.holding_copies():
                handle = checkpointer.save(step)
                job.model(world.to_device(torch.randn(8, 64)))
                world.synchronize()
            handle.wait()
            assert torch.equal(stored(tmp_path, "dcp", step)["model.1.running_mean"], expected)
            assert not torch.equal(job.tensors()["model.1.running_mean"], expected)
