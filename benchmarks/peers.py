"""The peers behind the face of savers.py: what each offers to overlap with training is used.

Durable means on the disk: where a peer knows no fsync, a thread of ours adds it once the peer has written.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import resource
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .savers import DcpReader, Pending, Saver
from .workload import Workload, tensors_of

_POLL_S = 0.002
_OTHER_FILES = 2000  # that a process may have open besides
_GIVE_UP_S = 120.0  # a thread that waits for a peer does not outlive it by more


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


def _synced(path: Path, written: Callable[[], object]) -> Pending:
    """A thread waits until `path` is `written`, and syncs it with all below it and its directory."""
    synced: Future[None] = Future()

    def sync() -> None:
        try:
            written()
            for one in (path, *path.rglob("*"), path.parent):
                fd = os.open(one, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            synced.set_result(None)
        except Exception as problem:  # noqa: BLE001 -- raised again where the future is asked
            synced.set_exception(problem)

    threading.Thread(target=sync, daemon=True).start()
    return _FuturePending(synced)


class _Peer:
    """What all have: a directory with something for each step."""

    note: str

    def __init__(self, name: str, workload: Workload, directory: Path) -> None:
        self.name = name
        self._workload = workload
        self._directory = directory
        directory.mkdir()

    def delete(self, step: int) -> None:
        shutil.rmtree(self._path(step))

    def close(self) -> None:
        pass

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step}"


class TorchSave(_Peer):
    """torch.save."""

    note = "blocked is the call alone; fsync follows on a thread"

    def save(self, step: int) -> Pending:
        torch.save(self._workload.tree(), self._path(step))
        return _synced(self._path(step), lambda: None)

    def load(self, step: int) -> dict[str, torch.Tensor]:
        return dict(tensors_of(torch.load(self._path(step), mmap=True, weights_only=True)))

    def delete(self, step: int) -> None:
        self._path(step).unlink()


class _Dcp(_Peer):
    def load(self, step: int) -> dict[str, torch.Tensor]:
        return DcpReader(self._workload).read(self._path(step))


class DcpSave(_Dcp):
    """torch.distributed.checkpoint.save; its file writer calls fsync itself."""

    note = "blocked until durable"

    def save(self, step: int) -> Pending:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is a single process
            dcp_save(self._workload.tree(), storage_writer=FileSystemWriter(self._path(step)))
        durable: Future[None] = Future()
        durable.set_result(None)
        return _FuturePending(durable)


class DcpAsyncSave(_Dcp):
    """torch.distributed.checkpoint.async_save on its thread, as it comes."""

    note = "thread, as it comes"

    def __init__(self, name: str, workload: Workload, directory: Path) -> None:
        super().__init__(name, workload, directory)
        self._stager = self._make_stager()

    def save(self, step: int) -> Pending:
        return self._save(self._workload.tree(), self._path(step))

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()

    def _make_stager(self) -> Any:
        return None

    def _save(self, tree: dict[str, Any], path: Path) -> Pending:
        options = {} if self._stager is None else {"async_stager": self._stager}
        future = async_save(tree, storage_writer=FileSystemWriter(path), **options, **self._options())
        assert isinstance(future, Future)  # else the stager is asynchronous, and needs an accelerator
        return _FuturePending(future)

    def _options(self) -> dict[str, Any]:
        return {}


class DcpAsyncSaveWarm(DcpAsyncSave):
    """With memory that stays."""

    note = "thread, one DefaultStager kept over all saves"

    def _make_stager(self) -> Any:
        return _default_stager()


class DcpAsyncSavePinned(DcpAsyncSave):
    """With pinned memory that stays, which needs an accelerator."""

    note = "thread, BlockingAsyncStager(cache_staged_state_dict=True)"

    def _make_stager(self) -> Any:
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        return BlockingAsyncStager(cache_staged_state_dict=True)


class DcpAsyncSaveProcess(DcpAsyncSave):
    """In a process beside this one, from shared memory that stays."""

    note = "process, one DefaultStager in shared memory kept over all saves"

    def __init__(self, name: str, workload: Workload, directory: Path) -> None:
        _require_files(workload)
        super().__init__(name, workload, directory)
        # The process is started by the first save, which asks for a group, however small. No later one
        # does: whoever else saves here is to find none.
        assert not dist.is_initialized()
        hook = sys.excepthook
        dist.init_process_group("gloo", init_method=f"file://{directory}.group", rank=0, world_size=1)
        try:
            self._save({"nothing": torch.zeros(1)}, directory / "first").wait()
        finally:
            dist.destroy_process_group()
            sys.excepthook = hook

    def _make_stager(self) -> Any:
        return _default_stager(shared=True)

    def _options(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType  # not in torch 2.6

        return {"async_checkpointer_type": AsyncCheckpointerType.PROCESS}


def _default_stager(*, shared: bool = False) -> Any:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions  # not in torch 2.6

    # Everything but this needs an accelerator.
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=shared,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )


class TorchSnapshot(_Peer):
    """The package torchsnapshot."""

    note = "async_take; fsync follows on a thread"

    def __init__(self, name: str, workload: Workload, directory: Path) -> None:
        import torchsnapshot  # type: ignore[import-not-found, import-untyped, unused-ignore]

        super().__init__(name, workload, directory)
        self._package = torchsnapshot

    def save(self, step: int) -> Pending:
        state = {"state": self._package.StateDict(**self._workload.tree())}
        pending = self._package.Snapshot.async_take(str(self._path(step)), state)
        return _synced(self._path(step), pending.wait)

    def load(self, step: int) -> dict[str, torch.Tensor]:
        into = self._package.StateDict(**DcpReader(self._workload).target())
        self._package.Snapshot(str(self._path(step))).restore({"state": into})
        return dict(tensors_of(dict(into)))


class TorchCheckpointing(_Peer):
    """The package torch_checkpointing: it copies while training computes, and updates wait for its lock."""

    note = (
        "asynchronous, its lock held in updates, its defaults but for use_direct_io=False, without which "
        "ext4 refuses its writes; fsync follows on a thread"
    )

    def __init__(self, name: str, workload: Workload, directory: Path) -> None:
        import torch_checkpointing  # type: ignore[import-not-found, import-untyped, unused-ignore]
        from torch_checkpointing.storage.filesystem import (  # type: ignore[import-not-found, unused-ignore]
            LocalFileSystemStorageConfig,
        )

        _require_files(workload)
        super().__init__(name, workload, directory)
        manager = torch_checkpointing.CheckpointManager
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = manager(manager.Config(storage_config=storage))
        self._lock: Any = None
        self._hooks = [
            register_optimizer_step_pre_hook(self._enter),
            register_optimizer_step_post_hook(self._leave),
        ]
        self._in_flight: Pending | None = None

    def save(self, step: int) -> Pending:
        written = self._manager.save(str(self._path(step)), self._workload.tree())
        assert written is not None  # else it is not asynchronous
        self._in_flight = _synced(self._path(step), written.result)
        return self._in_flight

    def load(self, step: int) -> dict[str, torch.Tensor]:
        into = {"model": None, "optimizer": None}
        return dict(tensors_of(self._manager.load(str(self._path(step)), into, map_location="cpu")))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._manager.close()

    def _enter(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is self._workload.optimizer and self._in_flight is not None:
            self._lock = self._manager.lock()
            self._lock.__enter__()

    def _leave(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._lock is not None:
            self._lock.__exit__(None, None, None)
            self._lock = None
            if self._in_flight is not None and self._in_flight.done():
                self._in_flight = None


class Dlrover(_Peer):
    """DLRover's flash checkpoint: copied into shared memory in the call, written by a process beside this.

    It says that it is done by the step in a tracker file, which knows no step 0.
    """

    note = "DdpCheckpointer, to disk; fsync follows on a thread"

    def __init__(self, name: str, workload: Workload, directory: Path) -> None:
        # No two share their sockets and their memory, and whoever else saves here is not told of a job.
        self._job = f"asyncckpt-{os.getpid()}-{time.monotonic_ns()}"
        with _environment(TORCHELASTIC_RUN_ID=self._job, DLROVER_LOG_LEVEL="ERROR"), _logging():
            from dlrover.trainer.torch.flash_checkpoint import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
                ddp,
            )

            super().__init__(name, workload, directory)
            before = multiprocessing.active_children()
            self._checkpointer = ddp.DdpCheckpointer(str(directory))
        self._processes = [one for one in multiprocessing.active_children() if one not in before]
        self._tracker = directory / "dlrover_latest.txt"

    def save(self, step: int) -> Pending:
        self._checkpointer.save_checkpoint(step + 1, self._workload.tree(), str(self._path(step)))
        return _synced(self._path(step), lambda: self._wait(step + 1))

    def load(self, step: int) -> dict[str, torch.Tensor]:
        return dict(tensors_of(torch.load(self._path(step), mmap=True, weights_only=True)))

    def delete(self, step: int) -> None:
        self._path(step).unlink()

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()
        Path(f"/dev/shm/{self._job}_ckpt_shm_0").unlink(missing_ok=True)  # noqa: S108 -- theirs, not ours
        shutil.rmtree(f"/tmp/ckpt_sock/{self._job}", ignore_errors=True)  # noqa: S108

    def _wait(self, step: int) -> None:
        deadline_s = time.perf_counter() + _GIVE_UP_S
        while not self._tracker.exists() or self._tracker.read_text() != str(step):
            if time.perf_counter() > deadline_s:
                raise TimeoutError(f"step {step} is not in {self._tracker.name}")
            time.sleep(_POLL_S)


def _require_files(workload: Workload) -> None:
    """For a peer that keeps a file open for each tensor: without this, the others would find none to open."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if workload.tensor_count + _OTHER_FILES > allowed:
        raise OSError(
            f"it keeps a file open for each of {workload.tensor_count:,} tensors, "
            f"and this system allows {allowed:,} in a process"
        )


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Undo what an import does to the root logger: every save of every peer would pay for its lines."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


PEERS: dict[str, Callable[[str, Workload, Path], Saver]] = {
    "torch.save": TorchSave,
    "dcp.save": DcpSave,
    "dcp.async_save": DcpAsyncSave,
    "dcp.async_save, warm": DcpAsyncSaveWarm,
    "dcp.async_save, pinned": DcpAsyncSavePinned,
    "dcp.async_save, process": DcpAsyncSaveProcess,
    "torchsnapshot": TorchSnapshot,
    "torch_checkpointing": TorchCheckpointing,
    "dlrover flash checkpoint": Dlrover,
}
