"""Ranks on nodes with disks of their own: one path, and behind it another directory on each node."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from asyncckpt import AsyncCheckpointer, _native, meeting
from asyncckpt.errors import CheckpointError, NoIntactStepError, OptionError, WriteError
from asyncckpt.filesystem import Filesystem
from tests.process_world import Talk, World, process_world

RANKS = 4
RANKS_PER_NODE = 2
ROOT = Path("/proc/self/cwd/steps")  # the same text on every rank; each is in the directory of its node


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


def on_node(base: Path, node: int) -> None:
    """This process sees the disk of that node."""
    directory = base / f"node{node}"
    directory.mkdir(exist_ok=True)
    os.chdir(directory)


def checkpointer_of(**options: Any) -> AsyncCheckpointer:
    defaults = {"host_memory": 8 << 20, "rank_timeout_s": 20, "fence_timeout_s": 30}
    return AsyncCheckpointer(ROOT, **{**defaults, "disks": "node-local", **options})


class Model(nn.Module):
    """Rows on all ranks in turn; rows on the ranks of a node in turn, the same on each node; and on all."""

    def __init__(self, value: float) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (RANKS // RANKS_PER_NODE, RANKS_PER_NODE), mesh_dim_names=("n", "r"))
        whole = torch.arange(1003 * 64.0).view(1003, 64) + value
        self.spread = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0), Shard(0)]))
        self.hybrid = nn.Parameter(distribute_tensor(2 * whole, mesh, [Replicate(), Shard(0)]))
        self.plain = nn.Parameter(3 * whole)
        self.register_buffer("own", torch.full((5,), value))

    def locals(self) -> dict[str, torch.Tensor]:
        state = self.state_dict()
        return {name: getattr(value, "_local_tensor", value).clone() for name, value in state.items()}


def save_and_load(talk: Talk, rank: int, base: Path) -> list[str]:
    on_node(base, rank // RANKS_PER_NODE)
    model = Model(7)
    saved = model.locals()
    with checkpointer_of(model=model) as ckpt:
        torch.manual_seed(rank)
        ckpt.save(3, metadata={"loss": 1.5})
        following = torch.rand(3)
        ckpt.wait()
        model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
        resume = ckpt.load_latest()
        assert resume is not None
        assert resume.verified
        assert resume.metadata == {"loss": 1.5}
        assert torch.equal(torch.rand(3), following)
    assert all(torch.equal(value, saved[name]) for name, value in model.locals().items())

    fresh = Model(0)
    state = {"model": fresh.state_dict()}
    dcp.load(state, checkpoint_id=ROOT / "step-3")
    fresh.load_state_dict(state["model"])
    assert all(torch.equal(value, saved[name]) for name, value in fresh.locals().items())
    return sorted(path.name for path in (ROOT / "step-3").iterdir())


def test_each_node_keeps_what_its_ranks_hold(world: World, tmp_path: Path) -> None:
    first, _, second, _ = world.run(RANKS, save_and_load, tmp_path)
    for names, ranks in ((first, (0, 1)), (second, (2, 3))):
        of_each = ("__{}_0.distcp", "rank_0000{}.pt", "asyncckpt_rank_0000{}.json")
        own = [name.format(rank) for rank in ranks for name in of_each]
        assert names == sorted([".metadata", "asyncckpt_manifest.json", *own])


# ---------------------------------------------------------------------------- who dies when

WHOLE = {"renamed", "durable"}  # phases of rank 0's after which the step is decided


def small() -> nn.Module:
    """A part on each rank, and what all have."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    module = nn.Module()
    module.rows = nn.Parameter(distribute_tensor(torch.zeros(40, 8), mesh, [Shard(0)]), requires_grad=False)
    module.all = nn.Parameter(torch.zeros(16), requires_grad=False)
    return module


def fill(module: nn.Module, value: float) -> None:
    for param in module.parameters():
        param.fill_(value)


def values_of(module: nn.Module) -> set[float]:
    return {v for p in module.parameters() for v in getattr(p, "_local_tensor", p).flatten().tolist()}


def outcome_of(act: Callable[[], Any]) -> str:
    try:
        act()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def save_twice(talk: Talk, rank: int, base: Path, victim: int, trap: str) -> str:
    """Save 1, and save 2 in which the victim says where it is and waits for its end."""
    on_node(base, rank // RANKS_PER_NODE)

    def note(step: int, phase: str) -> None:
        if (step, rank, phase) == (2, victim, trap):
            talk.say("trapped")
            talk.listen()

    model = small()
    ckpt = checkpointer_of(model=model, on_phase=note, rank_timeout_s=2)
    fill(model, 1)
    ckpt.save(1).wait()
    fill(model, 2)
    return outcome_of(lambda: ckpt.save(2).wait())


def resume(talk: Talk, rank: int, base: Path) -> tuple[int, set[float], list[str], list[str]]:
    """What is found at the next start; what was visible then, and what is after another save."""
    on_node(base, rank // RANKS_PER_NODE)
    model = small()
    with checkpointer_of(model=model, keep_last=1) as ckpt:
        found = ckpt.load_latest()
        assert found is not None
        torch.distributed.barrier()
        seen = visible()
        ckpt.save(10).wait()
        torch.distributed.barrier()
    return found.step, values_of(model), seen, visible()


def visible() -> list[str]:
    return sorted(path.name for path in ROOT.glob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "trap"),
    [
        *[(0, phase) for phase in ("checked", "voted", "manifest", "renamed", "durable", "everywhere")],
        *[(2, phase) for phase in ("checked", "voted", "manifest", "renamed", "durable")],
        (3, "checked"),
        (3, "voted"),
    ],
)
def test_whoever_dies_all_nodes_go_on_from_the_same_step(
    world: World, tmp_path: Path, victim: int, trap: str
) -> None:
    ranks = world.start(RANKS, save_twice, tmp_path, victim, trap)
    ranks[victim].hear("trapped")
    ranks[victim].kill()
    outcomes = [rank.hear() for index, rank in enumerate(ranks) if index != victim]
    # Once rank 2 has told that its node is prepared, rank 0 needs nobody to publish.
    decided = trap in (*WHOLE, "everywhere") or (victim, trap) in ((2, "manifest"), (3, "voted"))
    if (victim, trap) in ((0, "everywhere"), (3, "voted")):
        assert all(said == "ok" or "no sign of life" in said for said in outcomes)
    else:
        assert all("no sign of life" in said or "dead?" in said for said in outcomes), outcomes
    newest = 2 if decided else 1
    found = world.run(RANKS, resume, tmp_path)
    assert [step for step, *_ in found] == [newest] * RANKS
    assert [values for _, values, *_ in found] == [{float(newest)}] * RANKS
    for _, _, seen, after in found:
        assert seen == [f"step-{step}" for step in range(1, newest + 1)]
        assert after == sorted([f"step-{newest}", "step-10"])  # the one resumed from is kept
    assert not list(tmp_path.glob("*/steps/.asyncckpt-t*"))


def follow_late(talk: Talk, rank: int, base: Path) -> list[Any]:
    """The second node cannot rename in save 2; save 3 goes well."""
    on_node(base, rank // RANKS_PER_NODE)
    model, said = small(), []
    plain = Filesystem.rename

    def refuse(self: Filesystem, source: Path, target: Path) -> None:
        if target.name == "step-2":
            raise WriteError("rename", str(target), errno.EIO)
        plain(self, source, target)

    with checkpointer_of(model=model, on_error="warn") as ckpt:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 2:
                patch.setattr(Filesystem, "rename", refuse)
            for step in (1, 2):
                fill(model, step)
                said.append(outcome_of(lambda step=step: ckpt.save(step).wait()))
        torch.distributed.barrier()
        said.append(visible())
        found = ckpt.load_latest()
        assert found is not None
        said.append((found.step, [line[:8] for line in found.passed_over]))
        fill(model, 3)
        said.append(outcome_of(lambda: ckpt.save(3).wait()))
        torch.distributed.barrier()
        said.append(visible())
    return said


def test_a_node_that_could_not_publish_follows_with_the_next_save(world: World, tmp_path: Path) -> None:
    for rank, (first, second, seen, loaded, third, after) in enumerate(
        world.run(RANKS, follow_late, tmp_path)
    ):
        assert (first, third) == ("ok", "ok")
        assert "EIO" in second
        assert rank == 2 or "rank 2: " in second
        assert seen == (["step-1", "step-2"] if rank < RANKS_PER_NODE else ["step-1"])
        assert loaded == (1, ["step 2: "])
        assert after == ["step-1", "step-3"]


def fail_alone(talk: Talk, rank: int, base: Path) -> tuple[str, list[str], str]:
    """The disk of rank 1's node is full in save 1; what is left there then."""
    on_node(base, rank)
    model = small()
    with checkpointer_of(model=model, on_error="warn") as ckpt:
        if rank == 1:
            _native.faults.arm(_native.faults.Op.pwrite, 0, _native.faults.Kind.error, errno.ENOSPC)
        first = outcome_of(lambda: ckpt.save(1).wait())
        _native.faults.disarm()
        torch.distributed.barrier()
        left = [path.name for path in ROOT.glob(".asyncckpt-t*")]
        return first, left, outcome_of(lambda: ckpt.save(2).wait())


def test_a_node_that_failed_keeps_nothing_of_it(world: World, tmp_path: Path) -> None:
    for rank, (first, left, second) in enumerate(world.run(2, fail_alone, tmp_path)):
        assert "ENOSPC" in first
        assert rank == 1 or "rank 1" in first
        assert (left, second) == ([], "ok")


# ---------------------------------------------------------------------------- who is where


def save(talk: Talk, rank: int, base: Path, steps: list[int], keep_last: int | None = None) -> list[str]:
    on_node(base, rank // RANKS_PER_NODE)
    model = small()
    with checkpointer_of(model=model, keep_last=keep_last) as ckpt:
        for step in steps:
            fill(model, step)
            ckpt.save(step).wait()
        torch.distributed.barrier()
    return visible()


def load(talk: Talk, rank: int, base: Path, nodes: list[int], options: dict[str, Any]) -> Any:
    """The step and values found by ranks on these nodes; or the error."""
    on_node(base, nodes[rank])
    model = small()
    with checkpointer_of(model=model, **options) as ckpt:
        try:
            found = ckpt.load_latest()
        except NoIntactStepError as error:
            return str(error)
    return None if found is None else (found.step, values_of(model))


STAYED, SWAPPED = [0, 0, 1, 1], [1, 1, 0, 0]


def test_retention_is_the_same_on_all_nodes(world: World, tmp_path: Path) -> None:
    assert world.run(RANKS, save, tmp_path, [1, 2, 3, 4], 2) == [["step-3", "step-4"]] * RANKS
    assert not list(tmp_path.glob("*/steps/.asyncckpt-t*"))


@pytest.mark.parametrize("options", [{}, {"read_only": True}], ids=["owner", "reader"])
def test_ranks_that_changed_nodes_are_told(world: World, tmp_path: Path, options: dict[str, Any]) -> None:
    world.run(RANKS, save, tmp_path, [1])
    for said in world.run(RANKS, load, tmp_path, SWAPPED, options):
        assert "is what ranks 2-3 of 4 saved to the disk of their node, and this is rank 0 of 4" in said
    assert world.run(RANKS, load, tmp_path, STAYED, options) == [(1, {1.0})] * RANKS


def test_another_number_of_ranks_is_told(world: World, tmp_path: Path) -> None:
    world.run(RANKS, save, tmp_path, [1])
    for said in world.run(2, load, tmp_path, [0, 1], {}):
        assert "is what ranks 0-1 of 4 saved to the disk of their node, and this is rank 0 of 2" in said


def test_a_node_that_lost_its_disk_is_not_taken_for_a_fresh_start(world: World, tmp_path: Path) -> None:
    world.run(RANKS, save, tmp_path, [1, 2])
    for node in (0, 1):
        kept = shutil.move(tmp_path / f"node{node}", tmp_path / "elsewhere")
        for said in world.run(RANKS, load, tmp_path, STAYED, {}):
            assert "no step" in said
            assert "on the disk" in said
        shutil.rmtree(tmp_path / f"node{node}")
        shutil.move(kept, tmp_path / f"node{node}")
    assert world.run(RANKS, load, tmp_path, STAYED, {}) == [(2, {2.0})] * RANKS


def test_damage_on_one_node_makes_all_fall_back(world: World, tmp_path: Path) -> None:
    world.run(RANKS, save, tmp_path, [1, 2])
    file = tmp_path / "node1" / "steps" / "step-2" / "__3_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert world.run(RANKS, load, tmp_path, STAYED, {}) == [(1, {1.0})] * RANKS


def go_back(talk: Talk, rank: int, base: Path) -> list[str]:
    on_node(base, rank // RANKS_PER_NODE)
    model = small()
    with checkpointer_of(model=model) as ckpt:
        ckpt.load(1)
        ckpt.save(2).wait()
        torch.distributed.barrier()
    return visible()


def test_a_new_timeline_begins_on_all_nodes(world: World, tmp_path: Path) -> None:
    world.run(RANKS, save, tmp_path, [1, 3, 5])
    assert world.run(RANKS, go_back, tmp_path) == [["step-1", "step-2"]] * RANKS
    assert world.run(RANKS, load, tmp_path, STAYED, {}) == [(2, {1.0})] * RANKS


def test_what_lies_on_one_node_is_not_taken_for_a_step(world: World, tmp_path: Path) -> None:
    world.run(RANKS, save, tmp_path, [1])
    with (
        AsyncCheckpointer(tmp_path / "node0" / "steps", extra={"a": 1}) as ckpt,
        pytest.raises(NoIntactStepError, match='load it there, with disks="node-local"'),
    ):
        ckpt.load_latest()


def say_otherwise(talk: Talk, rank: int, base: Path) -> str:
    on_node(base, 0)
    disks = "shared" if rank == 1 else "node-local"
    return outcome_of(lambda: checkpointer_of(model=nn.Linear(2, 2), disks=disks))


def test_ranks_that_say_otherwise_are_told(world: World, tmp_path: Path) -> None:
    first, second = world.run(2, say_otherwise, tmp_path)
    assert first == "RankError: rank 1 cannot take part: disks: 'shared' here, 'node-local' on rank 0"
    assert second == "OptionError: disks: 'shared' here, 'node-local' on rank 0"


def test_one_disk_under_all_ranks_is_a_shared_one(world: World, tmp_path: Path) -> None:
    assert world.run(RANKS, load, tmp_path, [0] * RANKS, {}) == [None] * RANKS
    assert world.run(2, save_on_one, tmp_path) == [1, 1]
    with AsyncCheckpointer(tmp_path / "node0" / "steps", extra={"a": 0}) as ckpt:
        found = ckpt.load_latest()
    assert found is not None


def share_unknowingly(talk: Talk, rank: int, base: Path) -> str:
    """One directory, seen from what looks like two machines."""
    on_node(base, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting, "disk_of", lambda path: f"machine {rank}")
        return outcome_of(lambda: checkpointer_of(model=nn.Linear(2, 2)))


def test_machines_that_share_a_directory_are_told(world: World, tmp_path: Path) -> None:
    first, second = world.run(2, share_unknowingly, tmp_path)
    assert "rank 1 cannot take part" in first
    assert second.startswith("RootError: ")
    assert all("is one directory that several machines share" in said for said in (first, second))


def save_on_one(talk: Talk, rank: int, base: Path) -> int:
    on_node(base, 0)
    with checkpointer_of(extra={"a": 1}, save_rng=False) as ckpt:
        ckpt.save(1).wait()
        torch.distributed.barrier()
        return ckpt.steps()[-1]


def test_other_layouts_are_refused() -> None:
    with pytest.raises(OptionError, match="torch_dist is not saved"):
        AsyncCheckpointer(ROOT, model=nn.Linear(2, 2), layout="megatron-dist", disks="node-local")
    with pytest.raises(OptionError, match="disks must be one of shared, node-local"):
        AsyncCheckpointer(ROOT, model=nn.Linear(2, 2), disks="both")  # type: ignore[arg-type]
