"""Tree -> write plan: which files a step has and where every byte of them comes from.

A plan depends on names, shapes, dtypes, strides and on which tensors share memory; never on values.
Python leaves are pickled anew for every save and vary in length, so each has a slot with room to grow;
what it does not fill is padded with zeros that unpicklers do not read. As long as the signature is the
same and every pickle fits its slot, the plan of the save before serves again, down to the `.metadata`.

Pure: no I/O, no threads, no tensor bytes. A planner belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from . import devices
from .errors import LeafError
from .formats import distcp, torch_zip
from .formats.image import FileImage, ImageBuilder
from .formats.pickles import BadPickleError, Pickled, StorageRef, find_inert, pickle_tree, unpickle
from .formats.refs import span_elements
from .layouts.dcp import METADATA_PATH, data_path
from .layouts.megatron import model_path
from .layouts.megatron_tree import to_megatron
from .tree import Leaf, flatten, tensors_in

NO_SLAB = -1  # in place of a slab's number; the same as kNoSlab in csrc/engine.h


@dataclass(frozen=True, eq=False)
class WritePlan:
    """The files of a step.

    Attributes:
        images: one per file; their sources are numbered over all files.
        slots: capacity in bytes of each pickle; the pickles are the first sources.
        names: what each source is called in messages.
        untrusted: (leaf, class) of python leaves that load only with trusted=True.
        signature: plans with equal signatures are equal.
    """

    images: tuple[FileImage, ...]
    slots: tuple[int, ...]
    names: tuple[str, ...]
    untrusted: tuple[tuple[str, str], ...]
    signature: object

    def directories(self) -> set[str]:
        """Directories of the files, below the step's own."""
        return {image.path.rpartition("/")[0] for image in self.images} - {""}

    @property
    def pickled_nbytes(self) -> int:
        """Bytes of all pickles, padded."""
        return sum(self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(image.nbytes for image in self.images)


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
    slabs: np.ndarray[Any, np.dtype[np.int32]] | None = None

    def used_devices(self) -> list[int]:
        """Ordinals of the devices that any source is on."""
        return sorted({*self.devices.tolist()} - {devices.HOST})


class Planner(Protocol):
    """Plans saves of one layout; remembers the last plan."""

    plans_made: int

    def plan(self, tree: Mapping[str, Any]) -> Planned:
        """Raises LeafError naming a leaf that cannot be saved."""


def planner_for(layout: str) -> Planner:
    """The planner that fills a layout's directories."""
    return MegatronPlanner() if layout == "megatron" else DcpPlanner()


def span_nbytes(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of the last that its strides reach."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    return span_elements(tensor.shape, tensor.stride()) * tensor.element_size()


class _Cache:
    """The last plan, and whether it serves again."""

    def __init__(self) -> None:
        self.plans_made = 0
        self._plan: WritePlan | None = None

    def _serve(self, signature: object, pickles: list[Pickled]) -> WritePlan | None:
        plan = self._plan
        if plan is None or plan.signature != signature:
            return None
        fits = all(len(p.data) <= slot for p, slot in zip(pickles, plan.slots, strict=True))
        return plan if fits else None

    def _keep(self, plan: WritePlan) -> WritePlan:
        self.plans_made += 1
        self._plan = plan
        return plan


def _slot_nbytes(pickle_nbytes: int) -> int:
    # The pickled states of random generators vary by some per cent from save to save.
    return (pickle_nbytes + pickle_nbytes // 8 + 256 + 511) // 512 * 512


def _planned(
    plan: WritePlan,
    named: list[tuple[str, Pickled]],
    tensors: list[torch.Tensor],
    replanned: bool,
) -> Planned:
    """Sources in the order of every plan: pickles, tensors, then the storages met while pickling."""
    padded = [
        np.frombuffer(pickled.data.ljust(slot, b"\0"), np.uint8)
        for (_, pickled), slot in zip(named, plan.slots, strict=True)
    ]
    table = [(array.ctypes.data, array.nbytes) for array in padded]
    table += [(tensor.data_ptr(), span_nbytes(tensor)) for tensor in tensors]
    where = [devices.HOST] * len(padded) + [devices.seam.device_of(tensor) for tensor in tensors]
    storages = [storage for _, pickled in named for storage in pickled.storages]
    numbered = tuple(enumerate(storages, start=len(table)))
    table += [(storage.data_ptr(), storage.nbytes()) for storage in storages]
    where += [devices.seam.device_of(storage) for storage in storages]
    both = np.array(table, dtype=np.uint64).reshape(-1, 2)
    return Planned(
        plan,
        np.ascontiguousarray(both[:, 0]),
        np.ascontiguousarray(both[:, 1]),
        np.array(where, dtype=np.int32),
        numbered,
        tuple((name, tensor) for name, pickled in named for tensor in pickled.tensors),
        (padded, [pickled for _, pickled in named], tensors),
        replanned,
    )


class DcpPlanner(_Cache):
    """`__0_0.distcp` with one item per leaf, tensors first, and `.metadata`.

    Tied tensors (same memory, shape and strides) are one item under several names.
    """

    def __init__(self) -> None:
        super().__init__()
        import torch.distributed.checkpoint.filesystem  # noqa: F401 -- else the first save pays for it

    def plan(self, tree: Mapping[str, Any]) -> Planned:
        leaves = flatten(tree)
        tensors: list[tuple[Leaf, torch.Tensor]] = []
        others: list[Leaf] = []
        for leaf in leaves:
            if isinstance(leaf.value, torch.Tensor) and leaf.value.layout == torch.strided:
                _check_storable(leaf)
                tensors.append((leaf, leaf.value))
            else:
                _refuse_unreachable(leaf)
                others.append(leaf)
        pickles = [pickle_tree(leaf.value, where=leaf.name) for leaf in others]

        items: dict[tuple[Any, ...], int] = {}  # tied tensors share one
        unique: list[torch.Tensor] = []
        forms: list[tuple[Any, ...]] = []
        for leaf, tensor in tensors:
            form = (
                tensor.dtype, tensor.shape, tensor.stride(),
                tensor.requires_grad, tensor.is_conj(), tensor.is_neg(),
            )  # fmt: skip
            item = items.setdefault((tensor.data_ptr() or id(tensor), form), len(unique))
            if item == len(unique):
                unique.append(tensor)
            forms.append((leaf.path, item, form))
        signature = (
            tuple(forms),
            tuple(
                (leaf.path, tuple(s.nbytes() for s in p.storages))
                for leaf, p in zip(others, pickles, strict=True)
            ),
        )
        served = self._serve(signature, pickles)
        plan = served or self._keep(self._lay_out(signature, leaves, tensors, forms, others, pickles))
        named = [(leaf.name, pickled) for leaf, pickled in zip(others, pickles, strict=True)]
        return _planned(plan, named, unique, served is None)

    @staticmethod
    def _lay_out(
        signature: object,
        leaves: list[Leaf],
        tensors: list[tuple[Leaf, torch.Tensor]],
        forms: list[tuple[Any, ...]],
        others: list[Leaf],
        pickles: list[Pickled],
    ) -> WritePlan:
        slots = [_slot_nbytes(len(pickled.data)) for pickled in pickles]
        names = [leaf.name for leaf in others]
        builder = ImageBuilder(data_path(rank=0))
        entries: list[distcp.Entry] = []
        spans: list[distcp.Span] = []
        for (leaf, tensor), (_, item, _) in zip(tensors, forms, strict=True):
            spec = distcp.ItemSpec.of(leaf.name, tensor)
            if item == len(spans):
                spans.append(distcp.lay_out_tensor(builder, spec, len(names)))
                names.append(leaf.name)
            entries.append(distcp.Entry(leaf.name, builder.path, spans[item], spec))
        for index, (leaf, pickled) in enumerate(zip(others, pickles, strict=True)):
            storages = []
            for position, storage in enumerate(pickled.storages):
                storages.append((len(names), storage.nbytes()))
                names.append(f"{leaf.name} (storage {position})")
            span = distcp.lay_out_bytes(builder, index, slots[index], storages)
            entries.append(distcp.Entry(leaf.name, builder.path, span))
        paths = {leaf.name: leaf.path for leaf in leaves}
        place = {name: index for index, name in enumerate(paths)}  # loading finds the tree's own order
        metadata = ImageBuilder(METADATA_PATH)
        metadata.literal(distcp.metadata_bytes(sorted(entries, key=lambda entry: place[entry.fqn]), paths))
        untrusted = tuple(
            (leaf.name + path, kind)
            for leaf, pickled in zip(others, pickles, strict=True)
            for path, kind in _inert_in(pickled)
        )
        images = (builder.build(), metadata.build())
        return WritePlan(images, tuple(slots), tuple(names), untrusted, signature)


def _inert_in(pickled: Pickled) -> list[tuple[str, str]]:
    """The first object in it that a load will not bring back by itself."""

    def storage(key: str, dtype: torch.dtype, location: str, nbytes: int) -> StorageRef:
        return StorageRef(0, nbytes, key, dtype, location)

    try:
        found = find_inert(unpickle(pickled.data, storage))
    except BadPickleError as error:
        return [("", str(error))]
    return [found] if found is not None else []


def _check_storable(leaf: Leaf) -> None:
    """Whether the leaf's memory is its value."""
    if type(leaf.value) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        kind = type(leaf.value).__name__
        raise LeafError(f"{leaf.name}: tensors of type {kind} cannot be saved in this layout")
    _refuse_unreachable(leaf)


def _refuse_unreachable(leaf: Leaf) -> None:
    for tensor in tensors_in(leaf.value):
        if tensor.layout != torch.strided:
            raise LeafError(f"{leaf.name}: sparse tensors ({tensor.layout}) cannot be saved; densify it")
        try:
            devices.seam.device_of(tensor)
        except ValueError as error:
            raise LeafError(f"{leaf.name}: {error}; only those of the host and of CUDA devices") from None


class MegatronPlanner(_Cache):
    """`mp_rank_00/model_optim_rng.pt`: the whole tree in one torch.save zip."""

    def plan(self, tree: Mapping[str, Any]) -> Planned:
        for leaf in flatten(tree):
            _refuse_unreachable(leaf)
        pickled = pickle_tree(to_megatron(tree), where="state")
        signature = tuple(storage.nbytes() for storage in pickled.storages)
        served = self._serve(signature, [pickled])
        plan = served or self._keep(self._lay_out(signature, tree, pickled))
        return _planned(plan, [("state", pickled)], [], served is None)

    @staticmethod
    def _lay_out(signature: tuple[int, ...], tree: Mapping[str, Any], pickled: Pickled) -> WritePlan:
        owners: dict[int, str] = {}
        for leaf in flatten(tree):
            for tensor in tensors_in(leaf.value):
                if tensor.layout == torch.strided:
                    owners.setdefault(tensor.untyped_storage().data_ptr(), leaf.name)
        names = [owners.get(s.data_ptr(), f"storage {index}") for index, s in enumerate(pickled.storages)]
        slot = _slot_nbytes(len(pickled.data))
        builder = ImageBuilder(model_path())
        storages = [(1 + index, nbytes) for index, nbytes in enumerate(signature)]
        torch_zip.lay_out(builder, torch_zip.stem_of(builder.path), (0, slot), storages)
        untrusted = tuple((f"state{path}", kind) for path, kind in _inert_in(pickled))
        return WritePlan((builder.build(),), (slot,), ("data.pkl", *names), untrusted, signature)
