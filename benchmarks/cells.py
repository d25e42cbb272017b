"""Figures, tables and lists of the page, as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_GIB = 1 << 30


def machine_line(facts: dict[str, Any]) -> str:
    """What was measured on, in one line of italics."""
    commit = facts["commit"] or "unknown"
    if facts["commit_is_clean"] is False:
        commit += " with changes"
    return (
        f"*{facts['cpu']}, {facts['cores']} cores, {size(facts['memory_bytes'])} of memory, "
        f"{facts['filesystem']}; {facts['system']}, Python {facts['python']}, torch {facts['torch']}; "
        f"commit {commit}, {facts['when']}; load average before: {facts['load_average_before']:.2f}.*"
    )


def size(count: float) -> str:
    """Bytes."""
    return f"{count / _GIB:.2f} GiB" if count >= _GIB // 10 else f"{count / (1 << 20):.2f} MiB"


def value(number: float, unit: str) -> str:
    """One figure. Units: s, x (times as much), % (of one), bytes, and none for a count."""
    if not unit:
        return f"{number:,.0f}"
    if unit == "bytes":
        return f"{number / (1 << 20):.1f} MiB"
    if unit == "%":
        return f"{number * 100:.1f} %"
    if unit == "x":
        return f"{number:.2f}"
    return f"{number:.2f} s" if abs(number) >= 1 else f"{number * 1e3:.1f} ms"


def spread(one: dict[str, float], unit: str) -> str:
    """A summary: its median, from the smallest to the largest."""
    if one["count"] == 1:
        return f"{value(one['median'], unit)} (once)"
    return f"{value(one['median'], unit)} ({value(one['min'], unit)} to {value(one['max'], unit)})"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def bullets(items: Iterable[str]) -> str:
    """A list; nothing for no items."""
    return "".join(f"- {item}\n" for item in items)
