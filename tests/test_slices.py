"""One file, written by several ranks: the same bytes as if one had had it all."""

from __future__ import annotations

import random
import tracemalloc
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from asyncckpt import _native
from asyncckpt.devices import HOST
from asyncckpt.formats import slices, torch_zip
from asyncckpt.formats.image import FileImage, ImageBuilder
from asyncckpt.formats.slices import BLOCK, ZEROS, Run, SliceError

MANIFEST_BLOCK = 16 * BLOCK


def random_file(rng: random.Random, ranks: int) -> tuple[FileImage, list[bytes], np.ndarray]:
    """A file, the bytes of its records, and who has which of them."""
    builder = ImageBuilder("shared/file.pt")
    contents: list[bytes] = []
    table: list[tuple[int, int, int, int]] = []
    noted: list[int] = []
    for record in range(rng.randrange(1, 6)):
        builder.literal(rng.randbytes(rng.choice([0, 1, 61, BLOCK - 2, BLOCK, 2 * BLOCK + 1])))
        nbytes = rng.choice([0, 1, 7, BLOCK - 1, BLOCK, 5 * BLOCK + 13, 20 * BLOCK, 41 * BLOCK + 5])
        contents.append(rng.randbytes(nbytes))
        noted.append(builder.record(record, nbytes))
        for _ in range(rng.randrange(3)):
            builder.crc_of(rng.choice(noted))
        some = rng.choices(
            [rng.randrange(nbytes + 1), rng.randrange(nbytes // BLOCK + 1) * BLOCK], k=rng.randrange(9)
        )
        for begin, end in pairwise(sorted({0, nbytes, *some})):
            table.append((record, begin, end, rng.randrange(ranks)))
    if rng.random() < 0.8:
        builder.literal(rng.randbytes(rng.randrange(1, 3 * BLOCK)))
    rng.shuffle(table)
    return builder.build(), contents, np.array(table, dtype=np.int64).reshape(-1, 4)


def pieces_of(
    rng: random.Random, image: FileImage, contents: list[bytes], spans: np.ndarray
) -> tuple[list[tuple[int, int]], list[np.ndarray]]:
    """A rank's spans in pieces of memory of their own. What is all zeros may be left out."""
    places = {int(row[4]): (int(row[0]), int(row[1])) for row in image.extents if row[4] >= 0}
    whole = bytearray(image.nbytes)
    for record, (offset, nbytes) in places.items():
        whole[offset : offset + nbytes] = contents[record]
    pieces, arrays = [], []
    for begin, end, _ in spans.tolist():
        for a, b in pairwise(sorted({begin, end, *(rng.randrange(begin, end) for _ in range(3))})):
            if any(whole[a:b]):
                pieces.append((a, b - a))
                arrays.append(np.frombuffer(bytes(whole[a:b]), dtype=np.uint8))
    return pieces, arrays


def write_part(
    directory: Path, part: slices.Part, arrays: list[np.ndarray], chunk_nbytes: int, direct: bool
) -> tuple[list[Run], bytes]:
    """What a rank hands over, once the engine has written its part."""
    engine = _native.Engine(
        arena_nbytes=4 * chunk_nbytes,
        chunk_nbytes=chunk_nbytes,
        copiers=2,
        writers=3,
        direct=direct,
        prefault=False,
    )
    zeros = np.zeros(slices.ZEROS_NBYTES, dtype=np.uint8)
    sources = [
        (zeros if cut.piece == ZEROS else arrays[cut.piece])[cut.begin :][: cut.nbytes] for cut in part.cuts
    ]
    images = [image for image in (part.inside, part.edges) if image is not None]
    job = engine.submit(
        str(directory),
        [
            _native.make_image(
                i.path, i.nbytes, i.literals, i.extents, i.fixups, i.records, partial=i.partial
            )
            for i in images
        ],
        np.array([s.ctypes.data for s in sources], dtype=np.uint64),
        np.array([s.nbytes for s in sources], dtype=np.uint64),
        np.full(len(sources), HOST, dtype=np.int32),
    )
    assert job.wait_finished(30)
    assert job.error is None
    runs = [Run(*run) for run in job.runs(0)] if part.inside is not None else []
    edges = (directory / part.edges.path).read_bytes() if part.edges is not None else b""
    assert engine.close(30)
    return runs, edges


def close(image: FileImage, spans: np.ndarray, handed: dict[int, tuple[list[Run], bytes]]) -> slices.Closing:
    written = {rank: runs for rank, (runs, _) in handed.items()}
    return slices.close(
        image, spans, written, lambda rank: handed[rank][1], MANIFEST_BLOCK, _native.crc32_combine
    )


def put_together(directory: Path, image: FileImage, closing: slices.Closing) -> bytes:
    path = directory / image.path
    with path.open("r+b" if path.exists() else "w+b") as file:
        for offset, data in closing.writes:
            file.seek(offset)
            file.write(data)
        file.truncate(image.nbytes)
    return path.read_bytes()


@pytest.mark.parametrize("seed", range(60))
def test_ranks_together_write_the_file_that_one_would_write(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    ranks = rng.choice([1, 2, 3, 5])
    image, contents, table = random_file(rng, ranks)
    spans = slices.spans_of(image, table)
    (tmp_path / "shared").mkdir()
    handed = {}
    for rank in np.unique(spans[:, 2]).tolist():
        own = spans[spans[:, 2] == rank]
        pieces, arrays = pieces_of(rng, image, contents, own)
        part = slices.part_of(image, own, pieces, f"edges_{rank}", 0)
        handed[rank] = write_part(
            tmp_path, part, arrays, BLOCK * rng.choice([1, 2, 4, 16]), direct=rng.random() < 0.7
        )
    closing = close(image, spans, handed)
    expected = image.render(contents)
    assert put_together(tmp_path, image, closing) == expected
    blocks = [expected[at : at + MANIFEST_BLOCK] for at in range(0, len(expected), MANIFEST_BLOCK)]
    assert list(closing.block_crcs) == [zlib.crc32(block) for block in blocks]


def two_ranks() -> tuple[FileImage, np.ndarray, bytes]:
    builder = ImageBuilder("file.pt")
    data = random.Random(0).randbytes(9 * BLOCK)
    torch_zip.lay_out(builder, "file", b"\x80\x02N.", [(0, len(data))])
    image = builder.build()
    record = int(image.extents[image.extents[:, 2] == 0][0, 4])
    assert record == 0
    return image, np.array([[0, 0, 5 * BLOCK + 100, 0], [0, 5 * BLOCK + 100, 9 * BLOCK, 1]]), data


def handed_by_two(directory: Path) -> tuple[FileImage, np.ndarray, dict[int, tuple[list[Run], bytes]]]:
    image, table, data = two_ranks()
    spans = slices.spans_of(image, table)
    offset = int(spans[0, 0])
    handed = {}
    for rank in (0, 1):
        own = spans[spans[:, 2] == rank]
        pieces = [(int(a), int(b - a)) for a, b, _ in own]
        arrays = [np.frombuffer(data[a - offset : a - offset + n], dtype=np.uint8) for a, n in pieces]
        part = slices.part_of(image, own, pieces, f"edges_{rank}", 0)
        handed[rank] = write_part(directory, part, arrays, BLOCK, direct=True)
    return image, spans, handed


def test_a_rank_never_writes_a_block_in_which_another_has_bytes() -> None:
    image, table, _ = two_ranks()
    spans = slices.spans_of(image, table)
    owners: dict[int, int] = {}
    for begin, end, rank in spans.tolist():
        for block in range(begin // BLOCK, -(-end // BLOCK)):
            owners[block] = rank if owners.get(block, rank) == rank else -1
    for rank in (0, 1):
        for begin, end in slices.inside(spans[spans[:, 2] == rank]).tolist():
            assert all(owners[block] == rank for block in range(begin // BLOCK, end // BLOCK))


@pytest.mark.parametrize("break_it", ["lost run", "short edges", "silent rank", "run twice"])
def test_what_does_not_make_up_the_file_is_refused(tmp_path: Path, break_it: str) -> None:
    image, spans, handed = handed_by_two(tmp_path)
    runs, edges = handed[1]
    if break_it == "lost run":
        handed[1] = (runs[:-1], edges)
    elif break_it == "short edges":
        handed[1] = (runs, edges[:-1])
    elif break_it == "silent rank":
        del handed[1]
    else:
        handed[1] = ([*runs, runs[0]], edges)
    with pytest.raises(SliceError):
        close(image, spans, handed)


@pytest.mark.parametrize(
    "rows",
    [
        [[0, 0, 10, 0]],
        [[0, 0, 9 * BLOCK, 0], [0, 10, 20, 1]],
        [[0, 0, 9 * BLOCK + 1, 0]],
        [[1, 0, 10, 0]],
        [],
    ],
)
def test_slices_must_tile_the_records(rows: list[list[int]]) -> None:
    image, _, _ = two_ranks()
    with pytest.raises(SliceError):
        slices.spans_of(image, np.array(rows, dtype=np.int64).reshape(-1, 4))


def test_a_partial_image_covers_whole_blocks() -> None:
    def make(extents: list[list[int]], nbytes: int) -> None:
        table = np.array(extents, dtype=np.int64)
        _native.make_image("f", nbytes, b"", table, np.zeros((0, 2), np.int64), len(extents), partial=True)

    make(
        [[BLOCK, BLOCK, 0, 0, 0], [3 * BLOCK, 100, 1, 0, 1], [3 * BLOCK + 100, BLOCK - 100, 2, 0, 2]],
        9 * BLOCK,
    )
    for extents in (
        [[100, BLOCK, 0, 0, 0]],
        [[BLOCK, 100, 0, 0, 0]],
        [[0, BLOCK, 0, 0, 0], [BLOCK + 512, BLOCK - 512, 1, 0, 1]],
        [[8 * BLOCK, 2 * BLOCK, 0, 0, 0]],
    ):
        with pytest.raises(ValueError, match=r"continue|end"):
            make(extents, 9 * BLOCK)


def test_a_closer_holds_what_is_left_of_thousands_of_slices_once() -> None:
    ranks, buckets, nbytes = 16, 100, 4 * BLOCK
    whole = ranks * buckets * nbytes
    builder = ImageBuilder("file.pt")
    torch_zip.lay_out(builder, "file", b"\x80\x02N.", [(index, whole) for index in range(3)])
    image = builder.build()
    records = sorted(int(row[4]) for row in image.extents if row[2] >= 0)
    table = [
        (record, n * nbytes, (n + 1) * nbytes, n % ranks)
        for record in records
        for n in range(ranks * buckets)
    ]
    spans = slices.spans_of(image, np.array(table, np.int64))
    left = image.nbytes - int(np.diff(slices.inside(spans)).sum())
    runs = {
        rank: [
            Run(at, min(e, (at // MANIFEST_BLOCK + 1) * MANIFEST_BLOCK) - at, 0)
            for b, e in slices.inside(spans[spans[:, 2] == rank]).tolist()
            for at in (b, *range((b // MANIFEST_BLOCK + 1) * MANIFEST_BLOCK, e, MANIFEST_BLOCK))
        ]
        for rank in range(ranks)
    }

    def edges_of(rank: int) -> bytes:
        table = slices.edges(spans[spans[:, 2] == rank])
        return bytes(int((table[:, 1] - table[:, 0]).sum()))

    tracemalloc.start()
    try:
        closing = slices.close(image, spans, runs, edges_of, MANIFEST_BLOCK, _native.crc32_combine)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(len(data) for _, data in closing.writes) == left > 16 << 20
    assert peak < 1.5 * left
