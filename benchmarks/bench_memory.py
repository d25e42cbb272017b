"""memory.py under pytest-benchmark, which knows seconds only: its table counts GiB."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import memory

pytestmark = pytest.mark.timeout(3600)  # as in bench_stall.py


@pytest.mark.parametrize("where", [case.where for case in memory.CASES])
def test_save(document: dict[str, Any], replay: Any, benchmark: Any, where: str) -> None:
    rows = [row for row in document["rows"] if row["where"] == where]
    if not rows:
        pytest.skip(document["cannot_run"].get(where, "not in a tiny run"))
    benchmark.group = "extra host memory, GiB"
    replay(row["extra_bytes"] / (1 << 30) for row in rows)
    assert {row["contents"] for row in rows} == {"right"}
