"""Boxed and Keyed leaves: what owners say is a box of something larger, planned, captured and matched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from asyncckpt.capture import Reserve, capture
from asyncckpt.errors import LeafError
from asyncckpt.formats import distcp
from asyncckpt.planners import MegatronDistPlanner
from asyncckpt.shards import Boxed
from asyncckpt.tree import Keyed, Matching, StateTree, StoredPart, StoredTensor

FLOATS = 4


def tree_of(**leaves: Any) -> StateTree:
    return StateTree({"model": leaves, "optimizer": {}, "common": {"content_metadata": {}}, "step": 3})


def described(*trees: Mapping[str, Any]) -> Any:
    """`.metadata` of what ranks have."""
    plans = [MegatronDistPlanner(rank, max(2, len(trees))).plan(tree).plan for rank, tree in enumerate(trees)]
    return distcp.read_metadata(distcp.merged_metadata([(plan.tree, plan.layout) for plan in plans]))


def row(number: int) -> Boxed:
    return Boxed("layers.w", torch.full((1, 3), float(number)), (2, 3), (number, 0))


def test_boxes_of_one_tensor_are_its_chunks_whoever_has_them() -> None:
    together = described(tree_of(first=row(0), second=row(1)), tree_of())
    apart = described(tree_of(mine=row(0)), tree_of(mine=row(1)))
    for metadata in (together, apart):
        (key,) = metadata.state_dict_metadata
        assert key == "layers.w"
        chunks = metadata.state_dict_metadata[key].chunks
        assert [tuple(chunk.offsets) for chunk in chunks] == [(0, 0), (1, 0)]


def test_what_no_rank_writes_and_what_two_call_differently_is_named() -> None:
    with pytest.raises(LeafError, match=r"layers\.w: the ranks have 3 of its 6 elements"):
        described(tree_of(mine=row(0)), tree_of())
    other = Boxed("layers.w", torch.zeros(1, 3, dtype=torch.float64), (2, 3), (1, 0))
    with pytest.raises(LeafError, match=r"second: layers\.w is both"):
        described(tree_of(first=row(0), second=other), tree_of())
    with pytest.raises(LeafError, match=r"nothing says under which key a Tensor goes"):
        described(tree_of(mine=torch.zeros(1)), tree_of())


def test_a_rank_alone_must_have_all_of_a_tensor() -> None:
    MegatronDistPlanner().plan(tree_of(first=row(0), second=row(1)))
    with pytest.raises(LeafError, match="3 of its 6 elements"):
        MegatronDistPlanner().plan(tree_of(first=row(0)))


def test_objects_that_share_a_key_are_one_item_and_values_do_not_change_a_plan() -> None:
    planner = MegatronDistPlanner(0, 2)
    for number in (1, 2):
        leaves = {"a": Keyed("k/shard_0_1", [number]), "b": Keyed("k/shard_0_1", [7]), "w": row(number - 1)}
        plan = planner.plan(tree_of(**{**leaves, "w": row(0)})).plan
    assert planner.plans_made == 1
    assert [image.path for image in plan.images] == [
        "__0_0.distcp",
        "common.pt",
        "rank_00000.pt",
        "metadata.json",
    ]
    assert plan.names[:1] == ("k/shard_0_1",)


def test_a_boxed_buffer_is_copied_and_a_boxed_parameter_is_watched() -> None:
    buffer, parameter = torch.zeros(2, 3), torch.zeros(2, 3)
    tree = tree_of(b=Boxed("b", buffer, (2, 3), (0, 0)), p=Boxed("p", parameter, (2, 3), (0, 0)))
    captured = capture(tree, {buffer.data_ptr()}, Reserve(1 << 20, []))
    buffer += 1
    assert captured.tree["model"]["b"].tensor.sum() == 0
    assert captured.tree["model"]["b"].key == "b"
    assert [(name, tensor.data_ptr()) for name, tensor in captured.live] == [
        ("model.p", parameter.data_ptr())
    ]


def stored(*shape: int) -> StoredTensor:
    stride = tuple(torch.zeros(shape).stride())
    nbytes = torch.zeros(shape).numel() * FLOATS
    return StoredTensor(torch.float32, shape, (StoredPart("f", 0, nbytes, (0,) * len(shape), shape, stride),))


def test_a_box_reads_what_is_stored_at_its_place() -> None:
    matching = Matching()
    matching.into_box("w", stored(4, 3), Boxed("w", torch.zeros(2, 3), (4, 3), (2, 0)))
    (read,) = matching.reads
    assert (read.block.offsets, read.block.shape) == ((2, 0), (2, 3))
    assert not matching.differences


@pytest.mark.parametrize(
    "there", [stored(5, 3), stored(12), StoredTensor(torch.float64, (4, 3), ()), {"no": "tensor"}]
)
def test_another_size_or_type_is_a_difference(there: Any) -> None:
    matching = Matching()
    matching.into_box("w", there, Boxed("w", torch.zeros(2, 3), (4, 3), (2, 0)))
    assert not matching.reads
    assert len(matching.differences) == 1


@pytest.mark.parametrize(("rows", "kept"), [(5, 2), (3, 1), (2, 0)])
def test_what_a_smaller_stored_one_lacks_becomes_zeros_once_all_was_read(rows: int, kept: int) -> None:
    live = torch.ones(2, 3)
    matching = Matching()
    matching.into_box("w", stored(rows, 3), Boxed("w", live, (4, 3), (2, 0)), resized=True)
    assert live.sum() == 6
    for action in matching.afterwards:
        action()
    assert live.sum(1).tolist() == [3.0] * kept + [0.0] * (2 - kept)
    (read,) = matching.reads
    assert read.block.shape == (kept, 3)
    assert not kept or read.live.data_ptr() == live.data_ptr()
