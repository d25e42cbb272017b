"""The vocabulary of every format: a file as a list of extents.

A `FileImage` says where each byte of a file comes from, before a single tensor byte is copied:
*literals* (headers, paddings, directories) are bytes it carries itself; *records* are ranges that
are copied from a numbered source (a storage, a pickle) when the save runs; *fix-ups* are the four
little-endian bytes of a record's CRC-32, known only once that record has passed by.

Guarantees: extents tile [0, nbytes) in file order, without gap or overlap; a fix-up lies inside
literals and after the end of the record it speaks of.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LITERAL = -1  # as an extent's source: the bytes come from `FileImage.literals`
NO_RECORD = -1  # as an extent's record: literal bytes belong to none

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class FileImage:
    """Where every byte of one file comes from.

    Attributes:
        path: relative to the step directory, with "/" between parts.
        nbytes: size of the file.
        literals: all literal bytes, back to back.
        extents: int64 [n, 5]: offset in file, nbytes, source (or LITERAL), offset in the source,
            record (or NO_RECORD).
        fixups: int64 [m, 2]: offset in file, record.
        records: number of records; they are numbered from 0 in file order.
        partial: others write to the same file. Then extents need not tile it: what they cover are whole
            blocks of 4096 bytes.
    """

    path: str
    nbytes: int
    literals: bytes
    extents: Int64Array
    fixups: Int64Array
    records: int
    partial: bool = False

    @property
    def own_nbytes(self) -> int:
        """Bytes that it covers."""
        return int(self.extents[:, 1].sum()) if self.partial else self.nbytes

    def render(self, sources: Sequence[bytes]) -> bytes:
        """The file's bytes, given the bytes of each source: the reference that the engine must equal."""
        out = bytearray(self.nbytes)
        crcs = [0] * self.records
        for offset, nbytes, source, source_offset, record in self.extents.tolist():
            origin = self.literals if source == LITERAL else sources[source]
            piece = origin[source_offset : source_offset + nbytes]
            if len(piece) != nbytes:
                raise ValueError(f"{self.path}: source {source} is shorter than its extent")
            out[offset : offset + nbytes] = piece
            if record != NO_RECORD:
                crcs[record] = zlib.crc32(piece, crcs[record])
        for offset, record in self.fixups.tolist():
            out[offset : offset + 4] = crcs[record].to_bytes(4, "little")
        return bytes(out)


class ImageBuilder:
    """Appends to a file image, front to back."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.offset = 0
        self._literals = bytearray()
        self._extents: list[tuple[int, int, int, int, int]] = []
        self._fixups: list[tuple[int, int]] = []
        self._records = 0

    def literal(self, data: bytes, record: int = NO_RECORD, crcs: Sequence[int] = ()) -> None:
        """Append `data` as it is, but for the CRC-32 of `record` at these offsets in it."""
        if not data:
            return
        for at in crcs:
            self._fixups.append((self.offset + at, record))
        start = len(self._literals)
        self._literals += data
        if self._extents and self._extents[-1][2] == LITERAL:  # grow the literal that ends here
            offset, nbytes, _, begin, _ = self._extents[-1]
            self._extents[-1] = (offset, nbytes + len(data), LITERAL, begin, NO_RECORD)
        else:
            self._extents.append((self.offset, len(data), LITERAL, start, NO_RECORD))
        self.offset += len(data)

    def record(self, source: int, nbytes: int) -> int:
        """Append the first `nbytes` bytes of `source` as a record of its own; returns its number."""
        record = self._records
        self._records += 1
        if nbytes:
            self._extents.append((self.offset, nbytes, source, 0, record))
            self.offset += nbytes
        return record

    def crc_of(self, record: int) -> None:
        """Append four bytes that become the little-endian CRC-32 of `record`."""
        if not 0 <= record < self._records:
            raise ValueError(f"{self.path}: no record {record} before offset {self.offset}")
        self._fixups.append((self.offset, record))
        self.literal(b"\0\0\0\0")

    def build(self) -> FileImage:
        """The finished image."""
        return FileImage(
            path=self.path,
            nbytes=self.offset,
            literals=bytes(self._literals),
            extents=np.array(self._extents, dtype=np.int64).reshape(-1, 5),
            fixups=np.array(self._fixups, dtype=np.int64).reshape(-1, 2),
            records=self._records,
        )
