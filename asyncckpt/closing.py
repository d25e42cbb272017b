"""The end of a file that several ranks wrote: one of them writes what is left, and knows all CRCs then.

    every rank: its whole blocks, fsynced; its edges, fsynced -> Handed      the closer: all of that ->
        headers, directory, blocks with bytes of several ranks -> fsync -> the edges' files go

What crosses ranks is CRCs; the edges themselves go through the filesystem, which they share anyway.
"""

from __future__ import annotations

import base64
import errno
import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .commit import Attempt
from .errors import RankError, SaveError, WriteError
from .filesystem import Filesystem
from .formats import slices
from .formats.manifest import FileEntry
from .formats.slices import Combine, Run, SliceError
from .plan import SharedPart

_RUN = struct.Struct("<QQI")


@dataclass(frozen=True)
class Handed:
    """What one rank wrote of a file.

    Attributes:
        digest: of the file as this rank lays it out; see `SharedPart`.
        runs: what it wrote itself.
        edges: the file with the rest of what it has; None if there is no rest, or it is `held`.
        held: that rest, where it did not come through a file.
    """

    digest: str
    runs: tuple[Run, ...]
    edges: FileEntry | None
    held: bytes = b""


def to_bytes(handed: Mapping[str, Handed]) -> bytes:
    """A message to the rank that closes the files."""
    fields = {
        path: {
            "digest": one.digest,
            "runs": base64.b64encode(b"".join(_RUN.pack(*run) for run in one.runs)).decode(),
            "edges": one.edges
            and [one.edges.path, one.edges.nbytes, one.edges.block_nbytes, one.edges.block_crcs],
        }
        for path, one in handed.items()
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def from_bytes(data: bytes) -> dict[str, Handed]:
    """The message again."""
    found = {}
    for path, fields in json.loads(data).items():
        runs = tuple(Run(*run) for run in _RUN.iter_unpack(base64.b64decode(fields["runs"])))
        edges = None
        if fields["edges"]:
            name, nbytes, block_nbytes, crcs = fields["edges"]
            edges = FileEntry(name, nbytes, block_nbytes, tuple(crcs))
        found[path] = Handed(fields["digest"], runs, edges)
    return found


def close_file(
    fs: Filesystem,
    attempt: Attempt,
    part: SharedPart,
    handed: Mapping[int, Handed],
    block_nbytes: int,
    combine: Combine,
    called: Callable[[int], str],
) -> FileEntry:
    """Write what is left of a file, once its ranks have written their parts; what the file is then.

    Args:
        handed: by rank, of all that have any of it.
        block_nbytes: of the manifest; a multiple of the chunks of all ranks.
        called: a rank, as messages name it.

    Raises:
        RankError: a rank wrote something else than this one expects.
        SaveError: what a rank handed over is not there as it wrote it.
        WriteError: the operating system refused.
    """
    if part.image is None or part.spans is None:
        raise RuntimeError(f"{part.path} is closed by rank {part.closer}")
    for rank, one in handed.items():
        if one.digest != part.digest:
            here, there = called(rank), called(part.closer)
            raise RankError(
                f"{part.path}: {here} saves something else there than {there}: what they hold together must "
                f"have the same names, sizes and types"
            )
    try:
        closing = slices.close(
            part.image,
            part.spans,
            {rank: one.runs for rank, one in handed.items()},
            lambda rank: handed[rank].held or _read(fs, attempt, handed[rank].edges),
            block_nbytes,
            combine,
        )
    except SliceError as error:
        raise RankError(str(error)) from error
    fs.write_into(attempt.files / part.path, closing.writes, part.image.nbytes)
    for one in handed.values():
        if one.edges is not None:
            fs.unlink(attempt.files / one.edges.path)
    return FileEntry(part.path, part.image.nbytes, block_nbytes, closing.block_crcs)


def _read(fs: Filesystem, attempt: Attempt, entry: FileEntry | None) -> bytes:
    if entry is None:
        return b""
    path = attempt.files / entry.path
    try:
        data = fs.read(path)
    except OSError as problem:
        raise WriteError("read", str(path), problem.errno or errno.EIO) from problem
    if len(data) != entry.nbytes or crcs_of(data, entry.block_nbytes) != entry.block_crcs:
        raise SaveError(f"{path}: not what its rank wrote there: does the filesystem lose writes?")
    return data


def crcs_of(data: bytes, block_nbytes: int) -> tuple[int, ...]:
    """CRC-32 of each block."""
    blocks: Sequence[int] = range(0, len(data), block_nbytes)
    return tuple(zlib.crc32(data[begin : begin + block_nbytes]) for begin in blocks)
