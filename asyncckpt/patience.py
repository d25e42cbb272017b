"""How long a rank waits for others: pauses that spare the store, and looks for signs of life."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

_POLL_S = (0.001, 0.05)  # the first pause, and the longest: a vote takes as long as the slowest disk
POLLS_PER_S = 20_000  # of all ranks together; one TCPStore answers two or three times as many
_LOOK_AROUND_S = 2.0  # how often few ranks look for signs of life; many do so every quarter of the silence


class Pauses:
    """Pauses that grow, until the time is up; the longer, the more ranks are `polling` one store."""

    def __init__(self, timeout_s: float, polling: int = 1) -> None:
        self._ends_s = time.monotonic() + timeout_s
        self._pause_s, self._longest_s = (_stretched(polling) * pause_s for pause_s in _POLL_S)

    def pause(self) -> bool:
        """False when the time is up."""
        left_s = self._ends_s - time.monotonic()
        if left_s <= 0:
            return False
        threading.Event().wait(min(self._pause_s, left_s))
        self._pause_s = min(self._longest_s, 1.5 * self._pause_s)
        return True


def _stretched(ranks: int) -> float:
    """How much longer pauses are where so many ranks ask, or are asked about: 1 for up to a thousand."""
    return max(1.0, ranks / (_POLL_S[1] * POLLS_PER_S))


class Watch:
    """Looks for signs of life of those who are waited for; `world_size` ranks do so, or are looked for.

    Args:
        beats_of: their last signs of life.
        silence_s: after so long without a new one, a rank is late.
    """

    def __init__(
        self,
        beats_of: Callable[[Sequence[int]], list[bytes]],
        of: Sequence[int],
        world_size: int,
        silence_s: float,
    ) -> None:
        self._every_s = min(_stretched(world_size) * _LOOK_AROUND_S, silence_s / 4)
        self._beats_of = beats_of
        self._silence_s = silence_s
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._of = list(of)
        self._looked_s = time.monotonic()

    def silent(self, missing: Callable[[Sequence[int]], list[int]]) -> int | None:
        """A rank that has been silent for too long and is missing: `missing` tells which of some are."""
        now_s = time.monotonic()
        if not self._seen:
            self._seen = dict.fromkeys(self._of, (b"?", now_s))
        if now_s - self._looked_s < self._every_s:
            return None
        self._looked_s = now_s
        late = []
        for rank, beat in zip(self._of, self._beats_of(self._of), strict=True):
            last, since_s = self._seen[rank]
            if beat != last:
                self._seen[rank] = (beat, now_s)
            elif now_s - since_s > self._silence_s:
                late.append(rank)
        return next(iter(missing(late)), None) if late else None
