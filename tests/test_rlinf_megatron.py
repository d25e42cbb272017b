"""RLinf's tree of several Megatron ranks: megatron-core reads it where RLinf would, and so do we."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.megatron_ranks import Job, Layout, megatron, stock_load_checkpoint
from tests.process_world import Talk, World, process_world
from tests.rlinf_run import Loader, driver_of, introduce, worker_of

PARTS = {"data": 1, "actor": 4}
SAVED, LAST = 2, 3


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


def manager_of(job: Job) -> Any:
    """What RLinf's MegatronModelManager has, as far as checkpoints go."""
    return SimpleNamespace(model=job.chunks, optimizer=job.optimizer, lr_scheduler=job.scheduler)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return bool(torch.equal(one, other))


def train(talk: Talk, part: str, rank: int, log_dir: Path, layout: Layout) -> list[str]:
    """The files of the step, as the driver sees them."""
    groups = {"actor": 4}
    if part == "data":
        loader = Loader()
        for _ in range(2):  # the workers begin twice
            with driver_of(talk, log_dir, loader, groups, backend="megatron") as driver:
                if not driver.resume():
                    loader.next()
                    driver.save(SAVED)
        step = log_dir / "checkpoints" / f"global_step_{SAVED}"
        return sorted(str(path.relative_to(step)) for path in step.rglob("*.*") if path.is_file())
    with megatron(layout):
        job = Job(layout)
        for number in range(SAVED):
            job.train_step(number)
        with worker_of(talk, part, manager_of(job), args=job._args(SAVED)) as worker:
            assert worker.resume() == 0
            worker.save(SAVED)
            saved, parameters = job.shards(), job.parameters()
            losses = [job.train_step(number) for number in range(SAVED, LAST)]
        fresh = Job(layout, seed=2)
        stock_load_checkpoint(fresh, log_dir / "checkpoints" / f"global_step_{SAVED}" / part)
        assert fresh.iteration == SAVED
        assert same(fresh.shards(), saved)
        assert same(fresh.parameters(), parameters)
        again = Job(layout, seed=3)
        with worker_of(talk, part, manager_of(again), args=again._args(SAVED)) as worker:
            assert worker.resume("auto") == SAVED
        assert same(again.shards(), saved)
        assert same(again.parameters(), parameters)
        assert [again.train_step(number) for number in range(SAVED, LAST)] == losses
    return []


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2)], ids=["tensor", "pipeline"])
def test_several_megatron_ranks_below_rlinfs_directories(
    world: World, tmp_path: Path, layout: Layout
) -> None:
    ranks = world.start_parts(PARTS, train, tmp_path, layout)
    introduce(ranks)
    introduce(ranks)
    found, *_ = [rank.hear() for rank in ranks]
    parallel = ["mp_rank_00", "mp_rank_01"] if layout.tensor == 2 else ["mp_rank_00_000", "mp_rank_00_001"]
    base = f"actor/iter_{SAVED:07d}"
    files = ("distrib_optim.pt", "model_optim_rng.pt")
    assert {name for name in found if not name.startswith("asyncckpt")} == {
        "data/data.pt",
        "data/rank_00000.pt",
        "actor/latest_checkpointed_iteration.txt",
        *(f"{base}/{directory}/{name}" for directory in parallel for name in files),
        *(f"{base}/rank_{rank:05d}.pt" for rank in range(4)),
    }
