"""What several ranks do together besides training: fall back, roll back, share the work, stay in bounds."""

from __future__ import annotations

import logging
import os
import pickle
import re
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from asyncckpt import AsyncCheckpointer, _native, restore
from asyncckpt.errors import CheckpointError, CorruptStepError, LeafError, OptionError
from tests.process_world import Talk, World, process_world

RANKS = 4
faults = _native.faults


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


def checkpointer_of(root: Path, **options: Any) -> AsyncCheckpointer:
    return AsyncCheckpointer(
        root, **{"host_memory": 8 << 20, "rank_timeout_s": 30, "fence_timeout_s": 60, **options}
    )


class Sharded(nn.Module):
    """Rows on the ranks in turn, all of one value."""

    def __init__(self, value: float, rows: int = 2050, columns: int = 1024) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        whole = torch.full((rows, columns), float(value))
        self.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]), requires_grad=False)

    def values(self) -> set[float]:
        weight: Any = self.weight
        return set(weight.to_local().flatten().tolist())


# ---------------------------------------------------------------------------- loading


def save_steps(talk: Talk, rank: int, root: Path, steps: list[int], keep_last: int | None = None) -> None:
    model = Sharded(0)
    with checkpointer_of(root, model=model, keep_last=keep_last) as checkpointer:
        for step in steps:
            model.weight.fill_(step)
            checkpointer.save(step)
            checkpointer.fence()


def load_latest(talk: Talk, rank: int, root: Path) -> tuple[Any, set[float], list[str], str]:
    """The step that was loaded, or the error; what is live then; what was passed over; what save() says."""
    model = Sharded(-1)
    found: Any
    passed: list[str] = []
    with checkpointer_of(root, model=model, max_in_flight=1) as checkpointer:
        try:
            resume = checkpointer.load_latest()
            found = resume and resume.step
            passed = [line.split(":")[0] for line in resume.passed_over] if resume else []
        except CheckpointError as error:
            found = f"{type(error).__name__}: {error}"
        try:
            checkpointer.save(10_000).wait()
            refused = ""
        except CheckpointError as error:
            refused = str(error)
    return found, model.values(), passed, refused


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("offset", [0, 1 << 20, -1000], ids=["header", "tensor", "directory"])
@pytest.mark.parametrize("name", ["__0_0.distcp", "__3_0.distcp", "rank_00002.pt"])
def test_damage_on_one_rank_makes_all_fall_back(world: World, tmp_path: Path, name: str, offset: int) -> None:
    world.run(RANKS, save_steps, tmp_path, [1, 2])
    path = tmp_path / "step-2" / name
    flip(path, offset if offset < path.stat().st_size else 700)
    for found, values, passed, refused in world.run(RANKS, load_latest, tmp_path):
        assert found == 1
        assert values == {1.0}
        assert passed == ["step 2"]
        assert refused == ""


def test_when_nothing_is_good_all_raise_and_none_saves(world: World, tmp_path: Path) -> None:
    world.run(RANKS, save_steps, tmp_path, [1, 2])
    for step in (1, 2):
        flip(tmp_path / f"step-{step}" / "__2_0.distcp", 1 << 20)
    for found, _, _, refused in world.run(RANKS, load_latest, tmp_path):
        assert found.startswith("NoIntactStepError: ")
        assert "step-2/__2_0.distcp" in found
        assert "until a load succeeds" in refused


def load_misfit(talk: Talk, rank: int, root: Path) -> tuple[str, set[float]]:
    model = Sharded(-1, rows=2051 if rank == 2 else 2050) if rank == 2 else Sharded(-1)
    with checkpointer_of(root, model=model) as checkpointer:
        try:
            checkpointer.load_latest()
            return "loaded", model.values()
        except CheckpointError as error:
            checkpointer.load  # noqa: B018 -- it is still usable
            return f"{type(error).__name__}: {error}", model.values()


def test_what_does_not_fit_one_rank_changes_nothing_on_any(world: World, tmp_path: Path) -> None:
    world.run(RANKS, save_steps, tmp_path, [1])
    outcomes = world.run(RANKS, load_misfit, tmp_path)
    assert [values for _, values in outcomes] == [{-1.0}] * RANKS
    for rank, (said, _) in enumerate(outcomes):
        assert said.startswith("MismatchError: " if rank == 2 else "RankError: rank 2 could not load")
        assert "float32[2051, 1024] here" in said


def roll_back(talk: Talk, rank: int, root: Path) -> list[int]:
    model = Sharded(-1)
    with checkpointer_of(root, model=model) as checkpointer:
        assert checkpointer.load(400).step == 400
        for step in (450, 500):
            model.weight.fill_(step + 0.5)
            checkpointer.save(step)
            checkpointer.wait()
        return checkpointer.steps()


def test_going_back_begins_a_new_timeline_for_all(world: World, tmp_path: Path) -> None:
    world.run(RANKS, save_steps, tmp_path, [400, 450, 500, 550])
    assert world.run(RANKS, roll_back, tmp_path) == [[400, 450, 500]] * RANKS
    for found, values, _, _ in world.run(RANKS, load_latest, tmp_path):
        assert found == 500
        assert values == {500.5}


def test_retention_is_the_first_ranks(world: World, tmp_path: Path) -> None:
    world.run(RANKS, save_steps, tmp_path, [1, 2, 3, 4], 2)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["step-3", "step-4"]


def load_another(talk: Talk, rank: int, root: Path) -> str:
    with checkpointer_of(root, model=Sharded(0)) as checkpointer:
        try:
            checkpointer.load(2 if rank == 1 else 1)
        except CheckpointError as error:
            return str(error)
    return ""


def test_ranks_that_load_different_steps_are_told(world: World, tmp_path: Path) -> None:
    world.run(2, save_steps, tmp_path, [1, 2])
    for said in world.run(2, load_another, tmp_path):
        assert "rank 1 loads step 2 where rank 0 loads step 1" in said


# ---------------------------------------------------------------------------- what is spread how


def save_meshes(talk: Talk, rank: int, root: Path) -> dict[str, torch.Tensor]:
    """A step of a model that is sharded both ways, and one DTensor of each kind; all of it whole."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6, bias=False))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    torch.manual_seed(7)
    model(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    whole = torch.arange(77, dtype=torch.float64).reshape(7, 11)
    kinds = {
        "rows and columns": [Shard(0), Shard(1)],
        "columns": [Replicate(), Shard(1)],
        "rows twice": [Shard(0), Shard(0)],
        "replicated": [Replicate(), Replicate()],
    }
    extra = {name: distribute_tensor(whole, mesh, placements) for name, placements in kinds.items()}
    expected = {f"model.{k}": v.full_tensor() for k, v in model.state_dict().items()}
    names = {param: name for name, param in model.named_parameters()}
    for param, values in optimizer.state.items():
        for key, value in values.items():
            tensor = value.full_tensor() if isinstance(value, DTensor) else value
            expected[f"optimizer.state.{names[param]}.{key}"] = tensor
    expected |= {f"extra.{name}": whole for name in kinds}
    with checkpointer_of(root, model=model, optimizer=optimizer, extra=extra) as checkpointer:
        checkpointer.save(1).wait()
        for param in model.parameters():
            param.detach().zero_()
        for tensor in extra.values():
            tensor.zero_()
        checkpointer.load(1)
        for name, value in model.state_dict().items():
            assert torch.equal(value.full_tensor(), expected[f"model.{name}"])
        for name, tensor in extra.items():
            assert torch.equal(tensor.full_tensor(), whole), name
    return expected


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_meshes_of_two_dimensions_are_read_by_stock_dcp(world: World, tmp_path: Path) -> None:
    expected = world.run(4, save_meshes, tmp_path)[0]
    live = {name: torch.zeros_like(value) for name, value in expected.items()}
    dcp.load(live, checkpoint_id=tmp_path / "step-1", no_dist=True)
    for name, value in expected.items():
        assert torch.equal(live[name], value), name


def save_partial(talk: Talk, rank: int, root: Path) -> tuple[str, str]:
    mesh = init_device_mesh("cpu", (2,))
    from torch.distributed.tensor import Partial

    sums = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    hidden = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    said = []
    for extra in ({"sums": sums}, {"deep": (hidden,)}):
        with checkpointer_of(root, extra=extra, on_error="warn") as checkpointer:
            with pytest.raises(LeafError) as caught:
                checkpointer.save(1)
            said.append(str(caught.value))
    return said[0], said[1]


def test_what_cannot_be_saved_is_named(world: World, tmp_path: Path) -> None:
    for sums, hidden in world.run(2, save_partial, tmp_path):
        assert re.search(r"extra\.sums cannot be saved: it holds partial sums", sums)
        assert "extra.deep" in hidden
    assert not [path for path in tmp_path.iterdir() if path.name[0] != "."]


def save_no_box(talk: Talk, rank: int, root: Path) -> str:
    mesh = init_device_mesh("cpu", (2,))
    columns: Any = distribute_tensor(torch.arange(32.0).reshape(4, 8), mesh, [Shard(1)])
    flat = columns.flatten()
    if flat.placements[0] == Replicate():
        return "extra.flat is no box"  # older torch gathers it: there is nothing to refuse
    with checkpointer_of(root, extra={"flat": flat}, on_error="warn") as checkpointer:
        return refusal(checkpointer)


def refusal(checkpointer: AsyncCheckpointer) -> str:
    """What save() says of a leaf that it refuses."""
    with pytest.raises(LeafError) as caught:
        checkpointer.save(1)
    return str(caught.value)


def test_what_is_no_box_of_the_whole_is_refused(world: World, tmp_path: Path) -> None:
    """Of a column-wise tensor that was flattened, a rank has some of each row."""
    for said in world.run(2, save_no_box, tmp_path):
        assert said.startswith("extra.flat")
        assert "is no box" in said
    assert not [path for path in tmp_path.iterdir() if path.name[0] != "."]


def save_and_change(talk: Talk, rank: int, root: Path) -> tuple[str, str]:
    """What a save says whose sharded tensors changed behind their counters, and one that was fenced."""
    mesh = init_device_mesh("cpu", (2,))
    zeros = [torch.zeros(1 << 20) for _ in range(2)]
    averages = [DTensor.from_local(local, mesh, [Shard(0)], run_check=False) for local in zeros]
    extra = {"averages": averages}
    said = []
    with checkpointer_of(root, extra=extra, host_memory=1 << 20, on_error="warn") as checkpointer:
        for step, fenced in ((1, False), (2, True)):
            if not fenced:
                faults.arm(faults.Op.copy, 1, faults.Kind.pause)
            handle = checkpointer.save(step)
            if fenced:
                checkpointer.fence()
            else:
                assert faults.wait_for_hits(faults.Op.copy, 1, 60)
            torch._foreach_add_(averages, 1.0)
            faults.disarm()
            try:
                handle.wait()
                said.append("")
            except CheckpointError as error:
                said.append(f"{type(error).__name__}: {error}")
    return said[0], said[1]


def test_sharded_tensors_that_change_unseen_are_not_committed_torn(world: World, tmp_path: Path) -> None:
    for torn, fenced in world.run(2, save_and_change, tmp_path):
        assert "extra.averages." in torn
        assert fenced == ""
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["step-2"]


class Average:
    """Moving averages of a sharded model, and how many were taken."""

    def __init__(self, model: nn.Module) -> None:
        self.count = torch.zeros(())
        self.shadow = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "shadow": {"deep": self.shadow}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        for name, value in self.shadow.items():
            value.copy_(state["shadow"]["deep"][name])  # takes nothing that is no DTensor


def load_averages(talk: Talk, rank: int, root: Path, rows: int) -> tuple[list[str], list[float]]:
    """Averages kept in an object, in a module and in a dict; rows they have, and values after a load."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))

    def made() -> nn.Module:
        model = nn.Linear(8, rows)
        fully_shard(model, mesh=mesh)
        return model

    average, shadow, plain = Average(made()), made(), dict(made().state_dict())
    extra = {"average": average, "module": shadow, "plain": plain}
    kept = [*average.shadow.values(), *shadow.state_dict().values(), *plain.values()]
    for tensor in kept:
        tensor.fill_(3)
    average.count.fill_(3)
    with checkpointer_of(root, extra=extra) as checkpointer:
        if rows == 7:
            checkpointer.save(1).wait()
        for tensor in kept:
            tensor.fill_(0)
        average.count.fill_(0)
        try:
            checkpointer.load(1)
            said = []
        except CheckpointError as error:
            said = [line.partition(":")[0].strip() for line in str(error).splitlines()[1:]]
    return said, sorted(local_values([*kept, average.count]))


def local_values(tensors: list[Any]) -> set[float]:
    locals_ = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return {value for local in locals_ for value in local.flatten().tolist()}


def test_sharded_averages_in_extra_are_filled_where_they_are(world: World, tmp_path: Path) -> None:
    assert world.run(3, load_averages, tmp_path, 7) == [([], [3.0])] * 3
    for said, values in world.run(2, load_averages, tmp_path, 6):
        assert "extra.average.shadow.deep.weight" in said
        assert "extra.module.weight" in said
        assert values == [0.0]


def save_pipeline(talk: Talk, rank: int, root: Path) -> str:
    """Each rank has a parameter of its own; an optimizer's groups are saved once."""
    model = nn.Module()
    mesh = DeviceMesh("cpu", [rank], _init_backend=False)
    weight = DTensor.from_local(torch.ones(4), mesh, [Shard(0)], run_check=False)
    model.register_parameter(f"weight{rank}", nn.Parameter(weight))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with checkpointer_of(root, model=model, optimizer=optimizer, on_error="warn") as checkpointer:
        try:
            checkpointer.save(1).wait()
        except CheckpointError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_what_no_rank_could_load_is_not_saved(world: World, tmp_path: Path) -> None:
    for said in world.run(2, save_pipeline, tmp_path):
        assert said.startswith("RankError: ")
        assert "another structure" in said
    assert not [path for path in tmp_path.iterdir() if path.name[0] != "."]


# ---------------------------------------------------------------------------- bounds and shares


def save_replicated(talk: Talk, rank: int, root: Path, nbytes: int, host_memory: int) -> int:
    """Peak of this process's memory above what it had before there was a checkpointer, in bytes."""
    model = nn.Module()
    for i in range(16):
        model.register_parameter(f"w{i}", nn.Parameter(torch.full((nbytes // 16 // 4096, 1024), float(i))))
    for i in range(64):
        model.register_parameter(f"b{i}", nn.Parameter(torch.full((17,), float(i))))
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
    with checkpointer_of(root, model=model, host_memory=host_memory) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step)
            checkpointer.wait()
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


def test_replicated_state_is_written_in_equal_shares_within_bounds(world: World, tmp_path: Path) -> None:
    host_memory = 16 << 20
    peaks = world.run(RANKS, save_replicated, tmp_path, 96 << 20, host_memory)
    assert max(peaks) <= host_memory + (64 << 20), [peak >> 20 for peak in peaks]
    written = [(tmp_path / "step-2" / f"__{rank}_0.distcp").stat().st_size for rank in range(RANKS)]
    mean = sum(written) / RANKS
    assert mean * RANKS >= 96 << 20
    assert max(abs(nbytes - mean) for nbytes in written) <= 0.05 * mean, written


def save_different(talk: Talk, rank: int, root: Path) -> str:
    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    logging.getLogger("asyncckpt").addHandler(Keep())
    extra = {"seen": 100 + rank, "same": "for all"}
    with checkpointer_of(root, extra=extra) as checkpointer:
        checkpointer.save(1).wait()
        checkpointer.save(2).wait()
    return "\n".join(line for line in records if "not the same" in line)


def test_what_differs_is_pointed_out_once(world: World, tmp_path: Path) -> None:
    said = world.run(3, save_different, tmp_path)
    assert said[0].startswith("extra.seen is not the same on rank 1 as on rank 0, whose is saved")
    assert said[0].count("\n") == 0
    assert said[1:] == ["", ""]


class Counted(nn.Module):
    """One parameter, which is the same on all ranks, and buffers that are not; all too large to be small."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((96 << 10,), 5.0))
        self.register_buffer("mean", torch.full((64 << 10,), float(rank)))
        self.register_buffer("variance", torch.full((32 << 10,), float(rank)))
        self.register_buffer("batches", torch.tensor(rank))


def save_plain(talk: Talk, rank: int, root: Path) -> dict[str, list[float]]:
    model = Counted(rank)
    stats = torch.full((64 << 10,), float(rank))
    with checkpointer_of(root, model=model, extra={"stats": stats}) as checkpointer:
        checkpointer.save(1).wait()
        checkpointer.load(1)
    found = {**model.state_dict(), "stats": stats}
    return {name: sorted(set(value.flatten().tolist())) for name, value in found.items()}


def test_plain_tensors_are_those_of_the_first_rank(world: World, tmp_path: Path) -> None:
    """As stock DCP has it: BatchNorm's running statistics differ between the ranks of DDP."""
    found = world.run(3, save_plain, tmp_path)
    assert found == [{"weight": [5], "mean": [0], "variance": [0], "batches": [0], "stats": [0]}] * 3
    sizes = [(tmp_path / "step-1" / f"__{rank}_0.distcp").stat().st_size for rank in range(3)]
    assert min(sizes[1:]) > 96 << 10  # a third of the weight


def open_wrongly(talk: Talk, rank: int, root: Path) -> list[str]:
    said = []
    model = nn.Linear(2, 2)
    for options in ({"layout": "megatron"}, {"when_busy": "skip"}):
        try:
            checkpointer_of(root, model=model, **options).close()
        except OptionError as error:
            said.append(str(error))
    root.write_text("a file")
    try:
        checkpointer_of(root, model=model).close()
    except CheckpointError as error:
        said.append(f"{type(error).__name__}: {error}")
    return said


def test_wrong_options_are_refused_on_all(world: World, tmp_path: Path) -> None:
    for rank, (layout, busy, file) in enumerate(world.run(2, open_wrongly, tmp_path / "root")):
        assert "pass model_rank, or use layout 'dcp'" in layout
        assert "would not skip the same saves" in busy
        assert file.startswith("RootError: " if rank == 0 else "RankError: rank 0 could not begin: RootError")


def save_alone(talk: Talk, rank: int, root: Path) -> int:
    """Each for itself, although torch.distributed is there."""
    with checkpointer_of(root / str(rank), model=nn.Linear(2, 2), world_size=1) as checkpointer:
        return checkpointer.save(1).wait().nbytes


def test_a_rank_may_save_by_itself(world: World, tmp_path: Path) -> None:
    assert len(set(world.run(2, save_alone, tmp_path))) == 1
    assert {path.name for path in (tmp_path / "1" / "step-1").iterdir()} >= {"__0_0.distcp", ".metadata"}


def save_part_alone(talk: Talk, rank: int, root: Path) -> str:
    mesh = init_device_mesh("cpu", (2,))
    extra = {"part": distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])}
    with checkpointer_of(root / str(rank), extra=extra, world_size=1, on_error="warn") as checkpointer:
        return refusal(checkpointer)


def test_part_of_a_tensor_is_not_saved_as_the_whole(world: World, tmp_path: Path) -> None:
    for said in world.run(2, save_part_alone, tmp_path):
        assert said.startswith("extra.part cannot be saved by one rank alone: [4] of its [8] is here")


def save_whole_alone(talk: Talk, rank: int, root: Path) -> list[float]:
    """All of these are here, although several ranks have one of them."""
    whole = torch.arange(65_536.0)
    single = DeviceMesh("cpu", [rank], _init_backend=False)
    extra = {
        "replicated": distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Replicate()]),
        "single": DTensor.from_local(whole.clone(), single, [Shard(0)], run_check=False),
    }
    with checkpointer_of(root / str(rank), extra=extra, world_size=1) as checkpointer:
        checkpointer.save(1).wait()
        for tensor in extra.values():
            tensor.to_local().zero_()
        checkpointer.load(1)
    return [float((tensor.to_local() - whole).abs().max()) for tensor in extra.values()]


def test_a_rank_alone_saves_what_it_has_as_a_whole(world: World, tmp_path: Path) -> None:
    assert world.run(2, save_whole_alone, tmp_path) == [[0.0, 0.0]] * 2


def save_as_others(talk: Talk, rank: int, root: Path) -> str:
    """Ranks 1 and 2 call themselves 0 and 1."""
    if rank == 0:
        return ""
    mesh = DeviceMesh("cpu", [1, 2], _init_backend=False)
    extra = {"w": DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False)}
    store = torch.distributed.distributed_c10d._get_default_store()
    options: dict[str, Any] = {"store": store, "rank": rank - 1, "world_size": 2}
    with checkpointer_of(root, extra=extra, on_error="warn", **options) as checkpointer:
        return refusal(checkpointer)


def test_ranks_that_are_numbered_otherwise_are_told(world: World, tmp_path: Path) -> None:
    for said in world.run(3, save_as_others, tmp_path)[1:]:
        assert "both must number ranks alike" in said


def save_tied(talk: Talk, rank: int, root: Path) -> list[bool]:
    """Weights with fewer rows than there are ranks, under two names; on some ranks none of them is."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = nn.Module()
    model.embedding = nn.Embedding(5, 8)
    model.head = nn.Linear(8, 5, bias=False)
    model.head.weight = model.embedding.weight
    fully_shard(model, mesh=mesh)
    weight: Any = model.head.weight
    whole = weight.full_tensor().clone()
    with checkpointer_of(root, model=model, extra={"plain": torch.ones(3)}) as checkpointer:
        checkpointer.save(1).wait()
        weight.detach().zero_()
        checkpointer.load(1)
    return [model.head.weight is model.embedding.weight, torch.equal(weight.full_tensor(), whole)]


def test_tied_weights_with_fewer_rows_than_ranks(world: World, tmp_path: Path) -> None:
    assert world.run(RANKS, save_tied, tmp_path) == [[True, True]] * RANKS


def load_with_few_descriptors(talk: Talk, rank: int, root: Path) -> tuple[int, bool]:
    """One process reads the files of many ranks; it may open fewer at once than there are."""
    restore._OPEN_MAX = 2  # by the parser, and each thread of the pass has one
    restore._THREADS_MAX = 2
    weight = torch.zeros(2050, 1024)
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    with checkpointer_of(root, model=model) as checkpointer:
        used = len(list(Path("/proc/self/fd").iterdir()))
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 6, most))
        resume = checkpointer.load_latest()
    assert resume is not None
    return resume.step, bool((weight == 1).all())


def test_a_step_of_more_files_than_may_be_open(world: World, tmp_path: Path) -> None:
    world.run(6, save_steps, tmp_path, [1])
    assert world.run(1, load_with_few_descriptors, tmp_path) == [(1, True)]


def count_reads(talk: Talk, rank: int, root: Path, pieces: int) -> int:
    """How often a rank reads to parse a step of which it has `pieces` pieces."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    local = [torch.full((2, 8), float(rank)) for _ in range(pieces)]
    extra = {
        f"w{index}": DTensor.from_local(one, mesh, [Shard(0)], run_check=False)
        for index, one in enumerate(local)
    }
    reads = 0
    real = os.pread

    def counted(*args: Any) -> bytes:
        nonlocal reads
        reads += 1
        return real(*args)

    with checkpointer_of(root, extra=extra) as checkpointer:
        checkpointer.save(1).wait()
        for one in local:
            one.zero_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(restore.os, "pread", counted)
            checkpointer.load(1)
    assert all(bool((one == rank).all()) for one in local)
    return reads


def test_a_rank_parses_what_it_needs(world: World, tmp_path: Path) -> None:
    few = world.run(2, count_reads, tmp_path / "2", 40)
    many = world.run(RANKS, count_reads, tmp_path / "4", 40)
    assert min(few) > 40
    assert max(many) < 1.2 * max(few)


@pytest.mark.parametrize("lie", ["shape", "dtype"])
def test_what_is_parsed_late_is_what_was_described(world: World, tmp_path: Path, lie: str) -> None:
    """The chunks tile the tensor and are as large as their items; but the items are something else."""
    world.run(2, save_steps, tmp_path, [1])
    step = tmp_path / "step-1"
    described = pickle.loads((step / ".metadata").read_bytes())
    weight = described.state_dict_metadata["model.weight"]
    if lie == "shape":
        weight.size = torch.Size((1024, 2050))
        weight.chunks = [
            ChunkStorageMetadata(torch.Size((0, at)), torch.Size((1024, 1025))) for at in (0, 1025)
        ]
        described.storage_data = {
            replace(index, offset=torch.Size(reversed(index.offset)))
            if index.fqn == "model.weight"
            else index: at
            for index, at in described.storage_data.items()
        }
    else:
        weight.properties.dtype = torch.int32
    (step / ".metadata").write_bytes(pickle.dumps(described))
    for path in step.glob("asyncckpt_*"):  # as if another tool had written it: nothing tells what is damaged
        path.unlink()
    kind = torch.float32 if lie == "shape" else torch.int32
    model = nn.Module()
    model.register_buffer("weight", torch.zeros(weight.size, dtype=kind))
    with (
        checkpointer_of(tmp_path, model=model, read_only=True) as checkpointer,
        pytest.raises(CorruptStepError, match=f"model.weight: {lie} differs from its item"),
    ):
        checkpointer.load(1)
    assert not model.weight.any()
