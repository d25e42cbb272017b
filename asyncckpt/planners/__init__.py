"""One planner per layout: a tree -> the files of a step.

A planner belongs to one thread. Pure, as `plan` is.
"""

from __future__ import annotations

from ..errors import OptionError
from ..layouts.megatron import ModelRank
from ..plan import Planner
from .dcp import DcpPlanner
from .megatron import MegatronPlanner

__all__ = ["DcpPlanner", "MegatronPlanner", "planner_for"]


def planner_for(
    layout: str, rank: int = 0, world_size: int = 1, model_rank: ModelRank | None = None
) -> Planner:
    """The planner that fills a layout's directories, for one of `world_size` ranks.

    Raises:
        OptionError: nothing says which part of the model the rank has.
    """
    if layout == "megatron":
        if world_size > 1 and model_rank is None:
            raise OptionError(
                f"layout 'megatron': nothing says which part of the model each of {world_size} ranks has; "
                f"pass model_rank, or use layout 'dcp'"
            )
        return MegatronPlanner(rank, world_size, model_rank)
    if model_rank is not None:
        raise OptionError(f"model_rank: layout {layout!r} has no use for it")
    return DcpPlanner(rank, world_size)
