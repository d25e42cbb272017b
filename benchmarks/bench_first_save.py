"""first_save.py under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import first_save

pytestmark = pytest.mark.timeout(3600)  # as in bench_stall.py


@pytest.mark.parametrize("when", first_save.WHEN)
def test_first_save(document: dict[str, Any], replay: Any, benchmark: Any, when: str) -> None:
    rows = [row for row in document["rows"] if row["when"] == when]
    benchmark.group = "first save, durable"
    replay(row["durable_s"][0] for row in rows)
    assert {row["contents"] for row in rows} == {"right"}
