"""Pickles in frames and loose values say what one pickle would say, to every reader of pickles."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from asyncckpt import AsyncCheckpointer
from asyncckpt.formats.refs import StorageRef
from asyncckpt.formats.unpickle import unpickle
from asyncckpt.formats.woven import CannotWeaveError, Woven, weave


def woven(tree: dict[str, Any], *steady: torch.Tensor) -> Woven:
    return weave(tree, {id(tensor): row for row, tensor in enumerate(steady)})


class _Unpickler(pickle.Unpickler):
    """Gives each storage's key in place of it."""

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, elements = pid
        return torch.storage.TypedStorage(
            wrap_storage=torch.UntypedStorage([int(key)] * (elements * kind.dtype.itemsize)),
            dtype=kind.dtype,
            _internal=True,
        )


def loaded(data: bytes, path: Path) -> Any:
    path.write_bytes(data)
    with path.open("rb") as file:
        return _Unpickler(file).load()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_loose_values_change_and_frames_stay(tmp_path: Path) -> None:
    a, b, tied = torch.zeros(3), torch.zeros(2, 2), torch.zeros(0)
    tied = b.detach()
    shared = ["one object"]
    tree: dict[str, Any] = {
        "first": 1,
        "model": {"a": a, "count": torch.zeros(1), "b": b},
        "optimizer": {"state": {0: {"m": tied}, 1: {}}, "param_groups": [{"lr": 0.5, "params": [0]}]},
        "extra": {"x": shared, "y": shared, "none": None},
    }
    made = woven(tree, a, b, tied)
    assert made.weave.storages == 1
    assert [row for _, row in made.storages] == [0, 1]
    found = loaded(made.pickled.data, tmp_path / "first")
    assert [*found] == [*tree]
    assert [*found["model"]] == ["a", "count", "b"]
    assert found["model"]["count"].view(torch.uint8).tolist() == [0] * 4  # loose ones have the first keys
    assert found["model"]["a"].view(torch.uint8).tolist() == [1] * 12
    assert found["optimizer"]["state"][0]["m"].view(torch.uint8)[0].tolist() == [2] * 8
    assert found["optimizer"]["state"][1] == {}
    assert found["extra"]["x"] is found["extra"]["y"]

    later = {
        "extra": {"x": shared, "y": [3] * 100, "none": "longer than before"},
        "model": {"count": torch.ones(1)},
        "optimizer": {"state": {1: {}}, "param_groups": [{"lr": 0.25, "params": [0]}]},
        "first": 2,
    }
    pickled = made.weave.pickle(later)
    again = loaded(pickled.data, tmp_path / "again")
    assert [*again] == [*tree]
    assert again["extra"] == later["extra"]
    assert again["optimizer"]["param_groups"] == later["optimizer"]["param_groups"]
    assert again["first"] == 2
    assert again["model"]["a"].shape == (3,)
    assert [storage.data_ptr() for storage in pickled.storages] == [
        later["model"]["count"].untyped_storage().data_ptr()  # type: ignore[index]
    ]

    def storage(key: str, dtype: torch.dtype, location: str, nbytes: int) -> StorageRef:
        return StorageRef(0, nbytes, key, dtype, location)

    assert unpickle(pickled.data, storage)["extra"] == later["extra"]


@pytest.mark.parametrize(
    "later",
    [
        {"model": {}},
        {"model": {"count": torch.zeros(1), "more": 1}},
        {"model": {"count": torch.zeros(1)}, "more": 1},
        {"model": {"count": [torch.zeros(1), torch.zeros(1)]}},
        {"model": {"count": [str(number) for number in range(5000)]}},
    ],
    ids=["fewer", "another", "another branch", "more memory", "more than there is room for"],
)
def test_other_loose_values_are_refused(later: dict[str, Any]) -> None:
    steady = torch.zeros(3)
    made = woven({"model": {"a": steady, "count": torch.zeros(1)}}, steady)
    with pytest.raises(CannotWeaveError):
        made.weave.pickle(later)


def test_what_would_be_two_is_pickled_as_a_whole() -> None:
    steady = torch.zeros(4)
    part = torch.zeros(8)[:4]
    with pytest.raises(CannotWeaveError):
        woven({"model": {"a": steady}, "extra": steady.view(2, 2)}, steady)
    with pytest.raises(CannotWeaveError):
        woven({"model": {"a": part}}, part)
    with pytest.raises(CannotWeaveError):
        woven({"model": {"a": steady}, "extra": [str(number) for number in range(1 << 16)]}, steady)
    with pytest.raises(CannotWeaveError):
        woven({"model": {"a": steady}})


@pytest.mark.parametrize("extra", ["the weights", "seventy thousand names", "itself", "plain"])
def test_stock_torch_reads_what_was_saved_either_way(tmp_path: Path, extra: str) -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    values: dict[str, Any] = {
        "the weights": {"weights": model.weight.detach()},
        "seventy thousand names": {"names": [str(number) for number in range(70_000)]},
        "itself": {"value": {1: []}},
        "plain": {"value": 5},
    }[extra]
    if extra == "itself":
        values["value"][1].append(values["value"])
    with AsyncCheckpointer(
        tmp_path, model=model, optimizer=optimizer, extra=values, layout="megatron", save_rng=False
    ) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step).wait()
            optimizer.step()
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        checkpointer.save(4).wait()
        path = tmp_path / "iter_0000004/mp_rank_00/model_optim_rng.pt"
        stored = torch.load(path, weights_only=True)
        assert all(torch.equal(stored["model"][name], value) for name, value in expected.items())
        assert stored["optimizer"]["state"][0]["step"] == 4
        if extra == "the weights":
            assert torch.equal(stored["extra"]["weights"], expected["weight"])
        elif extra == "itself":
            assert stored["extra"]["value"][1][0] is stored["extra"]["value"]
        else:
            assert stored["extra"] == values
        with torch.no_grad():
            model.weight.zero_()
        checkpointer.load(4)
    assert torch.equal(model.weight, expected["weight"])
