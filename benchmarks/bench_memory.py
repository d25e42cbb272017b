"""memory.py under pytest-benchmark, which knows seconds only: its table counts GiB."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import memory
from benchmarks.results import Options

pytestmark = [pytest.mark.timeout(3600), pytest.mark.filterwarnings("ignore")]  # as in bench_stall.py


@pytest.fixture(scope="module")
def document(options: Options) -> dict[str, Any]:
    result = memory.run(options)
    options.write("memory", result)
    return result


@pytest.mark.parametrize("where", [case.where for case in memory.CASES])
def test_save(document: dict[str, Any], replay: Any, benchmark: Any, where: str) -> None:
    rows = [row for row in document["rows"] if row["where"] == where]
    if not rows:
        pytest.skip(document["cannot_run"].get(where, "not in a tiny run"))
    benchmark.group = "extra host memory, GiB"
    replay(row["extra_bytes"] / (1 << 30) for row in rows)
    assert {row["contents"] for row in rows} == {"right"}
