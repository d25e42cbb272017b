"""RLinf's trees: what driver, actor and critic write together RLinf reads, and the other way round."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from asyncckpt import AsyncCheckpointer
from asyncckpt.errors import CheckpointError, LeafError, OptionError
from asyncckpt.formats.manifest import MANIFEST_NAME
from asyncckpt.integrations.rlinf import DriverCheckpoints
from asyncckpt.layouts import layout_named
from asyncckpt.parts import Member, Parts
from tests.process_world import Rank, Talk, World, process_world
from tests.rlinf_run import (
    GROUPS,
    OPTIONS,
    PARTS,
    RANKS,
    Loader,
    Trainer,
    driver_of,
    introduce,
    same,
    stock_load,
    stock_save,
    worker_of,
)

SAVED, STEPS = 3, 5
SILENCE_S = 2.0


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


def run(world: World, parts: Mapping[str, int], body: Any, *args: Any) -> list[Any]:
    """What `body` returned on driver and workers."""
    ranks = world.start_parts(parts, body, *args)
    introduce(ranks)
    return [rank.hear() for rank in ranks]


def files_below(path: Path) -> set[str]:
    """Those that RLinf knows: without our manifest and fragments."""
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    return {name for name in found if not name.startswith("asyncckpt_")}


# ---------------------------------------------------------------------------- a run


def train(
    talk: Talk,
    part: str,
    rank: int,
    log_dir: Path,
    resume_dir: str | None,
    stop_at: int,
    groups: Any = GROUPS,
) -> tuple[int, list[Any], Any]:
    """Steps after the one resumed from, one save in their middle; offloads right after it."""
    if part == "data":
        loader = Loader()
        with driver_of(talk, log_dir, loader, groups) as driver:
            first = driver.resume(resume_dir)
            saved: Any = None
            for step in range(first + 1, stop_at + 1):
                loader.next()
                if step == SAVED:
                    saved = loader.state_dict()
                    driver.save(step)
            return first, loader.drawn, saved
    trainer = Trainer(part, rank)
    with worker_of(talk, part, trainer) as worker:
        first = worker.resume(resume_dir)
        loaded = trainer.state() if first else None
        losses = []
        for step in range(first + 1, stop_at + 1):
            losses.append(trainer.step())
            if step == SAVED:
                loaded = trainer.state()
                worker.save(step)
                trainer.offload_param_and_grad()
        return first, losses, loaded


def read_as_rlinf_does(talk: Talk, rank: int, path: Path, part: str) -> dict[str, Any]:
    trainer = Trainer(part, rank)
    trainer.step()  # RLinf makes the optimizer's state before it loads
    stock_load(trainer, path)
    return trainer.state()


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_rlinf_reads_its_tree(world: World, tmp_path: Path) -> None:
    first = run(world, PARTS, train, tmp_path, "auto", STEPS)
    step = tmp_path / "checkpoints" / f"global_step_{SAVED}"
    own = {f"{part}/rank_{rank:05d}.pt" for part, size in PARTS.items() for rank in range(size)}
    assert files_below(step) - own == {
        "data/data.pt",
        *(f"{part}/model_state_dict/full_weights.pt" for part in GROUPS),
        *(f"{part}/dcp_checkpoint/.metadata" for part in GROUPS),
        *(f"{p}/dcp_checkpoint/__{rank}_0.distcp" for p, size in GROUPS.items() for rank in range(size)),
    }
    for log_dir, resume_dir in ((tmp_path, "auto"), (tmp_path, str(step)), (tmp_path / "next", str(step))):
        again = run(world, PARTS, train, log_dir, resume_dir, STEPS)
        assert again[0][:2] == (SAVED, first[0][1])
        for (_, losses, saved), (found, after, loaded) in zip(first[1:], again[1:], strict=True):
            assert found == SAVED
            assert after == losses[SAVED:]  # dropout too, so generators are each rank's own
            assert same(saved, loaded)
    for part, place, others in (("actor", 1, 2), ("critic", 4, 2), ("actor", 1, 4)):
        for found in world.run(others, read_as_rlinf_does, step / part, part):
            assert same(found, first[place][2])
    for part, place in (("actor", 1), ("critic", 4)):
        weights = torch.load(step / part / "model_state_dict" / "full_weights.pt", weights_only=True)
        state = first[place][2]
        assert {f"model.{name}" for name in weights} == {name for name in state if name.startswith("model.")}
        assert all(torch.equal(value, state[f"model.{name}"]) for name, value in weights.items())
    data = torch.load(step / "data" / "data.pt", weights_only=False)
    saved = first[0][2]
    assert data["_steps"] == saved["_steps"]
    assert data["_snapshot"]["drawn"] == saved["_snapshot"]["drawn"]
    assert torch.equal(data["_snapshot"]["generator"], saved["_snapshot"]["generator"])

    other = {"actor": 2, "critic": 2}
    resumed = run(world, {"data": 1, **other}, train, tmp_path, "auto", SAVED, other)
    for (found, _, loaded), place in zip(resumed[1:], (1, 1, 4, 4), strict=True):
        assert found == SAVED
        assert same(loaded, first[place][2])


def write_both(talk: Talk, part: str, rank: int, log_dir: Path) -> None:
    if part == "data":
        with driver_of(talk, log_dir, Loader(), {"actor": 2}) as driver:
            driver.save(1)
        return
    trainer = Trainer(part, rank)
    trainer.step()
    stock_save(trainer, log_dir / "stock")
    with worker_of(talk, part, trainer) as worker:
        worker.save(1)


def test_the_keys_are_rlinfs(world: World, tmp_path: Path) -> None:
    run(world, {"data": 1, "actor": 2}, write_both, tmp_path)
    ours, theirs = (
        pickle.loads((path / "dcp_checkpoint" / ".metadata").read_bytes())
        for path in (tmp_path / "checkpoints" / "global_step_1" / "actor", tmp_path / "stock")
    )
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    assert ours.planner_data == theirs.planner_data
    for key, described in theirs.state_dict_metadata.items():
        mine = ours.state_dict_metadata[key]
        assert type(mine) is type(described), key
        assert getattr(mine, "size", None) == getattr(described, "size", None)


def save_twice(talk: Talk, part: str, rank: int, log_dir: Path) -> None:
    trainer = Trainer(part, rank)
    checkpoints = driver_of(talk, log_dir, Loader()) if part == "data" else worker_of(talk, part, trainer)
    with checkpoints:
        for step in (1, 2):
            trainer.fill(step)
            checkpoints.save(step)
            checkpoints.fence()


def load_what_is_good(talk: Talk, part: str, rank: int, log_dir: Path) -> tuple[int, set[float]]:
    trainer = Trainer(part, rank)
    checkpoints = driver_of(talk, log_dir, Loader()) if part == "data" else worker_of(talk, part, trainer)
    with checkpoints:
        found = checkpoints.resume()
    return found, trainer.values() if part != "data" else {float(found)}


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_is_found_by_its_part(world: World, tmp_path: Path) -> None:
    run(world, PARTS, save_twice, tmp_path)
    step = tmp_path / "checkpoints" / "global_step_2"
    names = sorted(files_below(step))
    assert len(names) == 1 + RANKS + 3 + 2 + 2 + 2
    for index, name in enumerate(names):
        path = step / name
        whole = path.read_bytes()
        place = (index * len(whole)) // len(names)  # here and there
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert run(world, PARTS, load_what_is_good, tmp_path) == [(1, {1.0})] * RANKS, name
        path.write_bytes(whole)
    assert run(world, PARTS, load_what_is_good, tmp_path) == [(2, {2.0})] * RANKS


# ---------------------------------------------------------------------------- trees of RLinf's own


def write_stock(talk: Talk, part: str, rank: int, log_dir: Path, step: int) -> Any:
    """One step as stock RLinf writes it."""
    path = log_dir / "checkpoints" / f"global_step_{step}"
    if part == "data":
        loader = Loader()
        drawn = [loader.next() for _ in range(step)]
        (path / "data").mkdir(parents=True)
        torch.save(loader.state_dict(), path / "data" / "data.pt")
        return drawn
    trainer = Trainer(part, rank)
    for _ in range(step):
        trainer.step()
    stock_save(trainer, path / part)
    return trainer.state()


@pytest.mark.slow
def test_we_resume_from_a_tree_of_rlinfs_and_pass_over_halves(world: World, tmp_path: Path) -> None:
    ranks = world.start_parts(PARTS, write_stock, tmp_path, SAVED)
    expected = [rank.hear() for rank in ranks]
    root = tmp_path / "checkpoints"
    for step, missing in ((7, "data/data.pt"), (8, "critic/dcp_checkpoint/.metadata")):
        for name in {"data/data.pt", *(f"{part}/dcp_checkpoint/.metadata" for part in GROUPS)} - {missing}:
            path = root / f"global_step_{step}" / name
            path.parent.mkdir(parents=True)
            path.write_bytes(b"whatever")
    found = run(world, PARTS, train, tmp_path, "auto", SAVED)
    assert found[0][1] == expected[0]
    for (first, _, loaded), state in zip(found[1:], expected[1:], strict=True):
        assert first == SAVED
        assert same(loaded, state)


@pytest.mark.parametrize("layout", ["rlinf-fsdp", "rlinf-megatron"])
@pytest.mark.parametrize(
    ("missing", "parts", "problem"),
    [
        ("", ("data", "actor", "critic"), None),
        ("", ("driver", "actor"), None),
        ("", (), None),
        ("data/data.pt", ("data", "actor"), "no data/data.pt"),
        ("critic", ("data", "actor", "critic"), "no critic/"),
        ("critic", ("data", "actor"), None),
        ("actor", ("data", "actor"), "no actor/"),
        ("actor", (), "no actor/"),
    ],
)
def test_which_foreign_trees_are_whole(
    layout: str, missing: str, parts: tuple[str, ...], problem: str | None
) -> None:
    tail = "dcp_checkpoint/.metadata" if layout == "rlinf-fsdp" else "latest_checkpointed_iteration.txt"
    names = ("data/data.pt", f"actor/{tail}", f"critic/{tail}")
    files = {name: 0 if missing and name.startswith(missing) else 9 for name in names}
    said = layout_named(layout).foreign_problem(5, ["actor", "critic", "data"], None, files.get, parts)
    assert (said is None) == (problem is None)
    assert (problem or "") in (said or "")


# ---------------------------------------------------------------------------- megatron's trees


def train_megatron(
    talk: Talk, part: str, rank: int, log_dir: Path, resume_dir: str | None
) -> tuple[int, list[Any], Any]:
    groups = {"actor": 1, "critic": 1}
    loader, trainer = Loader(), Trainer(part, rank, sharded=False)
    if part == "data":
        checkpoints: Any = driver_of(talk, log_dir, loader, groups, backend="megatron")
    else:
        checkpoints = worker_of(talk, part, trainer)
    with checkpoints:
        first = checkpoints.resume(resume_dir)
        said: list[Any] = []
        state: Any = trainer.state() if first else None
        for step in range(first + 1, STEPS + 1):
            said.append(loader.next() if part == "data" else trainer.step())
            if step in (SAVED - 1, SAVED):  # the second one reuses the plan of the first
                state = trainer.state()
                checkpoints.save(step)
                if part != "data":
                    trainer.offload_param_and_grad()
        assert first or checkpoints.checkpointer.plans_made == 1
        return first, said, state


def test_megatrons_trees_below_rlinfs(world: World, tmp_path: Path) -> None:
    parts = {"data": 1, "actor": 1, "critic": 1}
    first = run(world, parts, train_megatron, tmp_path, None)
    step = tmp_path / "checkpoints" / f"global_step_{SAVED}"
    assert files_below(step) == {
        "data/data.pt",
        "data/rank_00000.pt",
        *(f"{part}/iter_{SAVED:07d}/mp_rank_00/model_optim_rng.pt" for part in GROUPS),
        *(f"{part}/latest_checkpointed_iteration.txt" for part in GROUPS),
    }
    for part in GROUPS:
        tracker = (step / part / "latest_checkpointed_iteration.txt").read_text()
        assert tracker == str(SAVED)
        path = step / part / f"iter_{int(tracker):07d}" / "mp_rank_00" / "model_optim_rng.pt"
        assert torch.load(path, weights_only=False)["iteration"] == SAVED
    again = run(world, parts, train_megatron, tmp_path, "auto")
    for (_, said, state), (found, after, loaded) in zip(first, again, strict=True):
        assert found == SAVED
        assert after == said[SAVED:]
        assert same(state, loaded)
    for path in step.glob("asyncckpt_*"):  # as RLinf would have left it
        path.unlink()
    assert [found[0] for found in run(world, parts, train_megatron, tmp_path, str(step))] == [SAVED] * 3
    (step / "critic" / "latest_checkpointed_iteration.txt").unlink()
    assert [found[0] for found in run(world, parts, train_megatron, tmp_path, "auto")] == [SAVED - 1] * 3


# ---------------------------------------------------------------------------- what goes wrong


def save_three_times(
    talk: Talk, part: str, rank: int, log_dir: Path, victim: tuple[str, int], trap: str
) -> tuple[int, str, str] | None:
    """Saves 1 to 3; the victim says so in save 2 and waits. At which call who heard of it, and what."""

    def on_phase(step: int, phase: str) -> None:
        if (part, rank) == victim and step == 2 and phase == trap:
            talk.say("trapped")
            talk.listen()

    options = {
        "rank_timeout_s": SILENCE_S, "fence_timeout_s": 30, "max_in_flight": 1, "on_phase": on_phase,
    }  # fmt: skip
    if part == "data":
        loader, checkpoints = Loader(), None
        checkpoints = driver_of(talk, log_dir, loader, **options)
    else:
        trainer = Trainer(part, rank)
        checkpoints = worker_of(talk, part, trainer, **options)
    call = 0
    try:
        for call in (1, 2, 3):
            if part == "data":
                loader.next()
            else:
                trainer.fill(call)
            checkpoints.save(call)
            checkpoints.fence()
            if call == 1:
                checkpoints.wait()
                talk.say("saved")
                talk.listen()  # a driver that dies takes the store along: all have heard of this save
        checkpoints.wait()
    except CheckpointError as error:
        return call, type(error).__name__, str(error)
    finally:
        try:
            checkpoints.close()
        except CheckpointError:
            pass
    return None


DEATHS = [(("actor", 1), "submitted"), (("critic", 0), "voted"), (("data", 0), "checked")]
DEATHS += [(("data", 0), phase) for phase in ("voted", "manifest", "renamed")]


def start(world: World, body: Any, *args: Any) -> list[Rank]:
    ranks = world.start_parts(PARTS, body, *args)
    introduce(ranks)
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "trap"), DEATHS)
def test_when_one_dies_the_others_raise_at_one_call_and_a_restart_goes_on(
    world: World, tmp_path: Path, victim: tuple[str, int], trap: str
) -> None:
    ranks = start(world, save_three_times, tmp_path, victim, trap)
    for rank in ranks:
        rank.hear("saved")
    for rank in ranks:
        rank.pipe.send("go on")
    place = Member(Parts(PARTS), *victim).place
    ranks[place].hear("trapped")
    ranks[place].kill()
    for call, kind, text in (rank.hear() for index, rank in enumerate(ranks) if index != place):
        assert (call, kind) == (3, "RankError")
        assert f"{victim[0]} rank {victim[1]}" in text
    newest = 2 if trap == "renamed" or (trap == "voted" and victim[0] != "data") else 1
    assert [found[0] for found in run(world, PARTS, train, tmp_path, "auto", newest)] == [newest] * RANKS
    root = tmp_path / "checkpoints"
    assert {p.name for p in root.glob("global_step_*")} == {f"global_step_{n}" for n in range(1, newest + 1)}


def begin(talk: Talk, part: str, rank: int, log_dir: Path) -> str:
    try:
        options = {"rank_timeout_s": SILENCE_S, "fence_timeout_s": 20}
        if part == "data":
            driver_of(talk, log_dir, Loader(), **options).close()
        else:
            worker_of(talk, part, Trainer(part, rank), **options).close()
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_critic_that_never_arrives(world: World, tmp_path: Path) -> None:
    for said in run(world, {"data": 1, "actor": 3}, begin, tmp_path):
        assert "critic rank 0 shows no sign of life" in said


def test_a_part_of_another_name(world: World, tmp_path: Path) -> None:
    said = run(world, {**PARTS, "actress": 1}, begin, tmp_path)
    assert said == [""] * RANKS + ["no part 'actress'; there are: data, actor, critic"]


# ---------------------------------------------------------------------------- alone


def test_a_layout_with_parts_needs_them(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="layout 'rlinf-fsdp' has a directory per part: pass part= and"):
        AsyncCheckpointer(tmp_path, extra={"a": 1}, layout="rlinf-fsdp")


def test_the_driver_saves_no_model(tmp_path: Path) -> None:
    with (
        AsyncCheckpointer(
            tmp_path, extra={"a": 1}, layout="rlinf-fsdp", part="data", parts={"data": 1}
        ) as driver,
        pytest.raises(LeafError, match="extra: the driver saves a dataloader"),
    ):
        driver.save(1)


def test_a_driver_without_a_dataloader(tmp_path: Path) -> None:
    values = {"epoch": 3}
    options: dict[str, Any] = {"host": "127.0.0.1", "values": values, **OPTIONS}
    with DriverCheckpoints(tmp_path, {}, **options) as driver:
        driver.begin()
        driver.save(5)
        driver.wait()
        values["epoch"] = 0
        assert driver.resume() == 5
        with pytest.raises(OptionError, match="no global_step_N"):
            driver.resume(tmp_path / "checkpoints" / "step_5")
    assert values == {"epoch": 3}
    assert files_below(tmp_path / "checkpoints" / "global_step_5") == {"driver/rank_00000.pt"}
    assert (tmp_path / "checkpoints" / "global_step_5" / MANIFEST_NAME).exists()
    with DriverCheckpoints(tmp_path / "next", {}, **options) as other:
        other.begin()
        values["epoch"] = 0
        assert other.resume(tmp_path / "checkpoints" / "global_step_5") == 5
        other.save(6)
    assert values == {"epoch": 3}
    assert [path.name for path in (tmp_path / "next" / "checkpoints").glob("global*")] == ["global_step_6"]


def test_a_worker_of_one_keeps_its_generators_apart(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    options: dict[str, Any] = {"model": model, "layout": "rlinf-fsdp", "part": "actor", "parts": {"actor": 1}}
    with AsyncCheckpointer(tmp_path, **options) as saver:
        saver.save(1).wait()
        drawn = torch.rand(3)
        saver.load(1)
        assert torch.equal(torch.rand(3), drawn)
    assert files_below(tmp_path / "global_step_1" / "actor") == {
        "rank_00000.pt", "dcp_checkpoint/.metadata", "dcp_checkpoint/__0_0.distcp",
        "model_state_dict/full_weights.pt",
    }  # fmt: skip
    weights = torch.load(tmp_path / "global_step_1/actor/model_state_dict/full_weights.pt", weights_only=True)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["optimizer", "lr_scheduler"])
def test_what_rlinf_has_no_place_for_is_refused(tmp_path: Path, name: str) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([param])
    several: Any = [optimizer] if name == "optimizer" else [torch.optim.lr_scheduler.StepLR(optimizer, 1)]
    options: dict[str, Any] = {name: several, "layout": "rlinf-fsdp", "part": "a", "parts": {"a": 1}}
    with AsyncCheckpointer(tmp_path, **options) as saver, pytest.raises(LeafError, match=f"{name}: .*itself"):
        saver.save(1)


def test_neither_rlinf_nor_ray_is_imported() -> None:
    code = "import sys, asyncckpt.integrations.rlinf as m; print({'ray', 'rlinf'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code]).strip() == b"set()"
    assert not dist.is_initialized()
