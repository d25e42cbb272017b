"""The engine and the reader on CUDA devices, over the driver double: real code, adversarial timing."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncckpt import _native
from asyncckpt.devices import HOST
from asyncckpt.formats.image import FileImage, ImageBuilder
from tests.cuda_double import (
    ILLEGAL_ADDRESS,
    NOT_SUPPORTED,
    OUT_OF_MEMORY,
    PORTABLE,
    Double,
    Kernel,
)

faults = _native.faults
CHUNK = 1 << 14
DELAY_US_MAX = 300
FORBIDDEN = {
    "cuCtxSynchronize",
    "cuStreamSynchronize",
    "cuMemcpyDtoH_v2",
    "cuMemcpyHtoD_v2",
    "cuStreamDestroy_v2",
}


@pytest.fixture
def double() -> Iterator[Double]:
    yield from fresh("")


def fresh(variant: str) -> Iterator[Double]:
    double = Double(variant)
    double.reset(seed=1, delay_us_max=DELAY_US_MAX)
    yield double
    double.release_copies()
    _native.faults.disarm()
    double.reset()


@pytest.fixture(params=["", "NO_BATCH", "BATCH_V1_ONLY", "BATCH_V2_ONLY"])
def any_driver(request: pytest.FixtureRequest) -> Iterator[Double]:
    yield from fresh(request.param)


class Block:
    """Device memory with random bytes."""

    def __init__(self, double: Double, nbytes: int, device: int = 0, seed: int = 0) -> None:
        self.device = device
        self.nbytes = nbytes
        self.address = double.allocate(max(1, nbytes), device)
        self.bytes = np.frombuffer(double.bytes_at(self.address, max(1, nbytes)), dtype=np.uint8)[:nbytes]
        self.bytes[:] = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


class HostBlock:
    device = HOST

    def __init__(self, nbytes: int, seed: int = 0) -> None:
        self.bytes = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
        self.nbytes = nbytes
        self.address = self.bytes.ctypes.data


class View:
    """Some bytes of a block."""

    def __init__(self, block: Block, offset: int, nbytes: int) -> None:
        self.device = block.device
        self.nbytes = nbytes
        self.address = block.address + offset
        self.bytes = block.bytes[offset : offset + nbytes]
        assert len(self.bytes) == nbytes


Source = Block | HostBlock | View


@contextmanager
def engine_over(double: Double, chunks: int = 64, copiers: int = 1) -> Iterator[_native.Engine]:
    engine = _native.Engine(
        arena_nbytes=chunks * CHUNK,
        chunk_nbytes=CHUNK,
        copiers=copiers,
        writers=2,
        direct=True,
        prefault=False,
        driver=str(double.path),
    )
    try:
        yield engine
    finally:
        double.release_copies()
        engine.close()


def submit(
    engine: _native.Engine,
    directory: Path,
    image: FileImage,
    sources: Sequence[Source],
    streams: Sequence[tuple[int, int]],
    slabs: Sequence[int] | None = None,
) -> _native.Job:
    native = _native.make_image(
        image.path, image.nbytes, image.literals, image.extents, image.fixups, image.records
    )
    return engine.submit(
        str(directory),
        [native],
        np.array([source.address for source in sources], dtype=np.uint64),
        np.array([source.nbytes for source in sources], dtype=np.uint64),
        np.array([source.device for source in sources], dtype=np.int32),
        streams,
        None if slabs is None else np.array(slabs, dtype=np.int32),
    )


def image_of(sources: Sequence[Source], path: str = "file") -> FileImage:
    """Every source a record, literals of odd sizes between, and the CRC of each record at the end."""
    builder = ImageBuilder(path)
    records = []
    for index, source in enumerate(sources):
        builder.literal(bytes([index % 256]) * (1 + 61 * index % 977))
        records.append(builder.record(index, source.nbytes))
    for record in records:
        builder.crc_of(record)
    return builder.build()


def contents(image: FileImage, sources: Sequence[Source]) -> bytes:
    return image.render([source.bytes.tobytes() for source in sources])


def finish(job: _native.Job) -> None:
    assert job.wait_finished(60)
    assert job.error is None


def mixed(double: Double, rng: random.Random, count: int = 24) -> list[Source]:
    sizes = [0, 1, 7, 512, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 13]
    made: list[Source] = []
    for seed in range(count):
        where = rng.choice([HOST, 0, 0, 1])
        nbytes = rng.choice(sizes)
        made.append(HostBlock(nbytes, seed) if where == HOST else Block(double, nbytes, where, seed))
    return made


STREAMS = [(0, 0), (1, 0)]


# ---------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("chunks", [1, 3, 200])
@pytest.mark.parametrize("copiers", [1, 3])
def test_files_are_what_the_image_says(any_driver: Double, tmp_path: Path, chunks: int, copiers: int) -> None:
    with engine_over(any_driver, chunks, copiers) as engine:
        for seed in range(4):
            any_driver.reset(seed, DELAY_US_MAX)
            sources = mixed(any_driver, random.Random(seed))
            image = image_of(sources, f"file-{seed}")
            job = submit(engine, tmp_path, image, sources, STREAMS)
            finish(job)
            expected = contents(image, sources)
            assert (tmp_path / image.path).read_bytes() == expected
            assert job.block_crcs(0) == [
                zlib.crc32(expected[i : i + CHUNK]) for i in range(0, len(expected), CHUNK)
            ]


def test_the_batch_is_used_where_there_is_one(any_driver: Double, tmp_path: Path) -> None:
    sources = [Block(any_driver, 100, seed=i) for i in range(200)]
    image = image_of(sources)
    with engine_over(any_driver) as engine:
        finish(submit(engine, tmp_path, image, sources, STREAMS[:1]))
    assert (tmp_path / "file").read_bytes() == contents(image, sources)
    one_by_one = any_driver.count("cuMemcpyDtoHAsync_v2")
    if any_driver.has("cuMemcpyBatchAsync") or any_driver.has("cuMemcpyBatchAsync_v2"):
        assert one_by_one <= 2
        assert any_driver.count("cuMemcpyBatchAsync") + any_driver.count("cuMemcpyBatchAsync_v2") >= 1
    else:
        assert one_by_one >= len(sources)


def test_a_refused_batch_is_copied_one_by_one() -> None:
    # A library of its own: the device remembers that batches are refused.
    for double in fresh("BATCH_V2_ONLY"):
        double.fail("cuMemcpyBatchAsync_v2", NOT_SUPPORTED)
        sources = [Block(double, 100, seed=i) for i in range(20)]
        image = image_of(sources)
        import tempfile

        with tempfile.TemporaryDirectory() as directory, engine_over(double) as engine:
            finish(submit(engine, Path(directory), image, sources, STREAMS[:1]))
            assert Path(directory, "file").read_bytes() == contents(image, sources)
        assert double.count("cuMemcpyDtoHAsync_v2") == len(sources)


def test_a_batch_that_is_refused_is_tried_once(tmp_path: Path) -> None:
    for double in fresh("BATCH_V1_ONLY"):  # a library of its own, as above
        sources = [Block(double, 100, seed=i) for i in range(20)]
        with engine_over(double) as engine:
            finish(submit(engine, tmp_path, image_of(sources, "batched"), sources, STREAMS[:1]))
            assert double.count("cuMemcpyBatchAsync") == 1
            assert engine.batch_failure == ""
            double.fail("cuMemcpyBatchAsync", OUT_OF_MEMORY)
            for name in ("refused", "after"):
                image = image_of(sources, name)
                finish(submit(engine, tmp_path, image, sources, STREAMS[:1]))
                assert (tmp_path / name).read_bytes() == contents(image, sources)
            assert double.count("cuMemcpyBatchAsync") == 2
            assert "cuMemcpyBatchAsync: device 0: CUDA_ERROR_OUT_OF_MEMORY" in engine.batch_failure


def test_nothing_waits_for_a_whole_stream_or_context(any_driver: Double, tmp_path: Path) -> None:
    sources = mixed(any_driver, random.Random(3))
    image = image_of(sources)
    with engine_over(any_driver, chunks=3) as engine:
        job = submit(engine, tmp_path, image, sources, STREAMS)
        assert job.wait_enqueued(60)
        job.hold_back(0, 0)
        finish(job)
        read_into(any_driver, tmp_path / "file", [(0, 100, Block(any_driver, 100))])
    log = any_driver.log()
    assert {"cuEventRecord", "cuStreamWaitEvent", "cuEventSynchronize"} <= {name for name, _ in log}
    assert not FORBIDDEN & {name for name, _ in log}
    mine = any_driver.thread_number()
    assert "cuEventSynchronize" not in {name for name, thread in log if thread == mine}
    for oddity in ("pageable", "spinning_waits", "blocking_streams", "unregistered_in_use", "deadlocks"):
        assert any_driver.counter(oddity) == 0, oddity


# ---------------------------------------------------------------------------- slabs


def places_in(image: FileImage) -> dict[int, int]:
    """Where in the file each source begins."""
    return {source: offset for offset, _, source, _, _ in image.extents.tolist() if source >= 0}


def shaped_like(double: Double, image: FileImage, sizes: Sequence[int], device: int = 0) -> list[View]:
    """Sources in one block as far apart as in the file, noise between them."""
    places = places_in(image)
    block = Block(double, image.nbytes, device, seed=image.nbytes)
    return [View(block, places[index], nbytes) for index, nbytes in enumerate(sizes)]


class Size:
    """A source of which only the size is known yet."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def copies_of(image: FileImage, sources: Sequence[Source], slabs: Sequence[int]) -> int:
    """How many copies from devices the contract asks for: runs of one slab and one distance, by chunk."""
    copies = 0
    for begin in range(0, image.nbytes, CHUNK):
        latest: tuple[int, int] | None = None
        for offset, nbytes, source, _, _ in image.extents.tolist():
            if source < 0 or offset >= begin + CHUNK or offset + nbytes <= begin:
                continue
            if sources[source].device == HOST:
                latest = None
                continue
            this = (slabs[source], sources[source].address - offset)
            copies += slabs[source] < 0 or this != latest
            latest = this
    return copies


def test_a_slab_shaped_like_the_file_is_one_copy_to_a_chunk(any_driver: Double, tmp_path: Path) -> None:
    sizes = [1 + 37 * index % 1500 for index in range(300)]
    image = image_of([Size(nbytes) for nbytes in sizes])  # type: ignore[misc]
    sources = shaped_like(any_driver, image, sizes)
    with engine_over(any_driver) as engine:
        finish(submit(engine, tmp_path, image, sources, STREAMS[:1], [7] * len(sources)))
    assert (tmp_path / "file").read_bytes() == contents(image, sources)
    last = max(places_in(image).values())
    assert any_driver.counter("copies_to_host") == 1 + last // CHUNK
    assert any_driver.count("cuMemcpyBatchAsync") + any_driver.count("cuMemcpyBatchAsync_v2") == 0


def test_without_slabs_every_source_is_a_copy(double: Double, tmp_path: Path) -> None:
    """The bytes between them are not ours to read."""
    sizes = [100] * 50
    image = image_of([Size(nbytes) for nbytes in sizes])  # type: ignore[misc]
    sources = shaped_like(double, image, sizes)
    for name, slabs in (("none", None), ("all -1", [-1] * 50), ("all different", list(range(50)))):
        double.reset()
        named = image_of(sources, name)
        with engine_over(double) as engine:
            finish(submit(engine, tmp_path, named, sources, STREAMS[:1], slabs))
        assert (tmp_path / name).read_bytes() == contents(named, sources)
        assert double.counter("copies_to_host") == copies_of(named, sources, slabs or [-1] * 50) >= 50


@pytest.mark.parametrize("chunks", [1, 3, 64])
def test_what_is_not_of_the_slab_comes_between(any_driver: Double, tmp_path: Path, chunks: int) -> None:
    """Host memory, other slabs, other devices, no slab, another distance: none is run over."""
    kinds = ["slab"] * 8 + ["host", "slab 1", "device 1", "loose", "shifted"]
    for seed in range(6):
        any_driver.reset(seed, DELAY_US_MAX)
        rng = random.Random(seed)
        chosen = [rng.choice(kinds) for _ in range(120)]
        sizes = [rng.choice([1, 8, 100, 700, CHUNK - 1, CHUNK + 1]) for _ in chosen]
        image = image_of([Size(nbytes) for nbytes in sizes], f"file-{seed}")  # type: ignore[misc]
        shaped = [shaped_like(any_driver, image, sizes, device) for device in (0, 0, 1)]
        sources: list[Source] = []
        slabs = []
        for index, (kind, nbytes) in enumerate(zip(chosen, sizes, strict=True)):
            source: Source = shaped[0][index]
            if kind == "host":
                source = HostBlock(nbytes, index)
            elif kind == "loose":
                source = Block(any_driver, nbytes, 0, index)
            elif kind == "shifted":
                source = View(Block(any_driver, nbytes + 64, 0, index), 64, nbytes)
            elif kind != "slab":
                source = shaped[2 if kind == "device 1" else 1][index]
            sources.append(source)
            slabs.append({"slab": 0, "shifted": 0, "slab 1": 1, "device 1": 2}.get(kind, -1))
        with engine_over(any_driver, chunks, copiers=2) as engine:
            finish(submit(engine, tmp_path, image, sources, STREAMS, slabs))
        assert (tmp_path / image.path).read_bytes() == contents(image, sources)
        assert any_driver.counter("copies_to_host") == copies_of(image, sources, slabs)


def test_a_slab_is_all_on_one_device(double: Double, tmp_path: Path) -> None:
    blocks: list[Source] = [Block(double, 10, 0), Block(double, 10, 1), HostBlock(10)]
    image = image_of(blocks)
    with engine_over(double) as engine:
        for slabs in ([0, 0, -1], [0, 1, 2]):
            with pytest.raises(ValueError, match=r"slab \d is not on one device"):
                submit(engine, tmp_path, image, blocks, STREAMS, slabs)
        with pytest.raises(ValueError, match="differ in length"):
            submit(engine, tmp_path, image, blocks, STREAMS, [0])


# ---------------------------------------------------------------------------- order


def overwrite(double: Double, stream: int, block: Block, value: int) -> Any:
    """A kernel that is enqueued, and runs when the stream gets there. The caller keeps the result alive."""

    def run(_: object) -> None:
        block.bytes[:] = value

    kernel = Kernel(run)
    double.launch(stream, kernel)
    return kernel


def saved_in_order(double: Double, directory: Path, seed: int, chunks: int) -> bool:
    """A kernel before the save, one after the fence; whether the file has what was between them."""
    stream = double.new_stream(0)
    block = Block(double, 8 * CHUNK)
    image = image_of([block], f"file-{seed}")
    with engine_over(double, chunks) as engine:
        kernels = [overwrite(double, stream, block, 1)]
        job = submit(engine, directory, image, [block], [(0, stream)])
        assert job.wait_enqueued(60)
        job.hold_back(0, stream)
        kernels.append(overwrite(double, stream, block, 2))
        finish(job)
        double.finish(stream)
    found = (directory / image.path).read_bytes()
    return found == image.render([bytes([1]) * block.nbytes])


@pytest.mark.parametrize("chunks", [2, 64])
def test_copies_see_finished_kernels_and_the_stream_waits_for_them(
    double: Double, tmp_path: Path, chunks: int
) -> None:
    assert all(saved_in_order(double, tmp_path, seed, chunks) for seed in range(40))


def test_the_order_test_can_fail(tmp_path: Path, double: Double) -> None:
    stream, block, gate = double.new_stream(0), Block(double, 8 * CHUNK), threading.Event()
    image = image_of([block])
    with engine_over(double) as engine, double.ignoring("cuStreamWaitEvent"):
        held = Kernel(lambda _: gate.wait(30) and None)
        double.launch(stream, held)
        kernel = overwrite(double, stream, block, 1)
        finish(submit(engine, tmp_path, image, [block], [(0, stream)]))  # else it would wait for the gate
        gate.set()
        double.finish(stream)
        del held, kernel
    assert (tmp_path / "file").read_bytes() != contents(image, [block])


def test_chunks_are_not_reused_before_the_device_is_done(double: Double, tmp_path: Path) -> None:
    sources: list[Source] = [Block(double, 40 * CHUNK, seed=7)]
    for name, misused in (("right", False), ("wrong", True)):
        image = image_of(sources, name)
        with engine_over(double, chunks=2) as engine:
            if misused:
                with double.ignoring("cuEventSynchronize"), double.holding_copies():
                    finish(submit(engine, tmp_path, image, sources, STREAMS[:1]))
            else:
                finish(submit(engine, tmp_path, image, sources, STREAMS[:1]))
            double.drain()  # whatever the engine believes: its memory must outlive the copies
        assert ((tmp_path / name).read_bytes() == contents(image, sources)) is not misused


def test_the_host_waits_for_nothing_but_the_enqueueing(double: Double, tmp_path: Path) -> None:
    block = Block(double, 10 * CHUNK)
    image = image_of([block])
    expected = contents(image, [block])
    stream = double.new_stream(0)
    with engine_over(double) as engine:
        with double.holding_copies():
            job = submit(engine, tmp_path, image, [block], [(0, stream)])
            assert job.wait_enqueued(60)
            job.hold_back(0, stream)
            kernel = overwrite(double, stream, block, 3)
            double.wait_copies_held(1)
            assert not job.released
        finish(job)
        double.finish(stream)
        del kernel
    assert (tmp_path / "file").read_bytes() == expected
    assert (block.bytes == 3).all()


def test_a_driver_that_takes_its_time_holds_up_nobody_else(double: Double, tmp_path: Path) -> None:
    """While one thread makes its stream wait, others ask and save, and the copies may end."""
    block, host = Block(double, 10 * CHUNK), HostBlock(CHUNK)
    stream = double.new_stream(0)
    with engine_over(double) as engine:
        double.hold_copies()
        job = submit(engine, tmp_path, image_of([block]), [block], [(0, stream)])
        assert job.wait_enqueued(60)
        holding_back = threading.Thread(target=job.hold_back, args=(0, stream))
        with double.stalling("cuStreamWaitEvent"):
            holding_back.start()
            double.wait_stalled()
            assert not job.released
            assert job.error is None
            finish(submit(engine, tmp_path, image_of([host], "other"), [host], []))
            double.release_copies()
            finish(job)
            assert holding_back.is_alive()
        holding_back.join(60)
    assert not holding_back.is_alive()
    double.finish(stream)


def test_a_small_arena_is_enqueued_only_when_all_of_it_is(double: Double, tmp_path: Path) -> None:
    block = Block(double, 10 * CHUNK)
    with engine_over(double, chunks=2) as engine, double.holding_copies():
        job = submit(engine, tmp_path, image_of([block]), [block], STREAMS[:1])
        double.wait_copies_held(1)
        assert not job.wait_enqueued(0)
        with pytest.raises(_native.DeviceError, match="not enqueued"):
            job.hold_back(0, 0)
        double.release_copies()
        assert job.wait_enqueued(60)
        finish(job)


@pytest.mark.parametrize("chunks", [2, 64])
def test_one_hardware_queue_does_not_deadlock(double: Double, tmp_path: Path, chunks: int) -> None:
    double.set_connections(1)
    assert all(saved_in_order(double, tmp_path, seed, chunks) for seed in range(10))
    assert double.counter("deadlocks") == 0


def test_two_jobs_share_an_arena_smaller_than_either(double: Double, tmp_path: Path) -> None:
    blocks = [Block(double, 9 * CHUNK, device, device) for device in (0, 1)]
    images = [image_of([block], f"file-{block.device}") for block in blocks]
    with engine_over(double, chunks=3, copiers=2) as engine:
        jobs = [
            submit(engine, tmp_path, image, [block], [(block.device, 0)])
            for image, block in zip(images, blocks, strict=True)
        ]
        for job in jobs:
            finish(job)
    for image, block in zip(images, blocks, strict=True):
        assert (tmp_path / image.path).read_bytes() == contents(image, [block])


# ---------------------------------------------------------------------------- memory


def test_the_arena_is_pinned_for_every_device_and_given_back(double: Double, tmp_path: Path) -> None:
    before = double.registered_nbytes()
    block = Block(double, 100)
    with engine_over(double, chunks=10) as engine:
        assert double.registered_nbytes() == before  # no device is used yet
        engine.use_device(1)
        finish(submit(engine, tmp_path, image_of([block]), [block], STREAMS[:1]))
        assert double.registered_nbytes() == before + 10 * CHUNK
        assert double.count("cuMemHostRegister_v2") == 1
        assert engine.pin_failure == ""
        assert engine.pin_s >= 0
    assert double.registered_nbytes() == before
    assert PORTABLE == 1


def test_memory_that_cannot_be_pinned_is_used_as_it_is(double: Double, tmp_path: Path) -> None:
    double.fail("cuMemHostRegister_v2", OUT_OF_MEMORY)
    block = Block(double, 5 * CHUNK)
    image = image_of([block])
    with engine_over(double, chunks=2) as engine:
        finish(submit(engine, tmp_path, image, [block], STREAMS[:1]))
        assert "CUDA_ERROR_OUT_OF_MEMORY" in engine.pin_failure
    assert (tmp_path / "file").read_bytes() == contents(image, [block])
    assert double.counter("pageable") > 0


def test_waiting_for_pinned_memory_is_not_the_disks_doing(double: Double, tmp_path: Path) -> None:
    block = Block(double, 100)
    with engine_over(double, chunks=4) as engine:
        with double.stalling("cuMemHostRegister_v2"):
            job = submit(engine, tmp_path, image_of([block]), [block], STREAMS[:1])
            double.wait_stalled()
            assert not job.wait_enqueued(0.1)
        finish(job)
        assert job.times_s[4] == 0


def test_threads_keep_their_context(double: Double, tmp_path: Path) -> None:
    import ctypes

    block = Block(double, 100, device=1)
    with double.context(0) as mine, engine_over(double) as engine:
        finish(submit(engine, tmp_path, image_of([block]), [block], [(1, 0)]))
        current = ctypes.c_void_p()
        double.driver("cuCtxGetCurrent", ctypes.byref(current))
        assert current.value == mine


# ---------------------------------------------------------------------------- capture


def test_a_capture_on_another_thread_survives(double: Double, tmp_path: Path) -> None:
    block = Block(double, 20 * CHUNK)
    image = image_of([block])
    captured = double.new_stream(0)
    with engine_over(double, chunks=2) as engine:
        double.begin_capture(captured, "global")
        job = submit(engine, tmp_path, image, [block], STREAMS[:1])  # pins, queries and waits meanwhile
        finish(job)
        double.end_capture(captured)  # raises if it was spoilt
    assert (tmp_path / "file").read_bytes() == contents(image, [block])


# ---------------------------------------------------------------------------- failures


def failed_with(job: _native.Job) -> str:
    assert job.wait_enqueued(60)
    assert job.wait_released(60)
    assert job.wait_finished(60)
    assert job.error is not None
    operation, _, _, _, number, reason = job.error
    assert number == 0
    return f"{operation}: {reason}"


@pytest.mark.parametrize(
    ("entry_point", "nth"),
    [("cuMemcpyDtoHAsync_v2", 0), ("cuMemcpyDtoHAsync_v2", 5), ("cuEventRecord", 1), ("cuEventRecord", 6),
     ("cuStreamWaitEvent", 0), ("cuEventSynchronize", 0), ("cuEventSynchronize", 4)],
)  # fmt: skip
@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("chunks", [2, 64])
def test_a_refusal_fails_the_job_by_name_and_nothing_hangs(
    double: Double, tmp_path: Path, entry_point: str, nth: int, sticky: bool, chunks: int
) -> None:
    sources = [Block(double, 10 * CHUNK)]
    with engine_over(double, chunks) as engine:
        double.fail(entry_point, ILLEGAL_ADDRESS, nth=nth, sticky=sticky)
        job = submit(engine, tmp_path, image_of(sources), sources, STREAMS[:1])
        said = failed_with(job)
        assert "CUDA_ERROR_ILLEGAL_ADDRESS" in said
        assert "cu" in said
        if not sticky:
            image = image_of(sources, "again")
            finish(submit(engine, tmp_path, image, sources, STREAMS[:1]))
            assert (tmp_path / "again").read_bytes() == contents(image, sources)


@pytest.mark.parametrize(
    ("entry_point", "nth", "chunks"),
    # Events are made only when the pool has none left, which takes a large job.
    [("cuEventRecord", 1, 1), ("cuEventSynchronize", 0, 1), ("cuEventCreate", 0, 300)],
)
def test_a_chunk_that_may_still_be_written_to_serves_nobody_else(
    double: Double, tmp_path: Path, entry_point: str, nth: int, chunks: int
) -> None:
    block, host = Block(double, chunks * CHUNK - 1000), HostBlock(2 * CHUNK, seed=2)
    with engine_over(double, chunks + 4) as engine:
        double.hold_copies()
        double.fail(entry_point, OUT_OF_MEMORY, nth=nth)
        job = submit(engine, tmp_path, image_of([block], "failed"), [block], STREAMS[:1])
        assert job.wait_enqueued(60)
        assert chunks > 1 or job.wait_finished(60)
        double.wait_copies_held(1)
        faults.arm(faults.Op.open, 0, faults.Kind.pause)
        image = image_of([host], "next")
        after = submit(engine, tmp_path, image, [host], [])
        assert after.wait_released(60)  # its bytes are in chunks, and not written yet
        assert faults.wait_for_hits(faults.Op.open, 1)
        double.release_copies()
        double.drain()
        faults.disarm()
        finish(after)
        assert job.wait_finished(60)
        assert job.error is not None
        assert entry_point in job.error[0]
    found = (tmp_path / "next").read_bytes()
    assert found == contents(image, [host])
    assert after.block_crcs(0) == [zlib.crc32(found[i : i + CHUNK]) for i in range(0, len(found), CHUNK)]


@pytest.mark.parametrize(("entry_point", "nth"), [("cuEventRecord", 1), ("cuEventSynchronize", 0)])
def test_the_arena_outlives_copies_whose_end_nobody_tells(
    double: Double, tmp_path: Path, entry_point: str, nth: int
) -> None:
    before = double.registered_nbytes()
    block = Block(double, 100)
    with engine_over(double, chunks=4) as engine:
        double.hold_copies()
        double.fail(entry_point, OUT_OF_MEMORY, nth=nth)
        job = submit(engine, tmp_path, image_of([block]), [block], STREAMS[:1])
        assert job.wait_finished(60)
        double.wait_copies_held(1)
        engine.close()
        assert double.counter("unregistered_in_use") == 0
        assert double.registered_nbytes() == before + 4 * CHUNK
        double.release_copies()
        double.drain()  # into memory that is there


def test_jobs_do_not_wait_for_chunks_that_are_all_lost(double: Double, tmp_path: Path) -> None:
    block, host = Block(double, 100), HostBlock(100)
    with engine_over(double, chunks=1) as engine:
        faults.arm(faults.Op.open, 0, faults.Kind.pause)  # the only chunk is busy until all are queued
        first = submit(engine, tmp_path, image_of([host], "first"), [host], [])
        assert faults.wait_for_hits(faults.Op.open, 1)
        double.fail("cuEventRecord", OUT_OF_MEMORY, nth=1)
        second = submit(engine, tmp_path, image_of([block], "second"), [block], STREAMS[:1])
        third = submit(engine, tmp_path, image_of([host], "third"), [host], [])
        faults.disarm()
        finish(first)
        assert "cuEventRecord" in failed_with(second)
        assert "done with any of this memory" in failed_with(third)
        with pytest.raises(_native.DeviceError, match="done with any of this memory"):
            submit(engine, tmp_path, image_of([host], "fourth"), [host], [])


def test_an_error_that_comes_late_ends_every_wait(double: Double, tmp_path: Path) -> None:
    sources = [Block(double, 10 * CHUNK)]
    with engine_over(double, chunks=2) as engine:
        double.fail_async("cuMemcpyDtoHAsync_v2", nth=3)
        first = submit(engine, tmp_path, image_of(sources, "first"), sources, STREAMS[:1])
        assert "CUDA_ERROR_ILLEGAL_ADDRESS" in failed_with(first)
        with pytest.raises(_native.DeviceError, match="ILLEGAL_ADDRESS"):
            submit(engine, tmp_path, image_of(sources, "second"), sources, STREAMS[:1])


def test_memory_that_is_gone_poisons_and_is_named(double: Double, tmp_path: Path) -> None:
    block = Block(double, 10 * CHUNK)
    double.free(block.address)
    with engine_over(double) as engine:
        job = submit(engine, tmp_path, image_of([block]), [block], STREAMS[:1])
        assert "CUDA_ERROR_ILLEGAL_ADDRESS" in failed_with(job)


@pytest.mark.parametrize("when", ["held", "starved"])
def test_an_abort_lets_go_only_when_the_device_is_done(double: Double, tmp_path: Path, when: str) -> None:
    block = Block(double, 10 * CHUNK)
    with engine_over(double, chunks=64 if when == "held" else 2) as engine, double.holding_copies():
        job = submit(engine, tmp_path, image_of([block]), [block], STREAMS[:1])
        double.wait_copies_held(1)
        job.abort()
        assert not job.wait_released(0)
        double.release_copies()
        assert job.wait_finished(60)
        assert job.error is not None
        assert job.error[0] == "abort"
        finish(submit(engine, tmp_path, image_of([block], "again"), [block], STREAMS[:1]))


def test_closing_waits_for_what_the_device_still_writes(double: Double, tmp_path: Path) -> None:
    block = Block(double, 10 * CHUNK)
    with engine_over(double, chunks=2) as engine:
        double.hold_copies()
        job = submit(engine, tmp_path, image_of([block]), [block], STREAMS[:1])
        double.wait_copies_held(1)
        closing = threading.Thread(target=engine.close)
        closing.start()
        assert job.wait_enqueued(60)
        assert not job.released
        double.release_copies()
        closing.join(60)
        assert not closing.is_alive()
        assert job.error is not None
        assert job.error[0] == "abort"
    assert double.counter("unregistered_in_use") == 0


def test_closing_gives_up_on_a_device_that_hangs(double: Double, tmp_path: Path) -> None:
    block = Block(double, 10 * CHUNK)
    with engine_over(double, chunks=2) as engine:
        with double.holding_copies():
            job = submit(engine, tmp_path, image_of([block]), [block], STREAMS[:1])
            double.wait_copies_held(1)
            assert not engine.close(0.05)
            assert not job.released
        assert job.wait_finished(60)
        assert engine.close()
    assert double.counter("unregistered_in_use") == 0


def test_a_driver_that_shuts_down_first_is_an_error(double: Double, tmp_path: Path) -> None:
    block = Block(double, 10 * CHUNK)
    with engine_over(double) as engine:
        engine.use_device(0)
        double.deinitialize()
        with pytest.raises(_native.DeviceError, match="DEINITIALIZED"):
            submit(engine, tmp_path, image_of([block]), [block], STREAMS[:1])


def test_no_driver_no_device_no_stream(double: Double, tmp_path: Path) -> None:
    block = Block(double, 10)
    with engine_over(double) as engine:
        with pytest.raises(_native.DeviceError, match=r"cuDeviceGet.*INVALID_DEVICE"):
            engine.use_device(7)
        with pytest.raises(ValueError, match="no stream was given for device 0"):
            submit(engine, tmp_path, image_of([block]), [block], [(1, 0)])
    for driver, said in ((str(tmp_path / "libcuda.so.1"), "cannot open"), ("libm.so.6", "too old.*cuInit")):
        engine = _native.Engine(
            arena_nbytes=CHUNK, chunk_nbytes=CHUNK, copiers=1, writers=1, direct=True, prefault=False,
            driver=driver,
        )  # fmt: skip
        with pytest.raises(_native.DeviceError, match=said):
            engine.use_device(0)
        engine.close()


_NO_MORE_THREADS = """
import resource, sys
from asyncckpt import _native
engine = _native.Engine(
    arena_nbytes=4096, chunk_nbytes=4096, copiers=1, writers=1, direct=True, prefault=False,
    driver=sys.argv[1],
)
try:
    _native.device_crc32(sys.argv[1], 0, 0, 0, 0)  # the driver is loaded, with all threads of its own
except _native.DeviceError:
    pass
with open("/proc/self/statm") as statm:
    resource.setrlimit(resource.RLIMIT_AS, (int(statm.read().split()[0]) * 4096 + (1 << 20),) * 2)
try:
    engine.use_device(0)
except _native.DeviceError as error:
    sys.exit(0 if "starting a thread" in str(error) else f"said {error}")
sys.exit("a thread was to be had")
"""


def test_a_thread_that_cannot_be_had_is_the_devices_failure(double: Double) -> None:
    """There is no room for the stack of another."""
    command = [sys.executable, "-c", _NO_MORE_THREADS, str(double.path)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_an_old_driver_is_named() -> None:
    from tests.cuda_double import build

    engine = _native.Engine(
        arena_nbytes=CHUNK, chunk_nbytes=CHUNK, copiers=1, writers=1, direct=True, prefault=False,
        driver=str(build("OLD_DRIVER")),
    )  # fmt: skip
    with pytest.raises(_native.DeviceError, match="too old: it has no cu"):
        engine.use_device(0)
    engine.close()


def test_a_forked_child_is_told(double: Double, tmp_path: Path) -> None:
    block = Block(double, 10 * CHUNK)
    with engine_over(double) as engine:
        finish(submit(engine, tmp_path, image_of([block]), [block], STREAMS[:1]))
        child = os.fork()
        if child == 0:
            try:
                engine.use_device(0)
            except RuntimeError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finish(submit(engine, tmp_path, image_of([block], "after"), [block], STREAMS[:1]))


# ---------------------------------------------------------------------------- the way back


def read_into(
    double: Double, path: Path, parts: Sequence[tuple[int, int, Source]], streams: Any = STREAMS
) -> Any:
    data = path.read_bytes()
    reads = _native.FileReads()
    reads.add(
        str(path),
        len(data),
        CHUNK,
        [zlib.crc32(data[i : i + CHUNK]) for i in range(0, len(data), CHUNK)],
        np.array([offset for offset, _, _ in parts], dtype=np.uint64),
        np.array([nbytes for _, nbytes, _ in parts], dtype=np.uint64),
        np.array([target.address for _, _, target in parts], dtype=np.uint64),
        np.array([target.device for _, _, target in parts], dtype=np.int32),
    )
    return _native.read_files(reads, 3, True, str(double.path), streams)


def test_reading_fills_devices_and_host_in_one_pass(any_driver: Double, tmp_path: Path) -> None:
    for seed in range(6):
        any_driver.reset(seed, DELAY_US_MAX)
        rng = random.Random(seed)
        targets = mixed(any_driver, rng)
        data = rng.randbytes(sum(target.nbytes for target in targets) + 1000 * len(targets))
        path = tmp_path / f"file-{seed}"
        path.write_bytes(data)
        parts, offset = [], 0
        for target in targets:
            offset += rng.randrange(1000)
            if target.nbytes:
                parts.append((offset, target.nbytes, target))
            offset += target.nbytes
        assert read_into(any_driver, path, parts) is None
        for begin, nbytes, target in parts:
            assert target.bytes.tobytes() == data[begin : begin + nbytes]
    assert any_driver.counter("pageable") == 0


def test_reading_comes_after_what_the_stream_had_to_do(double: Double, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(6 * CHUNK))

    def outcome(gate: threading.Event) -> bool:
        stream, block = double.new_stream(0), Block(double, 6 * CHUNK)
        held = Kernel(lambda _: gate.wait(30) and None)
        double.launch(stream, held)
        kernels = [overwrite(double, stream, block, 9) for _ in range(10)]  # an initialisation under way
        assert read_into(double, path, [(0, block.nbytes, block)], [(0, stream)]) is None
        gate.set()
        double.finish(stream)
        del kernels, held
        return bool(block.bytes.tobytes() == path.read_bytes())

    opened = threading.Event()
    opened.set()
    assert all(outcome(opened) for _ in range(20))
    with double.ignoring("cuStreamWaitEvent"):  # else the read would wait for the gate
        assert not outcome(threading.Event())


def test_a_bad_block_never_reaches_a_device(double: Double, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * CHUNK))
    block = Block(double, 4 * CHUNK)
    before = block.bytes[2 * CHUNK : 3 * CHUNK].copy()
    reads = _native.FileReads()
    crcs = [zlib.crc32(bytes(CHUNK))] * 4
    crcs[2] ^= 1
    one = np.array([0], dtype=np.uint64)
    sizes, addresses = one + block.nbytes, one + block.address
    reads.add(str(path), 4 * CHUNK, CHUNK, crcs, one, sizes, addresses, np.array([0], dtype=np.int32))
    error = _native.read_files(reads, 1, True, str(double.path), STREAMS[:1])
    assert error is not None
    assert error[0] == "crc"
    assert error[3] == 2
    assert (block.bytes[2 * CHUNK : 3 * CHUNK] == before).all()


@pytest.mark.parametrize("entry_point", ["cuMemcpyHtoDAsync_v2", "cuEventRecord", "cuEventSynchronize"])
def test_a_refusal_while_reading_is_named(double: Double, tmp_path: Path, entry_point: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(20 * CHUNK))
    block = Block(double, 20 * CHUNK)
    double.fail(entry_point, ILLEGAL_ADDRESS, nth=3, sticky=True)
    error = read_into(double, path, [(0, block.nbytes, block)], STREAMS[:1])
    assert error is not None
    assert error[0] == "device"
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in error[-1]


@pytest.mark.parametrize(("entry_point", "nth"), [("cuEventRecord", 1), ("cuEventSynchronize", 0)])
def test_a_reading_leaves_buffers_that_a_device_may_still_read(
    double: Double, tmp_path: Path, entry_point: str, nth: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(CHUNK))
    before = double.registered_nbytes()
    block, gate = Block(double, CHUNK), threading.Event()
    stream = double.new_stream(0)
    held = Kernel(lambda _: gate.wait(30) and None)
    double.launch(stream, held)
    double.fail(entry_point, OUT_OF_MEMORY, nth=nth)
    error = read_into(double, path, [(0, CHUNK, block)], [(0, stream)])
    assert error is not None
    assert entry_point in error[1]
    assert double.counter("unregistered_in_use") == 0
    assert double.registered_nbytes() == before + 2 * CHUNK
    gate.set()
    double.drain()  # out of memory that is there
    assert block.bytes.tobytes() == path.read_bytes()


# ---------------------------------------------------------------------------- checksums


def test_checksums_of_device_memory(double: Double) -> None:
    for nbytes in (0, 1, 4095, (4 << 20) - 1, 4 << 20, (9 << 20) + 5):
        block = Block(double, nbytes, seed=nbytes)
        stream = double.new_stream(0)
        kernel = overwrite(double, stream, block, nbytes % 251)
        crc = _native.device_crc32(str(double.path), 0, stream, block.address, nbytes)
        assert crc == zlib.crc32(bytes([nbytes % 251]) * nbytes)
        double.finish(stream)  # of no bytes, nothing had to be waited for
        del kernel


@pytest.mark.parametrize(("entry_point", "nth"), [("cuEventRecord", 1), ("cuEventSynchronize", 0)])
def test_a_checksum_uses_no_buffer_that_a_device_may_still_write_to(
    double: Double, entry_point: str, nth: int
) -> None:
    blocks = [Block(double, 10000, device, seed=device) for device in (0, 1)]

    def crc(block: Block) -> int:
        return _native.device_crc32(str(double.path), block.device, 0, block.address, block.nbytes)

    crc(blocks[0])
    pinned = double.registered_nbytes()
    with double.holding_copies():
        double.fail(entry_point, OUT_OF_MEMORY, nth=nth)
        with pytest.raises(_native.DeviceError, match=entry_point):
            crc(blocks[0])
        double.wait_copies_held(1)
    assert crc(blocks[1]) == zlib.crc32(blocks[1].bytes)
    assert double.registered_nbytes() == pinned + (8 << 20)  # a pair of its own
    double.drain()
