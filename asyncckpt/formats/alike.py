"""Many archives of one tensor each: of those that are alike, one is parsed.

The items of a DCP file differ from each other in the bytes of a tensor and its CRC, often in nothing else.
What parsing one comes to depends on few of its bytes: another of the same size, in which these are the same,
comes to the same, only elsewhere. To compare them takes a twentieth of the time.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .refs import TensorRef
from .torch_zip import STORAGE_PREFIX, Read, Record, parse
from .zip_container import windowed

_MOLDS_MAX = 4  # of archives of one size: another dtype, other strides
_GAP_NBYTES = 4096  # up to here one read beats two

_REST = [field.name for field in fields(TensorRef)[1:]]  # all but data_offset


class Archives:
    """Reads archives as `torch_zip.read_tree` does, and remembers what they look like."""

    def __init__(self, *, trusted: bool = False) -> None:
        self._trusted = trusted
        self._molds: dict[int, list[_Mold]] = {}

    def read_tree(self, read: Read, offset: int, nbytes: int) -> Any:
        """See `torch_zip.read_tree`."""
        molds = self._molds.setdefault(nbytes, [])
        for mold in molds:
            if mold.fits(read, offset):
                return mold.cast(offset)
        window = windowed(read, offset, nbytes)
        seen: dict[int, bytes] = {}  # what the result depends on, by where it is in the archive

        def watched(at: int, size: int) -> bytes:
            data = window(at, size)
            if len(data) > len(seen.get(at - offset, b"")):
                seen[at - offset] = data
            return data

        tree, records = parse(watched, offset, nbytes, trusted=self._trusted)
        if isinstance(tree, TensorRef) and len(molds) < _MOLDS_MAX:
            molds.append(_Mold(tree, offset, seen, records))
        return tree


class _Mold:
    """What an archive must look like to be parsed to a tensor like this one."""

    def __init__(
        self, ref: TensorRef, offset: int, seen: dict[int, bytes], records: dict[str, Record]
    ) -> None:
        self._data_at = ref.data_offset - offset
        self._rest = [getattr(ref, name) for name in _REST]
        # CRCs of storages are different in each, and are not looked at.
        free = sorted(
            record.crc_offset - offset for name, record in records.items() if name.startswith(STORAGE_PREFIX)
        )
        pieces: list[tuple[int, bytes]] = []
        for at, data in sorted(seen.items()):
            begin = 0
            for crc_at in free:
                if at <= crc_at and crc_at + 4 <= at + len(data):
                    pieces.append((at + begin, data[begin : crc_at - at]))
                    begin = crc_at + 4 - at
            pieces.append((at + begin, data[begin:]))
        self._spans: list[
            tuple[int, int, list[tuple[int, bytes]]]
        ] = []  # where, bytes, what is there from where on
        for at, data in pieces:
            if self._spans and at <= self._spans[-1][0] + self._spans[-1][1] + _GAP_NBYTES:
                begin, size, inside = self._spans[-1]
                inside.append((at - begin, data))
                self._spans[-1] = (begin, max(size, at - begin + len(data)), inside)
            else:
                self._spans.append((at, len(data), [(0, data)]))

    def fits(self, read: Read, offset: int) -> bool:
        """Whether the archive there is like the one that this was made from."""
        for at, size, inside in self._spans:
            data = read(offset + at, size)
            if len(data) != size or not all(data.startswith(one, begin) for begin, one in inside):
                return False
        return True

    def cast(self, offset: int) -> TensorRef:
        """What is in the archive there."""
        return TensorRef(offset + self._data_at, *self._rest)
