"""FSDP2 on processes of their own: what ranks write together is one checkpoint, for us and for stock DCP."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from asyncckpt import AsyncCheckpointer
from tests.process_world import Talk, World, process_world

STEPS, SAVED = 5, 3
HIDDEN = 22  # no multiple of any number of ranks here


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.down = nn.Linear(3 * HIDDEN, HIDDEN, bias=False)
        self.drop = nn.Dropout(0.1)
        self.scale = nn.Parameter(torch.ones(2))  # fewer elements than ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(torch.relu(self.up(x)))) * self.scale.sum()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(HIDDEN, 5)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Sampler:
    """Each rank's own place in its own data."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.position = 0

    def next(self) -> torch.Tensor:
        self.position += 1
        seed = 1000 * self.rank + self.position
        return torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(seed))

    def state_dict(self) -> dict[str, int]:
        return {"rank": self.rank, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.rank, self.position = state["rank"], state["position"]


class Job:
    def __init__(self, rank: int, how: str) -> None:
        self.rank = rank
        torch.manual_seed(0)
        self.model: Any = Net()
        ranks = dist.get_world_size()
        if how == "fsdp":
            mesh = init_device_mesh("cpu", (ranks,))
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        elif how == "hsdp":
            mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        elif how == "ddp":
            self.model = nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, foreach=False)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.sampler = Sampler(rank)
        self.mine = {"rank": rank}
        torch.manual_seed(rank)  # dropout differs from rank to rank
        random.seed(rank)
        np.random.seed(rank)  # noqa: NPY002

    def checkpointer(self, root: Path, **options: Any) -> AsyncCheckpointer:
        return AsyncCheckpointer(
            root, model=self.model, optimizer=self.optimizer, lr_scheduler=self.scheduler,
            dataloader=self.sampler, extra={"note": "for all"}, per_rank=self.mine,
            host_memory=8 << 20, rank_timeout_s=30, fence_timeout_s=60, **options,
        )  # fmt: skip

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.model(self.sampler.next()).square().mean() + random.random() + float(np.random.rand())  # noqa: NPY002
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments, whole."""
        names = {id(p): n.removeprefix("module.") for n, p in self.model.named_parameters()}
        found = {f"model.{n.removeprefix('module.')}": v for n, v in self.model.state_dict().items()}
        for param, values in self.optimizer.state.items():
            found |= {f"optimizer.state.{names[id(param)]}.{key}": v for key, v in values.items()}
        return {key: _whole(value) for key, value in found.items()}


def _whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def train_and_save(
    talk: Talk, rank: int, root: Path, how: str
) -> tuple[list[float], dict[str, torch.Tensor]]:
    job = Job(rank, how)
    losses = []
    saved = {}
    with job.checkpointer(root) as checkpointer:
        assert checkpointer.load_latest() is None
        for step in range(1, STEPS + 1):
            losses.append(job.step())
            if step == SAVED:
                saved = job.state()
                checkpointer.save(step)
    return losses[SAVED:], saved


def resume_and_train(
    talk: Talk, rank: int, root: Path, how: str
) -> tuple[list[float], dict[str, torch.Tensor], tuple[str, ...], Any]:
    job = Job(rank, how)
    job.mine["rank"] = -1
    with job.checkpointer(root) as checkpointer:
        resume = checkpointer.load_latest()
        assert resume is not None
        assert resume.step == SAVED
        assert resume.verified
        loaded = job.state()
        losses = [job.step() for _ in range(SAVED, STEPS)]
    return losses, loaded, resume.left, job.mine["rank"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def stock_load(talk: Talk | None, rank: int, step: Path, expected: dict[str, torch.Tensor]) -> bool:
    """Stock DCP, into shards of its own on however many ranks there are."""
    if talk is None:
        live = {key: torch.zeros_like(value) for key, value in expected.items()}
        dcp.load(live, checkpoint_id=step, no_dist=True)
        return same(live, expected)
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded: dict[str, Any] = {
        key: distribute_tensor(torch.zeros_like(v), mesh, [Shard(0)]) if v.ndim else torch.zeros_like(v)
        for key, v in expected.items()
    }
    dcp.load(sharded, checkpoint_id=step)
    return same({key: _whole(value) for key, value in sharded.items()}, expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "ranks", "stock", "ours"),
    [("fsdp", 4, [2, 3], [1, 2, 3, 8]), ("hsdp", 4, [2], [1]), ("ddp", 2, [3], [4])],
)
def test_training_on_several_ranks_resumes_bit_for_bit_and_stock_dcp_reads_it(
    world: World, tmp_path: Path, how: str, ranks: int, stock: list[int], ours: list[int]
) -> None:
    first = world.run(ranks, train_and_save, tmp_path, how)
    expected = first[0][1]
    assert len({tuple(losses) for losses, _ in first}) == ranks  # ranks differ in data and dropout

    for rank, (losses, loaded, left, mine) in enumerate(world.run(ranks, resume_and_train, tmp_path, how)):
        assert same(loaded, expected)
        assert losses == first[rank][0]
        assert left == ()
        assert mine == rank

    step = tmp_path / f"step-{SAVED}"
    assert stock_load(None, 0, step, expected)
    for others in stock:
        assert world.run(others, stock_load, step, expected) == [True] * others

    for others in ours:
        for _, loaded, left, mine in world.run(
            others, resume_and_train, tmp_path, "ddp" if others < 3 else "fsdp"
        ):
            assert same(loaded, expected)
            assert left == ("dataloader", "per_rank", "rng")
            assert mine == -1
