"""One planner per layout: a tree -> the files of a step.

A planner belongs to one thread. Pure, as `plan` is.
"""

from __future__ import annotations

from ..errors import OptionError
from ..plan import Planner
from .dcp import DcpPlanner
from .megatron import MegatronPlanner

__all__ = ["DcpPlanner", "MegatronPlanner", "planner_for"]


def planner_for(layout: str, rank: int = 0, world_size: int = 1) -> Planner:
    """The planner that fills a layout's directories, for one of `world_size` ranks.

    Raises:
        OptionError: the layout is one rank's.
    """
    if layout == "megatron":
        if world_size > 1:
            raise OptionError(f"layout 'megatron' is written by one rank, here are {world_size}; use 'dcp'")
        return MegatronPlanner()
    return DcpPlanner(rank, world_size)
