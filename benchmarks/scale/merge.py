"""How long rank 0 takes to describe what all ranks have written, and what memory that takes."""

from __future__ import annotations

import json
import multiprocessing
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from asyncckpt.formats.distcp import merged_metadata

from .state import Gpt, Spread, layouts, plan_at

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["benchmarks.scale.votes"])  # and with it, all that takes seconds to import


def measure(gpt: Gpt, spread: Spread) -> dict[str, Any]:
    """In this process. The layouts of some ranks are compared with real plans of theirs."""
    first = plan_at(gpt, spread, 0)
    kept = [zlib.compress(layout) for layout in layouts(gpt, spread, first)]  # as rank 0 keeps them
    for rank in {1, spread.world_size // 2, spread.world_size - 1}:
        real = plan_at(gpt, spread, rank)
        assert (real.tree, real.layout) == (first.tree, zlib.decompress(kept[rank])), rank
    before_bytes = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; proc(5)
    began_s = time.perf_counter()
    metadata = merged_metadata((first.tree, zlib.decompress(layout)) for layout in kept)
    merged_s = time.perf_counter() - began_s
    return {
        "merged_s": merged_s,
        "peak_bytes": _status("VmHWM") - before_bytes,
        "metadata_bytes": len(metadata),
        "tree_bytes": len(zlib.compress(first.tree)),
        "layouts_bytes": sum(map(len, kept)),
        "pieces": sum(len(json.loads(zlib.decompress(layout))[1]) for layout in kept),
    }


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) << 10
    raise LookupError(name)


def measured_apart(gpt: Gpt, spread: Spread) -> dict[str, Any]:
    """In a process of its own: memory that was freed once hides what is needed next."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(measure, gpt, spread).result()
