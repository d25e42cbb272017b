"""One of four ranks dies, stops or has a full disk: the others raise at one call, and nothing is lost."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from asyncckpt import AsyncCheckpointer, _native
from asyncckpt.errors import CheckpointError, LeafError, RankError
from tests.process_world import Talk, World, process_world

RANKS = 4
SILENCE_S = 1.0


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


def model_of(step: int) -> nn.Linear:
    model = nn.Linear(64, 64)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(step)
    return model


def checkpointer_of(root: Path, model: nn.Module, **options: Any) -> AsyncCheckpointer:
    return AsyncCheckpointer(
        root, model=model, host_memory=1 << 20, rank_timeout_s=SILENCE_S, fence_timeout_s=30, **options
    )


def save_three_times(
    talk: Talk, rank: int, root: Path, victim: int, trap: str
) -> tuple[int, str, str] | None:
    """Saves 1 to 3; save 2 goes wrong on the victim. At which call who heard of it, and what."""
    model = model_of(1)

    def on_phase(step: int, phase: str) -> None:
        if rank == victim and step == 2 and phase == trap:
            talk.say("trapped")
            talk.listen()  # for ever: what comes is a signal

    # One in flight: whatever becomes of a save surfaces at the next call.
    checkpointer = checkpointer_of(root, model, on_phase=on_phase, max_in_flight=1)
    checkpointer.save(1).wait()
    if rank == victim and trap == "full disk":
        _native.faults.arm(_native.faults.Op.pwrite, 0, _native.faults.Kind.error, errno.ENOSPC)
    call = 1
    try:
        for call in (2, 3):
            checkpointer.fence()
            with torch.no_grad():
                for param in model.parameters():
                    param.fill_(call)
            checkpointer.save(call)
        checkpointer.wait()
    except CheckpointError as error:
        return call, type(error).__name__, str(error)
    finally:
        _native.faults.disarm()
        try:
            checkpointer.close()
        except RankError:
            pass  # of save 3, where that fails too
    return None


def resume(talk: Talk, rank: int, root: Path) -> tuple[int, float]:
    model = model_of(0)
    with checkpointer_of(root, model) as checkpointer:
        found = checkpointer.load_latest()
        assert found is not None
        assert {v for p in model.parameters() for v in p.flatten().tolist()} == {float(found.step)}
        checkpointer.save(found.step + 10)
    return found.step, model.weight[0, 0].item()


# Each phase of one rank or another; the last two of rank 0 are after the rename.
CASES = [
    *[(2, phase, "kill") for phase in ("captured", "submitted", "voted")],
    *[(0, phase, "kill") for phase in ("planned", "checked", "voted", "manifest", "renamed", "durable")],
    (0, "voted", "stop"),
    (3, "checked", "stop"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "trap", "how"), CASES)
def test_the_others_raise_at_the_same_call_and_a_restart_goes_on(
    world: World, tmp_path: Path, victim: int, trap: str, how: str
) -> None:
    ranks = world.start(RANKS, save_three_times, tmp_path, victim, trap)
    ranks[victim].hear("trapped")
    seen = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert seen <= {"step-1", "step-2"}
    if how == "kill":
        ranks[victim].kill()
    else:
        ranks[victim].stop()
    outcomes = [rank.hear() for index, rank in enumerate(ranks) if index != victim]
    ranks[victim].kill()

    whole = victim == 0 and trap in ("renamed", "durable")  # then the step is there, although nobody says so
    voted = victim != 0 and trap == "voted"  # then the victim is missing from save 3
    for call, kind, text in outcomes:
        assert kind == "RankError"
        assert f"rank {victim} shows no sign of life" in text
        assert call == 3  # the next call; or the wait() after it
    newest = 2 if whole or voted else 1
    assert world.run(RANKS, resume, tmp_path) == [(newest, float(newest))] * RANKS


@pytest.mark.parametrize("victim", [0, 2])
def test_a_full_disk_on_one_rank_is_heard_by_all(world: World, tmp_path: Path, victim: int) -> None:
    outcomes = world.run(RANKS, save_three_times, tmp_path, victim, "full disk")
    for rank, (call, kind, text) in enumerate(outcomes):
        assert call == 3
        assert kind == ("WriteError" if rank == victim else "RankError")
        assert "ENOSPC" in text
        assert rank == victim or f"rank {victim}" in text
    assert world.run(RANKS, resume, tmp_path) == [(1, 1.0)] * RANKS


def save_something_else(talk: Talk, rank: int, root: Path, what: str) -> list[tuple[str, str]]:
    """Rank 1 does not do what the others do in its second save; what each hears."""
    odd = rank == 1
    model = model_of(1)
    extra: dict[str, Any] = {"a": torch.ones(3), "b": 1}
    heard: list[tuple[str, str]] = []

    def note(error: CheckpointError) -> None:
        heard.append((type(error).__name__, str(error)))

    checkpointer = AsyncCheckpointer(
        root, model=model, extra=extra, host_memory=1 << 20, rank_timeout_s=20, fence_timeout_s=30
    )
    checkpointer.save(1).wait()
    if odd and what == "structure":
        extra["a"] = torch.ones(4)
    if odd and what == "leaf":
        extra["b"] = lambda: None
    if odd and what == "missing":
        del extra["b"]
    try:
        checkpointer.save(7 if odd and what == "step" else 5)
    except LeafError as error:
        note(error)
    try:
        checkpointer.wait()
    except CheckpointError as error:
        note(error)
    extra.update(a=torch.ones(3), b=1)
    checkpointer.save(9).wait()
    checkpointer.close()
    return heard


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("step", "rank 1 saves step 7 where rank 0 saves step 5"),
        ("structure", "the state of rank 1 has another structure than that of rank 0"),
        ("missing", "the state of rank 1 has another structure than that of rank 0"),
        ("leaf", "rank 1: extra.b"),
    ],
)
def test_ranks_that_save_different_things_are_told(
    world: World, tmp_path: Path, what: str, words: str
) -> None:
    outcomes = world.run(3, save_something_else, tmp_path, what)
    for rank, heard in enumerate(outcomes):
        assert words in heard[-1][1] or (rank == 1 and what == "leaf" and "extra.b" in heard[-1][1])
        assert heard[0][0] == ("LeafError" if rank == 1 and what == "leaf" else "RankError")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["step-1", "step-9"]
