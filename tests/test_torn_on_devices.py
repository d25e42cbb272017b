"""The suite of torn states once more, with the state on CUDA devices: over the driver double.

Every test of `test_torn` runs again; what is handed to a checkpointer moves to a device first. And again with
all that is tiny packed there: whatever tears, tears as well, and is told in the same words.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncckpt import AsyncCheckpointer, capture, devices, kernels, packing
from tests import test_torn as suite
from tests.cuda_double import Double
from tests.fake_cuda import FakeCuda
from tests.gather_on_cpu import DoubleGatherer
from tests.test_torn import *  # noqa: F403 -- all of its tests and fixtures


def move(world: FakeCuda, value: Any) -> None:
    """Parameters, buffers and optimizer state to the device, in place; the host keeps 0-d step counters."""
    if isinstance(value, torch.nn.Module):
        world.module_to(value)
    elif isinstance(value, torch.optim.Optimizer):
        for group in value.param_groups:
            for param in group["params"]:
                param.data = world.to_device(param.data)
                if param.grad is not None:
                    param.grad = world.to_device(param.grad)
            for param in group["params"]:
                state = value.state.get(param, {})
                for key, item in state.items():
                    if isinstance(item, torch.Tensor) and (item.dim() or group.get("fused")):
                        state[key] = world.to_device(item)
    elif isinstance(value, dict):
        for item in value.values():
            move(world, item)


@pytest.fixture(autouse=True, params=["plain", "packed"])
def world(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[FakeCuda]:
    double = Double()
    double.reset(seed=len(request.node.name), delay_us_max=50)
    with FakeCuda(double) as world:
        gatherer = DoubleGatherer(world)
        monkeypatch.setattr(kernels, "gatherer", lambda: gatherer)
        monkeypatch.setattr(packing, "TENSORS_MIN", 2)
        construct = AsyncCheckpointer.__init__

        def placed(self: AsyncCheckpointer, root: Path, **options: Any) -> None:
            for name in ("model", "optimizer", "extra"):
                move(world, options.get(name))
            construct(self, root, pack="always" if request.param == "packed" else "never", **options)

        monkeypatch.setattr(AsyncCheckpointer, "__init__", placed)
        run = threading.Thread.run

        def run_in_the_world(thread: threading.Thread) -> None:
            if thread.name.startswith("asyncckpt"):
                run(thread)
            else:
                with world.on_this_thread():
                    run(thread)

        monkeypatch.setattr(threading.Thread, "run", run_in_the_world)
        monkeypatch.setattr(devices, "seam", world)
        monkeypatch.setattr(suite, "ROUNDS", 20)  # kernels of the double are slow
        yield world
    double.reset()


@pytest.mark.parametrize("layout", suite.LAYOUTS)
def test_packed_means_packed(tmp_path: Path, layout: str, request: pytest.FixtureRequest) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))
    with AsyncCheckpointer(tmp_path, model=model, layout=layout) as checkpointer:
        packed = checkpointer.save(1).wait().packed
    assert packed == (4 if "packed" in request.node.callspec.params.values() else 0)


# ---------------------------------------------------------------------------- what differs


@pytest.mark.parametrize("layout", suite.LAYOUTS)
@pytest.mark.parametrize("by", ["data", "kernel"])
def test_writes_that_no_counter_sees_are_caught_by_the_full_guard(
    tmp_path: Path, layout: str, by: str, world: FakeCuda
) -> None:
    def write(tensor: torch.Tensor) -> None:
        if by == "data":
            suite.write_through_data(tensor)
        else:
            world.kernel(lambda alias: alias.add_(1), tensor)
        world.synchronize()  # it has happened before the first copy

    suite.test_writes_that_no_counter_sees_are_caught_by_the_full_guard(tmp_path, layout, write)


@pytest.mark.parametrize("layout", suite.LAYOUTS)
def test_buffers_beyond_the_reserve_are_fenced_before_the_next_forward(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "_DEVICE_NBYTES_MAX", 8 << 10)
    suite.test_buffers_beyond_the_reserve_are_fenced_before_the_next_forward(tmp_path, layout)


# These say nothing of devices: torch pickles through raw memory, and traces nothing in a dispatch mode;
# and whether a write that nobody sees comes before a copy, only the order of streams decides.
del test_what_the_version_guard_is_documented_not_to_see  # noqa: F821
del test_a_model_can_still_be_pickled_and_copied  # noqa: F821
del test_a_compiled_step_is_fenced_and_compiles_once  # noqa: F821
del test_a_model_compiles_into_one_graph_while_it_is_checkpointed  # noqa: F821
