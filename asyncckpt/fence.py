"""The step fence: before an optimizer changes what a save has not copied yet, it waits.

A hook before the step of *every* torch optimizer, since one that was not handed over may share
parameters with one that was; optimizers without a common parameter pass. A model whose buffers were too
large to copy inside save() is fenced before its next forward too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


class StepFence:
    """Calls `fence` on the training thread before a step or a forward that would tear a save.

    Args:
        needed: whether some save is still to be fenced; asked at every optimizer step, so cheap.
        parameters: all parameters of the state.
        model: whose forward changes buffers.
    """

    def __init__(
        self,
        fence: Callable[[], None],
        needed: Callable[[], bool],
        parameters: Callable[[], Iterable[torch.Tensor]],
        model: Any,
    ) -> None:
        self._fence = fence
        self._needed = needed
        self._parameters = parameters
        self._model = model
        self._ids: set[int] | None = None
        self._storages: set[int] = set()
        self._pid = os.getpid()
        # Not traced: a hook with side effects inside a compiled step runs into the recompile limit.
        self._untraced = cast("Callable[[Any], Any]", torch.compiler.disable)
        self._step_hook: Any = register_optimizer_step_pre_hook(self._untraced(self._before_step))
        self._forward_hook: Any = None

    def before_forward(self) -> None:
        """Fence the model's next forward too. Only then is there a hook on the model at all."""
        if self._forward_hook is None and isinstance(self._model, torch.nn.Module):
            hook = self._untraced(self._before_forward)
            self._forward_hook = self._model.register_forward_pre_hook(hook)

    def passed(self) -> None:
        """Every save was fenced: the next forward may pass."""
        if self._forward_hook is not None:
            self._forward_hook.remove()
            self._forward_hook = None

    def remove(self) -> None:
        """Take the hooks away."""
        self._step_hook.remove()
        self.passed()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._needed() and self._pid == os.getpid() and self._shares(optimizer):
            self._fence()

    def _before_forward(self, module: torch.nn.Module, args: Any) -> None:
        if self._pid == os.getpid():
            self._fence()

    def _shares(self, optimizer: torch.optim.Optimizer) -> bool:
        if self._ids is None:
            ours = list(self._parameters())
            self._ids = {id(parameter) for parameter in ours}
            self._storages = {_storage(parameter) for parameter in ours}
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if any(id(param) in self._ids for param in params):
            return True
        # Master or flat parameters may be other tensors over the same memory.
        return any(_storage(param) in self._storages for param in params)

    def forget_parameters(self) -> None:
        """Ask for the parameters again at the next step: groups may have been added."""
        self._ids = None


def _storage(tensor: torch.Tensor) -> int:
    address = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
    return address or id(tensor)
