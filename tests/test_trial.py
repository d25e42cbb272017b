"""Which of two ways stays, by times that are made up."""

from __future__ import annotations

import pytest

from asyncckpt.trial import Trial


def run(trial: Trial, costs_s: dict[bool, list[float]]) -> list[bool]:
    """Saves until the times run out, or until a verdict; the ways that were taken."""
    left = {way: iter(costs) for way, costs in costs_s.items()}
    taken = []
    while trial.verdict is None:
        sample = trial.begin()
        if trial.verdict is None:
            taken.append(sample.is_new)
            sample.note(next(left[sample.is_new]))
    return taken


@pytest.mark.parametrize(
    ("new_s", "old_s", "new_stays"),
    [
        ([9.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0], True),
        ([0.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0], False),  # the first, which compiles, does not count
        ([0.0, 1.0, 9.0, 9.0], [2.0, 2.0, 2.0], True),  # what else went on only ever adds
        ([0.0, 3.0, 3.0, 3.0], [9.0, 9.0, 2.0], False),
        ([0.0, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0], False),  # no better, so not worth it
    ],
)
def test_the_cheaper_way_stays(new_s: list[float], old_s: list[float], new_stays: bool) -> None:
    trial = Trial()
    assert run(trial, {True: new_s, False: old_s}) == [True, False] * 3 + [True]
    assert trial.verdict is new_stays
    assert [trial.begin().is_new for _ in range(5)] == [new_stays] * 5


def test_samples_that_failed_are_taken_again() -> None:
    trial = Trial()
    samples = [trial.begin() for _ in range(20)]  # none is noted: all failed
    assert [sample.is_new for sample in samples] == [True, False] * 10
    for sample in samples[1:6]:
        sample.note(1.0 if sample.is_new else 2.0)
    assert trial.begin().is_new
    assert trial.verdict is None  # the new way has two samples yet
    samples[6].note(1.0)
    assert trial.begin().is_new
    assert trial.verdict is True


def test_what_comes_after_the_verdict_changes_nothing() -> None:
    trial = Trial()
    late = [trial.begin() for _ in range(9)]
    for sample in late[:7]:
        sample.note(1.0 if sample.is_new else 2.0)
    after = trial.begin()
    late[7].note(0.0)
    after.note(100.0)
    assert trial.begin().is_new


def test_giving_up_keeps_the_old_way() -> None:
    trial = Trial()
    trial.begin()
    trial.give_up()
    assert not trial.begin().is_new
