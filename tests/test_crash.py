"""SIGKILL anywhere in a save: what is visible is whole, and the next run takes it from there."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncckpt import AsyncCheckpointer
from tests.crash_trainer import STRIDE
from tests.step_state import (
    HOST_MEMORY_NBYTES,
    LAYOUTS,
    TRACKER,
    StepState,
    hidden_names,
    visible_steps,
)
from tests.warm_process import WarmProcess

HITS = 5
TRAIN = "tests.crash_trainer:train"
BEFORE_RENAME = ("captured", "planned", "submitted", "released", "written", "checked", "manifest")
AFTER_RENAME = ("renamed", "durable", "tracked", "retained")


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmProcess]:
    with WarmProcess("tests.crash_trainer") as process:
        yield process


def check_visible(root: Path, layout: str) -> list[int]:
    """Every visible step loads, verified, with the values of its number; so does what a tool would pick."""
    steps = visible_steps(root, layout)
    state = StepState()
    with AsyncCheckpointer(root, layout=layout, read_only=True, **state.parts) as reader:
        for step in steps:
            assert reader.load(step).verified
            assert state.wrong(step) == []
    if layout == "megatron" and (root / TRACKER).exists():
        assert int((root / TRACKER).read_bytes()) in steps
    return steps


def next_run(root: Path, layout: str, save: int | None = None) -> int | None:
    """Take over, load the latest, check it, save one more; returns the step that was found."""
    steps = check_visible(root, layout)
    state = StepState()
    options = {"layout": layout, "host_memory": HOST_MEMORY_NBYTES, "keep_last": 4}
    with AsyncCheckpointer(root, **options, **state.parts) as checkpointer:
        resume = checkpointer.load_latest()
        assert (resume.step if resume else None) == (max(steps) if steps else None)
        if resume is not None:
            assert resume.verified
            assert resume.passed_over == ()
            assert state.wrong(resume.step) == []
        found = resume.step if resume else 0
        state.advance(found + STRIDE if save is None else save)
        report = checkpointer.save(found + STRIDE if save is None else save).wait()
        assert report.durable_s is not None
    assert hidden_names(root) == []
    return resume.step if resume else None


def with_layouts(*phases: str) -> list[tuple[str, str]]:
    return [(p, layout) for p in phases for layout in LAYOUTS if (p, layout) != ("tracked", "dcp")]


@pytest.mark.parametrize(("phase", "layout"), with_layouts(*BEFORE_RENAME, *AFTER_RENAME))
def test_killed_at_a_phase(warm: WarmProcess, tmp_path: Path, layout: str, phase: str) -> None:
    hits = 0
    for _ in range(HITS):
        child = warm.start(
            TRAIN, root=str(tmp_path), layout=layout, saves=4, kill_phase=(2, phase), keep_last=2
        )
        base = int(child.expect("resumed").split()[1])
        assert child.finish() == -signal.SIGKILL, child.lines[-5:]
        killed = base + 3 * STRIDE
        assert child.lines.count(f"phase {killed} {phase}") == 1
        hits += 1
        found = next_run(tmp_path, layout)
        if phase in AFTER_RENAME:
            assert found == killed
        elif phase in ("captured", "planned", "submitted"):  # the save before may still be in flight
            assert found in (killed - 2 * STRIDE, killed - STRIDE)
        else:
            assert found == killed - STRIDE
    assert hits == HITS


@pytest.mark.parametrize(("phase", "layout"), with_layouts("manifest", "abandoned", *AFTER_RENAME[:3]))
def test_killed_while_a_timeline_is_left(warm: WarmProcess, tmp_path: Path, layout: str, phase: str) -> None:
    next_run(tmp_path, layout)
    hits = 0
    for _ in range(HITS):
        target = visible_steps(tmp_path, layout)[-1]
        for _ in range(2):
            next_run(tmp_path, layout)
        child = warm.start(
            TRAIN, root=str(tmp_path), layout=layout, saves=1, back_to=target, kill_phase=(0, phase)
        )
        assert child.finish() == -signal.SIGKILL, child.lines[-5:]
        assert child.lines[-1] == f"phase {target + STRIDE} {phase}"
        hits += 1
        expected = {"manifest": target + 2 * STRIDE, "abandoned": target}.get(phase, target + STRIDE)
        assert next_run(tmp_path, layout) == expected
    assert hits == HITS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("operation", "at"),
    [
        ("open", (0, 0, 0, 0, 0)),
        ("allocate", (0, 0, 0, 0, 0)),
        ("copy", (0, 1, 5, 9, 12)),
        ("pwrite", (0, 1, 7, 13, 19)),
        ("fsync", (0, 0, 0, 0, 0)),
    ],
)
def test_killed_in_the_engine(
    warm: WarmProcess, tmp_path: Path, layout: str, operation: str, at: tuple[int, ...]
) -> None:
    next_run(tmp_path, layout)
    last = {"open": 1, "allocate": 1, "fsync": 1} if layout == "dcp" else {}  # dcp writes a second file
    hits = 0
    for number, nth in enumerate(at):
        nth = last.get(operation, nth) if number % 2 else nth  # noqa: PLW2901
        child = warm.start(
            TRAIN, root=str(tmp_path), layout=layout, saves=2, kill_operation=(1, operation, nth), keep_last=3
        )
        base = int(child.expect("resumed").split()[1])
        assert child.finish() == -signal.SIGKILL, child.lines[-5:]
        assert f"armed {operation} {nth}" in child.lines
        assert f"phase {base + 2 * STRIDE} written" not in child.lines
        hits += 1
        assert next_run(tmp_path, layout) == base + STRIDE
    assert hits == HITS


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_random(warm: WarmProcess, tmp_path: Path, layout: str) -> None:
    rng = random.Random(20240 + len(layout))
    hits, phases_before_death = 0, set()
    for _ in range(25):
        steps = visible_steps(tmp_path, layout)
        back_to = rng.choice(steps) if steps and rng.random() < 0.4 else None
        child = warm.start(
            TRAIN, root=str(tmp_path), layout=layout, saves=10_000, back_to=back_to, keep_last=4
        )
        child.expect("resumed")
        for _ in range(rng.randrange(60)):
            assert child.next_line() is not None
        child.kill()
        assert child.finish() == -signal.SIGKILL
        assert not any(line.startswith(("wrong", "survived")) for line in child.lines)
        hits += 1
        phases_before_death.add(child.lines[-1].split()[-1])
        next_run(tmp_path, layout)
    assert hits == 25
    assert len(phases_before_death) >= 4  # the moments did differ
