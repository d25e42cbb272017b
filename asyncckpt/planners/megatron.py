"""Plans of Megatron's directories.

mp_rank_00/model_optim_rng.pt    one rank of each data-parallel group: model, optimizer's groups, ...
mp_rank_00/distrib_optim.pt      all ranks of the group: each its slice of the optimizer's state
mp_rank_00/distrib_optim.pt.slices_00003    those on another node than the group's first: their slices
rank_00003.pt                    what is a rank's own; only where there are several ranks
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .. import devices
from ..errors import LeafError
from ..formats import torch_zip
from ..formats.image import FileImage, ImageBuilder
from ..formats.pickles import Pickled, pickle_tree
from ..formats.woven import Weave, Woven, weave
from ..layouts.dcp import own_path
from ..layouts.megatron import ModelRank
from ..layouts.megatron_tree import to_megatron
from ..plan import (
    PlanCache,
    Planned,
    Spans,
    SteadyBefore,
    WritePlan,
    inert_in,
    moved,
    planned_with,
    refuse_unreachable,
    slot_nbytes,
)
from ..shards import is_sharded
from ..shared import SHARED_BRANCH, SharedFile
from ..survey import is_among
from ..tree import OWN_SECTIONS, StateTree, Structure, leaves_of, restored, tensors_in
from .shared import SharedPlan, lay_out, signature_of


class _Remembered(NamedTuple):
    """Of the last save, what the next one needs to have the same plan.

    Attributes:
        steady: its steady tensors.
        weave: of the file with the model; signature: of all files.
        rows: of steady tensors, one for each of their storages.
        spans: these storages, as they were.
    """

    steady: SteadyBefore
    weave: Weave
    signature: object
    rows: npt.NDArray[np.int64]
    spans: Spans


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
        self.remembers = self._model_rank.writes_model
        self._remembered: _Remembered | None = None

    def plan(self, tree: Mapping[str, Any]) -> Planned:
        for leaf in leaves_of(tree):
            refuse_unreachable(leaf)
            if any(map(is_sharded, tensors_in(leaf.value))):
                raise LeafError(
                    f"{leaf.name}: tensors that are spread over ranks are saved in layout 'dcp' alone"
                )
        self._remembered = None
        files: Sequence[SharedFile] = tree.get(SHARED_BRANCH, ())
        woven = self._woven(tree) if not files else None
        named = self._pickled(tree, woven)
        signature = (
            self._signature(named),
            woven and tuple(storage.nbytes() for storage, _ in woven.storages),
            tuple(map(signature_of, files)),
        )
        pickles = [pickled for _, pickled in named]
        served = self._serve(signature, pickles)
        plan = served or self._keep(self._lay_out(signature, tree, named, files, woven))
        spans = Spans.of(
            [span for shared, file in zip(self._shared, files, strict=True) for span in shared.spans(file)]
        )
        if woven is not None:
            spans = _spans_of([storage for storage, _ in woven.storages])
            self._remembered = self._remember(tree, woven, named, spans)
        return planned_with(plan, named, spans, served is None)

    def knows(self, structure: Structure) -> bool:
        return self._remembered is not None and self._remembered.steady.structure is structure

    def plan_again(self, tree: StateTree) -> Planned | None:
        last, plan = self._remembered, self._plan
        if last is None or plan is None or (steady := last.steady.again(tree)) is None:
            return None
        for leaf in leaves_of(tree):
            refuse_unreachable(leaf)
        whole = dict(tree)
        if "optimizer" in whole:
            whole["optimizer"] = _with_state(whole["optimizer"], ("optimizer",), last.weave.branches)
        (path, _, model), *others = self._trees(whole)
        try:
            named = [(path, last.weave.pickle(model))]
        except Exception:  # noqa: BLE001 -- a leaf's own code may raise anything; `plan` says which leaf
            return None
        named += [(other, pickle_tree(part, where=where)) for other, where, part in others]
        if self._signature(named) != last.signature or not plan.takes([pickled for _, pickled in named]):
            return None
        at = steady.survey.addresses
        if is_among([storage.data_ptr() for _, pickled in named for storage in pickled.storages], at):
            return None  # what was loose is steady now, too
        # The guard holds the memory.
        spans = moved(last.spans, np.arange(len(last.rows)), at[last.rows], steady.tensors, last.rows)
        return planned_with(plan, named, spans, False)

    def _woven(self, tree: Mapping[str, Any]) -> Woven | None:
        """The file with the model, if its steady tensors can be told apart."""
        steady = tree.steady if isinstance(tree, StateTree) else None
        if steady is None or not self._model_rank.writes_model:
            return None
        number = {name: row for row, name in enumerate(steady.structure.names)}
        rows = {id(leaf.value): number[leaf.name] for leaf in leaves_of(tree) if leaf.name in number}
        try:
            return weave(self._trees(tree)[0][2], rows)
        except Exception:  # noqa: BLE001 -- a leaf's own code may raise anything; `pickle_tree` says which
            return None

    def _remember(
        self, tree: Mapping[str, Any], woven: Woven, named: Sequence[tuple[str, Pickled]], spans: Spans
    ) -> _Remembered:
        steady = tree.steady if isinstance(tree, StateTree) else None
        assert steady is not None
        at = steady.survey.addresses
        firsts: dict[int, int] = {}
        first = [row if not one else firsts.setdefault(one, row) for row, one in enumerate(at.tolist())]
        rows = np.array([row for _, row in woven.storages], dtype=np.int64)
        return _Remembered(
            SteadyBefore(steady.structure, at, np.array(first, dtype=np.int64)),
            woven.weave,
            self._signature(named),
            rows,
            Spans(spans.addresses, spans.sizes, spans.devices, None),
        )

    @staticmethod
    def _signature(named: Sequence[tuple[str, Pickled]]) -> object:
        return tuple((path, tuple(s.nbytes() for s in pickled.storages)) for path, pickled in named)

    def _pickled(self, tree: Mapping[str, Any], woven: Woven | None) -> list[tuple[str, Pickled]]:
        trees = self._trees(tree)
        first = [] if woven is None else [(trees[0][0], woven.pickled)]
        rest = trees[len(first) :]
        return first + [(path, pickle_tree(part, where=where)) for path, where, part in rest]

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
        woven: Woven | None,
    ) -> WritePlan:
        shared: list[SharedPlan] = []
        for file in files:
            source = len(named) + sum(len(plan.sources) for plan in shared)
            shared.append(lay_out(file, self._rank, source, self._here))
        owners: dict[int, str] = {}
        for leaf in leaves_of(tree):
            for tensor in tensors_in(leaf.value):
                if tensor.layout == torch.strided:
                    owners.setdefault(tensor.untyped_storage().data_ptr(), leaf.name)
        slots = tuple(slot_nbytes(len(pickled.data)) for _, pickled in named)
        names = [f"{path} (data.pkl)" for path, _ in named] + [n for plan in shared for n in plan.names]
        images: list[FileImage] = []

        def sources(path: str, storages: Iterable[torch.UntypedStorage]) -> list[tuple[int, int]]:
            found = [(len(names) + n, s.nbytes()) for n, s in enumerate(storages)]
            names.extend(owners.get(s.data_ptr(), f"{path} (storage {n})") for n, s in enumerate(storages))
            return found

        steady = sources(named[0][0], [storage for storage, _ in woven.storages]) if woven else []
        for index, (path, pickled) in enumerate(named):
            storages = sources(path, pickled.storages) + (steady if index == 0 else [])
            builder = ImageBuilder(path)
            torch_zip.lay_out(builder, torch_zip.stem_of(path), (index, slots[index]), storages)
            images.append(builder.build())
        restores = restored(tree)
        trusted = named if restores.keys() == tree.keys() else self._pickled(restores, None)
        untrusted = tuple(
            (f"{path}: state{where}", kind) for path, one in trusted for where, kind in inert_in(one)
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


def _spans_of(storages: Sequence[torch.UntypedStorage]) -> Spans:
    return Spans(
        np.array([storage.data_ptr() for storage in storages], dtype=np.uint64),
        np.array([storage.nbytes() for storage in storages], dtype=np.uint64),
        np.array([devices.seam.device_of(storage) for storage in storages], dtype=np.int32),
        storages,
    )


def _with_state(branch: Any, path: tuple[Any, ...], branches: Collection[tuple[Any, ...]]) -> Any:
    """An optimizer's branch, or those of several, with state that is absent for being steady."""
    if path not in branches:
        return branch
    if (*path, "state") in branches:
        return {"state": {}, **branch}
    return {key: _with_state(child, (*path, key), branches) for key, child in branch.items()}
