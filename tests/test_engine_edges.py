"""The engine where its promises are easiest to break: memory given back, direct I/O refused, phases.

Copies and writes are held by native faults. Where a test must know how far the *other* threads came, it
sends a second, small job behind: with one writer, which takes its work in turn, that job's end says that
everything handed to the writer before has been dealt with.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import mmap
import os
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from asyncckpt import AsyncCheckpointer, _native
from asyncckpt.devices import HOST
from asyncckpt.formats.image import FileImage, ImageBuilder

CHUNK = 4096
TMPFS = Path("/dev/shm")  # noqa: S108 -- a tmpfs is the point
Op, Kind = _native.faults.Op, _native.faults.Kind
Bytes = npt.NDArray[np.uint8]


@pytest.fixture(autouse=True)
def no_faults_left() -> Iterator[None]:
    yield
    _native.faults.disarm()


def make_engine(
    chunks: int, *, copiers: int = 1, writers: int = 1, direct: bool = True, chunk_nbytes: int = CHUNK
) -> _native.Engine:
    return _native.Engine(
        arena_nbytes=chunks * chunk_nbytes,
        chunk_nbytes=chunk_nbytes,
        copiers=copiers,
        writers=writers,
        direct=direct,
        prefault=False,
    )


def submit(
    engine: _native.Engine, directory: Path, image: FileImage, sources: Sequence[Bytes]
) -> _native.Job:
    compiled = _native.make_image(
        image.path, image.nbytes, image.literals, image.extents, image.fixups, image.records
    )
    return engine.submit(
        str(directory),
        [compiled],
        np.array([source.ctypes.data for source in sources], dtype=np.uint64),
        np.array([source.nbytes for source in sources], dtype=np.uint64),
        np.full(len(sources), HOST, dtype=np.int32),
    )


def finish(engine: _native.Engine, job: _native.Job) -> None:
    """Wait for the end of a job.

    The end of an engine waits for its jobs and holds the GIL, so one with a job that never ends is
    leaked: the test is to fail, not to hang.
    """
    if not job.wait_finished(10):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))
        pytest.fail("the job never ends")


def noise(nbytes: int) -> Bytes:
    """Without a zero, so that what was never written shows."""
    return np.random.default_rng(nbytes).integers(1, 256, nbytes, dtype=np.uint8)


def one_record(path: str, nbytes: int) -> FileImage:
    """As many copies as chunks, and nothing but copies."""
    builder = ImageBuilder(path)
    builder.record(0, nbytes)
    return builder.build()


def crcs_of(data: bytes) -> list[int]:
    return [zlib.crc32(data[i : i + CHUNK]) for i in range(0, len(data), CHUNK)]


def write_one_more(engine: _native.Engine, directory: Path, path: str = "behind") -> None:
    """A job of one chunk, from submission to its end."""
    job = submit(engine, directory, one_record(path, CHUNK), [noise(CHUNK)])
    finish(engine, job)
    assert job.error is None


# ---------------------------------------------------------------------------- the arena


def dontfork_nbytes() -> int:
    """Bytes of this process that its children do not inherit."""
    total, nbytes = 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Size:"):
            nbytes = int(line.split()[1]) << 10
        elif line.startswith("VmFlags:") and "dc" in line.split():
            total += nbytes
    return total


def test_children_do_not_inherit_the_arena_and_the_end_gives_it_back() -> None:
    if "VmFlags:" not in Path("/proc/self/smaps").read_text():
        pytest.skip("this kernel's smaps has no VmFlags")
    gc.collect()  # engines of other tests go now, not between two looks
    before = dontfork_nbytes()
    engine = make_engine(1237)
    # A sum, since neighbouring mappings with the same flags are shown as one; the copier's buffer is in it.
    assert engine.arena_nbytes == 1237 * CHUNK
    assert 0 < dontfork_nbytes() - before - engine.arena_nbytes <= 4 << 20
    engine.close()
    del engine
    assert dontfork_nbytes() == before


@pytest.mark.parametrize("failure", ["copy", "abort"])
def test_a_failed_job_gives_back_the_chunks_that_wait_for_an_earlier_one(
    tmp_path: Path, failure: str
) -> None:
    engine = make_engine(4, copiers=2)
    backing = tmp_path / "backing"
    backing.write_bytes(noise(3 * CHUNK).tobytes())
    with backing.open("r+b") as file:
        source: Bytes = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.uint8)
    _native.faults.arm(Op.copy, 0, Kind.pause)  # of chunk 0 or 1: in either case, 2 has to wait
    job = submit(engine, tmp_path, one_record("failing", source.nbytes), [source])
    assert _native.faults.wait_for_hits(Op.copy, 1)
    write_one_more(engine, tmp_path)  # in the fourth buffer; after it, chunk 2 is checksummed and parked
    if failure == "abort":
        job.abort()
    else:
        os.truncate(backing, 0)  # the held copy will find nothing there
    _native.faults.resume()
    finish(engine, job)
    assert job.error[0] == failure
    _native.faults.disarm()

    # All four buffers are there again: four chunks fit while not one of them can be written.
    again = tmp_path / "again"
    again.mkdir()
    data = noise(4 * CHUNK)
    _native.faults.arm(Op.pwrite, 0, Kind.pause)
    job = submit(engine, again, one_record("good", data.nbytes), [data])
    assert _native.faults.wait_for_hits(Op.pwrite, 1)
    assert job.wait_released(30)
    _native.faults.resume()
    finish(engine, job)
    assert job.error is None
    assert (again / "good").read_bytes() == data.tobytes()


# ---------------------------------------------------------------------------- O_DIRECT refused


def takes_direct(directory: Path) -> bool:
    """What this file system says of O_DIRECT, asked without the engine."""
    path = directory / "probe"
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError as error:
        assert error.errno == errno.EINVAL  # noqa: PT017 -- the other answer is as good
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


def descriptor_of(path: Path) -> int:
    """The engine's own descriptor of a file that it has open."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own is gone by now
            if entry.readlink() == path:
                return int(entry.name)
    raise AssertionError(f"{path} is not open")


@pytest.mark.parametrize("wanted", [True, False])
def test_direct_is_what_was_asked_for_and_what_is_reported(tmp_path: Path, wanted: bool) -> None:
    directory = tmp_path.resolve()
    expected = wanted and takes_direct(directory)
    engine = make_engine(4, direct=wanted)
    data = noise(2 * CHUNK)
    _native.faults.arm(Op.pwrite, 1, Kind.pause)
    job = submit(engine, directory, one_record("file", data.nbytes), [data])
    assert _native.faults.wait_for_hits(Op.pwrite, 1)
    flags = fcntl.fcntl(descriptor_of(directory / "file"), fcntl.F_GETFL)
    _native.faults.resume()
    finish(engine, job)
    assert job.error is None
    assert bool(flags & os.O_DIRECT) == job.direct == expected


@pytest.mark.parametrize("nth", [0, 3, 9])
@pytest.mark.parametrize("writers", [1, 3])
def test_a_device_that_refuses_a_direct_write_gets_buffered_ones(
    tmp_path: Path, nth: int, writers: int
) -> None:
    if not takes_direct(tmp_path):
        pytest.skip("no O_DIRECT here, so there is nothing to fall back from")
    engine = make_engine(4, copiers=2, writers=writers)
    data = noise(9 * CHUNK + 5)
    image = one_record("refused", data.nbytes)
    _native.faults.arm(Op.pwrite, nth, Kind.error, errno.EINVAL)
    job = submit(engine, tmp_path, image, [data])
    finish(engine, job)
    assert _native.faults.hits(Op.pwrite) == 1
    assert job.error is None
    assert not job.direct
    assert (tmp_path / "refused").read_bytes() == data.tobytes()
    assert job.block_crcs(0) == crcs_of(data.tobytes())

    _native.faults.disarm()
    image = one_record("taken", data.nbytes)
    job = submit(engine, tmp_path, image, [data])
    finish(engine, job)
    assert job.error is None
    assert job.direct  # one file's trouble is not the next one's
    assert (tmp_path / "taken").read_bytes() == data.tobytes()


def test_a_refused_buffered_write_is_an_error(tmp_path: Path) -> None:
    engine = make_engine(4, direct=False)
    data = noise(9 * CHUNK + 5)
    _native.faults.arm(Op.pwrite, 3, Kind.error, errno.EINVAL, repeat=True)
    job = submit(engine, tmp_path, one_record("refused", data.nbytes), [data])
    finish(engine, job)
    assert job.error == ("pwrite", str(tmp_path / "refused"), 3 * CHUNK, -1, errno.EINVAL, "")


@pytest.mark.skipif(not os.access(TMPFS, os.W_OK), reason=f"no {TMPFS} to write to")
@pytest.mark.parametrize("direct", [True, False])
def test_a_tmpfs_is_written_the_way_it_can_be(direct: bool) -> None:
    with tempfile.TemporaryDirectory(dir=TMPFS, prefix="asyncckpt-test-") as name:
        directory = Path(name)
        expected_direct = direct and takes_direct(directory)
        engine = make_engine(4, copiers=2, writers=3, direct=direct)
        data = noise(9 * CHUNK + 5)
        job = submit(engine, directory, one_record("file", data.nbytes), [data])
        finish(engine, job)
        assert job.error is None
        assert job.direct == expected_direct
        assert [path.name for path in directory.iterdir()] == ["file"]
        assert (directory / "file").read_bytes() == data.tobytes()


# ---------------------------------------------------------------------------- order and phases


def test_chunks_that_arrive_early_wait_for_the_earlier_ones(tmp_path: Path) -> None:
    """A record's CRC runs through all its chunks, and a fix-up behind them needs it."""
    engine = make_engine(16, copiers=2)
    builder = ImageBuilder("file")
    first = builder.record(0, 5 * CHUNK + 17)
    builder.crc_of(first)
    second = builder.record(1, 3 * CHUNK)
    builder.crc_of(second)
    builder.crc_of(first)
    image = builder.build()
    sources = [noise(5 * CHUNK + 17), noise(3 * CHUNK)]
    _native.faults.arm(Op.copy, 0, Kind.pause)  # of chunk 0 or 1
    job = submit(engine, tmp_path, image, sources)
    assert _native.faults.wait_for_hits(Op.copy, 1)
    write_one_more(engine, tmp_path)  # behind all chunks of the job but the one that is held
    assert not job.released
    written = tmp_path / "file"
    assert not written.exists() or not any(written.read_bytes()[2 * CHUNK :])
    _native.faults.resume()
    finish(engine, job)
    assert job.error is None
    expected = image.render([source.tobytes() for source in sources])
    assert written.read_bytes() == expected
    assert job.block_crcs(0) == crcs_of(expected)
    assert job.record_crcs(0) == [zlib.crc32(source.tobytes()) for source in sources]


@pytest.mark.parametrize("copiers", [1, 2, 4])
def test_a_job_is_released_by_its_last_copy_and_not_before(tmp_path: Path, copiers: int) -> None:
    engine = make_engine(16, copiers=copiers)
    data = noise(8 * CHUNK)
    _native.faults.arm(Op.copy, 7, Kind.pause)
    job = submit(engine, tmp_path, one_record("file", data.nbytes), [data])
    assert _native.faults.wait_for_hits(Op.copy, 1)
    if copiers > 1:
        write_one_more(engine, tmp_path)  # behind all others; who copied it has no other in hand
    assert not job.wait_released(0)
    assert not job.released
    assert job.times_s[1] < 0
    data[:] = 255 - data  # so late that only copies still in somebody's hand can see it
    _native.faults.resume()
    assert job.wait_released(30)
    finish(engine, job)
    enqueued_s, released_s, written_s, finished_s, _ = job.times_s
    assert 0 <= enqueued_s <= released_s <= written_s <= finished_s
    found = np.frombuffer((tmp_path / "file").read_bytes(), dtype=np.uint8)
    late = [i for i in range(8) if (found[i * CHUNK :][:CHUNK] == data[i * CHUNK :][:CHUNK]).all()]
    assert 1 <= len(late) <= max(1, copiers - 1)


@pytest.mark.parametrize("copiers", [1, 4])
def test_starving_takes_no_longer_than_the_job(tmp_path: Path, copiers: int) -> None:
    """However many copiers share the wait."""
    engine = make_engine(2, copiers=copiers)
    data = noise(8 * CHUNK)
    _native.faults.arm(Op.pwrite, 0, Kind.pause)
    job = submit(engine, tmp_path, one_record("file", data.nbytes), [data])
    assert _native.faults.wait_for_hits(Op.pwrite, 1)
    assert not job.wait_released(0.2)
    _native.faults.resume()
    finish(engine, job)
    _, released_s, _, _, starved_s = job.times_s
    assert 0.1 < starved_s < released_s


def test_nothing_is_read_after_release(tmp_path: Path) -> None:
    engine = make_engine(16, copiers=2)
    data = noise(8 * CHUNK + 5)
    expected = data.tobytes()
    _native.faults.arm(Op.pwrite, 0, Kind.pause)  # with one writer, nothing is on disk yet
    job = submit(engine, tmp_path, one_record("file", data.nbytes), [data])
    assert _native.faults.wait_for_hits(Op.pwrite, 1)
    assert job.wait_released(30)
    assert not job.finished
    data[:] = 0
    _native.faults.resume()
    finish(engine, job)
    assert job.error is None
    assert (tmp_path / "file").read_bytes() == expected
    assert job.block_crcs(0) == crcs_of(expected)


def test_a_finished_job_is_a_synced_one(tmp_path: Path) -> None:
    engine = make_engine(4)
    data = noise(2 * CHUNK)
    _native.faults.arm(Op.fsync, 0, Kind.pause)
    job = submit(engine, tmp_path, one_record("file", data.nbytes), [data])
    assert _native.faults.wait_for_hits(Op.fsync, 1)
    assert job.released
    assert not job.wait_finished(0)
    assert job.times_s[3] < 0
    _native.faults.resume()
    finish(engine, job)


def test_a_tensor_that_everybody_dropped_lives_until_its_bytes_are_copied(tmp_path: Path) -> None:
    array = np.arange(64 * 1024, dtype=np.float32)
    expected = array.copy()
    memory = weakref.ref(array)
    model = nn.Module()
    model.weight = nn.Parameter(torch.from_numpy(array))
    del array
    with AsyncCheckpointer(tmp_path, model=model, host_memory=1 << 20, layout="megatron") as checkpointer:
        _native.faults.arm(Op.copy, 0, Kind.pause)
        try:
            handle = checkpointer.save(1)
            assert _native.faults.wait_for_hits(Op.copy, 1)
            model.weight = nn.Parameter(torch.zeros(1))
            gc.collect()
            assert memory() is not None
        finally:
            _native.faults.disarm()
        checkpointer.fence()
        gc.collect()
        assert memory() is None  # and no longer: training may need the room
        handle.wait()
    saved = torch.load(tmp_path / "iter_0000001/mp_rank_00/model_optim_rng.pt", weights_only=False)
    assert np.array_equal(saved["model"]["weight"].numpy(), expected)
