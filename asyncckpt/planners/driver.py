"""Plans of a driver's files: its dataloader, and what is its own.

data.pt         what the dataloader's state_dict() says and nothing else; only where there is one
rank_00000.pt   generators, and values of the driver's
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import LeafError
from ..formats import torch_zip
from ..formats.image import ImageBuilder
from ..formats.pickles import Pickled, pickle_tree
from ..layouts.dcp import own_path
from ..layouts.rlinf import DATA_NAME
from ..plan import (
    PlanCache,
    Planned,
    Spans,
    WritePlan,
    inert_in,
    number_storages,
    planned_with,
    refuse_unreachable,
    slot_nbytes,
)
from ..shards import is_sharded
from ..tree import OWN_SECTIONS, flatten, tensors_in


class DriverPlanner(PlanCache):
    """One torch.save zip for the dataloader, one for the rest."""

    def plan(self, tree: Mapping[str, Any]) -> Planned:
        odd = [name for name in tree if name not in (*OWN_SECTIONS, "step")]
        if odd:
            raise LeafError(
                f"{odd[0]}: the driver saves a dataloader and per_rank; hand it over in another part"
            )
        for leaf in flatten(tree):
            refuse_unreachable(leaf)
            if any(map(is_sharded, tensors_in(leaf.value))):
                raise LeafError(f"{leaf.name}: the driver has no tensors that are spread over ranks")
        own = {name: tree[name] for name in OWN_SECTIONS if name in tree and name != "dataloader"}
        contents = {own_path(0): own} if own else {}
        if "dataloader" in tree:
            contents[DATA_NAME] = tree["dataloader"]
        written = [(name, pickle_tree(content, where=name)) for name, content in contents.items()]
        signature = tuple((name, tuple(s.nbytes() for s in pickled.storages)) for name, pickled in written)
        served = self._serve(signature, [pickled for _, pickled in written])
        plan = served or self._keep(self._lay_out(signature, written))
        return planned_with(plan, written, Spans.of([]), served is None)

    @staticmethod
    def _lay_out(signature: object, written: list[tuple[str, Pickled]]) -> WritePlan:
        names = [name for name, _ in written]
        slots = [slot_nbytes(len(pickled.data)) for _, pickled in written]
        images = []
        for index, storages in enumerate(number_storages(names, written)):
            builder = ImageBuilder(written[index][0])
            torch_zip.lay_out(builder, torch_zip.stem_of(builder.path), (index, slots[index]), storages)
            images.append(builder.build())
        untrusted = tuple((f"{name}{path}", kind) for name, p in written for path, kind in inert_in(p))
        return WritePlan(tuple(images), tuple(slots), tuple(names), untrusted, signature)
