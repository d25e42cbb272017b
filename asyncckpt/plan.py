"""Tree -> write plan: which files a step has and where every byte of them comes from.

A plan depends on names, shapes, dtypes, strides and on which tensors share memory; never on values.
Python leaves are pickled anew for every save and vary in length, so each has a slot with room to grow;
what it does not fill is padded with zeros that unpicklers do not read. As long as the signature is the
same and every pickle fits its slot, the plan of the save before serves again, down to the `.metadata`.

Pure: no I/O, no threads, no tensor bytes. A planner belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from . import devices
from .errors import LeafError
from .formats.image import FileImage, Int64Array
from .formats.pickles import BadPickleError, Pickled, StorageRef, find_inert, unpickle
from .formats.refs import span_elements
from .shards import local_of
from .tree import Leaf, StateTree, Steady, Structure, tensors_in

_SPARE_NBYTES_MAX = 1 << 20  # of slots that what was there once has left behind; arbitrary
NO_SLAB = -1  # in place of a slab's number; the same as kNoSlab in csrc/engine.h


@dataclass(frozen=True, eq=False)
class Apart:
    """What a rank has of a file that is closed on another node: in a file of its own.

    Attributes:
        number: of that file's image in the plan.
        pieces: int64 [n, 3]: first byte in the shared file, number of bytes, first byte in its own; in the
            order of the shared file.
        records: of each piece, its number in the image.
        is_kept: whether the file stays once its slices are where they belong.
    """

    number: int
    pieces: Int64Array
    records: tuple[int, ...]
    is_kept: bool = True


@dataclass(frozen=True, eq=False)
class SharedPart:
    """A rank's part of a file that several ranks write; see `formats.slices`.

    Attributes:
        path: relative to the step directory.
        closer: the rank that writes what is nobody's own.
        digest: of all that does not depend on the rank; must be the same on all.
        inside, edges: the images of what this rank writes, by their numbers in the plan; None for nothing.
        image, spans: of the whole file, and who has what of it; on the closer alone.
        apart: where what this rank has lies instead; None if the closer sees its disk.
    """

    path: str
    closer: int
    digest: str
    inside: int | None
    edges: int | None
    image: FileImage | None = None
    spans: Int64Array | None = None
    apart: Apart | None = None

    def after(self, images: int) -> SharedPart:
        """The same behind so many images."""
        inside, edges = (None if n is None else n + images for n in (self.inside, self.edges))
        apart = self.apart and replace(self.apart, number=self.apart.number + images)
        return replace(self, inside=inside, edges=edges, apart=apart)

    def contributors(self) -> list[int]:
        """On the closer: the ranks that have any of it."""
        return [] if self.spans is None else sorted({*self.spans[:, 2].tolist()})


@dataclass(frozen=True, eq=False)
class WritePlan:
    """The files of a step.

    Attributes:
        images: one per file; their sources are numbered over all files.
        slots: capacity in bytes of each pickle; the pickles are the first sources.
        names: what each source is called in messages.
        untrusted: (leaf, class) of python leaves that load only with trusted=True.
        signature: plans with equal signatures are equal.
        tree, layout: what the leaves are and where the items lie, for the rank that describes those of all
            ranks; empty if this plan does.
        groups: (ranks that hold the same tensors, digest of what they are), to be compared among those ranks.
        shared: parts of files that several ranks write.
    """

    images: tuple[FileImage, ...]
    slots: tuple[int, ...]
    names: tuple[str, ...]
    untrusted: tuple[tuple[str, str], ...]
    signature: object
    tree: bytes = b""
    layout: bytes = b""
    groups: tuple[tuple[str, str], ...] = ()
    shared: tuple[SharedPart, ...] = ()

    def directories(self) -> set[str]:
        """Directories of the files, below the step's own."""
        closed = [part.path for part in self.shared if part.image is not None]
        return {path.rpartition("/")[0] for path in (*closed, *(i.path for i in self.images))} - {""}

    def takes(self, pickles: Sequence[Pickled]) -> bool:
        """Whether each pickle fits its slot, and the slots are not far larger than they would be made now."""
        if not all(len(one.data) <= slot for one, slot in zip(pickles, self.slots, strict=True)):
            return False
        needed_nbytes = sum(slot_nbytes(len(one.data)) for one in pickles)
        return self.pickled_nbytes <= 2 * needed_nbytes + _SPARE_NBYTES_MAX

    @property
    def pickled_nbytes(self) -> int:
        """Bytes of all pickles, padded."""
        return sum(self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes that this rank writes."""
        return sum(image.own_nbytes for image in self.images)


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan and the sources of one save.

    Attributes:
        addresses, sizes: uint64, of every source; where it was packed, of the copy.
        devices: int32, the device it is on, or devices.HOST.
        storages: (source, storage) of what was met while pickling.
        tensors: (name, tensor) of the same.
        held: what keeps that memory alive; to be kept until the save has been released.
        replanned: whether the plan was made for this save.
        shared_crcs: CRC-32 of each python leaf that one rank saves for all.
        slabs: int32, the slab that each source was packed into, or NO_SLAB; None where none was.
    """

    plan: WritePlan
    addresses: np.ndarray[Any, np.dtype[np.uint64]]
    sizes: np.ndarray[Any, np.dtype[np.uint64]]
    devices: np.ndarray[Any, np.dtype[np.int32]]
    storages: tuple[tuple[int, torch.UntypedStorage], ...]
    tensors: tuple[tuple[str, torch.Tensor], ...]
    held: tuple[Any, ...]
    replanned: bool
    shared_crcs: tuple[int, ...] = ()
    slabs: np.ndarray[Any, np.dtype[np.int32]] | None = None

    def used_devices(self) -> list[int]:
        """Ordinals of the devices that any source is on."""
        elsewhere = self.devices[self.devices != devices.HOST]
        return sorted({*elsewhere.tolist()})


class Planner(Protocol):
    """Plans saves of one layout; remembers the last plan.

    Attributes:
        plans_made: how often one had to be made.
        remembers: whether `plan_again` may ever serve.
    """

    plans_made: int
    remembers: bool

    def plan(self, tree: Mapping[str, Any]) -> Planned:
        """Raises LeafError naming a leaf that cannot be saved."""

    def knows(self, structure: Structure) -> bool:
        """Whether the last plan was of a tree with these steady tensors, so that `plan_again` may serve."""

    def plan_again(self, tree: StateTree) -> Planned | None:
        """The last plan for a tree without the steady tensors; None if it is another plan that is needed."""


def span_nbytes(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of the last that its strides reach."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    return span_elements(tensor.shape, tensor.stride()) * tensor.element_size()


class PlanCache:
    """The last plan, and whether it serves again."""

    remembers = False

    def __init__(self) -> None:
        self.plans_made = 0
        self._plan: WritePlan | None = None

    def knows(self, structure: Structure) -> bool:
        return False

    def plan_again(self, tree: StateTree) -> Planned | None:
        return None

    def _serve(self, signature: object, pickles: list[Pickled]) -> WritePlan | None:
        plan = self._plan
        if plan is not None and plan.signature == signature and plan.takes(pickles):
            return plan
        # What a planner keeps beside it is about to change, and whatever is raised meanwhile may leave it so.
        self._plan = None
        return None

    def _keep(self, plan: WritePlan) -> WritePlan:
        self.plans_made += 1
        self._plan = plan
        return plan


def slot_nbytes(pickle_nbytes: int) -> int:
    """Room for a pickle and what it may grow by."""
    # The pickled states of random generators vary by some per cent from save to save.
    return (pickle_nbytes + pickle_nbytes // 8 + 256 + 511) // 512 * 512


@dataclass(frozen=True, eq=False)
class Spans:
    """Runs of tensors' memory, in the order of a plan's sources.

    Attributes:
        addresses, sizes: uint64; devices: int32.
        held: what keeps that memory alive, unless somebody else does.
    """

    addresses: np.ndarray[Any, np.dtype[np.uint64]]
    sizes: np.ndarray[Any, np.dtype[np.uint64]]
    devices: np.ndarray[Any, np.dtype[np.int32]]
    held: Any

    @classmethod
    def of(cls, spans: Sequence[tuple[torch.Tensor, int, int]]) -> Spans:
        """Of tensors: each with the first byte of its memory, and a number of bytes."""
        return cls(
            np.array([tensor.data_ptr() + begin for tensor, begin, _ in spans], dtype=np.uint64),
            np.array([nbytes for _, _, nbytes in spans], dtype=np.uint64),
            np.array([devices.seam.device_of(tensor) for tensor, _, _ in spans], dtype=np.int32),
            [tensor for tensor, _, _ in spans],
        )


def planned_with(
    plan: WritePlan,
    named: list[tuple[str, Pickled]],
    spans: Spans,
    replanned: bool,
    shared_crcs: tuple[int, ...] = (),
) -> Planned:
    """Sources in the order of every plan: pickles, spans, then the storages met while pickling."""
    try:
        padded = np.zeros(plan.pickled_nbytes, np.uint8)  # all pickles, each in its slot
    except MemoryError:
        name, largest = max(named, key=lambda one: len(one[1].data))
        raise LeafError(
            f"no memory for the pickles of what is no tensor: {plan.pickled_nbytes} bytes; "
            f"the largest is {name} with {len(largest.data)}"
        ) from None
    view, at, begin = padded.data, padded.ctypes.data, 0
    pickles = []
    for (_, pickled), slot in zip(named, plan.slots, strict=True):
        assert len(pickled.data) <= slot, "else it would run into the next"
        view[begin : begin + len(pickled.data)] = pickled.data
        pickles.append(at + begin)
        begin += slot
    storages = [storage for _, pickled in named for storage in pickled.storages]
    first = len(named) + len(spans.sizes)

    def joined(pickled: Sequence[int], of_spans: Any, of_storages: list[int], kind: Any) -> Any:
        return np.concatenate([np.array(pickled, kind), of_spans, np.array(of_storages, kind)])

    return Planned(
        plan,
        joined(pickles, spans.addresses, [s.data_ptr() for s in storages], np.uint64),
        joined(plan.slots, spans.sizes, [s.nbytes() for s in storages], np.uint64),
        joined(
            [devices.HOST] * len(named),
            spans.devices,
            [devices.seam.device_of(storage) for storage in storages],
            np.int32,
        ),
        tuple(enumerate(storages, start=first)),
        tuple((name, tensor) for name, pickled in named for tensor in pickled.tensors),
        (padded, [(one.storages, one.tensors, one.elsewhere) for _, one in named], spans.held),
        replanned,
        shared_crcs,
    )


@dataclass(frozen=True, eq=False)
class SteadyBefore:
    """The steady tensors of a tree that a plan was made of.

    Attributes:
        structure: what they are.
        at: address of each.
        first: the first that is tied to it; itself, most of the time.
    """

    structure: Structure
    at: npt.NDArray[np.uint64]
    first: npt.NDArray[np.int64]

    def again(self, tree: StateTree) -> Steady | None:
        """Those of another tree, if they are the same but for values and addresses, and tied alike."""
        steady = tree.steady
        if steady is None or steady.structure is not self.structure:
            return None
        at = steady.survey.addresses
        return steady if np.array_equal(at, self.at) or self._are_tied_alike(at) else None

    def _are_tied_alike(self, at: npt.NDArray[np.uint64]) -> bool:
        if not np.array_equal(at[self.first], at):
            return False
        apart = at[np.unique(self.first)]
        apart = apart[apart != 0]  # empty ones, at no address, are tied to none
        return len(np.unique(apart)) == len(apart)


def moved(
    before: Spans,
    rows: npt.NDArray[np.int64],
    addresses: npt.NDArray[np.uint64],
    tensors: Sequence[torch.Tensor],
    of_row: npt.NDArray[np.int64],
) -> Spans:
    """Spans of which these rows are elsewhere now. What stayed where it was is not asked for its device.

    Args:
        tensors, of_row: what each of the rows is of.

    Returns:
        Spans that hold nothing.
    """
    now, where = before.addresses.copy(), before.devices.copy()
    for index in np.flatnonzero(addresses != before.addresses[rows]).tolist():
        where[rows[index]] = devices.seam.device_of(tensors[of_row[index]])
    now[rows] = addresses
    return Spans(now, before.sizes, where, None)


def number_storages(names: list[str], written: list[tuple[str, Pickled]]) -> list[list[tuple[int, int]]]:
    """(source, nbytes) of the storages met while pickling, which are the last sources; names them."""
    numbers = []
    for name, pickled in written:
        storages = []
        for position, storage in enumerate(pickled.storages):
            storages.append((len(names), storage.nbytes()))
            names.append(f"{name} (storage {position})")
        numbers.append(storages)
    return numbers


def inert_in(pickled: Pickled) -> list[tuple[str, str]]:
    """The first object in it that a load will not bring back by itself."""

    def storage(key: str, dtype: torch.dtype, location: str, nbytes: int) -> StorageRef:
        return StorageRef(0, nbytes, key, dtype, location)

    try:
        found = find_inert(unpickle(pickled.data, storage))
    except BadPickleError as error:
        return [("", str(error))]
    return [found] if found is not None else []


def refuse_unreachable(leaf: Leaf) -> None:
    """Raise LeafError for tensors whose bytes cannot be copied."""
    tensors = (leaf.value,) if isinstance(leaf.value, torch.Tensor) else tensors_in(leaf.value)
    for tensor in map(local_of, tensors):
        if tensor.layout != torch.strided:
            raise LeafError(f"{leaf.name}: sparse tensors ({tensor.layout}) cannot be saved; densify it")
        try:
            devices.seam.device_of(tensor)
        except ValueError as error:
            raise LeafError(f"{leaf.name}: {error}; only those of the host and of CUDA devices") from None


def refuse_unstorable(name: str, tensor: torch.Tensor) -> None:
    """Raise LeafError for tensors whose memory is not their value."""
    kind = type(local_of(tensor))
    if kind not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise LeafError(f"{name}: tensors of type {kind.__name__} cannot be saved in this layout")
