"""Files written in slices whose pieces lie on CUDA devices, over the driver double."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from asyncckpt import AsyncCheckpointer, _native, devices
from asyncckpt.errors import TornStateError
from asyncckpt.layouts.megatron import ModelRank
from asyncckpt.sections import Section
from asyncckpt.shared import SHARED_BRANCH, SharedFile, SlicedTensor
from asyncckpt.tree import Matching
from tests.cuda_double import Double
from tests.fake_cuda import FakeCuda

PATH = "mp_rank_00/distrib_optim.pt"
SIZES = (3, 1025, 5000, 100_000, 0, 300_001)
Guard = Literal["versions", "full"]
faults = _native.faults


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    double = Double()
    double.reset(seed=5, delay_us_max=50)
    with FakeCuda(double) as world:
        monkeypatch.setattr(devices, "seam", world)
        yield world
    double.reset()


class Sliced:
    """Flat tensors in three pieces each, with gaps between; by turns on two devices and on the host.

    Trained by SGD with unit gradients, so that each step lowers every element by one.
    """

    def __init__(self, world: FakeCuda) -> None:
        self.world = world
        self.pieces: list[list[tuple[int, torch.nn.Parameter]]] = []
        for number, size in enumerate(SIZES):
            share = max(1, size // 3)
            starts = range(0, size, share) if number != 4 else ()
            self.pieces.append([])
            for turn, begin in enumerate(starts):
                values = torch.arange(begin, min(size, begin + share) - (share > 1)) + number / 8
                there = world.to_device(values, turn) if turn < 2 else values
                self.pieces[-1].append((begin, torch.nn.Parameter(there)))
        self.optimizer = torch.optim.SGD([p for _, p in self.all()], lr=1.0, foreach=False)

    def all(self) -> list[tuple[int, torch.nn.Parameter]]:
        return [piece for pieces in self.pieces for piece in pieces]

    def step(self) -> None:
        for _, piece in self.all():
            piece.grad = torch.ones_like(piece)
        self.optimizer.step()

    def wholes(self) -> list[torch.Tensor]:
        found = []
        for size, pieces in zip(SIZES, self.pieces, strict=True):
            found.append(torch.zeros(size))
            for begin, piece in pieces:
                found[-1][begin : begin + piece.numel()] = self.world.to_host(piece)
        return found

    def sections(self) -> Mapping[str, Section]:
        return {SHARED_BRANCH: self}

    def optimizers(self) -> list[Any]:
        return [self.optimizer]

    def paths(self) -> tuple[str, ...]:
        return (PATH,)

    def capture(self) -> list[SharedFile]:
        content = {}
        for number, (size, pieces) in enumerate(zip(SIZES, self.pieces, strict=True)):
            table = np.array([[0, size, 0]][: min(size, 1)], np.int64).reshape(-1, 3)
            own = tuple((begin, piece.detach()) for begin, piece in pieces)
            content[number] = SlicedTensor(torch.float32, (size,), table, own)
        return [SharedFile(PATH, 0, content)]

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        for number, pieces in enumerate(self.pieces):
            for begin, piece in pieces:
                matching.into_slice(f"{name}.{number}", stored[PATH][number], begin, piece.detach())

    def checkpointer(self, root: Path, **options: Any) -> AsyncCheckpointer:
        return AsyncCheckpointer(
            root, optimizer=self, layout="megatron", model_rank=ModelRank(), fence_timeout_s=60, **options
        )


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def stored(root: Path, step: int) -> list[torch.Tensor]:
    tree = torch.load(root / f"iter_{step:07d}" / PATH, weights_only=True)
    return [tree[number] for number in range(len(SIZES))]


@pytest.mark.parametrize("guard", ["versions", "full"])
@pytest.mark.parametrize("host_memory", [1 << 16, 8 << 20])
def test_slices_on_devices_are_those_of_the_save(
    world: FakeCuda, tmp_path: Path, guard: Guard, host_memory: int
) -> None:
    sliced, saved = Sliced(world), {}
    with sliced.checkpointer(tmp_path, guard=guard, host_memory=host_memory) as checkpointer:
        for step in range(1, 5):
            saved[step] = sliced.wholes()
            checkpointer.save(step)
            sliced.step()
        assert checkpointer.plans_made == 1
    assert all(same(stored(tmp_path, step), whole) for step, whole in saved.items())
    live = Sliced(world)
    live.step()
    with live.checkpointer(tmp_path, host_memory=host_memory) as checkpointer:
        resume = checkpointer.load_latest()
        assert resume is not None
        assert resume.verified
    assert same(live.wholes(), saved[4])


def test_copies_that_come_late_have_the_bytes_of_the_save(world: FakeCuda, tmp_path: Path) -> None:
    sliced = Sliced(world)
    with sliced.checkpointer(tmp_path, host_memory=8 << 20) as checkpointer:
        checkpointer.save(1).wait()
        sliced.step()
        expected = sliced.wholes()
        with world.double.holding_copies():
            handle = checkpointer.save(2)
            sliced.step()  # the devices wait for the copies, the host does not
            assert not handle.done()
        handle.wait()
        assert not same(sliced.wholes(), expected)
    assert same(stored(tmp_path, 2), expected)


@pytest.mark.parametrize("guard", ["versions", "full"])
def test_a_disk_that_comes_late_has_the_bytes_of_the_save(
    world: FakeCuda, tmp_path: Path, guard: Guard
) -> None:
    """The full guard copies inside save(), so that it is the disk that holds up the copies here."""
    sliced = Sliced(world)
    with sliced.checkpointer(tmp_path, guard=guard, host_memory=1 << 16) as checkpointer:
        checkpointer.save(1).wait()
        expected = sliced.wholes()
        with disk_held():
            handle = checkpointer.save(2)
            threading.Timer(0.3, faults.disarm).start()
            sliced.step()
        handle.wait()
        assert not same(sliced.wholes(), expected)
    assert same(stored(tmp_path, 2), expected)


def test_slices_written_behind_the_counters_are_seen_by_the_full_guard(
    world: FakeCuda, tmp_path: Path
) -> None:
    sliced = Sliced(world)
    with sliced.checkpointer(tmp_path, guard="full", host_memory=1 << 16, on_error="warn") as checkpointer:
        checkpointer.save(1).wait()
        with disk_held():
            handle = checkpointer.save(2)
            world.kernel(lambda alias: alias.sub_(1), sliced.pieces[5][1][1].detach())
            world.synchronize(1)
        with pytest.raises(TornStateError, match=r"distrib_optim.*piece 1 of tensor 5"):
            handle.wait()
        checkpointer.save(3).wait()
    assert same(stored(tmp_path, 3), sliced.wholes())


@contextmanager
def disk_held() -> Iterator[None]:
    faults.arm(faults.Op.pwrite, 0, faults.Kind.pause, repeat=True)
    try:
        yield
    finally:
        faults.disarm()
