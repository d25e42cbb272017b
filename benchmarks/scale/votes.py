"""How long a vote takes: from the last ballot until rank 0 has all of them, and from its word until all know.

A TCPStore on loopback; rank 0 in this process; some of the other ranks are real clients, threads of a few
processes with a connection each. The rest are *simulated*: a loader says for them, by the same code and
before the real ones vote, what they would say. They do not wait, and beat once.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from asyncckpt import patience as room
from asyncckpt.ballots import Outcome
from asyncckpt.ranks import Ranks

from .merge import CONTEXT
from .traffic import HOST, INCARNATION, NAME, SILENCE_S, TIMEOUT_S, Loader, Part

LATE_PAUSES = 4  # pauses grow by half each time: after three of the longest, they are as long as they get


def _clients(port: int, world_size: int, parts: list[Part], late_s: float, pipe: Connection) -> None:
    """Ranks in a process of their own. Says of each save when the last had voted, and when each knew.

    The first of them votes `late_s` after the others: by then these ask for the outcome as rarely as they
    ever do, as they would while disks are slow.
    """
    store = TCPStore(HOST, port, is_master=False, wait_for_workers=False)
    ranks = [Ranks(store, p.ballot.rank, world_size, NAME, TIMEOUT_S, SILENCE_S) for p in parts]
    began = threading.Barrier(len(parts) + 1)
    go = threading.Barrier(len(parts) + 1)
    done = threading.Barrier(len(parts) + 1)
    voted_s, knew_s = [0.0] * len(parts), [0.0] * len(parts)
    errors: list[BaseException] = []
    save = 0

    def take_part(index: int) -> None:
        own, part = ranks[index], parts[index]
        try:
            own.begin(dict)
            began.wait()
            while go.wait() is not None and save:
                own.say_layout(part.ballot, part.tree, part.layout)
                if index == 0:
                    threading.Event().wait(late_s)
                own.vote(save, part.ballot)
                voted_s[index] = time.monotonic()
                outcome = own.outcome(save)
                knew_s[index] = time.monotonic()
                assert outcome.error is None, outcome.error
                done.wait()
        except BaseException as error:  # noqa: BLE001 -- the others shall not wait for it
            errors.append(error)
            for barrier in (began, go, done):
                barrier.abort()

    threads = [threading.Thread(target=take_part, args=(index,)) for index in range(len(parts))]
    for thread in threads:
        thread.start()
    try:
        began.wait()
        pipe.send("began")
        while (save := pipe.recv()) != 0:
            go.wait()
            done.wait()
            pipe.send((max(voted_s), knew_s))
        go.wait()
    except threading.BrokenBarrierError:
        pipe.send(f"{errors[0]!r}" if errors else "a client broke off")
    for thread in threads:
        thread.join()
    for one in ranks:
        one.close()


def longest_pause_s(world_size: int) -> float:
    """Between two questions of a rank that has waited for a while."""
    return room.Pauses(1.0, world_size)._longest_s  # noqa: SLF001 -- said on the page


@dataclass
class World:
    """Rank 0, and who else is here."""

    first: Ranks
    parts: list[Part]
    pipes: list[Connection]
    loader: Loader
    simulated: list[Part]

    def save(self, number: int) -> dict[str, float]:
        """One vote, with nothing to publish between its halves."""
        gc.collect()
        began_s = time.monotonic()
        for part in self.simulated:
            self.loader.vote_for(number, part)
        loaded_s = time.monotonic() - began_s
        for pipe in self.pipes:
            pipe.send(number)
        own = self.parts[0]
        ballots = self.first.collect(number, own.ballot)
        collected_s = time.monotonic()
        found = {"loaded_s": loaded_s}
        if number == 1:
            for _ in self.first.layouts(ballots, own.tree, own.layout):
                pass  # unpacked one by one, as they are merged
            found["fetched_s"] = time.monotonic() - collected_s
        announcing_s = time.monotonic()
        self.first.announce(number, Outcome())
        voted_s, knew_s = 0.0, []
        for pipe in self.pipes:
            said = pipe.recv()
            assert isinstance(said, tuple), said
            voted_s = max(voted_s, said[0])
            knew_s += said[1]
        return found | {
            "collected_s": collected_s - voted_s,
            "heard_median_s": median(knew_s) - announcing_s,
            "heard_last_s": max(knew_s) - announcing_s,
            "latency_s": collected_s - voted_s + max(knew_s) - announcing_s,
        }


@contextmanager
def world_of(parts: Sequence[Part], clients: int, processes: int) -> Iterator[World]:
    """Ranks that have begun: all of `parts`, of which ranks 1 to `clients` are real clients."""
    hosted = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    first = Ranks(hosted, 0, len(parts), NAME, TIMEOUT_S, SILENCE_S)
    loader = Loader(hosted, len(parts))
    real, simulated = list(parts[1 : clients + 1]), list(parts[clients + 1 :])
    pipes, started = [], []
    try:
        for index in range(min(processes, len(real))):
            ours, theirs = CONTEXT.Pipe()
            late_s = LATE_PAUSES * longest_pause_s(len(parts)) if index == 0 else 0.0
            arguments = (hosted.port, len(parts), real[index::processes], late_s, theirs)
            started.append(CONTEXT.Process(target=_clients, args=arguments, daemon=True))
            started[-1].start()
            theirs.close()
            pipes.append(ours)
        first.begin(lambda: {"incarnation": INCARNATION})
        for part in simulated:
            loader.beat_for(part)
        for pipe in pipes:
            said = pipe.recv()
            assert said == "began", said
        yield World(first, list(parts), pipes, loader, simulated)
        for pipe in pipes:
            pipe.send(0)
        for process in started:
            process.join(TIMEOUT_S)
    finally:
        for process in started:
            process.kill()
        first._said = 0  # noqa: SLF001 -- simulated ranks hear nothing
        first.close()
        loader.close()
