"""Files that two ranks each write together, while one of them dies, stops, or cannot write or read.

Ranks 0 and 2 write the file that rank 0 closes, ranks 1 and 3 the one that rank 1 closes.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncckpt import AsyncCheckpointer
from asyncckpt.errors import CheckpointError, RankError
from asyncckpt.filesystem import Filesystem
from asyncckpt.layouts.megatron import ModelRank
from asyncckpt.sections import Section
from asyncckpt.shared import SHARED_BRANCH, SharedFile, SlicedTensor
from asyncckpt.tree import Matching
from tests.process_world import Rank, Talk, World, process_world

RANKS = 4
SILENCE_S = 1.0
SIZE = 150_001  # odd: the two ranks of a file meet within a block


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


class Half:
    """A flat tensor of which this rank has one half; every element is the step."""

    def __init__(self, rank: int, step: int) -> None:
        self.closer = rank % 2
        cut = SIZE // 2
        self.slices = np.array([[0, cut, self.closer], [cut, SIZE, self.closer + 2]], np.int64)
        begin, end = (0, cut) if rank == self.closer else (cut, SIZE)
        self.begin, self.piece = begin, torch.full((end - begin,), float(step))

    @property
    def path(self) -> str:
        return f"mp_rank_0{self.closer}/distrib_optim.pt"

    def sections(self) -> Mapping[str, Section]:
        return {SHARED_BRANCH: self}

    def optimizers(self) -> list[Any]:
        return []

    def paths(self) -> tuple[str, ...]:
        return (self.path,)

    def capture(self) -> list[SharedFile]:
        sliced = SlicedTensor(torch.float32, (SIZE,), self.slices, ((self.begin, self.piece),))
        return [SharedFile(self.path, self.closer, {"param": sliced})]

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        matching.into_slice(name, stored[self.path]["param"], self.begin, self.piece)


def checkpointer_of(root: Path, rank: int, half: Half, **options: Any) -> AsyncCheckpointer:
    return AsyncCheckpointer(
        root,
        optimizer=half,
        model=torch.nn.Linear(3, 3),
        layout="megatron",
        model_rank=ModelRank(tensor=rank % 2, tensor_size=2, writes_model=rank < 2),
        **{"rank_timeout_s": SILENCE_S, "fence_timeout_s": 30, "host_memory": 1 << 20, **options},
    )


def observe(checkpointer: AsyncCheckpointer, observer: Callable[[str, str], None]) -> None:
    """What the committer does to the disk from now on."""
    checkpointer._root.fs = Filesystem(observer)


def is_closing(op: str, path: str, step: int) -> bool:
    return op == "write" and path.endswith("distrib_optim.pt") and f"iter_{step:07d}" in path


Heard = tuple[int, str, str]  # at which call, which class, what it says


def save_three_times(talk: Talk, rank: int, root: Path, traps: Mapping[int, str]) -> Heard | None:
    """Saves 1 to 3. In save 2 each rank of `traps` says where it is, and waits for a word."""
    half = Half(rank, 1)
    trap = traps.get(rank)

    def reached(step: int, where: str) -> None:
        if step == 2 and where == trap:
            talk.say(where)
            talk.listen()

    checkpointer = checkpointer_of(root, rank, half, max_in_flight=1, on_phase=reached)
    take_over = checkpointer._ranks.take_over

    def take_over_slowly(save: int, others: Any) -> dict[int, bytes]:
        reached(save, "takes over")
        return take_over(save, others)

    checkpointer._ranks.take_over = take_over_slowly  # type: ignore[method-assign]
    observe(checkpointer, lambda op, path: reached(2, "closes") if is_closing(op, path, 2) else None)
    checkpointer.save(1).wait()
    call = 1
    try:
        for call in (2, 3):
            checkpointer.fence()
            half.piece.fill_(call)
            checkpointer.save(call)
        checkpointer.wait()
    except CheckpointError as error:
        return call, type(error).__name__, str(error)
    finally:
        try:
            checkpointer.close()
        except RankError:
            pass  # of save 3, where that fails too
    return None


def resume(talk: Talk, rank: int, root: Path) -> tuple[int, set[float], list[str]]:
    """The step, what this rank has of it, and what is hidden after a save that follows."""
    half = Half(rank, 0)
    with checkpointer_of(root, rank, half, rank_timeout_s=30) as checkpointer:
        found = checkpointer.load_latest()
        assert found is not None
        assert found.verified
        values = set(half.piece.tolist())
        checkpointer.save(found.step + 10).wait()
    return found.step, values, sorted(path.name for path in root.rglob("*.edges_*"))


def check_resumes(world: World, root: Path, step: int) -> None:
    assert world.run(RANKS, resume, root) == [(step, {float(step)}, [])] * RANKS
    hidden = {path.name for path in root.iterdir() if path.name.startswith(".asyncckpt-t")}
    assert not hidden
    whole = torch.load(root / f"iter_{step + 10:07d}" / "mp_rank_01/distrib_optim.pt", weights_only=True)
    assert set(whole["param"].tolist()) == {float(step)}


# Who is caught where: of a contributor and of both closers, each side of the hand-over.
CASES = [
    (3, "submitted", "kill"),
    (3, "checked", "stop"),
    (0, "takes over", "kill"),
    (0, "closes", "stop"),
    (0, "closed", "kill"),
    (1, "takes over", "stop"),
    (1, "closes", "kill"),
    (1, "voted", "kill"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "trap", "how"), CASES)
def test_a_dead_rank_is_named_by_all_at_one_call_and_a_restart_goes_on(
    world: World, tmp_path: Path, victim: int, trap: str, how: str
) -> None:
    ranks = world.start(RANKS, save_three_times, tmp_path, {victim: trap})
    ranks[victim].hear(trap)
    if how == "kill":
        ranks[victim].kill()
    else:
        ranks[victim].stop()
    heard = [rank.hear() for index, rank in enumerate(ranks) if index != victim]
    for call, kind, text in heard:
        assert (call, kind) == (3, "RankError")
        assert f"rank {victim} shows no sign of life" in text
    voted = trap == "voted"  # then the victim is missing from save 3
    assert {path.name for path in tmp_path.glob("iter_*")} == {"iter_0000001", *["iter_0000002"] * voted}
    ranks[victim].kill()
    check_resumes(world, tmp_path, 2 if voted else 1)


def let_go(rank: Rank) -> None:
    rank.pipe.send("go on")


def test_a_closer_that_dies_while_it_waits_for_a_rank_that_is_slow(world: World, tmp_path: Path) -> None:
    ranks = world.start(RANKS, save_three_times, tmp_path, {1: "takes over", 3: "checked"})
    ranks[1].hear("takes over")
    ranks[3].hear("checked")
    ranks[1].kill()
    let_go(ranks[3])
    for index in (0, 2, 3):
        call, kind, text = ranks[index].hear()
        assert (call, kind) == (3, "RankError")
        assert "rank 1 shows no sign of life" in text
    check_resumes(world, tmp_path, 1)


def test_a_closer_that_wakes_up_when_all_is_over_changes_nothing(world: World, tmp_path: Path) -> None:
    ranks = world.start(RANKS, save_three_times, tmp_path, {1: "closes"})
    ranks[1].hear("closes")
    ranks[1].stop()
    for index in (0, 2, 3):
        assert ranks[index].hear()[:2] == (3, "RankError")
    check_resumes(world, tmp_path, 1)
    ranks[1].wake()
    let_go(ranks[1])
    call, kind, text = ranks[1].hear()
    assert (call, kind) == (3, "RankError")
    assert "rank 1 shows no sign of life" in text
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".asyncckpt-tmp")]
    assert {path.name for path in tmp_path.glob("iter_*")} == {"iter_0000001", "iter_0000011"}


def refuse(number: int) -> Callable[[str], None]:
    def do(path: str) -> None:
        raise OSError(number, "refused")

    return do


def vanish(path: str) -> None:
    Path(path).unlink()


def change(path: str) -> None:
    with Path(path).open("r+b") as file:
        file.write(bytes([file.read(1)[0] ^ 1]))


def shorten(path: str) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:-1])


# What goes wrong for a closer: the operation, a part of the path, what happens before it, what is heard.
FAULTS: dict[str, tuple[str, str, Callable[[str], None], str]] = {
    "full disk": ("write", "distrib_optim.pt", refuse(errno.ENOSPC), "ENOSPC"),
    "no room to open": ("open", "distrib_optim.pt", refuse(errno.EDQUOT), "EDQUOT"),
    "no room to grow": ("ftruncate", "distrib_optim.pt", refuse(errno.EFBIG), "EFBIG"),
    "disk that breaks": ("fsync", "distrib_optim.pt", refuse(errno.EIO), "EIO"),
    "edges unreadable": ("read", ".edges_0000", refuse(errno.EIO), "EIO"),
    "edges gone": ("read", ".edges_00003", vanish, "ENOENT"),
    "edges of two gone": ("read", ".edges_00002", vanish, "ENOENT"),
    "edges changed": ("read", ".edges_0000", change, "not what its rank wrote"),
    "edges cut": ("read", ".edges_0000", shorten, "not what its rank wrote"),
    "edges that stay": ("unlink", ".edges_0000", refuse(errno.EACCES), "EACCES"),
}


def save_with_faults(talk: Talk, rank: int, root: Path, closer: int) -> list[tuple[str, str, list[int]]]:
    """For each fault what was heard of the save, and which steps are there after the next, begun before."""
    half, heard = Half(rank, 0), []
    faults = {2 * index: (name, *FAULTS[name][:3]) for index, name in enumerate(FAULTS, start=1)}
    struck = set()

    def observer(op: str, path: str) -> None:
        for step, (name, wanted, part, act) in faults.items():
            file = f"iter_{step:07d}" in path and f"mp_rank_0{closer}" in path and part in path
            if rank == closer and op == wanted and file and name not in struck:
                struck.add(name)
                act(path)

    with checkpointer_of(root, rank, half, on_error="warn", keep_last=1, rank_timeout_s=30) as checkpointer:
        observe(checkpointer, observer)
        for step, (name, *_) in faults.items():
            bad = checkpointer.save(step)
            checkpointer.fence()
            half.piece.fill_(step + 1)
            good = checkpointer.save(step + 1)
            said = ""
            try:
                bad.wait()
            except CheckpointError as error:
                said = f"{type(error).__name__}: {error}"
            good.wait()
            heard.append((name, said, checkpointer.steps()))
    return heard


@pytest.mark.parametrize("closer", [0, 1])
def test_what_goes_wrong_for_a_closer_is_heard_by_all_and_the_next_save_stands(
    world: World, tmp_path: Path, closer: int
) -> None:
    outcomes = world.run(RANKS, save_with_faults, tmp_path, closer)
    elsewhere = {0: ".edges_00003", 1: ".edges_00002"}[closer]
    for rank, heard in enumerate(outcomes):
        for index, (name, said, steps) in enumerate(heard):
            if FAULTS[name][1] == elsewhere:
                assert not said
                continue
            assert FAULTS[name][3] in said, (rank, name, said)
            assert rank == closer or f"rank {closer}" in said, (rank, name, said)
            assert said.startswith("RankError" if rank != closer else ("WriteError", "SaveError"))
            assert steps[-1] == 2 * index + 3  # rank 0 removes the one before when it has said so
    assert not [path for path in tmp_path.rglob("*") if "edges" in path.name or "-tmp-" in path.name]
    check_resumes(world, tmp_path, 2 * len(FAULTS) + 1)
