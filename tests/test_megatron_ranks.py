"""The ranks that train with megatron-core: what Megatron saves it loads bit for bit, and where it lies."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.megatron_ranks import (
    LAYOUTS,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATES,
    TRACKER,
    Job,
    Layout,
    Place,
    megatron,
    same,
    stock_load_checkpoint,
    stock_read,
    stock_save_checkpoint,
)
from tests.process_world import Talk, World, process_world

RANKS = 4
SAVED, LAST = 2, 4

Shards = dict[tuple[int, str], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


@dataclasses.dataclass
class Seen:
    """What a rank tells of its save."""

    directory: Path
    shards: Shards
    places: dict[tuple[int, str], Place]
    groups: list[list[int]]
    """The ranks that share each optimizer, in the order of their shards."""
    buffers: list[list[tuple[int, int]]]
    """Elements of each optimizer's buffers, with and without the padding at the ends of buckets."""


def train_save_load(talk: Talk, rank: int, layout: Layout, root: Path) -> Seen:
    with megatron(layout):
        job = Job(layout)
        for number in range(SAVED):
            job.train_step(number)
        directory = stock_save_checkpoint(job, root)
        saved, parameters = job.shards(), job.parameters()
        losses = [job.train_step(number) for number in range(SAVED, LAST)]
        trained = job.shards()
        for key, states in saved.items():
            for name, value in states.items():
                assert not torch.equal(trained[key][name], value), (key, name)

        fresh = Job(layout, seed=2)
        assert not same(fresh.parameters(), parameters)
        stock_load_checkpoint(fresh, root)
        assert same(fresh.shards(), saved)
        assert same(fresh.parameters(), parameters)
        # Dropout and schedule are part of it: the generators and the scheduler have come back too.
        assert [fresh.train_step(number) for number in range(SAVED, LAST)] == losses
        assert same(fresh.shards(), trained)

        return Seen(
            directory,
            saved,
            job.places(),
            [dist.get_process_group_ranks(optimizer.data_parallel_group) for optimizer in job.optimizers()],
            [[(b.numel, b.numel_unpadded) for b in optimizer.buffers] for optimizer in job.optimizers()],
        )


def check_record(record: Any, number: int, first: Seen, group: list[Seen]) -> None:
    """An optimizer's record in its file: its form, and every element of it, from the shards of its ranks."""
    assert list(record) == ["buckets_coalesced", *range(len(first.buffers[number]))]
    assert record["buckets_coalesced"] is True
    owned = [(seen, key) for seen in group for key in seen.places if key[0] == number]
    for buffer, (padded, elements) in enumerate(first.buffers[number]):
        here = [(seen, key) for seen, key in owned if seen.places[key].buffer == buffer]
        ((dtypes, flat),) = record[buffer].items()
        assert {seen.places[key].dtypes for seen, key in here} == {dtypes}
        assert list(flat) == [*STATES, "numel_unpadded"]
        assert flat["numel_unpadded"] == elements < padded
        filled = torch.zeros(elements, dtype=torch.bool)
        for state in STATES:
            rebuilt = torch.zeros(elements)
            for seen, key in here:
                place = seen.places[key]
                rebuilt[place.start : place.end] = seen.shards[key][state]
                filled[place.start : place.end] = True
            assert flat[state].dtype == torch.float32
            assert torch.equal(flat[state], rebuilt)
        assert not filled.all()  # the padding between parameters is there, as zeros
    assert len({(seen.places[key].buffer, seen.places[key].bucket) for seen, key in owned}) > 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_megatron_saves_it_loads_bit_for_bit_and_each_shard_lies_where_it_should(
    world: World, tmp_path: Path, name: str
) -> None:
    layout = LAYOUTS[name]
    ranks = world.run(RANKS, train_save_load, layout, tmp_path)
    assert (tmp_path / TRACKER).read_text() == str(SAVED)

    models = layout.tensor * layout.pipeline * layout.expert
    files = sorted(tmp_path.rglob("*.pt"))
    assert {path.name for path in files} == {OPTIMIZER_FILE, MODEL_FILE}
    assert len(files) == 2 * models
    assert {path.parent for path in files} == {seen.directory for seen in ranks}

    records = {seen.directory: torch.load(seen.directory / OPTIMIZER_FILE) for seen in ranks}
    chained = len(ranks[0].groups) > 1
    assert chained == (layout.experts is not None)
    # No two models are alike: a file in another's place would be seen.
    last = [record[-1] if chained else record for record in records.values()]
    values = [next(iter(record[0].values()))["param"] for record in last]
    assert len({value.numpy().tobytes() for value in values}) == models
    checked = 0
    for rank, seen in enumerate(ranks):
        for number, group in enumerate(seen.groups):
            if group[0] == rank:
                saved = records[seen.directory]
                check_record(saved[number] if chained else saved, number, seen, [ranks[r] for r in group])
                checked += 1
    if chained:
        # Dense parameters are saved once, with the first experts; None stands for them with the others.
        found = [[record is not None for record in records[directory]] for directory in sorted(records)]
        assert found == [[True, True], [False, True]]
    assert checked == (models + 1 if chained else models)


def read_model_file(talk: Talk, rank: int, layout: Layout, root: Path) -> None:
    with megatron(layout):
        job = Job(layout)
        for number in range(SAVED):
            job.train_step(number)
        directory = stock_save_checkpoint(job, root)
        state = stock_read(directory / MODEL_FILE)
        chunks = ["model"] if layout.virtual is None else [f"model{i}" for i in range(layout.virtual)]
        assert list(state) == [
            "args", "checkpoint_version", "iteration", *chunks, "optimizer", "opt_param_scheduler",
            "rng_state", "num_floating_point_operations_so_far",
        ]  # fmt: skip
        assert state["args"].tensor_model_parallel_size == layout.tensor
        assert (state["checkpoint_version"], state["iteration"]) == (3.0, SAVED)
        dtype = torch.bfloat16 if layout.bf16 else torch.float32
        for chunk in chunks:
            # Where Transformer Engine would keep its own, there is nothing.
            assert all((value is None) == key.endswith("_extra_state") for key, value in state[chunk].items())
            assert {value.dtype for value in state[chunk].values() if value is not None} == {dtype}
        for optimizer in state["optimizer"] if layout.experts else [state["optimizer"]]:
            assert list(optimizer) == ["optimizer"]
            groups = optimizer["optimizer"]["param_groups"]
            assert all("params" not in group and group["step"] == SAVED for group in groups)
        assert list(state["opt_param_scheduler"]) == [
            "max_lr", "lr_warmup_steps", "num_steps", "lr_decay_style", "lr_decay_steps", "min_lr",
            "start_wd", "end_wd", "wd_incr_style", "wd_incr_steps",
        ]  # fmt: skip
        (rng,) = state["rng_state"]
        assert list(rng) == [
            "random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state", "rng_tracker_states",
        ]  # fmt: skip
        assert len(rng["rng_tracker_states"]) == 3


@pytest.mark.parametrize("name", ["tensor-bf16", "data-fp32", "expert", "pipeline-virtual"])
def test_the_model_file_has_megatrons_records_and_no_class_that_it_does_not_know(
    world: World, tmp_path: Path, name: str
) -> None:
    world.run(RANKS, read_model_file, LAYOUTS[name], tmp_path)


def load_without(talk: Talk, rank: int, layout: Layout, root: Path) -> tuple[str, str, int]:
    """What goes wrong in stock code: with `step`, with fp32, and with the steps after a load."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from tests import megatron_ranks

    with megatron(layout):
        job = Job(layout)
        job.train_step(0)
        path = str(stock_save_checkpoint(job, root) / OPTIMIZER_FILE)
        with pytest.raises(KeyError) as key_error, torch.no_grad():
            job.optimizer.load_parameter_state(path)
        with (
            pytest.raises(RuntimeError) as runtime_error,
            megatron_ranks._step_is_not_in_the_file(),
        ):
            job.optimizer.load_parameter_state(path)
        job.optimizer.load_state_dict(job.optimizer.state_dict())
        (optimizer,) = job.optimizers()
        assert isinstance(optimizer, DistributedOptimizer)
        steps = {id(state["step"]) for state in optimizer.optimizer.state.values()}
        return str(key_error.value), str(runtime_error.value), len(steps)


def test_what_stock_load_works_around_is_still_wrong_in_megatron(world: World, tmp_path: Path) -> None:
    for key_error, runtime_error, steps in world.run(2, load_without, Layout(bf16=False), tmp_path):
        assert key_error == "'step'"
        assert "leaf Variable" in runtime_error or "in-place" in runtime_error
        assert steps == 1


def train_lazily(talk: Talk, rank: int, layout: Layout) -> list[bool]:
    """Whether this rank's parameters are those of rank 0: after a step, and after a sync."""
    with megatron(layout):
        job = Job(layout)
        found = []
        for number in range(2):
            job.train_step(number)
            for _ in range(2):
                mine = torch.cat([value.flatten() for value in job.parameters().values()])
                first = mine.clone()
                dist.broadcast(first, 0)
                found.append(torch.equal(mine, first))
                job.sync()
        return found


def test_parameters_that_are_gathered_in_the_next_forward_are_whole_after_a_sync(world: World) -> None:
    first, *others = world.run(RANKS, train_lazily, Layout(overlap_param_gather=True))
    assert first == [True] * 4
    assert others == [[False, True] * 2] * (RANKS - 1)


def enter_and_leave(talk: Talk, rank: int, layout: Layout) -> None:
    from megatron.core import parallel_state

    stock = [torch.cuda.current_device, torch.cuda.get_rng_state, torch.cuda.manual_seed]
    safe = set(torch.serialization.get_safe_globals())
    assert not [known for known in safe if known.__module__.startswith("megatron")]
    with megatron(layout):
        assert not torch.cuda.is_available()
        assert torch.empty(1, device="cuda").device.type == "cpu"
        assert torch.empty(1).type() == "torch.cuda.FloatTensor"
        assert torch.cuda.current_device is not stock[0]
    assert not parallel_state.model_parallel_is_initialized()
    assert torch.empty(1).type() == "torch.FloatTensor"
    assert stock == [torch.cuda.current_device, torch.cuda.get_rng_state, torch.cuda.manual_seed]
    assert set(torch.serialization.get_safe_globals()) == safe


def test_the_bent_torch_is_straight_again_after_the_block(world: World) -> None:
    world.run(2, enter_and_leave, Layout())


def test_who_only_imports_the_support_does_not_import_megatron() -> None:
    assert not [name for name in sys.modules if name.partition(".")[0] == "megatron"]
