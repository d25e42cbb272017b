"""integrations.megatron_lm, over a stand-in of Megatron-LM's training loop: megatron-core has none."""

from __future__ import annotations

import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from asyncckpt.integrations import megatron_lm
from tests.megatron_ranks import Job, Layout, megatron, stock_load_checkpoint, stock_save_checkpoint
from tests.process_world import Talk, World, process_world

RANKS = 4
LAYOUT = Layout(tensor=2)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


@contextmanager
def megatron_training(job: Job, settings: Namespace) -> Iterator[types.ModuleType]:
    """Modules with the names and functions of Megatron-LM's, that save and load as it does."""

    def save_checkpoint(  # the arguments of the real one, as far as they are looked at
        iteration: int,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        num_floating_point_operations_so_far: int,
        checkpointing_context: Any = None,
        non_persistent_ckpt: bool = False,
        release: bool = False,
    ) -> None:
        stock_save_checkpoint(job, Path(settings.save))

    def load_checkpoint(*args: Any, **kwargs: Any) -> tuple[int, int]:
        if not (Path(settings.load) / "latest_checkpointed_iteration.txt").exists():
            return 0, 0
        stock_load_checkpoint(job, Path(settings.load))
        return job.iteration, 7

    def maybe_finalize_async_save(blocking: bool = False, terminate: bool = False) -> None:
        settings.finalized = (blocking, terminate)

    microbatches: dict[str, Any] = {}
    package = types.ModuleType("megatron.training")
    checkpointing = types.ModuleType("megatron.training.checkpointing")
    async_utils = types.ModuleType("megatron.training.async_utils")
    training = types.ModuleType("megatron.training.training")
    async_utils.__dict__["maybe_finalize_async_save"] = maybe_finalize_async_save
    checkpointing.__dict__.update(
        get_args=lambda: settings,
        save_checkpoint=save_checkpoint,
        load_checkpoint=load_checkpoint,
        set_checkpoint_version=lambda version: setattr(settings, "version", version),
        update_num_microbatches=lambda **kwargs: microbatches.update(kwargs),
    )
    package.__dict__.update(checkpointing=checkpointing, async_utils=async_utils, training=training)
    training.__dict__.update(  # it imports them by name
        save_checkpoint=save_checkpoint,
        load_checkpoint=load_checkpoint,
        maybe_finalize_async_save=maybe_finalize_async_save,
        microbatches=microbatches,
    )
    modules = {m.__name__: m for m in (package, checkpointing, async_utils, training)}
    sys.modules.update(modules)
    try:
        yield training
    finally:
        for name in modules:
            del sys.modules[name]


def settings_of(job: Job, save: Path, load: Path | None = None, **more: Any) -> Namespace:
    values = {**vars(job._args(40)), "save": str(save), "load": str(load or save), **more}
    return Namespace(**values)


OPTIONS = {"host_memory": 8 << 20, "rank_timeout_s": 30, "fence_timeout_s": 60}


def train_and_resume(talk: Talk, rank: int, root: Path) -> list[Any]:
    with megatron(LAYOUT):
        job = Job(LAYOUT)
        settings = settings_of(job, root)
        found: list[Any] = []
        with megatron_training(job, settings) as training:
            stock = training.save_checkpoint
            installed = megatron_lm.install(**OPTIONS)
            found.append(training.load_checkpoint(job.chunks, job.optimizer, job.scheduler))
            for number in range(2):
                job.train_step(number)
            training.save_checkpoint(2, job.chunks, job.optimizer, job.scheduler, 12345)
            losses = [job.train_step(number) for number in range(2, 4)]
            training.maybe_finalize_async_save(blocking=True, terminate=True)
            found.append(settings.finalized)
            installed.uninstall()
            assert training.save_checkpoint is stock

        fresh = Job(LAYOUT, seed=2)
        settings = settings_of(fresh, root, consumed_train_samples=0)
        settings.consumed_train_samples = 0
        with megatron_training(fresh, settings) as training:
            installed = megatron_lm.install(**OPTIONS)
            found.append(training.load_checkpoint(fresh.chunks, fresh.optimizer, fresh.scheduler))
            assert [fresh.train_step(number) for number in range(2, 4)] == losses
            found += [settings.consumed_train_samples, settings.version, training.microbatches]
            training.save_checkpoint(4, fresh.chunks, fresh.optimizer, fresh.scheduler, 23456)
            installed.uninstall()
        return found


def test_the_loop_saves_and_resumes_bit_for_bit(world: World, tmp_path: Path) -> None:
    for found in world.run(RANKS, train_and_resume, tmp_path):
        assert found == [
            (0, 0), (True, True), (2, 12345), 40, 3.0, {"consumed_samples": 40, "verbose": True},
        ]  # fmt: skip
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert {path.name for path in tmp_path.glob("iter_*")} == {"iter_0000002", "iter_0000004"}


def go_on_from_stock(talk: Talk, rank: int, root: Path) -> tuple[Any, Any]:
    with megatron(LAYOUT):
        job = Job(LAYOUT)
        job.train_step(0)
        stock_save_checkpoint(job, root)
        fresh = Job(LAYOUT, seed=2)
        with megatron_training(fresh, settings_of(fresh, root)) as training:
            installed = megatron_lm.install(**OPTIONS)
            loaded = training.load_checkpoint(fresh.chunks, fresh.optimizer, fresh.scheduler)
            fresh.train_step(1)
            training.save_checkpoint(2, fresh.chunks, fresh.optimizer, fresh.scheduler, 1)
            installed.uninstall()
        dist.barrier()
        again = Job(LAYOUT, seed=3)
        stock_load_checkpoint(again, root)
        return loaded, again.iteration


def test_a_tree_of_megatrons_own_is_loaded_by_megatron_and_gone_on_with_by_us(
    world: World, tmp_path: Path
) -> None:
    assert world.run(RANKS, go_on_from_stock, tmp_path) == [((1, 7), 2)] * RANKS


def leave_to_stock(talk: Talk, rank: int, root: Path) -> bool:
    """Formats that are not ours go to Megatron's code, and so does what is not a usual save."""
    with megatron(LAYOUT):
        job = Job(LAYOUT)
        job.train_step(0)
        for more, kwargs in (
            ({"ckpt_format": "fsdp_dtensor"}, {}),
            ({"no_save_optim": True}, {}),
            ({}, {"non_persistent_ckpt": True}),
            ({}, {"checkpointing_context": {}, "release": True}),
        ):
            with megatron_training(
                job, settings_of(job, root / str(len(more) + len(kwargs)), **more)
            ) as training:
                installed = megatron_lm.install(**OPTIONS)
                training.save_checkpoint(1, job.chunks, job.optimizer, job.scheduler, 1, **kwargs)
                assert not installed._checkpointers
                installed.uninstall()
        return not list(root.rglob("asyncckpt_*"))


def test_what_is_not_ours_goes_to_megatron(world: World, tmp_path: Path) -> None:
    assert world.run(2, leave_to_stock, tmp_path) == [True, True]


def test_without_megatron_lm_it_says_so() -> None:
    with pytest.raises(ImportError):
        megatron_lm.install()
