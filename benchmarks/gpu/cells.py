"""How values become cells of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from .journal import Row

NOT_YET = "not measured yet"
Format = Callable[[Any], str]


def seconds(value: float) -> str:
    """With a unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if abs(value) >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value * 1e6:.1f} µs"


def size(value: float) -> str:
    """Bytes, in binary units."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.0f} B"


def rate(value: float) -> str:
    """10^9 bytes per second."""
    return f"{value:.1f} GB/s" if value >= 10 else f"{value:.2f} GB/s"


def percent(value: float) -> str:
    """Of one."""
    return f"{value * 100:.1f} %"


def factor(value: float) -> str:
    """So many times."""
    return f"{value:.2f}"


def text(value: Any) -> str:
    """As it is."""
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def fact(value: Any) -> str:
    """A number of bytes if it can be nothing else."""
    large = isinstance(value, int) and value >= 1 << 20
    return size(value) if large else text(value)


def spread(values: Sequence[float], form: Format) -> str:
    """Median, smallest and largest."""
    if not values:
        return NOT_YET
    if len(values) == 1:
        return form(values[0])
    return f"{form(median(values))} ({form(min(values))} to {form(max(values))})"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    rows = [head, ["---"] * len(head), *([cell.replace("|", "/") for cell in line] for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


@dataclass(frozen=True)
class Column:
    """One column of a table of rows."""

    title: str
    key: str
    form: Format = text

    def cell(self, row: Row) -> str:
        """A dash where the row has no such value."""
        value = row.get(self.key)
        return "-" if value is None else self.form(value)


def table_of(columns: Sequence[Column], rows: Iterable[Row]) -> str:
    """One line per row; one that says so where there is none."""
    lines = [[column.cell(row) for column in columns] for row in rows]
    return table([column.title for column in columns], lines or [[NOT_YET] * len(columns)])
