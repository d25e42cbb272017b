"""Who takes part in a run, in which order, and until when.

Nothing that a peer does or leaves undone stops the run: it is out then, and the page says why.
"""

from __future__ import annotations

import contextlib
import gc
import random
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from .peers import PEERS
from .savers import Saver
from .workload import Workload

DEADLINE_S = 120.0  # for one measurement of a peer
_CLOSE_DEADLINE_S = 20.0


class Lineup:
    """Ours, and from `invite()` on the peers that can run here.

    A peer that is not installed, fails or does not answer in time is out, with the reason in `cannot_run`.
    One of ours that fails raises.
    """

    def __init__(self, ours: Sequence[Saver], workload: Workload, directory: Path) -> None:
        # As many as may be: some peers share memory by a file for each tensor.
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
        self.cannot_run: dict[str, str] = {}
        self._workload = workload
        self._ours = list(ours)
        self._directory = directory
        self._peers: list[Saver] = []

    def invite(self) -> None:
        """Make the peers; each saves once. Until now ours had the process for themselves."""
        for index, (name, make) in enumerate(PEERS.items()):
            with self._trying(name, DEADLINE_S):
                saver = make(name, self._workload, self._directory / f"peer-{index}")
                self._peers.append(saver)
                saver.save(0).wait()
                saver.delete(0)

    @property
    def savers(self) -> list[Saver]:
        """Those still in the run."""
        return [*self._ours, *self._peers]

    def turns(self, number: int) -> list[Saver]:
        """Who saves in a round, in an order that chance has made, the same in every run: whom a saver
        follows changes from round to round."""
        order = self.savers
        random.Random(number).shuffle(order)
        return order

    def measure(self, saver: Saver, measurement: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What it returns; None if a peer was not up to it, which is then out."""
        if saver in self._ours:
            return measurement()
        with self._trying(saver.name, DEADLINE_S):
            return measurement()
        return None

    def kept(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Without those of peers that are out by now."""
        return [row for row in rows if row["saver"] not in self.cannot_run]

    def close(self) -> None:
        """Close all that are still in."""
        for saver in self._ours:
            saver.close()
        for saver in self._peers:
            self._close(saver)

    @staticmethod
    def _close(saver: Saver) -> None:
        # What it measured stands, however it ends.
        with contextlib.suppress(Exception), _within(_CLOSE_DEADLINE_S):
            saver.close()
        gc.collect()  # what some peers share goes only then

    @contextlib.contextmanager
    def _trying(self, name: str, deadline_s: float) -> Iterator[None]:
        try:
            with _within(deadline_s):
                yield
        except Exception as problem:  # noqa: BLE001 -- whatever keeps a peer from running is the finding
            lines = str(problem).splitlines() or [""]
            reason = f"{type(problem).__name__}: {lines[0][:200]}"
            if isinstance(problem, ModuleNotFoundError):
                reason = f"not installed ({problem.name})"
            self.cannot_run[name] = reason
            self._workload.one_thread()  # it may have been inside save()
            out = [saver for saver in self._peers if saver.name == name]
        else:
            return
        for saver in out:  # now: all that it holds, files not least, the others have to do without
            self._peers.remove(saver)
            self._close(saver)


@contextlib.contextmanager
def _within(deadline_s: float) -> Iterator[None]:
    """Raise TimeoutError in here if it takes longer; the main thread only, which waits in python code."""
    assert threading.current_thread() is threading.main_thread()

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer within {deadline_s:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, deadline_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
