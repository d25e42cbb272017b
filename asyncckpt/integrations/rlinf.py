"""RLinf: the driver and its groups of workers write one `global_step_N` together, in the background.

In the runner, in place of what it does with `resume_dir`, in `_save_checkpoint` and at its end:

    ckpt = DriverCheckpoints(log_dir, {"actor": 4, "critic": 2}, dataloader=self.train_dataloader)
    begun = [group.begin_checkpoints(ckpt.job) for group in (self.actor, self.critic)]
    ckpt.begin()                                     # all of them at once: wait for the groups afterwards
    resumed = [group.resume_checkpoints(resume_dir) for group in (self.actor, self.critic)]
    self.global_steps = ckpt.resume(resume_dir)      # "auto", ".../global_step_50" or None
    ...
    saved = [group.save_checkpoint(None, self.global_steps) for group in (self.actor, self.critic)]
    ckpt.save(self.global_steps)                     # returns at once, as the groups' do
    ...
    closed = [group.close_checkpoints() for group in (self.actor, self.critic)]
    ckpt.close()                                     # last of all: the store lives in the driver

and in the workers:

    def begin_checkpoints(self, job):
        self.ckpt = WorkerCheckpoints.of_manager(job, "actor", self)
    def resume_checkpoints(self, resume_dir): self.ckpt.resume(resume_dir)
    def save_checkpoint(self, path, step): self.ckpt.save(step)
    def close_checkpoints(self): self.ckpt.close()

Beginning, resuming and closing are done by all together: call them on every group before you wait for one.

Neither RLinf nor Ray is imported: what is used of their objects is `model`, `optimizer`, `lr_scheduler`, and
the names of the methods that offload.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from .. import AsyncCheckpointer, Resume, SaveHandle
from ..errors import OptionError
from ..layouts import layout_named
from ..layouts.rlinf import DATA, DRIVER

_CONNECT_TIMEOUT = timedelta(minutes=5)
# Of FSDPModelManager and MegatronModelManager: they free storages, or give tensors other ones.
_MOVING = (
    "offload_param_and_grad",
    "load_param_and_grad",
    "offload_optimizer",
    "load_optimizer",
    "offload_model_weights_and_grad",
    "onload_model_weights_and_grad",
    "offload_megatron_optimizer",
    "onload_megatron_optimizer",
)


@dataclass(frozen=True)
class CheckpointJob:
    """What workers must know to take part; plain values, to be sent to them.

    Attributes:
        root: directory of the steps.
        layout: "rlinf-fsdp" or "rlinf-megatron".
        parts: ranks of each part, the driver's first.
        host, port: of the store in the driver.
    """

    root: str
    layout: str
    parts: Mapping[str, int]
    host: str
    port: int


class _Checkpoints:
    """What driver and workers do alike."""

    def __init__(self, job: CheckpointJob, part: str, store: Any, options: Mapping[str, Any]) -> None:
        self.job = job
        self._options = {
            **options,
            "store": store,
            "part": part,
            "parts": job.parts,
            "layout": job.layout,
        }
        self._checkpointer: AsyncCheckpointer | None = None

    def _begin(self) -> None:
        self._checkpointer = AsyncCheckpointer(self.job.root, **self._options)

    @property
    def checkpointer(self) -> AsyncCheckpointer:
        """What does the work. Raises OptionError before the beginning."""
        if self._checkpointer is None:
            raise OptionError("not begun: call begin()")
        return self._checkpointer

    def save(self, step: int, *, metadata: Mapping[str, Any] | None = None) -> SaveHandle:
        """Save the state as it is now; see `AsyncCheckpointer.save`. Every participant calls it, with the
        same step; none waits for another one's call, nor for anything to be written.

        Args:
            metadata: the driver's is saved.
        """
        return self.checkpointer.save(step, metadata=metadata)

    def resume(self, resume_dir: str | os.PathLike[str] | None = "auto", **options: Any) -> int:
        """Load, and return the step whose state the live objects have then; 0 if they are as they were.

        Args:
            resume_dir: as in RLinf's configuration. "auto": the newest step that is whole; the directory of
                one step, also of another run; None: nothing is loaded.
            options: of `AsyncCheckpointer.load` and `load_latest`.

        Raises:
            OptionError: it is no `global_step_N`.
            Whatever `AsyncCheckpointer.load` and `load_latest` raise, on all participants.
        """
        if resume_dir is None:
            return 0
        if resume_dir == "auto":
            found = self.checkpointer.load_latest(**options)
            return found.step if found is not None else 0
        path = Path(os.fsdecode(resume_dir)).absolute()
        step = layout_named(self.job.layout).parse_step(path.name)
        if step is None:
            raise OptionError(f"resume_dir: {path} is no global_step_N")
        return self._load(path.parent, step, options).step

    def _load(self, root: Path, step: int, options: Mapping[str, Any]) -> Resume:
        if os.path.realpath(root) == os.path.realpath(self.job.root):
            return self.checkpointer.load(step, **options)
        with AsyncCheckpointer(root, read_only=True, **self._options) as other:
            return other.load(step, **options)

    def fence(self) -> None:
        """Wait until everything that save() spoke of may be changed, freed or moved."""
        self.checkpointer.fence()

    def wait(self) -> None:
        """Wait until every save is durable. Raises SaveError if one failed, and nobody was told yet."""
        self.checkpointer.wait()

    def close(self) -> None:
        """Finish every save and leave. Closing again does nothing."""
        if self._checkpointer is not None:
            self._checkpointer.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._checkpointer is not None:
            self._checkpointer.__exit__(kind, error, trace)


class DriverCheckpoints(_Checkpoints):
    """The driver's side: it hosts the store, saves the dataloader, and makes steps visible.

    Args:
        log_dir: the run's directory; steps go to `checkpoints/` in it.
        groups: ranks of each group of workers that trains, such as {"actor": 4, "critic": 2}.
        dataloader: goes to `data/data.pt`; None: there will be no such file.
        values: a dict of the driver's own, saved and loaded with the rest (see `per_rank`).
        backend: of training: "fsdp" (FSDP2) or "megatron".
        host, port: where workers reach this process; default: its host name, any port.
        options: of `AsyncCheckpointer`: keep_last, on_error, rank_timeout_s, ...

    Attributes:
        job: to be sent to the workers.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        groups: Mapping[str, int],
        *,
        dataloader: Any = None,
        values: dict[str, Any] | None = None,
        backend: Literal["fsdp", "megatron"] = "fsdp",
        host: str | None = None,
        port: int = 0,
        **options: Any,
    ) -> None:
        own = DATA if dataloader is not None else DRIVER
        if {DATA, DRIVER} & set(groups):
            raise OptionError(f"groups: {DATA!r} and {DRIVER!r} are the driver's own part")
        root = Path(os.fsdecode(log_dir)).absolute() / "checkpoints"
        host = host if host is not None else socket.gethostname()
        store = TCPStore(host, port, is_master=True, wait_for_workers=False)
        job = CheckpointJob(str(root), f"rlinf-{backend}", {own: 1, **groups}, host, store.port)
        state = {"dataloader": dataloader, "per_rank": {} if values is None else values}
        super().__init__(job, own, store, {**options, **state, "rank": 0})

    def begin(self) -> None:
        """Wait until all workers have begun, and begin.

        Raises:
            RankError: one does not come; it is named.
            RootError, RootBusyError: see `AsyncCheckpointer`.
        """
        self._begin()


class WorkerCheckpoints(_Checkpoints):
    """A worker's side. Made after its process group and everything that it trains; returns once all
    participants have begun.

    Args:
        job: the driver's.
        part: the worker's group.
        model, optimizer, lr_scheduler, extra, per_rank: see `AsyncCheckpointer`.
        rank: in the group; default: torch.distributed's.
        options: of `AsyncCheckpointer`.
    """

    def __init__(
        self,
        job: CheckpointJob,
        part: str,
        *,
        model: Any,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        rank: int | None = None,
        **options: Any,
    ) -> None:
        store = TCPStore(
            job.host, job.port, is_master=False, wait_for_workers=False, timeout=_CONNECT_TIMEOUT
        )
        state = {"model": model, "optimizer": _one(optimizer), "lr_scheduler": _one(lr_scheduler)}
        super().__init__(job, part, store, {**options, **state, "rank": rank})
        self._begin()

    @classmethod
    def of_manager(
        cls, job: CheckpointJob, part: str, manager: Any, args: Any = None, **options: Any
    ) -> WorkerCheckpoints:
        """For RLinf's FSDPModelManager or MegatronModelManager, which its workers are.

        Its methods that offload and onload wait from now on until what is being saved was copied. An
        optimizer or scheduler that it makes anew later is not seen: make this anew as well, on all.

        Args:
            args: Megatron-LM's arguments, which its own load wants in the file; FSDP needs none.
        """
        state = {
            "model": _one(manager.model),
            "optimizer": manager.optimizer,
            "lr_scheduler": manager.lr_scheduler,
        }
        if type(manager.optimizer).__module__.startswith("megatron."):
            from .megatron import state_of

            state = state_of(manager.model, manager.optimizer, manager.lr_scheduler, args)
        made = cls(job, part, **state, **options)
        made.fence_before(manager, *(name for name in _MOVING if callable(getattr(manager, name, None))))
        return made

    def fence_before(self, owner: Any, *names: str) -> None:
        """Let methods of `owner`, which free, resize or replace what is saved, call `fence()` first."""
        for name in names:
            setattr(owner, name, self._fenced(getattr(owner, name)))

    def _fenced(self, method: Any) -> Any:
        @functools.wraps(method)
        def fenced(*args: Any, **kwargs: Any) -> Any:
            self.fence()
            return method(*args, **kwargs)

        return fenced


def _one(value: Any) -> Any:
    """What a sequence of one holds: RLinf takes either."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
