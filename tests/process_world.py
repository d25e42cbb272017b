"""Ranks as processes of their own, started directly: the test sees who dies, and whom that takes along.

The store is hosted by the test's process, so that it outlives every rank. Children are forked from a server
that has imported torch once.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint.filesystem
import torch.distributed.fsdp  # all that a child would import: the server does so once

from asyncckpt import AsyncCheckpointer

PATIENCE_S = 90.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.process_world"])


class Rank:
    """One child, seen from the test."""

    def __init__(self, process: Any, pipe: Connection) -> None:
        self.process = process
        self.pipe = pipe
        self.said: list[Any] = []

    def kill(self) -> None:
        """SIGKILL, and wait for its end; nothing if it has ended."""
        self.process.kill()
        self.process.join(PATIENCE_S)

    def stop(self) -> None:
        """SIGSTOP: it is there, and does nothing."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def wake(self) -> None:
        """SIGCONT, after `stop`."""
        os.kill(self.process.pid, signal.SIGCONT)

    def hear(self, expected: Any = None) -> Any:
        """What it says next, which is `expected`; what it raised is raised here."""
        deadline_s = time.monotonic() + PATIENCE_S
        if not self.pipe.poll(max(0, deadline_s - time.monotonic())):
            raise AssertionError(f"said nothing after {self.said}")
        kind, value = pickle.loads(self.pipe.recv_bytes())
        if kind == "raised":
            raise AssertionError(f"a rank raised:\n{value}")
        self.said.append(value)
        assert expected is None or value == expected, self.said
        return value


class Talk:
    """A child's way to talk with the test.

    Attributes:
        store: what all ranks of one start share, whatever process group they are in.
    """

    def __init__(self, pipe: Connection, store: Any = None) -> None:
        self._pipe = pipe
        self.store = store

    def say(self, value: Any) -> None:
        _send(self._pipe, "said", value)

    def listen(self) -> Any:
        """Wait for a word of the test."""
        return self._pipe.recv()


def _send(pipe: Connection, kind: str, value: Any) -> None:
    # Plainly: multiprocessing's own way would hand over tensors as files that end with the child.
    pipe.send_bytes(pickle.dumps((kind, value)))


Body = Callable[..., Any]


def _child(
    body: Body, part: str, rank: int, world_size: int, port: int, tag: str, pipe: Connection, args: Any
) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        group = dist.PrefixStore(f"{tag}/{part}", store)
        dist.init_process_group("gloo", store=group, rank=rank, world_size=world_size)
        of_part = (part,) if part else ()
        result = body(Talk(pipe, dist.PrefixStore(tag, store)), *of_part, rank, *pickle.loads(args))
        _send(pipe, "said", result)
    except BaseException:  # noqa: BLE001 -- the test is told, whatever it is
        _send(pipe, "raised", traceback.format_exc())
    finally:
        pipe.close()
        if dist.is_initialized():
            dist.destroy_process_group()


class World:
    """A store, and the ranks that were started over it."""

    def __init__(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._started = 0
        self.ranks: list[Rank] = []

    def start(self, world_size: int, body: Body, *args: Any) -> list[Rank]:
        """Start ranks that run `body(talk, rank, *args)`; what it returns, they say last."""
        return self.start_parts({"": world_size}, body, *args)

    def start_parts(self, parts: Mapping[str, int], body: Body, *args: Any) -> list[Rank]:
        """Start a process group for each part, whose ranks run `body(talk, part, rank, *args)`."""
        self._started += 1
        ranks = []
        plain = pickle.dumps(args)
        for part, rank in ((part, rank) for part, size in parts.items() for rank in range(size)):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_child,
                args=(body, part, rank, parts[part], self.store.port, str(self._started), theirs, plain),
            )
            process.start()
            theirs.close()
            ranks.append(Rank(process, ours))
        self.ranks += ranks
        return ranks

    def run(self, world_size: int, body: Body, *args: Any) -> list[Any]:
        """What `body` returned on each rank."""
        return self.run_parts({"": world_size}, body, *args)

    def run_parts(self, parts: Mapping[str, int], body: Body, *args: Any) -> list[Any]:
        """What `body` returned on each rank of each part, in their order."""
        ranks = self.start_parts(parts, body, *args)
        pending = {rank.pipe: index for index, rank in enumerate(ranks)}
        results: dict[int, Any] = {}
        while pending:
            ready = wait(list(pending), PATIENCE_S)
            assert ready, f"ranks {sorted(pending.values())} said nothing"
            for pipe in ready:
                index = pending.pop(pipe)  # type: ignore[index]
                results[index] = ranks[index].hear()
        for rank in ranks:
            rank.process.join(PATIENCE_S)
            assert rank.process.exitcode == 0
        return [results[index] for index in range(len(ranks))]

    def close(self) -> None:
        """End whoever is left."""
        for rank in self.ranks:
            rank.kill()


@contextmanager
def process_world() -> Iterator[World]:
    """A world, and its end."""
    world = World()
    try:
        yield world
    finally:
        world.close()


__all__ = ["AsyncCheckpointer", "Rank", "Talk", "World", "process_world"]
