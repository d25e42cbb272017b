"""The report: what a save costs training on this GPU, ours beside the peers, link and disk beside both.

Ceilings first, then ours, since the targets are ours, then the peers, the large ones last. Each measurement
is a process of its own, begins only if the time that is left is likely to hold it, and has its rows on disk
as soon as they are known. What found no time or failed is listed under `missing`.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .. import machine
from . import child
from .child import Task
from .device import Gpu
from .driver import Driver
from .journal import Budget, Emit, Journal, Row, earlier_rows, scratch
from .measure import ceilings, saves, trace
from .peers import OURS, PEERS, unavailable
from .probe import MAX_CONNECTIONS
from .training import SHAPES, TINY_SHAPES, Shape

NAME = "gpu_report"
_START_S = 15.0  # until a child trains: python, torch, a context, memory
_OVERHEAD_S = 5.0  # a round's quiet steps, checks and deletions
_CEILING_S = 60.0
_TRACE_S = 60.0
_DISK_GUESS_GB_PER_S = 0.5
_LINK_GUESS_GB_PER_S = 25.0
_PATIENCE = 4.0  # a child may take so many times what was expected, if there is time


@dataclass(frozen=True)
class Save:
    """One saver at one size.

    Attributes:
        rounds: that count; one more warms up.
        crossings: how long a round's writes, reads and deletions take, in raw writes of the state.
    """

    size: str
    saver: str
    rounds: int
    crossings: float
    connections: str | None = None

    @property
    def title(self) -> str:
        """What a reader calls it."""
        how = "" if self.connections is None else f", {MAX_CONNECTIONS}={self.connections}"
        return f"{self.saver}, {self.size}{how}"


SMALL, MIDDLE, LARGE = SHAPES
PLAN = [
    Save(SMALL, OURS, rounds=4, crossings=2.5),
    Save(LARGE, OURS, rounds=1, crossings=2.2),
    Save(MIDDLE, OURS, rounds=2, crossings=2.2),
    *(Save(SMALL, peer, rounds=2, crossings=3.0) for peer in PEERS),
    Save(SMALL, OURS, rounds=2, crossings=2.5, connections="1"),
    *(Save(MIDDLE, peer, rounds=1, crossings=3.0) for peer in PEERS),
]
_BEFORE_TRACE = 1 + PLAN.index(Save(SMALL, OURS, rounds=2, crossings=2.5, connections="1"))


def expected_s(save: Save, shape: Shape, disk_gb_per_s: float, rounds: int) -> float:
    """How long the round that warms up and so many others are likely to take."""
    return _START_S + (rounds + 1) * (save.crossings * shape.nbytes / 1e9 / disk_gb_per_s + _OVERHEAD_S)


def allotted_s(save: Save, shape: Shape, disk_gb_per_s: float, left_s: float) -> float | None:
    """Seconds to give a measurement; None if not even one round that counts is likely to fit."""
    usable_s = left_s - child.GRACE_S
    if usable_s < expected_s(save, shape, disk_gb_per_s, 1):
        return None
    return min(usable_s, _PATIENCE * expected_s(save, shape, disk_gb_per_s, save.rounds))


def on_gpu(emit: Emit, function: str, **arguments: Any) -> None:
    """In the child: call a measurement."""
    measurements: dict[str, Any] = {"ceilings": ceilings, "saves": saves, "trace": trace}
    measurements[function](Gpu(), emit, **arguments)


def _task(function: str, labels: Row, connections: str | None = None, **arguments: Any) -> Task:
    return Task(
        "benchmarks.gpu.report:on_gpu",
        {"function": function, **arguments},
        labels,
        {MAX_CONNECTIONS: connections},
    )


class Report:
    """One run."""

    def __init__(self, out: Path, disk: Path, budget: Budget, tiny: bool, resume: bool) -> None:
        self._out, self._disk, self._budget, self._tiny = out, disk, budget, tiny
        facts = {
            "benchmark": NAME,
            "tiny": tiny,
            "machine": machine.describe(disk),
            "gpu": Driver().facts(),
            "resumed": resume,
        }
        path = out / f"{NAME}.json"
        kept = [row for row in earlier_rows(path) if "error" not in row] if resume else []
        self._journal = Journal(path, facts, kept)

    @property
    def _shapes(self) -> dict[str, Shape]:
        return TINY_SHAPES if self._tiny else SHAPES

    def run(self) -> None:
        """All of it, as far as the time goes."""
        self._ceilings()
        for number, save in enumerate(PLAN):
            if number == _BEFORE_TRACE:
                self._trace()
            self._save(save)
        self._journal.finish(seconds=self._budget.spent_s())

    def _has(self, **wanted: Any) -> bool:
        return any(wanted.items() <= row.items() for row in self._journal.rows)

    def _ceilings(self) -> None:
        if self._has(kind="ceiling", what="link") and self._has(kind="ceiling", what="disk"):
            return
        nbytes = self._shapes[SMALL].nbytes
        task = _task("ceilings", {"kind": "ceiling"}, directory=str(self._disk), nbytes=nbytes, rounds=3)
        self._child("ceilings", task, max(1.0, min(_CEILING_S, self._budget.left_s() - child.GRACE_S)))

    def ceiling(self, what: str, guess: float) -> float:
        """Median 10^9 bytes per second of link or disk."""
        found = [row["gb_per_s"] for row in self._journal.rows if row.get("what") == what]
        return median(found) if found else guess

    def _save(self, save: Save) -> None:
        labels = {
            "kind": "save",
            "size": save.size,
            "saver": save.saver,
            "connections": save.connections,
        }
        if self._has(**labels):
            return
        if (reason := unavailable(save.saver)) is not None:
            self._journal.miss(save.title, reason)
            return
        shape = self._shapes[save.size]
        disk_gb_per_s = self.ceiling("disk", _DISK_GUESS_GB_PER_S)
        free, needed = shutil.disk_usage(self._disk).free, int(1.1 * shape.nbytes)
        if free < needed:
            self._journal.miss(save.title, f"{free >> 30} GiB are free on the disk, too few")
            return
        seconds = allotted_s(save, shape, disk_gb_per_s, self._budget.left_s())
        if seconds is None:
            needed_s = expected_s(save, shape, disk_gb_per_s, 1)
            self._journal.miss(
                save.title, f"the time was up: {self._budget.left_s():.0f} s left, {needed_s:.0f} s needed"
            )
            return
        directory = self._disk / "run"
        directory.mkdir()
        try:
            task = _task(
                "saves",
                labels,
                save.connections,
                size=save.size,
                tiny=self._tiny,
                saver=save.saver,
                directory=str(directory),
                rounds=1 if self._tiny else save.rounds,
                seconds=max(1.0, seconds - _START_S),
                link_gb_per_s=self.ceiling("link", _LINK_GUESS_GB_PER_S),
            )
            self._child(save.title, task, seconds)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _trace(self) -> None:
        if self._has(kind="trace"):
            return
        left_s = self._budget.left_s() - child.GRACE_S
        if left_s < _TRACE_S:
            self._journal.miss("trace", "the time was up")
            return
        task = _task(
            "trace",
            {"kind": "trace", "size": SMALL},
            size=SMALL,
            tiny=self._tiny,
            directory=str(self._disk),
            out=str(self._out),
            link_gb_per_s=self.ceiling("link", _LINK_GUESS_GB_PER_S),
        )
        self._child("trace", task, _TRACE_S)

    def _child(self, title: str, task: Task, timeout_s: float) -> None:
        sys.stderr.write(f"{self._budget.spent_s():5.0f} s  {title}\n")
        rows: list[Row] = []

        def add(row: Row) -> None:
            rows.append(row)
            self._journal.add(row)

        child.run(task, add, timeout_s)
        if errors := [row["error"] for row in rows if "error" in row]:
            self._journal.miss(title, errors[0])


def run(
    out: Path, directory: Path | None, seconds_max: float, *, tiny: bool = False, resume: bool = False
) -> Path:
    """Measure, and leave gpu_report.json and perhaps gpu_trace.json.gz in `out`.

    Args:
        resume: keep the rows that an earlier run left there, and measure what it lacks.
    """
    budget = Budget(seconds_max)
    out.mkdir(parents=True, exist_ok=True)
    with scratch(directory, out) as disk:
        Report(out, disk, budget, tiny, resume).run()
    return out / f"{NAME}.json"
