"""How much host memory staging takes where the user does not say."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.nn.parameter import is_lazy

from .shards import local_of

_FLOOR_NBYTES = 64 << 20
_STATE_PER_MODEL = 4  # weights, two moments of Adam, and room; a state that is larger streams through


def default_host_memory_bytes(models: Iterable[torch.nn.Module], optimized: bool) -> int:
    """Enough for the expected state, but at most a quarter of what this process may use.

    Memory is shared by the ranks of a node (LOCAL_WORLD_SIZE) and bounded by the cgroup.
    """
    model_nbytes = 0
    for model in models:
        tensors = (t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t))
        model_nbytes += sum(t.numel() * t.element_size() for t in map(local_of, tensors))
    wanted = _FLOOR_NBYTES + model_nbytes * (_STATE_PER_MODEL if optimized else 1)
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    ranks = max(1, int(told)) if told.isdigit() else 1
    return max(_FLOOR_NBYTES, min(wanted, available_bytes() // 4 // ranks))


def available_bytes() -> int:
    """Memory that this process could still get: MemAvailable, bounded by its cgroup."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            available = min(available, _left(Path("/sys/fs/cgroup" + path), "memory.max", "memory.current"))
        elif "memory" in controllers.split(","):
            folder = Path("/sys/fs/cgroup/memory" + path)
            available = min(available, _left(folder, "memory.limit_in_bytes", "memory.usage_in_bytes"))
    return available


def _left(cgroup: Path, limit: str, usage: str) -> int:
    left = 1 << 62
    for folder in (cgroup, *cgroup.parents):  # every ancestor limits too
        words = [*_lines(folder / limit), *_lines(folder / usage)]
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
            used = max(0, int(words[1]) - _cache(folder / "memory.stat"))
            left = min(left, max(0, int(words[0]) - used))
    return left


def _cache(stat: Path) -> int:
    """Page cache that counts as used and is given up when somebody asks."""
    found = dict(line.split() for line in _lines(stat) if len(line.split()) == 2)
    prefix = "total_" if "total_inactive_file" in found else ""  # version 1 sums children only there
    return sum(int(found.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
