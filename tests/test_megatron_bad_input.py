"""integrations.megatron over trees that are damaged, garbled or another job's, and under a hostile caller."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from asyncckpt import _native
from asyncckpt.errors import CheckpointError
from tests.megatron_ranks import MODEL_FILE, OPTIMIZER_FILE, TRACKER, Job, Layout, megatron
from tests.megatron_ranks import stock_save_checkpoint as stock_save
from tests.process_world import Talk, World, process_world
from tests.test_megatron import checkpointer_of, records_of, same, save_ours_load_stock, trained

RANKS = 4
STEP = 2
faults = _native.faults


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


Damage = Callable[[Path], None]  # of a step's directory


def edit(name: str, change: Callable[[Any], Any]) -> Damage:
    """Change what a file of torch.save holds: in place, or into what `change` returns."""

    def do(step: Path) -> None:
        value = torch.load(step / name, weights_only=False)
        changed = change(value)
        torch.save(value if changed is None else changed, step / name)

    return do


def put(keys: tuple[Any, ...], new: Any) -> Callable[[Any], None]:
    """Another value at a path of keys; of what was there, if `new` is a function."""

    def do(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = new(value[keys[-1]]) if callable(new) else new

    return do


def without(*keys: Any) -> Callable[[Any], None]:
    def do(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        del value[keys[-1]]

    return do


def tracker(text: str) -> Damage:
    def do(step: Path) -> None:
        (step.parent / TRACKER).write_text(text)

    return do


def cut(name: str) -> Damage:
    def do(step: Path) -> None:
        (step / name).write_bytes((step / name).read_bytes()[:-5000])

    return do


MODEL, OPTIMIZER = f"mp_rank_01/{MODEL_FILE}", f"mp_rank_01/{OPTIMIZER_FILE}"
FLAT = (0, (torch.bfloat16, torch.float32))
GROUPS = ("optimizer", "optimizer", "param_groups")

# Of a tree that Megatron wrote: what is heard, of whichever rank finds it.
GARBLED: dict[str, tuple[Damage, str]] = {
    "tracker empty": (tracker(""), "an iteration number expected"),
    "tracker garbled": (tracker("iter_2"), "an iteration number expected"),
    "tracker release": (tracker("release"), "converted weights"),
    "nothing that it names": (shutil.rmtree, "names step 2, which is not there"),
    "no part of tensor rank 1": (lambda step: shutil.rmtree(step / "mp_rank_01"), "missing: mp_rank_01"),
    "no optimizer": (lambda step: (step / OPTIMIZER).unlink(), f"{OPTIMIZER}: cannot be opened"),
    "optimizer cut": (cut(OPTIMIZER), f"{OPTIMIZER}: a zip without its directory"),
    "model cut": (cut(MODEL), f"{MODEL}: a zip without its directory"),
    "half precision": (edit(OPTIMIZER, put((*FLAT, "exp_avg"), torch.Tensor.half)), "no exp_avg of"),
    "shorter": (edit(OPTIMIZER, put((*FLAT, "param"), lambda old: old[:-9].clone())), "no param of"),
    "a number": (edit(OPTIMIZER, put((*FLAT, "exp_avg"), 3)), "no exp_avg of"),
    "no moment": (edit(OPTIMIZER, without(*FLAT, "exp_avg_sq")), "no exp_avg_sq of"),
    "fewer elements": (edit(OPTIMIZER, put((*FLAT, "numel_unpadded"), 7)), "7 in the checkpoint"),
    "list of buckets": (edit(OPTIMIZER, put((0,), [1])), "None in the checkpoint"),
    "nothing in it": (edit(OPTIMIZER, put((0,), None)), "None in the checkpoint"),
    "list for a dict": (edit(OPTIMIZER, lambda value: [value]), "not the state of a distributed optimizer"),
    "groups are numbers": (edit(MODEL, put(GROUPS, [3, 4])), "a group in the checkpoint is no group"),
    "no step": (edit(MODEL, without(*GROUPS, 1, "step")), "no step of group"),
    "a word for a step": (edit(MODEL, put((*GROUPS, 1, "step"), "two")), "no step of group"),
    "optimizer is a list": (edit(MODEL, put(("optimizer", "optimizer"), [1])), "0 in the checkpoint"),
    "two optimizers": (edit(MODEL, put(("optimizer",), lambda old: [old] * 2)), "1 optimizers here, 2 in"),
    "generators garbled": (edit(MODEL, put(("rng_state", 0, "random_rng_state"), 3)), "rng does not take"),
    "no generators": (edit(MODEL, put(("rng_state",), [])), "rng: no state of python"),
    "schedule garbled": (edit(MODEL, put(("opt_param_scheduler",), {"max_lr": 1.0})), "lr_scheduler does"),
    "model is a list": (edit(MODEL, put(("model",), [1])), "embedding.word_embeddings.weight: not in the"),
}  # fmt: skip


def load_garbled(talk: Talk, rank: int, root: Path) -> dict[str, str]:
    """What was heard of each damage."""
    heard = {}
    with megatron(Layout(tensor=2)):
        job = trained(Layout(tensor=2))
        stock_save(job, root / "stock")
        for name, (damage, _) in GARBLED.items():
            damaged = root / "damaged"
            if rank == 0:
                shutil.rmtree(damaged, ignore_errors=True)
                shutil.copytree(root / "stock", damaged)
                damage(damaged / f"iter_{STEP:07d}")
            dist.barrier()
            with checkpointer_of(job, damaged, read_only=True) as checkpointer:
                try:
                    heard[name] = f"loaded {checkpointer.load_latest()}"
                except CheckpointError as error:
                    heard[name] = str(error)
            dist.barrier()
    return heard


def test_garbled_files_of_megatron_are_refused_by_all_and_named(world: World, tmp_path: Path) -> None:
    for heard in world.run(RANKS, load_garbled, tmp_path):
        for name, (_, words) in GARBLED.items():
            assert words in heard[name], (name, heard[name])


def load_flipped(talk: Talk, rank: int, root: Path) -> list[tuple[str, int | None, bool]]:
    """For each file of the newest step with one bit flipped: what was loaded, and whether it is as saved."""
    found = []
    layout = Layout(tensor=2)
    with megatron(layout):
        job = trained(layout)
        with checkpointer_of(job, root / "ours") as checkpointer:
            checkpointer.save(1).wait()
            before = job.shards(), job.parameters()
            checkpointer.fence()
            job.train_step(7)
            checkpointer.save(STEP).wait()
        step = root / "ours" / f"iter_{STEP:07d}"
        names = sorted(str(path.relative_to(step)) for path in step.rglob("*") if path.is_file())
        dist.barrier()
        for name in names:
            if rank == 0:
                data = bytearray((step / name).read_bytes())
                data[len(data) * 2 // 3] ^= 4
                (step / name).write_bytes(data)
            dist.barrier()
            with checkpointer_of(job, root / "ours", read_only=True) as checkpointer:
                resume = checkpointer.load_latest()
            is_same = same(job.shards(), before[0]) and same(job.parameters(), before[1])
            found.append((name, None if resume is None else resume.step, is_same))
            dist.barrier()
            if rank == 0:
                data[len(data) * 2 // 3] ^= 4
                (step / name).write_bytes(data)
            dist.barrier()
    return found


def test_a_flipped_bit_in_any_file_makes_all_ranks_fall_back(world: World, tmp_path: Path) -> None:
    for found in world.run(RANKS, load_flipped, tmp_path):
        assert len(found) >= 4 + RANKS + RANKS + 1  # models, optimizers, own files, fragments, manifest
        assert all((step, is_same) == (1, True) for _, step, is_same in found), found


# ---------------------------------------------------------------------------- what cannot be saved


class HybridDeviceOptimizer(torch.optim.Adam):
    """Megatron's keeps a part of its state elsewhere; only the name matters here."""


@contextmanager
def called(value: Any, name: str) -> Iterator[None]:
    """An object of a class of another name."""
    kind = type(value)
    value.__class__ = type(name, (kind,), {})
    try:
        yield
    finally:
        value.__class__ = kind


def refusals(talk: Talk, rank: int, root: Path) -> dict[str, str]:
    """What is said of each optimizer that cannot be saved."""
    from megatron.core import parallel_state

    said: dict[str, str] = {}

    def attempt(name: str) -> None:
        try:
            checkpointer_of(job, root).close()
        except CheckpointError as error:
            said[name] = f"{type(error).__name__}: {error}"

    with megatron(Layout()):
        job = Job(Layout())
        with checkpointer_of(job, root, on_error="warn") as checkpointer:
            try:
                checkpointer.save(1)
            except CheckpointError as error:
                said["no step"] = f"{type(error).__name__}: {error}"
        (one,) = job.optimizer.chained_optimizers
        with patch.object(one.config, "use_precision_aware_optimizer", True):
            attempt("precision-aware")
        with patch.object(one.ddp_config, "use_megatron_fsdp", True):
            attempt("fsdp")
        for inner in (torch.optim.SGD, HybridDeviceOptimizer):
            with patch.object(one, "optimizer", inner(one.optimizer.param_groups, lr=0.1)):
                attempt(inner.__name__)
        with called(one, "LayerWiseDistributedOptimizer"):
            attempt("layer-wise")
        with called(job.optimizer, "Other"):
            attempt("chain")
        with (
            patch.object(parallel_state, "get_expert_model_parallel_world_size", lambda: 2),
            patch.object(parallel_state, "get_expert_tensor_parallel_world_size", lambda: 4),
        ):
            attempt("experts")
        job.train_step(0)
        state = one.optimizer.state[next(iter(one.optimizer.state))]
        moment = state.pop("exp_avg")
        with checkpointer_of(job, root, on_error="warn") as checkpointer:
            try:
                checkpointer.save(2)
            except CheckpointError as error:
                said["no moment"] = f"{type(error).__name__}: {error}"
            state["exp_avg"] = moment
            checkpointer.save(3).wait()
    return said


def test_optimizers_without_a_place_in_the_tree_are_refused_by_name(world: World, tmp_path: Path) -> None:
    for said in world.run(2, refusals, tmp_path):
        assert said["no step"].startswith("LeafError: optimizer: it has made no step yet")
        assert "use_precision_aware_optimizer" in said["precision-aware"]
        assert "use_megatron_fsdp" in said["fsdp"]
        assert "DistributedOptimizer over SGD" in said["SGD"]
        assert "DistributedOptimizer over HybridDeviceOptimizer" in said["HybridDeviceOptimizer"]
        assert "LayerWiseDistributedOptimizer is not known here" in said["layer-wise"]
        assert "this combination is not known here: Other, DistributedOptimizer" in said["chain"]
        assert "expert tensor parallelism of 4 with tensor parallelism of 1" in said["experts"]
        assert said["no moment"].startswith("LeafError: optimizer: a parameter has no exp_avg")
    assert (tmp_path / TRACKER).read_text() == "3"


# ---------------------------------------------------------------------------- training goes on too early


def tear(talk: Talk, rank: int, root: Path, layout: Layout) -> dict[str, str]:
    """What is said of saves whose state changed under them, on rank 1, while their copies were held up."""
    said: dict[str, str] = {}
    with megatron(layout):
        job = trained(layout)
        (one,) = job.optimizer.chained_optimizers

        def first() -> Any:
            return one.optimizer.param_groups[0]["params"][0]

        tears: dict[str, Callable[[], Any]] = {
            "parameter": lambda: first().detach().add_(1),
            "moment": lambda: one.optimizer.state[first()]["exp_avg"].add_(1),
            "emptied": lambda: one.optimizer.state[first()]["exp_avg_sq"].untyped_storage().resize_(0),
        }
        with checkpointer_of(job, root, on_error="warn") as checkpointer:
            for step, (name, act) in enumerate(tears.items(), start=3):
                kept = one.optimizer.state[first()]["exp_avg_sq"].clone()
                if rank == 1:
                    faults.arm(faults.Op.copy, 0, faults.Kind.pause, repeat=True)
                handle = checkpointer.save(step)
                if rank == 1:
                    assert faults.wait_for_hits(faults.Op.copy, 1)
                    with torch.no_grad():
                        act()
                    faults.disarm()
                try:
                    handle.wait()
                except CheckpointError as error:
                    said[name] = f"{type(error).__name__}: {error}"
                if name == "emptied" and rank == 1:
                    moment = one.optimizer.state[first()]["exp_avg_sq"]
                    moment.untyped_storage().resize_(kept.nbytes)
                    moment.copy_(kept)
            checkpointer.save(99).wait()
            said["after"] = str(checkpointer.steps())
    return said


@pytest.mark.parametrize("layout", [Layout(), Layout(bf16=False)], ids=["bf16", "fp32"])
def test_state_that_changes_before_it_is_copied_is_not_saved(
    world: World, tmp_path: Path, layout: Layout
) -> None:
    here = world.run(2, tear, tmp_path, layout)
    for rank, said in enumerate(here):
        assert said.pop("after") == "[99]"
        assert set(said) == {"parameter", "moment", "emptied"}
        for name, text in said.items():
            assert text.startswith("TornStateError" if rank == 1 else "RankError"), (name, text)
            assert rank == 1 or "rank 1" in text
            assert (
                "distrib_optim.pt was written to" in text
                or "distrib_optim.pt was resized" in text
                or (
                    name == "parameter" and "model." in text  # in fp32 it is the model's own
                )
            )


def train_on(talk: Talk, rank: int, root: Path, layout: Layout) -> int:
    """Steps while copies are held up, with two saves in flight; frees the state once fenced. Plans made."""
    with megatron(layout):
        job = trained(layout)
        (one,) = job.optimizer.chained_optimizers
        kept = []
        with checkpointer_of(job, root, max_in_flight=2, host_memory=(rank + 1) << 20) as checkpointer:
            for step in (3, 4):
                faults.arm(faults.Op.copy, 0, faults.Kind.pause)
                kept.append((job.shards(), job.parameters()))
                checkpointer.save(step)
                assert faults.wait_for_hits(faults.Op.copy, 1)
                with ThreadPoolExecutor(1) as other:
                    other.submit(faults.resume)
                    job.train_step(step)
                faults.disarm()
            kept.append((job.shards(), job.parameters()))
            handle = checkpointer.save(5)
            checkpointer.fence()
            tensors = [t for state in one.optimizer.state.values() for t in state.values() if t.dim()]
            for tensor in tensors:  # offloaded, as Megatron and RLinf do it
                away = tensor.clone()
                size = tensor.untyped_storage().nbytes()
                tensor.untyped_storage().resize_(0)
                tensor.untyped_storage().resize_(size)
                tensor.copy_(away)
            handle.wait()
            plans = checkpointer.plans_made
        for step, (shards, parameters) in zip((3, 4, 5), kept, strict=True):
            fresh = Job(layout, seed=step)
            with checkpointer_of(fresh, root, read_only=True) as checkpointer:
                checkpointer.load(step)
            assert same(fresh.shards(), shards)
            assert same(fresh.parameters(), parameters)
    return plans


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(3, Layout(hidden=36)), (2, Layout(bf16=False))],
    ids=["three ranks", "fp32"],
)
def test_steps_while_copies_are_held_up_change_nothing_of_what_is_saved(
    world: World, tmp_path: Path, ranks: int, layout: Layout
) -> None:
    assert world.run(ranks, train_on, tmp_path, layout) == [1] * ranks


@pytest.mark.parametrize(("ranks", "layout"), [(3, Layout(hidden=36)), (2, Layout(tensor=2)), (1, Layout())])
def test_megatron_reads_what_odd_numbers_of_ranks_wrote(
    world: World, tmp_path: Path, ranks: int, layout: Layout
) -> None:
    for theirs, here in set(world.run(ranks, save_ours_load_stock, layout, tmp_path)):
        assert records_of(theirs / OPTIMIZER_FILE) == records_of(here / OPTIMIZER_FILE)
