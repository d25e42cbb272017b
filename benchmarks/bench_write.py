"""write.py under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import write
from benchmarks.results import Options

pytestmark = [pytest.mark.timeout(3600), pytest.mark.filterwarnings("ignore")]  # as in bench_stall.py


@pytest.fixture(scope="module")
def document(options: Options) -> dict[str, Any]:
    result = write.run(options)
    options.write("write", result)
    return result


@pytest.mark.parametrize("what", ["raw", "buffered", "ours"])
def test_write(document: dict[str, Any], replay: Any, benchmark: Any, what: str) -> None:
    benchmark.group = "write"
    if what == "buffered":
        replay(row["seconds"] for row in document["buffered_rows"])
    else:
        replay(row["ours_s"] if what == "ours" else row["raw"]["seconds"] for row in document["rows"])
    assert {row["contents"] for row in document["rows"]} == {"right"}
