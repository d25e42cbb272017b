"""The public face: options, policies, errors, reports."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from asyncckpt import AsyncCheckpointer, _native
from asyncckpt.errors import (
    ClosedError,
    LeafError,
    OptionError,
    RootBusyError,
    RootError,
    SaveError,
    StepError,
    StepExistsError,
    StepNotFoundError,
    WriteError,
)

faults = _native.faults
Op, Kind = faults.Op, faults.Kind
LAYOUTS = ["dcp", "megatron"]


@pytest.fixture(autouse=True)
def no_faults_left() -> Iterator[None]:
    yield
    faults.disarm()


@pytest.fixture
def model() -> nn.Linear:
    return nn.Linear(8, 8)


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("."))


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("which", ["asyncckpt-heartbeat", "asyncckpt-committer"])
def test_a_thread_that_cannot_be_had_leaves_nothing_behind(
    which: str, tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == which:
            raise RuntimeError("can't start new thread")
        start(thread)

    def left() -> tuple[int, int]:
        return len(list(Path("/proc/self/task").iterdir())), len(torch_optimizer._global_optimizer_pre_hooks)

    before = left()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        AsyncCheckpointer(tmp_path / "root", model=model)
    assert left() == before
    monkeypatch.undo()
    with AsyncCheckpointer(tmp_path / "root", model=model) as checkpointer:
        checkpointer.save(1)


def test_a_root_that_is_a_file(tmp_path: Path, model: nn.Module) -> None:
    root = tmp_path / "root"
    root.write_text("precious")
    with pytest.raises(RootError, match="not a directory"):
        AsyncCheckpointer(root, model=model)
    with pytest.raises(RootError, match="not a directory"):
        AsyncCheckpointer(root / "below", model=model)
    assert root.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_root_that_is_not_writable(tmp_path: Path, model: nn.Module) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RootError, match="not writable"):
        AsyncCheckpointer(tmp_path, model=model)
    tmp_path.chmod(0o700)


def test_a_root_has_one_live_owner_but_many_readers(tmp_path: Path, model: nn.Module) -> None:
    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        with pytest.raises(RootBusyError):
            AsyncCheckpointer(tmp_path, model=model)
        checkpointer.save(1).wait()
        with AsyncCheckpointer(tmp_path, model=nn.Linear(8, 8), read_only=True) as reader:
            assert reader.steps() == [1]
            resume = reader.load_latest()
            assert resume is not None
            assert resume.step == 1
        checkpointer.save(2).wait()
    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        assert checkpointer.steps() == [1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "nonsense"}, {"guard": "sometimes"}, {"on_error": "ignore"}, {"when_busy": "drop"},
        {"writers": 0}, {"max_in_flight": 0}, {"keep_last": 0}, {"keep_every": -1}, {"host_memory": 100},
        {"fence_timeout_s": 0}, {"writers": 1.5}, {"host_memory": "1GB"}, {"fence_timeout_s": float("nan")},
        {"optimizer": [3]}, {"dataloader": 3},
    ],
    ids=str,
)  # fmt: skip
def test_options_without_meaning_leave_the_root_free(
    tmp_path: Path, model: nn.Module, options: dict[str, Any]
) -> None:
    with pytest.raises(OptionError):
        AsyncCheckpointer(tmp_path, model=model, **options)
    AsyncCheckpointer(tmp_path, model=model).close()


def test_step_numbers(tmp_path: Path, model: nn.Module) -> None:
    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        with pytest.raises(StepError, match="negative"):
            checkpointer.save(-1)
        for odd in (1.0, True, "1", None):
            with pytest.raises(OptionError, match="step"):
                checkpointer.save(odd)  # type: ignore[arg-type]
        checkpointer.save(5)
        with pytest.raises(StepExistsError):
            checkpointer.save(5)
        with pytest.raises(StepError):
            checkpointer.save(4)
        checkpointer.wait()
        with pytest.raises(StepExistsError):
            checkpointer.save(5)
        with pytest.raises(StepError):
            checkpointer.save(4)
        with pytest.raises(StepNotFoundError):
            checkpointer.load(4)
        checkpointer.save(6)
    assert visible(tmp_path) == ["step-5", "step-6"]


def test_after_close(tmp_path: Path, model: nn.Module) -> None:
    checkpointer = AsyncCheckpointer(tmp_path, model=model)
    handle = checkpointer.save(1)
    checkpointer.close()
    checkpointer.close()
    assert handle.done()
    assert handle.wait().durable_s
    for use in (
        lambda: checkpointer.save(2),
        checkpointer.wait,
        checkpointer.steps,
        checkpointer.load_latest,
    ):
        with pytest.raises(ClosedError):
            use()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()  # the hooks are gone or harmless
    assert visible(tmp_path) == ["step-1"]


def test_read_only(tmp_path: Path, model: nn.Module) -> None:
    root = tmp_path / "absent"
    with AsyncCheckpointer(root, model=model, read_only=True) as checkpointer:
        assert checkpointer.load_latest() is None
        assert checkpointer.steps() == []
        assert checkpointer.plans_made == 0
        checkpointer.fence()
        checkpointer.wait()
        with pytest.raises(RootError, match="read_only"):
            checkpointer.save(1)
    assert not root.exists()


# ---------------------------------------------------------------------------- failures are heard


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("op", "number"), [(Op.pwrite, errno.ENOSPC), (Op.fsync, errno.EIO), (Op.open, errno.EMFILE)], ids=str
)
def test_a_failed_write_names_file_and_errno_and_the_next_save_works(
    tmp_path: Path, model: nn.Module, layout: str, op: Any, number: int
) -> None:
    with AsyncCheckpointer(tmp_path, model=model, layout=layout) as checkpointer:
        checkpointer.save(1).wait()
        before = visible(tmp_path)
        faults.arm(op, 0, Kind.error, number)
        handle = checkpointer.save(2)
        with pytest.raises(WriteError) as caught:
            handle.wait()
        assert faults.hits(op) == 1
        faults.disarm()
        assert caught.value.errno == number
        assert str(tmp_path) in caught.value.path
        assert errno.errorcode[number] in str(caught.value)
        assert checkpointer.steps() == [1]
        assert visible(tmp_path) == before
        checkpointer.save(2).wait()
        assert checkpointer.steps() == [1, 2]


def failing_save(checkpointer: AsyncCheckpointer, step: int) -> Any:
    """A save that has failed; nobody was told."""
    faults.arm(Op.pwrite, 0, Kind.error, errno.EIO)
    handle = checkpointer.save(step)
    checkpointer.fence()
    assert handle._save.done.wait(30)
    faults.disarm()
    assert handle.error is not None
    return handle


def test_a_failure_is_raised_once_by_whatever_comes_next(tmp_path: Path, model: nn.Module) -> None:
    checkpointer = AsyncCheckpointer(tmp_path, model=model)
    failing_save(checkpointer, 1)
    with pytest.raises(WriteError):
        checkpointer.save(2)
    checkpointer.save(2).wait()
    failing_save(checkpointer, 3)
    with pytest.raises(WriteError):
        checkpointer.wait()
    checkpointer.wait()
    handle = failing_save(checkpointer, 4)
    with pytest.raises(WriteError):
        handle.wait()
    checkpointer.wait()
    failing_save(checkpointer, 5)
    with pytest.raises(WriteError):
        checkpointer.close()
    checkpointer.close()
    AsyncCheckpointer(tmp_path, model=model).close()  # the root was given up nevertheless
    assert visible(tmp_path) == ["step-2"]


def test_on_error_warn_goes_on(tmp_path: Path, model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    with AsyncCheckpointer(tmp_path, model=model, on_error="warn") as checkpointer:
        failing_save(checkpointer, 1)
        assert "step 1 was not saved" in caplog.text
        checkpointer.save(2).wait()
    assert visible(tmp_path) == ["step-2"]


def test_what_ends_the_block_comes_first(
    tmp_path: Path, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    def train() -> None:
        with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
            failing_save(checkpointer, 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert "besides" in caplog.text


def test_a_save_that_cannot_begin_leaves_nothing_behind(tmp_path: Path) -> None:
    extra: dict[str, Any] = {"x": lambda: 0}
    with AsyncCheckpointer(tmp_path, extra=extra) as checkpointer:
        for _ in range(5):
            with pytest.raises(LeafError, match=r"extra\.x"):
                checkpointer.save(1)
        checkpointer.fence()
        checkpointer.wait()
        extra["x"] = 1
        checkpointer.save(1).wait()
    assert visible(tmp_path) == ["step-1"]
    assert not list(tmp_path.glob(".asyncckpt-tmp-*"))


def test_metadata_that_is_no_json_is_refused_before_anything_is_written(
    tmp_path: Path, model: nn.Module
) -> None:
    with AsyncCheckpointer(tmp_path, model=model, on_error="warn") as checkpointer:
        with pytest.raises((OptionError, SaveError, TypeError)):
            checkpointer.save(1, metadata={"x": object()}).wait()
        checkpointer.save(2, metadata={"tokens": 12, "name": "é"}).wait()
        resume = checkpointer.load_latest()
    assert resume is not None
    assert dict(resume.metadata) == {"tokens": 12, "name": "é"}


def test_metadata_may_change_right_after_save(tmp_path: Path, model: nn.Module) -> None:
    metadata = {"seen": [1, 2]}
    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        faults.arm(Op.copy, 0, Kind.pause)
        handle = checkpointer.save(1, metadata=metadata)
        assert faults.wait_for_hits(Op.copy, 1)
        metadata["seen"].append(3)
        faults.disarm()
        handle.wait()
        resume = checkpointer.load_latest()
    assert resume is not None
    assert resume.metadata == {"seen": [1, 2]}


@pytest.mark.parametrize("layout", ["dcp", "megatron"])
def test_a_load_tells_when_each_phase_was_reached(tmp_path: Path, model: nn.Module, layout: str) -> None:
    with AsyncCheckpointer(tmp_path, model=model, layout=layout) as checkpointer:
        checkpointer.save(1).wait()
        resume = checkpointer.load(1)
    assert list(resume.phases) == ["listed", "parsed", "matched", "read", "applied"]
    times = [0, *resume.phases.values(), resume.seconds]
    assert times == sorted(times)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused_and_changes_nothing(tmp_path: Path, model: nn.Module) -> None:
    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        checkpointer.save(1).wait()
        pid = os.fork()
        if pid == 0:
            from asyncckpt.errors import ForkedError

            try:
                checkpointer.fence()
                checkpointer.close()
                checkpointer.save(2)
            except ForkedError:
                os._exit(17)
            os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 17
        checkpointer.save(2).wait()
        assert checkpointer.steps() == [1, 2]


# ---------------------------------------------------------------------------- reports


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_report_of_a_save(tmp_path: Path, layout: str) -> None:
    model = nn.BatchNorm1d(16)
    seen: list[tuple[int, str]] = []
    with AsyncCheckpointer(
        tmp_path,
        model=model,
        layout=layout,
        on_phase=lambda step, phase: seen.append((step, phase)),
        save_rng=False,
    ) as checkpointer:
        first = checkpointer.save(1).wait()
        second = checkpointer.save(2).wait()
    assert (first.replanned, second.replanned) == (True, False)
    names = [
        "captured",
        "planned",
        "submitted",
        "released",
        "written",
        "checked",
        "manifest",
        "renamed",
        "durable",
    ]
    for report in (first, second):
        times = [report.phases[name] for name in names]
        assert times == sorted(times)
        assert report.durable_s is not None
        assert report.durable_s >= report.phases["durable"]
        assert 0 < report.blocked_s < report.durable_s
        assert not report.skipped
        assert report.captured_nbytes == 2 * 16 * 4 + 8  # running mean, running variance, batches tracked
        assert report.gb_per_s == pytest.approx(report.nbytes / report.durable_s / 1e9)
    order = [phase for step, phase in seen if step == 2 and phase in names]
    assert order == names
    step = tmp_path / ("step-2" if layout == "dcp" else "iter_0000002")
    stock = {".metadata", "__0_0.distcp", "model_optim_rng.pt"}
    assert sum(path.stat().st_size for path in step.rglob("*") if path.name in stock) == second.nbytes


def test_blocked_time_has_the_fence_in_it(tmp_path: Path, model: nn.Module) -> None:
    with AsyncCheckpointer(tmp_path, model=model, fence_timeout_s=0.1, on_error="warn") as checkpointer:
        checkpointer.save(1).wait()
        faults.arm(Op.copy, 0, Kind.pause)
        handle = checkpointer.save(2)
        assert faults.wait_for_hits(Op.copy, 1)
        before = handle.report.blocked_s
        assert before > 0
        checkpointer.fence()  # gives up after the timeout
        assert handle.report.blocked_s >= before + 0.1
        faults.disarm()


def test_waiting_for_one_handle_has_its_own_timeout(tmp_path: Path, model: nn.Module) -> None:
    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        faults.arm(Op.fsync, 0, Kind.pause)
        handle = checkpointer.save(1)
        assert faults.wait_for_hits(Op.fsync, 1)
        with pytest.raises(TimeoutError, match="step 1"):
            handle.wait(0.01)
        assert not handle.done()
        assert "in flight" in repr(handle)
        faults.disarm()
        handle.wait(30)
        assert "durable" in repr(handle)


def test_waiting_tells_of_progress(tmp_path: Path, model: nn.Module) -> None:
    told: list[int] = []

    def progress(left: int) -> None:
        told.append(left)
        faults.disarm()

    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        faults.arm(Op.fsync, 0, Kind.pause, repeat=True)
        checkpointer.save(1)
        checkpointer.save(2)
        checkpointer.wait(progress)
    assert told
    assert told[0] == 2


def test_a_handle_may_be_waited_for_on_another_thread(tmp_path: Path, model: nn.Module) -> None:
    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        handle = checkpointer.save(1)
        checkpointer.fence()
        waiter = threading.Thread(target=handle.wait)
        waiter.start()
        waiter.join(30)
        assert handle.done()


def test_retention(tmp_path: Path, model: nn.Module) -> None:
    with AsyncCheckpointer(tmp_path, model=model, keep_last=2, keep_every=4) as checkpointer:
        for step in range(1, 11):
            checkpointer.save(step)
        checkpointer.wait()
        assert checkpointer.steps() == [4, 8, 9, 10]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rollback_starts_a_new_timeline(tmp_path: Path, layout: str) -> None:
    model = nn.Linear(2, 2)
    with AsyncCheckpointer(tmp_path, model=model, layout=layout, save_rng=False) as checkpointer:
        for step in (1, 2, 3):
            with torch.no_grad():
                model.weight.fill_(step)
            checkpointer.save(step).wait()
        assert checkpointer.load(1).step == 1
        assert bool((model.weight == 1).all())
        with torch.no_grad():
            model.weight.fill_(20)
        checkpointer.save(2).wait()
        assert checkpointer.steps() == [1, 2]
        resume = checkpointer.load_latest()
        assert resume is not None
        assert resume.step == 2
        assert bool((model.weight == 20).all())


def test_it_is_reported_when_memory_for_staging_is_present(tmp_path: Path) -> None:
    with AsyncCheckpointer(tmp_path, extra={"x": torch.zeros(8)}, host_memory=1 << 22) as checkpointer:
        for step in range(1, 1000):  # until it is there: this takes milliseconds, and nobody waits for it
            handle = checkpointer.save(step)
            handle.wait()
            if handle.report.prefault_s is not None:
                break
        assert handle.report.prefault_s is not None
        assert handle.report.prefault_s > 0
