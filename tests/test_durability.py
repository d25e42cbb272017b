"""Durable before visible, visible before older steps go: the order of the system calls themselves.

Nothing that a process can read back tells a synced file from one that is not. So a run saves under a
recorder (`recorder.c`) that is preloaded and writes down every write, sync, rename and delete, the
engine's and Python's alike.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from asyncckpt.formats.manifest import MANIFEST_NAME

LAYOUTS = ("dcp", "megatron")
STEPS = (1, 2)
TRACKER = "latest_checkpointed_iteration.txt"

RUN = """
import json, sys
from pathlib import Path
import torch
from asyncckpt import AsyncCheckpointer
from asyncckpt.layouts import layout_named
from asyncckpt.steps import RootView

def run(layout):
    root = Path(sys.argv[1]) / layout / "checkpoints"
    model = torch.nn.Sequential(torch.nn.Linear(128, 100), torch.nn.Linear(100, 3))
    view = RootView(root, layout_named(layout))
    saved = []
    with AsyncCheckpointer(root, model=model, layout=layout, host_memory=1 << 16, keep_last=1) as saver:
        for step in (1, 2):
            saver.save(step).wait()
            entry = view.find(step)
            fragments = view.read_fragments(entry)
            saved.append({
                "target": str(entry.path),
                "files": [file.path for fragment in fragments for file in fragment.files],
                "fragments": [ref.path for ref in entry.manifest.fragments],
                "found": [str(path.relative_to(entry.path)) for path in entry.path.rglob("*")],
            })
    return saved

torch.set_num_threads(1)
print(json.dumps({layout: run(layout) for layout in ("dcp", "megatron")}))
"""
# A driver (this process) and an actor of two ranks, which save one step together.
RUN_PARTS = """
import json, subprocess, sys
from pathlib import Path
import torch
from torch.distributed import TCPStore
from asyncckpt import AsyncCheckpointer
from asyncckpt.layouts import layout_named
from asyncckpt.steps import RootView

class Loader:
    def state_dict(self):
        return {"drawn": 5}
    def load_state_dict(self, state):
        pass

code, layout, part, rank, port = sys.argv[2], "rlinf-fsdp", *sys.argv[3:6]
root = Path(sys.argv[1]) / layout / "checkpoints"
torch.set_num_threads(1)
store = TCPStore("127.0.0.1", int(port), is_master=part == "data", wait_for_workers=False)
actors = [
    subprocess.Popen([sys.executable, "-c", code, sys.argv[1], code, "actor", str(rank), str(store.port)])
    for rank in range(2 if part == "data" else 0)
]
state = {"dataloader": Loader()} if part == "data" else {"model": torch.nn.Linear(128, 100)}
saved = []
with AsyncCheckpointer(
    root, **state, layout=layout, host_memory=1 << 16, keep_last=1, fence_timeout_s=60, rank_timeout_s=60,
    store=store, rank=int(rank), part=part, parts={"data": 1, "actor": 2},
) as saver:
    for step in (1, 2):
        saver.save(step).wait()
        if part == "data":
            view = RootView(root, layout_named(layout))
            entry = view.find(step)
            fragments = view.read_fragments(entry)
            saved.append({
                "target": str(entry.path),
                "files": [file.path for fragment in fragments for file in fragment.files],
                "fragments": [ref.path for ref in entry.manifest.fragments],
                "found": [str(path.relative_to(entry.path)) for path in entry.path.rglob("*")],
            })
if part == "data":
    print(json.dumps({layout: saved}))
sys.exit(max((actor.wait() for actor in actors), default=0))
"""


@dataclass(frozen=True)
class Call:
    """A system call that succeeded; `begun` and `ended` are nanoseconds of one clock."""

    begun: int
    ended: int
    operation: str
    path: str
    renamed_to: str


@dataclass(frozen=True)
class Recording:
    """All calls of a run, by the order in which they began, and what it says it saved."""

    root: Path
    calls: list[Call]
    saved: list[dict[str, Any]]

    def of(self, operation: str, path: str | Path) -> list[Call]:
        return [call for call in self.calls if (call.operation, call.path) == (operation, str(path))]

    def rename_to(self, target: str | Path) -> list[Call]:
        return [c for c in self.calls if c.operation == "rename" and c.renamed_to == str(target)]

    def synced_between(self, path: str | Path, after: int, before: int) -> bool:
        """Whether a sync of `path` began after one moment and had ended before the other."""
        return any(after < call.begun and call.ended < before for call in self.of("sync", path))

    def commit(self, save: int) -> tuple[Path, Call]:
        """The hidden directory of a save, and the rename that made it visible."""
        renames = self.rename_to(self.saved[save]["target"])
        assert len(renames) == 1
        return Path(renames[0].path), renames[0]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recording]:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler: the recorder cannot be built")
    tmp_path = tmp_path_factory.mktemp("durability").resolve()
    recorder, log, root = tmp_path / "recorder.so", tmp_path / "log", tmp_path / "root"
    source = Path(__file__).with_name("recorder.c")
    command = [compiler, "-std=gnu11", "-O1", "-shared", "-fPIC", "-o", recorder, source, "-ldl"]
    subprocess.run(command, check=True)
    root.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        # Last: a sanitizer's runtime, if there is one, insists on being first.
        "LD_PRELOAD": " ".join(filter(None, (os.environ.get("LD_PRELOAD"), str(recorder)))),
        "RECORDER_LOG": str(log),
        "RECORDER_ROOT": str(root),
    }
    saved: dict[str, Any] = {}
    for code, *arguments in ((RUN,), (RUN_PARTS, RUN_PARTS, "data", "0", "0")):
        command = [sys.executable, "-c", code, str(root), *arguments]
        process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        saved |= json.loads(process.stdout)
    rows = [line.split("\t") for line in log.read_text().splitlines()]
    calls = sorted((Call(int(a), int(b), *rest) for a, b, *rest in rows), key=lambda call: call.begun)
    return {layout: Recording(root / layout / "checkpoints", calls, steps) for layout, steps in saved.items()}


@pytest.fixture(params=[*LAYOUTS, "rlinf-fsdp"])
def recording(request: pytest.FixtureRequest, recordings: dict[str, Recording]) -> Recording:
    return recordings[request.param]


saves = pytest.mark.parametrize("save", range(len(STEPS)), ids=["first", "second"])


@saves
def test_every_file_is_synced_after_its_last_byte_and_before_it_is_visible(
    recording: Recording, save: int
) -> None:
    attempt, rename = recording.commit(save)
    said = recording.saved[save]
    files = [*said["files"], *said["fragments"], MANIFEST_NAME]
    assert len(said["files"]) >= 1
    assert len(said["fragments"]) >= 1
    on_disk = {name for name in said["found"] if not (Path(said["target"]) / name).is_dir()}
    assert set(files) <= on_disk
    for name in files:
        writes = recording.of("write", attempt / name)
        assert writes, f"the recorder saw nothing of {name}"
        last = max(call.ended for call in writes)
        assert last < rename.begun, name
        assert recording.synced_between(attempt / name, last, rename.begun), name
        assert not recording.of("write", Path(said["target"]) / name), name


@saves
def test_the_manifest_comes_after_all_that_it_vouches_for(recording: Recording, save: int) -> None:
    attempt, _ = recording.commit(save)
    said = recording.saved[save]

    def synced(name: str) -> int:
        return max(call.ended for call in recording.of("sync", attempt / name))

    def begun(name: str) -> int:
        return min(call.begun for call in recording.of("create", attempt / name))

    *others, last = sorted(said["fragments"], reverse=True)
    assert all(synced(name) < begun(last) for name in said["files"])  # the first rank's, which comes last
    assert all(synced(fragment) < begun(last) for fragment in others)
    assert synced(last) < begun(MANIFEST_NAME)


@saves
def test_every_directory_is_synced_after_its_last_name_and_before_it_is_visible(
    recording: Recording, save: int
) -> None:
    attempt, rename = recording.commit(save)
    said = recording.saved[save]
    names = {attempt / name for name in said["found"]}
    directories = {path.parent for path in names}
    assert attempt in directories
    if recording.root.parent.name == "megatron":
        assert attempt / "mp_rank_00" in directories
    for directory in directories:
        entries = [path for path in names if path.parent == directory]
        created = [call for path in entries for call in recording.of("create", path)]
        # Of a file that ranks share, each of them asks for it to be made.
        assert all(recording.of("create", path) for path in entries), directory
        last = max(call.ended for call in created)
        assert recording.synced_between(directory, last, rename.begun), directory


@saves
def test_the_rename_is_synced_before_the_tracker_moves(recordings: dict[str, Recording], save: int) -> None:
    recording = recordings["megatron"]
    _, rename = recording.commit(save)
    moves = recording.rename_to(recording.root / TRACKER)
    assert len(moves) == len(STEPS)
    move = moves[save]
    assert recording.synced_between(recording.root, rename.ended, move.begun)
    written = recording.of("write", move.path)
    assert written
    last = max(call.ended for call in written)
    assert recording.synced_between(move.path, last, move.begun)
    assert not recording.of("write", recording.root / TRACKER)


def test_nothing_goes_before_what_replaces_it_is_durable(recording: Recording) -> None:
    attempt, rename = recording.commit(1)
    old = recording.saved[0]["target"]
    final = rename
    if recording.root.parent.name == "megatron":
        final = recording.rename_to(recording.root / TRACKER)[1]
    (hide,) = recording.of("rename", old)
    assert recording.synced_between(recording.root, final.ended, hide.begun)

    began = min(call.begun for call in recording.of("create", attempt))
    gone = [
        call
        for call in recording.calls
        if call.operation == "delete"
        and call.begun > began
        and Path(call.path).is_relative_to(recording.root)
        and not Path(call.path).is_relative_to(attempt)
    ]
    assert {str(Path(call.path).relative_to(hide.renamed_to)) for call in gone} == {
        *recording.saved[0]["found"],
        ".",
    }
    assert recording.synced_between(recording.root, hide.ended, min(call.begun for call in gone))


def test_a_root_that_was_made_is_durable_before_the_first_step_is(recording: Recording) -> None:
    _, rename = recording.commit(0)
    for directory in (recording.root, recording.root.parent):
        (made,) = recording.of("create", directory)
        assert recording.synced_between(directory.parent, made.ended, rename.begun), directory
