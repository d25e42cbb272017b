"""The step fence: before an optimizer changes what a save has not copied yet, it waits.

A hook before the step of *every* torch optimizer, since one that was not handed over may share
parameters with one that was; optimizers without a common parameter pass. A model whose buffers were too
large to copy inside save() is fenced before its next forward too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


class StepFence:
    """Calls `fence` on the training thread before a step or a forward that would tear a save.

    Args:
        needed: whether some save is still to be fenced; asked at every optimizer step, so cheap.
        forward_changes: the same for saves that hold live buffers.
    """

    def __init__(
        self,
        fence: Callable[[], None],
        needed: Callable[[], bool],
        forward_changes: Callable[[], bool],
        parameters: Callable[[], Iterable[torch.Tensor]],
        model: Any,
    ) -> None:
        self._fence = fence
        self._needed = needed
        self._forward_changes = forward_changes
        self._parameters = parameters
        self._ours: set[int] | None = None
        self._pid = os.getpid()
        # Not traced: a hook with side effects inside a compiled step runs into the recompile limit.
        untraced: Callable[[Any], Any] = torch.compiler.disable
        self._handles: list[Any] = [register_optimizer_step_pre_hook(untraced(self._before_step))]
        if isinstance(model, torch.nn.Module):
            self._handles.append(model.register_forward_pre_hook(untraced(self._before_forward)))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._needed() and self._pid == os.getpid() and self._shares(optimizer):
            self._fence()

    def _before_forward(self, module: torch.nn.Module, args: Any) -> None:
        if self._forward_changes() and self._pid == os.getpid():
            self._fence()

    def _shares(self, optimizer: torch.optim.Optimizer) -> bool:
        if self._ours is None:
            self._ours = {id(parameter) for parameter in self._parameters()}
        params = (param for group in optimizer.param_groups for param in group["params"])
        return any(id(param) in self._ours for param in params)

    def forget_parameters(self) -> None:
        """Ask for the parameters again at the next step: groups may have been added."""
        self._ours = None
