"""Steps on the disks of several nodes: cut off at every operation, all nodes come to the same end."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from asyncckpt.commit import Attempt, attempt_id, prepare_root
from asyncckpt.errors import WriteError
from asyncckpt.filesystem import Filesystem
from asyncckpt.formats.manifest import FragmentRef
from asyncckpt.layouts import LAYOUTS, Layout
from asyncckpt.node_root import NodeRoot
from asyncckpt.nodes import Found, Inventory, Nodes, Verdict, numbered, verdict
from asyncckpt.parts import Parts
from asyncckpt.steps import RootView, attempt_of

NODES = Nodes(((0, 1), (2,), (3,)))
PARTS = Parts.none(4)


class Cut(BaseException):
    """The process is gone: nothing that would run afterwards does."""


@dataclass
class Power:
    """Of one node, or of all: from the `at`-th operation on, none is made any more."""

    at: int | None = None
    seen: int = 0

    def __call__(self, operation: str, path: str) -> None:
        self.seen += 1
        if self.at is not None and self.seen > self.at:
            raise Cut(operation, path)


@dataclass
class Cluster:
    """One run over the disks of all nodes; `base` holds a directory for each."""

    base: Path
    layout: Layout
    incarnation: str
    powers: list[Power] = field(default_factory=lambda: [Power() for _ in NODES.groups])
    saves: int = 0

    def __post_init__(self) -> None:
        self.roots = []
        for node, group in enumerate(NODES.groups):
            path = self.base / str(node)
            prepare_root(path, Filesystem())
            fs = Filesystem(self.powers[node])
            self.roots.append(NodeRoot(path, self.layout, fs, PARTS, NODES.of(group[0])))

    def recover(self) -> None:
        agreed = verdict([root.inventory() for root in self.roots])
        for root in self.roots:
            root.recover(agreed, self.incarnation)

    def resume(self, step: int) -> None:
        for root in self.roots:
            root.resume_from(step)

    def save(self, step: int, keep_last: int | None = None) -> None:
        """As the committers of all ranks do; where a node is gone, the others find out and end it."""
        self.saves += 1
        name = attempt_id(self.incarnation, self.saves)
        attempts: list[Attempt] = []
        try:
            for root, group in zip(self.roots, NODES.groups, strict=True):
                attempts.append(root.begin(step, name))
                refs = [self._fragment(root, attempts[-1], rank) for rank in group]
                root.prepare(attempts[-1], refs, parts=PARTS, ordinal=self._ordinal())
        except Cut:
            for root, attempt in zip(self.roots, attempts, strict=False):
                self._on(root, lambda root=root, attempt=attempt: root.discard(attempt))
            raise
        self.roots[0].publish(attempts[0])
        gone = []
        for root, attempt in zip(self.roots[1:], attempts[1:], strict=True):
            root.owe(attempt)
            gone.append(self._on(root, root.pay))
        if any(gone):
            raise Cut
        gone += [self._on(root, lambda root=root: root.retain(keep_last)) for root in self.roots]
        if any(gone):
            raise Cut

    def _ordinal(self) -> int:
        return self.saves + 1000 * int(self.incarnation, 16)

    @staticmethod
    def _fragment(root: NodeRoot, attempt: Attempt, rank: int) -> FragmentRef:
        file = root.add_file(attempt, f"file-{rank}", f"{attempt.id} {rank}".encode(), 4096)
        return root.write_fragment(attempt, rank, [file])

    @staticmethod
    def _on(root: NodeRoot, act: Callable[[], Any]) -> bool:
        """Whether the node is gone."""
        try:
            act()
        except Cut:
            return True
        return False

    def newest(self) -> tuple[int, str] | None:
        """What all nodes can load, and what any tool finds on each: the same."""
        found = set()
        for root, group in zip(self.roots, NODES.groups, strict=True):
            view = RootView(root.path, self.layout, None, PARTS, NODES.of(group[0]))
            entries = [entry for entry in view.entries() if attempt_of(entry) not in root._partial]
            assert not [entry.problem for entry in view.entries() if entry.problem]
            for entry in view.entries():
                for fragment in view.read_fragments(entry):
                    data = (entry.path / f"file-{fragment.rank}").read_bytes()
                    assert data == f"{attempt_of(entry)} {fragment.rank}".encode()
            best = max(view.entries(), key=lambda entry: entry.step, default=None)
            assert best is None or best in entries, "the highest number is not on all nodes"
            assert view.tracked() == (best and best.step if self.layout.tracker_name else None)
            found.add(tuple((entry.step, attempt_of(entry)) for entry in entries))
            assert not list(root.path.glob(".asyncckpt-t*"))
        assert len(found) == 1, found
        steps = sorted(found.pop())
        return (steps[-1][0], steps[-1][1].split("-")[0]) if steps else None


OLD, NEW, LAST = "1".zfill(16), "2".zfill(16), "3".zfill(16)


@dataclass(frozen=True)
class Scenario:
    """What is there before, what is resumed and saved, and what may be the newest step after a cut."""

    before: tuple[int, ...]
    resumed: int | None
    save: int
    keep_last: int | None
    allowed: frozenset[tuple[int, str] | None]


SCENARIOS = {
    "first": Scenario((), None, 100, None, frozenset({None, (100, NEW)})),
    "next": Scenario((100, 200, 300), 300, 400, 2, frozenset({(300, OLD), (400, NEW)})),
    "rollback": Scenario(
        (400, 450, 500, 600), 400, 450, 1, frozenset({(600, OLD), (400, OLD), (450, NEW)})
    ),
}  # fmt: skip


def act(base: Path, layout: Layout, scenario: Scenario, powers: list[Power]) -> None:
    run = Cluster(base, layout, NEW, powers)
    run.recover()
    for power in powers:
        power.seen = 0  # opening the roots is not part of the save
    if scenario.resumed is not None:
        run.resume(scenario.resumed)
    run.save(scenario.save, scenario.keep_last)


def origin_of(base: Path, layout: Layout, scenario: Scenario) -> Path:
    run = Cluster(base, layout, OLD)
    run.recover()
    for step in scenario.before:
        run.save(step)
    return base


def powers_of(victim: int | None, at: int | None = None) -> list[Power]:
    """One for all nodes, or one for the victim."""
    if victim is None:
        return [Power(at)] * len(NODES)
    return [Power(at if node == victim else None) for node in range(len(NODES))]


@pytest.mark.parametrize("layout", [LAYOUTS["dcp"], LAYOUTS["megatron"]], ids=lambda layout: layout.name)
@pytest.mark.parametrize("victim", [None, 0, 1])
@pytest.mark.parametrize("name", SCENARIOS)
def test_cut_off_at_every_operation(
    scratch_path: Path, layout: Layout, victim: int | None, name: str
) -> None:
    scenario = SCENARIOS[name]
    origin = origin_of(scratch_path / "origin", layout, scenario)
    rehearsal = powers_of(victim)
    act(Path(shutil.copytree(origin, scratch_path / "rehearsal")), layout, scenario, rehearsal)
    operations = rehearsal[victim or 0].seen
    assert operations > 10
    found = set()
    for at in range(operations):
        base = Path(shutil.copytree(origin, scratch_path / str(at)))
        with pytest.raises(Cut):
            act(base, layout, scenario, powers_of(victim, at))
        # The next start may be cut off too, wherever it is; the one after that may not.
        attempts = shutil.copytree(base, scratch_path / "again")
        power = Power()
        after = Cluster(Path(attempts), layout, LAST, [power] * len(NODES))
        after.recover()
        newest = after.newest()
        found.add(newest)
        shutil.rmtree(attempts)
        again = Path(shutil.copytree(base, scratch_path / "again"))
        with pytest.raises(Cut):
            Cluster(again, layout, LAST, [Power(7 * at % power.seen)] * len(NODES)).recover()
        last = Cluster(again, layout, "4".zfill(16))
        last.recover()
        assert last.newest() == newest
        shutil.rmtree(again)
        if newest is not None:
            after = Cluster(base, layout, LAST)
            after.recover()
            after.resume(newest[0])
            after.save(scenario.save + 1000, keep_last=1)
            assert after.newest() == (scenario.save + 1000, LAST)
        shutil.rmtree(base)
    assert found <= scenario.allowed
    assert len(found) > 1


# ---------------------------------------------------------------------------- odd starts, and failures


class Refusing(Filesystem):
    """Refuses one rename, once."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def rename(self, source: Path, target: Path) -> None:
        if target.name == self.name:
            self.name = ""
            raise WriteError("rename", str(target), errno.EIO)
        super().rename(source, target)


def steps_of(run: Cluster) -> list[list[int]]:
    return [[entry.step for entry in root.entries()] for root in run.roots]


@pytest.mark.parametrize("refused", ["iter_0000002", "latest_checkpointed_iteration.txt"])
def test_what_could_not_be_published_once_follows_with_the_next_save(tmp_path: Path, refused: str) -> None:
    run = Cluster(tmp_path, LAYOUTS["megatron"], OLD)
    run.save(1)
    run.save(5)
    run.resume(1)
    run.roots[2].fs = Refusing(refused)
    with pytest.raises(WriteError):
        run.save(2)
    run.save(3)
    assert steps_of(run) == [[1, 2, 3]] * 3
    assert run.newest() == (3, OLD)


def test_a_debt_goes_with_the_timeline_that_is_left(tmp_path: Path) -> None:
    run = Cluster(tmp_path, LAYOUTS["dcp"], OLD)
    run.save(1)
    run.roots[2].fs = Refusing("step-2")
    with pytest.raises(WriteError):
        run.save(2)
    run.resume(1)
    run.save(3)
    assert steps_of(run) == [[1, 3]] * 3


def test_a_start_in_the_wrong_places_takes_nothing_that_was_decided(tmp_path: Path) -> None:
    layout = LAYOUTS["megatron"]
    run = Cluster(tmp_path, layout, OLD)
    run.save(1)
    run.roots[2].fs = Refusing("iter_0000002")
    with pytest.raises(WriteError):
        run.save(2)
    paths = [root.path for root in run.roots]

    places = zip(paths, (0, 3, 2), strict=True)
    swapped = [NodeRoot(path, layout, None, PARTS, NODES.of(place)) for path, place in places]
    agreed = verdict([root.inventory() for root in swapped])
    for root in swapped:
        root.recover(agreed, NEW)
    fewer = NodeRoot(paths[2], layout, None, Parts.none(1))
    fewer.sweep(LAST)

    again = Cluster(tmp_path, layout, LAST)
    again.recover()
    assert again.newest() == (2, OLD)


def test_what_one_node_lost_is_not_in_the_way_of_what_was_saved_again(tmp_path: Path) -> None:
    run = Cluster(tmp_path, LAYOUTS["dcp"], OLD)
    run.save(1)
    run.save(2)
    shutil.rmtree(run.roots[0].path / "step-2")
    again = Cluster(tmp_path, LAYOUTS["dcp"], NEW)
    again.recover()
    again.resume(1)
    again.roots[0].publish = _cut_behind(again.roots[0].publish)  # type: ignore[method-assign]
    with pytest.raises(Cut):
        again.save(2)
    last = Cluster(tmp_path, LAYOUTS["dcp"], LAST)
    last.recover()
    assert last.newest() == (2, NEW)


def _cut_behind(act: Callable[..., None]) -> Callable[..., None]:
    def acted(*args: Any, **options: Any) -> None:
        act(*args, **options)
        raise Cut

    return acted


@pytest.mark.parametrize("tracked", ["100", "release"])
def test_the_tracker_of_another_tool_stays(tmp_path: Path, tracked: str) -> None:
    run = Cluster(tmp_path, LAYOUTS["megatron"], OLD)
    run.save(50)
    for root in run.roots:
        (root.path / "iter_0000100" / "mp_rank_00").mkdir(parents=True)
        (root.path / "latest_checkpointed_iteration.txt").write_text(tracked)
    Cluster(tmp_path, LAYOUTS["megatron"], NEW).recover()
    for root in run.roots:
        assert (root.path / "latest_checkpointed_iteration.txt").read_text() == tracked


# ---------------------------------------------------------------------------- what nodes agree on

A, B, C = Found(10, 1, 2), Found(20, 2, 2), Found(30, 3, 2)


def node(
    published: dict[str, Found] | None = None,
    prepared: dict[str, Found] | None = None,
    abandoned: dict[str, Found] | None = None,
) -> Inventory:
    return Inventory(published or {}, prepared or {}, abandoned or {}, {}, (), True)


def test_what_is_published_anywhere_is_published_everywhere() -> None:
    found = verdict([node({"a": A, "b": B}), node({"a": A}, {"b": B})])
    assert found == Verdict(("b",), (), (), (), "b", 2)


def test_what_was_prepared_alone_is_undecided_and_goes() -> None:
    found = verdict([node({"a": A}, {"b": B}), node({"a": A}, {"b": B})])
    assert found == Verdict((), (), (), (), "a", 2)


def test_what_was_prepared_stays_while_a_node_is_missing_that_may_have_published_it() -> None:
    assert verdict([node({}, {"b": B})]).spared == ("b",)
    # Unless the nodes that are here have gone on since.
    assert verdict([node({"c": Found(30, 3, 1)}, {"b": B})]).spared == ()


def test_what_a_node_lacks_is_not_whole() -> None:
    found = verdict([node({"a": A, "b": B}), node({"a": A}), node({"a": A}, {"b": B})])
    assert found == Verdict((), (), (), ("b",), "a", 2)


def test_what_is_abandoned_anywhere_is_abandoned_everywhere() -> None:
    found = verdict([node({"a": A}, {}, {"b": B}), node({"a": A, "b": B, "c": C})])
    assert found == Verdict((), ("b",), (), ("c",), "a", 3)


def test_inventories_and_verdicts_travel() -> None:
    said = Inventory({"a": A}, {"b": B}, {"c": C}, {"d": A}, (7, 8), False)
    assert Inventory.from_bytes(said.to_bytes()) == said
    assert said.has(10, "a")
    assert said.has(7, "")
    assert not said.has(20, "b")
    agreed = Verdict(("a",), ("b",), (), ("c",), "a", 5)
    assert Verdict.from_fields(agreed.to_fields()) == agreed


def test_who_is_on_which_node() -> None:
    nodes = Nodes.by_disk(["x", "y", "x", "y", "z"])
    assert nodes.groups == ((0, 2), (1, 3), (4,))
    assert nodes.leaders == (0, 1, 4)
    assert nodes.of(3).places == (1, 3)
    assert nodes.are_several
    assert not Nodes.one(4).are_several
    assert numbered([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
