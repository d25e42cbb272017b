"""torch.save's zip container: laid out from sizes alone, and read back without touching tensor bytes.

    local header, padding | record | descriptor      one per record, data on a 64-byte boundary
    ...
    central directory                                one entry per record: offset, size, CRC
    zip64 end, locator, end                          always all three

`data.pkl` is the pickled tree, `data/<key>` are the storages, the small records around them say how to
read these. Every number in the container except the CRCs follows from the sizes, so a layout is made
once and serves every later save of the same shapes. A pickle that is shorter than its slot is padded
with zero bytes by the caller: unpicklers stop at the STOP opcode.

Which small records exist, in which order and with what contents differs between releases of torch: that
*dialect* is learned from a tiny archive that the installed torch.save writes. The layout itself is that
of PyTorchStreamWriter on miniz (caffe2/serialize/inline_container.cc, third_party/miniz), byte for byte;
only the 40 characters of `.data/serialization_id` are ours.

Offsets and alignment count from the start of the zip, not of the file: DCP appends zips back to back.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from asyncckpt.formats.image import NO_RECORD, ImageBuilder
from asyncckpt.formats.refs import BadPickleError, StorageRef
from asyncckpt.formats.unpickle import unpickle
from asyncckpt.formats.zip_container import (
    CENTRAL,
    CRC_IN_CENTRAL,
    END,
    END64,
    HAS_DESCRIPTOR,
    LOCAL,
    LOCATOR,
    MANY,
    PAIR32,
    PAIR64,
    TAG,
    UTF8,
    ZIP64,
    BadZipError,
    Read,
    Record,
    read_ahead,
    read_directory,
    records_in,
    windowed,
    zip64_extra,
)

__all__ = [
    "PICKLE", "SERIALIZATION_ID", "STORAGE_PREFIX", "BadZipError", "Dialect", "Read", "Record",
    "dialect", "lay_out", "parse", "read_ahead", "read_directory", "read_tree", "stem_of",
]  # fmt: skip

PICKLE = "data.pkl"
STORAGE_PREFIX = "data/"
SERIALIZATION_ID = ".data/serialization_id"
_STORAGES = "data/*"  # stands for all storages in a dialect's order of records

_DESCRIPTOR_MAGIC = b"PK\x07\x08"
_PADDING_ID = 0x4246  # "FB"


# ---------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Dialect:
    """What the installed torch.save writes around the pickle and the storages.

    Attributes:
        order: names in file order, with the contents of the small ones.
        alignment: bytes; the data of every record begins on a multiple of it.
        lexicographic: storages come in the order of their keys as strings, not as numbers.
    """

    order: tuple[tuple[str, bytes], ...]
    alignment: int
    lexicographic: bool


def dialect() -> Dialect:
    """The dialect of the installed torch, under its present storage alignment."""
    alignment = getattr(torch.serialization, "_get_storage_alignment", lambda: 64)()
    return _learn(alignment)


@cache
def _learn(alignment: int) -> Dialect:
    eleven = [torch.zeros(1, dtype=torch.uint8) for _ in range(11)]  # "10" sorts before "2" as a string
    probe = io.BytesIO()
    torch.save(eleven, probe)
    archive = probe.getvalue()
    records = read_directory(lambda offset, nbytes: archive[offset : offset + nbytes], 0, len(archive))
    storages = [name for name in records if name.startswith(STORAGE_PREFIX)]
    order = []
    for name, record in records.items():
        if name == storages[0]:
            order.append((_STORAGES, b""))
        elif name in (PICKLE, SERIALIZATION_ID):
            order.append((name, b""))
        elif name not in storages:
            order.append((name, archive[record.data_offset : record.data_offset + record.nbytes]))
    return Dialect(tuple(order), alignment, storages[2] == STORAGE_PREFIX + "10")


def stem_of(file_name: str) -> str:
    """The directory inside the zip that torch.save would use for a file of this name."""
    if not file_name.isascii():
        return "archive"  # torch writes such files through a Python stream, which has no name
    name = file_name.replace("\\", "/").rpartition("/")[2]
    return name.rpartition(".")[0] if "." in name else name


def lay_out(
    builder: ImageBuilder,
    stem: str,
    pickle: bytes | tuple[int, int],
    storages: Sequence[tuple[int, int]],
) -> None:
    """Append one complete torch.save archive to `builder`.

    Args:
        stem: the directory inside the zip; see `stem_of`.
        pickle: `data.pkl` as bytes, or as (source, nbytes of its slot) if it varies between saves.
        storages: (source, nbytes) of each storage, by key.
    """
    spoken = dialect()
    archive = _Archive(builder, stem, spoken.alignment)
    keys: Iterable[int] = range(len(storages))
    if spoken.lexicographic:
        keys = sorted(keys, key=str)
    for name, data in spoken.order:
        if name == _STORAGES:
            for key in keys:
                source, nbytes = storages[key]
                archive.record(f"{STORAGE_PREFIX}{key}", source, nbytes)
        elif name == PICKLE:
            if isinstance(pickle, tuple):
                archive.record(PICKLE, *pickle)
            else:
                archive.literal(PICKLE, pickle)
        elif name == SERIALIZATION_ID:
            archive.literal(name, archive.fingerprint())
        else:
            archive.literal(name, data)
    archive.finish()


class _Archive:
    """One zip being appended to a file image."""

    def __init__(self, builder: ImageBuilder, stem: str, alignment: int) -> None:
        self._builder = builder
        self._start = builder.offset
        self._prefix = stem + "/"
        self._alignment = alignment
        self._directory: list[tuple[bytes, int]] = []  # central entry, record whose CRC it still lacks
        self._sizes = hashlib.sha256()

    def record(self, name: str, source: int, nbytes: int) -> None:
        """Append the first `nbytes` bytes of `source` under `name`."""
        entry, descriptor = self._header(name, nbytes, 0)
        builder = self._builder
        record = builder.record(source, nbytes)
        if nbytes:
            builder.literal(_DESCRIPTOR_MAGIC)
            builder.crc_of(record)
            builder.literal(descriptor)
        self._directory.append((entry, record))

    def literal(self, name: str, data: bytes) -> None:
        """Append `data` under `name`."""
        crc = zlib.crc32(data)
        entry, descriptor = self._header(name, len(data), crc)
        self._builder.literal(data)
        if data:
            self._builder.literal(_DESCRIPTOR_MAGIC + crc.to_bytes(4, "little") + descriptor)
        self._directory.append((entry, NO_RECORD))

    def fingerprint(self) -> bytes:
        """Forty digits that name this layout, where torch puts digits that name the contents."""
        return b"%040d" % int.from_bytes(self._sizes.digest()[:16], "little")

    def _header(self, name: str, nbytes: int, crc: int) -> tuple[bytes, bytes]:
        """Append the local header; returns the central entry and the sizes that end the descriptor."""
        offset = self._builder.offset - self._start
        full_name = (self._prefix + name).encode()
        flags = UTF8 | HAS_DESCRIPTOR if nbytes else UTF8
        local_extra = central_extra = b""
        if nbytes >= ZIP64 or offset >= ZIP64:
            # miniz gives the compressed size as 0 in the local copy: it does not know it yet
            local_extra = zip64_extra(nbytes, 0, offset)
            central_extra = zip64_extra(nbytes, nbytes, offset)
            descriptor = PAIR64.pack(nbytes, nbytes)
        else:
            descriptor = PAIR32.pack(nbytes, nbytes)
        bare_end = offset + LOCAL.size + len(full_name) + len(local_extra) + TAG.size
        padding = -bare_end % self._alignment
        extra_nbytes = len(local_extra) + TAG.size + padding
        self._builder.literal(
            LOCAL.pack(b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(full_name), extra_nbytes)
            + full_name
            + local_extra
            + TAG.pack(_PADDING_ID, padding)
            + b"Z" * padding
        )
        size32 = min(nbytes, ZIP64)
        offset32 = min(offset, ZIP64)
        entry = (
            CENTRAL.pack(
                b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, size32, size32,
                len(full_name), len(central_extra), 0, 0, 0, 0, offset32,
            )
            + full_name
            + central_extra
        )  # fmt: skip
        self._sizes.update(b"%b\0%d\0" % (full_name, nbytes))
        return entry, descriptor

    def finish(self) -> None:
        """Append the central directory and the three end records."""
        builder = self._builder
        directory = builder.offset - self._start
        for entry, record in self._directory:
            if record == NO_RECORD:
                builder.literal(entry)
            else:
                builder.literal(entry[:CRC_IN_CENTRAL])
                builder.crc_of(record)
                builder.literal(entry[CRC_IN_CENTRAL + 4 :])
        end = builder.offset - self._start
        nbytes = end - directory
        count = len(self._directory)
        count16 = min(count, MANY)
        builder.literal(
            END64.pack(b"PK\6\6", END64.size - 12, 0x031E, 45, 0, 0, count, count, nbytes, directory)
            + LOCATOR.pack(b"PK\6\7", 0, end, 1)
            + END.pack(b"PK\5\6", 0, 0, count16, count16, min(nbytes, ZIP64), min(directory, ZIP64), 0)
        )


# ---------------------------------------------------------------------------- reading


def read_tree(read: Read, offset: int, nbytes: int, *, trusted: bool = False) -> Any:
    """The saved object, with a `TensorRef` in place of every tensor: no tensor byte is read.

    Globals outside a short list of harmless ones become `Inert`, unless `trusted`: then they are
    imported, which lets the file run any code.

    Raises:
        BadZipError: the archive is damaged or not torch.save's.
        BadPickleError: its pickle cannot be read.
    """
    return parse(windowed(read, offset, nbytes), offset, nbytes, trusted=trusted)[0]


def parse(read: Read, offset: int, nbytes: int, *, trusted: bool = False) -> tuple[Any, dict[str, Record]]:
    """The same from a zip whose end `read` keeps at hand; and its records."""
    records = records_in(read, offset, nbytes)
    if PICKLE not in records:
        kind = "a TorchScript archive" if "constants.pkl" in records else "a zip, but not torch.save's"
        raise BadZipError(f"no {PICKLE} in it: this is {kind}")
    if "byteorder" in records and (order := _content(read, records, "byteorder")) != b"little":
        raise BadZipError(f"its tensors have byte order {order[:16]!r}; only little-endian files can be read")

    def storage(key: str, dtype: torch.dtype, location: str, storage_nbytes: int) -> StorageRef:
        record = records.get(STORAGE_PREFIX + key)
        if record is None:
            raise BadPickleError(f"storage {key!r} is missing")
        if record.nbytes != storage_nbytes:
            raise BadPickleError(
                f"storage {key!r} has {record.nbytes} bytes, but the pickle says {storage_nbytes}"
            )
        return StorageRef(record.data_offset, storage_nbytes, key, dtype, location)

    return unpickle(_content(read, records, PICKLE), storage, trusted=trusted), records


def _content(read: Read, records: dict[str, Record], name: str) -> bytes:
    """A record's bytes, checked against its CRC: stock torch.load would not notice a flipped bit."""
    record = records[name]
    data = read(record.data_offset, record.nbytes)
    if record.crc and zlib.crc32(data) != record.crc:
        raise BadZipError(f"{name}: CRC is {zlib.crc32(data):08x}, the directory says {record.crc:08x}")
    return data
