"""Mistakes and full disks: the message says what to do, older steps still load, the next save works."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncckpt import AsyncCheckpointer
from asyncckpt._native import faults
from asyncckpt.errors import (
    CheckpointError,
    ClosedError,
    LeafError,
    MismatchError,
    OptionError,
    RootBusyError,
    RootError,
    SaveError,
    StepError,
    StepExistsError,
    StepNotFoundError,
    WriteError,
)
from tests.step_state import (
    HOST_MEMORY_NBYTES,
    LAYOUTS,
    StepState,
    hidden_names,
    step_directory,
    visible_steps,
)
from tests.warm_process import WarmProcess


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmProcess]:
    with WarmProcess("tests.crash_trainer") as process:
        yield process


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    faults.disarm()


class Run:
    """A checkpointer, its state, and step 10 saved."""

    def __init__(self, root: Path, layout: str, **options: Any) -> None:
        self.root, self.layout, self.state = root, layout, StepState()
        self.checkpointer = AsyncCheckpointer(
            root, layout=layout, **{"host_memory": HOST_MEMORY_NBYTES, **self.state.parts, **options}
        )
        self.state.advance(10)
        self.checkpointer.save(10).wait()

    def works_on(self, *kept: int) -> None:
        """`kept` are visible and load; a save works; nothing hidden is left after close."""
        assert visible_steps(self.root, self.layout) == list(kept)
        step = max(kept) + 5
        self.state.advance(step)
        self.checkpointer.save(step).wait()
        self.checkpointer.close()
        assert hidden_names(self.root) == []
        for number in (*kept, step):
            loads(self.root, self.layout, number)


def loads(root: Path, layout: str, step: int) -> None:
    state = StepState()
    with AsyncCheckpointer(root, layout=layout, read_only=True, **state.parts) as reader:
        assert reader.load(step).verified
    assert state.wrong(step) == []


@pytest.fixture
def run(tmp_path: Path, layout: str) -> Iterator[Run]:
    run = Run(tmp_path / "root", layout)
    yield run
    run.checkpointer.close()


# ---------------------------------------------------------------------------- the root


def refused(root: Path, *words: str) -> None:
    with pytest.raises(RootError) as caught:
        AsyncCheckpointer(root, **StepState().parts)
    for word in (str(root), *words):
        assert word in str(caught.value)


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    refused(tmp_path / "file", "not a directory")
    with pytest.raises(RootError, match="not a directory"):
        AsyncCheckpointer(tmp_path / "file" / "below", **StepState().parts)
    assert (tmp_path / "file").read_bytes() == b"precious"


def test_a_root_that_is_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "link", "not a directory")
    assert not (tmp_path / "nowhere").exists()


def test_a_root_where_nothing_can_be_made() -> None:
    refused(Path("/proc/self/checkpoints"), "not writable")  # not even root may


@contextmanager
def mounted(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount(8)")
    if done.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_root_on_a_read_only_filesystem(tmp_path: Path) -> None:
    with mounted(tmp_path / "mnt", "size=1m,ro") as path:
        refused(path, "not writable", "EROFS")
        refused(path / "below", "not writable", "EROFS")


def test_a_root_that_a_live_run_owns(warm: WarmProcess, tmp_path: Path, layout: str) -> None:
    run = Run(tmp_path, layout)
    with pytest.raises(RootBusyError, match="this very process"):
        AsyncCheckpointer(tmp_path, layout=layout, **StepState().parts)
    run.checkpointer.close()
    owner = warm.start("tests.crash_trainer:hold", root=str(tmp_path), layout=layout)
    owner.expect("holding 1")
    with pytest.raises(RootBusyError, match=rf"live run.*pid {owner.pid}\b.*stop it"):
        AsyncCheckpointer(tmp_path, layout=layout, **StepState().parts)
    loads(tmp_path, layout, 10)  # readers need no lease
    owner.kill()
    assert owner.finish() == -signal.SIGKILL
    state = StepState()
    with AsyncCheckpointer(tmp_path, layout=layout, **state.parts) as checkpointer:  # at once
        resume = checkpointer.load_latest()
        assert resume is not None
        assert resume.step == 10
        state.advance(20)
        checkpointer.save(20)
    loads(tmp_path, layout, 20)


# ---------------------------------------------------------------------------- step numbers and options


def test_step_numbers_that_cannot_be_saved(run: Run) -> None:
    cases: list[tuple[Any, type[CheckpointError], str]] = [
        (10, StepExistsError, "step 10 exists.*committed"),
        (-1, StepError, "step -1 is negative"),
        (9, StepError, "step 9 lies before step 10.*load an older step"),
        ("11", OptionError, "must be an int, got '11'"),
        (11.0, OptionError, "must be an int, got 11.0"),
        (True, OptionError, "must be an int, got True"),
        (None, OptionError, "must be an int, got None"),
        (10**18, StepError, "1000000000000000000"),  # no layout reads such a name back
    ]
    for step, kind, message in cases:
        with pytest.raises(kind, match=message):
            run.checkpointer.save(step)
    run.works_on(10)


def test_a_step_that_is_in_flight(run: Run) -> None:
    run.state.advance(20)
    faults.arm(faults.Op.fsync, 0, faults.Kind.pause)
    handle = run.checkpointer.save(20)
    with pytest.raises(StepExistsError, match="step 20 is in flight"):
        run.checkpointer.save(20)
    with pytest.raises(StepExistsError, match="comes after step 20"):
        run.checkpointer.save(15)
    faults.disarm()
    handle.wait()
    run.works_on(10, 20)


def test_a_step_that_is_not_there(run: Run) -> None:
    with pytest.raises(StepNotFoundError, match=r"no step 11.*there are: 10"):
        run.checkpointer.load(11)
    run.works_on(10)


@pytest.mark.parametrize(
    "options",
    [
        {"writers": 0},
        {"writers": 2.5},
        {"max_in_flight": 0},
        {"keep_last": 0},
        {"keep_last": -1},
        {"keep_every": 0},
        {"host_memory": 0},
        {"host_memory": 65535},
        {"host_memory": "1 GiB"},
        {"host_memory": 1 << 62},
        {"fence_timeout_s": 0},
        {"fence_timeout_s": math.nan},
        {"fence_timeout_s": "soon"},
        {"on_error": "ignore"},
        {"guard": "none"},
        {"when_busy": "drop"},
        {"pack": "sometimes"},
        {"pack": True},
        {"layout": "zip"},
        {"model": object()},
        {"optimizer": [object()]},
        {"extra": 7},
    ],
    ids=str,
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        AsyncCheckpointer(tmp_path / "root", **{**StepState().parts, **options})
    name = next(iter(options))
    assert name in str(caught.value)
    Run(tmp_path / "root", "dcp").checkpointer.close()  # the root is free


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nothing to save"):
        AsyncCheckpointer(tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_metadata_that_is_not_json(run: Run) -> None:
    for metadata in ({"x": object()}, {1: "x"}, {"x": (1, 2)}, {"x": math.nan}):
        with pytest.raises(OptionError, match="metadata is not JSON"):
            run.checkpointer.save(20, metadata=metadata)
    run.works_on(10)


def test_metadata_is_that_of_the_call(run: Run) -> None:
    run.state.advance(20)
    losses = [1.0]
    handle = run.checkpointer.save(20, metadata={"losses": losses})
    losses.append(2.0)
    handle.wait()
    assert run.checkpointer.load(20).metadata == {"losses": [1.0]}
    run.works_on(10, 20)


# ---------------------------------------------------------------------------- state that does not fit


class Small(torch.nn.Module):
    """What a checkpoint of `small(...)` is loaded into, shapes and names at choice."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))


def test_shapes_and_dtypes_that_differ_are_all_listed(tmp_path: Path, layout: str) -> None:
    saved = Small(a=torch.ones(2, 3), b=torch.ones(4), c=torch.ones(5), same=torch.ones(6))
    with AsyncCheckpointer(tmp_path, layout=layout, model=saved) as checkpointer:
        checkpointer.save(1)
    live = Small(
        a=torch.zeros(3, 2), b=torch.zeros(4, dtype=torch.float64), c=torch.zeros(()), same=torch.zeros(6)
    )
    with AsyncCheckpointer(tmp_path, layout=layout, model=live) as checkpointer:
        for strict in (True, False):
            with pytest.raises(MismatchError) as caught:
                checkpointer.load_latest(strict=strict)
            assert caught.value.differences == (
                "model.a: float32[3, 2] here, float32[2, 3] in the checkpoint",
                "model.b: float64[4] here, float32[4] in the checkpoint",
                "model.c: float32[] here, float32[5] in the checkpoint",
            )
            assert all(line in str(caught.value) for line in caught.value.differences)
        assert not live.same.any()  # nothing was touched
        checkpointer.save(2).wait()  # and nothing is in doubt


def test_missing_and_unexpected_keys(tmp_path: Path, layout: str) -> None:
    saved = Small(both=torch.ones(3), old1=torch.ones(2), old2=torch.ones(2))
    with AsyncCheckpointer(
        tmp_path, layout=layout, model=saved, extra={"kept": 1, "dropped": 2}
    ) as checkpointer:
        checkpointer.save(1)
    live = Small(both=torch.zeros(3), new1=torch.zeros(2), new2=torch.zeros(2))
    extra = {"kept": 0, "added": 9}
    with AsyncCheckpointer(tmp_path, layout=layout, model=live, extra=extra) as checkpointer:
        with pytest.raises(MismatchError) as caught:
            checkpointer.load_latest()
        assert sorted(caught.value.differences) == [
            "extra.added: not in the checkpoint",
            "extra.dropped: only in the checkpoint",
            "model.new1: not in the checkpoint",
            "model.new2: not in the checkpoint",
            "model.old1: only in the checkpoint",
            "model.old2: only in the checkpoint",
        ]
        assert not live.both.any()
        assert extra == {"kept": 0, "added": 9}
        resume = checkpointer.load_latest(strict=False)
        assert resume is not None
        assert bool(live.both.all())
        assert not live.new1.any()
        assert (extra["kept"], extra["added"]) == (1, 9)


def test_an_optimizer_over_other_parameters(tmp_path: Path, layout: str) -> None:
    saved = Small(a=torch.ones(3), b=torch.ones(2))
    with AsyncCheckpointer(
        tmp_path, layout=layout, model=saved, optimizer=torch.optim.SGD(saved.parameters(), lr=1.0)
    ) as checkpointer:
        checkpointer.save(1)
    live = Small(a=torch.ones(3), b=torch.ones(2))
    for optimizer, message in (
        (torch.optim.SGD([live.a], lr=1.0), r"param_groups\.0\.params: 1 here, 2 in the checkpoint"),
        (torch.optim.SGD([{"params": [live.a]}, {"params": [live.b]}], lr=1.0), "param_groups: 2 here, 1 in"),
    ):
        with (
            AsyncCheckpointer(tmp_path, layout=layout, model=live, optimizer=optimizer) as checkpointer,
            pytest.raises(MismatchError, match=message),
        ):
            checkpointer.load_latest()


def test_leaves_that_cannot_be_saved_are_named(run: Run) -> None:
    extra = run.state.extra
    for value in (lambda: None, open(os.devnull, "rb"), (x for x in ()), {"deep": [1, {2: lambda: None}]}):  # noqa: PTH123, SIM115
        extra["culprit"] = value
        with pytest.raises(LeafError, match=r"extra\.culprit"):
            run.checkpointer.save(20)
        if hasattr(value, "close"):
            value.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says on first use that quantisation is deprecated
        extra["culprit"] = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    with pytest.raises(LeafError, match=r"extra\.culprit.*(quant|qint8)"):
        run.checkpointer.save(20)
    del extra["culprit"]
    run.works_on(10)


def test_a_state_dict_that_raises(run: Run) -> None:
    run.state.dataloader.values = {"at": 10}

    def fail() -> dict[str, Any]:
        raise RuntimeError("the sampler is broken")

    run.state.dataloader.state_dict = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the sampler is broken"):
        run.checkpointer.save(20)
    del run.state.dataloader.state_dict
    run.works_on(10)


def test_numpy_integers_are_steps_and_floats_are_not(run: Run) -> None:
    for wrong in (np.float64(20), np.bool_(True), True, 20.0, "20"):
        with pytest.raises(OptionError, match="must be an int"):
            run.checkpointer.save(wrong)  # type: ignore[arg-type]
    run.checkpointer.save(np.int64(1000)).wait()  # type: ignore[arg-type]
    assert run.checkpointer.steps()[-1] == 1000


# ---------------------------------------------------------------------------- the operating system refuses

FAILURES = [
    ("open", 0, errno.EMFILE),
    ("allocate", 0, errno.ENOSPC),
    ("allocate", 0, errno.EDQUOT),
    ("pwrite", 0, errno.ENOSPC),
    ("pwrite", 7, errno.ENOSPC),
    ("pwrite", 3, errno.EIO),
    ("fsync", 0, errno.EIO),
    ("copy", 2, errno.EFAULT),
]


@pytest.mark.parametrize(("operation", "nth", "number"), FAILURES)
def test_a_failed_save_is_heard_and_the_next_one_works(
    run: Run, operation: str, nth: int, number: int
) -> None:
    op = getattr(faults.Op, operation)
    run.state.advance(20)
    faults.arm(op, nth, faults.Kind.error, number)
    handle = run.checkpointer.save(20)
    with pytest.raises(SaveError) as caught:
        handle.wait()
    assert faults.hits(op) == 1
    faults.disarm()
    if operation != "copy":
        assert isinstance(caught.value, WriteError)
        assert caught.value.errno == number
        assert ".asyncckpt-tmp-" in caught.value.path
        assert errno.errorcode[number] in str(caught.value)
        assert (caught.value.offset is not None) == (operation in ("pwrite", "open", "allocate"))
    if number in (errno.ENOSPC, errno.EDQUOT):
        assert "free space" in str(caught.value)
    assert handle.error is caught.value
    assert hidden_names(run.root) == []
    run.works_on(10)  # told once: save() does not raise it again


@pytest.mark.parametrize("ask", ["save", "wait", "close"])
def test_a_failure_that_nobody_asked_for_surfaces_at(run: Run, ask: str) -> None:
    faults.arm(faults.Op.fsync, 0, faults.Kind.error, errno.EIO)
    run.state.advance(20)
    handle = run.checkpointer.save(20)
    run.checkpointer.fence()
    handle._save.done.wait()
    faults.disarm()
    action = {
        "save": lambda: run.checkpointer.save(30),
        "wait": run.checkpointer.wait,
        "close": run.checkpointer.close,
    }
    with pytest.raises(WriteError, match=r"fsync failed.*EIO"):
        action[ask]()
    if ask == "close":
        run.checkpointer.close()  # it is closed all the same
        loads(run.root, run.layout, 10)
        Run(run.root.with_name("other"), run.layout).checkpointer.close()
    else:
        run.works_on(10)


def test_warn_goes_on_and_says_so(tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, layout, on_error="warn")
    faults.arm(faults.Op.pwrite, 0, faults.Kind.error, errno.ENOSPC)
    run.state.advance(20)
    handle = run.checkpointer.save(20)
    run.checkpointer.wait()
    faults.disarm()
    assert isinstance(handle.error, WriteError)
    assert any(
        "step 20 was not saved" in r.getMessage() and "ENOSPC" in r.getMessage() for r in caplog.records
    )
    run.works_on(10)


def test_failed_saves_leak_no_descriptors(tmp_path: Path, layout: str) -> None:
    """Several writers want the file that the first of them cannot create."""
    run = Run(tmp_path, layout, host_memory=1 << 20)

    def open_files() -> list[str]:
        names = (name for name in Path("/proc/self/fd").iterdir() if name.is_symlink())
        return [target for name in names if (target := str(name.readlink())).startswith(str(tmp_path))]

    before = open_files()
    for step in range(20, 40):
        faults.arm(faults.Op.open, 0, faults.Kind.pause)
        faults.arm(faults.Op.allocate, 0, faults.Kind.error, errno.ENOSPC)
        handle = run.checkpointer.save(step)
        assert faults.wait_for_hits(faults.Op.open, 1)
        run.checkpointer.fence()  # all chunks are with the writers
        faults.resume()
        with pytest.raises(WriteError, match="ENOSPC"):
            handle.wait()
        faults.disarm()
    assert open_files() == before
    run.works_on(10)


def test_a_disk_that_is_really_full(tmp_path: Path, layout: str) -> None:
    with mounted(tmp_path / "mnt", "size=1m") as root:
        run = Run(root, layout)
        saved = [10]
        with pytest.raises(WriteError) as caught:  # noqa: PT012 -- which of them fails is up to the disk
            while saved[-1] < 1000:
                run.state.advance(saved[-1] + 10)
                run.checkpointer.save(saved[-1] + 10).wait()
                saved.append(saved[-1] + 10)
        assert caught.value.errno == errno.ENOSPC
        assert "free space" in str(caught.value)
        assert hidden_names(root) == []
        for step in saved:
            loads(root, layout, step)
        for path in sorted(step_directory(root, layout, 10).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        step_directory(root, layout, 10).rmdir()
        run.works_on(*saved[1:])


def test_the_root_is_removed_under_a_run(run: Run) -> None:
    run.root.rename(run.root.with_name("moved"))
    run.state.advance(20)
    with pytest.raises(CheckpointError):
        run.checkpointer.save(20).wait()
    run.root.with_name("moved").rename(run.root)
    run.works_on(10)


# ---------------------------------------------------------------------------- the end, and children


def test_after_close(run: Run) -> None:
    checkpointer = run.checkpointer
    checkpointer.close()
    checkpointer.close()
    for use in (lambda: checkpointer.save(20), checkpointer.load_latest, lambda: checkpointer.load(10),
                checkpointer.steps, checkpointer.wait):  # fmt: skip
        with pytest.raises(ClosedError, match="was closed"):
            use()
    checkpointer.fence()
    run.state.advance(20)  # its hooks are gone too
    assert hidden_names(run.root) == []
    loads(run.root, run.layout, 10)


def test_a_save_finishes_while_the_next_waits_for_room(tmp_path: Path, layout: str) -> None:
    run = Run(tmp_path, layout, max_in_flight=1)
    run.state.advance(20)
    first = run.checkpointer.save(20)
    fence = run.checkpointer.fence

    def slow_fence(*, on_host: bool = True) -> None:
        fence(on_host=on_host)
        first._save.done.wait()  # the committer was faster than this thread

    run.checkpointer.fence = slow_fence  # type: ignore[method-assign]
    run.state.advance(30)
    run.checkpointer.save(30).wait()
    del run.checkpointer.fence
    run.works_on(10, 20, 30)


def test_a_forked_child_is_refused_and_disturbs_nothing(
    warm: WarmProcess, tmp_path: Path, layout: str
) -> None:
    child = warm.start("tests.crash_trainer:fork_in_flight", root=str(tmp_path), layout=layout)
    assert child.finish() == 0, child.lines
    names = ["save", "load_latest", "load", "steps", "wait", "handle"]
    assert child.lines[1:] == [
        *(f"refused {name}" for name in names),
        "worker done",
        "worker 0",
        "durable True",
    ]
    assert hidden_names(tmp_path) == []
    loads(tmp_path, layout, 1)


def test_read_only_saves_nothing(run: Run) -> None:
    with AsyncCheckpointer(run.root, layout=run.layout, read_only=True, **StepState().parts) as reader:
        with pytest.raises(RootError, match="read_only"):
            reader.save(20)
        assert reader.steps() == [10]
        assert reader.plans_made == 0
    run.works_on(10)


# ---------------------------------------------------------------------------- exit codes


def test_an_exception_in_the_block_is_not_masked(
    tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, layout)
    with pytest.raises(ZeroDivisionError), run.checkpointer:  # noqa: PT012 -- the block is what is tested
        faults.arm(faults.Op.fsync, 0, faults.Kind.error, errno.EIO)
        run.state.advance(20)
        run.checkpointer.save(20)
        raise ZeroDivisionError
    assert faults.hits(faults.Op.fsync) == 1
    assert any("fsync failed" in record.getMessage() for record in caplog.records)
    loads(tmp_path, layout, 10)


SCRIPT = """
    import errno, sys, torch
    from asyncckpt import AsyncCheckpointer
    from asyncckpt._native import faults
    c = AsyncCheckpointer(sys.argv[1], model=torch.nn.Linear(4, 4), on_error=sys.argv[2])
    c.save(1).wait()
    if sys.argv[3] == "fail":
        faults.arm(faults.Op.fsync, 0, faults.Kind.error, errno.EIO)
    c.save(2)
    print("done", flush=True)
"""


@pytest.mark.parametrize(
    ("on_error", "fate", "code"), [("raise", "fail", 70), ("warn", "fail", 0), ("raise", "succeed", 0)]
)
def test_exit_code_of_a_script_that_never_asks(tmp_path: Path, on_error: str, fate: str, code: int) -> None:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.fspath(Path(__file__).parents[1]), *filter(None, sys.path)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path), on_error, fate],
        env=env, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "done\n"), done.stderr
    assert visible_steps(tmp_path, "dcp") == ([1, 2] if fate == "succeed" else [1])
    assert hidden_names(tmp_path) == []
    assert ("fsync failed" in done.stderr and "EIO" in done.stderr) == (fate == "fail")
