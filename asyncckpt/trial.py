"""Two ways to do a thing, tried in turn on real work; the faster one stays.

Pure: no clocks, no threads. What a sample cost is said by whoever measured it, from any thread.
"""

from __future__ import annotations

_SAMPLES = 3  # of each way, before a verdict


class Trial:
    """Chooses between the new way and the old one.

    Both ways are judged by their cheapest sample. What else goes on (kernels that a stream still had to run,
    a busy disk) only ever adds to a cost, and differs from sample to sample by more than the two ways do; a
    median of few samples would tell of that instead.

    Attributes:
        verdict: whether the new way stays; None while it is open.
    """

    def __init__(self) -> None:
        self.verdict: bool | None = None
        self._begun = 0
        self._costs_s: dict[bool, list[float]] = {True: [], False: []}

    def begin(self) -> Sample:
        """How to do it this time: the new way first, then by turns until both have been measured.

        The first sample does not count: whatever is prepared or compiled once, it pays for.
        """
        if self.verdict is None and all(len(costs) >= _SAMPLES for costs in self._costs_s.values()):
            self.verdict = min(self._costs_s[True]) < min(self._costs_s[False])
        if self.verdict is not None:
            return Sample(self.verdict, None)
        self._begun += 1
        is_new = self._begun % 2 == 1
        return Sample(is_new, self._costs_s[is_new] if self._begun > 1 else None)

    def give_up(self) -> None:
        """The old way stays."""
        self.verdict = False


class Sample:
    """One time.

    Attributes:
        is_new: whether it is to be done the new way.
    """

    def __init__(self, is_new: bool, costs_s: list[float] | None) -> None:
        self.is_new = is_new
        self._costs_s = costs_s

    def note(self, cost_s: float) -> None:
        """It was done, and took so long. What failed is not noted."""
        if self._costs_s is not None:
            self._costs_s.append(cost_s)
