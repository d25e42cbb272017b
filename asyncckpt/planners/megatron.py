"""Plans of Megatron's directories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import LeafError
from ..formats import torch_zip
from ..formats.image import ImageBuilder
from ..formats.pickles import Pickled, pickle_tree
from ..layouts.megatron import model_path
from ..layouts.megatron_tree import to_megatron
from ..plan import PlanCache, Planned, WritePlan, inert_in, planned_with, refuse_unreachable, slot_nbytes
from ..shards import is_sharded
from ..tree import flatten, tensors_in


class MegatronPlanner(PlanCache):
    """`mp_rank_00/model_optim_rng.pt`: the whole tree in one torch.save zip."""

    def plan(self, tree: Mapping[str, Any]) -> Planned:
        for leaf in flatten(tree):
            refuse_unreachable(leaf)
            if any(map(is_sharded, tensors_in(leaf.value))):
                raise LeafError(
                    f"{leaf.name}: tensors that are spread over ranks are saved in layout 'dcp' alone"
                )
        pickled = pickle_tree(to_megatron(tree), where="state")
        signature = tuple(storage.nbytes() for storage in pickled.storages)
        served = self._serve(signature, [pickled])
        plan = served or self._keep(self._lay_out(signature, tree, pickled))
        return planned_with(plan, [("state", pickled)], [], served is None)

    @staticmethod
    def _lay_out(signature: tuple[int, ...], tree: Mapping[str, Any], pickled: Pickled) -> WritePlan:
        owners: dict[int, str] = {}
        for leaf in flatten(tree):
            for tensor in tensors_in(leaf.value):
                if tensor.layout == torch.strided:
                    owners.setdefault(tensor.untyped_storage().data_ptr(), leaf.name)
        names = [owners.get(s.data_ptr(), f"storage {index}") for index, s in enumerate(pickled.storages)]
        slot = slot_nbytes(len(pickled.data))
        builder = ImageBuilder(model_path())
        storages = [(1 + index, nbytes) for index, nbytes in enumerate(signature)]
        torch_zip.lay_out(builder, torch_zip.stem_of(builder.path), (0, slot), storages)
        untrusted = tuple((f"state{path}", kind) for path, kind in inert_in(pickled))
        return WritePlan((builder.build(),), (slot,), ("data.pkl", *names), untrusted, signature)
