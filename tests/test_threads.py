"""Several threads, interruptions and limits: every save ends, and nobody but the training thread fences.

Copies are held by a native fault where a test wants them, so nothing here depends on luck.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from asyncckpt import AsyncCheckpointer, _native, committer, memory
from asyncckpt.commit import CheckpointRoot
from asyncckpt.errors import (
    ClosedError,
    OptionError,
    SaveError,
    TornStateError,
    WriteError,
)
from asyncckpt.inflight import Save, SaveHandle
from asyncckpt.lease import RootLease

faults = _native.faults
Op, Kind = faults.Op, faults.Kind
LAYOUTS = ["dcp", "megatron"]
ENOUGH_S = 30.0  # a wait that takes this long has failed


@pytest.fixture(autouse=True)
def no_faults_left() -> Iterator[None]:
    yield
    faults.disarm()


@pytest.fixture
def model() -> nn.Linear:
    return nn.Linear(64, 64)


@contextmanager
def copying_held() -> Iterator[Callable[[], None]]:
    """Copies stop before the first; the yielded function waits until one has stopped."""
    faults.arm(Op.copy, 0, Kind.pause)

    def reached() -> None:
        assert faults.wait_for_hits(Op.copy, 1)

    try:
        yield reached
    finally:
        faults.disarm()


class Watched(AsyncCheckpointer):
    """Knows which threads fenced; its first fence lets held copies go on, as the disk would."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.fencers: list[int] = []
        super().__init__(root, **options)

    def __enter__(self) -> Watched:
        return self

    def fence(self, *, on_host: bool = True) -> None:
        self.fencers.append(threading.get_ident())
        faults.disarm()
        super().fence(on_host=on_host)


class Worker(threading.Thread):
    """Calls `work` beside the test; `begun` is set just before, `error` is what it raised."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)  # a hang is a failed test, not a hung run
        self._work = work
        self.begun = threading.Event()
        self.error: BaseException | None = None
        self.start()
        assert self.begun.wait(ENOUGH_S)

    def run(self) -> None:
        self.begun.set()
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 -- the test judges it
            self.error = error

    def ended(self) -> bool:
        self.join(ENOUGH_S)
        return not self.is_alive()


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("."))


def stored_weight(root: Path, step: int, name: str = "weight") -> torch.Tensor:
    """Read back by nothing of ours; layout "megatron"."""
    tree = torch.load(root / f"iter_{step:07d}/mp_rank_00/model_optim_rng.pt", weights_only=False)
    weight: torch.Tensor = tree["model"][name]
    return weight


# ---------------------------------------------------------------------------- waiting elsewhere


@pytest.mark.parametrize("through", ["handle", "checkpointer"])
def test_who_waits_on_another_thread_does_not_fence(tmp_path: Path, model: nn.Linear, through: str) -> None:
    with Watched(tmp_path, model=model, on_error="warn") as checkpointer:
        with copying_held() as reached:
            handle = checkpointer.save(1)
            reached()
            waiter = Worker(handle.wait if through == "handle" else checkpointer.wait)
            with torch.no_grad():
                model.weight.add_(1)
        assert handle._save.begun()[0].wait_released(ENOUGH_S)
        assert waiter.is_alive()
        assert not handle.done()
        checkpointer.fence()
        assert waiter.ended()
        assert checkpointer.fencers == [threading.get_ident()]
        if through == "handle":
            assert isinstance(waiter.error, TornStateError)
        assert isinstance(handle.error, TornStateError)
        assert visible(tmp_path) == []
        checkpointer.save(2).wait()
    assert visible(tmp_path) == ["step-2"]


@pytest.mark.parametrize("through", ["handle", "checkpointer"])
def test_who_waits_elsewhere_is_woken_once_the_training_thread_fenced(
    tmp_path: Path, model: nn.Linear, through: str
) -> None:
    with Watched(tmp_path, model=model) as checkpointer:
        handle = checkpointer.save(1)
        waiter = Worker(handle.wait if through == "handle" else checkpointer.wait)
        checkpointer.fence()
        assert waiter.ended()
        assert waiter.error is None
        assert handle.done()
        assert checkpointer.fencers == [threading.get_ident()]
    assert visible(tmp_path) == ["step-1"]


def test_who_waits_elsewhere_may_give_up(tmp_path: Path, model: nn.Linear) -> None:
    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        handle = checkpointer.save(1)
        waiter = Worker(lambda: handle.wait(0.02))  # nobody fences meanwhile
        assert waiter.ended()
        assert isinstance(waiter.error, TimeoutError)
        handle.wait()


def test_a_wait_that_timed_out_changed_nothing(tmp_path: Path, model: nn.Linear) -> None:
    with AsyncCheckpointer(tmp_path, model=model, fence_timeout_s=10) as checkpointer:
        with copying_held() as reached:
            handle = checkpointer.save(1)
            reached()
            began_s = time.perf_counter()
            for timeout_s in (0.05, 0.0):
                with pytest.raises(TimeoutError, match="step 1"):
                    handle.wait(timeout_s=timeout_s)
            assert time.perf_counter() - began_s < 5
            assert not handle.done()
            assert handle.error is None
        assert handle.wait(ENOUGH_S).durable_s
    assert visible(tmp_path) == ["step-1"]


def test_a_wait_that_timed_out_did_not_vouch_for_the_state(tmp_path: Path, model: nn.Linear) -> None:
    with AsyncCheckpointer(tmp_path, model=model, fence_timeout_s=10) as checkpointer:
        with copying_held() as reached:
            handle = checkpointer.save(1)
            reached()
            with pytest.raises(TimeoutError):
                handle.wait(timeout_s=0.05)
            with torch.no_grad():
                model.weight.add_(1)
        with pytest.raises(TornStateError, match=r"model\.weight"):
            handle.wait()
    assert visible(tmp_path) == []


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e12])
def test_waiting_as_good_as_forever(tmp_path: Path, model: nn.Linear, timeout_s: float) -> None:
    with AsyncCheckpointer(tmp_path, model=model, fence_timeout_s=timeout_s) as checkpointer:
        handle = checkpointer.save(1)
        checkpointer.fence()
        for step in (2, 3, 4):  # beyond max_in_flight: they wait for room
            checkpointer.save(step)
        handle.wait(timeout_s)
        checkpointer.save(5).wait(timeout_s)
    assert visible(tmp_path) == [f"step-{step}" for step in range(1, 6)]


@pytest.mark.parametrize(
    "options",
    [
        {"fence_timeout_s": True}, {"fence_timeout_s": "9"}, {"fence_timeout_s": None},
        {"fence_timeout_s": -1.0}, {"writers": 10_000}, {"writers": 257}, {"writers": True},
    ],
    ids=str,
)  # fmt: skip
def test_limits_without_meaning(tmp_path: Path, model: nn.Linear, options: dict[str, Any]) -> None:
    named = "256" if int(options.get("writers", 0)) > 1 else next(iter(options))
    with pytest.raises(OptionError, match=named):
        AsyncCheckpointer(tmp_path, model=model, **options)
    AsyncCheckpointer(tmp_path, model=model).close()  # the root is free


# ---------------------------------------------------------------------------- optimizers that we do not know


def step_while_copying(checkpointer: Watched, step: int, optimizer: torch.optim.Optimizer) -> tuple[Any, int]:
    """Save, and step the optimizer while the copies are held; the handle, and how often it fenced."""
    with copying_held() as reached:
        handle = checkpointer.save(step)
        reached()
        before = len(checkpointer.fencers)
        optimizer.step()
        fenced = len(checkpointer.fencers) - before
    return handle, fenced


def adamw(*params: torch.Tensor) -> torch.optim.Optimizer:
    """Fused: it writes past the version counters, so only the fence protects from it."""
    for param in params:
        param.grad = torch.ones_like(param)
    return torch.optim.AdamW(params, lr=0.5, fused=True)


def test_a_replaced_parameter_is_fenced_for_an_optimizer_made_later(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    first = adamw(*model.parameters())
    first.step()
    with Watched(tmp_path, model=model, optimizer=first, layout="megatron") as checkpointer:
        handle, fenced = step_while_copying(checkpointer, 1, first)  # the fence has seen the parameters now
        assert fenced == 1
        handle.wait()
        model.weight = nn.Parameter(torch.full((64, 64), 3.0))
        second = adamw(model.weight)
        handle, fenced = step_while_copying(checkpointer, 2, second)
        assert fenced == 1
        handle.wait()
        assert not bool((model.weight == 3).any())
    assert bool((stored_weight(tmp_path, 2) == 3).all())


@pytest.mark.parametrize(
    "alias",
    [
        lambda weight: nn.Parameter(weight.data),
        lambda weight: nn.Parameter(weight.detach().view(-1)),
        lambda weight: nn.Parameter(weight.detach()[32:, 8:]),
        lambda weight: nn.Parameter(weight.detach().view(torch.int32).view(torch.float32)[1:]),
    ],
    ids=["whole", "flat", "part", "retyped"],
)
def test_an_optimizer_over_an_alias_is_fenced(
    tmp_path: Path, model: nn.Linear, alias: Callable[[torch.Tensor], nn.Parameter]
) -> None:
    expected = model.weight.detach().clone()
    outsider = adamw(alias(model.weight))
    with Watched(tmp_path, model=model, layout="megatron") as checkpointer:
        handle, fenced = step_while_copying(checkpointer, 1, outsider)
        assert fenced == 1
        handle.wait()
        assert not torch.equal(model.weight, expected)
    assert torch.equal(stored_weight(tmp_path, 1), expected)


def test_an_optimizer_that_touches_nothing_at_risk_passes(tmp_path: Path, model: nn.Linear) -> None:
    replaced = model.weight
    model.weight = nn.Parameter(torch.zeros(64, 64))
    stranger = adamw(replaced, torch.zeros(3, requires_grad=True), torch.zeros(0, requires_grad=True))
    with Watched(tmp_path, model=model) as checkpointer:
        handle, fenced = step_while_copying(checkpointer, 1, stranger)
        assert fenced == 0
        handle.wait()
    assert visible(tmp_path) == ["step-1"]


def test_an_optimizer_whose_moments_alone_are_at_risk_is_fenced(tmp_path: Path, model: nn.Linear) -> None:
    """Its parameter is copied inside save(), as everything in extra; its moments are not."""
    log_alpha = nn.Parameter(torch.zeros(3000))
    optimizer = adamw(log_alpha)
    optimizer.step()
    expected = optimizer.state[log_alpha]["exp_avg"].clone()
    with Watched(
        tmp_path, model=model, optimizer=optimizer, extra={"log_alpha": log_alpha}, layout="megatron"
    ) as checkpointer:
        with copying_held() as reached:
            handle = checkpointer.save(1)
            reached()
            optimizer.step()
        handle.wait()
    assert not torch.equal(optimizer.state[log_alpha]["exp_avg"], expected)
    tree = torch.load(tmp_path / "iter_0000001/mp_rank_00/model_optim_rng.pt", weights_only=False)
    assert torch.equal(tree["optimizer"]["state"][0]["exp_avg"], expected)


# ---------------------------------------------------------------------------- the end


def test_an_interrupt_while_close_fences_does_not_hang(
    tmp_path: Path, model: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real signal arrives while the copies are held; they go on only once the save was given up."""
    let_pass, fail = Save._let_pass, Save.fail
    waiting, given_up = threading.Event(), threading.Event()

    def passing(save: Save, *args: Any) -> bool:
        waiting.set()
        return let_pass(save, *args)

    def failing(save: Save, error: Any) -> None:
        fail(save, error)
        faults.disarm()
        given_up.set()

    def interrupt() -> None:
        assert waiting.wait(ENOUGH_S)
        os.kill(os.getpid(), signal.SIGINT)
        if not given_up.wait(ENOUGH_S / 2):  # close() hangs: end it, so that the test can say so
            failing(handle._save, SaveError("nobody gave it up"))
            handle._save.checked.set()

    monkeypatch.setattr(Save, "_let_pass", passing)
    monkeypatch.setattr(Save, "fail", failing)
    checkpointer = AsyncCheckpointer(tmp_path, model=model, fence_timeout_s=ENOUGH_S)
    # Where the test run itself was started in the background, SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with copying_held() as reached:
            handle = checkpointer.save(1)
            reached()
            signaller = Worker(interrupt)
            began_s = time.perf_counter()
            with pytest.raises(KeyboardInterrupt):
                checkpointer.close()
            assert time.perf_counter() - began_s < ENOUGH_S / 2
    finally:
        signal.signal(signal.SIGINT, before)
    assert signaller.ended()
    assert handle.done()
    assert isinstance(handle.error, SaveError)
    assert visible(tmp_path) == []
    checkpointer.close()
    AsyncCheckpointer(tmp_path, model=model).close()  # the root was given up


def test_an_interrupt_before_close_fenced_does_not_hang(
    tmp_path: Path, model: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(save: Save, timeout_s: float, on_host: bool = True) -> None:
        raise KeyboardInterrupt

    checkpointer = AsyncCheckpointer(tmp_path, model=model)
    with copying_held() as reached:
        handles = [checkpointer.save(step) for step in (1, 2)]
        reached()
        monkeypatch.setattr(Save, "fence", interrupted)
    closer = Worker(checkpointer.close)
    assert closer.ended()
    assert isinstance(closer.error, KeyboardInterrupt)
    assert all(handle.done() for handle in handles)
    assert all(isinstance(handle.error, SaveError) for handle in handles)
    assert visible(tmp_path) == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reached", ["checked", "manifest", "renamed", "durable"])
def test_an_interrupt_while_a_step_is_published_tells_the_truth(
    tmp_path: Path, model: nn.Linear, layout: str, reached: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """close() is interrupted while the committer is at `reached`: durable and visible, or neither."""
    there, go_on = threading.Event(), threading.Event()

    def observe(step: int, phase: str) -> None:
        if phase == reached:
            there.set()
            assert go_on.wait(ENOUGH_S)

    def interrupted(*_: Any) -> None:
        assert there.wait(ENOUGH_S)
        raise KeyboardInterrupt

    stop = committer.Committer.stop

    def stop_now(self: committer.Committer) -> None:
        go_on.set()
        stop(self)

    monkeypatch.setattr(AsyncCheckpointer, "_drain", interrupted)
    monkeypatch.setattr(committer.Committer, "stop", stop_now)
    checkpointer = AsyncCheckpointer(tmp_path, model=model, layout=layout, on_phase=observe, on_error="warn")
    handle = checkpointer.save(1)
    checkpointer.fence()
    closer = Worker(checkpointer.close)
    assert closer.ended()
    assert isinstance(closer.error, KeyboardInterrupt)
    assert handle.done()
    steps = [name for name in visible(tmp_path) if not name.endswith(".txt")]
    assert (handle.error is None) == bool(steps)
    assert (handle.report.durable_s is not None) == bool(steps)


class SlowSampler:
    """state_dict() says that it is being asked, and lets `meanwhile` run."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self._meanwhile = meanwhile
        self.asked = threading.Event()

    def state_dict(self) -> dict[str, int]:
        self.asked.set()
        self._meanwhile()
        return {"at": 1}

    def load_state_dict(self, values: dict[str, int]) -> None:
        raise NotImplementedError


def test_close_lets_a_save_under_way_elsewhere_come_first(tmp_path: Path, model: nn.Linear) -> None:
    closers: list[Worker] = []

    def close_meanwhile() -> None:
        closers.append(Worker(checkpointer.close))
        closers[0].join(0.2)  # close() must not get through; should it do so, it has the time

    handles: list[SaveHandle] = []
    checkpointer = AsyncCheckpointer(tmp_path, model=model, dataloader=SlowSampler(close_meanwhile))
    saver = Worker(lambda: handles.append(checkpointer.save(1)))
    assert saver.ended()
    assert saver.error is None
    assert closers[0].ended()
    assert closers[0].error is None
    assert handles[0]._save.done.wait(ENOUGH_S)
    assert handles[0].wait().durable_s
    assert visible(tmp_path) == ["step-1"]


def test_save_racing_close_ends_or_says_closed(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    for turn in range(40):
        checkpointer = AsyncCheckpointer(
            tmp_path / f"{turn}", model=model, host_memory=1 << 16, writers=1, save_rng=False
        )
        handles: list[SaveHandle] = []
        together = threading.Barrier(2)

        def save_on(
            checkpointer: AsyncCheckpointer = checkpointer,
            handles: list[SaveHandle] = handles,
            together: threading.Barrier = together,
            before: int = turn % 4,
        ) -> None:
            for step in range(10_000):
                if step == before:
                    together.wait(ENOUGH_S)
                handles.append(checkpointer.save(step))

        saver = Worker(save_on)
        together.wait(ENOUGH_S)
        checkpointer.close()
        assert saver.ended()
        assert isinstance(saver.error, ClosedError)
        for handle in handles:
            assert handle._save.done.wait(ENOUGH_S), handle
            with suppress(SaveError):
                handle.wait()


# ---------------------------------------------------------------------------- what must not end a save


def test_the_heart_survives_what_a_renewal_raises(
    tmp_path: Path, model: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[int] = []
    went_on = threading.Event()

    def renew(lease: RootLease) -> None:
        beats.append(1)
        if len(beats) >= 3:
            went_on.set()
        raise MemoryError

    monkeypatch.setattr(committer, "HEARTBEAT_S", 0.001)
    monkeypatch.setattr(RootLease, "renew", renew)
    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        assert went_on.wait(ENOUGH_S)
        for step in (1, 2):
            checkpointer.save(step).wait(ENOUGH_S)
        assert checkpointer._committer is not None
        assert checkpointer._committer._heart.is_alive()
    assert visible(tmp_path) == ["step-1", "step-2"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_warn_takes_a_root_that_was_deleted(
    tmp_path: Path, model: nn.Linear, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "root"
    with AsyncCheckpointer(root, model=model, layout=layout, on_error="warn") as checkpointer:
        checkpointer.save(1).wait()
        shutil.rmtree(root)
        for step in (2, 3):
            handle = checkpointer.save(step)
            assert handle.done()
            assert isinstance(handle.error, WriteError)
            assert f"step {step} was not saved" in caplog.text
            with pytest.raises(WriteError):
                handle.wait()
    assert not root.exists()


def test_warn_takes_a_save_that_cannot_begin(
    tmp_path: Path, model: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise WriteError("mkdir", str(tmp_path), errno.ENOSPC)

    with AsyncCheckpointer(tmp_path, model=model, on_error="warn") as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointRoot, "begin", full)
            handle = checkpointer.save(1)
            assert handle.done()
            assert isinstance(handle.error, WriteError)
            checkpointer.wait()
        checkpointer.save(1).wait()
    assert visible(tmp_path) == ["step-1"]


def test_raise_does_not_take_it(tmp_path: Path, model: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise WriteError("mkdir", str(tmp_path), errno.ENOSPC)

    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointRoot, "begin", full)
            with pytest.raises(WriteError):
                checkpointer.save(1)
        checkpointer.wait()  # it was heard of already
        checkpointer.save(1).wait()
    assert visible(tmp_path) == ["step-1"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_observer_that_raises_changes_nothing(
    tmp_path: Path, model: nn.Linear, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []

    def observe(step: int, phase: str) -> None:
        heard.append(phase)
        raise ZeroDivisionError(phase)

    with AsyncCheckpointer(
        tmp_path, model=model, layout=layout, on_phase=observe, keep_last=1
    ) as checkpointer:
        with caplog.at_level(logging.WARNING):
            for step in (1, 2):
                report = checkpointer.save(step).wait()
        assert checkpointer.steps() == [2]
        assert "ZeroDivisionError" in caplog.text
        assert {"planned", "submitted", "manifest", "renamed", "durable", "retained"} <= set(heard)
        assert {"manifest", "renamed", "durable", "retained"} <= set(report.phases)


# ---------------------------------------------------------------------------- memory


def large_mappings(least_nbytes: int) -> set[str]:
    """Ranges of this process's memory that are at least so long."""
    ranges = {line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines()}
    bounds = {found: [int(bound, 16) for bound in found.split("-")] for found in ranges}
    return {found for found, (begin, end) in bounds.items() if end - begin >= least_nbytes}


@pytest.mark.parametrize("outcome", ["durable", "failed", "torn"])
def test_a_handle_that_is_kept_does_not_keep_the_arena(
    tmp_path: Path, model: nn.Linear, outcome: str
) -> None:
    mib = 1 << 20
    before = large_mappings(200 * mib)
    checkpointer = AsyncCheckpointer(tmp_path, model=model, host_memory=256 * mib, on_error="warn")
    assert len(large_mappings(200 * mib) - before) == 1
    if outcome == "failed":
        faults.arm(Op.pwrite, 0, Kind.error, errno.EIO)
    with copying_held() if outcome == "torn" else nullcontext():
        handle = checkpointer.save(1)
        if outcome == "torn":
            with torch.no_grad():
                model.weight.add_(1)
    checkpointer.fence()
    assert handle._save.done.wait(ENOUGH_S)
    assert (handle.error is None) == (outcome == "durable")
    checkpointer.close()
    del checkpointer
    assert large_mappings(200 * mib) <= before
    assert handle.step == 1


def test_page_cache_counts_as_available(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    assert memory._left(tmp_path, "memory.max", "memory.current") == 100
    stat = tmp_path / "memory.stat"
    stat.write_text("anon 300\nfile 600\ninactive_file 300\nactive_file 200\nshmem 100\n")
    assert memory._left(tmp_path, "memory.max", "memory.current") == 600
    stat.write_text("inactive_file 1500\nactive_file 0\n")  # counted at another moment than the usage
    assert 100 <= memory._left(tmp_path, "memory.max", "memory.current") <= 1000
    stat.write_text("nonsense\ninactive_file\n\n")
    assert memory._left(tmp_path, "memory.max", "memory.current") == 100


def test_page_cache_counts_in_version_1_too(tmp_path: Path) -> None:
    names = "memory.limit_in_bytes", "memory.usage_in_bytes"
    (tmp_path / names[0]).write_text("1000\n")
    (tmp_path / names[1]).write_text("900\n")
    (tmp_path / "memory.stat").write_text(
        "inactive_file 1\nactive_file 2\ntotal_inactive_file 400\ntotal_active_file 100\n"
    )
    assert memory._left(tmp_path, *names) == 600


# ---------------------------------------------------------------------------- step numbers


def test_what_is_an_index_is_a_step(tmp_path: Path, model: nn.Linear) -> None:
    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        handle = checkpointer.save(np.int64(3))
        assert type(handle.step) is int
        assert handle.wait().step == 3
        checkpointer.save(np.uint8(4)).wait()
        tensors = torch.tensor([5, 6]), torch.tensor(5.5)
        odd: list[Any] = [True, 3.0, 5.5, np.float64(5), np.bool_(True), *tensors]
        for step in odd:
            with pytest.raises(OptionError, match="step"):
                checkpointer.save(step)
        assert checkpointer.steps() == [3, 4]


# ---------------------------------------------------------------------------- priorities

_IOPRIO_GET = {"x86_64": 252, "aarch64": 31}  # numbers of the system call, which glibc does not wrap
_BEST_EFFORT_LOWEST = 2 << 13 | 7


@pytest.mark.parametrize("priority", ["normal", "low"])
def test_writers_stand_back_as_far_as_they_are_told(tmp_path: Path, model: nn.Linear, priority: Any) -> None:
    def threads() -> set[int]:
        return {int(entry.name) for entry in Path("/proc/self/task").iterdir()}

    mine, before = os.getpriority(os.PRIO_PROCESS, 0), threads()
    with AsyncCheckpointer(tmp_path, model=model, writers=1, writers_priority=priority) as checkpointer:
        checkpointer.save(1).wait()  # the writer has begun
        ours = threads() - before
        nice = {thread: os.getpriority(os.PRIO_PROCESS, thread) for thread in ours}
        stood_back = [thread for thread, value in nice.items() if value != mine]
        assert [nice[thread] for thread in stood_back] == [19 if priority == "low" else min(19, mine + 5)]
        if os.uname().machine in _IOPRIO_GET:
            ask = ctypes.CDLL(None).syscall
            given = ask(_IOPRIO_GET[os.uname().machine], 1, stood_back[0])
            assert (given == _BEST_EFFORT_LOWEST) == (priority == "low")
    assert os.getpriority(os.PRIO_PROCESS, 0) == mine
    with pytest.raises(OptionError, match="writers_priority"):
        AsyncCheckpointer(tmp_path, model=model, writers_priority="idle")  # type: ignore[arg-type]
