"""Plans of Megatron's directories.

mp_rank_00/model_optim_rng.pt    one rank of each data-parallel group: model, optimizer's groups, ...
mp_rank_00/distrib_optim.pt      all ranks of the group: each its slice of the optimizer's state
mp_rank_00/distrib_optim.pt.slices_00003    those on another node than the group's first: their slices
rank_00003.pt                    what is a rank's own; only where there are several ranks
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import LeafError
from ..formats import torch_zip
from ..formats.image import FileImage, ImageBuilder
from ..formats.pickles import Pickled, pickle_tree
from ..layouts.dcp import own_path
from ..layouts.megatron import ModelRank
from ..layouts.megatron_tree import to_megatron
from ..plan import (
    PlanCache,
    Planned,
    Spans,
    WritePlan,
    inert_in,
    planned_with,
    refuse_unreachable,
    slot_nbytes,
)
from ..shards import is_sharded
from ..shared import SHARED_BRANCH, SharedFile
from ..tree import OWN_SECTIONS, flatten, leaves_of, restored, tensors_in
from .shared import SharedPlan, lay_out, signature_of


class MegatronPlanner(PlanCache):
    """What one rank writes: the whole tree in one torch.save zip, but for what ranks write together.

    Args:
        here: the ranks that write to the same disk; None is all.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        model_rank: ModelRank | None = None,
        here: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self._rank = rank
        self._here = None if here is None else frozenset(here)
        self._alone = world_size == 1
        self._model_rank = model_rank or ModelRank()
        self._shared: tuple[SharedPlan, ...] = ()

    def plan(self, tree: Mapping[str, Any]) -> Planned:
        for leaf in leaves_of(tree):
            refuse_unreachable(leaf)
            if any(map(is_sharded, tensors_in(leaf.value))):
                raise LeafError(
                    f"{leaf.name}: tensors that are spread over ranks are saved in layout 'dcp' alone"
                )
        files: Sequence[SharedFile] = tree.get(SHARED_BRANCH, ())
        named = [(path, pickle_tree(part, where=where)) for path, where, part in self._trees(tree)]
        signature = (
            tuple((path, tuple(s.nbytes() for s in pickled.storages)) for path, pickled in named),
            tuple(map(signature_of, files)),
        )
        pickles = [pickled for _, pickled in named]
        served = self._serve(signature, pickles)
        plan = served or self._keep(self._lay_out(signature, tree, named, files))
        spans = [
            span for shared, file in zip(self._shared, files, strict=True) for span in shared.spans(file)
        ]
        return planned_with(plan, named, Spans.of(spans), served is None)

    def _trees(self, tree: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
        """What this rank pickles: path, what it is called, and the tree."""
        trees: list[tuple[str, str, Mapping[str, Any]]] = []
        if self._model_rank.writes_model:
            apart = {SHARED_BRANCH} if self._alone else {SHARED_BRANCH, *OWN_SECTIONS} - {"rng"}
            model = {name: branch for name, branch in tree.items() if name not in apart}
            trees.append((self._model_rank.model_path, "state", to_megatron(model)))
        if not self._alone:
            own = {name: tree[name] for name in OWN_SECTIONS if name in tree}
            trees.append((own_path(self._rank), f"what is rank {self._rank}'s own", own))
        return trees

    def _lay_out(
        self,
        signature: object,
        tree: Mapping[str, Any],
        named: Sequence[tuple[str, Pickled]],
        files: Sequence[SharedFile],
    ) -> WritePlan:
        shared: list[SharedPlan] = []
        for file in files:
            source = len(named) + sum(len(plan.sources) for plan in shared)
            shared.append(lay_out(file, self._rank, source, self._here))
        owners: dict[int, str] = {}
        for leaf in flatten(tree):
            for tensor in tensors_in(leaf.value):
                if tensor.layout == torch.strided:
                    owners.setdefault(tensor.untyped_storage().data_ptr(), leaf.name)
        slots = tuple(slot_nbytes(len(pickled.data)) for _, pickled in named)
        names = [f"{path} (data.pkl)" for path, _ in named] + [n for plan in shared for n in plan.names]
        images: list[FileImage] = []
        for index, (path, pickled) in enumerate(named):
            storages = [(len(names) + n, s.nbytes()) for n, s in enumerate(pickled.storages)]
            names += [
                owners.get(s.data_ptr(), f"{path} (storage {n})") for n, s in enumerate(pickled.storages)
            ]
            builder = ImageBuilder(path)
            torch_zip.lay_out(builder, torch_zip.stem_of(path), (index, slots[index]), storages)
            images.append(builder.build())
        untrusted = tuple(
            (f"{path}: state{where}", kind)
            for path, what, part in self._trees(restored(tree))
            for where, kind in inert_in(pickle_tree(part, where=what))
        )
        self._shared = tuple(shared)
        parts = []
        for laid_out in shared:
            parts.append(laid_out.part.after(len(images)))
            images += laid_out.images
        return WritePlan(
            tuple(images),
            slots,
            tuple(names),
            untrusted,
            signature,
            shared=tuple(parts),
        )
