"""Ours and the peers behind one face: save, tell when durable, load with stock tools, delete."""

from __future__ import annotations

import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

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


class _OurPending:
    def __init__(self, handle: SaveHandle, began_s: float) -> None:
        self._handle = handle
        self._began_s = began_s

    def done(self) -> bool:
        return self._handle.done()

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
    ) -> None:
        self.name = name
        self.note = f"host_memory = {host_memory_bytes >> 20} MiB"
        self._directory = directory
        self._workload = workload
        self._checkpointer = AsyncCheckpointer(
            directory,
            model=workload.model,
            optimizer=workload.optimizer,
            host_memory=host_memory_bytes,
            layout=self.layout,
            keep_last=keep_last,
        )

    def save(self, step: int) -> Pending:
        began_s = time.perf_counter()
        return _OurPending(self._checkpointer.save(step), began_s)

    def load(self, step: int) -> dict[str, torch.Tensor]:
        return DcpReader(self._workload).read(self.directory(step))

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


class _FuturePending:
    def __init__(self, future: Future[Any]) -> None:
        self._future = future
        self._durable_at_s = 0.0
        self._stamped = threading.Event()  # a future wakes its waiters before it runs its callbacks
        future.add_done_callback(self._stamp)

    def _stamp(self, future: Future[Any]) -> None:
        self._durable_at_s = time.perf_counter()
        self._stamped.set()

    def done(self) -> bool:
        return self._stamped.is_set()

    def wait(self) -> None:
        self._future.result()
        self._stamped.wait()

    @property
    def durable_at_s(self) -> float:
        return self._durable_at_s


class TorchSave:
    """torch.save, which knows no fsync: a thread of ours adds it while training goes on."""

    note = "blocked is the call alone; fsync follows on a thread"

    def __init__(self, name: str, workload: Workload, directory: Path) -> None:
        self.name = name
        self._workload = workload
        self._directory = directory
        directory.mkdir()

    def save(self, step: int) -> Pending:
        path = self._path(step)
        torch.save(self._workload.tree(), path)
        synced: Future[None] = Future()

        def sync() -> None:
            try:
                for target in (path, self._directory):
                    fd = os.open(target, os.O_RDONLY)
                    os.fsync(fd)
                    os.close(fd)
                synced.set_result(None)
            except OSError as problem:
                synced.set_exception(problem)

        threading.Thread(target=sync, daemon=True).start()
        return _FuturePending(synced)

    def load(self, step: int) -> dict[str, torch.Tensor]:
        return dict(tensors_of(torch.load(self._path(step), mmap=True, weights_only=True)))

    def delete(self, step: int) -> None:
        self._path(step).unlink()

    def close(self) -> None:
        pass

    def _path(self, step: int) -> Path:
        return self._directory / f"{step}.pt"


class DcpAsyncSave:
    """torch.distributed.checkpoint.async_save on its thread; its file writer calls fsync itself."""

    def __init__(
        self,
        name: str,
        workload: Workload,
        directory: Path,
        note: str = "thread, as it comes",
        stager: Any = None,
    ) -> None:
        self.name = name
        self.note = note
        self._workload = workload
        self._directory = directory
        self._reader = DcpReader(workload)
        self._stager = stager
        self._options = {} if stager is None else {"async_stager": stager}

    def save(self, step: int) -> Pending:
        writer = FileSystemWriter(self._path(step))
        future = async_save(self._workload.tree(), storage_writer=writer, **self._options)
        assert isinstance(future, Future)  # else the stager is asynchronous, and needs an accelerator
        return _FuturePending(future)

    def load(self, step: int) -> dict[str, torch.Tensor]:
        return self._reader.read(self._path(step))

    def delete(self, step: int) -> None:
        shutil.rmtree(self._path(step))

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step}"


class DcpSave:
    """torch.distributed.checkpoint.save: durable when it returns."""

    note = "blocked until durable"

    def __init__(self, name: str, workload: Workload, directory: Path) -> None:
        self.name = name
        self._workload = workload
        self._directory = directory

    def save(self, step: int) -> Pending:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is a single process
            dcp_save(self._workload.tree(), storage_writer=FileSystemWriter(self._path(step)))
        durable: Future[None] = Future()
        durable.set_result(None)
        return _FuturePending(durable)

    def load(self, step: int) -> dict[str, torch.Tensor]:
        return DcpReader(self._workload).read(self._path(step))

    def delete(self, step: int) -> None:
        shutil.rmtree(self._path(step))

    def close(self) -> None:
        pass

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step}"


class DcpReader:
    """Stock dcp.load into tensors that are not training's."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def read(self, directory: Path) -> dict[str, torch.Tensor]:
        """What the files hold."""
        target = self.target()
        self.fill(target, directory)
        return dict(tensors_of(target))

    def target(self) -> dict[str, Any]:
        """Tensors to load into, which hold nothing yet."""
        tree = self._workload.tree()
        wanted = {"model": tree["model"], "optimizer": {"state": tree["optimizer"]["state"]}}
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


def peers(workload: Workload, directory: Path) -> tuple[list[Saver], dict[str, str]]:
    """The peers that can run here, and why the others cannot."""
    running: list[Saver] = []
    cannot: dict[str, str] = {}
    for index, (name, make) in enumerate(PEERS.items()):
        try:
            saver = make(name, workload, directory / f"peer-{index}")
            saver.save(0).wait()
            saver.delete(0)
            running.append(saver)
        except Exception as problem:  # noqa: BLE001 -- whatever keeps a peer from running is the finding
            cannot[name] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}"
    return running, cannot


def _default_stager() -> Any:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions  # not in torch 2.6

    # Everything but this needs an accelerator.
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )


def _cached_stager() -> Any:
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    return BlockingAsyncStager(cache_staged_state_dict=True)


def _warm(name: str, workload: Workload, directory: Path) -> Saver:
    return DcpAsyncSave(
        name, workload, directory, "thread, one DefaultStager kept over all saves", _default_stager()
    )


def _pinned(name: str, workload: Workload, directory: Path) -> Saver:
    note = "thread, BlockingAsyncStager(cache_staged_state_dict=True)"
    return DcpAsyncSave(name, workload, directory, note, _cached_stager())


PEERS: dict[str, Callable[[str, Workload, Path], Saver]] = {
    "torch.save": TorchSave,
    "dcp.save": DcpSave,
    "dcp.async_save": DcpAsyncSave,
    "dcp.async_save, warm": _warm,
    "dcp.async_save, pinned": _pinned,
}
