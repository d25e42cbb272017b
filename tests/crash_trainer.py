"""Trainers that run in a child of `warm_process` and come to a bad end."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch._dynamo  # what a first hook imports; a warm parent pays for it once
import torch.distributed.checkpoint.metadata

from asyncckpt import AsyncCheckpointer
from asyncckpt._native import faults
from tests.step_state import HOST_MEMORY_NBYTES, StepState
from tests.warm_process import say

STRIDE = 10  # steps between saves

torch.set_num_threads(1)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()  # the signal may reach another thread first


def train(
    root: str,
    layout: str,
    saves: int,
    *,
    back_to: int | None = None,
    run: str = "",
    resumed_run: str = "",
    kill_phase: tuple[int, str] | None = None,
    kill_operation: tuple[int, str, int] | None = None,
    kill_rename: tuple[int, bool] | None = None,
    **options: Any,
) -> None:
    """Resume, then save every STRIDE steps.

    Args:
        back_to: load this step instead of the latest.
        run, resumed_run: the salt of values from here on, and of those that are loaded.
        kill_phase: die at a phase of the n-th save, counted from 0.
        kill_operation: die in the engine during the n-th save, at the k-th operation of a kind.
        kill_rename: die at the n-th rename after the load, before or (True) after it.
    """
    state = StepState()
    saved: list[int] = []

    def on_phase(step: int, phase: str) -> None:
        if kill_phase is not None and step == saved[0] + kill_phase[0] * STRIDE and phase == kill_phase[1]:
            say("phase", step, phase)
            die()
        say("phase", step, phase)

    checkpointer = AsyncCheckpointer(
        root, layout=layout, host_memory=HOST_MEMORY_NBYTES, on_phase=on_phase, **state.parts, **options
    )
    resume = checkpointer.load_latest() if back_to is None else checkpointer.load(back_to)
    step = 0 if resume is None else resume.step
    say("resumed", step)
    if resume is not None:
        wrong = state.wrong(step, resumed_run)
        if wrong:
            say("wrong", *wrong)
            return
    if kill_rename is not None:
        _die_at_rename(*kill_rename)
    for number in range(saves):
        step += STRIDE
        saved.append(step)
        state.advance(step, run)
        if kill_operation is not None and kill_operation[0] == number:
            checkpointer.wait()
            say("armed", *kill_operation[1:])
            faults.arm(getattr(faults.Op, kill_operation[1]), kill_operation[2], faults.Kind.kill)
        checkpointer.save(step, metadata={"run": run})
        state.advance(step + 1, run)  # training goes on
    checkpointer.close()
    say("survived")


def _die_at_rename(at: int, after: bool) -> None:
    rename, seen = os.rename, [0]

    def counted(source: Any, target: Any) -> None:
        number = seen[0]
        seen[0] += 1
        if number == at and not after:
            say("rename", number)
            die()
        rename(source, target)
        if number == at:
            say("rename", number)
            die()

    os.rename = counted  # type: ignore[assignment]


def hold(root: str, layout: str) -> None:
    """Own a root until killed."""
    checkpointer = AsyncCheckpointer(root, layout=layout, **StepState().parts)
    say("holding", len(checkpointer.steps()))
    signal.pause()


def fork_in_flight(root: str, layout: str) -> None:
    """Fork while a save is in flight; the child uses the checkpointer in every way, then exits normally."""
    from asyncckpt.errors import ForkedError

    state = StepState()
    checkpointer = AsyncCheckpointer(root, layout=layout, host_memory=HOST_MEMORY_NBYTES, **state.parts)
    state.advance(1)
    faults.arm(faults.Op.pwrite, 0, faults.Kind.pause)
    handle = checkpointer.save(1)
    assert faults.wait_for_hits(faults.Op.pwrite, 1)
    pid = os.fork()
    if pid == 0:
        uses = {
            "save": lambda: checkpointer.save(2),
            "load_latest": checkpointer.load_latest,
            "load": lambda: checkpointer.load(1),
            "steps": checkpointer.steps,
            "wait": checkpointer.wait,
            "handle": handle.wait,
        }
        for name, use in uses.items():
            try:
                use()
            except ForkedError:
                say("refused", name)
        checkpointer.fence()
        checkpointer.close()
        state.advance(2)  # a worker may run an optimizer of its own
        say("worker done")
        return
    _, status = os.waitpid(pid, 0)
    say("worker", os.waitstatus_to_exitcode(status))
    faults.disarm()
    handle.wait()
    checkpointer.close()
    say("durable", handle.report.durable_s is not None)
