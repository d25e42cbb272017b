"""integrations.megatron_lm, over a stand-in of Megatron-LM's training loop: megatron-core has none."""

from __future__ import annotations

import errno
import logging
import os
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from asyncckpt import _native
from asyncckpt.errors import CheckpointError, OptionError
from asyncckpt.integrations import megatron_lm
from tests.megatron_ranks import Job, Layout, megatron, stock_load_checkpoint, stock_save_checkpoint
from tests.process_world import Talk, World, process_world

RANKS = 4
LAYOUT = Layout(tensor=2)
faults = _native.faults


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
        train_data_iterator: Any = None,
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


def train_and_resume(talk: Talk, rank: int, root: Path, ckpt_format: str) -> list[Any]:
    with megatron(LAYOUT):
        job = Job(LAYOUT)
        settings = settings_of(job, root, ckpt_format=ckpt_format)
        found: list[Any] = []
        warned: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("asyncckpt").addHandler(handler)
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
        assert not [line for line in warned if "trusted" in line]  # Megatron's args are not for our load

        fresh = Job(LAYOUT, seed=2)
        settings = settings_of(fresh, root, consumed_train_samples=0, ckpt_format=ckpt_format)
        with megatron_training(fresh, settings) as training:
            installed = megatron_lm.install(**OPTIONS)
            found.append(training.load_checkpoint(fresh.chunks, fresh.optimizer, fresh.scheduler))
            assert [fresh.train_step(number) for number in range(2, 4)] == losses
            found += [settings.consumed_train_samples, settings.version, training.microbatches]
            training.save_checkpoint(4, fresh.chunks, fresh.optimizer, fresh.scheduler, 23456)
            installed.uninstall()
        return found


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_the_loop_saves_and_resumes_bit_for_bit(world: World, tmp_path: Path, ckpt_format: str) -> None:
    for found in world.run(RANKS, train_and_resume, tmp_path, ckpt_format):
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
            ({"ckpt_format": "torch_dist", "use_distributed_optimizer": False}, {}),
            ({"no_save_optim": True}, {}),
            ({"dataloader_save": "elsewhere"}, {"train_data_iterator": None}),
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


def install_twice(talk: Talk, rank: int, root: Path) -> None:
    with megatron(LAYOUT):
        job = Job(LAYOUT)
        with megatron_training(job, settings_of(job, root)) as training:
            stock = training.save_checkpoint
            sys.modules["blocked"] = None  # type: ignore[assignment]  # how python marks what must not be imported
            installed = megatron_lm.install(**OPTIONS)
            with pytest.raises(OptionError, match="called already"):
                megatron_lm.install()
            installed.uninstall()
            assert training.save_checkpoint is stock
            megatron_lm.install(**OPTIONS).uninstall()
            del sys.modules["blocked"]


def test_a_second_install_is_refused(world: World, tmp_path: Path) -> None:
    world.run(2, install_twice, tmp_path)


def one_directory_in_two_spellings(talk: Talk, rank: int, root: Path) -> list[Any]:
    """Saves into a relative path what it loads from an absolute one; the last save comes after the drain."""
    with megatron(LAYOUT):
        job = Job(LAYOUT)
        os.chdir(root)
        if rank == 0:
            (root / "link").symlink_to("ckpt")
        found: list[Any] = []
        load: Path | None
        for load, first in ((None, 0), (root / "none", 0), (root / "ckpt", 2), (root / "link", 5)):
            settings = settings_of(job, Path("ckpt"))
            settings.load = load and str(load)
            with megatron_training(job, settings) as training:
                installed = megatron_lm.install(**OPTIONS)
                if load is None or load.name == "none":
                    training.__dict__["load_checkpoint"].__self__._stock_load = lambda *a, **k: (0, 0)
                found.append(training.load_checkpoint(job.chunks, job.optimizer, job.scheduler, strict=True))
                job.train_step(first)
                if load is not None:
                    given = (job.chunks, job.optimizer, job.scheduler, first)
                    training.save_checkpoint(first + 2, *given, {}, train_data_iterator=None)
                    training.maybe_finalize_async_save(blocking=True, terminate=True)
                    training.save_checkpoint(first + 3, *given, {})
                    training.maybe_finalize_async_save(blocking=True, terminate=True)
                assert not installed._checkpointers
                installed.uninstall()
            dist.barrier()
        return found


def test_one_directory_may_be_spelled_in_two_ways(world: World, tmp_path: Path) -> None:
    found = world.run(2, one_directory_in_two_spellings, tmp_path)
    assert found == [[(0, 0), (0, 0), (3, 0), (5, 2)]] * 2
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == "8"


def save_that_fails(talk: Talk, rank: int, root: Path, where: str) -> list[str]:
    """What is heard, and where, of a save whose disk is full on rank 1."""
    with megatron(LAYOUT):
        job = Job(LAYOUT)
        job.train_step(0)
        said = []
        with megatron_training(job, settings_of(job, root)) as training:
            stock = training.save_checkpoint
            installed = megatron_lm.install(**OPTIONS)
            given = (job.chunks, job.optimizer, job.scheduler, 1)
            training.save_checkpoint(1, *given)
            installed._checkpointers[os.path.realpath(root)].wait()
            if rank == 1:
                faults.arm(faults.Op.pwrite, 0, faults.Kind.error, errno.ENOSPC)
            training.save_checkpoint(2, *given)
            try:
                if where == "later save":
                    for step in (3, 4, 5):
                        training.save_checkpoint(step, *given)
                elif where == "end":
                    training.maybe_finalize_async_save(blocking=True, terminate=True)
                else:
                    installed.uninstall()
            except CheckpointError as error:
                said.append(str(error))
            faults.disarm()
            installed.uninstall()
            assert training.save_checkpoint is stock
            assert not installed._checkpointers
        return said


@pytest.mark.parametrize("where", ["later save", "end", "uninstall"])
def test_training_hears_of_a_save_that_failed(world: World, tmp_path: Path, where: str) -> None:
    for said in world.run(2, save_that_fails, tmp_path, where):
        assert len(said) == 1
        assert "No space left" in said[0] or "ENOSPC" in said[0]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() in ("1", "3")


def load_unreadable(talk: Talk, rank: int, root: Path) -> str:
    with megatron(LAYOUT):
        job = Job(LAYOUT)
        (root / "file").touch()
        with megatron_training(job, settings_of(job, root / "file")) as training:
            installed = megatron_lm.install(**OPTIONS)
            try:
                training.load_checkpoint(job.chunks, job.optimizer, job.scheduler)
            except CheckpointError as error:
                return str(error)
            finally:
                installed.uninstall()
    return ""


def test_a_directory_that_cannot_be_read_is_said_by_all(world: World, tmp_path: Path) -> None:
    assert all("cannot be listed" in said for said in world.run(2, load_unreadable, tmp_path))


def test_without_megatron_lm_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))  # of megatron, this process keeps nothing
    with pytest.raises(ImportError):
        megatron_lm.install()
