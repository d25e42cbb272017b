"""integrations.megatron with real megatron-core: its own code reads what we wrote, and we what it wrote."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from asyncckpt import AsyncCheckpointer
from asyncckpt.integrations import megatron as ours
from tests.megatron_ranks import (
    LAYOUTS,
    MODEL_FILE,
    OPTIMIZER_FILE,
    TRACKER,
    Job,
    Layout,
    megatron,
    model_directory,
    same,
    stock_load_checkpoint,
    stock_read,
    stock_save_checkpoint,
)
from tests.process_world import Talk, World, process_world

RANKS = 4
SAVED, LAST = 2, 4


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


def checkpointer_of(job: Job, root: Path, **options: Any) -> AsyncCheckpointer:
    return ours.checkpointer(
        root,
        model=job.chunks,
        optimizer=job.optimizer,
        opt_param_scheduler=job.scheduler,
        args=job._args(0),
        **{"host_memory": 8 << 20, "rank_timeout_s": 30, "fence_timeout_s": 60, **options},
    )


def trained(layout: Layout) -> Job:
    job = Job(layout)
    for number in range(SAVED):
        job.train_step(number)
    return job


def save_ours_load_stock(talk: Talk, rank: int, layout: Layout, root: Path) -> tuple[Path, Path]:
    """The directories of this rank's files, as Megatron and as we wrote them."""
    with megatron(layout):
        job = trained(layout)
        theirs = stock_save_checkpoint(job, root / "theirs")
        gathers: list[Any] = []
        with checkpointer_of(job, root / "ours") as checkpointer:
            with (
                patch.object(dist, "gather", lambda *_: gathers.append("gather")),
                patch.object(dist, "all_gather", lambda *_: gathers.append("all_gather")),
            ):
                handle = checkpointer.save(SAVED)
                if layout.overlap_param_gather:
                    gathers.clear()  # of parameters, by Megatron itself
            saved, parameters = job.shards(), job.parameters()
            losses = [job.train_step(number) for number in range(SAVED, LAST)]
            handle.wait()
        assert not gathers
        after = job.shards()

        fresh = Job(layout, seed=2)
        stock_load_checkpoint(fresh, root / "ours")
        assert same(fresh.shards(), saved)
        assert same(fresh.parameters(), parameters)
        assert fresh.iteration == SAVED
        if rank == 0:  # Megatron's files have the generators of one rank of each group
            assert fresh.train_step(SAVED) == losses[0]
        else:
            fresh.train_step(SAVED)

        again = Job(layout, seed=3)
        with checkpointer_of(again, root / "ours") as checkpointer:
            resume = checkpointer.load_latest()
            assert resume is not None
            assert resume.step == SAVED
            assert resume.verified
            assert same(again.shards(), saved)
            assert same(again.parameters(), parameters)
            assert [again.train_step(number) for number in range(SAVED, LAST)] == losses
            assert same(again.shards(), after)
        here = model_directory(root / "ours" / f"iter_{SAVED:07d}")
        stock, mine = stock_read(theirs / MODEL_FILE), stock_read(here / MODEL_FILE)
        assert {*stock} - {*mine} == {"num_floating_point_operations_so_far"}
        assert {*mine} <= {*stock}
        assert stock["optimizer"] == mine["optimizer"]
        assert stock["opt_param_scheduler"] == mine["opt_param_scheduler"]
        assert {*stock["rng_state"][0]} == {*mine["rng_state"][0]}
        return theirs, here


@pytest.mark.parametrize("name", LAYOUTS)
def test_megatron_loads_what_we_wrote_and_its_records_are_those_it_writes(
    world: World, tmp_path: Path, name: str
) -> None:
    ranks = world.run(RANKS, save_ours_load_stock, LAYOUTS[name], tmp_path)
    assert (tmp_path / "ours" / TRACKER).read_text() == str(SAVED)
    for theirs, ours_ in set(ranks):
        stock, here = (directory / OPTIMIZER_FILE for directory in (theirs, ours_))
        assert records_of(stock) == records_of(here)
    found = {path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs").rglob("*.pt")}
    assert found == {
        path.relative_to(tmp_path / "ours")
        for path in (tmp_path / "ours").rglob("*.pt")
        if not path.name.startswith("rank_")
    }


def records_of(path: Path) -> list[tuple[str, bytes]]:
    """Names and bytes of a file's records, in their order."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return [
            (info.filename, archive.read(info))
            for info in archive.infolist()
            if not info.filename.endswith("serialization_id")
        ]


def save_stock_load_ours(talk: Talk, rank: int, layout: Layout, root: Path) -> None:
    with megatron(layout):
        job = trained(layout)
        stock_save_checkpoint(job, root)
        fresh = Job(layout, seed=2)
        with checkpointer_of(fresh, root) as checkpointer:
            resume = checkpointer.load_latest()
            assert resume is not None
            assert not resume.verified
            assert same(fresh.shards(), job.shards())
            assert same(fresh.parameters(), job.parameters())
            fresh.train_step(SAVED)
            checkpointer.save(SAVED + 1).wait()
            assert checkpointer.steps() == [SAVED, SAVED + 1]


@pytest.mark.parametrize("name", ["tensor-bf16", "data-fp32", "expert", "pipeline-virtual"])
def test_we_load_what_megatron_wrote_and_go_on_in_the_same_tree(
    world: World, tmp_path: Path, name: str
) -> None:
    world.run(RANKS, save_stock_load_ours, LAYOUTS[name], tmp_path)
    assert (tmp_path / TRACKER).read_text() == str(SAVED + 1)
