"""Files that several ranks write together, whole: through the checkpointer, and read by stock torch."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncckpt import AsyncCheckpointer, _native
from asyncckpt.errors import CheckpointError, LeafError, RankError
from asyncckpt.layouts.megatron import ModelRank
from asyncckpt.sections import Section
from asyncckpt.shared import SHARED_BRANCH, SharedFile, SlicedTensor
from asyncckpt.tree import Matching
from tests.process_world import Talk, World, process_world

RANKS = 4
PATH = "mp_rank_00/distrib_optim.pt"
faults = _native.faults


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


class Sliced:
    """Flat tensors cut at odd places, in pieces with gaps between them, as of an optimizer that is sharded.

    Element i of tensor t is i + t / 8, or 0 in a gap.
    """

    def __init__(
        self, rank: int, sizes: tuple[int, ...], fill: bool = True, dtype: torch.dtype = torch.float32
    ) -> None:
        self.tensors: list[tuple[int, np.ndarray, tuple[tuple[int, torch.Tensor], ...]]] = []
        for number, size in enumerate(sizes):
            cuts = [
                0,
                *(size * (r + 1) // RANKS - (r * 3 + number) % max(1, size // 20) for r in range(RANKS - 1)),
                size,
            ]
            slices = np.array([[a, b, r] for r, (a, b) in enumerate(pairwise(cuts))], np.int64)
            begin, end = cuts[rank], cuts[rank + 1]
            pieces = []
            for a in range(begin, end, max(1, (end - begin) // 3)):
                b = min(end, a + max(1, (end - begin) // 3) - 1)
                if a < b:
                    value = torch.arange(a, b).to(dtype) + number / 8 if fill else torch.full((b - a,), -1.0)
                    pieces.append((a, value))
            self.tensors.append((size, slices, tuple(pieces)))

    def sections(self) -> Mapping[str, Section]:
        return {SHARED_BRANCH: self}

    def optimizers(self) -> list[Any]:
        return []

    def paths(self) -> tuple[str, ...]:
        return (PATH,)

    def capture(self) -> list[SharedFile]:
        content: dict[Any, Any] = {"buckets_coalesced": True}
        for number, (size, slices, pieces) in enumerate(self.tensors):
            sliced = SlicedTensor(torch.float32, (size,), slices, pieces)
            content[number] = {(torch.bfloat16, torch.float32): {"param": sliced, "numel": size}}
        return [SharedFile(PATH, 0, content)]

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        for number, (_, _, pieces) in enumerate(self.tensors):
            whole = stored[PATH][number][(torch.bfloat16, torch.float32)]["param"]
            for begin, piece in pieces:
                matching.into_slice(f"{name}.{number}", whole, begin, piece)

    def expected(self) -> dict[int, torch.Tensor]:
        """Of all ranks, from the pieces of each."""
        wholes = {}
        sizes = tuple(size for size, _, _ in self.tensors)
        for number, size in enumerate(sizes):
            whole = torch.zeros(size)
            for rank in range(RANKS):
                for begin, piece in Sliced(rank, sizes).tensors[number][2]:
                    whole[begin : begin + len(piece)] = piece
            wholes[number] = whole
        return wholes


def checkpointer_of(root: Path, rank: int, sliced: Any, **options: Any) -> AsyncCheckpointer:
    return AsyncCheckpointer(
        root,
        optimizer=sliced,
        model=torch.nn.Linear(3, 3),
        layout="megatron",
        model_rank=ModelRank(writes_model=rank == 0),
        **{"rank_timeout_s": 30, "fence_timeout_s": 60, "host_memory": 8 << 20, **options},
    )


SIZES = (3, 100, 1025, 5000, 300_000, 2_000_000)


def save(
    talk: Talk, rank: int, root: Path, host_memory: dict[int, int], sizes: tuple[int, ...] = SIZES
) -> int:
    with checkpointer_of(root, rank, Sliced(rank, sizes), host_memory=host_memory.get(rank, 8 << 20)) as ckpt:
        report = ckpt.save(1).wait()
        ckpt.save(2)
    return report.nbytes


def load(talk: Talk, rank: int, root: Path, sizes: tuple[int, ...] = SIZES) -> bool:
    live = Sliced(rank, sizes, fill=False)
    with checkpointer_of(root, rank, live, read_only=True) as checkpointer:
        resume = checkpointer.load_latest()
    assert resume is not None
    assert resume.verified
    expected = Sliced(rank, sizes)
    return all(
        torch.equal(a[1], b[1])
        for one, other in zip(live.tensors, expected.tensors, strict=True)
        for a, b in zip(one[2], other[2], strict=True)
    )


@pytest.mark.parametrize(
    "host_memory", [{}, {1: 1 << 20, 2: 256 << 10}], ids=["alike", "chunks of three sizes"]
)
def test_stock_torch_reads_what_four_ranks_wrote(
    world: World, tmp_path: Path, host_memory: dict[int, int]
) -> None:
    written = world.run(RANKS, save, tmp_path, host_memory)
    path = tmp_path / "iter_0000002" / PATH
    tree = torch.load(path, weights_only=True)
    expected = Sliced(0, SIZES).expected()
    assert tree["buckets_coalesced"] is True
    for number, whole in expected.items():
        stored = tree[number][(torch.bfloat16, torch.float32)]
        assert stored["numel"] == len(whole)
        assert torch.equal(stored["param"], whole)
    reference = tmp_path / "distrib_optim.pt"
    torch.save(tree, reference)
    assert reference.stat().st_size == path.stat().st_size
    differing = sum(a != b for a, b in zip(reference.read_bytes(), path.read_bytes(), strict=True))
    assert differing <= 48  # the serialization id, and its CRC twice
    files = {
        str(file.relative_to(tmp_path / "iter_0000002")) for file in (tmp_path / "iter_0000002").rglob("*.pt")
    }
    assert files == {PATH, "mp_rank_00/model_optim_rng.pt", *(f"rank_{rank:05d}.pt" for rank in range(RANKS))}
    assert not list(tmp_path.rglob("*edges*"))
    share = sum(whole.nbytes for whole in expected.values()) / RANKS
    assert all(0.9 * share < nbytes < 1.2 * share + 64_000 for nbytes in written)
    assert world.run(RANKS, load, tmp_path) == [True] * RANKS


def test_a_flipped_bit_in_any_ranks_slice_is_found(world: World, tmp_path: Path) -> None:
    world.run(RANKS, save, tmp_path, {})
    path = tmp_path / "iter_0000002" / PATH
    data = bytearray(path.read_bytes())
    for place in (len(data) * 7 // 8, len(data) - 3, 0):
        data[place] ^= 1
        path.write_bytes(data)
        assert world.run(RANKS, latest, tmp_path) == [1] * RANKS
        data[place] ^= 1


def latest(talk: Talk, rank: int, root: Path) -> int:
    with checkpointer_of(root, rank, Sliced(rank, SIZES, fill=False), read_only=True) as checkpointer:
        resume = checkpointer.load_latest()
    assert resume is not None
    return resume.step


def save_refused(talk: Talk, rank: int, root: Path, odd: int) -> str:
    sizes = (*SIZES[:-1], SIZES[-1] + 8) if rank == odd else SIZES
    try:
        with checkpointer_of(root, rank, Sliced(rank, sizes)) as checkpointer:
            checkpointer.save(1)
    except RankError as error:
        return str(error)
    return ""


def test_ranks_that_disagree_on_the_file_do_not_publish_it(world: World, tmp_path: Path) -> None:
    said = world.run(RANKS, save_refused, tmp_path, 2)
    assert all("rank 2 saves something else there than rank 0" in text for text in said), said
    assert not list(tmp_path.glob("iter_*"))
    assert not list(tmp_path.glob(".*edges*"))


def save_on_a_full_disk(talk: Talk, rank: int, root: Path, full: int, op: str) -> list[Any]:
    heard: list[Any] = []
    try:
        with checkpointer_of(root, rank, Sliced(rank, SIZES), on_error="warn") as checkpointer:
            if rank == full:
                faults.arm(getattr(faults.Op, op), 0, faults.Kind.error, errno.ENOSPC)
            handle = checkpointer.save(1)
            try:
                handle.wait()
            except CheckpointError as error:
                heard.append(str(error))
            faults.disarm()
            checkpointer.save(2).wait()
            heard.append(checkpointer.steps())
    finally:
        faults.disarm()
    return heard


@pytest.mark.parametrize("full", [0, 3])
@pytest.mark.parametrize("op", ["pwrite", "fsync", "open"])
def test_a_rank_whose_disk_is_full_fails_the_save_of_all_and_the_next_one_stands(
    world: World, tmp_path: Path, full: int, op: str
) -> None:
    for said, steps in world.run(RANKS, save_on_a_full_disk, tmp_path, full, op):
        assert "ENOSPC" in said or "No space left" in said, said
        assert steps == [2]
    assert world.run(RANKS, load, tmp_path) == [True] * RANKS


def test_a_piece_of_another_dtype_is_refused_by_name(tmp_path: Path) -> None:
    sliced = Sliced(0, (64,), dtype=torch.float16)
    with (
        checkpointer_of(tmp_path, 0, sliced, world_size=1) as checkpointer,
        pytest.raises(LeafError, match=r"distrib_optim.*torch.float16"),
    ):
        checkpointer.save(1)


def test_a_piece_outside_of_its_ranks_slice_is_refused(tmp_path: Path) -> None:
    sliced = Sliced(0, (64,))
    size, slices, pieces = sliced.tensors[0]
    sliced.tensors[0] = (size, slices, (*pieces, (60, torch.ones(4))))
    with (
        checkpointer_of(tmp_path, 0, sliced, world_size=1) as checkpointer,
        pytest.raises(LeafError, match="not within the slice"),
    ):
        checkpointer.save(1)


# ---------------------------------------------------------------------------- what it costs


def save_counted(talk: Talk, rank: int, root: Path, sizes: tuple[int, ...]) -> tuple[int, list[int], int]:
    """Peak of memory above what this process had before, bytes told to the store per save, plans made."""
    sliced, told, said = Sliced(rank, sizes), [], [0]
    before = memory_nbytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
    with checkpointer_of(root, rank, sliced, host_memory=HOST_MEMORY) as checkpointer:
        tell = checkpointer._ranks._client.set  # type: ignore[union-attr]

        def count(key: str, value: bytes) -> None:
            said[0] += len(value) if "/beat/" not in key else 0
            tell(key, value)

        checkpointer._ranks._client.set = count  # type: ignore[union-attr,method-assign]
        for step in (1, 2, 3):
            said[0] = 0
            checkpointer.save(step).wait()
            told.append(said[0])
        return memory_nbytes("VmHWM") - before, told, checkpointer.plans_made


def memory_nbytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


HOST_MEMORY = 16 << 20


def test_hundreds_of_mib_cost_the_memory_that_was_given_and_a_few_crcs(world: World, tmp_path: Path) -> None:
    sizes = (26_000_001, 26_000_003, 26_000_005, 1025)
    for peak, told, plans in world.run(RANKS, save_counted, tmp_path, sizes):
        assert peak <= HOST_MEMORY + (64 << 20), peak >> 20
        assert plans == 1
        chunks = 4 * sum(sizes) / RANKS / (1 << 20)  # that small a ring has chunks of 1 MiB
        assert max(told[1:]) <= 64 * chunks + 2048, told


# ---------------------------------------------------------------------------- odd states


def save_changing(talk: Talk, rank: int, root: Path) -> int:
    """Three structures, one after the other, the last with empty tensors; plans made."""
    sliced = Sliced(rank, (100, 5000))
    with checkpointer_of(root, rank, sliced) as checkpointer:
        for step, sizes in enumerate([(100, 5000), (100, 5000), (7000, 3, 90_000), (0, 1, 70_001, 0)]):
            checkpointer.fence()
            sliced.tensors = Sliced(rank, sizes).tensors
            checkpointer.save(step).wait()
        return checkpointer.plans_made


def test_another_structure_on_all_ranks_is_planned_once(world: World, tmp_path: Path) -> None:
    assert world.run(RANKS, save_changing, tmp_path) == [3] * RANKS
    assert world.run(RANKS, load, tmp_path, (0, 1, 70_001, 0)) == [True] * RANKS
    tree = torch.load(tmp_path / "iter_0000003" / PATH, weights_only=True)
    for number, whole in Sliced(0, (0, 1, 70_001, 0)).expected().items():
        assert torch.equal(tree[number][(torch.bfloat16, torch.float32)]["param"], whole)


def save_unseen(talk: Talk, rank: int, root: Path) -> str:
    """What is said of a save while which a tensor of rank 2 was written to behind the counters."""
    sliced = Sliced(rank, SIZES)
    with checkpointer_of(root, rank, sliced, guard="full", on_error="warn") as checkpointer:
        checkpointer.save(1).wait()
        if rank == 2:
            faults.arm(faults.Op.copy, 0, faults.Kind.pause, repeat=True)
        handle = checkpointer.save(2)
        if rank == 2:
            assert faults.wait_for_hits(faults.Op.copy, 1)
            sliced.tensors[-1][2][1][1].data[5] = -1
            faults.disarm()
        try:
            handle.wait()
        except CheckpointError as error:
            return str(error)
    return ""


def test_full_guard_sees_what_counters_do_not(world: World, tmp_path: Path) -> None:
    for rank, said in enumerate(world.run(RANKS, save_unseen, tmp_path)):
        assert "distrib_optim.pt (piece 1 of tensor 5) changed before it was copied" in said
        assert rank == 2 or "rank 2" in said
    assert world.run(RANKS, latest, tmp_path) == [1] * RANKS


class Empty(Sliced):
    """A file in which there is no tensor."""

    def capture(self) -> list[SharedFile]:
        return [SharedFile("mp_rank_01/distrib_optim.pt", 1, {"buckets_coalesced": True})]

    def paths(self) -> tuple[str, ...]:
        return ("mp_rank_01/distrib_optim.pt",)


def save_empty(talk: Talk, rank: int, root: Path) -> None:
    with checkpointer_of(root, rank, Empty(rank, ())) as checkpointer:
        checkpointer.save(1).wait()
        checkpointer.save(2)


def test_a_file_without_tensors_is_its_closers(world: World, tmp_path: Path) -> None:
    world.run(RANKS, save_empty, tmp_path)
    path = tmp_path / "iter_0000002" / "mp_rank_01/distrib_optim.pt"
    assert torch.load(path, weights_only=True) == {"buckets_coalesced": True}
