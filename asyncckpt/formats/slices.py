"""One file that several ranks write, each what it has, with nothing gathered anywhere.

    records cut into slices, a rank each -> whole blocks of the disk, by the rank that has all of one
                                         -> the rest (headers, directory, blocks that several ranks have
                                            bytes of), by one rank, which is handed those edges

A block of the disk has one writer: two clients of a network filesystem that each change a part of the same
block lose data. So a rank writes the blocks in the inside of its slices, and puts the bytes at their ends,
less than two blocks per slice, into a small file of its own. When all have done that, one rank reads these,
adds the literals, combines the CRCs of what others wrote, and writes all blocks that are left.

Pure: no I/O. Offsets and sizes are in bytes.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from asyncckpt.formats.image import LITERAL, NO_RECORD, FileImage, Int64Array

BLOCK = 4096  # of the disk; at least a page, and a multiple of what O_DIRECT asks for
ZEROS = -1  # as a cut's piece: bytes that no tensor fills
ZEROS_NBYTES = 1 << 16  # a longer cut of zeros is several

Combine = Callable[[int, int, int], int]  # (crc of a, crc of b, nbytes of b) -> crc of ab


class Run(NamedTuple):
    """Bytes that were written together, and their CRC-32."""

    offset: int  # in the file
    nbytes: int
    crc: int


class Cut(NamedTuple):
    """A source of a rank's images: a run of one of its pieces, or of zeros."""

    piece: int  # index, or ZEROS
    begin: int  # in the piece
    nbytes: int


class SliceError(ValueError):
    """What was handed over does not make up the file."""


def spans_of(image: FileImage, slices: Int64Array) -> Int64Array:
    """Who has what of a file.

    Args:
        image: of the whole file; the source of each record is its number.
        slices: int64 [n, 4]: record, first byte in it, first byte behind, rank; they tile every record.

    Returns:
        int64 [m, 3]: first byte in the file, first byte behind, rank; in file order, neighbours of one rank
        joined.

    Raises:
        SliceError: the slices do not tile the records.
    """
    extents = image.extents[image.extents[:, 2] != LITERAL]
    begins = np.zeros(image.records, np.int64)
    sizes = np.zeros(image.records, np.int64)
    begins[extents[:, 4]], sizes[extents[:, 4]] = extents[:, 0], extents[:, 1]
    table = slices[slices[:, 1] < slices[:, 2]]
    if len(table) and not (table[:, 0].min() >= 0 and table[:, 0].max() < image.records):
        raise SliceError(f"{image.path}: a slice of a record that it does not have")
    spans = np.stack(
        [begins[table[:, 0]] + table[:, 1], begins[table[:, 0]] + table[:, 2], table[:, 3]], axis=1
    )
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    covered = np.zeros(image.records, np.int64)
    np.add.at(covered, table[:, 0], table[:, 2] - table[:, 1])
    overlap = bool((spans[1:, 0] < spans[:-1, 1]).any())
    outside = bool((table[:, 1] < 0).any() or (table[:, 2] > sizes[table[:, 0]]).any())
    if overlap or outside or not np.array_equal(covered, sizes):
        raise SliceError(f"{image.path}: the slices do not tile its records")
    return joined(spans)


def joined(spans: Int64Array) -> Int64Array:
    """Spans in file order, neighbours of one rank joined."""
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    if not len(spans):
        return spans
    begins = np.ones(len(spans), bool)
    begins[1:] = (spans[1:, 0] != spans[:-1, 1]) | (spans[1:, 2] != spans[:-1, 2])
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(spans)) - 1
    return np.stack([spans[first, 0], spans[last, 1], spans[first, 2]], axis=1)


def inside(spans: Int64Array) -> Int64Array:
    """The whole blocks within spans: int64 [n, 2], first byte and first byte behind."""
    begins = -(-spans[:, 0] // BLOCK) * BLOCK
    ends = spans[:, 1] // BLOCK * BLOCK
    blocks = np.stack([begins, ends], axis=1)
    return blocks[begins < ends]


def inside_of(begin: int, end: int) -> tuple[int, int]:
    """The same of one span: both `end` where it has no whole block, as `edges` has it."""
    first, last = -(-begin // BLOCK) * BLOCK, end // BLOCK * BLOCK
    return (first, last) if first < last else (end, end)


def edges(spans: Int64Array) -> Int64Array:
    """What of the spans is not `inside`: int64 [n, 2], in the order of the spans."""
    begins = -(-spans[:, 0] // BLOCK) * BLOCK
    ends = spans[:, 1] // BLOCK * BLOCK
    none = begins >= ends
    heads = np.stack([spans[:, 0], np.where(none, spans[:, 1], begins)], axis=1)
    tails = np.stack([np.where(none, spans[:, 1], ends), spans[:, 1]], axis=1)
    both = np.stack([heads, tails], axis=1).reshape(-1, 2)
    return both[both[:, 0] < both[:, 1]]


# ---------------------------------------------------------------------------- what one rank writes


@dataclass(frozen=True, eq=False)
class Part:
    """A rank's part of a file.

    Attributes:
        inside: the image of its whole blocks; None if it has none.
        edges: the image of the file that hands over the rest; None if there is none.
        cuts: the sources of both, the same number for both.
    """

    inside: FileImage | None
    edges: FileImage | None
    cuts: tuple[Cut, ...]


def part_of(
    image: FileImage, spans: Int64Array, pieces: Sequence[tuple[int, int]], edges_path: str, first_source: int
) -> Part:
    """What the rank that has these spans writes.

    Args:
        spans: of this rank alone.
        pieces: (offset in the file, nbytes) of what there is to write, in file order, within the spans; what
            is missing of the spans is zeros.
        edges_path: of the file that hands over the edges.
        first_source: the number of the first cut as a source.
    """
    cutter = _Cutter(pieces)
    whole, rest = inside(spans), edges(spans)
    own = [placed for begin, end in whole.tolist() for placed in _placed(cutter.cut(begin, end), begin)]
    handed = list(_placed((cut for begin, end in rest.tolist() for cut in cutter.cut(begin, end)), 0))
    handed_nbytes = int((rest[:, 1] - rest[:, 0]).sum())
    return Part(
        _image(image.path, image.nbytes, own, first_source, partial=True) if own else None,
        _image(edges_path, handed_nbytes, handed, first_source + len(own), partial=False) if handed else None,
        tuple(cut for _, cut in own + handed),
    )


def _placed(cuts: Iterable[Cut], offset: int) -> Iterator[tuple[int, Cut]]:
    """Cuts back to back, each with its offset."""
    for cut in cuts:
        yield offset, cut
        offset += cut.nbytes


class _Cutter:
    def __init__(self, pieces: Sequence[tuple[int, int]]) -> None:
        self._pieces = pieces
        self._begins = [offset for offset, _ in pieces]

    def cut(self, begin: int, end: int) -> Iterator[Cut]:
        """Cuts that fill [begin, end)."""
        index = max(0, bisect_right(self._begins, begin) - 1)
        while begin < end:
            while index < len(self._pieces) and sum(self._pieces[index]) <= begin:
                index += 1
            offset, nbytes = self._pieces[index] if index < len(self._pieces) else (end, 0)
            if offset > begin:
                until = min(end, offset)
                for at in range(begin, until, ZEROS_NBYTES):
                    yield Cut(ZEROS, 0, min(ZEROS_NBYTES, until - at))
            else:
                until = min(end, offset + nbytes)
                yield Cut(index, begin - offset, until - begin)
            begin = until


def _image(path: str, nbytes: int, rows: list[tuple[int, Cut]], first: int, partial: bool) -> FileImage:
    extents = [(offset, cut.nbytes, first + n, 0, n) for n, (offset, cut) in enumerate(rows)]
    return FileImage(
        path=path,
        nbytes=nbytes,
        literals=b"",
        extents=np.array(extents, dtype=np.int64).reshape(-1, 5),
        fixups=np.zeros((0, 2), np.int64),
        records=len(rows),
        partial=partial,
    )


# ---------------------------------------------------------------------------- what is left for one


@dataclass(frozen=True)
class Closing:
    """What is left to write of a file, and what the file is then.

    Attributes:
        writes: (offset, bytes), in file order.
        block_crcs: CRC-32 of each block of the whole file.
    """

    writes: tuple[tuple[int, bytes | bytearray], ...]
    block_crcs: tuple[int, ...]


def close(
    image: FileImage,
    spans: Int64Array,
    written: Mapping[int, Sequence[Run]],
    edges_of: Callable[[int], bytes],
    block_nbytes: int,
    combine: Combine,
) -> Closing:
    """The rest of a file, once every rank has written its part.

    Args:
        image: of the whole file.
        spans: of all ranks.
        written: by every rank that has any of it, none of it across a multiple of `block_nbytes`.
        edges_of: what a rank handed over; asked rank by rank, so that never all of it is in memory twice.
        block_nbytes: size of a block of the manifest.

    Raises:
        SliceError: what was handed over is not what the ranks had to write.
    """
    pieces = [run for runs in written.values() for run in runs]
    left = _Left(image.nbytes, inside(spans))
    for offset, nbytes, source, source_offset, _ in image.extents.tolist():
        if source == LITERAL:
            left.put(offset, image.literals[source_offset : source_offset + nbytes])
    for rank, own in by_rank(spans):
        if rank not in written:
            raise SliceError(f"{image.path}: nothing was handed over by rank {rank}")
        table, data, at = edges(own), edges_of(rank), 0
        if int((table[:, 1] - table[:, 0]).sum()) != len(data):
            raise SliceError(f"{image.path}: rank {rank} handed over {len(data)} bytes of edges")
        for begin, end in table.tolist():
            left.put(begin, data[at : at + end - begin])
            at += end - begin
    records = [row for row in image.extents.tolist() if row[4] != NO_RECORD]
    marks = {mark for offset, nbytes, *_ in records for mark in (offset, offset + nbytes)}
    pieces += left.runs(sorted(marks), block_nbytes)
    pieces.sort()
    _check_tiled(image, pieces)
    begins = [piece.offset for piece in pieces]
    crcs = [0] * image.records
    for offset, nbytes, _, _, record in records:
        crcs[record] = _folded(pieces, begins, offset, offset + nbytes, combine)
    for offset, record in image.fixups.tolist():
        left.put(offset, crcs[record].to_bytes(4, "little"))
    final = {run.offset: run for run in left.runs(sorted(marks), block_nbytes)}
    pieces = [final.get(piece.offset, piece) for piece in pieces]
    blocks = range(0, image.nbytes, block_nbytes)
    ends = [min(begin + block_nbytes, image.nbytes) for begin in blocks]
    return Closing(
        left.writes(),
        tuple(_folded(pieces, begins, b, e, combine) for b, e in zip(blocks, ends, strict=True)),
    )


def by_rank(spans: Int64Array) -> Iterator[tuple[int, Int64Array]]:
    """The spans of each rank."""
    order = np.argsort(spans[:, 2], kind="stable")
    ranks, first = np.unique(spans[order, 2], return_index=True)
    yield from zip(ranks.tolist(), np.split(spans[order], first[1:]), strict=False)  # of nothing: one part


class _Left:
    """The bytes of a file that lie outside of some blocks."""

    def __init__(self, nbytes: int, blocks: Int64Array) -> None:
        order = blocks[np.argsort(blocks[:, 0])]
        begins = np.concatenate([[0], order[:, 1]]).tolist()
        ends = np.concatenate([order[:, 0], [nbytes]]).tolist()
        self._runs = [(b, bytearray(e - b)) for b, e in zip(begins, ends, strict=True) if b < e]
        self._begins = [begin for begin, _ in self._runs]

    def put(self, offset: int, data: bytes) -> None:
        begin, run = self._runs[bisect_right(self._begins, offset) - 1]
        run[offset - begin : offset - begin + len(data)] = data

    def runs(self, marks: Sequence[int], block_nbytes: int) -> list[Run]:
        """All of it, cut at the marks and at multiples of the block size."""
        found = []
        for begin, run in self._runs:
            end = begin + len(run)
            cuts = {begin, end, *marks[bisect_right(marks, begin) : bisect_right(marks, end - 1)]}
            cuts |= set(range(-(-begin // block_nbytes) * block_nbytes, end, block_nbytes))
            for a, b in pairwise(sorted(cuts)):
                found.append(Run(a, b - a, zlib.crc32(memoryview(run)[a - begin : b - begin])))
        return found

    def writes(self) -> tuple[tuple[int, bytearray], ...]:
        return tuple(self._runs)


def _check_tiled(image: FileImage, pieces: Sequence[Run]) -> None:
    end = 0
    for piece in pieces:
        if piece.offset != end:
            raise SliceError(f"{image.path}: nobody, or more than one rank, wrote what is at {end}")
        end += piece.nbytes
    if end != image.nbytes:
        raise SliceError(f"{image.path}: {image.nbytes} bytes expected, {end} were written")


def _folded(pieces: Sequence[Run], begins: Sequence[int], begin: int, end: int, combine: Combine) -> int:
    """CRC-32 of [begin, end), which pieces tile."""
    crc = 0
    for index in range(bisect_right(begins, begin) - 1, len(pieces)):
        piece = pieces[index]
        if piece.offset >= end:
            break
        if piece.offset < begin or piece.offset + piece.nbytes > end:
            raise SliceError(f"what is at {piece.offset} was not written in blocks that end there")
        crc = combine(crc, piece.crc, piece.nbytes)
    return crc
