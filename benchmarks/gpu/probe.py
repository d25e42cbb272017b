"""The probes: what the design leans on, asked of a real driver without any code of the product's engine.

Each part runs in a process of its own, with a deadline; each row is on disk as soon as it is known. What
fails is a row with its error. Four minutes at most.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import machine
from . import child
from .child import Task
from .device import Gpu
from .driver import Driver
from .journal import Budget, Emit, Journal, earlier_rows, scratch
from .probe_order import OPERATIONS

NAME = "gpu_probe"
SECONDS_MAX = 240.0
_TASK_S = 60.0
_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
MAX_CONNECTIONS, _ALLOCATOR = "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF"

PROBES = {
    1: "runtime",
    2: "registration",
    3: "chunks",
    4: "disk",
    5: "order",
    6: "freed",
    7: "capture",
    8: "small",
}


def _task(probe: int, function: str, labels: dict[str, Any] | None = None, **arguments: Any) -> Task:
    arguments |= {"function": function}
    return Task("benchmarks.gpu.probe:on_gpu", arguments, {"probe": probe, **(labels or {})})


def tasks(directory: Path) -> list[Task]:
    """All children, in the order in which they run. `directory` is on the disk to be probed."""
    where = str(directory)
    found = [
        _task(1, "probe_host:runtime", directory=where),
        _task(2, "probe_host:registration", nbytes=_GIB, slab_nbytes=64 * _MIB),
        _task(3, "probe_link:chunks", nbytes=256 * _MIB, smallest=64 * _KIB),
        _task(4, "probe_link:disk", directory=where, nbytes=256 * _MIB, file_nbytes=4 * _GIB, seconds=3.0),
    ]
    for connections in (None, "1"):
        environment = {MAX_CONNECTIONS: connections}
        labels = {"connections": connections or "unset"}
        found += [
            replace(one, environment=environment)
            for one in (
                _task(5, "probe_order:order", labels, nbytes=256 * _MIB, trials=20, slices=16),
                _task(5, "probe_order:slowdown", labels, nbytes=_GIB, side=8192, steps=10, rounds=3),
            )
        ]
    for expandable in ("False", "True"):
        environment = {_ALLOCATOR: f"expandable_segments:{expandable}"}
        found += [
            replace(
                _task(6, "probe_order:freed", {"asked_expandable": expandable}, nbytes=_GIB, give_back=one),
                environment=environment,
            )
            for one in (False, True)
        ]
    found += [
        _task(7, "probe_order:capture", operation=operation, relaxed=relaxed, nbytes=64 * _MIB)
        for operation in OPERATIONS
        for relaxed in (False, True)
    ]
    for ways in (["loop", "torch.cat"], ["batch", "batches of 1024"], ["kernel"]):
        found.append(_task(8, "probe_link:small", ways=ways, count=50_000, sizes=[64, 4 * _KIB]))
    return found


def on_gpu(emit: Emit, function: str, **arguments: Any) -> None:
    """In the child: call a probe."""
    module, name = function.split(":")
    getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)(Gpu(), emit, **arguments)


def title(task: Task) -> str:
    """What a reader calls it."""
    kept = ("operation", "relaxed", "give_back", "ways")
    words = {**task.labels, **{key: one for key, one in task.arguments.items() if key in kept}}
    number = words.pop("probe")
    details = ", ".join(f"{key} {value}" for key, value in words.items())
    return f"({number}) {task.arguments['function'].split(':')[1]}" + (f": {details}" if details else "")


def run(
    out: Path,
    directory: Path | None,
    only: Collection[int] = (),
    seconds_max: float = SECONDS_MAX,
) -> Path:
    """Probe, and leave gpu_probe.json in `out`.

    Args:
        only: numbers of probes; the rows of the others stay as an earlier run left them.
    """
    budget = Budget(seconds_max)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{NAME}.json"
    chosen = set(only) or set(PROBES)
    with scratch(directory, out) as disk:
        facts = {
            "benchmark": NAME,
            "tiny": False,
            "machine": machine.describe(disk),
            "gpu": Driver().facts(),
        }
        journal = Journal(path, facts, [row for row in earlier_rows(path) if row["probe"] not in chosen])
        for task in tasks(disk):
            if task.labels["probe"] not in chosen:
                continue
            left_s = budget.left_s() - child.GRACE_S
            if left_s <= 0:
                journal.miss(title(task), "the time was up")
                continue
            sys.stderr.write(f"{budget.spent_s():5.0f} s  {title(task)}\n")
            child.run(task, journal.add, min(_TASK_S, left_s))
        journal.finish(seconds=budget.spent_s())
    return path
