"""A run as RLinf's: a driver, a group that trains the actor, one that trains the critic; they share nothing
but the filesystem and the driver's store. And what stock RLinf saves and loads of the same objects."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from asyncckpt.integrations.rlinf import CheckpointJob, DriverCheckpoints, WorkerCheckpoints

GROUPS = {"actor": 3, "critic": 2}
PARTS = {"data": 1, **GROUPS}
RANKS = sum(PARTS.values())
OPTIONS = {"host_memory": 1 << 20, "rank_timeout_s": 30, "fence_timeout_s": 60}


class Loader:
    """Stands for the driver's StatefulDataLoader."""

    def __init__(self) -> None:
        self.drawn: list[int] = []
        self.generator = torch.Generator().manual_seed(7)

    def next(self) -> int:
        self.drawn.append(int(torch.randint(1000, (), generator=self.generator)))
        return self.drawn[-1]

    def state_dict(self) -> dict[str, Any]:
        return {
            "_snapshot": {"drawn": list(self.drawn), "generator": self.generator.get_state()},
            "_steps": 1,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = list(state["_snapshot"]["drawn"])
        self.generator.set_state(state["_snapshot"]["generator"])


class Trainer:
    """A worker of a group; it has what RLinf's FSDPModelManager has, as far as checkpoints go."""

    def __init__(self, part: str, rank: int, sharded: bool = True) -> None:
        torch.manual_seed(len(part))
        self.model: Any = nn.Sequential(nn.Linear(14, 22), nn.Dropout(0.2), nn.Linear(22, 6, bias=False))
        if sharded:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, foreach=False)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.moved = 0
        torch.manual_seed(rank)
        random.seed(rank)
        np.random.seed(rank)  # noqa: NPY002

    def step(self) -> float:
        self.optimizer.zero_grad()
        noise = random.random() + float(np.random.rand())  # noqa: NPY002
        loss = self.model(torch.randn(4, 14)).square().mean() + noise
        loss.backward()
        self.optimizer.step()
        self.lr_scheduler.step()
        return float(loss.item())

    def fill(self, value: float) -> None:
        """Change all weights without a word to the others."""
        with torch.no_grad():
            for local in self._locals():
                local.fill_(value)

    def values(self) -> set[float]:
        """Of all weights that are here."""
        return {value for local in self._locals() for value in local.flatten().tolist()}

    def _locals(self) -> list[torch.Tensor]:
        return [p._local_tensor if isinstance(p, DTensor) else p.data for p in self.model.parameters()]

    def offload_param_and_grad(self) -> None:
        """As hard as Megatron's: the memory is another afterwards, and the old one is garbage."""
        self.moved += 1
        for local in self._locals():
            kept, storage = local.clone(), local.untyped_storage()
            nbytes = storage.nbytes()  # with FSDP's padding
            storage.resize_(0)
            storage.resize_(nbytes)
            local.copy_(kept)

    def state(self) -> dict[str, Any]:
        """Weights and moments, whole, under RLinf's keys; learning rate and scheduler."""
        names = {id(p): n for n, p in self.model.named_parameters()}
        found = {f"model.{name}": _whole(value) for name, value in self.model.state_dict().items()}
        for param, values in self.optimizer.state.items():
            found |= {f"state.{names[id(param)]}.{key}": _whole(v) for key, v in values.items()}
        return {**found, "lr": self.optimizer.param_groups[0]["lr"], "epoch": self.lr_scheduler.last_epoch}


def _whole(value: Any) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) if isinstance(one[key], torch.Tensor) else one[key] == other[key]
        for key in one
    )


# ---------------------------------------------------------------------------- what stock RLinf does


class StockCheckpoint:
    """What RLinf hands to dcp (rlinf/hybrid_engines/fsdp/strategy/checkpoint.py), of one trainer."""

    options = StateDictOptions(full_state_dict=False, cpu_offload=True)

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        model, optimizers = get_state_dict(self.trainer.model, self.trainer.optimizer, options=self.options)
        return {
            "model": model,
            "optimizers": optimizers,
            "lr_schedulers": [self.trainer.lr_scheduler.state_dict()],
            "fsdp_version": "fsdp2",
            "rng": {
                "cpu": torch.get_rng_state(),
                "numpy": np.random.get_state(),  # noqa: NPY002
                "random": random.getstate(),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["fsdp_version"] == "fsdp2"
        set_state_dict(
            self.trainer.model,
            self.trainer.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizers"],
            options=self.options,
        )
        (scheduler,) = state["lr_schedulers"]
        self.trainer.lr_scheduler.load_state_dict(scheduler)
        assert {"cpu", "numpy", "random"} <= set(state["rng"])
        torch.set_rng_state(state["rng"]["cpu"])
        np.random.set_state(state["rng"]["numpy"])  # noqa: NPY002
        random.setstate(state["rng"]["random"])


def stock_save(trainer: Trainer, path: Path) -> None:
    dcp.save({"fsdp_checkpoint": StockCheckpoint(trainer)}, checkpoint_id=path / "dcp_checkpoint")


def stock_load(trainer: Trainer, path: Path) -> None:
    assert list((path / "dcp_checkpoint").glob("*.distcp"))
    dcp.load({"fsdp_checkpoint": StockCheckpoint(trainer)}, checkpoint_id=path / "dcp_checkpoint")


# ---------------------------------------------------------------------------- how the test and a driver begin


def driver_of(
    talk: Any, log_dir: Path, loader: Any, groups: Any = GROUPS, **options: Any
) -> DriverCheckpoints:
    """Hosts the store, and lets the test tell the workers."""
    driver = DriverCheckpoints(log_dir, groups, dataloader=loader, host="127.0.0.1", **{**OPTIONS, **options})
    talk.say(driver.job)
    talk.listen()
    driver.begin()
    return driver


def worker_of(talk: Any, part: str, trainer: Trainer, **options: Any) -> WorkerCheckpoints:
    talk.say("ready")
    job: CheckpointJob = talk.listen()
    return WorkerCheckpoints.of_manager(job, part, trainer, **{**OPTIONS, **options})


def introduce(ranks: list[Any]) -> None:
    """Hand the driver's job to the workers, once all are ready: they begin together, as RLinf's do."""
    job, *_ = [rank.hear() for rank in ranks]
    for rank in ranks:
        rank.pipe.send(job)
