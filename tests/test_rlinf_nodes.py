"""RLinf's trees on the disks of two nodes: each part's ranks, and their files, on either."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests import test_rlinf, test_rlinf_megatron
from tests.megatron_ranks import Layout
from tests.process_world import Talk, World, process_world
from tests.rlinf_run import OPTIONS, introduce, same
from tests.test_node_disks import on_node

LOG_DIR = Path("/proc/self/cwd/run")  # as `test_node_disks.ROOT`
NODES = {"data": [0], "actor": [0, 0, 1, 1], "critic": [1, 0]}
SAVED, STEPS = test_rlinf.SAVED, test_rlinf.STEPS


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


def train(talk: Talk, part: str, rank: int, base: Path, groups: dict[str, int]) -> Any:
    on_node(base, NODES[part][rank])
    with patch.dict(OPTIONS, disks="node-local"):
        return test_rlinf.train(talk, part, rank, LOG_DIR, "auto", STEPS, groups)


def steps_of(tmp_path: Path) -> list[Path]:
    return [tmp_path / f"node{node}/run/checkpoints/global_step_{SAVED}" for node in (0, 1)]


@pytest.mark.slow
def test_fsdp_resumes_bit_for_bit_and_the_weights_are_whole_on_the_first_node(
    world: World, tmp_path: Path
) -> None:
    groups = {"actor": 4, "critic": 2}
    parts = {"data": 1, **groups}
    first = test_rlinf.run(world, parts, train, tmp_path, groups)
    again = test_rlinf.run(world, parts, train, tmp_path, groups)
    assert again[0][:2] == (SAVED, first[0][1])
    for (_, losses, saved), (found, after, loaded) in zip(first[1:], again[1:], strict=True):
        assert found == SAVED
        assert after == losses[SAVED:]
        assert same(saved, loaded)
    steps = steps_of(tmp_path)
    for part, place in (("actor", 1), ("critic", 5)):
        files = [step / part / "model_state_dict" / "full_weights.pt" for step in steps]
        assert [file.exists() for file in files] == [NODES[part][0] == node for node in (0, 1)]
        weights = torch.load(files[NODES[part][0]], weights_only=True)
        state = first[place][2]
        assert {f"model.{name}" for name in weights} == {name for name in state if name.startswith("model.")}
        assert all(torch.equal(value, state[f"model.{name}"]) for name, value in weights.items())
    assert [(step / "data" / "data.pt").exists() for step in steps] == [True, False]
    assert not list(tmp_path.rglob("*slices*"))


def train_megatron(talk: Talk, part: str, rank: int, base: Path, layout: Layout) -> list[str]:
    on_node(base, NODES[part][rank])
    with patch.dict(OPTIONS, disks="node-local"):
        return test_rlinf_megatron.train(talk, part, rank, LOG_DIR, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2)], ids=["tensor", "pipeline"])
def test_megatron_loads_below_rlinfs_directories_on_each_node(
    world: World, tmp_path: Path, layout: Layout
) -> None:
    ranks = world.start_parts(test_rlinf_megatron.PARTS, train_megatron, tmp_path, layout)
    introduce(ranks)
    introduce(ranks)
    for rank in ranks:
        rank.hear()
