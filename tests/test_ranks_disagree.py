"""Ranks that see different disks, fail alone, or are taken for dead and are not: all come to one end."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from asyncckpt import AsyncCheckpointer, _native, checkpointer
from asyncckpt.commit import CheckpointRoot
from asyncckpt.errors import CheckpointError, WriteError
from asyncckpt.filesystem import Filesystem
from tests.process_world import Rank, Talk, World, process_world

SILENCE_S = 1.0


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


def checkpointer_of(root: Path, **options: Any) -> AsyncCheckpointer:
    defaults = {"host_memory": 1 << 20, "rank_timeout_s": 20, "fence_timeout_s": 30}
    return AsyncCheckpointer(root, **{**defaults, **options})


def kind_of(act: Any) -> str:
    try:
        act()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


# ---------------------------------------------------------------------------- disks


def save_on_own_disk(talk: Talk, rank: int, base: Path) -> str:
    """The same path, but a directory of each rank's own behind it, as on node-local disks."""
    named = checkpointer.ranks_of
    checkpointer.ranks_of = (
        lambda *args, **options: named(  # type: ignore[assignment]
            *args[:2], "one name", **options
        )
    )
    root = base / str(rank)
    root.mkdir()
    return kind_of(lambda: checkpointer_of(root, model=nn.Linear(2, 2)).save(1).wait())


def test_disks_that_are_not_shared_are_refused_at_once(world: World, tmp_path: Path) -> None:
    first, second = world.run(2, save_on_own_disk, tmp_path)
    assert first.startswith("RankError: rank 1 cannot take part: ")
    assert second.startswith("RootError: ")
    assert "ranks need a filesystem that they share" in first
    assert "ranks need a filesystem that they share" in second
    assert not list(tmp_path.glob("*/step-*"))


def lose_a_fragment(talk: Talk, rank: int, root: Path) -> str:
    """Rank 1's fragment is not there when rank 0 looks, although it has voted."""
    with checkpointer_of(root, model=nn.Linear(2, 2), on_error="warn") as ckpt:
        if rank == 1:
            plain = Filesystem.write_file

            def elsewhere(self: Filesystem, path: Path, data: bytes) -> None:
                plain(self, path.with_name(path.name + ".elsewhere"), data)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Filesystem, "write_file", elsewhere)
                return kind_of(lambda: ckpt.save(1).wait())
        return kind_of(lambda: ckpt.save(1).wait())


def test_what_rank_0_does_not_see_is_not_published(world: World, tmp_path: Path) -> None:
    first, second = world.run(2, lose_a_fragment, tmp_path)
    assert "which another rank wrote, is not there" in first
    assert "which another rank wrote, is not there" in second
    assert not [path for path in tmp_path.iterdir() if path.name[0] != "."]


# ---------------------------------------------------------------------------- failing alone


def fail_twice_and_go_on(talk: Talk, rank: int, root: Path) -> list[str]:
    """Saves 1 and 2 fail on rank 1, one on the disk and one before it could begin; what each call gives."""
    said = []
    state = {"w": torch.zeros(1000)}
    ckpt = checkpointer_of(root, extra=state)
    for call in range(1, 7):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1 and call == 1:
                _native.faults.arm(_native.faults.Op.pwrite, 0, _native.faults.Kind.error, errno.EIO)
            if rank == 1 and call == 2:
                patch.setattr(CheckpointRoot, "begin", _refuse)
            said.append(kind_of(lambda call=call: ckpt.save(call)))
        ckpt.fence()
    said.append(kind_of(ckpt.close))
    _native.faults.disarm()
    return said


def _refuse(self: CheckpointRoot, *args: Any, **options: Any) -> None:
    raise WriteError("mkdir", str(self.path), errno.EACCES)


def test_failures_surface_at_one_call_also_after_one_has(world: World, tmp_path: Path) -> None:
    outcomes = world.run(3, fail_twice_and_go_on, tmp_path)
    for said in outcomes:
        assert [word == "ok" for word in said] == [True, True, False, False, True, True, True]
    for call, cause in ((2, "EIO"), (3, "EACCES")):
        assert outcomes[1][call].startswith("WriteError: ")
        for said in (outcomes[0], outcomes[2]):
            assert said[call].startswith("RankError: ")
            assert cause in said[call]
            assert "rank 1" in said[call]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["step-5", "step-6"]


class Picky:
    """A sampler that does not always take its state back."""

    refuses = False

    def state_dict(self) -> dict[str, int]:
        return {"x": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if self.refuses:
            raise RuntimeError("the list of shards is gone")


def load_with_a_sampler_that_refuses(talk: Talk, rank: int, root: Path) -> list[str]:
    sampler = Picky()
    with checkpointer_of(root, model=nn.Linear(2, 2), dataloader=sampler) as ckpt:
        ckpt.save(1).wait()
        sampler.refuses = rank == 1
        said = []
        for act in (ckpt.load_latest, lambda: ckpt.save(2)):
            try:
                act()
                said.append("ok")
            except (CheckpointError, RuntimeError) as error:
                said.append(f"{type(error).__name__}: {error}")
        sampler.refuses = False
        said += [kind_of(ckpt.load_latest), kind_of(lambda: ckpt.save(3).wait())]
    return said


def test_all_load_or_none_also_when_a_sampler_refuses(world: World, tmp_path: Path) -> None:
    outcomes = world.run(2, load_with_a_sampler_that_refuses, tmp_path)
    assert outcomes[0][0] == "RankError: rank 1 could not load: the list of shards is gone"
    assert outcomes[1][0] == "RuntimeError: the list of shards is gone"
    for said in outcomes:
        assert "until a load succeeds" in said[1]
        assert said[2:] == ["ok", "ok"]


# ---------------------------------------------------------------------------- slow, not dead


def save_slowly(talk: Talk, rank: int, root: Path, trap: str) -> str:
    def on_phase(step: int, phase: str) -> None:
        if rank == 0 and phase == trap:
            talk.say("trapped")
            talk.listen()

    with checkpointer_of(
        root, model=nn.Linear(2, 2), rank_timeout_s=SILENCE_S, on_phase=on_phase, on_error="warn"
    ) as ckpt:
        handle = ckpt.save(1)
        said = kind_of(handle.wait)
        if rank:
            talk.say("heard")
        return said


def test_rank_0_does_not_publish_what_others_gave_up(world: World, tmp_path: Path) -> None:
    ranks = world.start(3, save_slowly, tmp_path, "voted")
    ranks[0].hear("trapped")
    ranks[0].stop()
    for rank in ranks[1:]:
        rank.hear("heard")
    _go_on(ranks[0])
    outcomes = [rank.hear() for rank in ranks]
    assert "another rank took rank 0 for dead" in outcomes[0]
    for said in outcomes[1:]:
        assert "rank 0 shows no sign of life" in said
    assert not (tmp_path / "step-1").exists()


def _go_on(rank: Rank) -> None:
    rank.pipe.send("go on")
    os.kill(rank.process.pid, signal.SIGCONT)


# ---------------------------------------------------------------------------- leaving


def read_and_leave(talk: Talk, rank: int, root: Path) -> int:
    with checkpointer_of(root, model=nn.Linear(2, 2)) as ckpt:
        ckpt.save(1).wait()
    before = threading.active_count()
    for _ in range(3):
        reader = checkpointer_of(root, model=nn.Linear(2, 2), read_only=True)
        reader.load_latest()
        reader.close()
    return threading.active_count() - before


def test_readers_leave_nothing_behind(world: World, tmp_path: Path) -> None:
    assert world.run(2, read_and_leave, tmp_path) == [0, 0]
