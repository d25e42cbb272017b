"""What was saved comes back bit for bit, into whatever is live; what others wrote comes back too."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from asyncckpt import AsyncCheckpointer, _native, restore
from asyncckpt.errors import CorruptStepError, LoadError, MismatchError, NoIntactStepError, UntrustedError

LAYOUTS = ["dcp", "megatron"]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
}


class Sampler:
    """A shuffled sampler in the middle of its epoch."""

    def __init__(self) -> None:
        self.order = torch.randperm(50)
        self.position = 0

    def __next__(self) -> int:
        index = int(self.order[self.position % 50])
        self.position += 1
        return index

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.position = state["order"], state["position"]


class Run:
    """A small training run: dropout, BatchNorm, three generators, a scheduler, a sampler."""

    def __init__(self, make_optimizer: Callable[[Any], torch.optim.Optimizer], seed: int = 0) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        self.model = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4), nn.Linear(4, 4)
        )
        self.model[4].weight.requires_grad_(False)  # frozen
        self.optimizer = make_optimizer(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.sampler = Sampler()

    def checkpointer(self, root: Path, layout: str) -> AsyncCheckpointer:
        return AsyncCheckpointer(
            root, model=self.model, optimizer=self.optimizer, lr_scheduler=self.scheduler,
            dataloader=self.sampler, layout=layout,
        )  # fmt: skip

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            noise = random.random() + np.random.random() + next(self.sampler)  # noqa: NPY002
            batch = torch.randn(5, 6) + noise / 50

            def closure(batch: torch.Tensor = batch) -> torch.Tensor:
                self.optimizer.zero_grad()
                loss = self.model(batch).square().mean()
                loss.backward()
                return loss

            if isinstance(self.optimizer, torch.optim.LBFGS):
                losses.append(float(self.optimizer.step(closure).detach()))
            else:
                losses.append(float(closure().detach()))
                self.optimizer.step()
            self.scheduler.step()
        return losses

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "live"])
def test_training_continues_bit_for_bit(tmp_path: Path, layout: str, kind: str, trained: bool) -> None:
    run = Run(OPTIMIZERS[kind])
    run.train(3)
    with run.checkpointer(tmp_path, layout) as checkpointer:
        checkpointer.save(3).wait()
    expected_losses = run.train(4)
    again = Run(OPTIMIZERS[kind], seed=1)
    if trained:
        again.train(2)
    with again.checkpointer(tmp_path, layout) as checkpointer:
        resume = checkpointer.load_latest()
    assert resume is not None
    assert (resume.step, resume.verified, resume.passed_over) == (3, True, ())
    assert again.train(4) == expected_losses
    for name, value in run.tensors().items():
        assert torch.equal(again.tensors()[name], value), name
    assert run.optimizer.state_dict()["param_groups"] == again.optimizer.state_dict()["param_groups"]
    assert run.scheduler.state_dict() == again.scheduler.state_dict()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["AdamW", "AdamW fused", "AdamW foreach", "SGD momentum", "Adafactor"])
@pytest.mark.parametrize("form", ["channels_last", "transposed"])
def test_parameters_in_other_memory_formats_continue_bit_for_bit(
    tmp_path: Path, layout: str, kind: str, form: str
) -> None:
    """Fused kernels walk parameter and moments in memory order: the moments need the same strides."""

    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Conv2d(3, 4, 3)
        if form == "channels_last":
            model = model.to(memory_format=torch.channels_last)
        else:
            model.weight = nn.Parameter(torch.randn(3, 3, 3, 4).permute(3, 2, 0, 1))
        assert not model.weight.is_contiguous()
        return model, OPTIMIZERS[kind](model.parameters())

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 5, 5)).square().mean().backward()
            optimizer.step()

    model, optimizer = make(0)
    train(model, optimizer)
    with AsyncCheckpointer(tmp_path, model=model, optimizer=optimizer, layout=layout) as checkpointer:
        checkpointer.save(1).wait()
    train(model, optimizer)
    again, optimizer_again = make(1)
    with AsyncCheckpointer(tmp_path, model=again, optimizer=optimizer_again, layout=layout) as checkpointer:
        checkpointer.load_latest()
    train(again, optimizer_again)
    assert torch.equal(again.weight, model.weight)
    assert again.weight.stride() == model.weight.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_live_model_need_not_be_those_of_the_file(tmp_path: Path, layout: str) -> None:
    model = nn.Conv2d(3, 4, 3)
    with AsyncCheckpointer(tmp_path, model=model, layout=layout) as checkpointer:
        checkpointer.save(1).wait()
    live = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    address, stride = live.weight.data_ptr(), live.weight.stride()
    with AsyncCheckpointer(tmp_path, model=live, layout=layout) as checkpointer:
        checkpointer.load_latest()
    assert torch.equal(live.weight, model.weight)
    assert (live.weight.data_ptr(), live.weight.stride()) == (address, stride)


def test_moments_of_another_dtype_are_not_cast(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.randn(4, 4, dtype=torch.bfloat16))
    model = nn.ParameterDict({"w": parameter})
    optimizer = torch.optim.AdamW([parameter])
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, 4), "exp_avg_sq": torch.rand(4, 4)}
    optimizer.state[parameter] = dict(moments)
    for layout in LAYOUTS:
        with AsyncCheckpointer(
            tmp_path / layout, model=model, optimizer=optimizer, layout=layout
        ) as checkpointer:
            checkpointer.save(1).wait()
            optimizer.state.clear()
            checkpointer.load(1)
        for key, value in moments.items():
            assert optimizer.state[parameter][key].dtype == torch.float32
            assert torch.equal(optimizer.state[parameter][key], value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("container", [list, dict])
def test_several_optimizers_and_groups(tmp_path: Path, layout: str, container: type) -> None:
    def make() -> tuple[nn.Module, Any]:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        both = [
            torch.optim.AdamW([{"params": model[2].parameters(), "lr": 0.5}, {"params": [model[0].bias]}]),
            torch.optim.SGD([model[0].weight, *model[1].parameters()], lr=0.1, momentum=0.9),
        ]
        return model, both if container is list else {"dense": both[0], "rest": both[1]}

    def values(optimizers: Any) -> list[torch.optim.Optimizer]:
        return list(optimizers.values()) if isinstance(optimizers, dict) else optimizers

    model, optimizers = make()
    model(torch.randn(2, 3)).sum().backward()
    for optimizer in values(optimizers):
        optimizer.step()
    with AsyncCheckpointer(tmp_path, model=model, optimizer=optimizers, layout=layout) as checkpointer:
        checkpointer.save(1).wait()
    again, optimizers_again = make()
    with AsyncCheckpointer(tmp_path, model=again, optimizer=optimizers_again, layout=layout) as checkpointer:
        checkpointer.load_latest()
    for one, two in zip(values(optimizers), values(optimizers_again), strict=True):
        first, second = one.state_dict(), two.state_dict()
        assert first["param_groups"] == second["param_groups"]
        assert first["state"].keys() == second["state"].keys()
        for index, state in first["state"].items():
            for key, value in state.items():
                assert torch.equal(second["state"][index][key], value)


def test_loading_makes_optimizer_state_without_stepping(tmp_path: Path) -> None:
    run = Run(OPTIMIZERS["AdamW"])
    run.train(2)
    with run.checkpointer(tmp_path, "dcp") as checkpointer:
        checkpointer.save(1).wait()
    again = Run(OPTIMIZERS["AdamW"], seed=1)
    fired: list[str] = []
    again.optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    again.optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    again.model.register_forward_pre_hook(lambda *_: fired.append("forward"))
    grads = torch.randn(8, 6)
    again.model[0].weight.grad = grads  # torch's own way does nothing where a gradient exists
    addresses = [p.data_ptr() for p in again.model.parameters()]
    with again.checkpointer(tmp_path, "dcp") as checkpointer:
        checkpointer.load_latest()
    assert fired == []
    assert again.model[0].weight.grad is grads
    assert addresses == [p.data_ptr() for p in again.model.parameters()]
    for mine, theirs in zip(again.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert again.optimizer.state.get(mine, {}).keys() == run.optimizer.state.get(theirs, {}).keys()


class Buffers(nn.Module):
    """One buffer, as awkward as may be."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 1, 3, 1, 2)])
@pytest.mark.parametrize("as_parameter", [False, True])
def test_shapes(tmp_path: Path, layout: str, shape: tuple[int, ...], as_parameter: bool) -> None:
    value = torch.randn(shape)
    model = nn.ParameterDict({"v": nn.Parameter(value.clone())}) if as_parameter else Buffers(value.clone())
    with AsyncCheckpointer(tmp_path, model=model, layout=layout) as checkpointer:
        checkpointer.save(1).wait()
        with torch.no_grad():
            next(iter(model.state_dict().values())).fill_(7)
        checkpointer.load(1)
    assert torch.equal(next(iter(model.state_dict().values())), value)


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.uint8, torch.int8, torch.int16,
    torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype(tmp_path: Path, layout: str) -> None:
    torch.manual_seed(0)
    raw = {str(dtype): torch.randint(0, 2, (4, 6 * dtype.itemsize), dtype=torch.uint8) for dtype in DTYPES}
    model = nn.Module()
    for name, dtype in zip(raw, DTYPES, strict=True):
        model.register_buffer(name.replace("torch.", "of_"), raw[name].clone().view(dtype))
    with AsyncCheckpointer(tmp_path, model=model, layout=layout) as checkpointer:
        checkpointer.save(1).wait()
        for buffer in model.buffers():
            buffer.view(torch.uint8).zero_()
        checkpointer.load(1)
    for (name, value), buffer, dtype in zip(raw.items(), model.buffers(), DTYPES, strict=True):
        assert buffer.dtype == dtype
        assert torch.equal(buffer.view(torch.uint8), value), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_buffer_that_repeats_its_elements(tmp_path: Path, layout: str) -> None:
    model = Buffers(torch.arange(3.0).expand(4, 3))
    with AsyncCheckpointer(tmp_path, model=model, layout=layout) as checkpointer:
        checkpointer.save(1).wait()
        model.value.as_strided((3,), (1,)).zero_()
        checkpointer.load(1)
    assert torch.equal(model.value, torch.arange(3.0).expand(4, 3))


# ---------------------------------------------------------------------------- stock tools read ours


def stateful_run(root: Path, layout: str) -> Run:
    run = Run(OPTIMIZERS["AdamW"])
    run.train(2)
    with run.checkpointer(root, layout) as checkpointer:
        checkpointer.save(10).wait()
    return run


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_stock_dcp_reads_every_leaf_of_ours(tmp_path: Path) -> None:
    run = stateful_run(tmp_path / "ours", "dcp")
    step = tmp_path / "ours" / "step-10"
    dcp_to_torch_save(step, tmp_path / "all.pt")
    tree = torch.load(tmp_path / "all.pt", weights_only=False)
    assert tree["step"] == 10
    assert tree["lr_scheduler"] == run.scheduler.state_dict()
    assert tree["dataloader"]["position"] == run.sampler.position
    assert torch.equal(tree["dataloader"]["order"], run.sampler.order)
    target = {
        "model": {name: torch.zeros_like(value) for name, value in run.tensors().items()},
        "optimizer": get_optimizer_state_dict(run.model, run.optimizer),
    }
    expected = pickle.loads(pickle.dumps(target["optimizer"]["state"]))
    for state in target["optimizer"]["state"].values():
        for value in state.values():
            value.zero_()
    torch.distributed.checkpoint.load(target, checkpoint_id=step, no_dist=True)
    for name, value in run.tensors().items():
        assert torch.equal(target["model"][name], value)
        assert torch.equal(tree["model"][name], value)
    for name, state in expected.items():
        for key, value in state.items():
            assert torch.equal(target["optimizer"]["state"][name][key], value)
            assert torch.equal(tree["optimizer"]["state"][name][key], value)


def test_stock_torch_and_optimizers_read_our_megatron_file(tmp_path: Path) -> None:
    run = stateful_run(tmp_path, "megatron")
    tree = torch.load(tmp_path / "iter_0000010/mp_rank_00/model_optim_rng.pt", weights_only=False)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "10"
    assert tree["iteration"] == 10
    assert tree["checkpoint_version"] == 3.0
    again = Run(OPTIMIZERS["AdamW"], seed=1)
    again.model.load_state_dict(tree["model"])
    again.optimizer.load_state_dict(tree["optimizer"])
    again.scheduler.load_state_dict(tree["opt_param_scheduler"])
    again.sampler.load_state_dict(tree["dataloader"])
    (rng,) = tree["rng_state"]
    random.setstate(rng["random_rng_state"])
    np.random.set_state(rng["np_rng_state"])  # noqa: NPY002
    torch.set_rng_state(rng["torch_rng_state"])
    continued = again.train(3)
    with run.checkpointer(tmp_path, "megatron") as checkpointer:
        checkpointer.load_latest()
    assert run.train(3) == continued


# ---------------------------------------------------------------------------- we read what stock wrote


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("strict", [False, True])
def test_what_stock_dcp_wrote(tmp_path: Path, strict: bool, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(OPTIMIZERS["AdamW"])
    run.train(2)
    torch.distributed.checkpoint.save(
        {"model": run.model.state_dict(), "optimizer": get_optimizer_state_dict(run.model, run.optimizer)},
        checkpoint_id=tmp_path / "step-10",
        no_dist=True,
    )
    again = Run(OPTIMIZERS["AdamW"], seed=1)
    with AsyncCheckpointer(
        tmp_path, model=again.model, optimizer=again.optimizer, save_rng=not strict
    ) as checkpointer:
        with caplog.at_level(logging.WARNING):
            resume = checkpointer.load_latest(strict=strict)
        assert resume is not None
        assert resume.step == 10
        assert not resume.verified
        assert "unverified" in caplog.text
        checkpointer.save(11).wait()
        assert checkpointer.steps() == [10, 11]
    for mine, theirs in zip(again.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for key, value in run.optimizer.state.get(theirs, {}).items():
            assert torch.equal(again.optimizer.state[mine][key], value)
    assert again.optimizer.param_groups[0]["lr"] == run.optimizer.param_groups[0]["lr"]


def test_what_megatron_wrote(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(OPTIMIZERS["AdamW"])
    run.train(2)
    path = tmp_path / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    rng = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),  # noqa: NPY002
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
        "rng_tracker_states": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
    }
    tree = {
        "args": argparse.Namespace(num_layers=2, hidden_size=8),
        "checkpoint_version": 3.0,
        "iteration": 10,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "opt_param_scheduler": run.scheduler.state_dict(),
        "rng_state": [rng],
        "num_floating_point_operations_so_far": 123,
    }
    torch.save(tree, path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    expected = torch.randn(4)
    again = Run(OPTIMIZERS["AdamW"], seed=1)
    with AsyncCheckpointer(
        tmp_path,
        model=again.model,
        optimizer=again.optimizer,
        lr_scheduler=again.scheduler,
        layout="megatron",
    ) as checkpointer:
        with caplog.at_level(logging.WARNING):
            resume = checkpointer.load_latest(strict=False)
        assert resume is not None
        assert (resume.step, resume.verified) == (10, False)
        assert "unverified" in caplog.text
        assert torch.equal(torch.randn(4), expected)
    for mine, theirs in zip(again.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for key, value in run.optimizer.state.get(theirs, {}).items():
            assert torch.equal(again.optimizer.state[mine][key], value)
    assert again.scheduler.state_dict() == run.scheduler.state_dict()


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_class_that_is_not_known_needs_trust(tmp_path: Path, layout: str) -> None:
    extra: dict[str, Any] = {"config": argparse.Namespace(width=3), "epoch": 4}
    weight = nn.Linear(2, 2)
    with AsyncCheckpointer(tmp_path, model=weight, extra=extra, layout=layout) as checkpointer:
        checkpointer.save(1).wait()
        before = weight.weight.detach().clone().zero_()
        with torch.no_grad():
            weight.weight.zero_()
        extra.update(config=None, epoch=None)
        with pytest.raises(UntrustedError, match=r"extra\.config.*Namespace.*trusted=True"):
            checkpointer.load_latest()
        assert extra == {"config": None, "epoch": None}
        assert torch.equal(weight.weight, before)
        checkpointer.load_latest(trusted=True)
    assert extra == {"config": argparse.Namespace(width=3), "epoch": 4}
    assert bool(weight.weight.any())


def test_every_mismatch_is_listed_and_nothing_changes(tmp_path: Path) -> None:
    def make(width: int, names: str) -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(width, 2) for name in names})

    with AsyncCheckpointer(tmp_path, model=make(3, "abc"), extra={"x": 1}) as checkpointer:
        checkpointer.save(1).wait()
    model = make(4, "abd").double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with AsyncCheckpointer(tmp_path, model=model, extra={"y": 2}) as checkpointer:
        with pytest.raises(MismatchError) as caught:
            checkpointer.load_latest()
        text = str(caught.value)
        for expected in (
            "model.a.weight: float64[2, 4] here, float32[2, 3]", "model.b.bias: float64[2] here",
            "model.c.weight: only in", "model.d.bias: not in", "extra.x: only in", "extra.y: not in",
        ):  # fmt: skip
            assert expected in text
        assert len(caught.value.differences) == 10
        checkpointer.save(2)  # nothing was overwritten, so saving is allowed
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_strict_false_takes_what_both_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    with AsyncCheckpointer(tmp_path, model=full) as checkpointer:
        checkpointer.save(1).wait()
    part = nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    untouched = part["c"].weight.detach().clone()
    with AsyncCheckpointer(tmp_path, model=part) as checkpointer:
        checkpointer.load_latest(strict=False)
    assert torch.equal(part["a"].weight, full["a"].weight)
    assert torch.equal(part["c"].weight, untouched)
    assert "model.c.weight" in caplog.text
    assert "model.b.weight" in caplog.text


def test_optimizer_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    def make(width: int) -> torch.optim.Optimizer:
        return torch.optim.Adam([nn.Parameter(torch.ones(width, width))])

    optimizer = make(4)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4, 4)
    optimizer.step()
    with AsyncCheckpointer(tmp_path, optimizer=optimizer) as checkpointer:
        checkpointer.save(1).wait()
    with (
        AsyncCheckpointer(tmp_path, optimizer=make(8)) as checkpointer,
        pytest.raises(MismatchError, match="exp_avg"),
    ):
        checkpointer.load_latest()


# ---------------------------------------------------------------------------- damage


def data_file(root: Path, layout: str, step: int) -> Path:
    name = (
        f"step-{step}/__0_0.distcp" if layout == "dcp" else f"iter_{step:07d}/mp_rank_00/model_optim_rng.pt"
    )
    return root / name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_flipped_bit_is_found_and_verify_before_touches_nothing(tmp_path: Path, layout: str) -> None:
    model, extra = nn.Linear(16, 16), {"values": [1, 2, 3]}
    with AsyncCheckpointer(tmp_path, model=model, extra=extra, layout=layout) as checkpointer:
        checkpointer.save(1).wait()
        path = data_file(tmp_path, layout, 1)
        good = path.read_bytes()
        before = torch.get_rng_state()
        with torch.no_grad():
            model.weight.zero_()
        places = random.Random(0).sample(range(len(good)), 60)
        for place in (0, len(good) - 1, *places):
            damaged = bytearray(good)
            damaged[place] ^= 1 << (place % 8)
            path.write_bytes(bytes(damaged))
            with pytest.raises(CorruptStepError) as caught:
                checkpointer.load(1, verify="before")
            assert caught.value.path == str(path)
            assert caught.value.block == 0
            assert not model.weight.any()
            assert torch.equal(torch.get_rng_state(), before)
        path.write_bytes(good)
        checkpointer.load(1, verify="before")
        assert model.weight.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("damage", ["flip", "truncate", "append", "delete", "manifest"])
def test_the_newest_good_step_is_loaded(
    tmp_path: Path, layout: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(4, 4)
    with AsyncCheckpointer(tmp_path, model=model, layout=layout) as checkpointer:
        for step in (1, 2):
            with torch.no_grad():
                model.weight.fill_(step)
            checkpointer.save(step).wait()
        path = data_file(tmp_path, layout, 2)
        data = path.read_bytes()
        if damage == "flip":
            path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
        elif damage == "truncate":
            path.write_bytes(data[:-1])
        elif damage == "append":
            path.write_bytes(data + b"\0")
        elif damage == "delete":
            path.unlink()
        else:
            step_directory = tmp_path / path.relative_to(tmp_path).parts[0]
            (manifest,) = (
                p for p in step_directory.glob("*.json") if "rank" not in p.name and "0" not in p.name
            )
            data = manifest.read_bytes()
            manifest.write_bytes(data.replace(b'"step":2', b'"step":3').replace(b'"step": 2', b'"step": 3'))
            assert manifest.read_bytes() != data
        resume = checkpointer.load_latest()
        assert resume is not None
        assert resume.step == 1
        assert len(resume.passed_over) == 1
        assert "step 2" in resume.passed_over[0]
        assert "step 2 is passed over" in caplog.text
    assert bool((model.weight == 1).all())


def test_nothing_good_raises_and_saving_is_refused_until_a_load_succeeds(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    with AsyncCheckpointer(tmp_path, model=model) as checkpointer:
        checkpointer.save(1).wait()
        path = data_file(tmp_path, "dcp", 1)
        good = path.read_bytes()
        path.write_bytes(bytes(len(good)))
        with pytest.raises(NoIntactStepError, match="step 1"):
            checkpointer.load_latest()
        with pytest.raises(LoadError, match="refused until a load succeeds"):
            checkpointer.save(2)
        path.write_bytes(good)
        checkpointer.load_latest()
        checkpointer.save(2).wait()


def test_a_load_that_fails_halfway_refuses_saves(tmp_path: Path) -> None:
    class Moody:
        angry = False

        def state_dict(self) -> dict[str, int]:
            return {"a": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            if self.angry:
                raise RuntimeError("not now")

    moody = Moody()
    with AsyncCheckpointer(tmp_path, model=nn.Linear(2, 2), dataloader=moody) as checkpointer:
        checkpointer.save(1).wait()
        moody.angry = True
        with pytest.raises(RuntimeError, match="not now"):
            checkpointer.load_latest()
        with pytest.raises(LoadError, match="refused"):
            checkpointer.save(2)
        moody.angry = False
        checkpointer.load_latest()
        checkpointer.save(2).wait()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES])
@pytest.mark.parametrize("where", ["parsing", "reading"])
def test_what_this_process_may_not_do_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    """Falling back to an older step would not help, and would lose the newer one's work."""
    extra = {"weight": torch.ones(64)}
    with AsyncCheckpointer(tmp_path, extra=extra) as checkpointer:
        checkpointer.save(1).wait()
        checkpointer.save(2).wait()
        refused: list[Any] = []
        if where == "parsing":

            def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
                if not str(path).endswith(".metadata"):
                    return opened(path, *args, **kwargs)
                refused.append(path)
                raise OSError(number, os.strerror(number))

            opened = os.open
            monkeypatch.setattr(restore.os, "open", refuse)
        else:
            _native.faults.arm(_native.faults.Op.open, 0, _native.faults.Kind.error, number)
        with pytest.raises(LoadError, match=os.strerror(number)) as caught:
            checkpointer.load_latest()
        assert refused or _native.faults.hits(_native.faults.Op.open) == 1
        monkeypatch.undo()
        _native.faults.disarm()
        assert type(caught.value) is LoadError
        resume = checkpointer.load_latest()
        assert resume is not None
        assert resume.step == 2


_NO_MORE_THREADS = """
import resource, sys
import torch
from asyncckpt import AsyncCheckpointer, restore
from asyncckpt.errors import LoadError
extra = {"weight": torch.ones(16 << 20)}  # more blocks than there are threads
with AsyncCheckpointer(sys.argv[1], extra=extra, host_memory=64 << 20, layout=sys.argv[2]) as checkpointer:
    checkpointer.save(1).wait()
    checkpointer.save(2).wait()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        resource.setrlimit(resource.RLIMIT_AS, (int(statm.read().split()[0]) * 4096 + (20 << 20), limits[1]))
    try:
        checkpointer.load_latest()
    except LoadError as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert f"with {restore._threads()} threads" in said and "raise what this process may use" in said, said
    assert checkpointer.load_latest().step == 2
"""


@pytest.mark.parametrize("layout", ["dcp", "megatron"])
def test_threads_that_cannot_be_had_are_no_damage(tmp_path: Path, layout: str) -> None:
    """There is no room for the stacks of all."""
    command = [sys.executable, "-c", _NO_MORE_THREADS, str(tmp_path), layout]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
@pytest.mark.parametrize("name", ["asyncckpt_manifest.json", "asyncckpt_rank_00000.json"])
def test_a_manifest_that_this_process_may_not_open_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    with AsyncCheckpointer(tmp_path, extra={"weight": torch.ones(64)}) as checkpointer:
        checkpointer.save(1).wait()
        checkpointer.save(2).wait()
        read = checkpointer._root.fs.read

        def refuse(path: Path) -> bytes:
            if path.name == name and path.parent.name == "step-2":
                raise OSError(number, os.strerror(number), str(path))
            return read(path)

        monkeypatch.setattr(checkpointer._root.fs, "read", refuse)
        with pytest.raises(LoadError, match=os.strerror(number)) as caught:
            checkpointer.load_latest()
        assert type(caught.value) is LoadError
        monkeypatch.undo()
        resume = checkpointer.load_latest()
        assert resume is not None
        assert resume.step == 2
