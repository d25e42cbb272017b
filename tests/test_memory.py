"""What staging takes stays within what was allowed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from asyncckpt import AsyncCheckpointer, _native, memory
from asyncckpt.snapshot import Stager

faults = _native.faults


@pytest.fixture(autouse=True)
def no_faults_left() -> Iterator[None]:
    yield
    faults.disarm()


@pytest.mark.parametrize("nbytes", [1 << 16, (1 << 16) + 1, 1 << 20, (5 << 20) + 12345, 64 << 20, 300 << 20])
def test_arena_and_reserve_fit_into_host_memory(nbytes: int) -> None:
    stager = Stager(nbytes)
    try:
        assert stager._engine.arena_nbytes + stager.reserve_nbytes <= nbytes
        assert stager._engine.arena_nbytes + stager.reserve_nbytes > 0.8 * nbytes
        assert stager._engine.arena_nbytes // stager._engine.chunk_nbytes >= 8
        assert stager._engine.chunk_nbytes % 4096 == 0
    finally:
        stager.close()


def test_copies_of_all_saves_in_flight_share_one_reserve(tmp_path: Path) -> None:
    nbytes = 1 << 20
    model = nn.Module()
    model.register_buffer("statistics", torch.zeros(nbytes // 8 // 4 - 1024))
    with AsyncCheckpointer(
        tmp_path, model=model, host_memory=nbytes, max_in_flight=3, save_rng=False
    ) as checkpointer:
        faults.arm(faults.Op.copy, 0, faults.Kind.pause)
        handles = [checkpointer.save(step) for step in (1, 2, 3)]
        assert not any(handle.done() for handle in handles)
        copied = sum(handle.report.captured_nbytes for handle in handles)
        arena = checkpointer._stager._engine.arena_nbytes
        faults.disarm()
        checkpointer.wait()
    assert handles[0].report.captured_nbytes > 0
    assert arena + copied <= nbytes


def test_the_default_is_enough_for_the_state_and_shared_by_the_ranks_of_a_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(4096, 4096)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = memory.default_host_memory_bytes([model], True)
    weights = sum(p.nbytes for p in model.parameters())
    assert alone >= min(3 * weights, memory.available_bytes() // 4)
    assert memory.default_host_memory_bytes([model], False) < alone
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(1 << 30))
    assert memory.default_host_memory_bytes([model], True) == 64 << 20
    assert memory.available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_cgroup_limits_with_all_its_ancestors(tmp_path: Path) -> None:
    child = tmp_path / "a" / "b"
    child.mkdir(parents=True)
    (child / "memory.max").write_text("max\n")
    (child / "memory.current").write_text("5\n")
    (tmp_path / "a" / "memory.max").write_text("1000\n")
    (tmp_path / "a" / "memory.current").write_text("400\n")
    assert memory._left(child, "memory.max", "memory.current") == 600
    assert memory._left(tmp_path / "nowhere", "memory.max", "memory.current") > 1 << 60
