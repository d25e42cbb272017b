"""Plans of DCP directories: what one rank writes of a tree that all ranks have together.

__{rank}_0.distcp   one item per tensor or piece of one that this rank writes; the first: and python leaves
.metadata           which item of which file holds what; of several ranks, the first writes it at the end
rank_00003.pt       what is a rank's own: generators, sampler; only where there are several ranks

Tools that keep such files elsewhere, under names of their own, have an `Arrangement`.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..errors import LeafError
from ..formats import distcp, torch_zip
from ..formats.image import ImageBuilder
from ..formats.pickles import Pickled, pickle_tree
from ..layouts.dcp import METADATA_PATH, data_path, own_path
from ..plan import (
    PlanCache,
    Planned,
    SharedPart,
    Spans,
    SteadyBefore,
    WritePlan,
    inert_in,
    moved,
    number_storages,
    planned_with,
    refuse_unreachable,
    refuse_unstorable,
    slot_nbytes,
    span_nbytes,
)
from ..shards import Block, Blocks, Holders, Piece, boxes, is_sharded, local_of, shares
from ..shared import SharedFile
from ..tree import OWN_SECTIONS, Leaf, Path, StateTree, Structure, flatten, leaves_of, tensors_in
from .shared import SharedPlan, lay_out
from .weights import weights_file

_log = logging.getLogger(__name__)


class _Tensor(NamedTuple):
    """A tensor leaf, and where it stands among those that differ: tied tensors are one item."""

    leaf: Leaf
    item: int
    form: tuple[Any, ...]  # dtype first; last, whether the first rank writes it


class _Source(NamedTuple):
    """What this rank writes of an item: a piece of its local memory."""

    item: int
    piece: Piece | None  # None: all of it, gaps between strides included
    begin_nbytes: int
    nbytes: int


class _Seen(NamedTuple):
    """What is to be saved of some leaves.

    Attributes:
        tensors, others: tensors, and python.
        pickles: of the others.
        unique: tensors that differ, by their items.
        written: name and pickle of what this rank writes of the others and of its own.
        crcs: of all pickles, where ranks compare them.
        signature: leaves with equal ones are laid out alike.
    """

    tensors: list[_Tensor]
    others: list[Leaf]
    pickles: list[Pickled]
    unique: list[torch.Tensor]
    written: list[tuple[str, Pickled]]
    crcs: tuple[int, ...]
    signature: object


class _Remembered(NamedTuple):
    """Of the last save, what the next one needs to have the same plan.

    Attributes:
        steady: its steady tensors.
        loose: names of the other leaves, in their order; signature: of those alone.
        spans: all of them, as they were.
        rows: which of them are of steady tensors.
        of_row, begins: of which, and from which byte on.
        loose_rows: the other spans, and their items among the loose leaves.
    """

    steady: SteadyBefore
    loose: tuple[str, ...]
    signature: object
    spans: Spans
    rows: npt.NDArray[np.int64]
    of_row: npt.NDArray[np.int64]
    begins: npt.NDArray[np.uint64]
    loose_rows: list[tuple[int, int]]


class Arrangement(NamedTuple):
    """Where a tool keeps DCP files, and what it calls what is in them.

    A rank's own file lies beside that directory, also where there is one rank alone.

    Attributes:
        directory: of the DCP files, relative to the part's base.
        shared: what of a tree all ranks have together.
        stored_path: where in the stored state dict a leaf of that lies.
        weights: file of torch.save with the whole model, which ranks write together, relative to the base.
    """

    directory: str
    shared: Callable[[Mapping[str, Any]], dict[str, Any]]
    stored_path: Callable[[Path], Path]
    weights: str


class DcpPlanner(PlanCache):
    """Tensors first, then python leaves. Tied tensors (same memory, shape and strides) are one item under
    several names. What several ranks hold, they write in equal shares, where training keeps it equal; of
    all else that is plain, the first rank's is written. On each node's own disk, all of that lies that its
    ranks hold: they alone share the work, and the first of them is the first rank.

    Args:
        here: the ranks that write to the same disk; None is all.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        arrangement: Arrangement | None = None,
        here: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        import torch.distributed.checkpoint.filesystem  # noqa: F401 -- else the first save pays for it

        self._rank = rank
        self._here = None if here is None else frozenset(here)
        self._is_first = rank == min(here or (0,))
        self._alone = world_size == 1
        self._arrangement = arrangement
        self.remembers = arrangement is None  # else there is a file of weights, which wants all of them
        self._blocks = Blocks(world_size)
        self._known_sharing: dict[Holders, Holders] = {}
        self._sources: list[_Source] = []
        self._remembered: _Remembered | None = None
        self._weights: SharedPlan | None = None
        self._said_no_weights = False

    def plan(self, tree: Mapping[str, Any]) -> Planned:
        self._remembered = None
        own = self._own(tree)
        if self._arrangement is not None:
            leaves = flatten(self._arrangement.shared(tree))
        else:
            leaves = [leaf for leaf in leaves_of(tree) if leaf.path[0] not in own]
        parameters = tree.parameters if isinstance(tree, StateTree) else frozenset()
        seen = self._see(leaves, own, parameters)
        served = self._serve(seen.signature, [pickled for _, pickled in seen.written])
        if served is None:
            plan, self._sources = self._lay_out(
                seen.signature, leaves, seen.tensors, seen.unique, seen.others, seen.written, tree
            )
            self._keep(plan)
        else:
            plan = served
        spans = [(local_of(seen.unique[s.item]), s.begin_nbytes, s.nbytes) for s in self._sources]
        if self._weights is not None:
            values = (value for value in tree["model"].values() if isinstance(value, torch.Tensor))
            spans += self._weights.spans_of([local_of(value) for value in values])
        planned = planned_with(plan, seen.written, Spans.of(spans), served is None, seen.crcs)
        self._remembered = self._remember(tree, leaves, own, seen, planned)
        return planned

    def knows(self, structure: Structure) -> bool:
        return self._remembered is not None and self._remembered.steady.structure is structure

    def plan_again(self, tree: StateTree) -> Planned | None:
        last, plan = self._remembered, self._plan
        if last is None or plan is None or (steady := last.steady.again(tree)) is None:
            return None
        own = self._own(tree)
        found = {leaf.name: leaf for leaf in leaves_of(tree) if leaf.path[0] not in own}
        if found.keys() != set(last.loose):
            return None
        seen = self._see([found[name] for name in last.loose], own, frozenset())
        if seen.signature != last.signature or not plan.takes([pickled for _, pickled in seen.written]):
            return None
        loose = Spans.of(
            [
                (local_of(seen.unique[item]), self._sources[row].begin_nbytes, self._sources[row].nbytes)
                for row, item in last.loose_rows
            ]
        )
        at = steady.survey.addresses[last.of_row] + last.begins
        spans = moved(last.spans, last.rows, at, steady.tensors, last.of_row)
        rows = np.array([row for row, _ in last.loose_rows], dtype=np.int64)
        spans.addresses[rows], spans.devices[rows] = loose.addresses, loose.devices
        spans = replace(spans, held=loose.held)  # of the steady ones, the guard holds the memory
        return planned_with(plan, seen.written, spans, False, seen.crcs)

    def _remember(
        self, tree: Mapping[str, Any], leaves: list[Leaf], own: dict[str, Any], seen: _Seen, planned: Planned
    ) -> _Remembered | None:
        """What `plan_again` needs of a save; None if it cannot serve."""
        steady = tree.steady if isinstance(tree, StateTree) else None
        if steady is None or not self.remembers:
            return None
        number = {name: index for index, name in enumerate(steady.structure.names)}
        loose = [leaf for leaf in leaves if leaf.name not in number]
        if len(loose) + len(number) != len(leaves):
            return None
        loose_items: dict[int, int] = {}
        steady_items: dict[int, int] = {}
        first = np.full(len(number), -1)
        for leaf, item, _ in seen.tensors:
            if leaf.name in number:
                first[number[leaf.name]] = steady_items.setdefault(item, number[leaf.name])
            else:
                loose_items.setdefault(item, len(loose_items))
        if steady_items.keys() & loose_items.keys() or (first < 0).any():
            return None
        sources = list(enumerate(self._sources))
        mine = [(row, source) for row, source in sources if source.item in steady_items]
        pickles = len(planned.plan.slots)
        spans = slice(pickles, pickles + len(sources))
        return _Remembered(
            SteadyBefore(steady.structure, steady.survey.addresses, first),
            tuple(leaf.name for leaf in loose),
            self._signature(
                [
                    (leaf.path, loose_items[item], (*form[:-1], self._is_first_ranks(leaf, frozenset())))
                    for leaf, item, form in seen.tensors
                    if item in loose_items
                ],
                seen,
            ),
            Spans(planned.addresses[spans], planned.sizes[spans], planned.devices[spans], None),
            np.array([row for row, _ in mine], dtype=np.int64),
            np.array([steady_items[source.item] for _, source in mine], dtype=np.int64),
            np.array([source.begin_nbytes for _, source in mine], dtype=np.uint64),
            [(row, loose_items[source.item]) for row, source in sources if source.item in loose_items],
        )

    def _own(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """What goes into this rank's own file."""
        apart = not self._alone or self._arrangement is not None
        return {name: tree[name] for name in OWN_SECTIONS if apart and name in tree}

    def _see(self, leaves: list[Leaf], own: dict[str, Any], parameters: frozenset[str]) -> _Seen:
        apart = not self._alone or self._arrangement is not None
        tensors: list[_Tensor] = []
        others: list[Leaf] = []
        items: dict[tuple[Any, ...], int] = {}
        unique: list[torch.Tensor] = []
        for leaf in leaves:
            if isinstance(leaf.value, torch.Tensor) and leaf.value.layout == torch.strided:
                refuse_unstorable(leaf.name, leaf.value)
                refuse_unreachable(leaf)
                tensor, local = leaf.value, local_of(leaf.value)
                form = (
                    tensor.dtype, tensor.shape, local.shape, local.stride(), _placement(tensor),
                    tensor.requires_grad, local.is_conj(), local.is_neg(),
                    self._is_first_ranks(leaf, parameters),
                )  # fmt: skip
                item = items.setdefault((local.data_ptr() or id(local), form), len(unique))
                if item == len(unique):
                    unique.append(tensor)
                tensors.append(_Tensor(leaf, item, form))
            else:
                refuse_unreachable(leaf)
                _refuse_sharded(leaf)
                others.append(leaf)
        pickles = [pickle_tree(leaf.value, where=leaf.name) for leaf in others]
        crcs = () if self._alone else tuple(map(_comparable, others, pickles))

        shared = list(zip(others, pickles, strict=True))
        written = [(leaf.name, pickled) for leaf, pickled in shared] if self._is_first else []
        if apart:
            for leaf in flatten(own):
                refuse_unreachable(leaf)
                _refuse_sharded(leaf)
            written.append((f"what is rank {self._rank}'s own", pickle_tree(own, where="own")))
        seen = _Seen(tensors, others, pickles, unique, written, crcs, None)
        every = [(leaf.path, item, form) for leaf, item, form in tensors]
        return seen._replace(signature=self._signature(every, seen))

    def _signature(self, tensors: Sequence[tuple[Path, int, tuple[Any, ...]]], seen: _Seen) -> object:
        """Of some tensors, by path, item and form, and of all else."""
        shared = list(zip(seen.others, seen.pickles, strict=True))
        return (
            tuple(tensors),
            tuple((leaf.path, tuple(s.nbytes() for s in pickled.storages)) for leaf, pickled in shared),
            tuple(crc for leaf, crc in zip(seen.others, seen.crcs, strict=False) if _names_parameters(leaf)),
            tuple(tuple(s.nbytes() for s in pickled.storages) for _, pickled in seen.written),
            self._in_weights(shared),
        )

    def _is_first_ranks(self, leaf: Leaf, parameters: frozenset[str]) -> bool:
        """Whether the first rank writes the whole of a tensor: what it has is what is saved.

        Plain tensors are shared only where training keeps them equal, and that is true of parameters and
        of what an optimizer makes of them. Statistics, counters and the user's own may differ: made of two
        ranks' halves, they would be nobody's.
        """
        if self._alone or is_sharded(leaf.value):
            return False
        section, *rest = leaf.path
        return section != "optimizer" and not (section == "model" and rest[0] in parameters)

    # -- once per structure

    def _block(self, name: str, tensor: torch.Tensor) -> Block:
        """What of a tensor is to be saved here, and by whom."""
        block = self._blocks.of(name, tensor)
        if self._alone:
            if block.shape != block.whole:
                raise LeafError(
                    f"{name} cannot be saved by one rank alone: {list(block.shape)} of its "
                    f"{list(block.whole)} is here; let all ranks of its mesh save together, or gather it"
                )
            return block if len(block.holders) == 1 else replace(block, holders=Holders.of((self._rank,)))
        if self._rank not in block.holders:
            raise LeafError(
                f"{name} cannot be saved: to torch.distributed, what is here of it is on rank(s) "
                f"{block.holders.key}, and this is rank {self._rank} of those that save; "
                f"both must number ranks alike"
            )
        return block

    def _on_disk(self, block: Block) -> Block:
        """The same with those holders alone who share the work of writing it to this disk."""
        if self._here is None:
            return block
        return replace(block, holders=self._sharing(block.holders))

    def _sharing(self, holders: Holders) -> Holders:
        assert self._here is not None
        if holders not in self._known_sharing:
            self._known_sharing[holders] = Holders.of([r for r in holders.ranks if r in self._here])
        return self._known_sharing[holders]

    def _lay_out(
        self,
        signature: object,
        leaves: list[Leaf],
        tensors: list[_Tensor],
        unique: list[torch.Tensor],
        others: list[Leaf],
        written: list[tuple[str, Pickled]],
        tree: Mapping[str, Any],
    ) -> tuple[WritePlan, list[_Source]]:
        names = [name for name, _ in written]
        slots = [slot_nbytes(len(pickled.data)) for _, pickled in written]
        called: dict[int, str] = {}  # items, by the first of their names
        for leaf, item, _ in tensors:
            called.setdefault(item, leaf.name)
        blocks = [self._block(called[item], tensor) for item, tensor in enumerate(unique)]
        firsts = {item for _, item, form in tensors if form[-1]}
        sources = _sources(
            unique, [self._on_disk(block) for block in blocks], firsts, self._rank, self._is_first
        )

        builder = ImageBuilder(self._in_directory(data_path(self._rank)))
        file = data_path(self._rank)  # as `.metadata`, which lies beside it, has it
        stored = {leaf.name: self._stored(leaf) for leaf in leaves}
        placed: dict[int, list[tuple[distcp.ItemSpec, distcp.Span, tuple[int, ...]]]] = {}
        for source in sources:
            spec, offsets = _described(
                called[source.item], unique[source.item], blocks[source.item], source.piece
            )
            span = distcp.lay_out_tensor(builder, spec, len(names))
            names.append(spec.fqn)
            placed.setdefault(source.item, []).append((spec, span, offsets))
        entries = [
            distcp.Entry(stored[leaf.name].name, file, span, spec, blocks[item].whole, offsets)
            for leaf, item, _ in tensors
            for spec, span, offsets in placed.get(item, ())
        ]
        self._weights = self._lay_out_weights(tree, len(names))
        names += self._weights.names if self._weights is not None else ()
        numbers = number_storages(names, written)
        for index, (leaf, storages) in enumerate(zip(others, numbers, strict=False)):
            if self._is_first:
                span = distcp.lay_out_bytes(builder, index, slots[index], storages)
                entries.append(distcp.Entry(stored[leaf.name].name, file, span))
        images = [builder.build()]
        paths = {leaf.name: leaf.path for leaf in stored.values()}
        place = {name: index for index, name in enumerate(paths)}  # loading finds the tree's own order
        entries.sort(key=lambda entry: place[entry.fqn])
        untrusted = tuple(
            (name + path, kind) for name, pickled in written for path, kind in inert_in(pickled)
        )
        if not self._alone or self._arrangement is not None:
            own = ImageBuilder(own_path(self._rank))
            torch_zip.lay_out(own, torch_zip.stem_of(own.path), (len(slots) - 1, slots[-1]), numbers[-1])
            images.append(own.build())
        shared: tuple[SharedPart, ...] = ()
        if self._weights is not None:
            shared = (self._weights.part.after(len(images)),)
            images += self._weights.images
        if self._alone:
            metadata = ImageBuilder(self._in_directory(METADATA_PATH))
            metadata.literal(distcp.metadata_bytes(entries, paths))
            images.append(metadata.build())
            plan = WritePlan(tuple(images), tuple(slots), tuple(names), untrusted, signature, shared=shared)
            return plan, sources
        plan = WritePlan(
            tuple(images), tuple(slots), tuple(names), untrusted, signature,
            tree=distcp.pack_tree(paths, _forms(tensors, stored, unique, blocks)),
            layout=distcp.pack_layout(file, entries, paths),
            groups=_groups(blocks, tensors, others),
            shared=shared,
        )  # fmt: skip
        return plan, sources

    def _in_weights(self, shared: Sequence[tuple[Leaf, Pickled]]) -> tuple[bytes, ...]:
        """What the file of weights has besides tensors; it is laid out with these values in it."""
        if self._arrangement is None:
            return ()
        return tuple(pickled.data for leaf, pickled in shared if leaf.path[0] == "model")

    def _lay_out_weights(self, tree: Mapping[str, Any], first_source: int) -> SharedPlan | None:
        if self._arrangement is None or "model" not in tree:
            return None
        file = weights_file(self._arrangement.weights, tree["model"], self._rank)
        if isinstance(file, SharedFile):
            return lay_out(file, self._rank, first_source, self._here)
        if not self._said_no_weights:
            self._said_no_weights = True
            _log.warning(
                "%s is not written: model.%s is not made of runs of memory, one per rank",
                self._arrangement.weights,
                file,
            )
        return None

    def _in_directory(self, name: str) -> str:
        return name if self._arrangement is None else f"{self._arrangement.directory}/{name}"

    def _stored(self, leaf: Leaf) -> Leaf:
        """The leaf as its file calls it."""
        if self._arrangement is None:
            return leaf
        path = self._arrangement.stored_path(leaf.path)
        return Leaf(".".join(map(str, path)), path, leaf.value)


def _comparable(leaf: Leaf, pickled: Pickled) -> int:
    """A checksum of what should be the same on all ranks; generators need not be, also where one rank's are
    saved for all."""
    return 0 if leaf.path[0] == "rng" else zlib.crc32(pickled.data)


def _placement(tensor: torch.Tensor) -> object:
    """What tells apart how equal shapes are spread over ranks."""
    if not is_sharded(tensor):
        return None
    return tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]


def _sources(
    unique: Sequence[torch.Tensor],
    blocks: Sequence[Block],
    firsts: Collection[int],
    rank: int,
    is_first: bool,
) -> list[_Source]:
    """What this rank writes, in the order of the items; `firsts` are those that the first rank writes."""
    locals_ = [local_of(tensor) for tensor in unique]
    cuttable = [local.is_contiguous() and not (local.is_conj() or local.is_neg()) for local in locals_]
    # What one rank alone has needs no counting.
    shared = [item for item, block in enumerate(blocks) if item not in firsts and len(block.holders) > 1]
    alone = {item for item, block in enumerate(blocks) if item not in firsts and len(block.holders) == 1}
    table = [(blocks[item], locals_[item].element_size(), cuttable[item]) for item in shared]
    mine_of = dict(zip(shared, shares(table, rank), strict=True))
    found = []
    for item, (block, local) in enumerate(zip(blocks, locals_, strict=True)):
        mine = mine_of.get(item, ((0, local.numel()),) if is_first or item in alone else ())
        if not local.numel() and 0 not in block.whole:
            continue  # nothing of it is here
        for begin, end in mine:
            if (begin, end) == (0, local.numel()):
                found.append(_Source(item, None, 0, span_nbytes(local)))
                continue
            for piece in boxes(block.shape, begin, end):
                first = piece.begin * local.element_size()
                nbytes = torch.Size(piece.shape).numel() * local.element_size()
                found.append(_Source(item, piece, first, nbytes))
    return found


def _described(
    name: str, tensor: torch.Tensor, block: Block, piece: Piece | None
) -> tuple[distcp.ItemSpec, tuple[int, ...]]:
    """An item's spec, and where it lies in the whole tensor."""
    spec = distcp.ItemSpec.of(name, local_of(tensor))
    if spec.requires_grad != tensor.requires_grad:
        spec = replace(spec, requires_grad=tensor.requires_grad)
    if piece is None:
        return spec, block.offsets
    offsets = tuple(a + b for a, b in zip(block.offsets, piece.offsets, strict=True))
    return spec.cut(piece.shape), offsets


def _forms(
    tensors: Sequence[_Tensor],
    stored: Mapping[str, Leaf],
    unique: Sequence[torch.Tensor],
    blocks: Sequence[Block],
) -> dict[str, distcp.TensorForm]:
    """What all ranks that have a tensor know of it alike, also those that write nothing of it."""
    return {
        stored[leaf.name].name: distcp.TensorForm(
            unique[item].dtype, blocks[item].whole, unique[item].requires_grad
        )
        for leaf, item, _ in tensors
    }


def _groups(
    blocks: Sequence[Block], tensors: Sequence[_Tensor], others: Sequence[Leaf]
) -> tuple[tuple[str, str], ...]:
    """For each set of ranks that this one shares tensors with, a digest of them."""
    seen: dict[str, Any] = {}
    numbers: dict[str, dict[int, int]] = {}
    for leaf, item, form in tensors:
        block = blocks[item]
        if len(block.holders) > 1:
            # Which are tied is told by numbers within the set: outside of it, ranks may see other ties.
            # Where a shard has no elements, nothing says that two of them were one tensor.
            items = numbers.setdefault(block.holders.key, {})
            number = items.setdefault(item, len(items))
            said = (leaf.path, block.whole, block.offsets, block.shape, str(form[0]), number)
            seen.setdefault(block.holders.key, hashlib.sha256()).update(repr(said).encode())
    # What an optimizer steps is saved once too, and a rank that steps something else could not load it.
    stepped = [leaf.value for leaf in others if _names_parameters(leaf)]
    python = hashlib.sha256(repr([[leaf.path for leaf in others], stepped]).encode())
    return (
        ("python", python.hexdigest()[:16]),
        *((key, found.hexdigest()[:16]) for key, found in seen.items()),
    )


def _names_parameters(leaf: Leaf) -> bool:
    """Whether it is the list of what a group of an optimizer steps."""
    return leaf.path[0] == "optimizer" and leaf.path[-1] == "params"


def _refuse_sharded(leaf: Leaf) -> None:
    if any(map(is_sharded, tensors_in(leaf.value))):
        raise LeafError(f"{leaf.name}: a tensor that is spread over ranks must be a leaf of its own here")
