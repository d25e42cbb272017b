"""Slices of shared files, from a rank's own file to the rank on another node that closes the shared one.

    own file, fsynced -> 1 MiB at a time over gloo -> whole blocks at their place in the shared file
                                                      (the edges stay in memory: less than two blocks a slice)

Between the two ranks' background threads alone, over a group of their own: nothing that trains takes part.
Both check what they read or receive against CRCs, and both keep to deadlines. Every rank goes through its
transfers in the same order of all, so that nobody waits in a circle.
"""

from __future__ import annotations

import base64
import json
import queue
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .closing import Handed
from .commit import Attempt
from .errors import RankError, SaveError
from .filesystem import Filesystem
from .formats import slices
from .formats.image import Int64Array
from .formats.slices import Run
from .plan import Apart, SharedPart
from .ranks import Ranks

CHUNK_NBYTES = 1 << 20


class Pipe:
    """Between this rank and one other, for one save after the other. What goes through is at most a chunk."""

    def __init__(self, group: Any, me: int, called: str, buffer: torch.Tensor | None = None) -> None:
        self._group, self._me, self._called = group, me, called
        self._buffer = torch.empty(CHUNK_NBYTES, dtype=torch.uint8) if buffer is None else buffer

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Raises RankError if the other does not take it in time, or is gone."""
        tensor = self._buffer[: len(data)]
        tensor.numpy().data[:] = data
        self._do(lambda: self._group.send([tensor], 1 - self._me, 0))

    def receive(self, nbytes: int) -> memoryview:
        """Good until the next call. Raises RankError if the other does not send it in time, or is gone."""
        tensor = self._buffer[:nbytes]
        self._do(lambda: self._group.recv([tensor], 1 - self._me, 0))
        return tensor.numpy().data

    def close(self) -> None:
        """Hang up: the other hears of it at once, whoever still holds this."""
        self._group = None

    def _do(self, begin: Callable[[], Any]) -> None:
        try:
            begin().wait()
        except RuntimeError as error:  # whatever gloo raises
            reason = str(error).partition("] ")[2].partition(". ")[0] or str(error)
            raise RankError(f"{self._called} does not go on exchanging slices: {reason}") from error


class Pipes:
    """The pipes of a rank; made when they are first needed, and anew after a failure."""

    def __init__(self, ranks: Ranks, silence_s: float) -> None:
        self._ranks = ranks
        self._silence_s = silence_s
        self._buffer = torch.empty(CHUNK_NBYTES, dtype=torch.uint8)  # for one pipe at a time
        self._made: dict[int, tuple[int, Pipe]] = {}
        self._broken: dict[int, int] = {}  # how often, by the other's place
        self._broken_pipes: list[Pipe] = []

    def between(self, save: int, other: int) -> Pipe:
        """Once the other rank is there too.

        Raises:
            RankError: it does not come, or the save has failed.
        """
        theirs = self._ranks.rendezvous(save, other, self._broken.get(other, 0))
        generation = self._broken[other] = max(theirs, self._broken.get(other, 0))
        if other not in self._made or self._made[other][0] != generation:
            called, me = self._ranks.called(other), int(self._ranks.rank > other)
            try:
                group = self._connected(other, generation, me)
            except (RuntimeError, TimeoutError) as error:
                self._break(other)
                raise RankError(f"{called} cannot be reached for its slices: {error}") from error
            self._made[other] = (generation, Pipe(group, me, called, self._buffer))
        return self._made[other][1]

    def _connected(self, other: int, generation: int, me: int) -> Any:
        """A group of two. On a thread of its own: a store whose host has stopped knows no deadline."""
        made: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def connect() -> None:
            try:
                store = self._ranks.store_between(other, generation)
                made.put(dist.ProcessGroupGloo(store, me, 2, timedelta(seconds=self._silence_s)))
            except Exception as error:  # noqa: BLE001 -- for who waits
                made.put(error)

        threading.Thread(target=connect, name="asyncckpt-pipe", daemon=True).start()
        try:
            found = made.get(timeout=2 * self._silence_s)
        except queue.Empty:
            raise TimeoutError(f"no connection after {2 * self._silence_s:g} s") from None
        if isinstance(found, Exception):
            raise RuntimeError(str(found)) from found
        return found

    def exchange(
        self,
        save: int,
        fs: Filesystem,
        attempt: Attempt,
        places: Sequence[int],
        parcels: Sequence[Parcel],
        ours: Sequence[SharedPart],
        far: Sequence[int],
        block_nbytes: int,
    ) -> dict[int, dict[str, Handed]]:
        """Send what this rank has of others' files, and take what others have of its.

        Args:
            places: of the ranks of this part, which files count in.
            parcels: to be sent.
            ours: what this rank closes.
            far: places of those who send to this one.
            block_nbytes: of the manifest.

        Returns:
            what was taken: by rank, and by path.

        Raises:
            RankError, SaveError, WriteError: see `send` and `receive`.
        """
        me = self._ranks.rank
        closers = {places[parcel.part.closer] for parcel in parcels}
        handed: dict[int, dict[str, Handed]] = {}
        for closer, contributor in sorted({(one, me) for one in closers} | {(me, one) for one in far}):
            other = closer if contributor == me else contributor
            rank = places.index(other)
            pipe = self.between(save, other)
            try:
                if other == closer:
                    send(pipe, fs, [parcel for parcel in parcels if parcel.part.closer == rank])
                else:
                    parts = [part for part in ours if rank in part.contributors()]
                    called = self._ranks.called(other)
                    handed[rank] = receive(pipe, fs, attempt, parts, rank, called, block_nbytes)
            except BaseException as error:
                self._break(other)
                if isinstance(error, RankError):
                    self._ranks.raise_if_failed(save)  # the other, most likely, which has said why
                raise
        return handed

    def _break(self, other: int) -> None:
        """What is in the pipe is nobody's: the next save needs another."""
        _, pipe = self._made.pop(other, (0, None))
        if pipe is not None:
            self._broken_pipes.append(pipe)
        self._broken[other] = self._broken.get(other, 0) + 1

    def hang_up(self) -> None:
        """Leave what has failed, once the reason is where the other can read it."""
        for pipe in self._broken_pipes:
            pipe.close()
        self._broken_pipes.clear()

    def close(self) -> None:
        """Hang up everywhere."""
        self.hang_up()
        for _, pipe in self._made.values():
            pipe.close()
        self._made.clear()


@dataclass(frozen=True)
class Parcel:
    """What one rank sends of one file.

    Attributes:
        part: of the file.
        apart, path: the file of its own that holds it.
        crcs: CRC-32 of each piece.
    """

    part: SharedPart
    apart: Apart
    path: Path
    crcs: Sequence[int]


def send(pipe: Pipe, fs: Filesystem, parcels: Sequence[Parcel]) -> None:
    """Send what this rank has of the files that the other one closes.

    Raises:
        RankError: see `Pipe`.
        SaveError: what is read is not what was written. WriteError: the operating system refused.
    """
    said = [
        {
            "path": parcel.part.path,
            "digest": parcel.part.digest,
            "pieces": base64.b64encode(parcel.apart.pieces[:, :2].tobytes()).decode(),
        }
        for parcel in parcels
    ]
    _send_whole(pipe, json.dumps(said).encode())
    for parcel in parcels:
        crc, chunk, filled = 0, memoryview(bytearray(CHUNK_NBYTES)), 0
        for data in _pieces_of(fs, parcel):
            crc = zlib.crc32(data, crc)
            rest = memoryview(data)
            while rest:
                some = rest[: CHUNK_NBYTES - filled]
                chunk[filled : filled + len(some)] = some
                rest, filled = rest[len(some) :], filled + len(some)
                if filled == CHUNK_NBYTES:
                    pipe.send(chunk)
                    filled = 0
        if filled:
            pipe.send(chunk[:filled])
        pipe.send(crc.to_bytes(4, "little"))


def _pieces_of(fs: Filesystem, parcel: Parcel) -> Iterator[bytes]:
    pieces = parcel.apart.pieces.tolist()
    ranges = [(own, nbytes) for _, nbytes, own in pieces]
    at, crc, left = 0, 0, ranges[0][1] if ranges else 0
    for data in fs.read_ranges(parcel.path, ranges, CHUNK_NBYTES):
        crc, left = zlib.crc32(data, crc), left - len(data)
        if not left:
            if crc != parcel.crcs[at]:
                raise SaveError(f"{parcel.path}: not what was written there: does the disk lose writes?")
            at, crc = at + 1, 0
            left = ranges[at][1] if at < len(ranges) else 0
        yield data


def receive(
    pipe: Pipe,
    fs: Filesystem,
    attempt: Attempt,
    parts: Sequence[SharedPart],
    rank: int,
    called: str,
    block_nbytes: int,
) -> dict[str, Handed]:
    """Take what a rank sends of the files that this one closes to their places; as if it had written it here.

    Args:
        rank: within its part; `called` in messages.
        block_nbytes: of the manifest.

    Raises:
        RankError: see `Pipe`; or it sends something else. WriteError: the operating system refused.
    """
    said = {one["path"]: one for one in json.loads(bytes(_receive_whole(pipe)))}
    known = {part.path: part for part in parts}
    if list(said) != list(known):
        raise RankError(f"{called} sends {', '.join(said)}, not {', '.join(known)}")
    return {
        path: _receive_one(pipe, fs, attempt, known[path], rank, one, called, block_nbytes)
        for path, one in said.items()
    }


def _receive_one(
    pipe: Pipe,
    fs: Filesystem,
    attempt: Attempt,
    part: SharedPart,
    rank: int,
    said: Mapping[str, str],
    called: str,
    block_nbytes: int,
) -> Handed:
    assert part.spans is not None
    assert part.image is not None
    own = part.spans[part.spans[:, 2] == rank]
    pieces = np.frombuffer(base64.b64decode(said["pieces"]), np.int64).reshape(-1, 2)
    stream = _Stream(pipe, pieces, called)
    runs: list[Run] = []
    edges = bytearray()

    def writes() -> Iterator[tuple[int, bytearray]]:
        for begin, end in own[:, :2].tolist():
            head, tail = slices.inside_of(begin, end)
            edges.extend(stream.pull(begin, head))
            while head < tail:
                stop = min(tail, (head // block_nbytes + 1) * block_nbytes)
                data = stream.pull(head, stop)
                runs.append(Run(head, stop - head, zlib.crc32(data)))
                yield head, data
                head = stop
            edges.extend(stream.pull(tail, end))
        stream.end()

    # Not synced yet: that may take longer than the sender waits for us, and closing the file does it once.
    fs.write_into(attempt.files / part.path, writes(), part.image.nbytes, sync=False)
    return Handed(said["digest"], tuple(runs), None, bytes(edges))


class _Stream:
    """The bytes of a rank's slices, in the order of the file; what no piece has is zeros."""

    def __init__(self, pipe: Pipe, pieces: Int64Array, called: str) -> None:
        self._pipe, self._called = pipe, called
        self._pieces = deque((begin, begin + nbytes) for begin, nbytes in pieces.tolist())
        self._left = sum(end - begin for begin, end in self._pieces)  # not received yet
        self._buffer = memoryview(b"")
        self._crc = 0

    def pull(self, begin: int, end: int) -> bytearray:
        """What belongs at [begin, end) of the file; to be asked for in order."""
        found, at = bytearray(end - begin), begin
        with memoryview(found) as view:
            while self._pieces and self._pieces[0][0] < end:
                first, last = self._pieces.popleft()
                at = max(at, first)
                stop = min(last, end)
                self._take(view[at - begin : stop - begin])
                at = stop
                if stop < last:
                    self._pieces.appendleft((stop, last))
        return found

    def _take(self, into: memoryview) -> None:
        while into:
            if not self._buffer:
                if not self._left:
                    raise RankError(f"{self._called} sends less than it has")
                self._buffer = self._pipe.receive(min(self._left, CHUNK_NBYTES))
                self._left -= len(self._buffer)
                self._crc = zlib.crc32(self._buffer, self._crc)
            some = self._buffer[: len(into)]
            into[: len(some)] = some
            into, self._buffer = into[len(some) :], self._buffer[len(some) :]

    def end(self) -> None:
        """All was pulled; and it is what was sent."""
        if self._left or self._buffer or self._pieces:
            raise RankError(f"{self._called} sends more than it has")
        if int.from_bytes(self._pipe.receive(4), "little") != self._crc:
            raise RankError(f"what {self._called} sent did not arrive as it was")


def _send_whole(pipe: Pipe, data: bytes) -> None:
    pipe.send(len(data).to_bytes(8, "little"))
    for at in range(0, len(data), CHUNK_NBYTES):
        pipe.send(data[at : at + CHUNK_NBYTES])


def _receive_whole(pipe: Pipe) -> bytearray:
    left = int.from_bytes(pipe.receive(8), "little")
    found = bytearray()
    while left:
        some = pipe.receive(min(left, CHUNK_NBYTES))
        found += some
        left -= len(some)
    return found
