"""Plans of megatron-core's `torch_dist` format: DCP's files, whose items say themselves what they are.

__{rank}_0.distcp   the items that this rank writes: boxes of tensors, and pickles under keys of their own
.metadata           which item of which file holds what; of several ranks, rank 0 writes it at the end
common.pt           what is neither sharded nor a rank's own; rank 0
metadata.json       which format this is; rank 0
rank_{rank}.pt      what is a rank's own; only where there are several ranks

Whose replica is written, the owner of the state decided: what is in the tree is this rank's to write.
Sources: megatron/core/dist_checkpointing, serialization.py and strategies/torch.py (0.16.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import LeafError
from ..formats import distcp, torch_zip
from ..formats.image import FileImage, ImageBuilder
from ..formats.pickles import Pickled, pickle_tree
from ..layouts.dcp import METADATA_PATH, data_path, own_path
from ..layouts.megatron import COMMON_PATH, CONFIG, CONFIG_PATH
from ..layouts.megatron_tree import sharded_in, to_common
from ..plan import (
    PlanCache,
    Planned,
    Spans,
    WritePlan,
    inert_in,
    planned_with,
    refuse_unreachable,
    refuse_unstorable,
    slot_nbytes,
    span_nbytes,
)
from ..shards import Boxed, is_sharded
from ..tree import OWN_SECTIONS, Keyed, Leaf, flatten, restored, tensors_in


class _Pickle(NamedTuple):
    """What is pickled: an item of the `.distcp` file (its key), or a file of its own."""

    key: str | None
    path: str
    name: str
    pickled: Pickled


class MegatronDistPlanner(PlanCache):
    """Pickled items first, then boxes; then the files that are pickled whole."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        super().__init__()
        import torch.distributed.checkpoint.filesystem  # noqa: F401 -- else the first save pays for it

        self._rank = rank
        self._alone = world_size == 1

    def plan(self, tree: Mapping[str, Any]) -> Planned:
        boxes: list[tuple[str, Boxed]] = []
        keyed: dict[str, list[Any]] = {}
        for leaf in flatten(sharded_in(tree)):
            refuse_unreachable(leaf)
            if isinstance(leaf.value, Boxed):
                refuse_unstorable(leaf.name, leaf.value.tensor)
                boxes.append((leaf.name, leaf.value))
            elif isinstance(leaf.value, Keyed):
                keyed.setdefault(leaf.value.key, []).append(leaf.value.value)
            elif leaf.value != {}:
                raise LeafError(
                    f"{leaf.name}: nothing says under which key a {type(leaf.value).__name__} goes"
                )
        # A key's item is the list of what has that key here, as megatron-core has it.
        pickles = [
            _Pickle(key, data_path(self._rank), key, pickle_tree(values, where=key))
            for key, values in keyed.items()
        ]
        pickles += [self._file(*file) for file in self._files(tree)]
        signature = (
            tuple(map(_form, boxes)),
            tuple((one.key, one.path, tuple(s.nbytes() for s in one.pickled.storages)) for one in pickles),
        )
        served = self._serve(signature, [one.pickled for one in pickles])
        plan = served or self._keep(self._lay_out(signature, boxes, pickles, tree))
        spans = [(box.tensor, 0, span_nbytes(box.tensor)) for _, box in boxes]
        return planned_with(
            plan, [(one.name, one.pickled) for one in pickles], Spans.of(spans), served is None
        )

    def _files(self, tree: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
        """What is pickled whole: path, what it is called, and the tree."""
        files: list[tuple[str, str, Mapping[str, Any]]] = []
        own = {name: tree[name] for name in OWN_SECTIONS if name in tree}
        if self._rank == 0:
            apart = {"rng"} if self._alone else own  # generators are a sharded branch too
            rest = {name: branch for name, branch in tree.items() if name not in apart}
            files.append((COMMON_PATH, "state", to_common(rest)))
        if not self._alone:
            files.append((own_path(self._rank), f"what is rank {self._rank}'s own", own))
        return files

    @staticmethod
    def _file(path: str, name: str, content: Mapping[str, Any]) -> _Pickle:
        for key, value in content.items():
            refuse_unreachable(Leaf(f"{name}.{key}", (key,), value))
            if any(map(is_sharded, tensors_in(value))):
                raise LeafError(f"{name}.{key}: tensors that are spread over ranks are saved in layout 'dcp'")
        return _Pickle(None, path, name, pickle_tree(content, where=name))

    # -- once per structure

    def _lay_out(
        self,
        signature: object,
        boxes: Sequence[tuple[str, Boxed]],
        pickles: Sequence[_Pickle],
        tree: Mapping[str, Any],
    ) -> WritePlan:
        slots = [slot_nbytes(len(one.pickled.data)) for one in pickles]
        names = [one.name for one in pickles] + [name for name, _ in boxes]
        storages: list[list[tuple[int, int]]] = []
        for one in pickles:
            storages.append([(len(names) + n, s.nbytes()) for n, s in enumerate(one.pickled.storages)])
            names += [f"{one.name} (storage {n})" for n in range(len(one.pickled.storages))]

        builder = ImageBuilder(data_path(self._rank))
        entries: list[distcp.Entry] = []
        images: list[FileImage] = []
        for index, one in enumerate(pickles):
            if one.key is not None:
                span = distcp.lay_out_bytes(builder, index, slots[index], storages[index])
                entries.append(distcp.Entry(one.key, builder.path, span))
                continue
            whole = ImageBuilder(one.path)
            torch_zip.lay_out(whole, torch_zip.stem_of(one.path), (index, slots[index]), storages[index])
            images.append(whole.build())
        forms: dict[str, distcp.TensorForm] = {}
        for source, (name, box) in enumerate(boxes, start=len(pickles)):
            spec = distcp.ItemSpec.of(box.key, box.tensor)
            span = distcp.lay_out_tensor(builder, spec, source)
            entries.append(distcp.Entry(box.key, builder.path, span, spec, box.whole, box.offsets))
            form = distcp.TensorForm(box.tensor.dtype, box.whole, False)
            if forms.setdefault(box.key, form) != form:
                raise LeafError(f"{name}: {box.key} is both {forms[box.key]} and {form}")
        images.insert(0, builder.build())
        if self._rank == 0:
            config = ImageBuilder(CONFIG_PATH)
            config.literal(CONFIG)
            images.append(config.build())
        loaded = [one for one in pickles if one.key is not None]
        loaded += [self._file(*file) for file in self._files(restored(tree))]
        untrusted = tuple((one.name + path, kind) for one in loaded for path, kind in inert_in(one.pickled))
        paths = {entry.fqn: (entry.fqn,) for entry in entries}
        packed, layout = distcp.pack_tree(paths, forms), distcp.pack_layout(builder.path, entries, paths)
        if self._alone:
            metadata = ImageBuilder(METADATA_PATH)
            metadata.literal(distcp.merged_metadata([(packed, layout)]))
            images.append(metadata.build())
            packed = layout = b""
        return WritePlan(tuple(images), tuple(slots), tuple(names), untrusted, signature, packed, layout)


def _form(named: tuple[str, Boxed]) -> tuple[object, ...]:
    """All of a box that a plan depends on."""
    name, box = named
    tensor: torch.Tensor = box.tensor
    strides = tensor.stride(), tensor.is_conj(), tensor.is_neg()
    return name, box.key, box.whole, box.offsets, tensor.dtype, tensor.shape, strides
