"""many_tensors.py under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import many_tensors

pytestmark = pytest.mark.timeout(3600)  # as in bench_stall.py


@pytest.mark.parametrize("saver", many_tensors.SAVERS)
@pytest.mark.parametrize("index", range(len(many_tensors.FULL)))
def test_save(document: dict[str, Any], replay: Any, benchmark: Any, saver: str, index: int) -> None:
    leaves = document["sizes"][index]["leaves"]
    rows = [row for row in document["rows"] if (row["saver"], row["leaves"]) == (saver, leaves)]
    if not rows:
        pytest.skip(document["cannot_run"][saver])
    benchmark.group = f"blocked, {leaves:,} leaves"
    replay(row["blocked_s"] for row in rows if not row["alone"])
    if saver in (many_tensors.DCP, many_tensors.MEGATRON):
        assert {row["contents"] for row in rows} == {"right"}
