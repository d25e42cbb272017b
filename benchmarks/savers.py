"""The face that all savers have, and ours behind it.

Save, tell when durable, load with stock tools, delete.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from asyncckpt import AsyncCheckpointer, Resume, SaveHandle, SaveReport

from .workload import Workload, tensors_of


class Pending(Protocol):
    """A save that is not durable yet."""

    def done(self) -> bool:
        """Whether it is durable (or has failed)."""

    def wait(self) -> SaveReport | None:
        """Until durable; raises if it failed. A report, if the saver makes one."""

    @property
    def durable_at_s(self) -> float:
        """perf_counter when it became durable; once done."""


class Saver(Protocol):
    """Something that saves the workload's state."""

    name: str
    note: str

    def save(self, step: int) -> Pending:
        """Begin. On return the caller may train on; what may not be changed yet, a hook must guard."""

    def load(self, step: int) -> dict[str, torch.Tensor]:
        """What the files hold, read by stock tools."""

    def delete(self, step: int) -> None:
        """Remove the files."""

    def close(self) -> None:
        """Give everything back."""


class OurPending:
    """A save of ours that is not durable yet."""

    def __init__(self, handle: SaveHandle, began_s: float) -> None:
        self._handle = handle
        self._began_s = began_s

    def done(self) -> bool:
        return self._handle.done()

    @property
    def blocked_so_far_s(self) -> float:
        """What the report says by now."""
        return self._handle.report.blocked_s

    def wait(self) -> SaveReport:
        return self._handle.wait()

    @property
    def durable_at_s(self) -> float:
        durable_s = self._handle.report.durable_s
        assert durable_s is not None
        return self._began_s + durable_s


class Asyncckpt:
    """This package, with files that torch.distributed.checkpoint reads."""

    layout = "dcp"
    step_name = "step-{}"

    def __init__(
        self,
        name: str,
        workload: Workload,
        directory: Path,
        host_memory_bytes: int,
        keep_last: int | None = None,
        writers_priority: Literal["normal", "low"] = "normal",
    ) -> None:
        self.name = name
        self.note = f"host_memory = {host_memory_bytes >> 20} MiB"
        if writers_priority != "normal":
            self.note += f', writers_priority = "{writers_priority}"'
        self._directory = directory
        self._workload = workload
        self._checkpointer = AsyncCheckpointer(
            directory,
            model=workload.model,
            optimizer=workload.optimizer,
            host_memory=host_memory_bytes,
            layout=self.layout,
            keep_last=keep_last,
            writers_priority=writers_priority,
        )

    def save(self, step: int) -> OurPending:
        began_s = time.perf_counter()
        return OurPending(self._checkpointer.save(step), began_s)

    def load(self, step: int) -> dict[str, torch.Tensor]:
        return DcpReader(self._workload).read(self.directory(step))

    def load_each(self, step: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The same, with memory for one weight at a time."""
        return DcpReader(self._workload).each(self.directory(step))

    def resume(self, step: int) -> Resume:
        """Load into the live tensors."""
        return self._checkpointer.load(step)

    def delete(self, step: int) -> None:
        shutil.rmtree(self.directory(step))

    def close(self) -> None:
        self._checkpointer.close()

    def directory(self, step: int) -> Path:
        """Where a step lies."""
        return self._directory / self.step_name.format(step)


class AsyncckptMegatron(Asyncckpt):
    """This package, with files that torch.load and Megatron-LM read."""

    layout = "megatron"
    step_name = "iter_{:07d}"

    def load(self, step: int) -> dict[str, torch.Tensor]:
        path = self.directory(step) / "mp_rank_00" / "model_optim_rng.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that storages are typed
            whole = torch.load(path, mmap=True, weights_only=False)  # numpy's generator is in it
        names = [name for name, _ in self._workload.model.named_parameters()]
        state = {names[index]: values for index, values in whole["optimizer"]["state"].items()}
        return dict(tensors_of({"model": whole["model"], "optimizer": {"state": state}}))


class DcpReader:
    """Stock dcp.load into tensors that are not training's."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def read(self, directory: Path) -> dict[str, torch.Tensor]:
        """What the files hold."""
        target = self.target()
        self.fill(target, directory)
        return dict(tensors_of(target))

    def each(self, directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """The same, weight by weight: with memory for one at a time."""
        for weight in list(self._workload.tree()["model"]):
            target = self.target(weight)
            self.fill(target, directory)
            yield from tensors_of(target)

    def target(self, weight: str | None = None) -> dict[str, Any]:
        """Tensors to load into, which hold nothing yet; of all weights, or of one."""
        tree = self._workload.tree()
        model, state = tree["model"], tree["optimizer"]["state"]
        if weight is not None:
            model, state = {weight: model[weight]}, {weight: state[weight]}
        wanted = {"model": model, "optimizer": {"state": state}}
        made: dict[str, Any] = _map(wanted, lambda tensor: torch.full_like(tensor, float("nan")))
        return made

    @staticmethod
    def fill(target: dict[str, Any], directory: Path) -> None:
        """Load into them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is a single process, and that storages are typed
            dcp_load(target, storage_reader=FileSystemReader(directory))


def _map(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        return change(tree)
    return {key: _map(child, change) for key, child in tree.items()}
