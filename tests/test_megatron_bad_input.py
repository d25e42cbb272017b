"""integrations.megatron over trees that are damaged, garbled or another job's, and under a hostile caller."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from asyncckpt.errors import CheckpointError
from tests.megatron_ranks import MODEL_FILE, OPTIMIZER_FILE, TRACKER, Layout, megatron
from tests.megatron_ranks import stock_save_checkpoint as stock_save
from tests.process_world import Talk, World, process_world
from tests.test_megatron import checkpointer_of, same, trained

RANKS = 4
STEP = 2


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
    return lambda step: (step.parent / TRACKER).write_text(text) and None


def cut(name: str) -> Damage:
    return lambda step: (step / name).write_bytes((step / name).read_bytes()[:-5000]) and None


MODEL, OPTIMIZER = f"mp_rank_01/{MODEL_FILE}", f"mp_rank_01/{OPTIMIZER_FILE}"
FLAT = (0, (torch.bfloat16, torch.float32))
GROUPS = ("optimizer", "optimizer", "param_groups")

# Of a tree that Megatron wrote: what is heard, of whichever rank finds it.
GARBLED: dict[str, tuple[Damage, str]] = {
    "tracker empty": (tracker(""), "an iteration number expected"),
    "tracker garbled": (tracker("iter_2"), "an iteration number expected"),
    "tracker release": (tracker("release"), "converted weights"),
    "nothing that it names": (lambda step: shutil.rmtree(step), "names step 2, which is not there"),
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
    "generators garbled": (edit(MODEL, put(("rng_state", 0, "random_rng_state"), 3)), "TypeError: cannot unpack"),
    "no generators": (edit(MODEL, put(("rng_state",), [])), "rng: no state of python"),
    "schedule garbled": (edit(MODEL, put(("opt_param_scheduler",), {"max_lr": 1.0})), "KeyError: 'min_lr'"),
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
