"""`make bench`: each script runs once, pytest-benchmark shows and stores its samples.

In a process of its own, as by hand: what other scripts and their peers leave in a process is not what is to
be measured (docs/notes/2026-11-27-python-that-is-slow-in-a-long-process.md).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import machine
from benchmarks.render import render
from benchmarks.results import RESULTS, Options, rounds

Replay = Callable[[Iterable[float]], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the scripts."""
    group = parser.getgroup("asyncckpt")
    group.addoption("--tiny", action="store_true", help="does it run? The figures mean nothing")
    group.addoption("--bench-dir", type=Path, help="scratch, on the disk to measure")
    group.addoption("--bench-out", type=Path, help="directory for the JSON")
    group.addoption("--bench-rounds", type=rounds, help="how often everything is measured")


class _Clock:
    """A clock that shows what was measured, not what passes."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


_CLOCK = _Clock()


@pytest.fixture(scope="session")
def options(pytestconfig: pytest.Config) -> Iterable[Options]:
    """What to measure and where; renders the page when all is measured."""
    made = Options.make(
        directory=pytestconfig.getoption("--bench-dir"),
        out=pytestconfig.getoption("--bench-out"),
        tiny=pytestconfig.getoption("--tiny"),
        rounds=pytestconfig.getoption("--bench-rounds"),
    )
    yield made
    page = machine.ROOT / "docs" / "benchmarks.md" if made.out == RESULTS else made.out / "benchmarks.md"
    render(made.out, page)


@pytest.fixture(scope="module")
def document(options: Options, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the script of this module, stall.py of bench_stall.py, measured.

    What it said is shown if it fails.
    """
    name = request.module.__name__.rpartition("bench_")[2]
    command = [sys.executable, "-m", f"benchmarks.{name}", *options.arguments()]
    subprocess.run(command, cwd=machine.ROOT, check=True)
    found: dict[str, Any] = json.loads(options.result(name).read_text())
    return found


@pytest.fixture
def replay(benchmark: BenchmarkFixture) -> Replay:
    """Hands samples to pytest-benchmark that it could not have timed itself.

    What a save costs is no call that could be timed from its start to its end, and savers take turns.
    So the scripts measure, and here a clock repeats it.
    """
    benchmark._timer = _CLOCK  # noqa: SLF001 -- `timer=` of the marker would show its repr in the table

    def run(samples: Iterable[float]) -> None:
        kept = list(samples)
        remaining = iter(kept)

        def advance() -> None:
            _CLOCK.now_s += next(remaining)

        benchmark.pedantic(advance, rounds=len(kept))  # type: ignore[no-untyped-call]

    return run
