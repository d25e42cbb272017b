"""Slices that come from another node: the file is the one that a single rank would have written."""

from __future__ import annotations

import queue
import random
import threading
import zlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncckpt import AsyncCheckpointer, _native, transfer
from asyncckpt.commit import Attempt
from asyncckpt.errors import CheckpointError, RankError, SaveError
from asyncckpt.filesystem import Filesystem
from asyncckpt.formats import slices
from asyncckpt.formats.image import FileImage
from asyncckpt.formats.slices import BLOCK
from asyncckpt.plan import Apart, SharedPart
from asyncckpt.transfer import Parcel, Pipe
from tests.process_world import Talk, World, process_world
from tests.test_node_disks import ROOT, on_node
from tests.test_shared_files import HOST_MEMORY, PATH, RANKS, SIZES, Sliced, memory_nbytes
from tests.test_shared_files import checkpointer_of as checkpointer_over
from tests.test_slices import MANIFEST_BLOCK, pieces_of, put_together, random_file, write_part


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


class Ends:
    """Two ends of a pipe in this process: what one sends, the other receives, in the same portions."""

    def __init__(self) -> None:
        self._sent: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def send(self, data: Any) -> None:
        self._sent.put(bytes(data))

    def receive(self, nbytes: int) -> memoryview:
        data = self._sent.get(timeout=30)
        assert len(data) == nbytes
        return memoryview(data)


def parcel_of(
    rng: random.Random, directory: Path, part: SharedPart, pieces: list[Any], arrays: list[Any], name: str
) -> Parcel:
    """A rank's own file: its pieces in any order, with other things between them."""
    order = list(range(len(pieces)))
    rng.shuffle(order)
    data, places = bytearray(), {}
    for index in order:
        data += rng.randbytes(rng.randrange(100))
        places[index] = len(data)
        data += arrays[index].tobytes()
    (directory / name).write_bytes(data)
    table = np.array([(*pieces[n], places[n]) for n in range(len(pieces))], np.int64).reshape(-1, 3)
    apart = Apart(0, table, tuple(range(len(pieces))))
    return Parcel(part, apart, directory / name, [zlib.crc32(array.tobytes()) for array in arrays])


def exchange(parcels: list[Parcel], attempt: Attempt, parts: list[SharedPart], rank: int) -> Any:
    pipe: Any = Ends()
    failed: list[BaseException] = []

    def send() -> None:
        try:
            transfer.send(pipe, Filesystem(), parcels)
        except CheckpointError as error:
            failed.append(error)
            pipe.send(b"")

    thread = threading.Thread(target=send)
    thread.start()
    try:
        return transfer.receive(pipe, Filesystem(), attempt, parts, rank, "rank 7", MANIFEST_BLOCK)
    except AssertionError:
        thread.join()
        raise failed[0] from None
    finally:
        thread.join()


def shared_part(image: FileImage, spans: np.ndarray) -> SharedPart:
    return SharedPart(image.path, 0, "digest", None, None, image=image, spans=spans)


@pytest.mark.parametrize("seed", range(40))
def test_what_comes_from_elsewhere_is_what_would_have_been_written_here(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(transfer, "CHUNK_NBYTES", rng.choice([17, 3000, 1 << 20]))
    image, contents, table = random_file(rng, rng.choice([1, 2, 3, 5]))
    spans = slices.spans_of(image, table)
    part = shared_part(image, spans)
    (tmp_path / "shared").mkdir()
    attempt = Attempt("0" * 16 + "-000001", 1, tmp_path, ())
    written, edges = {}, {}
    for rank in np.unique(spans[:, 2]).tolist():
        own = spans[spans[:, 2] == rank]
        pieces, arrays = pieces_of(rng, image, contents, own)
        if rng.random() < 0.3:
            laid_out = slices.part_of(image, own, pieces, f"edges_{rank}", 0)
            written[rank], edges[rank] = write_part(tmp_path, laid_out, arrays, 4 * BLOCK, direct=False)
        else:
            parcel = parcel_of(rng, tmp_path, part, pieces, arrays, f"own_{rank}")
            handed = exchange([parcel], attempt, [part], rank)[image.path]
            assert handed.digest == "digest"
            written[rank], edges[rank] = list(handed.runs), handed.held
    closing = slices.close(image, spans, written, edges.__getitem__, MANIFEST_BLOCK, _native.crc32_combine)
    expected = image.render(contents)
    assert put_together(tmp_path, image, closing) == expected
    blocks = [expected[at : at + MANIFEST_BLOCK] for at in range(0, len(expected), MANIFEST_BLOCK)]
    assert list(closing.block_crcs) == [zlib.crc32(block) for block in blocks]


def test_what_a_disk_has_lost_is_not_sent_on(tmp_path: Path) -> None:
    rng = random.Random(3)
    image, contents, table = random_file(rng, 1)
    spans = slices.spans_of(image, table)
    part = shared_part(image, spans)
    pieces, arrays = pieces_of(rng, image, contents, spans)
    parcel = parcel_of(rng, tmp_path, part, pieces, arrays, "own")
    data = bytearray(parcel.path.read_bytes())
    data[parcel.apart.pieces[0, 2]] ^= 1
    parcel.path.write_bytes(data)
    (tmp_path / "shared").mkdir()
    attempt = Attempt("0" * 16 + "-000001", 1, tmp_path, ())
    with pytest.raises(SaveError, match="not what was written there"):
        exchange([parcel], attempt, [part], 0)
    parcel.path.write_bytes(data[: len(data) // 2])
    with pytest.raises(SaveError, match=r"EIO|not what was written"):
        exchange([parcel], attempt, [part], 0)


def test_who_sends_something_else_is_told(tmp_path: Path) -> None:
    image, _, table = random_file(random.Random(5), 1)
    part = shared_part(image, slices.spans_of(image, table))
    attempt = Attempt("0" * 16 + "-000001", 1, tmp_path, ())
    with pytest.raises(RankError, match=r"rank 7 sends , not shared/file\.pt"):
        exchange([], attempt, [part], 0)


# ---------------------------------------------------------------------------- between processes


def checkpointer_of(rank: int, sliced: Any, **options: Any) -> AsyncCheckpointer:
    return checkpointer_over(ROOT, rank, sliced, disks="node-local", **options)


def save(talk: Talk, rank: int, base: Path, nodes: list[int]) -> bool:
    """Three steps, and what is loaded again."""
    on_node(base, nodes[rank])
    with checkpointer_of(rank, Sliced(rank, SIZES)) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step).wait()
    live, expected = Sliced(rank, SIZES, fill=False), Sliced(rank, SIZES)
    with checkpointer_of(rank, live) as ckpt:
        resume = ckpt.load_latest()
    assert resume is not None
    assert resume.step == 3
    return all(
        torch.equal(a[1], b[1])
        for one, other in zip(live.tensors, expected.tensors, strict=True)
        for a, b in zip(one[2], other[2], strict=True)
    )


@pytest.mark.parametrize("nodes", [[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 2, 3]], ids=str)
def test_stock_torch_reads_what_ranks_of_several_nodes_wrote(
    world: World, tmp_path: Path, nodes: list[int]
) -> None:
    assert world.run(RANKS, save, tmp_path, nodes) == [True] * RANKS
    for step in (1, 3):
        tree = torch.load(tmp_path / f"node0/steps/iter_{step:07d}" / PATH, weights_only=True)
        for number, whole in Sliced(0, SIZES).expected().items():
            assert torch.equal(tree[number][(torch.bfloat16, torch.float32)]["param"], whole)
    assert {path.parents[3].name for path in tmp_path.rglob(Path(PATH).name)} == {"node0"}
    assert not list(tmp_path.rglob("*edges*"))
    for rank, node in enumerate(nodes):
        own = tmp_path / f"node{node}/steps/iter_0000003/{PATH}.slices_{rank:05d}"
        assert own.exists() is (node != 0)
        if own.exists():  # a file that torch reads, and nothing of ours in it
            assert torch.load(own, weights_only=True)["buckets_coalesced"] is True


def save_counted(talk: Talk, rank: int, base: Path, sizes: tuple[int, ...]) -> int:
    """Peak of memory above what this process had before."""
    on_node(base, rank // 2)
    sliced = Sliced(rank, sizes)
    before = memory_nbytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
    with checkpointer_of(rank, sliced, host_memory=HOST_MEMORY) as ckpt:
        for step in (1, 2):
            ckpt.save(step).wait()
    return memory_nbytes("VmHWM") - before


def test_hundreds_of_mib_from_elsewhere_stay_within_the_memory_that_was_given(
    world: World, tmp_path: Path
) -> None:
    sizes = (26_000_001, 26_000_003, 26_000_005, 1025)
    for peak in world.run(RANKS, save_counted, tmp_path, sizes):
        assert peak <= HOST_MEMORY + (64 << 20), peak >> 20


def lose_a_slice(talk: Talk, rank: int, base: Path) -> Any:
    on_node(base, rank // 2)
    with checkpointer_of(rank, Sliced(rank, SIZES, fill=False)) as ckpt:
        resume = ckpt.load_latest()
    assert resume is not None
    return resume.step, [line[:7] for line in resume.passed_over]


@pytest.mark.parametrize("how", ["flip", "lose"])
def test_a_slice_that_is_damaged_or_gone_makes_all_fall_back(world: World, tmp_path: Path, how: str) -> None:
    world.run(RANKS, save, tmp_path, [0, 0, 1, 1])
    own = tmp_path / f"node1/steps/iter_0000003/{PATH}.slices_00003"
    data = bytearray(own.read_bytes())
    data[len(data) // 2] ^= 4
    own.write_bytes(data)
    if how == "lose":
        own.unlink()
    assert world.run(RANKS, lose_a_slice, tmp_path) == [(2, ["step 3:"])] * RANKS


def ends(seconds: float) -> list[Pipe]:
    """Both ends of a pipe, in this process."""
    store = torch.distributed.HashStore()
    groups: list[Any] = [None, None]

    def make(me: int) -> None:
        groups[me] = torch.distributed.ProcessGroupGloo(store, me, 2, timedelta(seconds=seconds))

    threads = [threading.Thread(target=make, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [Pipe(groups.pop(0), me, f"rank {1 - me}") for me in (0, 1)]


def test_who_hangs_up_is_heard_of_at_once_also_where_something_holds_the_pipe() -> None:
    first, second = ends(seconds=60)
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        try:
            second.receive(5)
        except RankError as error:
            heard.put(str(error))

    listener = threading.Thread(target=listen)
    listener.start()
    first.close()
    assert "rank 0" in heard.get(timeout=30)
    listener.join()


def test_a_pipe_names_who_is_gone() -> None:
    first, second = ends(seconds=0.5)
    sender = threading.Thread(target=first.send, args=(b"hello",))  # which ends when it is taken
    sender.start()
    assert bytes(second.receive(5)) == b"hello"
    sender.join()
    with pytest.raises(RankError, match="rank 0 does not go on exchanging slices: Timed out"):
        second.receive(5)
