"""Ours and the peers on a GPU: what each offers to overlap with training is used.

A saver says what training must hold on to (`updating`), tells when a save is durable, reads back a few
tensors by what stock tools or the peer itself offer, and deletes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save

from asyncckpt import AsyncCheckpointer, SaveReport

from ..workload import tensors_of
from .training import Training

_ARENA_ROOM_NBYTES = 256 << 20  # for what is captured, and for the edges of chunks


@dataclass(frozen=True)
class Flight:
    """A save in flight.

    Attributes:
        began_s: perf_counter at the call.
        call_s: how long it took, without what this file adds to it.
        durable: perf_counter when it became durable.
        report: of ours, once it is.
    """

    began_s: float
    call_s: float
    durable: Future[float]
    report: Callable[[], SaveReport] | None = None


class Saver(Protocol):
    """Something that saves the state of a training."""

    note: str

    def save(self, step: int) -> Flight:
        """Begin. On return training goes on; its next update happens inside `updating()`."""

    def updating(self) -> AbstractContextManager[object]:
        """What has to be waited for and held while the state changes."""

    def read(self, step: int, names: set[str]) -> dict[str, torch.Tensor]:
        """Some tensors of what the files hold, on the host."""

    def delete(self, step: int) -> None:
        """Remove the files."""

    def close(self) -> None:
        """Give everything back."""


class Ours:
    """This package, layout "dcp"; its fence hooks itself into the optimizer."""

    def __init__(self, training: Training, directory: Path, host_memory: int) -> None:
        self.note = f"host_memory = {host_memory / 1e9:.1f} GB"
        self._training, self._directory = training, directory
        self._checkpointer = AsyncCheckpointer(
            directory, model=training.model, optimizer=training.optimizer, host_memory=host_memory
        )

    def save(self, step: int) -> Flight:
        began_s = time.perf_counter()
        handle = self._checkpointer.save(step)
        call_s = time.perf_counter() - began_s
        durable: Future[float] = Future()

        def wait() -> None:
            try:
                durable.set_result(began_s + (handle.wait().durable_s or 0.0))
            except Exception as problem:  # noqa: BLE001 -- raised again where the future is asked
                durable.set_exception(problem)

        threading.Thread(target=wait, daemon=True).start()
        return Flight(began_s, call_s, durable, lambda: handle.report)

    def updating(self) -> AbstractContextManager[object]:
        return nullcontext()

    def read(self, step: int, names: set[str]) -> dict[str, torch.Tensor]:
        return _read_dcp(self._training, self._directory / f"step-{step}", names)

    def delete(self, step: int) -> None:
        shutil.rmtree(self._directory / f"step-{step}")

    def close(self) -> None:
        self._checkpointer.close()


class TorchSave:
    """torch.save; a thread adds the fsync that it does not know."""

    note = "blocks until all is in the page cache; fsync follows on a thread"

    def __init__(self, training: Training, directory: Path) -> None:
        self._training, self._directory = training, directory
        directory.mkdir()

    def save(self, step: int) -> Flight:
        began_s = time.perf_counter()
        torch.save(self._training.tree(), self._path(step))
        return Flight(began_s, time.perf_counter() - began_s, _synced(_done(), self._directory))

    def updating(self) -> AbstractContextManager[object]:
        return nullcontext()

    def read(self, step: int, names: set[str]) -> dict[str, torch.Tensor]:
        tree = torch.load(self._path(step), map_location="cpu", mmap=True, weights_only=True)
        return _chosen(tree, names)

    def delete(self, step: int) -> None:
        self._path(step).unlink()

    def close(self) -> None:
        pass

    def _path(self, step: int) -> Path:
        return self._directory / f"{step}.pt"


class Dcp:
    """dcp.async_save with one DefaultStager kept; its file writer calls fsync itself.

    Args:
        process: write in a process beside this one, from shared memory.
        pinned: stage as torch recommends on a GPU: pinned, asynchronous, not blocking.
    """

    def __init__(self, training: Training, directory: Path, *, process: bool, pinned: bool = True) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions  # not in torch 2.6
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self.note = f"{'process' if process else 'thread'}, one DefaultStager kept over all saves" + (
            ": pinned, asynchronous" if pinned else ""
        )
        self._training, self._directory = training, directory
        self._kind = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=pinned,
                use_shared_memory=process,
                use_async_staging=pinned,
                use_non_blocking_copy=pinned,
            )
        )
        self._staged: Future[None] | None = None
        if process and not dist.is_initialized():  # its process insists on a group, however small
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            meeting = f"file://{directory}.group"
            dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)

    def save(self, step: int) -> Flight:
        began_s = time.perf_counter()
        answer = async_save(
            self._training.tree(),
            storage_writer=FileSystemWriter(self._path(step)),
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )
        call_s = time.perf_counter() - began_s
        if isinstance(answer, Future):
            return Flight(began_s, call_s, _stamped(answer))
        self._staged = answer.staging_completion
        return Flight(began_s, call_s, _stamped(answer.upload_completion))

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        if self._staged is not None:
            self._staged.result()
            self._staged = None
        yield

    def read(self, step: int, names: set[str]) -> dict[str, torch.Tensor]:
        return _read_dcp(self._training, self._path(step), names)

    def delete(self, step: int) -> None:
        shutil.rmtree(self._path(step))

    def close(self) -> None:
        self._stager.close()

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step}"


class TorchCheckpointing:
    """The package torch_checkpointing with its defaults; a thread adds the fsync that it does not know.

    Except for direct I/O: as it comes it asks for O_DIRECT, and ext4 refuses the lengths that it writes.
    """

    def __init__(self, training: Training, directory: Path) -> None:
        import torch_checkpointing  # type: ignore[import-not-found, unused-ignore]
        from torch_checkpointing.storage.filesystem import (  # type: ignore[import-not-found, unused-ignore]
            LocalFileSystemStorageConfig,
        )

        self.note = (
            f"version {torch_checkpointing.__version__}, its defaults but for use_direct_io=False, without "
            f"which ext4 refuses its writes; fsync follows on a thread"
        )
        self._training, self._directory = training, directory
        directory.mkdir()
        manager = torch_checkpointing.CheckpointManager
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = manager(manager.Config(storage_config=storage))

    def save(self, step: int) -> Flight:
        began_s = time.perf_counter()
        written = self._manager.save(str(self._path(step)), self._training.tree())
        call_s = time.perf_counter() - began_s
        return Flight(began_s, call_s, _synced(written or _done(), self._directory))

    def updating(self) -> AbstractContextManager[object]:
        return cast("AbstractContextManager[object]", self._manager.lock())

    def read(self, step: int, names: set[str]) -> dict[str, torch.Tensor]:
        # Without a target its own loader maps the files; only what is looked at is read.
        into = {"model": None, "optimizer": None}
        return _chosen(self._manager.load(str(self._path(step)), into, map_location="cpu"), names)

    def delete(self, step: int) -> None:
        shutil.rmtree(self._path(step))

    def close(self) -> None:
        self._manager.close()

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step}"


OURS = "asyncckpt"
PEERS: dict[str, Callable[[Training, Path], Saver]] = {
    "torch.save": TorchSave,
    "dcp.async_save, pinned, thread": lambda training, path: Dcp(training, path, process=False),
    "dcp.async_save, pinned, process": lambda training, path: Dcp(training, path, process=True),
    "torch_checkpointing": TorchCheckpointing,
}


def unavailable(name: str) -> str | None:
    """Why that saver cannot even be tried; None if it can."""
    if name == "torch_checkpointing" and importlib.util.find_spec(name) is None:
        return "not installed"
    return None


def make(name: str, training: Training, directory: Path, host_memory_max: int) -> Saver:
    """The saver of that name. Ours gets memory for the whole state, if `host_memory_max` allows it."""
    if name == OURS:
        return Ours(training, directory, min(training.nbytes + _ARENA_ROOM_NBYTES, host_memory_max))
    return PEERS[name](training, directory)


def _done() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(None)
    return future


def _stamped(written: Future[Any]) -> Future[float]:
    durable: Future[float] = Future()

    def stamp(future: Future[Any]) -> None:
        problem = future.exception()
        if problem is not None:
            durable.set_exception(problem)
        else:
            durable.set_result(time.perf_counter())

    written.add_done_callback(stamp)
    return durable


def _synced(written: Future[Any], directory: Path) -> Future[float]:
    """When what was written is on the disk too: a thread syncs all files below `directory`."""
    synced: Future[None] = Future()

    def sync() -> None:
        try:
            written.result()
            for path in [*directory.rglob("*"), directory]:
                fd = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            synced.set_result(None)
        except Exception as problem:  # noqa: BLE001 -- raised again where the future is asked
            synced.set_exception(problem)

    threading.Thread(target=sync, daemon=True).start()
    return _stamped(synced)


def _read_dcp(training: Training, directory: Path, names: set[str]) -> dict[str, torch.Tensor]:
    """By stock dcp.load, into tensors that hold NaN until then."""
    target = _subset(training.tree(), names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a single process, and that storages are typed
        dcp_load(target, storage_reader=FileSystemReader(directory))
    return dict(tensors_of(target))


def _subset(tree: Any, names: set[str], name: str = "") -> dict[Any, Any]:
    """Empty tensors on the host in place of those named, the branches that lead to them, nothing else."""
    found: dict[Any, Any] = {}
    for key, child in tree.items():
        path = f"{name}.{key}" if name else str(key)
        if isinstance(child, torch.Tensor):
            if path in names:
                found[key] = torch.full_like(child, float("nan"), device="cpu", requires_grad=False)
        elif isinstance(child, Mapping) and (branch := _subset(child, names, path)):
            found[key] = branch
    return found


def _chosen(tree: Any, names: set[str]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors_of(tree) if name in names}
