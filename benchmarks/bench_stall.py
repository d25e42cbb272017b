"""stall.py under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import stall

pytestmark = pytest.mark.timeout(3600)  # seconds; a full run takes minutes


@pytest.mark.parametrize("what", ["blocked_s", "durable_s"])
@pytest.mark.parametrize("saver", stall.SAVERS)
def test_save(document: dict[str, Any], replay: Any, benchmark: Any, saver: str, what: str) -> None:
    if saver in document["cannot_run"]:
        pytest.skip(document["cannot_run"][saver])
    rows = [row for row in document["rows"] if row["saver"] == saver]
    benchmark.group = what
    benchmark.extra_info["contents"] = sorted({row["contents"] for row in rows})
    replay(row[what] for row in rows if not row["alone"])
    if saver in stall.OURS:
        assert {row["contents"] for row in rows} == {"right"}
