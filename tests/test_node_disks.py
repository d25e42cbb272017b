"""Ranks on nodes with disks of their own: one path, and behind it another directory on each node."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from asyncckpt import AsyncCheckpointer
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
        assert resume is not None and resume.verified and resume.metadata == {"loss": 1.5}
        assert torch.equal(torch.rand(3), following)
    assert all(torch.equal(value, saved[name]) for name, value in model.locals().items())

    fresh = Model(0)
    state = {"model": fresh.state_dict()}
    dcp.load(state, checkpoint_id=ROOT / "step-3")
    fresh.load_state_dict(state["model"])
    assert all(torch.equal(value, saved[name]) for name, value in fresh.locals().items())
    return sorted(os.listdir(ROOT / "step-3"))


def test_each_node_keeps_what_its_ranks_hold(world: World, tmp_path: Path) -> None:
    first, _, second, _ = world.run(RANKS, save_and_load, tmp_path)
    common = [".metadata", "asyncckpt_manifest.json"]
    assert first == sorted(
        [*common, "__0_0.distcp", "__1_0.distcp", "rank_00000.pt", "rank_00001.pt"]
        + ["asyncckpt_rank_00000.json", "asyncckpt_rank_00001.json"]
    )
    assert second == sorted(
        [*common, "__2_0.distcp", "__3_0.distcp", "rank_00002.pt", "rank_00003.pt"]
        + ["asyncckpt_rank_00002.json", "asyncckpt_rank_00003.json"]
    )
