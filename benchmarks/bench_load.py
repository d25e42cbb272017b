"""load.py under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.timeout(3600)  # as in bench_stall.py


@pytest.mark.parametrize("what", ["raw", "ours", "stock"])
def test_read(document: dict[str, Any], replay: Any, benchmark: Any, what: str) -> None:
    benchmark.group = "load"
    rows = document["stock_rows" if what == "stock" else "rows"]
    replay(row[f"{what}_s"] for row in rows)
    assert {row["contents"] for row in rows} == {"right"}
