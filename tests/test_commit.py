"""Commit: refused, killed or cut off at every single operation, the root still holds whole steps."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from asyncckpt.commit import CheckpointRoot, attempt_id, prepare_root
from asyncckpt.errors import (
    CorruptStepError,
    LoadError,
    OptionError,
    RootError,
    SaveError,
    StepError,
    StepExistsError,
    StepNotFoundError,
    WriteError,
)
from asyncckpt.filesystem import Filesystem
from asyncckpt.formats.manifest import MANIFEST_NAME, FileEntry, FragmentRef, Manifest
from asyncckpt.layouts import LAYOUTS, Layout
from asyncckpt.steps import RootView, StepEntry

FILES = {
    "dcp": (".metadata", "__0_0.distcp"),
    "megatron": ("mp_rank_00/model_optim_rng.pt",),
    "megatron-dist": (".metadata", "__0_0.distcp", "common.pt", "metadata.json"),
    "rlinf-fsdp": ("data/data.pt", "actor/dcp_checkpoint/.metadata", "actor/dcp_checkpoint/__0_0.distcp"),
    "rlinf-megatron": ("data/data.pt", "actor/iter_0000050/mp_rank_00/model_optim_rng.pt"),
}
BLOCK_NBYTES = 16
OLD_RUN, NEW_RUN = "0" * 16, "1" * 16


@dataclass
class Hook:
    """Strikes at the `at`-th operation: raises, or kills the process. Records all it sees."""

    at: int | None = None
    strike: Callable[[], None] = lambda: None
    seen: list[tuple[str, str]] = field(default_factory=list)
    fired: int = 0
    ever_after: bool = False

    def __call__(self, operation: str, path: str) -> None:
        number = len(self.seen)
        self.seen.append((operation, path))
        if self.at is not None and (number == self.at or (self.ever_after and number > self.at)):
            self.fired += 1
            self.strike()


def names_in(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def refuse() -> None:
    raise OSError(errno.EIO, "refused by the test")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crcs(data: bytes) -> tuple[int, ...]:
    return tuple(zlib.crc32(data[i : i + BLOCK_NBYTES]) for i in range(0, len(data), BLOCK_NBYTES))


@dataclass
class Run:
    """One process's life over a root, writing small files whose content tells run and step."""

    path: Path
    layout: Layout
    incarnation: str = NEW_RUN
    fs: Filesystem = field(default_factory=Filesystem)
    saves: int = 0

    def __post_init__(self) -> None:
        prepare_root(self.path, Filesystem())
        self.root = CheckpointRoot(self.path, self.layout, self.fs)

    def content(self, name: str, step: int) -> bytes:
        return f"{self.incarnation} {step} {name} ".encode() * 3

    def save(self, step: int, on_phase: Callable[[str], None] = lambda phase: None) -> Manifest:
        names = FILES[self.layout.name]
        parents = {name.rpartition("/")[0] for name in names} - {""}
        self.root.check_step(step)
        self.saves += 1
        attempt = self.root.begin(step, attempt_id(self.incarnation, self.saves), sorted(parents))
        try:
            entries = []
            for name in names:
                data = self.content(name, step)
                self.fs.write_file(attempt.path / name, data)
                entries.append(FileEntry(name, len(data), BLOCK_NBYTES, crcs(data)))
            ref = self.root.write_fragment(attempt, 0, entries)
            manifest = self.root.prepare(attempt, [ref])
            on_phase("manifest")
        except BaseException:
            self.root.discard(attempt)
            raise
        self.root.publish(attempt, on_phase)
        return manifest


def problem_of(view: RootView, entry: StepEntry) -> str | None:
    """Why a step is not whole; None if every byte of it is what its writer meant."""
    if entry.problem is not None:
        return entry.problem
    try:
        fragments = view.read_fragments(entry)
    except LoadError as problem:
        return str(problem)
    for fragment in fragments:
        for file in fragment.files:
            path = entry.path / file.path
            if not path.is_file():
                return f"{path} is missing"
            if crcs(path.read_bytes()) != file.block_crcs:
                return f"{path} is damaged"
    return None


def state_of(path: Path, layout: Layout, damaged: Iterable[int] = ()) -> tuple[int, str] | None:
    """What a new process would resume: (step, run that wrote it). Asserts every invariant.

    `damaged` are steps that were broken before the save began.
    """
    view = RootView(path, layout)
    entries = view.entries()
    problems = {entry.step: problem_of(view, entry) for entry in entries}
    assert {step for step, problem in problems.items() if problem} <= set(damaged), problems
    good = [entry for entry in view.candidates() if problems[entry.step] is None]
    tracked = view.tracked()
    if tracked is not None:
        assert problems[tracked] is None, "the tracker names a step that is not whole"
    if not good:
        assert tracked is None
        return None
    best = good[0]
    # Tools that take the highest number, and Megatron's tracker, find a whole step too, and of
    # the same timeline: no step above ours is visible.
    assert best.step == max(problems)
    assert tracked is None or tracked <= best.step
    assert best.manifest is not None
    return best.step, best.manifest.attempt.split("-")[0]


def corrupt(path: Path, layout: Layout, step: int) -> None:
    file = path / layout.step_name(step) / FILES[layout.name][-1]
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)


@dataclass(frozen=True)
class Scenario:
    """A root before, what is done to it, and every resume point that a crash may leave."""

    name: str
    before: tuple[int, ...]
    damaged: tuple[int, ...]
    resumed: int | None
    save: int
    keep_last: int | None
    allowed: tuple[tuple[int, str] | None, ...]
    after: tuple[int, ...]  # steps visible when all went well


SCENARIOS = [
    Scenario("first", (), (), None, 100, None, (None, (100, NEW_RUN)), (100,)),
    Scenario(
        "next", (100, 200), (), 200, 300, 1, ((200, OLD_RUN), (300, NEW_RUN)), (200, 300)
    ),
    Scenario(
        "rollback", (350, 400, 450, 500, 600), (450,), 400, 450, 2,
        ((600, OLD_RUN), (400, OLD_RUN), (450, NEW_RUN)), (400, 450),
    ),
]  # fmt: skip


def prepare(path: Path, layout: Layout, scenario: Scenario) -> None:
    run = Run(path, layout, OLD_RUN)
    for step in scenario.before:
        run.save(step)
    for step in scenario.damaged:
        corrupt(path, layout, step)


def act(path: Path, layout: Layout, scenario: Scenario, hook: Hook) -> None:
    run = Run(path, layout, NEW_RUN, Filesystem(hook))
    hook.seen.clear()  # opening the root is not part of the save
    if scenario.resumed is not None:
        run.root.resume_from(scenario.resumed)
    run.save(scenario.save)
    run.root.retain(scenario.keep_last)


@pytest.fixture(params=sorted(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


def each_operation(tmp_path: Path, layout: Layout, scenario: Scenario) -> Iterator[tuple[int, Path]]:
    """A fresh copy of the root for every operation of the save."""
    origin = tmp_path / "origin"
    prepare(origin, layout, scenario)
    rehearsal = tmp_path / "rehearsal"
    shutil.copytree(origin, rehearsal)
    hook = Hook()
    act(rehearsal, layout, scenario, hook)
    assert state_of(rehearsal, layout) == (scenario.save, NEW_RUN)
    assert tuple(entry.step for entry in RootView(rehearsal, layout).entries()) == scenario.after
    assert len(hook.seen) > 10
    for number in range(len(hook.seen)):
        copy = tmp_path / str(number)
        shutil.copytree(origin, copy)
        yield number, copy
        shutil.rmtree(copy)


def save_again(path: Path, layout: Layout, scenario: Scenario) -> None:
    """The next process sweeps, resumes what it finds, and saves: nothing stands in its way."""
    found = state_of(path, layout, scenario.damaged)
    run = Run(path, layout, "2" * 16)
    run.root.sweep(run.incarnation)
    assert not [name for name in names_in(path) if name.startswith(".asyncckpt-")]
    if found is not None:
        run.root.resume_from(found[0])
    assert state_of(path, layout, scenario.damaged) == found  # sweeping took nothing
    run.save(scenario.save + 1000)
    assert state_of(path, layout, scenario.damaged) == (scenario.save + 1000, "2" * 16)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_killed_at_every_operation(scratch_path: Path, layout: Layout, scenario: Scenario) -> None:
    found = set()
    for number, path in each_operation(scratch_path, layout, scenario):
        child = os.fork()
        if child == 0:
            act(path, layout, scenario, Hook(number, die))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL  # the hook fired
        found.add(state_of(path, layout, scenario.damaged))
        save_again(path, layout, scenario)
    assert found == set(scenario.allowed)  # each of them did come up: the test reaches every phase


@pytest.mark.parametrize("ever_after", [False, True], ids=["once", "disk-is-dead"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_refused_at_every_operation(
    scratch_path: Path, layout: Layout, scenario: Scenario, ever_after: bool
) -> None:
    outcomes = set()
    for number, path in each_operation(scratch_path, layout, scenario):
        hook = Hook(number, refuse, ever_after=ever_after)
        failed = ""
        try:
            act(path, layout, scenario, hook)
        except (SaveError, RootError) as problem:
            failed = str(problem)
        assert hook.fired
        found = state_of(path, layout, scenario.damaged)
        assert found in scenario.allowed
        committed = found == (scenario.save, NEW_RUN)
        assert failed or committed
        assert committed or ("visible and whole" not in failed and "committed" not in failed)
        outcomes.add((bool(failed), committed))
        save_again(path, layout, scenario)
    assert {(True, False), (True, True)} <= outcomes


class PowerCut:
    """A model of what a disk keeps when the power goes: only what was fsynced.

    Called before every operation, it looks at the real tree, so it knows what the previous one
    did. A file keeps the content of its last fsync, or none; a directory keeps the names of its
    last fsync. Names in the root may also be any state since then: a journal may have run ahead.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.open: dict[int, int] = {}  # inode -> descriptor, so that no inode number is used twice
        self.files: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.directories: set[int] = set()
        self.root_names: list[dict[str, int]] = []
        self.pending: tuple[str, str] | None = None
        for path in [root, *root.rglob("*")]:  # what was there before is durable
            self._fsync(path)
        self.root_names = [self._list(root)]

    def _keep(self, path: Path) -> int:
        status = path.lstat()
        if status.st_ino not in self.open:
            self.open[status.st_ino] = os.open(path, os.O_RDONLY)
            if path.is_dir():
                self.directories.add(status.st_ino)
        return status.st_ino

    def _list(self, path: Path) -> dict[str, int]:
        return {name: self._keep(path / name) for name in names_in(path)}

    def _fsync(self, path: Path) -> None:
        if path.is_dir():
            self.names[self._keep(path)] = self._list(path)
        else:
            self.files[self._keep(path)] = path.read_bytes()

    def observe(self) -> None:
        """Take in what the operation before this one did."""
        for path in self.root.rglob("*"):
            self._keep(path)
        if self.pending is not None:
            operation, path = self.pending
            if operation in ("fsync", "fsync_dir"):
                self._fsync(Path(path))
        now = self._list(self.root)
        if self.pending == ("fsync_dir", str(self.root)):
            self.root_names = [now]
        elif now != self.root_names[-1]:
            self.root_names.append(now)

    def __call__(self, operation: str, path: str) -> None:
        self.observe()
        self.pending = (operation, path)

    def outcomes(self) -> int:
        return len(self.root_names)

    def materialize(self, outcome: int, target: Path) -> None:
        """What the disk holds after a power cut now."""
        target.mkdir()
        for name, inode in self.root_names[outcome].items():
            self._write(inode, target / name)

    def _write(self, inode: int, target: Path) -> None:
        if inode in self.directories:
            target.mkdir()
            for name, child in self.names.get(inode, {}).items():
                self._write(child, target / name)
        else:
            target.write_bytes(self.files.get(inode, b""))

    def close(self) -> None:
        for fd in self.open.values():
            os.close(fd)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_power_cut_at_every_operation(scratch_path: Path, layout: Layout, scenario: Scenario) -> None:
    path = scratch_path / "root"
    prepare(path, layout, scenario)
    disk = PowerCut(path)
    found = set()
    checked = 0
    durable = False

    class EveryOperation(Hook):
        def __call__(self, operation: str, where: str) -> None:
            disk(operation, where)
            check()

    def check() -> None:
        nonlocal checked
        for outcome in range(disk.outcomes()):
            target = scratch_path / "after"
            disk.materialize(outcome, target)
            state = state_of(target, layout, scenario.damaged)
            assert state in scenario.allowed
            if durable:
                assert state == (scenario.save, NEW_RUN)
            found.add(state)
            checked += 1
            shutil.rmtree(target)

    run = Run(path, layout, NEW_RUN, Filesystem(EveryOperation()))
    if scenario.resumed is not None:
        run.root.resume_from(scenario.resumed)
    run.save(scenario.save)
    durable = True  # publish returned: from here on no power cut may lose it
    run.root.retain(scenario.keep_last)
    disk.observe()
    check()
    disk.close()
    assert found == set(scenario.allowed)
    assert checked > 10


def test_order_of_operations(tmp_path: Path) -> None:
    layout = LAYOUTS["megatron"]
    path = tmp_path / "root"
    run = Run(path, layout, OLD_RUN)
    for step in (1, 2, 3):
        run.save(step)
    hook = Hook()
    run = Run(path, layout, NEW_RUN, Filesystem(hook))
    run.root.resume_from(2)
    hook.seen.clear()
    run.save(3, on_phase=lambda phase: hook(phase, ""))
    run.root.retain(1)
    changing = [
        (operation, Path(where).name)
        for operation, where in hook.seen
        if operation
        not in ("open", "write", "close", "listdir", "read", "stat", "scandir", "rmdir", "unlink")
    ]
    attempt = f"{NEW_RUN}-000001"
    hidden = f".asyncckpt-tmp-iter_0000003-{attempt}"
    tracker = "latest_checkpointed_iteration.txt"
    assert changing == [
        ("mkdir", hidden),
        ("mkdir", "mp_rank_00"),
        ("fsync", "model_optim_rng.pt"),
        ("fsync", "asyncckpt_rank_00000.json"),
        ("fsync", MANIFEST_NAME),
        ("fsync", f".asyncckpt-tmp-tracker-{attempt}"),
        ("fsync_dir", "mp_rank_00"),
        ("fsync_dir", hidden),
        ("manifest", ""),
        ("fsync", f".asyncckpt-tmp-back-{attempt}"),
        ("rename", tracker),
        ("fsync_dir", "root"),
        ("rename", f".abandoned-iter_0000003-{attempt}"),
        ("fsync_dir", "root"),
        ("abandoned", ""),
        ("rename", "iter_0000003"),
        ("renamed", ""),
        ("fsync_dir", "root"),
        ("durable", ""),
        ("rename", tracker),
        ("fsync_dir", "root"),
        ("tracked", ""),
        # keep_last=1, and iter 2 was resumed from: iter 1 goes, and the abandoned 3 with it.
        ("rename", f".asyncckpt-trash-iter_0000001-{OLD_RUN}-000001"),
        ("rename", f".asyncckpt-trash-abandoned-iter_0000003-{attempt}-{OLD_RUN}-000003"),
        ("fsync_dir", "root"),
    ]
    assert names_in(path) == ["iter_0000002", "iter_0000003", tracker]


def test_timeline_after_rollback(tmp_path: Path, layout: Layout) -> None:
    run = Run(tmp_path, layout, OLD_RUN)
    for step in (400, 450, 500, 600):
        run.save(step)
    corrupt(tmp_path, layout, 450)
    run = Run(tmp_path, layout, NEW_RUN)
    run.root.resume_from(400)
    run.root.retain(1)
    assert [entry.step for entry in run.root.entries()] == [400, 450, 500, 600]  # nothing decided yet
    for step, error in ((400, StepExistsError), (390, StepError), (-1, StepError)):
        with pytest.raises(error):
            run.root.check_step(step)
    run.save(450)
    assert state_of(tmp_path, layout) == (450, NEW_RUN)
    assert [entry.step for entry in run.root.candidates()] == [450, 400]
    for step, error in ((450, StepExistsError), (420, StepError)):
        with pytest.raises(error):
            run.root.check_step(step)
    assert run.root.retain(2) == []
    hidden = [name for name in names_in(tmp_path) if name.startswith(".abandoned-")]
    assert len(hidden) == 3  # one step of the new timeline does not outweigh three of the old
    run.save(500)
    assert run.root.retain(2) == []  # 400 was resumed from
    assert not [name for name in names_in(tmp_path) if name.startswith(".")]
    assert [entry.step for entry in run.root.candidates()] == [500, 450, 400]
    run.save(550)
    run.save(600)
    assert run.root.retain(2) == [450, 500]
    ordinals = [entry.ordinal for entry in run.root.entries()]
    assert ordinals == [1, 7, 8]
    assert Run(tmp_path, layout).save(650).ordinal == 9


def test_second_rollback_and_restart_keep_ordinals_growing(tmp_path: Path, layout: Layout) -> None:
    run = Run(tmp_path, layout, OLD_RUN)
    for step in (1, 2, 3):
        run.save(step)
    run.root.resume_from(1)
    run.save(2)
    run = Run(tmp_path, layout, NEW_RUN)
    run.root.resume_from(1)
    assert run.save(2).ordinal == 5
    # Everything visible but the first step is gone; the abandoned ones still count.
    shutil.rmtree(tmp_path / layout.step_name(2))
    assert Run(tmp_path, layout, "2" * 16).save(2).ordinal == 5
    assert sum(name.startswith(".abandoned-") for name in names_in(tmp_path)) == 3


def test_stale_step_brought_back_by_hand_does_not_win(tmp_path: Path, layout: Layout) -> None:
    run = Run(tmp_path, layout)
    for step in (1, 2, 3):
        run.save(step)
    run.root.resume_from(1)
    run.save(2)
    (hidden,) = tmp_path.glob(f".abandoned-{layout.step_name(3)}-*")
    hidden.rename(tmp_path / layout.step_name(3))
    assert [entry.step for entry in run.root.candidates()] == [2, 1]
    assert run.root.find(3).problem is None  # still there for those who ask for it
    assert run.root.retain(1) == [3]  # and committed before the 2 that we keep


def test_retention(tmp_path: Path, layout: Layout) -> None:
    run = Run(tmp_path, layout)
    for step in range(1, 8):
        run.save(step)
    assert run.root.retain(None) == []
    assert run.root.retain(6) == [1]
    assert run.root.retain(2, keep_every=3, protect={4}) == [2, 5]
    assert [entry.step for entry in run.root.entries()] == [3, 4, 6, 7]
    assert run.root.retain(1) == [3, 4, 6]
    for arguments in ((0, None), (1, 0), (-1, None)):
        with pytest.raises(OptionError):
            run.root.retain(*arguments)


def test_retention_spares_what_is_not_ours(tmp_path: Path) -> None:
    layout = LAYOUTS["dcp"]
    foreign = tmp_path / "step-1"
    foreign.mkdir()
    (foreign / ".metadata").write_bytes(b"stock")
    run = Run(tmp_path, layout)
    for step in (2, 3, 4, 5):
        run.save(step)
    (tmp_path / "step-2" / MANIFEST_NAME).write_bytes(b"{}")
    outside = tmp_path / "archive"
    (tmp_path / "step-3").rename(outside)
    (tmp_path / "step-3").symlink_to(outside)
    assert run.root.retain(1) == [3, 4]
    assert [entry.step for entry in run.root.entries()] == [1, 2, 5]
    assert (outside / ".metadata").exists()  # the link went, not what it pointed to


def test_retention_keeps_the_tracked_step(tmp_path: Path) -> None:
    run = Run(tmp_path, LAYOUTS["megatron"])
    for step in (1, 2, 3):
        run.save(step)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    assert tracker.read_bytes() == b"3"
    tracker.write_bytes(b"1\n")
    assert run.root.retain(1) == [2]


def test_stray_entries_are_no_steps(tmp_path: Path, layout: Layout) -> None:
    run = Run(tmp_path, layout)
    run.save(1)
    (tmp_path / layout.step_name(7)).write_bytes(b"a file, not a directory")
    (tmp_path / layout.step_name(8)).symlink_to(tmp_path / "nowhere")
    (tmp_path / "step-9-backup").mkdir()
    assert [entry.step for entry in run.root.entries()] == [1]


def test_foreign_steps(tmp_path: Path) -> None:
    for name, files in {"step-10": [".metadata"], "step-20": ["__0_0.distcp"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes(b"x")
    run = Run(tmp_path, LAYOUTS["dcp"])
    assert [entry.step for entry in run.root.candidates()] == [10]
    assert run.root.find(20).problem == "no .metadata: its writer never finished it"
    assert run.root.ever_committed()
    run.save(15)  # the unfinished step 20 is nobody's newest
    with pytest.raises(StepExistsError, match="not written by asyncckpt"):
        run.save(20)
    assert (tmp_path / "step-20" / "__0_0.distcp").exists()


def test_foreign_megatron_steps_count_up_to_the_tracker(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        (tmp_path / f"iter_{step:07d}" / "mp_rank_00").mkdir(parents=True)
    view = RootView(tmp_path, LAYOUTS["megatron"])
    assert view.candidates() == []
    assert not view.ever_committed()
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(b"20")
    assert [entry.step for entry in view.candidates()] == [20, 10]
    assert [entry.step for entry in view.candidates(below=20)] == [10]


@pytest.mark.parametrize("tracker", [b"release", b"", b"nonsense"])
def test_odd_tracker_is_overwritten_by_the_next_save(tmp_path: Path, tracker: bytes) -> None:
    layout = LAYOUTS["megatron"]
    run = Run(tmp_path, layout)
    for step in (1, 2):
        run.save(step)
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(tracker)
    with pytest.raises(LoadError):
        run.root.tracked()
    run.root.resume_from(1)
    run.save(2)
    assert run.root.tracked() == 2


def test_none_means_never(tmp_path: Path, layout: Layout) -> None:
    view = RootView(tmp_path / "absent", layout)
    assert not view.ever_committed()
    assert view.candidates() == []
    run = Run(tmp_path, layout)
    assert not run.root.ever_committed()
    run.save(1)
    (tmp_path / layout.step_name(1) / MANIFEST_NAME).write_bytes(b"")
    assert run.root.ever_committed()
    (entry,) = run.root.candidates()
    assert entry.problem is not None
    assert "CRC-32" in entry.problem


def test_renamed_and_foreign_layout_steps_are_damaged(tmp_path: Path) -> None:
    run = Run(tmp_path, LAYOUTS["dcp"])
    run.save(1)
    shutil.copytree(tmp_path / "step-1", tmp_path / "step-9")
    shutil.copytree(tmp_path / "step-1", tmp_path / "iter_0000001")
    problem = run.root.find(9).problem
    assert problem is not None
    assert "holds step 1" in problem
    problem = RootView(tmp_path, LAYOUTS["megatron"]).find(1).problem
    assert problem is not None
    assert "has layout dcp" in problem
    assert run.root.retain(1) == []
    run.root.resume_from(1)
    run.save(2)
    assert [entry.step for entry in run.root.entries()] == [1, 2]


def test_steps_must_grow_when_nothing_was_loaded(tmp_path: Path, layout: Layout) -> None:
    Run(tmp_path, layout, OLD_RUN).save(100)
    run = Run(tmp_path, layout)
    with pytest.raises(StepExistsError):
        run.save(100)
    with pytest.raises(StepError, match="load an older step first"):
        run.save(50)
    shutil.rmtree(tmp_path / layout.step_name(100))  # removed by hand: no longer in the way
    run.save(50)
    assert state_of(tmp_path, layout) == (50, NEW_RUN)


def test_target_that_appears_meanwhile(tmp_path: Path) -> None:
    run = Run(tmp_path, LAYOUTS["dcp"])

    def intrude(phase: str) -> None:
        if phase == "manifest":
            (tmp_path / "step-1").mkdir()
            (tmp_path / "step-1" / "theirs").write_bytes(b"x")

    with pytest.raises(StepExistsError, match="appeared meanwhile"):
        run.save(1, on_phase=intrude)
    assert names_in(tmp_path) == ["step-1"]
    assert names_in(tmp_path / "step-1") == ["theirs"]


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EEXIST, errno.EIO])
def test_rename_whose_answer_was_lost(tmp_path: Path, layout: Layout, code: int) -> None:
    class Replaying(Filesystem):
        replays = 0

        def rename(self, source: Path, target: Path) -> None:
            super().rename(source, target)
            if target.name == layout.step_name(1):
                self.replays += 1
                raise WriteError("rename", str(target), code)

    fs = Replaying()
    run = Run(tmp_path, layout, fs=fs)
    run.save(1)
    assert fs.replays == 1
    assert state_of(tmp_path, layout) == (1, NEW_RUN)


def test_unproven_rename_is_proven_before_anything_else(tmp_path: Path, layout: Layout) -> None:
    hook = Hook()
    run = Run(tmp_path, layout, fs=Filesystem(hook))
    run.save(1)

    def fail_next_fsync(phase: str) -> None:
        if phase == "renamed":
            hook.at, hook.strike = len(hook.seen), refuse

    with pytest.raises(WriteError, match="visible and whole, but a power cut may undo it"):
        run.save(2, on_phase=fail_next_fsync)
    assert hook.fired == 1
    assert state_of(tmp_path, layout) == (2, NEW_RUN)
    with pytest.raises(StepExistsError):
        run.save(2)
    hook.seen.clear()
    hook.at = 0
    with pytest.raises(WriteError):  # not proven, so nothing is deleted
        run.root.retain(1)
    assert [entry.step for entry in run.root.entries()] == [1, 2]
    hook.at = None
    hook.seen.clear()
    run.save(3)
    operations = [(operation, Path(path).name) for operation, path in hook.seen]
    proven = operations.index(("fsync_dir", tmp_path.name))
    assert proven < operations.index(("rename", layout.step_name(3)))
    assert run.root.retain(1) == [1, 2]


def test_error_in_tracker_leaves_a_committed_step(tmp_path: Path) -> None:
    hook = Hook()
    run = Run(tmp_path, LAYOUTS["megatron"], fs=Filesystem(hook))
    run.save(1)

    def fail_next(phase: str) -> None:
        if phase == "durable":
            hook.at, hook.strike = len(hook.seen), refuse

    with pytest.raises(WriteError, match="only the tracker does not name it"):
        run.save(2, on_phase=fail_next)
    assert run.root.tracked() == 1
    assert run.root.retain(1) == []  # 1 is tracked
    assert names_in(tmp_path) == [
        "iter_0000001", "iter_0000002", "latest_checkpointed_iteration.txt"
    ]  # fmt: skip
    run.save(3)
    assert run.root.tracked() == 3


def test_hook_that_raises_before_the_rename_discards(tmp_path: Path, layout: Layout) -> None:
    run = Run(tmp_path, layout)

    def lost(phase: str) -> None:
        raise SaveError(f"lost at {phase}")

    with pytest.raises(SaveError, match="lost at manifest"):
        run.save(1, on_phase=lost)
    assert names_in(tmp_path) == []


def test_full_disk_strikes_before_anything_is_visible(tmp_path: Path, layout: Layout) -> None:
    def nothing_fits(operation: str, path: str) -> None:
        visible = (tmp_path / layout.step_name(1)).exists()
        if visible and operation in ("open", "write", "mkdir"):
            raise OSError(errno.ENOSPC, "needs space")

    Run(tmp_path, layout, fs=Filesystem(nothing_fits)).save(1)
    assert state_of(tmp_path, layout) == (1, NEW_RUN)


def test_sweep_spares_the_living_and_the_unknown(tmp_path: Path, layout: Layout) -> None:
    mine = f".asyncckpt-tmp-{layout.step_name(5)}-{attempt_id(NEW_RUN, 1)}"
    dead = [
        f".asyncckpt-tmp-{layout.step_name(5)}-{attempt_id(OLD_RUN, 1)}",
        f".asyncckpt-trash-{layout.step_name(4)}-{attempt_id(OLD_RUN, 1234567)}",
        f".asyncckpt-trash-abandoned-{layout.step_name(4)}-{attempt_id(NEW_RUN, 1)}-{attempt_id(OLD_RUN, 1)}",
    ]
    other = [".asyncckpt-lease", ".asyncckpt-tmp-notes", f".abandoned-x-{attempt_id(OLD_RUN, 1)}", ".trash-1"]
    for name in [mine, *dead]:
        (tmp_path / name / "mp_rank_00").mkdir(parents=True)
        (tmp_path / name / "mp_rank_00" / "link").symlink_to(tmp_path)
    for name in other:
        (tmp_path / name).write_bytes(b"keep")
    (tmp_path / f".asyncckpt-tmp-tracker-{attempt_id(OLD_RUN, 1)}").write_bytes(b"5")
    root = CheckpointRoot(tmp_path, layout)
    assert len(root.sweep(NEW_RUN)) == 4
    assert names_in(tmp_path) == sorted([mine, *other])


def test_fragments_are_verified(tmp_path: Path, layout: Layout) -> None:
    run = Run(tmp_path, layout)
    run.save(1)
    entry = run.root.find(1)
    (fragment,) = run.root.read_fragments(entry)
    assert [file.path for file in fragment.files] == list(FILES[layout.name])
    path = entry.path / "asyncckpt_rank_00000.json"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"rank_0", b"rank_1") + b" ")
    with pytest.raises(CorruptStepError, match="bytes expected"):
        run.root.read_fragments(entry)
    path.unlink()
    with pytest.raises(CorruptStepError, match="cannot be read"):
        run.root.read_fragments(entry)
    shutil.rmtree(entry.path)
    with pytest.raises(StepNotFoundError, match="deleted"):
        run.root.read_fragments(entry)
    with pytest.raises(StepNotFoundError, match="there are: none"):
        run.root.find(1)


def test_fragment_of_another_attempt_is_refused(tmp_path: Path, layout: Layout) -> None:
    run = Run(tmp_path, layout)
    root = run.root
    run.save(1)
    stolen = (tmp_path / layout.step_name(1) / "asyncckpt_rank_00000.json").read_bytes()
    attempt = root.begin(2, attempt_id(NEW_RUN, 9))
    run.fs.write_file(attempt.path / "asyncckpt_rank_00000.json", stolen)
    root.prepare(attempt, [FragmentRef("asyncckpt_rank_00000.json", len(stolen), zlib.crc32(stolen))])
    root.publish(attempt)
    with pytest.raises(CorruptStepError, match="belongs to attempt"):
        root.read_fragments(root.find(2))


def test_fragment_must_match_the_files(tmp_path: Path, layout: Layout) -> None:
    root = Run(tmp_path, layout).root
    attempt = root.begin(1, attempt_id(NEW_RUN, 1), ["a/b"])
    (attempt.path / "a/b/file").write_bytes(b"123")
    with pytest.raises(SaveError, match="4 bytes were to be written, 3 are there"):
        root.write_fragment(attempt, 0, [FileEntry("a/b/file", 4, 4, (0,))])
    with pytest.raises(WriteError, match="ENOENT"):
        root.write_fragment(attempt, 0, [FileEntry("a/missing", 4, 4, (0,))])
    root.discard(attempt)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("directory", ["../outside", "/abs", "", "a//b"])
def test_begin_refuses_directories_outside_the_step(tmp_path: Path, directory: str) -> None:
    root = Run(tmp_path, LAYOUTS["dcp"]).root
    with pytest.raises(ValueError, match="not a plain path"):
        root.begin(1, attempt_id(NEW_RUN, 1), [directory])
    with pytest.raises(OptionError, match="not an attempt id"):
        root.begin(1, "../../evil")
    assert names_in(tmp_path) == []


def test_root_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    for path in (file, file / "below"):
        with pytest.raises(RootError, match="not a directory"):
            prepare_root(path, Filesystem())
    with pytest.raises(RootError, match="cannot be listed"):
        CheckpointRoot(file, LAYOUTS["dcp"])


def test_root_that_cannot_be_written(tmp_path: Path) -> None:
    def read_only(operation: str, path: str) -> None:
        raise OSError(errno.EROFS, "read-only")

    with pytest.raises(RootError, match=r"not writable.*EROFS"):
        prepare_root(tmp_path, Filesystem(read_only))
    with pytest.raises(RootError, match="not writable"):
        prepare_root(Path("/proc/self/asyncckpt"), Filesystem())


def test_root_is_created_durably(tmp_path: Path) -> None:
    hook = Hook()
    prepare_root(tmp_path / "a" / "b", Filesystem(hook))
    fsynced = [path for operation, path in hook.seen if operation == "fsync_dir"]
    assert fsynced == [str(tmp_path / "a"), str(tmp_path)]
    assert names_in(tmp_path / "a" / "b") == []
