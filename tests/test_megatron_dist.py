"""integrations.megatron, format torch_dist, with real megatron-core: it reads what we wrote, and we what it
wrote; also at another size."""

from __future__ import annotations

import pickle
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from asyncckpt import AsyncCheckpointer
from asyncckpt.errors import CorruptStepError, LeafError, MismatchError, OptionError
from asyncckpt.integrations import megatron as ours
from asyncckpt.integrations.megatron.sharded import boxed, leaves_of
from asyncckpt.layouts import MegatronDistLayout
from tests.megatron_dist_ranks import directory_of, stock_load, stock_load_model, stock_save
from tests.megatron_ranks import TRACKER, Job, Layout, megatron, stock_read
from tests.process_world import Talk, World, process_world
from tests.test_megatron import same

RANKS = 4
SAVED, LAST = 2, 4
COLLECTIVES = ("all_gather", "all_gather_object", "all_reduce", "broadcast", "gather", "barrier")

# With several buckets, 0.16.1 saves other elements than a parameter's as its fully reshardable state: it adds
# the lengths of buckets with their padding to find them where buckets lie without (it warns of that).
WHOLE = 10_000_000

CASES = {
    "tensor-bf16": (Layout(tensor=2), False),
    "data-fp32": (Layout(bf16=False), False),
    "expert": (Layout(expert=2, experts=4), False),
    "pipeline": (Layout(pipeline=2, virtual=2, layers=4), False),
    "expert-fully": (Layout(expert=2, experts=4, bucket_size=WHOLE), True),
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


def checkpointer_of(job: Job, root: Path, **options: Any) -> AsyncCheckpointer:
    given = {
        "model": job.chunks,
        "optimizer": job.optimizer,
        "opt_param_scheduler": job.scheduler,
        "args": job._args(0),
        "format": "torch_dist",
        "host_memory": 8 << 20,
        "rank_timeout_s": 30,
        "fence_timeout_s": 60,
    }
    return ours.checkpointer(root, **{**given, **options})


def trained(layout: Layout) -> Job:
    job = Job(layout)
    for number in range(SAVED):
        job.train_step(number)
    return job


def save_ours_load_both(talk: Talk, rank: int, layout: Layout, fully: bool, root: Path) -> None:
    with megatron(layout):
        job = trained(layout)
        stock_save(job, root / "theirs", fully_reshardable=fully)
        called: list[str] = []
        with checkpointer_of(job, root / "ours", fully_reshardable=fully) as checkpointer:
            refusals = [
                patch.object(dist, name, lambda *_, **__: called.append("one")) for name in COLLECTIVES
            ]
            for refusal in refusals:
                refusal.start()
            handle = checkpointer.save(SAVED)
            for refusal in refusals:
                refusal.stop()
            saved, parameters = job.shards(), job.parameters()
            losses = [job.train_step(number) for number in range(SAVED, LAST)]
            handle.wait()
        assert not called
        after = job.shards()

        fresh = Job(layout, seed=2)
        stock_load(fresh, root / "ours")
        assert same(fresh.shards(), saved)
        assert same(fresh.parameters(), parameters)
        assert fresh.iteration == SAVED

        if rank == 0:
            compare(directory_of(root / "theirs", SAVED), directory_of(root / "ours", SAVED), fully)

        again = Job(layout, seed=3)
        with checkpointer_of(again, root / "ours") as checkpointer:
            resume = checkpointer.load_latest()
            assert resume is not None
            assert (resume.step, resume.verified) == (SAVED, True)
            assert same(again.shards(), saved)
            assert same(again.parameters(), parameters)
            assert [again.train_step(number) for number in range(SAVED, LAST)] == losses
            assert same(again.shards(), after)

        fresh = Job(layout, seed=4)
        with checkpointer_of(fresh, root / "theirs") as checkpointer:
            resume = checkpointer.load_latest()
            assert resume is not None
            assert (resume.step, resume.verified) == (SAVED, False)
            assert same(fresh.shards(), saved)
            assert same(fresh.parameters(), parameters)
            fresh.train_step(SAVED)
            checkpointer.save(SAVED + 1).wait()
            assert checkpointer.steps() == [SAVED, SAVED + 1]


@pytest.mark.parametrize(("layout", "fully"), CASES.values(), ids=CASES)
def test_megatron_and_we_read_each_other_and_what_we_write_is_what_it_writes(
    world: World, tmp_path: Path, layout: Layout, fully: bool
) -> None:
    world.run(RANKS, save_ours_load_both, layout, fully, tmp_path)
    assert (tmp_path / "ours" / TRACKER).read_text() == str(SAVED)


def compare(theirs: Path, here: Path, fully: bool) -> None:
    """What stock tools find in both."""
    assert (theirs / "metadata.json").read_bytes() == (here / "metadata.json").read_bytes()
    stock, mine = described(theirs), described(here)
    assert forms_of(stock, fully) == forms_of(mine, fully)
    values = loaded(theirs, stock), loaded(here, mine)
    for key, value in values[1].items():
        # What pads parameters in an optimizer's buffer is zeros here, and whatever memory held there.
        known = value != 0 if "optimizer." in key else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[known], values[0][key][known]), key
    assert stock_read(theirs / "common.pt") == stock_read(here / "common.pt")


def loaded(directory: Path, metadata: Metadata) -> dict[str, torch.Tensor]:
    """Every tensor, whole, as stock DCP loads it."""
    state = {
        key: torch.empty(one.size, dtype=one.properties.dtype)
        for key, one in metadata.state_dict_metadata.items()
        if not isinstance(one, BytesStorageMetadata)
    }
    dcp.load(state, checkpoint_id=directory, no_dist=True)
    return state


def described(directory: Path) -> Metadata:
    found = pickle.loads((directory / ".metadata").read_bytes())
    assert isinstance(found, Metadata)
    return found


def forms_of(described: Metadata, fully: bool) -> dict[str, Any]:
    """What a checkpoint has; without the boxes of an optimizer whose gathered state has others."""
    return {
        key: "bytes"
        if isinstance(one, BytesStorageMetadata)
        else (
            one.properties,
            tuple(one.size),
            {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in one.chunks}
            if not (fully and key.startswith("optimizer."))
            else None,
        )
        for key, one in described.state_dict_metadata.items()
    }


def save_here_load_there(talk: Talk, rank: int, fully: bool, root: Path) -> None:
    """From tensor parallelism of 2 to 1; what stock loads there is what we load."""
    with megatron(Layout(tensor=2)):
        job = trained(Layout(tensor=2))
        with checkpointer_of(job, root, fully_reshardable=fully) as checkpointer:
            checkpointer.save(SAVED).wait()
        if fully:  # what was saved of several buckets; here stock's own save would be of no use
            again = Job(Layout(tensor=2), seed=4)
            stock_load(again, root)
            assert same(again.shards(), job.shards())
    directory = directory_of(root, SAVED)
    with megatron(Layout()):
        stock, mine = Job(Layout(), seed=2), Job(Layout(), seed=3)
        assert len(mine.optimizers()[0].buffers[0].buckets) > 1
        if fully:
            generators = torch.get_rng_state()
            with checkpointer_of(mine, root) as checkpointer:
                checkpointer.load(SAVED)
            assert torch.equal(torch.get_rng_state(), generators)  # other ranks' are no use here
            stock_load(stock, root, generators=False)
            assert same(mine.shards(), stock.shards())
        else:
            with checkpointer_of(mine, root, read_only=True) as checkpointer:
                before = mine.parameters()
                with pytest.raises(MismatchError, match="optimizer: other buckets in the checkpoint"):
                    checkpointer.load(SAVED)
                assert same(mine.parameters(), before)
            with checkpointer_of(mine, root, optimizer=None, read_only=True) as checkpointer:
                with pytest.raises(MismatchError, match="optimizer: only in the checkpoint"):
                    checkpointer.load(SAVED)
                checkpointer.load(SAVED, strict=False)
            stock_load_model(stock, directory)
        assert same(mine.parameters(), stock.parameters())


@pytest.mark.parametrize("fully", [False, True], ids=["by-bucket", "fully"])
def test_another_parallelism_loads_the_model_and_the_optimizer_if_it_is_fully_reshardable(
    world: World, tmp_path: Path, fully: bool
) -> None:
    world.run(RANKS, save_here_load_there, fully, tmp_path)


def save_damaged(talk: Talk, rank: int, root: Path) -> None:
    layout = Layout(bf16=False)
    with megatron(layout):
        job = trained(layout)
        with checkpointer_of(job, root, keep_last=9) as checkpointer:
            for step in (1, 2, 3, 4, 5):
                checkpointer.save(step).wait()
            assert checkpointer.plans_made == 1
            talk.say("saved")
            talk.listen()
            for step, what in (
                (2, "__1_0.distcp"),
                (3, "metadata.json"),
                (4, "common.pt"),
                (5, "metadata.json"),
            ):
                with pytest.raises(CorruptStepError, match=what):
                    checkpointer.load(step)
            resume = checkpointer.load_latest()
            assert resume is not None
            assert resume.step == 1
            assert len(resume.passed_over) == 4


def test_damage_is_found_and_what_is_missing_is_named(world: World, tmp_path: Path) -> None:
    ranks = world.start(2, save_damaged, tmp_path)
    for one in ranks:
        one.hear("saved")
    flip(directory_of(tmp_path, 2) / "__1_0.distcp")
    (directory_of(tmp_path, 3) / "metadata.json").unlink()
    (directory_of(tmp_path, 4) / "common.pt").unlink()
    (directory_of(tmp_path, 5) / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    for one in ranks:
        one.pipe.send("go on")
    for one in ranks:
        assert one.hear() is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def save_alone(talk: Talk, rank: int, root: Path) -> None:
    """Also what layers have besides tensors, as those of Transformer Engine do."""
    from megatron.core.tensor_parallel import RowParallelLinear

    layout = Layout(bf16=False)
    heard: list[Any] = []
    with (
        megatron(layout),
        patch.object(RowParallelLinear, "get_extra_state", lambda _: torch.arange(3.0)),
        patch.object(RowParallelLinear, "set_extra_state", lambda _, state: heard.append(state)),
    ):
        job = trained(layout)
        stock_save(job, root / "newer", newer=True)
        with checkpointer_of(job, root) as checkpointer:
            checkpointer.save(SAVED).wait()
            losses = [job.train_step(number) for number in range(SAVED, LAST)]
            assert not (directory_of(root, SAVED) / "rank_00000.pt").exists()
        for load, where in ((stock_load, root), (load_ours, root), (load_ours, root / "newer")):
            again = Job(layout, seed=2)
            heard.clear()
            load(again, where)
            assert heard
            assert all(torch.equal(state, torch.arange(3.0)) for state in heard)
            assert [again.train_step(number) for number in range(SAVED, LAST)] == losses


def load_ours(job: Job, root: Path) -> None:
    with checkpointer_of(job, root) as checkpointer:
        checkpointer.load(SAVED)


def test_one_rank_alone(world: World, tmp_path: Path) -> None:
    world.run(1, save_alone, tmp_path)


def refuse(talk: Talk, rank: int, root: Path) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    layout = Layout(bf16=False)
    with megatron(layout):
        job = Job(layout)
        with pytest.raises(OptionError, match="got 'zarr'"):
            checkpointer_of(job, root, format="zarr")
        with pytest.raises(OptionError, match="only format 'torch_dist'"):
            checkpointer_of(job, root, format="torch", fully_reshardable=True)
        with pytest.raises(OptionError, match="data-parallel-random-init"):
            checkpointer_of(job, root, args=Namespace(data_parallel_random_init=True))
        with checkpointer_of(job, root) as checkpointer:
            with pytest.raises(LeafError, match="made no step yet"):
                checkpointer.save(1)
            assert checkpointer.steps() == []

        weight = torch.zeros(4, 3)
        copied = ShardedTensorFactory(
            "w", weight, lambda key, t, *_: [ShardedTensor.from_rank_offsets(key, t.clone())], sum
        )
        with pytest.raises(LeafError, match=r"w\.0: its factory copies w"):
            list(leaves_of("w", copied))
        flat = ShardedTensor.from_rank_offsets("w", weight)
        flat.flattened_range = slice(0, 2)  # 0.16.1 makes no such tensor, but others do
        with pytest.raises(LeafError, match="a flattened range"):
            boxed("layer.w", flat)
        with pytest.raises(LeafError, match="a int in a sharded state dict"):
            list(leaves_of("w", {"count": 3}))


def test_what_cannot_be_saved_is_refused_by_name(world: World, tmp_path: Path) -> None:
    world.run(1, refuse, tmp_path)


def fewer_data_ranks(talk: Talk, rank: int, root: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What this rank has of each parameter's exp_avg, and the parameters."""
    layout = Layout(bf16=False, hidden=256)
    with megatron(layout):
        if dist.get_world_size() == 4:
            job = trained(layout)
            with checkpointer_of(job, root) as checkpointer:
                handle = checkpointer.save(SAVED)
                handle.wait()
                shares = [0] * 4
                dist.all_gather_object(shares, handle.report.nbytes)
                assert max(shares) < 1.2 * min(shares)
        else:
            job = Job(layout, seed=2)
            with checkpointer_of(job, root, read_only=True) as checkpointer:
                resume = checkpointer.load_latest()
                assert resume is not None
                assert resume.left == ("rng",)
        parameters = {name: value.numpy().tobytes() for name, value in job.parameters().items()}
        return {
            name: state["exp_avg"].numpy().tobytes() for (_, name), state in job.shards().items()
        }, parameters


def test_fewer_data_parallel_ranks_load_all_of_it(world: World, tmp_path: Path) -> None:
    saved, fewer = (world.run(ranks, fewer_data_ranks, tmp_path) for ranks in (4, 2))
    assert joined([moments for moments, _ in saved]) == joined([moments for moments, _ in fewer])
    assert all(parameters == saved[0][1] for _, parameters in (*saved, *fewer))
    metadata = described(directory_of(tmp_path, SAVED))
    weights = [
        one
        for key, one in metadata.state_dict_metadata.items()
        if key.startswith("decoder.layers.mlp.linear")
    ]
    assert any(
        len(one.chunks) > 2 for one in weights if hasattr(one, "chunks")
    )  # of two layers, some are cut


def joined(ranks: list[dict[str, bytes]]) -> dict[str, bytes]:
    whole: dict[str, bytes] = {}
    for shards in ranks:
        for name, values in shards.items():
            whole[name] = whole.get(name, b"") + values
    return whole


def test_steps_of_other_tools_that_are_not_whole_are_named() -> None:
    layout = MegatronDistLayout()
    whole = {".metadata", "common.pt", "metadata.json", "__0_0.distcp"}
    assert layout.foreign_problem(2, whole, 2) is None
    for name in (".metadata", "metadata.json"):
        assert f"no {name}:" in str(layout.foreign_problem(2, whole - {name}, 2))
    assert "beyond the tracker" in str(layout.foreign_problem(3, whole, 2))
    assert "vouches" in str(layout.foreign_problem(2, whole, None))
