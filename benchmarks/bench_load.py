"""load.py under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import load
from benchmarks.results import Options

pytestmark = [pytest.mark.timeout(3600), pytest.mark.filterwarnings("ignore")]  # as in bench_stall.py


@pytest.fixture(scope="module")
def document(options: Options) -> dict[str, Any]:
    result = load.run(options)
    options.write("load", result)
    return result


@pytest.mark.parametrize("what", ["raw", "ours", "stock"])
def test_read(document: dict[str, Any], replay: Any, benchmark: Any, what: str) -> None:
    benchmark.group = "load"
    rows = document["stock_rows" if what == "stock" else "rows"]
    replay(row[f"{what}_s"] for row in rows)
    assert {row["contents"] for row in rows} == {"right"}
