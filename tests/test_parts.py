"""Several groups of processes write one step: each its own files, all of them one vote."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from asyncckpt import AsyncCheckpointer
from asyncckpt.errors import CheckpointError, LoadError, OptionError
from asyncckpt.formats.manifest import MANIFEST_NAME, Manifest
from asyncckpt.parts import Member, Parts
from tests.process_world import Talk, World, process_world

PARTS = {"driver": 1, "actor": 3, "critic": 2}
RANKS = sum(PARTS.values())
SILENCE_S = 2.0


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_world() as made:
        yield made


# ---------------------------------------------------------------------------- the numbering


def test_all_participants_are_numbered_in_the_order_declared() -> None:
    parts = Parts(PARTS)
    assert parts.world_size == RANKS
    assert [list(parts.places(part)) for part in PARTS] == [[0], [1, 2, 3], [4, 5]]
    members = [Member(parts, part, rank) for part, size in PARTS.items() for rank in range(size)]
    assert [member.place for member in members] == list(range(RANKS))
    assert [str(member) for member in members][:3] == ["driver rank 0", "actor rank 0", "actor rank 1"]
    assert parts.called(0, 2, 3, 5) == "driver rank 0 and actor ranks 1, 2 and critic rank 1"


def test_without_parts_places_are_ranks() -> None:
    parts = Parts.none(20)
    assert parts.called(3) == "rank 3"
    assert parts.called(*range(12)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more"


@pytest.mark.parametrize(
    "parts",
    [
        {}, {"": 1}, {"a/b": 1}, {"..": 1}, {".hidden": 1}, {"main": 1}, {"asyncckpt_x": 1}, {"a\n": 1},
        {7: 1}, {"a": 0}, {"a": True}, {"a": "2"}, {"ä": 1}, {"x" * 65: 1},
    ],
)  # fmt: skip
def test_declarations_that_make_no_sense(tmp_path: Path, parts: Any) -> None:
    with pytest.raises(OptionError, match="parts: "):
        AsyncCheckpointer(tmp_path, extra={"a": 1}, part="a", parts=parts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"part": "actor"}, "belong together"),
        ({"parts": {"actor": 1}}, "belong together"),
        ({"part": "actress", "parts": PARTS}, "no part 'actress'; there are: driver, actor, critic"),
        ({"part": "actor", "parts": PARTS}, "nothing says which this is"),
        ({"part": "actor", "parts": PARTS, "rank": 3}, "rank 3 of 3 ranks of part 'actor'"),
        ({"part": "actor", "parts": PARTS, "rank": 0, "world_size": 4}, "declared with 3 ranks, here are 4"),
        ({"part": "driver", "parts": PARTS}, "6 ranks need a store"),
    ],
)
def test_participants_that_make_no_sense(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        AsyncCheckpointer(tmp_path, extra={"a": 1}, **options)


# ---------------------------------------------------------------------------- saving and loading


class Sharded(nn.Module):
    """Rows on the ranks of its part; and a plain tensor on each."""

    def __init__(self, value: float, rows: int = 26) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        whole = torch.full((rows, 40), float(value))
        self.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]), requires_grad=False)
        self.bias = nn.Parameter(torch.full((3,), float(value)), requires_grad=False)

    def fill(self, value: float) -> None:
        for param in self.parameters():
            param.fill_(value)

    def values(self) -> set[float]:
        local: Any = self.weight
        return {*local.to_local().flatten().tolist(), *self.bias.tolist()}


BASE = {"driver": 1000.0, "actor": 2000.0, "critic": 3000.0}  # so that nobody gets another part's values


def checkpointer_of(
    talk: Talk, root: Path, part: str, parts: Mapping[str, int], **options: Any
) -> AsyncCheckpointer:
    defaults = {"host_memory": 1 << 20, "rank_timeout_s": 20, "fence_timeout_s": 60, "store": talk.store}
    return AsyncCheckpointer(root, part=part, parts=parts, **{**defaults, **options})


def save_steps(
    talk: Talk, part: str, rank: int, root: Path, parts: Mapping[str, int], steps: list[int]
) -> None:
    model, mine = Sharded(0), {"rank": -1}
    with checkpointer_of(talk, root, part, parts, model=model, per_rank=mine, extra={"of": part}) as saver:
        for step in steps:
            model.fill(BASE[part] + step)
            mine["rank"] = rank
            saver.save(step)
            saver.fence()


def load_latest(
    talk: Talk, part: str, rank: int, root: Path, parts: Mapping[str, int], steps: tuple[int, ...] = ()
) -> tuple[Any, ...]:
    """The step, the values less those of the part, what is the rank's own, and what was left."""
    model, mine, extra = Sharded(-1), {"rank": -1}, {"of": "?"}
    with checkpointer_of(talk, root, part, parts, model=model, per_rank=mine, extra=extra) as loader:
        try:
            resume = loader.load_latest()
        except CheckpointError as error:
            return type(error).__name__, str(error)
        assert resume is not None
        assert resume.verified
        assert extra["of"] == part
        for step in steps:
            loader.save(step).wait()
    return resume.step, {v - BASE[part] for v in model.values()}, mine["rank"], resume.left


def files_below(path: Path) -> set[str]:
    return {str(found.relative_to(path)) for found in path.rglob("*") if found.is_file()}


def test_each_part_has_files_of_its_own_and_gets_them_back(world: World, tmp_path: Path) -> None:
    world.run_parts(PARTS, save_steps, tmp_path, PARTS, [1, 2])
    step = tmp_path / "step-2"
    own = {
        f"{part}/{name}"
        for part, size in PARTS.items()
        for rank in range(size)
        for name in (f"__{rank}_0.distcp", f"rank_{rank:05d}.pt")
    }
    own -= {"driver/rank_00000.pt"}  # alone in its part: all is in one file
    fragments = {f"asyncckpt_rank_{place:05d}.json" for place in range(RANKS)}
    assert files_below(step) == {
        *own,
        *fragments,
        *(f"{part}/.metadata" for part in PARTS),
        MANIFEST_NAME,
    }
    manifest = Manifest.from_bytes((step / MANIFEST_NAME).read_bytes())
    assert manifest.world_sizes == PARTS
    assert manifest.format_version == 1
    results = world.run_parts(PARTS, load_latest, tmp_path, PARTS, (3,))
    assert results == [(2, {2.0}, rank, ()) for size in PARTS.values() for rank in range(size)]


def test_stock_dcp_reads_each_part(world: World, tmp_path: Path) -> None:
    world.run_parts(PARTS, save_steps, tmp_path, PARTS, [5])
    for part in PARTS:
        live = {"model.weight": torch.zeros(26, 40), "model.bias": torch.zeros(3)}
        with pytest.warns(UserWarning, match="torch.distributed is disabled"):
            torch.distributed.checkpoint.load(live, checkpoint_id=tmp_path / "step-5" / part, no_dist=True)
        assert {v for t in live.values() for v in t.flatten().tolist()} == {BASE[part] + 5}


def test_one_part_may_resume_with_another_number_of_ranks(world: World, tmp_path: Path) -> None:
    world.run_parts(PARTS, save_steps, tmp_path, PARTS, [5])
    other = {**PARTS, "actor": 2}
    found = world.run_parts(other, load_latest, tmp_path, other, (6,))
    assert found[0] == (5, {5.0}, 0, ())
    assert found[1:3] == [(5, {5.0}, -1, ("per_rank", "rng"))] * 2
    assert found[3:] == [(5, {5.0}, 0, ()), (5, {5.0}, 1, ())]


def test_a_part_that_a_step_does_not_have(world: World, tmp_path: Path) -> None:
    world.run_parts({"driver": 1, "actor": 2}, save_steps, tmp_path, {"driver": 1, "actor": 2}, [5])
    for kind, text in world.run_parts(PARTS, load_latest, tmp_path, PARTS):
        assert kind in ("LoadError", "RankError")
        assert "has no part 'critic'; it was saved by: driver, actor" in text
    with (
        AsyncCheckpointer(tmp_path, extra={"of": 0}, read_only=True) as alone,
        pytest.raises(LoadError, match="no part 'main'"),
    ):
        alone.load_latest()


@pytest.mark.parametrize("name", ["actor/__2_0.distcp", "critic/.metadata", "driver/__0_0.distcp"])
def test_damage_in_one_part_makes_all_fall_back(world: World, tmp_path: Path, name: str) -> None:
    world.run_parts(PARTS, save_steps, tmp_path, PARTS, [1, 2])
    path = tmp_path / "step-2" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    assert {found[:2] for found in map(_hashable, world.run_parts(PARTS, load_latest, tmp_path, PARTS))} == {
        (1, (1.0,))
    }


def _hashable(found: tuple[Any, ...]) -> tuple[Any, ...]:
    return found[0], tuple(found[1]), *found[2:]


def differ(talk: Talk, part: str, rank: int, root: Path, what: str) -> str:
    model, extra = Sharded(0, rows=20 if part == "critic" else 26), {"of": part}
    if what == "value" and (part, rank) == ("actor", 2):
        extra["of"] = "nobody"
    if what == "structure" and (part, rank) == ("critic", 1):
        extra["more"] = "yes"
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("asyncckpt").addHandler(handler)
    try:
        with checkpointer_of(talk, root, part, PARTS, model=model, extra=extra) as saver:
            saver.save(1)
    except CheckpointError as error:
        heard.append(str(error))
    return "\n".join(heard)


@pytest.mark.parametrize("what", ["nothing", "value", "structure"])
def test_what_ranks_have_in_common_is_compared_within_a_part(world: World, tmp_path: Path, what: str) -> None:
    heard = world.run_parts(PARTS, differ, tmp_path, what)
    if what == "nothing":
        assert heard == [""] * RANKS
    elif what == "value":
        assert "extra.of is not the same on actor rank 2 as on actor rank 0" in heard[0]
        assert heard[1:] == [""] * (RANKS - 1)
    else:
        for said in heard:
            assert "the state of critic rank 1 has another structure than that of critic rank 0" in said


# ---------------------------------------------------------------------------- who is not as declared


def begin(
    talk: Talk, part: str, rank: int, root: Path, parts: Mapping[str, int], odd: Mapping[str, int]
) -> str:
    """What a participant hears at its constructor; actor rank 1 declares `odd`."""
    try:
        declared = odd if (part, rank) == ("actor", 1) else parts
        checkpointer_of(
            talk, root, part, declared, extra={"a": 1}, rank_timeout_s=SILENCE_S, fence_timeout_s=20
        ).close()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_part_that_never_arrives_is_named_by_all(world: World, tmp_path: Path) -> None:
    for said in world.run_parts({"driver": 1, "actor": 3}, begin, tmp_path, PARTS, PARTS):
        assert said.startswith("RankError: ")
        assert "critic rank 0 shows no sign of life" in said


@pytest.mark.parametrize(
    "odd",
    [{**PARTS, "critic": 1}, {"driver": 1, "critic": 2, "actor": 3}, {"driver": 1, "actor": 3}],
    ids=["size", "order", "fewer"],
)
def test_another_declaration_is_told_to_all(world: World, tmp_path: Path, odd: dict[str, int]) -> None:
    said = world.run_parts(PARTS, begin, tmp_path, PARTS, odd)
    for word in said:
        assert "actor rank 1 has parts " in word
        assert f"where driver rank 0 has {Parts(PARTS)}" in word
    assert [word.split(":")[0] for word in said].count("OptionError") == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("step")]


# ---------------------------------------------------------------------------- death


def save_three_times(
    talk: Talk, part: str, rank: int, root: Path, victim: tuple[str, int], trap: str
) -> tuple[int, str, str] | None:
    """Saves 1 to 3; the victim says so in save 2 and waits. At which call who heard of it, and what."""
    model = Sharded(BASE[part] + 1)

    def on_phase(step: int, phase: str) -> None:
        if (part, rank) == victim and step == 2 and phase == trap:
            talk.say("trapped")
            talk.listen()  # for ever: what comes is a signal

    saver = checkpointer_of(
        talk, root, part, PARTS, model=model, per_rank={"rank": rank}, extra={"of": part},
        rank_timeout_s=SILENCE_S, fence_timeout_s=30, max_in_flight=1, on_phase=on_phase,
    )  # fmt: skip
    call = 1
    try:
        saver.save(1).wait()
        for call in (2, 3):
            saver.fence()
            model.fill(BASE[part] + call)
            saver.save(call)
        saver.wait()
    except CheckpointError as error:
        return call, type(error).__name__, str(error)
    finally:
        try:
            saver.close()
        except CheckpointError:
            pass
    return None


PHASES = ("captured", "planned", "submitted", "released", "written", "checked", "voted")
DEATHS = [
    *[(("critic", 1), phase) for phase in PHASES],
    *[(("actor", 2), phase) for phase in ("submitted", "voted")],
    *[(("driver", 0), phase) for phase in ("planned", "checked", "voted", "manifest", "renamed", "durable")],
]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "trap"), DEATHS)
def test_when_one_dies_the_others_raise_at_the_same_call(
    world: World, tmp_path: Path, victim: tuple[str, int], trap: str
) -> None:
    ranks = world.start_parts(PARTS, save_three_times, tmp_path, victim, trap)
    place = Member(Parts(PARTS), *victim).place
    ranks[place].hear("trapped")
    ranks[place].kill()
    outcomes = [rank.hear() for index, rank in enumerate(ranks) if index != place]
    for call, kind, text in outcomes:
        assert (call, kind) == (3, "RankError")
        assert f"{victim[0]} rank {victim[1]} shows no sign of life" in text
    # The driver is dead after the rename, or has all votes: then the step is there.
    whole = trap in ("renamed", "durable") or (trap == "voted" and victim[0] != "driver")
    newest = 2 if whole else 1
    for found in world.run_parts(PARTS, load_latest, tmp_path, PARTS, (newest + 10,)):
        assert found[:2] == (newest, {float(newest)})
    visible = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert visible == {"step-1", *(["step-2"] if whole else []), f"step-{newest + 10}"}
