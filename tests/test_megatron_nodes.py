"""Megatron's legacy tree on the disks of two nodes: what stock reads on the first, and all load again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from asyncckpt import transfer
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
from tests.test_megatron import LAST, RANKS, SAVED, checkpointer_of, records_of, trained
from tests.test_node_disks import ROOT, on_node, outcome_of

RANKS_PER_NODE = 2
STEP = f"iter_{SAVED:07d}"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


def save_and_load(talk: Talk, rank: int, layout: Layout, base: Path) -> tuple[Path, str]:
    """Where Megatron wrote this rank's files, and what ours are called."""
    on_node(base, rank // RANKS_PER_NODE)
    with megatron(layout):
        job = trained(layout)
        theirs = stock_save_checkpoint(job, base / "theirs")
        gathers: list[Any] = []
        with checkpointer_of(job, ROOT, disks="node-local", rank_timeout_s=20) as checkpointer:
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
            dist.barrier()
        assert not gathers
        after = job.shards()

        here = model_directory(ROOT / STEP)
        assert stock_read(here / MODEL_FILE)["iteration"] == SAVED
        again = Job(layout, seed=3)
        with checkpointer_of(again, ROOT, disks="node-local", rank_timeout_s=20) as checkpointer:
            resume = checkpointer.load_latest()
            assert resume is not None
            assert resume.step == SAVED
            assert resume.verified
            assert same(again.shards(), saved)
            assert same(again.parameters(), parameters)
            assert [again.train_step(number) for number in range(SAVED, LAST)] == losses
            assert same(again.shards(), after)
        return theirs, here.name


@pytest.mark.parametrize(
    "name", ["data-bf16", "data-fp32", "tensor-bf16", "expert", "pipeline", "pipeline-virtual"]
)
def test_each_node_loads_what_it_has_and_the_first_has_megatrons_file(
    world: World, tmp_path: Path, name: str
) -> None:
    found = world.run(RANKS, save_and_load, LAYOUTS[name], tmp_path)
    steps = [tmp_path / f"node{node}" / "steps" / STEP for node in (0, 1)]
    assert {(step.parent / TRACKER).read_text() for step in steps} == {str(SAVED)}
    closed = 0
    for theirs, name_here in set(found):
        files = [step / name_here / OPTIMIZER_FILE for step in steps]
        there = [file for file in files if file.exists()]
        assert len(there) == 1
        assert records_of(theirs / OPTIMIZER_FILE) == records_of(there[0])
        closed += 1
    assert closed
    for rank, (_, name_here) in enumerate(found):
        node = rank // RANKS_PER_NODE
        assert (steps[node] / name_here / MODEL_FILE).exists()
        own = steps[node] / name_here / f"{OPTIMIZER_FILE}.slices_{rank:05d}"
        assert own.exists() is not (steps[node] / name_here / OPTIMIZER_FILE).exists()
    assert not list(tmp_path.glob("node*/steps/.asyncckpt-t*"))


def load_by_megatron(talk: Talk, rank: int, layout: Layout, base: Path) -> bool:
    """Megatron's own load, of a file that its first data-parallel rank alone has."""
    on_node(base, rank // RANKS_PER_NODE)
    with megatron(layout):
        job = trained(layout)
        with checkpointer_of(job, ROOT, disks="node-local") as checkpointer:
            checkpointer.save(SAVED).wait()
            dist.barrier()
        fresh = Job(layout, seed=2)
        stock_load_checkpoint(fresh, ROOT)
        return same(fresh.shards(), job.shards()) and same(fresh.parameters(), job.parameters())


@pytest.mark.parametrize("name", ["data-bf16", "tensor-bf16"])
def test_megatron_loads_the_first_nodes_file(world: World, tmp_path: Path, name: str) -> None:
    assert world.run(RANKS, load_by_megatron, LAYOUTS[name], tmp_path) == [True] * RANKS


def fail_while_sending(talk: Talk, rank: int, base: Path, how: str) -> list[str]:
    """Rank 3 stops while it sends; what the save gave, and the one after it."""
    on_node(base, rank // RANKS_PER_NODE)
    plain = transfer.Pipe.send

    def strike(self: transfer.Pipe, data: Any) -> None:
        if len(data) > 1000:  # slices, not what announces them
            if how == "dies":
                talk.say("trapped")
                os.kill(os.getpid(), 9)
            if how == "fails":
                raise OSError("unplugged")
            data = bytes(len(data))  # damaged on the way
        plain(self, data)

    with megatron(LAYOUTS["data-bf16"]):
        job = trained(LAYOUTS["data-bf16"])
        ckpt = checkpointer_of(job, ROOT, disks="node-local", rank_timeout_s=3, on_error="warn")
        with patch.object(transfer.Pipe, "send", strike if rank == 3 else plain):
            said = [outcome_of(lambda: ckpt.save(SAVED).wait())]
        if how != "dies":
            said.append(outcome_of(lambda: ckpt.save(SAVED).wait()))
            ckpt.close()
    return said


@pytest.mark.parametrize("how", ["fails", "garbles"])
def test_a_transfer_that_fails_fails_the_save_and_not_the_next(
    world: World, tmp_path: Path, how: str
) -> None:
    for rank, (first, second) in enumerate(world.run(RANKS, fail_while_sending, tmp_path, how)):
        assert ("unplugged" if how == "fails" else "did not arrive as it was") in first, (rank, first)
        assert second == "ok", first
    assert len(list(tmp_path.glob(f"node*/steps/{STEP}"))) == 2


def test_a_rank_that_dies_while_it_sends_is_heard_of(world: World, tmp_path: Path) -> None:
    ranks = world.start(RANKS, fail_while_sending, tmp_path, "dies")
    ranks[3].hear("trapped")
    for rank in ranks[:3]:
        (said,) = rank.hear()
        assert "rank 3" in said
    assert not list(tmp_path.glob("node*/steps/iter_*"))
