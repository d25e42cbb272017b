"""What the rows of the probes say, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .cells import Column, fact, percent, rate, seconds, size, table_of
from .journal import Row


@dataclass(frozen=True)
class Table:
    """What a probe's rows say. A row belongs to the table whose first column it has."""

    probe: int
    title: str
    columns: tuple[Column, ...]
    about: str = ""


TABLES = (
    Table(1, "The machine", (Column("What", "what"), Column("Value", "value", fact))),
    Table(
        2,
        "Pinning host memory",
        (
            Column("Memory", "kind"),
            Column("Calls", "calls"),
            Column("In huge pages", "huge_share", percent),
            Column("Touch, per GiB", "touch_s_per_gib", seconds),
            Column("Register, per GiB", "register_s_per_gib", seconds),
            Column("Unregister, per GiB", "unregister_s_per_gib", seconds),
            Column("Kernel launch meanwhile, median", "launch_median_s", seconds),
            Column("Worst", "launch_worst_s", seconds),
        ),
        "1 GiB by `cuMemHostRegister_v2`, in one call and in slabs; another thread launches kernels.",
    ),
    Table(
        3,
        "Speed to the host by size of copy",
        (
            Column("Memory", "kind"),
            Column("Copies of", "chunk", size),
            Column("Speed", "gb_per_s", rate),
            Column("Host time per copy", "enqueue_s", seconds),
        ),
        "One stream, events around all copies, which are enqueued before the first begins. Host time is that "
        "of a call from Python.",
    ),
    Table(
        4,
        "Writing to disk from pinned pages during copies into others",
        (
            Column("What", "what"),
            Column("Disk", "disk_gb_per_s", rate),
            Column("Link", "link_gb_per_s", rate),
            Column("O_DIRECT", "direct"),
        ),
        "Four threads write blocks of 4 MiB.",
    ),
    Table(
        5,
        "Order against the legacy default stream",
        (
            Column("Waits for an event", "waits"),
            Column("CUDA_DEVICE_MAX_CONNECTIONS", "connections"),
            Column("Trials", "trials"),
            Column("All new", "new"),
            Column("All old", "old"),
            Column("Torn", "torn"),
        ),
        "Kernels on the default stream fill a block in slices; a copy on a non-blocking stream, enqueued "
        "after them, reads it.",
    ),
    Table(
        5,
        "Slowdown of kernels during copies",
        (
            Column("Work", "work"),
            Column("CUDA_DEVICE_MAX_CONNECTIONS", "connections"),
            Column("Quiet", "quiet_s", seconds),
            Column("During copies", "busy_s", seconds),
            Column("Slowdown", "slowdown", percent),
            Column("Spread when quiet", "quiet_spread", percent),
            Column("Copies", "gb_per_s", rate),
        ),
        "Blocks of 1 GiB, without a pause.",
    ),
    Table(
        6,
        "Memory that is freed under a copy in flight",
        (
            Column("Given back to the driver", "empty_cache"),
            Column("Expandable segments", "expandable"),
            Column("In flight after `resize_(0)`", "in_flight_after_resize"),
            Column("After `empty_cache()`", "in_flight_after_empty_cache"),
            Column("It took", "empty_cache_s", seconds),
            Column("Contents", "contents"),
            Column("Fault", "fault"),
        ),
        "The memory is allocated and overwritten again at once.",
    ),
    Table(
        7,
        "Another thread during a capture in global mode",
        (
            Column("It calls", "operation"),
            Column("In relaxed mode", "relaxed"),
            Column("And gets", "outcome"),
            Column("Capture survives", "survived"),
            Column("Replay", "replayed"),
            Column("Why not", "why"),
        ),
    ),
    Table(
        8,
        "50,000 small copies",
        (
            Column("Way", "way"),
            Column("Each", "nbytes_each", size),
            Column("Host time", "submit_s", seconds),
            Column("Until all is there", "total_s", seconds),
            Column("Contents", "contents"),
        ),
        "Calls are made from Python; tables of the batches are made beforehand.",
    ),
)


def probe_table(shown: Table, rows: Sequence[Row]) -> str:
    """With what failed below."""
    of_probe = [row for row in rows if row["probe"] == shown.probe]
    there = [row for row in of_probe if "error" not in row and shown.columns[0].key in row]
    failed = []
    for row in of_probe:
        if "error" in row:
            labels = ", ".join(f"{key} {one}" for key, one in row.items() if key not in ("probe", "error"))
            failed.append(f"- Failed{f' ({labels})' if labels else ''}: {row['error']}\n")
    return table_of(shown.columns, there) + "".join(["\n", *failed] if failed else [])


def sections(rows: Sequence[Row]) -> list[str]:
    """All probes."""
    parts = []
    for shown in TABLES:
        parts.append(f"### ({shown.probe}) {shown.title}\n")
        if shown.about:
            parts.append(shown.about + "\n")
        parts.append(probe_table(shown, rows))
    return parts
