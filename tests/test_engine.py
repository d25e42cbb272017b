"""The native engine against the reference renderer, real files and faults of our choosing."""

from __future__ import annotations

import errno
import os
import random
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from asyncckpt import _native
from asyncckpt.devices import HOST
from asyncckpt.formats.image import FileImage, ImageBuilder

CHUNK = 4096
Op, Kind = _native.faults.Op, _native.faults.Kind


@pytest.fixture(autouse=True)
def no_faults_left() -> Iterator[None]:
    yield
    _native.faults.disarm()


def make_engine(
    chunks: int = 8,
    *,
    chunk_nbytes: int = CHUNK,
    copiers: int = 2,
    writers: int = 3,
    direct: bool = True,
    copiers_checksum: bool | None = None,
) -> _native.Engine:
    return _native.Engine(
        arena_nbytes=chunks * chunk_nbytes,
        chunk_nbytes=chunk_nbytes,
        copiers=copiers,
        writers=writers,
        direct=direct,
        prefault=True,
        copiers_checksum=copiers_checksum,
    )


def native(image: FileImage) -> _native.Image:
    return _native.make_image(
        image.path, image.nbytes, image.literals, image.extents, image.fixups, image.records
    )


def submit(
    engine: _native.Engine, directory: Path, images: Sequence[FileImage], arrays: Sequence[np.ndarray]
) -> _native.Job:
    return engine.submit(
        str(directory),
        [native(image) for image in images],
        np.array([a.ctypes.data for a in arrays], dtype=np.uint64),
        np.array([a.nbytes for a in arrays], dtype=np.uint64),
        np.full(len(arrays), HOST, dtype=np.int32),
    )


def random_image(rng: random.Random, path: str) -> tuple[FileImage, list[np.ndarray]]:
    """Records and literals of all sizes around the chunk's, with fix-ups far behind what they need."""
    builder = ImageBuilder(path)
    arrays: list[np.ndarray] = []
    records: list[int] = []
    for _ in range(rng.randrange(12)):
        builder.literal(rng.randbytes(rng.choice([0, 1, 3, 61, CHUNK - 2, CHUNK, 2 * CHUNK + 1])))
        nbytes = rng.choice([0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 13])
        arrays.append(np.frombuffer(rng.randbytes(nbytes), dtype=np.uint8))
        records.append(builder.record(len(arrays) - 1, nbytes))
        for _ in range(rng.randrange(3)):
            builder.crc_of(rng.choice(records))
    return builder.build(), arrays


@pytest.mark.parametrize("copiers_checksum", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_files_equal_the_reference(tmp_path: Path, seed: int, copiers_checksum: bool) -> None:
    rng = random.Random(seed)
    chunks, direct = rng.choice([1, 2, 3, 16]), rng.random() < 0.7
    engine = make_engine(chunks, direct=direct, copiers_checksum=copiers_checksum)
    image, arrays = random_image(rng, "a")
    job = submit(engine, tmp_path, [image], arrays)
    assert job.wait_finished(30)
    assert job.error is None
    expected = image.render([a.tobytes() for a in arrays])
    data = (tmp_path / "a").read_bytes()
    assert data == expected
    assert job.block_crcs(0) == [zlib.crc32(data[i : i + CHUNK]) for i in range(0, len(data), CHUNK)]
    assert job.record_crcs(0) == [zlib.crc32(a.tobytes()) for a in arrays]


def big_image(nbytes: int, path: str = "big") -> tuple[FileImage, np.ndarray]:
    array = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)
    builder = ImageBuilder(path)
    builder.literal(b"head")
    builder.crc_of(builder.record(0, nbytes))
    return builder.build(), array


def test_many_files_in_one_job(tmp_path: Path) -> None:
    engine = make_engine(4)
    images, arrays = [], []
    for index in range(50):
        builder = ImageBuilder(f"f{index}")
        arrays.append(np.full(index * 100, index, dtype=np.uint8))
        builder.record(index, arrays[-1].nbytes)
        images.append(builder.build())
    job = submit(engine, tmp_path, images, arrays)
    assert job.wait_finished(30)
    assert job.error is None
    for index in range(50):
        assert (tmp_path / f"f{index}").read_bytes() == arrays[index].tobytes()


def test_a_slow_copier_does_not_let_later_bytes_overtake(tmp_path: Path) -> None:
    engine = make_engine(8, copiers=2)
    image, array = big_image(6 * CHUNK)
    _native.faults.arm(Op.copy, 0, Kind.pause)
    job = submit(engine, tmp_path, [image], [array])
    assert _native.faults.wait_for_hits(Op.copy, 1)
    assert not job.wait_released(0.0)
    _native.faults.resume()
    assert job.wait_finished(30)
    assert (tmp_path / "big").read_bytes() == image.render([array.tobytes()])


@pytest.mark.parametrize("op", [Op.open, Op.allocate, Op.pwrite, Op.fsync, Op.copy])
def test_an_error_is_reported_and_the_engine_goes_on(tmp_path: Path, op: object) -> None:
    engine = make_engine(3)
    image, array = big_image(10 * CHUNK)
    _native.faults.arm(op, 0, Kind.error, errno.ENOSPC)
    job = submit(engine, tmp_path, [image], [array])
    assert job.wait_finished(30)
    assert _native.faults.hits(op) == 1
    assert job.released
    operation, path, _, _, number, _ = job.error
    assert number == errno.ENOSPC
    assert path == str(tmp_path / "big")
    assert operation in {"open", "fallocate", "pwrite", "fsync", "copy"}

    again = tmp_path / "again"
    again.mkdir()
    job = submit(engine, again, [image], [array])
    assert job.wait_finished(30)
    assert job.error is None
    assert (again / "big").read_bytes() == image.render([array.tobytes()])


def test_short_writes_and_interruptions_are_completed(tmp_path: Path) -> None:
    for direct in (True, False):
        engine = make_engine(4, chunk_nbytes=4 * CHUNK, direct=direct)
        image, array = big_image(9 * CHUNK + 5, path=f"d{direct}")
        _native.faults.arm(Op.pwrite, 0, Kind.shorten)
        _native.faults.arm(Op.pwrite, 1, Kind.error, errno.EINTR)
        job = submit(engine, tmp_path, [image], [array])
        assert job.wait_finished(30)
        assert _native.faults.hits(Op.pwrite) == 2
        assert job.error is None
        assert (tmp_path / f"d{direct}").read_bytes() == image.render([array.tobytes()])
        _native.faults.disarm()


def small_sources(seed: int, count: int = 3000) -> tuple[FileImage, list[np.ndarray]]:
    """Records that are gathered, hundreds at once, some large ones among them, and literals between."""
    rng = random.Random(seed)
    builder = ImageBuilder("small")
    arrays = []
    for index in range(count):
        nbytes = rng.choice([1, 4, 63, 64, 200, 1792, 4096, 5000]) if index % 500 else 700_000
        arrays.append(np.frombuffer(rng.randbytes(nbytes), dtype=np.uint8))
        builder.record(index, nbytes)
        builder.literal(rng.randbytes(rng.choice([0, 0, 3])))
    return builder.build(), arrays


@pytest.mark.parametrize("copiers_checksum", [True, False])
def test_small_sources_are_gathered(tmp_path: Path, copiers_checksum: bool) -> None:
    engine = make_engine(3, chunk_nbytes=1 << 20, copiers_checksum=copiers_checksum)
    image, arrays = small_sources(1)
    job = submit(engine, tmp_path, [image], arrays)
    assert job.wait_finished(30)
    assert job.error is None
    assert (tmp_path / "small").read_bytes() == image.render([a.tobytes() for a in arrays])
    assert job.record_crcs(0) == [zlib.crc32(a.tobytes()) for a in arrays]


@pytest.mark.parametrize("gone", [0, 1, 137, 500, 1000, 2999])
@pytest.mark.parametrize("copiers_checksum", [True, False])
def test_of_many_sources_the_one_that_went_away_is_named(
    tmp_path: Path, gone: int, copiers_checksum: bool
) -> None:
    import mmap

    engine = make_engine(8, chunk_nbytes=1 << 20, copiers=1, copiers_checksum=copiers_checksum)
    image, arrays = small_sources(2)
    memory = mmap.mmap(-1, 1 << 20)
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    memory.close()
    addresses = [array.ctypes.data for array in arrays]
    addresses[gone] = address
    job = engine.submit(
        str(tmp_path),
        [native(image)],
        np.array(addresses, dtype=np.uint64),
        np.array([array.nbytes for array in arrays], dtype=np.uint64),
        np.full(len(arrays), HOST, dtype=np.int32),
    )
    assert job.wait_finished(30)
    operation, _, offset, source, number, _ = job.error
    assert (operation, source, number) == ("copy", gone, errno.EFAULT)
    assert offset == image.extents[image.extents[:, 2] == gone][0, 0]


@pytest.mark.parametrize("copiers_checksum", [True, False])
def test_a_source_that_went_away_fails_the_job_and_names_it(tmp_path: Path, copiers_checksum: bool) -> None:
    import mmap

    engine = make_engine(2, copiers=1, copiers_checksum=copiers_checksum)
    image, array = big_image(64 * CHUNK)
    memory = mmap.mmap(-1, array.nbytes)
    view = np.frombuffer(memory, dtype=np.uint8)
    address = view.ctypes.data
    _native.faults.arm(Op.copy, 3, Kind.pause)
    job = engine.submit(
        str(tmp_path),
        [native(image)],
        np.array([address], dtype=np.uint64),
        np.array([array.nbytes], dtype=np.uint64),
        np.array([HOST], dtype=np.int32),
    )
    assert _native.faults.wait_for_hits(Op.copy, 1)
    del view
    memory.close()  # munmap: a plain memcpy would now kill the process
    _native.faults.resume()
    assert job.wait_finished(30)
    assert _native.copy_is_checked()
    operation, path, _, source, number, _ = job.error
    assert (operation, source, number) == ("copy", 0, errno.EFAULT)
    assert path.endswith("big")


def test_chunks_go_to_the_earlier_job_first(tmp_path: Path) -> None:
    engine = make_engine(2, copiers=1, writers=1)
    first, array = big_image(20 * CHUNK, "first")
    second, _ = big_image(20 * CHUNK, "second")
    _native.faults.arm(Op.pwrite, 2, Kind.pause)
    job1 = submit(engine, tmp_path, [first], [array])
    job2 = submit(engine, tmp_path, [second], [array])
    assert _native.faults.wait_for_hits(Op.pwrite, 1)
    assert not job2.released
    assert not (tmp_path / "second").exists()
    _native.faults.resume()
    assert job1.wait_finished(30)
    assert job2.wait_finished(30)
    assert job1.error is None
    assert job2.error is None


def test_abort_ends_every_phase(tmp_path: Path) -> None:
    engine = make_engine(2)
    image, array = big_image(50 * CHUNK)
    _native.faults.arm(Op.pwrite, 1, Kind.pause)
    job = submit(engine, tmp_path, [image], [array])
    assert _native.faults.wait_for_hits(Op.pwrite, 1)
    job.abort()
    assert job.wait_released(30)
    _native.faults.resume()
    assert job.wait_finished(30)
    assert job.error[0] == "abort"


def test_close_with_work_in_flight_finishes_every_job(tmp_path: Path) -> None:
    engine = make_engine(2)
    image, array = big_image(50 * CHUNK)
    _native.faults.arm(Op.fsync, 0, Kind.error, errno.EIO)
    job = submit(engine, tmp_path, [image], [array])
    engine.close()
    assert job.finished
    assert job.error is not None
    with pytest.raises(RuntimeError):
        submit(engine, tmp_path, [image], [array])


def test_engine_threads_never_wait_for_python(tmp_path: Path) -> None:
    """The engine's destructor joins its threads under the GIL: none of them may want it, whatever they
    are the last to let go of."""
    engine = make_engine(1, chunk_nbytes=64 << 20, copiers=1)
    builder = ImageBuilder("big")
    array = np.zeros(64 << 20, dtype=np.uint8)
    builder.record(0, array.nbytes)
    _native.faults.arm(Op.copy, 0, Kind.shorten)  # has no effect on a copy, but tells that it began
    job = submit(engine, tmp_path, [builder.build()], [array])
    assert _native.faults.wait_for_hits(Op.copy, 1)
    del job
    del engine


def test_a_forked_child_gets_an_error_and_exits(tmp_path: Path) -> None:
    engine = make_engine(2)
    image, array = big_image(500 * CHUNK)
    job = submit(engine, tmp_path, [image], [array])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            submit(engine, tmp_path, [image], [array])
        except RuntimeError:
            fresh = make_engine(2)
            child = tmp_path / "child"
            child.mkdir()
            mine = submit(fresh, child, [image], [array])
            code = 0 if mine.wait_finished(30) and mine.error is None else 2
            del job, engine  # must not wait for threads that only the parent has
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert job.wait_finished(30)
    assert job.error is None
    assert (tmp_path / "child" / "big").read_bytes() == (tmp_path / "big").read_bytes()


@pytest.mark.parametrize("nbytes", [*range(200), 511, 512, 513, 767, 768, 1000, 4096, 65537])
def test_crc_kernels_agree_with_zlib(nbytes: int) -> None:
    data = random.Random(nbytes).randbytes(nbytes + 3)
    array = np.frombuffer(data, dtype=np.uint8)
    for start in (0, 3):
        piece = data[start : start + nbytes]
        assert _native.crc32(array.ctypes.data + start, nbytes, 12345) == zlib.crc32(piece, 12345)
        assert _native.crc32_portable(piece, 12345) == zlib.crc32(piece, 12345)
    left = nbytes // 3
    assert _native.crc32_combine(
        zlib.crc32(data[:left]), zlib.crc32(data[left:]), len(data) - left
    ) == zlib.crc32(data)


def test_checksums_of_parts_come_to_that_of_the_whole() -> None:
    """Of all sizes, also beyond what can be had in memory: what comes after is appended in two ways."""
    rng = random.Random(3)
    for _ in range(2000):
        first, second = rng.randbytes(rng.randrange(40)), rng.randbytes(rng.randrange(3000))
        assert _native.crc32_combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(
            first + second
        )
    for bits in range(1, 63):
        crcs = [rng.getrandbits(32) for _ in range(3)]
        nbytes = rng.getrandbits(bits), rng.getrandbits(bits)
        left = _native.crc32_combine(_native.crc32_combine(crcs[0], crcs[1], nbytes[0]), crcs[2], nbytes[1])
        right = _native.crc32_combine(crcs[1], crcs[2], nbytes[1])
        assert left == _native.crc32_combine(crcs[0], right, sum(nbytes))
    assert _native.crc32_combine(0, 5, 1 << 60) == 5  # what came before was nothing
    assert _native.crc32_combine(7, 0, 0) == 7


def test_copying_while_checksumming() -> None:
    rng = np.random.default_rng(2)
    source = rng.integers(0, 256, 9000, dtype=np.uint8)
    short = [0, 1, 15, 16, 17, 63, 64, 65, 127, 511, 512, 513, 575, 576, 640, 1023, 1024, 4095]
    long = [4096 + more for more in (0, 1, 15, 16, 17, 63, 64, 65, 79, 80, 127, 128, 191, 255, 256, 257)]
    for nbytes in [*short, *long, 8191]:
        for from_offset, to_offset in [(0, 0), (1, 0), (0, 1), (63, 17), (5, 64)]:
            target = np.full(9000, 0xA5, dtype=np.uint8)
            begin = to_offset + -target.ctypes.data % 64
            piece = source[from_offset : from_offset + nbytes]
            got = _native.crc32_copy(target.ctypes.data + begin, piece.ctypes.data, nbytes, 12345)
            assert got == zlib.crc32(piece.tobytes(), 12345)
            assert bytes(target[begin : begin + nbytes]) == piece.tobytes()
            target[begin : begin + nbytes] = 0xA5
            assert (target == 0xA5).all()  # nothing beside it was touched


def test_the_checksum_is_of_what_was_copied() -> None:
    """Not of what the source was a moment before: somebody may write to it at any time."""
    source = np.zeros(8192, dtype=np.uint8)
    target = np.zeros(8192 + 64, dtype=np.uint8)
    done = threading.Event()
    # All of it written thousands of times in one call, during which the GIL is free.
    often = np.lib.stride_tricks.as_strided(source, shape=(5000, 2, 8192), strides=(0, 0, 1))
    values = np.array([[0], [0xFF]], dtype=np.uint8)

    def write() -> None:
        while not done.is_set():
            np.copyto(often, values)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for turn in range(20_000):
            begin, nbytes = turn % 64, 1 + turn % 8192
            got = _native.crc32_copy(target.ctypes.data + begin, source.ctypes.data, nbytes, 0)
            assert got == zlib.crc32(target[begin : begin + nbytes])
    finally:
        done.set()
        writer.join()


def test_images_that_break_their_guarantees_are_refused() -> None:
    extents = np.array([[0, 4, -1, 0, -1]], dtype=np.int64)
    none = np.empty((0, 2), dtype=np.int64)
    assert _native.make_image("x", 4, b"abcd", extents, none, 0).nbytes == 4
    for bad in (
        ("x", 5, b"abcd", extents, none, 0),
        ("x", 4, b"abc", extents, none, 0),
        ("x", 4, b"abcd", np.array([[1, 4, -1, 0, -1]]), none, 0),
        ("x", 4, b"abcd", np.array([[0, 4, 0, 0, 0]]), none, 0),
        ("x", 4, b"abcd", extents, np.array([[0, 0]]), 0),
        ("x", 4, b"abcd", extents, np.array([[1, 0]]), 1),
    ):
        with pytest.raises(ValueError, match="x"):
            _native.make_image(*bad)


def reads_of(
    path: Path, crcs: list[int], nbytes: int, segments: list[tuple[int, int, int]]
) -> _native.FileReads:
    reads = _native.FileReads()
    table = np.array(segments, dtype=np.uint64).reshape(-1, 3)
    columns = (np.ascontiguousarray(table[:, i]) for i in range(3))
    reads.add(str(path), nbytes, CHUNK, crcs, *columns, np.full(len(table), HOST, dtype=np.int32))
    return reads


def read_back(path: Path, crcs: list[int], nbytes: int, segments: list[tuple[int, int, int]]) -> object:
    return _native.read_files(reads_of(path, crcs, nbytes, segments), 3, True)


def test_reading_scatters_verified_bytes(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(10 * CHUNK + 77)
    path = tmp_path / "f"
    path.write_bytes(data)
    crcs = [zlib.crc32(data[i : i + CHUNK]) for i in range(0, len(data), CHUNK)]
    spans = [(3, 10), (100, 2 * CHUNK), (4 * CHUNK, CHUNK), (9 * CHUNK, CHUNK + 77)]
    for expected_crcs in (crcs, []):
        targets = [np.zeros(n, dtype=np.uint8) for _, n in spans]
        error = read_back(
            path,
            expected_crcs,
            len(data),
            [(o, n, t.ctypes.data) for (o, n), t in zip(spans, targets, strict=True)],
        )
        assert error is None
        for (offset, nbytes), target in zip(spans, targets, strict=True):
            assert target.tobytes() == data[offset : offset + nbytes]


def test_reading_finds_every_flipped_bit_and_size(tmp_path: Path) -> None:
    data = bytearray(random.Random(1).randbytes(3 * CHUNK + 77))
    crcs = [zlib.crc32(data[i : i + CHUNK]) for i in range(0, len(data), CHUNK)]
    path = tmp_path / "f"
    for position in (0, CHUNK - 1, CHUNK, 2 * CHUNK + 9, len(data) - 1):
        bad = bytearray(data)
        bad[position] ^= 4
        path.write_bytes(bad)
        error = read_back(path, crcs, len(data), [])
        assert error is not None
        assert error[0] == "crc"
        assert error[3] == position // CHUNK
    for bad in (data[:-1], data + b"x", b""):
        path.write_bytes(bad)
        error = read_back(path, crcs, len(data), [])
        assert error is not None
        assert error[0] == "size"
    path.unlink()
    error = read_back(path, crcs, len(data), [])
    assert error is not None
    assert (error[0], error[4]) == ("os", errno.ENOENT)


@pytest.mark.parametrize("checked", [True, False])
def test_a_reading_may_begin_before_it_is_known_where_the_bytes_go(tmp_path: Path, checked: bool) -> None:
    """At every alignment of target and source: the copy goes past the cache, line by line."""
    data = random.Random(1).randbytes(5 * CHUNK + 77)
    path = tmp_path / "f"
    path.write_bytes(data)
    crcs = [zlib.crc32(data[i : i + CHUNK]) for i in range(0, len(data), CHUNK)] if checked else []
    memory = np.zeros(len(data) + 4096, dtype=np.uint8)
    segments, expected, place = [], [], 0
    for number, at in enumerate(range(0, len(data) - 300, 311)):
        nbytes = number % 300
        place += number % 67
        segments.append((at, nbytes, memory.ctypes.data + place))
        expected.append((place, data[at : at + nbytes]))
        place += nbytes
    early = _native.EarlyReading(reads_of(path, crcs, len(data), []), 2, True)
    assert early.finish(reads_of(path, crcs, len(data), segments)) is None
    for place, content in expected:
        assert memory[place : place + len(content)].tobytes() == content
    early.close()


def test_what_is_damaged_is_found_before_it_has_a_place(tmp_path: Path) -> None:
    data = bytearray(random.Random(1).randbytes(3 * CHUNK))
    crcs = [zlib.crc32(data[i : i + CHUNK]) for i in range(0, len(data), CHUNK)]
    data[2 * CHUNK + 5] ^= 1
    path = tmp_path / "f"
    path.write_bytes(data)
    target = np.zeros(len(data), dtype=np.uint8)
    early = _native.EarlyReading(reads_of(path, crcs, len(data), []), 4, True)
    error = early.finish(reads_of(path, crcs, len(data), [(0, len(data), target.ctypes.data)]))
    assert error is not None
    assert (error[0], error[3]) == ("crc", 2)
    assert not target[2 * CHUNK :].any()


def test_a_reading_that_never_learns_where_the_bytes_go_can_be_closed(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(9 * CHUNK)
    crcs = [zlib.crc32(data[i : i + CHUNK]) for i in range(0, len(data), CHUNK)]
    path = tmp_path / "f"
    path.write_bytes(data)
    reads = reads_of(path, crcs, len(data), [])
    early = _native.EarlyReading(reads, 2, True)  # more blocks than buffers: both threads come to wait
    other = reads_of(path, crcs, len(data) - 1, [])
    early.close()
    early.close()
    with pytest.raises(RuntimeError, match="has ended"):
        early.finish(reads)
    for wrong in (other, _native.FileReads()):
        early = _native.EarlyReading(reads, 2, True)
        with pytest.raises(ValueError, match=r"not what is read|other files"):
            early.finish(wrong)
        early.close()


def test_a_forked_child_leaves_a_reading_to_its_parent(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(9 * CHUNK)
    crcs = [zlib.crc32(data[i : i + CHUNK]) for i in range(0, len(data), CHUNK)]
    path = tmp_path / "f"
    path.write_bytes(data)
    early = _native.EarlyReading(reads_of(path, crcs, len(data), []), 2, True)
    pid = os.fork()
    if pid == 0:
        early.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    target = np.zeros(len(data), dtype=np.uint8)
    assert early.finish(reads_of(path, crcs, len(data), [(0, len(data), target.ctypes.data)])) is None
    assert target.tobytes() == data
