"""One planner per format: a tree -> the files of a part of a step.

A planner belongs to one thread. Pure, as `plan` is.
"""

from __future__ import annotations

from ..errors import OptionError
from ..layouts import rlinf_tree
from ..layouts.rlinf import DCP_DIRECTORY
from ..plan import Planner
from .dcp import Arrangement, DcpPlanner
from .driver import DriverPlanner
from .megatron import MegatronPlanner

__all__ = ["Arrangement", "DcpPlanner", "DriverPlanner", "MegatronPlanner", "planner_for"]

_RLINF = Arrangement(DCP_DIRECTORY, rlinf_tree.shared_tree, rlinf_tree.stored_path)


def planner_for(form: str, rank: int = 0, world_size: int = 1) -> Planner:
    """The planner of a format (see `layouts.Place`), for one of `world_size` ranks.

    Raises:
        OptionError: the format is one rank's.
    """
    if form in ("megatron", "driver") and world_size > 1:
        raise OptionError(
            f"files of format {form!r} are written by one rank, here are {world_size}; use 'dcp'"
        )
    if form == "megatron":
        return MegatronPlanner()
    if form == "driver":
        return DriverPlanner()
    return DcpPlanner(rank, world_size, _RLINF if form == "rlinf-dcp" else None)
