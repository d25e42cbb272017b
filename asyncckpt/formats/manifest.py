"""The manifest: what a step holds, and how to tell that it still does.

A step directory carries one *fragment* per rank (that rank's files, their sizes, and the CRC-32 of
every block of them) and one *manifest* (whose step it is, and the size and CRC of each fragment).
So every byte under a step is covered by some CRC, and a slice of a file can be checked alone.

Guarantees:
- Both end in a CRC-32 of all bytes before it, compared as text: a reader accepts a file only if it
  is byte for byte one that `to_bytes` could have produced the ending of. Any flipped bit is found.
- That ending is the same in every format version, present and future, so that "too new" is never
  mistaken for "damaged".
- A path that leaves the step directory, or names one file in two ways, cannot be represented:
  it is refused when built and when read.

Pure: no I/O.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..errors import CorruptStepError, LoadError, OptionError

FORMAT_VERSION = 1
MANIFEST_NAME = "asyncckpt_manifest.json"
FRAGMENT_PREFIX = "asyncckpt_rank_"


def fragment_name(rank: int) -> str:
    """File name of a rank's fragment inside the step directory."""
    return f"{FRAGMENT_PREFIX}{rank:05d}.json"


def check_path(path: str) -> str:
    """`path`, if it names something inside the step directory in the one canonical way.

    Raises:
        ValueError: absolute, empty, with "", "." or ".." between slashes, backslash, NUL, or text
            that no file name can hold.
    """
    if not isinstance(path, str):
        raise ValueError(f"a path must be text, got {path!r}")
    if any(part in ("", ".", "..") for part in path.split("/")) or "\\" in path or "\0" in path:
        raise ValueError(f"path {path!r} is not a plain path inside the step directory")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"path {path!r} is not valid text") from None
    return path


@dataclass(frozen=True)
class FileEntry:
    """One file of a step.

    Attributes:
        path: relative to the step directory, with "/" between parts.
        nbytes: size of the file.
        block_nbytes: size of a block; the last one may be shorter.
        block_crcs: CRC-32 of every block, in file order; blocks tile the whole file.
    """

    path: str
    nbytes: int
    block_nbytes: int
    block_crcs: tuple[int, ...]

    def __post_init__(self) -> None:
        check_path(self.path)
        _check_int("nbytes", self.nbytes, 0)
        _check_int("block_nbytes", self.block_nbytes, 1)
        blocks = -(-self.nbytes // self.block_nbytes)
        if len(self.block_crcs) != blocks:
            raise ValueError(f"{self.path}: {blocks} block CRCs expected, got {len(self.block_crcs)}")
        if blocks and not (min(self.block_crcs) >= 0 and max(self.block_crcs) <= 0xFFFFFFFF):
            raise ValueError(f"{self.path}: a block CRC is not a 32-bit number")


@dataclass(frozen=True)
class Fragment:
    """The files that one rank wrote in one attempt."""

    attempt: str
    rank: int
    files: tuple[FileEntry, ...]

    def __post_init__(self) -> None:
        _check_text("attempt", self.attempt)
        _check_int("rank", self.rank, 0)
        _check_unique(entry.path for entry in self.files)

    def to_bytes(self) -> bytes:
        """The fragment's file."""
        files = [
            {
                "path": entry.path,
                "nbytes": entry.nbytes,
                "block_nbytes": entry.block_nbytes,
                "block_crcs": _pack_crcs(entry.block_crcs),
            }
            for entry in self.files
        ]
        return _seal(
            {"format_version": FORMAT_VERSION, "attempt": self.attempt, "rank": self.rank, "files": files}
        )

    @staticmethod
    def from_bytes(data: bytes, where: str = "fragment") -> Fragment:
        """Parse and verify; `where` names the file in errors.

        Raises:
            CorruptStepError: not the bytes that were written, or not what a fragment may hold.
            LoadError: written by a newer format version.
        """
        body = _Record(_unseal(data, where), where)
        fragment: Fragment = body.build(
            lambda: Fragment(
                attempt=body.take("attempt", str),
                rank=body.take("rank", int),
                files=tuple(_file_entry(_Record(raw, where)) for raw in body.take("files", list)),
            )
        )
        return fragment


@dataclass(frozen=True)
class FragmentRef:
    """Where a fragment is and what it must be: its size and the CRC-32 of the whole file."""

    path: str
    nbytes: int
    crc: int

    def __post_init__(self) -> None:
        check_path(self.path)
        _check_int("nbytes", self.nbytes, 0)
        _check_int("crc", self.crc, 0)

    def verify(self, data: bytes, where: str) -> None:
        """Raise CorruptStepError unless `data` is the fragment that the manifest speaks of."""
        if len(data) != self.nbytes:
            raise CorruptStepError(where, f"{self.nbytes} bytes expected, got {len(data)}")
        got = zlib.crc32(data)
        if got != self.crc:
            raise CorruptStepError(where, f"CRC-32 {self.crc:08x} expected, got {got:08x}")


def checked_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of the user's metadata.

    Raises:
        OptionError: it would not come back from JSON as it is.
    """
    try:
        copy = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as problem:
        raise OptionError(f"metadata is not JSON: {problem}") from None
    if not isinstance(copy, dict) or copy != metadata:
        raise OptionError("metadata is not JSON: keys must be text, and sequences must be lists")
    return copy


@dataclass(frozen=True)
class Manifest:
    """A committed step.

    Attributes:
        attempt: the attempt that wrote it; unique over all runs.
        ordinal: position in the order of commits under this root, from 1: newer is larger, even
            where a rollback made the step number smaller.
        step: the step number.
        layout: name of the directory layout.
        world_size: number of ranks that took part.
        parts: names of the groups of processes that took part; ("main",) where none were declared.
        metadata: the user's own; anything JSON.
        fragments: one per rank; on node-local disks, those of the ranks on this node.
        format_version: of the manifest itself.
        part_world_sizes: of each part, in their order; empty where none were declared. Ranks are numbered
            over all parts in this order, and so are fragments.
        nodes: on how many node-local disks the step is; 0 where all ranks share one filesystem.
        node_ranks: whose part of it lies on this one, numbered as fragments are; empty where all share.
    """

    attempt: str
    ordinal: int
    step: int
    layout: str
    world_size: int
    parts: tuple[str, ...]
    fragments: tuple[FragmentRef, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    part_world_sizes: tuple[int, ...] = ()
    nodes: int = 0
    node_ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_text("attempt", self.attempt)
        _check_int("ordinal", self.ordinal, 1)
        _check_int("step", self.step, 0)
        _check_text("layout", self.layout)
        _check_int("world_size", self.world_size, 1)
        for part in self.parts:
            _check_text("part", part)
        for size in self.part_world_sizes:
            _check_int("part_world_sizes", size, 1)
        if self.part_world_sizes and (
            sum(self.part_world_sizes) != self.world_size
            or len(self.part_world_sizes) != len(self.parts)
            or len(set(self.parts)) != len(self.parts)
        ):
            raise ValueError(f"parts {self.parts} of {self.part_world_sizes} ranks are not {self.world_size}")
        _check_int("nodes", self.nodes, 0)
        for rank in self.node_ranks:
            _check_int("node_ranks", rank, 0)
        if bool(self.nodes) != bool(self.node_ranks):
            raise ValueError(f"{self.nodes} nodes, and this is that of ranks {self.node_ranks}")
        if not self.fragments:
            raise ValueError("a manifest needs at least one fragment")
        _check_unique(ref.path for ref in self.fragments)

    @property
    def world_sizes(self) -> dict[str, int]:
        """Ranks of each part."""
        return dict(zip(self.parts, self.part_world_sizes or (self.world_size,), strict=False))

    def to_bytes(self) -> bytes:
        """The manifest's file.

        Raises:
            OptionError: `metadata` would not come back from JSON as it is.
        """
        metadata = checked_metadata(self.metadata)
        fragments = [{"path": ref.path, "nbytes": ref.nbytes, "crc": ref.crc} for ref in self.fragments]
        return _seal(
            {
                "format_version": self.format_version,
                "attempt": self.attempt,
                "ordinal": self.ordinal,
                "step": self.step,
                "layout": self.layout,
                "world_size": self.world_size,
                "parts": list(self.parts),
                **({"part_world_sizes": list(self.part_world_sizes)} if self.part_world_sizes else {}),
                **({"nodes": self.nodes, "node_ranks": list(self.node_ranks)} if self.nodes else {}),
                "metadata": metadata,
                "fragments": fragments,
            }
        )

    @staticmethod
    def from_bytes(data: bytes, where: str = MANIFEST_NAME) -> Manifest:
        """Parse and verify; `where` names the file in errors.

        Raises:
            CorruptStepError: not the bytes that were written, or not what a manifest may hold.
            LoadError: written by a newer format version.
        """
        body = _Record(_unseal(data, where), where)
        manifest: Manifest = body.build(
            lambda: Manifest(
                attempt=body.take("attempt", str),
                ordinal=body.take("ordinal", int),
                step=body.take("step", int),
                layout=body.take("layout", str),
                world_size=body.take("world_size", int),
                parts=tuple(body.take("parts", list)),
                metadata=body.take("metadata", dict),
                fragments=tuple(_fragment_ref(_Record(raw, where)) for raw in body.take("fragments", list)),
                format_version=body.take("format_version", int),
                part_world_sizes=tuple(body.take("part_world_sizes", list, [])),
                nodes=body.take("nodes", int, 0),
                node_ranks=tuple(body.take("node_ranks", list, [])),
            )
        )
        return manifest


def _file_entry(record: _Record) -> FileEntry:
    return FileEntry(
        path=record.take("path", str),
        nbytes=record.take("nbytes", int),
        block_nbytes=record.take("block_nbytes", int),
        block_crcs=_unpack_crcs(record.take("block_crcs", str)),
    )


def _fragment_ref(record: _Record) -> FragmentRef:
    return FragmentRef(record.take("path", str), record.take("nbytes", int), record.take("crc", int))


def _ending(body: bytes) -> bytes:
    return b',\n "crc32": "%08x"\n}\n' % zlib.crc32(body)


def _seal(fields: Mapping[str, Any]) -> bytes:
    body = json.dumps(fields, indent=1, allow_nan=False).encode()
    body = body[: body.rindex(b"\n}")]  # the closing brace moves behind the CRC
    return body + _ending(body)


def _unseal(data: bytes, where: str) -> object:
    # The ending is recomputed and compared whole: flips inside it, even ones that JSON would
    # forgive (white space, the case of a hex digit), do not pass.
    body = data[: -len(_ending(b""))]
    if data[len(body) :] != _ending(body):
        raise CorruptStepError(where, "its own CRC-32 does not fit: truncated or damaged")
    try:
        fields = json.loads(data, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as problem:
        raise CorruptStepError(where, f"not JSON: {problem}") from None
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if type(version) is not int or version < 1:
        raise CorruptStepError(where, "no format version")
    if version > FORMAT_VERSION:
        raise LoadError(
            f"{where} has format version {version}; this asyncckpt reads up to {FORMAT_VERSION}: upgrade it"
        )
    return fields


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key appears twice")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class _Record:
    """A JSON object whose fields are taken with their types checked."""

    def __init__(self, fields: object, where: str) -> None:
        self.fields = fields
        self.where = where

    def take(self, name: str, kind: type, absent: Any = None) -> Any:
        if not isinstance(self.fields, dict):
            raise ValueError(f"an object expected, got {type(self.fields).__name__}")
        value = self.fields.get(name, absent)
        if type(value) is not kind:  # exactly: a bool is no int here
            raise ValueError(f"{name} must be {kind.__name__}, got {type(value).__name__}")
        return value

    def build(self, make: Any) -> Any:
        try:
            return make()
        except ValueError as problem:
            raise CorruptStepError(self.where, str(problem)) from None


def _pack_crcs(crcs: Sequence[int]) -> str:
    # 4 bytes per 4 MiB block: 1.3 MB of text for a 1 TB step, where a JSON list takes 2.7 MB
    # and a million Python ints to parse.
    return base64.b64encode(struct.pack(f"<{len(crcs)}I", *crcs)).decode()


def _unpack_crcs(text: str) -> tuple[int, ...]:
    try:
        packed = base64.b64decode(text.encode("ascii"), validate=True)
        return struct.unpack(f"<{len(packed) // 4}I", packed)
    except (UnicodeEncodeError, binascii.Error, struct.error):
        raise ValueError("block_crcs is not base64 of 32-bit numbers") from None


def _check_int(name: str, value: int, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")


def _check_text(name: str, value: str) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be non-empty text, got {value!r}")


def _check_unique(paths: Any) -> None:
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise ValueError(f"path {path!r} is listed twice")
        seen.add(path)
