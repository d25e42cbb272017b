"""Megatron-core: its parallel groups, optimizers and generators, in the trees that it reads and writes.

    ckpt = megatron.checkpointer(root, model=chunks, optimizer=optimizer, opt_param_scheduler=scheduler)

legacy.py has the tree of --ckpt-format torch, dist.py that of torch_dist; sections.py is of both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ...checkpointer import AsyncCheckpointer
from ...errors import OptionError
from .dist import dist_state_of
from .legacy import model_rank, state_of

__all__ = ["checkpointer", "model_rank", "state_of"]


def checkpointer(
    root: str | os.PathLike[str],
    *,
    model: Any,
    optimizer: Any = None,
    opt_param_scheduler: Any = None,
    args: Any = None,
    also: Mapping[str, Callable[[], Any]] | None = None,
    format: str = "torch",  # noqa: A002 -- the word that Megatron-LM's users know
    fully_reshardable: bool | None = None,
    **options: Any,
) -> AsyncCheckpointer:
    """An AsyncCheckpointer over Megatron's own tree. Collective: every rank calls it.

    Args:
        root: where `iter_0000050/` and the tracker are.
        model: the list of chunks that Megatron's get_model returns, or one of them.
        optimizer: of get_megatron_optimizer; with Adam, distributed or not, chained or not.
        opt_param_scheduler: OptimizerParamScheduler.
        args: Megatron-LM's arguments, kept in the model's file for its own load.
        also: further keys of that file, and what gives their values at a save; only Megatron-LM reads them.
        format: as Megatron-LM's --ckpt-format: "torch" (`mp_rank_00/`, loaded by the same parallelism) or
            "torch_dist" (the model loads at any parallelism, the optimizer at any data-parallel size).
        fully_reshardable: of format "torch_dist": the optimizer too loads at any parallelism; Megatron-LM's
            --dist-ckpt-optim-fully-reshardable, which `args` may say instead. Nothing is gathered for it.
        options: of AsyncCheckpointer.

    Raises:
        OptionError: an optimizer that nobody here knows; it is named.
    """
    if format not in ("torch", "torch_dist"):
        raise OptionError(f"format: 'torch' or 'torch_dist', got {format!r}")
    if format == "torch_dist":
        state = dist_state_of(model, optimizer, opt_param_scheduler, args, also, fully_reshardable)
        return AsyncCheckpointer(root, layout="megatron-dist", **state, **options)
    if fully_reshardable:
        raise OptionError("fully_reshardable: only format 'torch_dist' has it")
    state = state_of(model, optimizer, opt_param_scheduler, args, also)
    return AsyncCheckpointer(root, layout="megatron", **state, **options)
