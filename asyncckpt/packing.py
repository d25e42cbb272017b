"""Tiny tensors of a device, gathered into one buffer there, so that few copies bring them to the host.

A copy from a device costs about a microsecond, however small it is; thousands of tiny tensors keep the link
busy with that alone. Where they follow each other in a file, a kernel gathers them into a buffer in the shape
of the file: as far apart as there, with room for the literals between them. The engine then copies each such
run at once (see `Source` in csrc/engine.h), and puts the literals where the gaps were.

    file     | head | t0 | tail, head | t1 | tail, head | t2 | ...  | a large tensor | ...
    buffer          | t0 |            | t1 |            | t2 | ...

Guarantees:
- Files are the same bytes, packed or not; what must be fenced, and what the guard sees, is the same too.
- Nothing here fails a save. Where packing is refused, it goes unpacked.
- A buffer takes at most 64 MiB of each device: it is training's memory.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from . import kernels
from .devices import HOST
from .formats.image import LITERAL
from .plan import NO_SLAB, Planned, WritePlan
from .trial import Sample, Trial

_log = logging.getLogger(__name__)

# Arbitrary, but for their order of magnitude: a larger tensor keeps the link busy for longer than a copy
# costs, a gap that is wider costs more on the link than it saves, and fewer tensors are not worth a launch.
TINY_NBYTES_MAX = 32 << 10
GAP_NBYTES_MAX = 8 << 10
TENSORS_MIN = 256  # of a device
BUFFER_NBYTES_MAX = 64 << 20  # of a device

_ALIGNMENT = 64  # of what lies on such a boundary in the file

_Int64 = npt.NDArray[np.int64]


# ---------------------------------------------------------------------------- layout


@dataclass(frozen=True, eq=False)
class Slab:
    """What is packed on one device.

    Attributes:
        sources: int64, their numbers in the plan, in file order.
        places: uint64, where in the buffer each begins.
        sizes: uint64, bytes of each.
        nbytes: of the buffer.
    """

    device: int
    sources: _Int64
    places: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.uint64]
    nbytes: int


def lay_out(
    plan: WritePlan, sizes: npt.NDArray[np.uint64], devices: npt.NDArray[np.int32]
) -> tuple[Slab, ...]:
    """The slabs of a plan whose sources have these sizes, on these devices; devices without one are absent.

    Packed are sources that are tiny and whole in one extent, in runs of at least two with only literals
    between them.
    """
    extents = [image.extents[image.extents[:, 2] != LITERAL] for image in plan.images]
    file = np.repeat(np.arange(len(extents)), [len(rows) for rows in extents])
    offset, nbytes, source = (np.concatenate([rows[:, column] for rows in extents]) for column in range(3))
    device = devices[source]
    is_once = np.bincount(source, minlength=len(sizes))[source] == 1
    is_whole = nbytes.astype(np.uint64) == sizes[source]
    fits = (device != HOST) & (nbytes <= TINY_NBYTES_MAX) & is_once & is_whole
    goes_on = fits[1:] & fits[:-1] & (file[1:] == file[:-1]) & (device[1:] == device[:-1])
    goes_on &= offset[1:] - (offset + nbytes)[:-1] <= GAP_NBYTES_MAX
    run = np.cumsum(np.concatenate([[True], ~goes_on])[: len(source)])
    fits &= np.bincount(run)[run] > 1
    slabs = []
    for ordinal in sorted({*device[fits].tolist()}):
        mine = np.flatnonzero(fits & (device == ordinal))
        places = _places(offset[mine], nbytes[mine], run[mine])
        mine = mine[: int(np.searchsorted(places + nbytes[mine], BUFFER_NBYTES_MAX, side="right"))]
        if len(mine) >= TENSORS_MIN:
            last = len(mine) - 1
            slabs.append(
                Slab(
                    device=ordinal,
                    sources=source[mine],
                    places=places[: last + 1].astype(np.uint64),
                    sizes=nbytes[mine].astype(np.uint64),
                    nbytes=int(places[last] + nbytes[mine[last]]),
                )
            )
    return tuple(slabs)


def _places(offset: _Int64, nbytes: _Int64, run: _Int64) -> _Int64:
    """Where in the buffer: within a run as in the file, and as in the file modulo the alignment.

    Two runs at 100..300 and 9000..9050 of the file: the first begins at 36 (100 modulo 64) and ends at 236,
    the second begins at 296 (256, and 9000 modulo 64).
    """
    _, first, member_of = np.unique(run, return_index=True, return_inverse=True)
    lead = offset[first] % _ALIGNMENT
    last = np.append(first[1:], len(run)) - 1
    span = lead + offset[last] + nbytes[last] - offset[first]
    room = -(-span // _ALIGNMENT) * _ALIGNMENT
    base = np.cumsum(room) - room + lead - offset[first]
    places: _Int64 = offset + base[member_of]
    return places


# ---------------------------------------------------------------------------- saves


@dataclass(frozen=True)
class Packing:
    """What became of one save.

    Attributes:
        planned: what to copy.
        tensors: how many are packed.
        seconds: that it took.
        sample: to be told what the save cost, should it succeed; None where nothing is tried.
    """

    planned: Planned
    tensors: int = 0
    seconds: float = 0.0
    sample: Sample | None = None


class Packer:
    """Packs saves, or leaves them as they are. Belongs to the thread that trains.

    Args:
        choice: "auto": where it is faster, by a `Trial` for each plan; "always": where it can be done;
            "never".
    """

    def __init__(self, choice: str) -> None:
        self._choice = choice
        self._slabs: tuple[Slab, ...] = ()
        self._laid_out: tuple[WritePlan, Any, Any] | None = None  # plan, sizes and devices of `_slabs`
        self._trial = Trial()
        self._gatherer: kernels.Gatherer | None = None
        self._given_up = choice == "never"
        self._said_full = False

    def pack(self, planned: Planned) -> Packing:
        """Enqueue the kernels that pack a save's tiny tensors, on this thread's current streams."""
        if self._given_up or not (planned.devices != HOST).any():
            return Packing(planned)
        self._follow(planned)
        if not self._slabs:
            return Packing(planned)
        sample = self._trial.begin() if self._choice == "auto" else Sample(True, None)
        if not sample.is_new:
            return Packing(planned, sample=sample)
        began_s = time.perf_counter()
        try:
            gatherer = self._find_gatherer()
            if gatherer is None:
                return Packing(planned)
            packed = _packed(planned, self._slabs, gatherer)
        except Exception as error:  # noqa: BLE001 -- torch's, CuPy's, a compiler's: none is the save's
            self._refused(error)
            return Packing(planned)
        tensors = sum(len(slab.sources) for slab in self._slabs)
        return Packing(packed, tensors, time.perf_counter() - began_s, sample)

    def _follow(self, planned: Planned) -> None:
        """Lay out anew, and try again, where this is not the plan of the save before."""
        if self._laid_out is not None:
            plan, sizes, devices = self._laid_out
            same = np.array_equal(sizes, planned.sizes) and np.array_equal(devices, planned.devices)
            if plan is planned.plan and same:
                return
        self._laid_out = planned.plan, planned.sizes, planned.devices
        self._slabs = lay_out(*self._laid_out)
        self._trial = Trial()

    def _find_gatherer(self) -> kernels.Gatherer | None:
        if self._gatherer is None:
            self._gatherer = kernels.gatherer()
        if self._gatherer is None:
            self._given_up = True
            if self._choice == "always":
                _log.warning("pack='always', but CuPy is not installed: tiny tensors are copied one by one")
        return self._gatherer

    def _refused(self, error: Exception) -> None:
        if not kernels.is_out_of_memory(error):
            self._given_up = True
            _log.warning("tiny tensors are copied one by one from now on, packing them failed: %s", error)
            return
        # To look for memory once more, torch gives its whole cache back, and the device stands still: not
        # at every other save for the sake of a trial.
        self._trial.give_up()
        if not self._said_full:
            self._said_full = True
            _log.warning("tiny tensors are copied one by one, there is no memory to pack them in: %s", error)


def _packed(planned: Planned, slabs: tuple[Slab, ...], gatherer: kernels.Gatherer) -> Planned:
    addresses = planned.addresses.copy()
    slab_of = np.full(len(addresses), NO_SLAB, dtype=np.int32)
    buffers: list[Any] = []
    for number, slab in enumerate(slabs):
        table = np.stack([planned.addresses[slab.sources], slab.places, slab.sizes], axis=1)
        buffer = gatherer.gather(slab.device, table, slab.nbytes)
        buffers.append(buffer)
        addresses[slab.sources] = np.uint64(buffer.data_ptr()) + slab.places
        slab_of[slab.sources] = number
    return replace(planned, addresses=addresses, slabs=slab_of, held=(*planned.held, buffers))
