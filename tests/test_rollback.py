"""Going back behind saved steps: the new timeline wins everywhere, at once, and through every crash."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncckpt import AsyncCheckpointer
from asyncckpt.errors import StepError, StepExistsError
from tests.crash_trainer import STRIDE
from tests.step_state import (
    DATA_FILE,
    HOST_MEMORY_NBYTES,
    LAYOUTS,
    TRACKER,
    StepState,
    hidden_names,
    step_directory,
    visible_steps,
)
from tests.warm_process import WarmProcess

OLD, NEW = "old", "new"
OLD_STEPS = tuple(range(50, 650, 50))


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmProcess]:
    with WarmProcess("tests.crash_trainer") as process:
        yield process


def open_root(root: Path, layout: str, state: StepState, **options: Any) -> AsyncCheckpointer:
    return AsyncCheckpointer(root, layout=layout, host_memory=HOST_MEMORY_NBYTES, **options, **state.parts)


def save(checkpointer: AsyncCheckpointer, state: StepState, run: str, *steps: int) -> None:
    for step in steps:
        state.advance(step, run)
        checkpointer.save(step, metadata={"run": run})
    checkpointer.wait()


def save_old(root: Path, layout: str, *steps: int) -> None:
    state = StepState()
    with open_root(root, layout, state) as checkpointer:
        save(checkpointer, state, OLD, *steps)


def damage(root: Path, layout: str, *steps: int) -> None:
    for step in steps:
        path = step_directory(root, layout, step) / DATA_FILE[layout]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)


def resumes_at(root: Path, layout: str, step: int, run: str) -> None:
    state = StepState()
    with open_root(root, layout, state, read_only=True) as reader:
        resume = reader.load_latest()
    assert resume is not None
    assert (resume.step, resume.metadata, resume.passed_over) == (step, {"run": run}, ())
    assert state.wrong(step, run) == []


def tracked(root: Path) -> int:
    return int((root / TRACKER).read_bytes())


@pytest.mark.parametrize("why", ["damaged", "asked for"])
def test_the_new_timeline_is_followed(tmp_path: Path, layout: str, why: str) -> None:
    save_old(tmp_path, layout, *OLD_STEPS)
    state = StepState()
    with open_root(tmp_path, layout, state) as checkpointer:
        if why == "damaged":
            damage(tmp_path, layout, 450, 500, 550, 600)
            resume = checkpointer.load_latest()
            assert resume is not None
            assert [text.split(":")[0] for text in resume.passed_over] == [
                f"step {s}" for s in (600, 550, 500, 450)
            ]
        else:
            resume = checkpointer.load(400)
        assert resume.step == 400
        assert state.wrong(400, OLD) == []
        assert visible_steps(tmp_path, layout) == list(
            OLD_STEPS
        )  # nothing goes before something new is there
        save(checkpointer, state, NEW, 450)
        assert visible_steps(tmp_path, layout)[-2:] == [400, 450]
        resumes_at(tmp_path, layout, 450, NEW)
        with pytest.raises(StepExistsError, match="450"):
            checkpointer.save(450)
        with pytest.raises(StepError, match="before step 450"):
            checkpointer.save(425)
        save(checkpointer, state, NEW, 500)
    assert visible_steps(tmp_path, layout)[-3:] == [400, 450, 500]
    if layout == "megatron":
        assert tracked(tmp_path) == 500
    resumes_at(tmp_path, layout, 500, NEW)

    damage(tmp_path, layout, 500)  # then the next best is of the new timeline too
    with open_root(tmp_path, layout, state) as checkpointer:
        resume = checkpointer.load_latest()
    assert resume is not None
    assert resume.step == 450
    assert state.wrong(450, NEW) == []


def test_retention_goes_by_the_order_of_commits(tmp_path: Path, layout: str) -> None:
    save_old(tmp_path, layout, *OLD_STEPS)
    state = StepState()
    with open_root(tmp_path, layout, state, keep_last=2) as checkpointer:
        checkpointer.load(100)
        save(checkpointer, state, NEW, 110)
        assert visible_steps(tmp_path, layout) == [100, 110]  # 600 is higher, and gone
        save(checkpointer, state, NEW, 120, 130)
        assert visible_steps(tmp_path, layout) == [100, 120, 130]  # 100 is where this run came from
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".abandoned-")]
    assert hidden_names(tmp_path) == []
    if layout == "megatron":
        assert tracked(tmp_path) == 130
    resumes_at(tmp_path, layout, 130, NEW)


def test_going_back_twice(tmp_path: Path, layout: str) -> None:
    save_old(tmp_path, layout, 50, 100, 150)
    state = StepState()
    with open_root(tmp_path, layout, state) as checkpointer:
        checkpointer.load(100)
        save(checkpointer, state, NEW, 150, 200)
        checkpointer.load(50)
        assert state.wrong(50, OLD) == []
        save(checkpointer, state, "third", 60)
    assert visible_steps(tmp_path, layout) == [50, 60]
    resumes_at(tmp_path, layout, 60, "third")


def test_a_loader_without_the_lease_changes_nothing(tmp_path: Path, layout: str) -> None:
    save_old(tmp_path, layout, 50, 100)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    state = StepState()
    with open_root(tmp_path, layout, state, read_only=True) as reader:
        assert reader.load(50).step == 50
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    resumes_at(tmp_path, layout, 100, OLD)


def test_going_back_and_dying_before_a_save_changes_nothing(tmp_path: Path, layout: str) -> None:
    save_old(tmp_path, layout, 50, 100)
    state = StepState()
    with open_root(tmp_path, layout, state) as checkpointer:
        checkpointer.load(50)
    resumes_at(tmp_path, layout, 100, OLD)


SWITCH = {
    "dcp": [*(("abandon", step) for step in (450, 500, 550, 600)), ("publish", 410)],
    "megatron": [
        ("tracker", 400),
        *(("abandon", step) for step in (450, 500, 550, 600)),
        ("publish", 410),
        ("tracker", 410),
    ],
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("layout", "at"), [(name, at) for name in LAYOUTS for at in range(len(SWITCH[name]))]
)
def test_killed_at_every_rename_of_the_switch(
    warm: WarmProcess, tmp_path: Path, layout: str, at: int, after: bool
) -> None:
    save_old(tmp_path, layout, 350, 400, 450, 500, 550, 600)
    child = warm.start(
        "tests.crash_trainer:train", root=str(tmp_path), layout=layout, saves=1, back_to=400,
        run=NEW, resumed_run=OLD, kill_rename=(at, after),
    )  # fmt: skip
    assert child.finish() == -signal.SIGKILL, child.lines[-3:]
    assert f"rename {at}" in child.lines

    done = SWITCH[layout][: at + after]
    published = ("publish", 410) in done
    gone = [step for kind, step in done if kind == "abandon"]
    left = [step for step in (450, 500, 550, 600) if step not in gone]
    assert visible_steps(tmp_path, layout) == sorted([350, 400, *left, *([410] if published else [])])
    if layout == "megatron":
        assert tracked(tmp_path) in visible_steps(tmp_path, layout)
    if published:
        resumes_at(tmp_path, layout, 400 + STRIDE, NEW)
    else:
        resumes_at(tmp_path, layout, 600 if left else 400, OLD)

    state = StepState()  # whoever comes next can go back again and finish
    with open_root(tmp_path, layout, state) as checkpointer:
        checkpointer.load(400)
        save(checkpointer, state, "third", 410)
    assert hidden_names(tmp_path) == []
    assert visible_steps(tmp_path, layout) == [350, 400, 410]
    resumes_at(tmp_path, layout, 410, "third")
    if layout == "megatron":
        assert tracked(tmp_path) == 410
