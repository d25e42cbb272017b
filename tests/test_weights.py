"""full_weights.pt, which all ranks write together: bit for bit what torch.save of the whole model has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from asyncckpt import AsyncCheckpointer
from tests.process_world import Talk, World, process_world

RANKS = 4
WEIGHTS = "actor/model_state_dict/full_weights.pt"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


class Odd(nn.Module):
    """Uneven and empty rows, fewer rows than ranks, scalars, buffers, ties, frozen and half precision."""

    def __init__(self, ties: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.uneven = nn.Linear(1025, 7)
        self.few = nn.Linear(5, 2, bias=False)
        self.one = nn.Parameter(torch.randn(1, 3000))
        self.none = nn.Parameter(torch.zeros(0, 4))
        self.short = nn.Parameter(torch.randn(4097, 3).bfloat16())
        self.frozen = nn.Parameter(torch.randn(9, 4), requires_grad=False)
        self.embedding = nn.Embedding(33, 16)
        self.head = nn.Linear(16, 33, bias=False)
        if ties:
            self.head.weight = self.embedding.weight
        self.register_buffer("scalar", torch.tensor(2.5, dtype=torch.float64))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("passing", torch.ones(3), persistent=False)
        self.register_buffer("complex", torch.randn(5, dtype=torch.complex64))


def save(talk: Talk, rank: int, root: Path, shape: tuple[int, ...]) -> Any:
    """The whole model at save 1 and, with other tensors in its place, at save 2."""
    model: nn.Module = Odd()
    if shape == (0,):
        model = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        fully_shard(model, mesh=mesh, ignored_params={model.frozen})
    options = {
        "rank_timeout_s": 30,
        "host_memory": 4 << 20,
        "parts": {"actor": RANKS},
        "part": "actor",
        "store": talk.store,
    }
    wholes = []
    with AsyncCheckpointer(root, model=model, layout="rlinf-fsdp", **options) as checkpointer:
        for step in (1, 2):
            with torch.no_grad():
                for number, tensor in enumerate(model.state_dict().values()):
                    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                    local.copy_(local.logical_not() if local.dtype == torch.bool else local + number * step)
            checkpointer.save(step).wait()
            wholes.append(_whole(model))
            checkpointer.fence()
        assert checkpointer.plans_made == 1
    return wholes


def _whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone()
        for name, v in model.state_dict().items()
    }


@pytest.mark.parametrize("shape", [(0,), (RANKS,), (2, 2), (RANKS, 1)], ids=["ddp", "fsdp", "hsdp", "copies"])
def test_weights_are_those_of_the_whole_model(world: World, tmp_path: Path, shape: tuple[int, ...]) -> None:
    wholes = world.run(RANKS, save, tmp_path, shape)[0]
    for step, whole in enumerate(wholes, 1):
        found = torch.load(tmp_path / f"global_step_{step}" / WEIGHTS, weights_only=True)
        assert list(found) == list(whole)
        for name, value in whole.items():
            assert found[name].dtype == value.dtype, name
            assert found[name].shape == value.shape, name
            assert torch.equal(found[name], value), name
            assert found[name].untyped_storage().nbytes() == value.nbytes, name


class Counting(nn.Module):
    """Says more of itself than tensors."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def save_alone(root: Path, model: Any, *extras: Any) -> list[dict[str, Any] | None]:
    """What is in the file of each save, made with these extra states; None without a file."""
    parts = {"rank": 0, "world_size": 1, "part": "actor", "parts": {"actor": 1}}
    with AsyncCheckpointer(root, model=model, layout="rlinf-fsdp", **parts) as checkpointer:
        for step, model.extra in enumerate(extras):
            checkpointer.save(step)
            checkpointer.fence()
    paths = [root / f"global_step_{step}" / WEIGHTS for step in range(len(extras))]
    return [torch.load(path, weights_only=True) if path.exists() else None for path in paths]


def test_python_values_of_a_model_are_those_of_the_save(tmp_path: Path) -> None:
    found = save_alone(tmp_path, Counting(0), {"seen": 1}, {"seen": 1}, {"seen": 2}, {"seen": 3})
    assert [one and one["_extra_state"] for one in found] == [{"seen": n} for n in (1, 1, 2, 3)]


def test_tensors_in_python_values_cost_the_weights_and_not_the_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Counting(0)
    assert save_alone(tmp_path, model, {"scale": torch.ones(2)}) == [None]
    assert "full_weights.pt is not written: model._extra_state" in caplog.text


def test_what_is_no_run_of_memory_costs_the_weights_and_not_the_save(tmp_path: Path) -> None:
    model = Counting(0)
    model.weight = nn.Parameter(torch.randn(5, dtype=torch.complex64).conj())
    assert save_alone(tmp_path / "conjugate", model, 0) == [None]
    model.weight = nn.Parameter(torch.randn(5, 4).t())
    assert save_alone(tmp_path / "transposed", model, 0) == [None]
