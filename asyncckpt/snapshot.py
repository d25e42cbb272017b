"""From a plan to bytes on disk, while training goes on: the engine's jobs and the torn-state guard.

Guarantees:
- A snapshot's files hold the values of the moment it was taken, or it fails with the name of a tensor
  that changed. What version counters cannot see is listed at `Guard`.
- Memory that the engine reads is held until it was read. Memory that goes away all the same (a storage
  resized to nothing) fails the snapshot; it does not crash the process.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import _native, devices
from .closing import Handed
from .errors import DeviceError, OptionError, SaveError, TornStateError, WriteError
from .formats.image import NO_RECORD
from .formats.manifest import FileEntry
from .formats.slices import Run
from .options import FOREVER_S
from .plan import Planned, SharedPart, WritePlan
from .shards import is_sharded, local_of
from .survey import PLAIN, NotSurveyedError, Survey, survey
from .tree import Steady

_log = logging.getLogger(__name__)

CHUNK_NBYTES = 4 << 20  # also the block of a CRC in the manifest; fewer would slow the disk down
_CHUNK_NBYTES_MIN = 4096
_CHUNKS_MIN = 8  # below this, copying and writing cannot overlap: chunks get smaller instead
_RESERVE_NBYTES_MAX = 16 << 20  # for what save() copies itself

# ---------------------------------------------------------------------------- guard


class Guard:
    """Tells whether a live tensor changed since the guard was made.

    It compares version counters, addresses and sizes. These do not see writes through `.data`, through
    numpy or other aliases without a counter, by custom kernels, by fused optimizers, or by `torch._foreach_*`
    on DTensors; the step fence keeps the last two from mattering to a model and its optimizer. Of other
    DTensors on the host, checksums are compared; `guard="full"` does so of everything.

    Must be asked on the thread that trains: a counter moves after the bytes do, so another thread can
    see new bytes under an old version.
    """

    def __init__(self, live: list[tuple[str, torch.Tensor]], steady: Steady | None = None) -> None:
        plain = [named for named in live if type(named[1]) in PLAIN]
        self._watches: list[_AtOnce | _OneByOne] = []
        if steady is not None:
            self._watches.append(_AtOnce(steady.structure.names, steady.tensors, steady.survey))
        try:
            tensors = [tensor for _, tensor in plain]
            self._watches.append(
                _AtOnce([name for name, _ in plain], tensors, survey(tensors, storages=True))
            )
            self._watches.append(_OneByOne([named for named in live if type(named[1]) not in PLAIN]))
        except NotSurveyedError:
            self._watches.append(_OneByOne(live))

    def changed(self) -> str | None:
        """The first tensor that changed and how; None if none did."""
        return next(filter(None, (watch.changed() for watch in self._watches)), None)

    def storages(self) -> frozenset[int]:
        """Addresses of the storages that are at risk."""
        return frozenset().union(*(watch.storages() for watch in self._watches))

    def release(self) -> None:
        """Let go of the tensors."""
        for watch in self._watches:
            watch.release()


class _AtOnce:
    """Watches plain tensors, thousands in a millisecond, and holds their storages."""

    def __init__(self, names: Sequence[str], tensors: list[torch.Tensor], now: Survey) -> None:
        self._watched = names, tensors, now.addresses, now.versions, now.storages

    def changed(self) -> str | None:
        names, tensors, addresses, versions, storages = self._watched
        try:
            addresses_now, versions_now, *_ = survey(tensors)
        except NotSurveyedError:  # one was pointed to memory of another kind
            versions_now = np.array([_version(tensor) for tensor in tensors], dtype=np.int64)
            addresses_now = np.zeros_like(addresses)
        for index in np.flatnonzero(versions_now != versions).tolist():
            return f"{names[index]} was written to"
        for index in np.flatnonzero(addresses_now != addresses).tolist():
            begin = storages[index].data_ptr()
            if not begin <= int(addresses[index]) <= begin + storages[index].nbytes():
                return f"the storage of {names[index]} was resized or replaced"
        return None

    def storages(self) -> frozenset[int]:
        *_, storages = self._watched
        return frozenset(address for storage in storages if (address := storage.data_ptr()))

    def release(self) -> None:
        self._watched = [], [], np.empty(0, np.uint64), np.empty(0, np.int64), []


class _OneByOne:
    """Watches tensors of any type."""

    def __init__(self, live: list[tuple[str, torch.Tensor]]) -> None:
        # Aliases share the counter; they keep the memory when `tensor.data` is pointed elsewhere.
        self._watched = [
            (name, alias := tensor.detach(), _version(alias), *_memory(alias)) for name, tensor in live
        ]

    def changed(self) -> str | None:
        for name, tensor, version, *memory in self._watched:
            if _version(tensor) != version:
                return f"{name} was written to"
            if [*_memory(tensor)] != memory:
                return f"the storage of {name} was resized or replaced"
        return None

    def storages(self) -> frozenset[int]:
        return frozenset(address for _, _, _, _, address, _ in self._watched if address)

    def release(self) -> None:
        self._watched = []


def _version(tensor: torch.Tensor) -> int:
    if tensor.is_inference():
        return 0
    version: int = tensor._version  # noqa: SLF001 -- there is no public name for it
    local = local_of(tensor)
    if local is not tensor:  # of a sharded tensor, either handle may be written to; both only count up
        version += local._version  # noqa: SLF001
    return version


def _memory(tensor: torch.Tensor) -> tuple[int, int, int]:
    local = local_of(tensor)
    storage = local.untyped_storage()
    return local.data_ptr(), storage.data_ptr(), storage.nbytes()


def _unseen(live: list[tuple[str, torch.Tensor]]) -> frozenset[str]:
    """Names of tensors that no counter tells of and no fence protects: sharded ones, which `torch._foreach_*`
    changes without counting, where no optimizer's step is waited for before they change."""
    fenced = ("model.", "optimizer.")
    return frozenset(name for name, tensor in live if is_sharded(tensor) and not name.startswith(fenced))


# ---------------------------------------------------------------------------- engine

crc32_combine = _native.crc32_combine


class Snapshot:
    """One save in the engine."""

    def __init__(
        self,
        job: _native.Job,
        planned: Planned,
        guard: Guard,
        checksums: dict[int, int] | None,
        engine: _native.Engine,
    ) -> None:
        self._job = job
        self._devices = planned.used_devices()
        self._engine = engine
        self._plan: WritePlan = planned.plan
        self.shared_crcs = planned.shared_crcs
        self._held: Any = planned
        self._guard = guard
        self._checksums = checksums
        self._letting_go = threading.RLock()  # not Lock: what dies with a tensor may run anything

    @property
    def plan(self) -> WritePlan:
        """What is written."""
        return self._plan

    def changed(self) -> str | None:
        """See `Guard.changed`."""
        return self._guard.changed()

    def storages(self) -> frozenset[int]:
        """Addresses of the storages that training must not change yet."""
        return self._guard.storages()

    def wait_enqueued(self, timeout_s: float) -> bool:
        """Wait until all host memory was read and all copies from devices are on their way; False when the
        time is up."""
        return self._job.wait_enqueued(timeout_s)

    def hold_back(self) -> None:
        """Make what this thread enqueues from now on wait for the copies, on the devices; once enqueued.

        Raises:
            DeviceError: a device refused.
        """
        try:
            for device, stream in devices.current_streams(self._devices):
                self._job.hold_back(device, stream)
        except _native.DeviceError as failure:
            raise DeviceError(str(failure)) from failure

    def wait_released(self, timeout_s: float) -> bool:
        """Wait until the engine will not read training's memory again; False when the time is up."""
        return self._job.wait_released(timeout_s)

    def let_go(self) -> None:
        """Stop holding training's memory, once released and decided. On return nothing here holds it, also
        if another thread was at it first: who fences frees memory next, and counts on getting it back."""
        with self._letting_go:
            self._guard.release()
            self._held = None

    def give_up(self, timeout_s: float) -> None:
        """Abort, and give the engine so long to let go of training's memory. If it cannot, because a device
        hangs, the memory is held for as long as that lasts, whoever drops the snapshot."""
        _given_up[id(self)] = self
        self.abort()
        self.wait_released(timeout_s)
        _drop_released()

    @property
    def released(self) -> bool:
        """Whether the engine will not read training's memory again."""
        return self._job.released

    def abort(self) -> None:
        """Give it up; `wait_written` raises."""
        self._job.abort()

    def wait_written(self) -> None:
        """Wait until all files are synced.

        Raises:
            WriteError: the operating system refused.
            TornStateError: memory went away, or (`guard="full"`) bytes are not those of save().
        """
        self._job.wait_finished()
        error = self._job.error
        if error is not None:
            raise self._translate(*error)
        if self._checksums is not None:
            self._compare(self._checksums)

    def _translate(
        self, operation: str, path: str, offset: int, source: int, number: int, reason: str
    ) -> SaveError:
        if operation == "abort":
            return SaveError("the save was given up")
        if reason:
            return DeviceError(f"{operation} failed: {path}, offset {offset}: {reason}")
        if operation == "copy" and number == errno.EFAULT:
            return TornStateError(
                f"the memory of {self._plan.names[source]} went away before it was copied; "
                f"call fence() before storages are freed or resized"
            )
        hint = "free space, or lower keep_last" if number in (errno.ENOSPC, errno.EDQUOT) else ""
        return WriteError(operation, path, number, offset if offset >= 0 else None, hint)

    def _compare(self, checksums: dict[int, int]) -> None:
        for index, image in enumerate(self._plan.images):
            staged = self._job.record_crcs(index)
            for _, _, source, _, record in image.extents.tolist():
                if record != NO_RECORD and checksums.get(source, staged[record]) != staged[record]:
                    raise TornStateError(
                        f"{self._plan.names[source]} changed before it was copied (its checksum differs)"
                    )

    def files(self) -> tuple[FileEntry, ...]:
        """What was written, for the manifest; without what belongs to files that several ranks write."""
        apart = {index for part in self._plan.shared for index in (part.inside, part.edges)}
        apart |= {p.apart.number for p in self._plan.shared if p.apart is not None and not p.apart.is_kept}
        return tuple(self._entry(index) for index in range(len(self._plan.images)) if index not in apart)

    def handed(self, part: SharedPart) -> Handed:
        """What was written of a file that several ranks write."""
        return Handed(
            part.digest,
            () if part.inside is None else tuple(Run(*run) for run in self._job.runs(part.inside)),
            None if part.edges is None else self._entry(part.edges),
        )

    def record_crcs(self, index: int) -> list[int]:
        """CRC-32 of each record of an image."""
        return list(self._job.record_crcs(index))

    def _entry(self, index: int) -> FileEntry:
        image = self._plan.images[index]
        return FileEntry(
            image.path, image.nbytes, self._engine.chunk_nbytes, tuple(self._job.block_crcs(index))
        )

    @property
    def prefault_s(self) -> float | None:
        """How long it took to make the arena present; None until it is."""
        seconds = self._engine.prefault_s
        return seconds if seconds >= 0 else None

    def times_s(self) -> tuple[float, float, float, float, float]:
        """Seconds after submission: enqueued, released, written, finished; and how long copying starved."""
        return self._job.times_s

    @property
    def direct(self) -> bool:
        """Whether all files were written with O_DIRECT."""
        return self._job.direct

    @property
    def pin_failure(self) -> str:
        """Why copies from devices are slow: part of the arena is not pinned. Empty if all is well."""
        return self._engine.pin_failure

    @property
    def batch_failure(self) -> str:
        """Why copies of small tensors are slow: the driver refused them in batches. Empty if all is well."""
        return self._engine.batch_failure

    @property
    def checked_copies(self) -> bool:
        """Whether memory that goes away fails the save; if not, it may end the process."""
        return _native.copy_is_checked()


_given_up: dict[int, Snapshot] = {}  # of all stagers, by id; what is being read must outlive all of them


def _drop_released() -> None:
    for key, snapshot in list(_given_up.items()):
        if snapshot.released:
            snapshot.let_go()
            _given_up.pop(key, None)


class Stager:
    """The engine and its memory: turns plans into snapshots.

    Args:
        host_memory_bytes: all that staging may take: the engine's arena, and a reserve for what is
            copied inside save() (an eighth, at most 16 MiB).
        writers: threads that write to disk.
        yielding: whether these stand back behind all else that wants the CPU or the disk.
        copiers: threads that copy into the arena; None for one per four cores.
        full_guard: compare checksums taken inside save() with those of the bytes written.
    """

    def __init__(
        self,
        host_memory_bytes: int,
        writers: int = 4,
        copiers: int | None = None,
        full_guard: bool = False,
        yielding: bool = False,
    ) -> None:
        self.reserve_nbytes = min(_RESERVE_NBYTES_MAX, host_memory_bytes // 8)
        arena_nbytes = host_memory_bytes - self.reserve_nbytes
        chunk_nbytes = CHUNK_NBYTES
        while chunk_nbytes > _CHUNK_NBYTES_MIN and chunk_nbytes * _CHUNKS_MIN > arena_nbytes:
            chunk_nbytes //= 2
        try:
            self._engine = _native.Engine(
                arena_nbytes=arena_nbytes,
                chunk_nbytes=chunk_nbytes,
                copiers=copiers or max(1, (os.cpu_count() or 1) // 4),
                writers=writers,
                direct=True,
                prefault=True,
                driver=devices.seam.driver,
                yielding=yielding,
            )
        except MemoryError as error:
            raise OptionError(f"host_memory: {host_memory_bytes} bytes cannot be had") from error
        except RuntimeError as error:
            raise OptionError(f"writers: {writers} threads cannot be had: {error}") from error
        self._full_guard = full_guard
        self._compiled: tuple[WritePlan, list[_native.Image]] | None = None

    def use_devices(self, ordinals: Iterable[int]) -> None:
        """Get ready for memory on these devices: pins the arena, in the background.

        Raises:
            DeviceError: there is no driver, or it refuses.
        """
        try:
            for ordinal in ordinals:
                self._engine.use_device(ordinal)
        except _native.DeviceError as failure:
            raise DeviceError(str(failure)) from failure

    def snapshot(
        self,
        planned: Planned,
        live: list[tuple[str, torch.Tensor]],
        directory: Path,
        steady: Steady | None = None,
    ) -> Snapshot:
        """Begin to write `planned` into `directory`, which holds none of its files yet.

        Args:
            live, steady: what the guard watches. Of steady tensors, it holds the memory.

        Memory on devices is copied as it is once this thread's current streams have done what they have
        now; nothing waits for them here, but for `guard="full"`.

        Raises:
            DeviceError: a device refused.
        """
        _drop_released()
        guard = Guard(live, steady)
        images = self._images(planned.plan)
        streams = devices.current_streams(planned.used_devices())
        try:
            compared = self._compared(planned, live)
            checksums = self._checksums(planned, dict(streams), compared) if compared else None
            job = self._engine.submit(
                str(directory),
                images,
                planned.addresses,
                planned.sizes,
                planned.devices,
                streams,
                planned.slabs,
            )
        except _native.DeviceError as failure:
            raise DeviceError(str(failure)) from failure
        return Snapshot(job, planned, guard, checksums, self._engine)

    def _images(self, plan: WritePlan) -> list[_native.Image]:
        if self._compiled is None or self._compiled[0] is not plan:
            images = [
                _native.make_image(
                    i.path, i.nbytes, i.literals, i.extents, i.fixups, i.records, partial=i.partial
                )
                for i in plan.images
            ]
            self._compiled = (plan, images)
        return self._compiled[1]

    def _compared(self, planned: Planned, live: list[tuple[str, torch.Tensor]]) -> Sequence[int]:
        """The sources whose bytes are compared, where counters are not enough."""
        tensors = range(len(planned.plan.slots), len(planned.sizes))
        if self._full_guard:
            return tensors
        unseen, names = _unseen(live), planned.plan.names
        if not unseen:
            return ()
        return [s for s in tensors if names[s] in unseen and planned.devices[s] == devices.HOST]

    @staticmethod
    def _checksums(planned: Planned, streams: dict[int, int], compared: Sequence[int]) -> dict[int, int]:
        found = {}
        for source in compared:
            device = int(planned.devices[source])
            memory = int(planned.addresses[source]), int(planned.sizes[source])
            if device == devices.HOST:
                found[source] = _native.crc32(*memory)
            else:
                driver = devices.seam.driver
                found[source] = _native.device_crc32(driver, device, streams[device], *memory)
        return found

    def close(self, timeout_s: float = FOREVER_S) -> None:
        """Stop the engine; what is in flight fails. If a device hangs, the engine's memory is left to it."""
        if not self._engine.close(timeout_s):
            _log.warning(
                "host_memory stays taken: a device is still at it, or the disk is, after %g s", timeout_s
            )
