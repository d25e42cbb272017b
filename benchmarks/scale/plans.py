"""How long a rank plans: the first time, and when the plan of the save before serves again."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from asyncckpt.planners.dcp import DcpPlanner

from .state import Gpt, Spread, standing_at, tree_of

_SERVED_PER_ROUND = 3


def plan_times(gpt: Gpt, spread: Spread, rounds: int) -> dict[str, Any]:
    """Of a rank in the middle, which has a share of everything that is not too small for so many.

    The garbage collector is off meanwhile: it strikes where it likes, see `full_collection_s`.
    """
    rank = spread.world_size // 2
    first_s, served_s = [], []
    with standing_at(rank, spread.world_size):
        tree = tree_of(gpt, spread, rank)
        DcpPlanner(rank, spread.world_size).plan(tree)  # imports, and what torch caches
        with no_collector():
            for _ in range(rounds):
                planner = DcpPlanner(rank, spread.world_size)
                first_s.append(_timed(planner, tree))
                served_s += [_timed(planner, tree) for _ in range(_SERVED_PER_ROUND)]
                assert planner.plans_made == 1
            plan = planner.plan(tree).plan
    return {
        "rank": rank,
        "first_s": first_s,
        "served_s": served_s,
        "written_bytes": plan.nbytes,
        "layout_bytes": len(plan.layout),
    }


def _timed(planner: DcpPlanner, tree: dict[str, Any]) -> float:
    began_s = time.perf_counter()
    planner.plan(tree)
    return time.perf_counter() - began_s


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def full_collection_s() -> float:
    """One full pass of the garbage collector in a process that has imported torch."""
    began_s = time.perf_counter()
    gc.collect()
    return time.perf_counter() - began_s
