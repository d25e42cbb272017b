"""every_step.py under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.timeout(3600)  # as in bench_stall.py


@pytest.mark.parametrize("what", ["seconds", "quiet_s", "raw_s"])
def test_steps(document: dict[str, Any], replay: Any, benchmark: Any, what: str) -> None:
    benchmark.group = "a save at each step"
    replay(row[what] for row in document["rows"])
    assert {row["contents"] for row in document["rows"]} == {"right"}
