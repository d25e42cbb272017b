"""Thirty saves of a driver and its workers while participants are killed, the driver too: whatever becomes
visible is whole at first sight, and every restart goes on where the newest step was."""

from __future__ import annotations

import os
import random
import signal
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncckpt import _native
from asyncckpt.errors import CheckpointError
from asyncckpt.layouts import layout_named
from asyncckpt.steps import RootView
from tests.process_world import PATIENCE_S, Talk, process_world
from tests.rlinf_run import Loader, Trainer, driver_of, introduce, worker_of

GROUPS = {"actor": 2, "critic": 1}
PARTS = {"data": 1, **GROUPS}
SAVES = 30
MINE = [("data", 0), ("actor", 0), ("actor", 1), ("critic", 0)]
FILES = {
    "data/data.pt",
    *(f"{part}/rank_{rank:05d}.pt" for part, rank in MINE),
    *(f"{part}/dcp_checkpoint/__{rank}_0.distcp" for part, rank in MINE if part != "data"),
    *(f"{part}/dcp_checkpoint/.metadata" for part in GROUPS),
}
PHASES = ("captured", "planned", "submitted", "released", "written", "checked", "voted")
PUBLISHING = ("manifest", "renamed", "durable")
CALLS = ("open", "allocate", "copy", "pwrite", "fsync")

Fate = tuple[tuple[str, int], int, str]  # who dies, in which of its saves, and where


def save_on(talk: Talk, part: str, rank: int, log_dir: Path, fate: Fate | None) -> int:
    """Saves up to the last, from wherever the newest step is; dies as it is fated to."""
    victim, saves, where = fate if fate is not None else (("", 0), 0, "")
    mine = (part, rank) == victim
    first = -1

    def on_phase(step: int, phase: str) -> None:
        if mine and step - first == saves:
            if phase == where:
                os.kill(os.getpid(), signal.SIGKILL)
            if phase == "planned" and where in CALLS:
                _native.faults.arm(_native.faults.Op[where], 0, _native.faults.Kind.kill, 0)

    options: dict[str, Any] = {"rank_timeout_s": 4, "on_phase": on_phase}
    loader, trainer = Loader(), Trainer(part, rank)
    if part == "data":
        checkpoints: Any = driver_of(talk, log_dir, loader, GROUPS, **options)
    else:
        checkpoints = worker_of(talk, part, trainer, **options)
    try:
        first = checkpoints.resume("auto")
        assert len(loader.drawn) == (first if part == "data" else 0)
        assert part == "data" or not first or trainer.values() == {float(first)}
        for step in range(first + 1, SAVES + 1):
            loader.next()
            trainer.fill(step)
            checkpoints.save(step)
            checkpoints.fence()
        checkpoints.close()
    except CheckpointError:
        assert fate is not None
    return int(first)


class Watcher:
    """Looks at a root all the time.

    Attributes:
        seen: visible steps.
        wrong: what was not whole when it was first seen.
    """

    def __init__(self, root: Path) -> None:
        self.seen: list[int] = []
        self.wrong: list[str] = []
        self._view = RootView(root, layout_named("rlinf-fsdp"))
        self._looking = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(0.001):
            self.look()

    def look(self) -> None:
        paths = list(self._view.path.iterdir()) if self._view.path.is_dir() else []
        with self._looking:
            for path in paths:
                step = self._view.layout.parse_step(path.name)
                if step is not None and step not in self.seen:
                    self.wrong += [f"{path.name}: {problem}" for problem in self._problems(step)]
                    self.seen.append(step)

    def _problems(self, step: int) -> list[str]:
        entry = self._view.find(step)
        if entry.problem is not None or entry.manifest is None:
            return [entry.problem or "foreign"]
        listed = [file for fragment in self._view.read_fragments(entry) for file in fragment.files]
        problems = [f"{name} is not listed" for name in FILES - {file.path for file in listed}]
        for file in listed:
            data = (entry.path / file.path).read_bytes()
            blocks = range(0, file.nbytes, file.block_nbytes)
            crcs = tuple(zlib.crc32(data[at : at + file.block_nbytes]) for at in blocks)
            if len(data) != file.nbytes or crcs != file.block_crcs:
                problems.append(f"{file.path} is not what was written")
        return problems


def drawn(rng: random.Random) -> Fate:
    victim = rng.choice([*MINE, MINE[0]])  # the driver twice as often
    where = [*PHASES, *CALLS, *(PUBLISHING if victim == MINE[0] else ())]
    return victim, rng.randint(1, 4), rng.choice(where)


@pytest.mark.slow
def test_thirty_saves_with_deaths_at_random(tmp_path: Path) -> None:
    rng = random.Random(30)
    torch.manual_seed(0)
    watcher = Watcher(tmp_path / "checkpoints")
    deaths: list[Fate] = []
    try:
        with process_world() as world:
            resumed, finished = [], False
            while not finished:
                fate = drawn(rng) if max(watcher.seen, default=0) < SAVES - 5 else None
                ranks = world.start_parts(PARTS, save_on, tmp_path, fate)
                introduce(ranks)
                if fate is None:
                    resumed.append(ranks[0].hear())
                    finished = True
                else:
                    victim = ranks[MINE.index(fate[0])].process
                    victim.join(PATIENCE_S)
                    assert victim.exitcode == -signal.SIGKILL, fate
                    deaths.append(fate)
                    if len(deaths) % 4:
                        for rank in ranks:
                            rank.kill()  # as a scheduler would
                    else:
                        for index, rank in enumerate(ranks):
                            if index != MINE.index(fate[0]):
                                rank.hear()  # they find out by themselves
                for rank in ranks:
                    rank.process.join(PATIENCE_S)
                watcher.look()
    finally:
        watcher.stop()
    assert watcher.wrong == []
    assert sorted(watcher.seen) == list(range(1, SAVES + 1))
    assert len(deaths) >= 8
    assert {fate[0] for fate in deaths} == set(MINE)
    assert resumed[0] >= SAVES - 5
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert not {name for name in left if name.startswith((".asyncckpt-tmp-", ".asyncckpt-trash-"))}
