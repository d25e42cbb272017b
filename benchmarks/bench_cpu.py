"""cpu.py under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import cpu

pytestmark = pytest.mark.timeout(3600)  # as in bench_stall.py


@pytest.mark.parametrize("saver", cpu.SAVERS)
def test_save(document: dict[str, Any], replay: Any, benchmark: Any, saver: str) -> None:
    if saver in document["cannot_run"]:
        pytest.skip(document["cannot_run"][saver])
    rows = [row for row in document["rows"] if row["saver"] == saver]
    benchmark.group = "processor time per GiB"
    replay(row["cpu_s_per_gib"] for row in rows)
    if saver == cpu.OURS:
        assert {row["contents"] for row in rows} == {"right"}
