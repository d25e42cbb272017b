"""write.py under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.timeout(3600)  # as in bench_stall.py


@pytest.mark.parametrize("what", ["raw", "buffered", "ours"])
def test_write(document: dict[str, Any], replay: Any, benchmark: Any, what: str) -> None:
    benchmark.group = "write"
    if what == "buffered":
        replay(row["seconds"] for row in document["buffered_rows"])
    else:
        replay(row["ours_s"] if what == "ours" else row["raw"]["seconds"] for row in document["rows"])
    assert {row["contents"] for row in document["rows"]} == {"right"}
