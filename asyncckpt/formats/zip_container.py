"""The zip container as torch.save uses it: its structures, and finding the records in one.

    local header, padding | record | descriptor      one per record
    ...
    central directory                                one entry per record: offset, size, CRC
    zip64 end, locator, end                          torch writes all three; other writers only the last

Parsed by hand: a checkpoint may hold 50,000 archives, each a few hundred bytes long. Field layouts are those
of PKWARE's APPNOTE.TXT, sections 4.3 and 4.5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

Read = Callable[[int, int], bytes]  # (offset in file, nbytes) -> exactly these bytes

ZIP64 = 0xFFFFFFFF  # sizes and offsets from here on move to 64-bit fields
MANY = 0xFFFF  # so do counts
HAS_DESCRIPTOR = 0x0008
ENCRYPTED = 0x0001
UTF8 = 0x0800

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR = struct.Struct("<4sIQI")
END = struct.Struct("<4s4H2IH")
TAG = struct.Struct("<2H")  # of an extra field: id, size
PAIR32 = struct.Struct("<2I")
PAIR64 = struct.Struct("<2Q")
U64 = struct.Struct("<Q")
ZIP64_ID = 0x0001
CRC_IN_CENTRAL = 16  # offset of the CRC in a central entry

_TAIL_BYTES = 4096  # holds the directory of every archive with a few dozen records
_WHOLE_BYTES = 16384  # up to here one read of everything beats two reads
_HEAD_BYTES = 1024  # holds the pickle of a tensor, and the small records before its storage
_COMMENT_BYTES = 0xFFFF + END.size  # how far before the end of a zip its end record may begin


class BadZipError(ValueError):
    """These bytes are not a zip that torch.save could have written."""


def zip64_extra(nbytes: int, compressed_nbytes: int, offset: int) -> bytes:
    """The zip64 extra field: only what does not fit its 32-bit field."""
    body = b""
    if nbytes >= ZIP64:
        body += PAIR64.pack(nbytes, compressed_nbytes)
    if offset >= ZIP64:
        body += U64.pack(offset)
    return TAG.pack(ZIP64_ID, len(body)) + body


class Record(NamedTuple):
    """Where one record of an archive lies.

    Attributes:
        data_offset: absolute, in the file.
        crc: CRC-32, or 0 if torch.save was told not to compute any.
        crc_offset: where the central directory has it; absolute, too.
    """

    data_offset: int
    nbytes: int
    crc: int
    crc_offset: int


class _Entry(NamedTuple):
    name: bytes
    flags: int
    header_offset: int  # from the start of the zip
    nbytes: int
    crc: int
    crc_at: int  # in the directory
    is_zip64: bool


def read_directory(read: Read, offset: int, nbytes: int) -> dict[str, Record]:
    """The records of the zip that occupies [offset, offset + nbytes) of a file, in file order.

    Names come without the directory that all of them share. Reads the central directory, and local
    headers only where torch's own arithmetic does not already prove where the data begins.

    Raises:
        BadZipError: this is no archive that torch.save could have written, or it is damaged.
    """
    return records_in(windowed(read, offset, nbytes), offset, nbytes)


def records_in(read: Read, offset: int, nbytes: int) -> dict[str, Record]:
    """The same, of a zip whose end `read` keeps at hand."""
    count, size, start = _find_directory(read, offset, nbytes)
    entries = _parse_directory(read(offset + start, size), count)
    entries.sort(key=_by_offset)
    prefix = entries[0].name.partition(b"/")[0] + b"/" if entries else b""
    records: dict[str, Record] = {}
    bounds = [entry.header_offset for entry in entries[1:]] + [start]
    for entry, bound in zip(entries, bounds, strict=True):
        if not entry.name.startswith(prefix):
            raise BadZipError(f"record {entry.name!r} lies outside {prefix!r}")
        if entry.flags & ENCRYPTED:
            raise BadZipError(f"record {entry.name!r} is encrypted")
        name = entry.name[len(prefix) :].decode("utf-8", "replace")
        if name in records:
            raise BadZipError(f"record {name!r} is there twice")
        data_offset = _data_offset(read, offset, entry, bound)
        if data_offset + entry.nbytes > bound:
            raise BadZipError(f"record {name!r} runs into what follows it")
        crc_offset = offset + start + entry.crc_at
        records[name] = Record(offset + data_offset, entry.nbytes, entry.crc, crc_offset)
    return records


def windowed(read: Read, offset: int, nbytes: int) -> Read:
    """`read`, with the end of the zip (the whole of it when small) fetched once and kept."""
    kept = nbytes if nbytes <= _WHOLE_BYTES else _TAIL_BYTES
    start = offset + nbytes - kept
    tail = read(start, kept)

    def from_window(at: int, size: int) -> bytes:
        if at >= start and at + size <= start + kept:
            return tail[at - start : at - start + size]
        data = read(at, size)
        if len(data) != size:
            raise BadZipError(f"file ends at offset {at + len(data)}, expected {size} bytes from offset {at}")
        return data

    if len(tail) != kept:
        raise BadZipError(f"file ends at offset {start + len(tail)}, the archive at {offset + nbytes}")
    return from_window


def read_ahead(offset: int, nbytes: int) -> list[tuple[int, int]]:
    """Where most of what is read of a zip with one storage lies: offsets and sizes."""
    if nbytes <= _WHOLE_BYTES:
        return [(offset, nbytes)]
    return [(offset, _HEAD_BYTES), (offset + nbytes - _TAIL_BYTES, _TAIL_BYTES)]


def _by_offset(entry: _Entry) -> int:
    return entry.header_offset


def _data_offset(read: Read, offset: int, entry: _Entry, bound: int) -> int:
    """Where a record's data begins, from the start of the zip.

    The local header repeats the name and adds padding, so its length is only known by reading it: 50,000
    small reads all over the file. torch leaves no gaps, so the data also ends one descriptor before the
    next header (`bound`). When that agrees with torch's padding rule, the header need not be read.
    """
    bare_end = entry.header_offset + LOCAL.size + len(entry.name) + TAG.size
    descriptor_nbytes = 0
    if entry.flags & HAS_DESCRIPTOR:
        descriptor_nbytes = 24 if entry.is_zip64 else 16
    if entry.is_zip64:
        bare_end += len(zip64_extra(entry.nbytes, 0, entry.header_offset))
    by_rule = bare_end + -bare_end % 64
    if by_rule == bound - descriptor_nbytes - entry.nbytes:
        return by_rule
    header = LOCAL.unpack(read(offset + entry.header_offset, LOCAL.size))
    if header[0] != b"PK\3\4" or header[9] != len(entry.name):
        raise BadZipError(f"no local header of {entry.name!r} at offset {offset + entry.header_offset}")
    return entry.header_offset + LOCAL.size + int(header[9]) + int(header[10])


def _find_directory(read: Read, offset: int, nbytes: int) -> tuple[int, int, int]:
    """Count, size and start of the central directory, from the start of the zip."""
    tail_nbytes = min(nbytes, END.size)
    tail = read(offset + nbytes - tail_nbytes, tail_nbytes)
    if not (tail.startswith(b"PK\5\6") and tail.endswith(b"\0\0")):  # a comment follows, or it is no zip
        tail_nbytes = min(nbytes, _COMMENT_BYTES)
        tail = read(offset + nbytes - tail_nbytes, tail_nbytes)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < END.size:
        raise BadZipError(_what_else(read, offset, nbytes))
    _, _, _, _, count, size, start, _ = END.unpack_from(tail, at)
    end = nbytes - tail_nbytes + at
    if end >= LOCATOR.size:
        magic, _, end64, _ = LOCATOR.unpack(read(offset + end - LOCATOR.size, LOCATOR.size))
        if magic == b"PK\6\7":
            if end64 + END64.size > end:
                raise BadZipError(f"zip64 end record at {end64} lies outside the archive")
            fields = END64.unpack(read(offset + end64, END64.size))
            if fields[0] != b"PK\6\6":
                raise BadZipError(f"no zip64 end record at offset {offset + end64}")
            count, size, start = fields[7:10]
            end = end64
    if start + size > end or count * CENTRAL.size > size:
        raise BadZipError(f"directory of {count} records, {size} bytes at {start}: not inside the archive")
    return count, size, start


def _parse_directory(directory: bytes, count: int) -> list[_Entry]:
    entries: list[_Entry] = []
    at = 0
    for _ in range(count):
        if at + CENTRAL.size > len(directory):
            raise BadZipError(f"directory ends after {len(entries)} of {count} records")
        fields = CENTRAL.unpack_from(directory, at)
        magic, _, _, flags, method, _, _, crc, stored_nbytes, nbytes, name_nbytes, extra_nbytes = fields[:12]
        if magic != b"PK\1\2":
            raise BadZipError(f"directory entry {len(entries)} is garbled")
        header_offset: int = fields[16]
        crc_at = at + CRC_IN_CENTRAL
        at += CENTRAL.size
        name = directory[at : at + name_nbytes]
        extra = directory[at + name_nbytes : at + name_nbytes + extra_nbytes]
        if len(extra) != extra_nbytes:
            raise BadZipError(f"directory entry {len(entries)} is cut off")
        at += name_nbytes + extra_nbytes + fields[12]
        is_zip64 = ZIP64 in (nbytes, stored_nbytes, header_offset)
        if is_zip64:
            nbytes, stored_nbytes, header_offset = _wide(extra, nbytes, stored_nbytes, header_offset)
        if method != 0 or stored_nbytes != nbytes:
            raise BadZipError(f"record {name!r} is compressed: torch.save stores records as they are")
        entries.append(_Entry(name, flags, header_offset, nbytes, crc, crc_at, is_zip64))
    return entries


def _wide(extra: bytes, *fields32: int) -> list[int]:
    """Central-directory fields with those that overflowed taken from the zip64 extra field."""
    at = 0
    while at + TAG.size <= len(extra):
        tag, size = TAG.unpack_from(extra, at)
        at += TAG.size
        if tag == ZIP64_ID:
            body = extra[at : at + size]
            wide = [value for (value,) in U64.iter_unpack(body[: len(body) // 8 * 8])]
            if len(wide) < fields32.count(ZIP64):
                break
            return [wide.pop(0) if value == ZIP64 else value for value in fields32]
        at += size
    raise BadZipError("a 64-bit size or offset is missing from the directory")


def _what_else(read: Read, offset: int, nbytes: int) -> str:
    """Names what a file is that has no zip directory at its end."""
    head = read(offset, min(nbytes, 512))
    if not head:
        return "the file is empty"
    if head.startswith(b"PK\3\4"):
        return "a zip without its directory: the end of the file is missing"
    if head[257:262] == b"ustar":
        return "a tar archive, as torch.save wrote before torch 0.2: load it with torch.load, save it anew"
    if head.startswith(b"\x80\x02\x8a\x0a"):
        return "torch.save's format from before torch 1.6: load it with torch.load, save it anew"
    return "not a zip archive, so not a torch.save file"
