"""One planner per format: a tree -> the files of a part of a step.

A planner belongs to one thread. Pure, as `plan` is.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import OptionError
from ..layouts import rlinf_tree
from ..layouts.megatron import ModelRank
from ..layouts.rlinf import DCP_DIRECTORY, WEIGHTS_PATH
from ..plan import Planner
from .dcp import Arrangement, DcpPlanner
from .driver import DriverPlanner
from .megatron import MegatronPlanner
from .megatron_dist import MegatronDistPlanner

__all__ = [
    "Arrangement",
    "DcpPlanner",
    "DriverPlanner",
    "MegatronDistPlanner",
    "MegatronPlanner",
    "planner_for",
]

_RLINF = Arrangement(DCP_DIRECTORY, rlinf_tree.shared_tree, rlinf_tree.stored_path, WEIGHTS_PATH)


def planner_for(
    form: str,
    rank: int = 0,
    world_size: int = 1,
    model_rank: ModelRank | None = None,
    here: Sequence[int] | None = None,
) -> Planner:
    """The planner of a format (see `layouts.Place`), for one of `world_size` ranks.

    Args:
        here: the ranks that write to the same disk, where that is not all of them.

    Raises:
        OptionError: nothing says which part of the model the rank has, or the format is one rank's.
    """
    if form == "megatron":
        if world_size > 1 and model_rank is None:
            raise OptionError(
                f"layout 'megatron': nothing says which part of the model each of {world_size} ranks has; "
                f"pass model_rank, or use layout 'dcp'"
            )
        return MegatronPlanner(rank, world_size, model_rank, here)
    if model_rank is not None:
        raise OptionError(f"model_rank: files of format {form!r} have no use for it")
    if form == "driver":
        if world_size > 1:
            raise OptionError(f"a driver is one process, here are {world_size}")
        return DriverPlanner()
    if form == "megatron-dist":
        return MegatronDistPlanner(rank, world_size)
    return DcpPlanner(rank, world_size, _RLINF if form == "rlinf-dcp" else None, here)
