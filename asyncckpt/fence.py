"""The step fence: before an optimizer changes what a save has not copied yet, it waits.

A hook before the step of *every* torch optimizer, since one that was not handed over may share
memory with one that was; optimizers that touch nothing at risk pass. A model whose buffers were too
large to copy inside save() is fenced before its next forward too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import devices
from .shards import local_of


class StepFence:
    """Calls `fence` on the training thread before a step or a forward that would tear a save.

    Args:
        before_captured: called in place of `fence` when the step goes into a CUDA graph. It must ask nothing
            of the driver: to wait for an event from outside, for one, would spoil the graph.
        at_risk: of each save in flight that has not copied all yet, what tells the addresses of its storages;
            asked at every optimizer step.
        optimizers: whose state is saved: their steps change that, whatever their parameters are.
        models: whose forwards change buffers.
        used: devices that hold the state, as far as is known.

    Attributes:
        step_was_captured: one of our optimizers was stepped while a CUDA graph was captured. The graph's
            replays will step it again, and no hook will tell.
    """

    def __init__(
        self,
        fence: Callable[[], None],
        before_captured: Callable[[], None],
        at_risk: Callable[[], Sequence[Callable[[], frozenset[int]]]],
        optimizers: Iterable[Any],
        models: Sequence[torch.nn.Module],
        used: Iterable[int] = (),
    ) -> None:
        self._fence = fence
        self._before_captured = before_captured
        self._at_risk = at_risk
        self._optimizers = list(optimizers)
        self._models = list(models)
        self._used = set(used)
        self._stepped_on: set[tuple[int, int]] = set()  # (device, stream)
        self._pid = os.getpid()
        # Not traced: a hook with side effects inside a compiled step runs into the recompile limit.
        self._untraced = cast("Callable[[Any], Any]", torch.compiler.disable)
        self._step_hook: Any = register_optimizer_step_pre_hook(self._untraced(self._before_step))
        self._forward_hooks: list[Any] = []
        self.step_was_captured = False

    def before_forward(self) -> None:
        """Fence the next forwards too. Only then are there hooks on the models at all."""
        if not self._forward_hooks:
            hook = self._untraced(self._before_forward)
            self._forward_hooks = [model.register_forward_pre_hook(hook) for model in self._models]

    def passed(self) -> None:
        """Every save was fenced: the next forwards may pass."""
        for hook in self._forward_hooks:
            hook.remove()
        self._forward_hooks = []

    def note_streams(self, used: Iterable[int] = ()) -> None:
        """Remember this thread's current streams of the devices in use: what changes the state is enqueued
        there. They must live until the next save."""
        self._used.update(used)
        if self._used:
            self._stepped_on.update(devices.current_streams(tuple(self._used)))  # others may add to it

    def order_after_steps(self) -> None:
        """Let this thread's current streams wait for those on which optimizers stepped, where they are
        others; the host does not wait."""
        stepped_on, self._stepped_on = self._stepped_on, set()
        for device, stream in tuple(stepped_on):
            current = devices.seam.current_stream(device)
            if stream != current:
                devices.seam.wait_for(device, stream)
            self._stepped_on.add((device, current))  # behind the others now, should another thread save next

    def is_capturing(self) -> bool:
        """Whether what this thread enqueues now goes into a CUDA graph."""
        return devices.is_capturing(tuple(self._used))

    def remove(self) -> None:
        """Take the hooks away."""
        self._step_hook.remove()
        self.passed()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._pid != os.getpid():  # first of all: a lock of the parent's may be held for good
            return
        # One parameter a group: this is asked at every step, and a group on several devices is rare.
        self._used |= devices.devices_of(g["params"][0] for g in optimizer.param_groups if g["params"])
        captured = self.is_capturing()
        if not captured:
            self.note_streams()
        if captured and not self.step_was_captured:
            self.step_was_captured = self._is_ours(optimizer) or _touches(optimizer, [self._params()])
        at_risk = self._at_risk()
        if at_risk and (self._is_ours(optimizer) or _touches(optimizer, [of_save() for of_save in at_risk])):
            (self._before_captured if captured else self._fence)()

    def _params(self) -> frozenset[int]:
        params = [param for model in self._models for param in model.parameters()]
        for optimizer in self._optimizers:
            params += [p for group in getattr(optimizer, "param_groups", ()) for p in group["params"]]
        return frozenset(
            local_of(p).untyped_storage().data_ptr() for p in params if p.layout == torch.strided
        )

    def _is_ours(self, optimizer: torch.optim.Optimizer) -> bool:
        return any(optimizer is one for one in self._optimizers)

    def _before_forward(self, module: torch.nn.Module, args: Any) -> None:
        if self._pid == os.getpid():
            self._fence()


def _touches(optimizer: torch.optim.Optimizer, at_risk: list[frozenset[int]]) -> bool:
    # By memory, not by name: master or flat parameters may be other tensors over the same bytes.
    params = (param for group in optimizer.param_groups for param in group["params"])
    return any(
        local_of(param).untyped_storage().data_ptr() in storages
        for param in params
        if param.layout == torch.strided
        for storages in at_risk
    )
