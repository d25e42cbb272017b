"""A result that grows row by row, on disk after each; and the clock that ends a run in time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import machine

_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")

Row = dict[str, Any]
Emit = Callable[[Row], None]


class Budget:
    """Seconds that a run may take, from now on by its own clock."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._seconds = seconds

    def spent_s(self) -> float:
        """Since the beginning."""
        return self._clock() - self._began_s

    def left_s(self) -> float:
        """Until the end; never negative."""
        return max(0.0, self._seconds - self.spent_s())


class Journal:
    """One JSON document. After each add() the file is whole, whatever kills the run next.

    Args:
        path: the file.
        facts: what the document says besides its rows.
        kept: rows of an earlier run that stand.
    """

    def __init__(self, path: Path, facts: Row, kept: Iterable[Row] = ()) -> None:
        self._path = path
        self._document: Row = {**facts, "complete": False, "missing": {}, "rows": list(kept)}

    @property
    def rows(self) -> list[Row]:
        """All rows so far."""
        rows: list[Row] = self._document["rows"]
        return rows

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows.append(row)
        self._write()

    def miss(self, what: str, why: str) -> None:
        """Say what has no row, and why."""
        self._document["missing"][what] = why
        self._write()

    def finish(self, **facts: Any) -> None:
        """The run came to its end; `missing` says whether it measured all."""
        self._document |= {**facts, "complete": True}
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._path.with_name(f".{self._path.name}.part")
        with whole.open("w") as file:
            file.write(json.dumps(self._document, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        whole.replace(self._path)


def earlier_rows(path: Path) -> list[Row]:
    """The rows of a document that may not be there."""
    try:
        rows: list[Row] = json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError):
        return []
    return rows


@contextlib.contextmanager
def scratch(given: Path | None, out: Path) -> Iterator[Path]:
    """A new directory for what is written and deleted; on a disk, if one can be found.

    Without one named, the first of the directory of results, the place of the checkout and the system's
    temporary directory that is not in memory; in need, the one with the most room.
    """
    parent = given or _first_disk((out, machine.ROOT.parent, Path(tempfile.gettempdir())))
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="asyncckpt-gpu-", dir=parent, ignore_cleanup_errors=True) as path:
        yield Path(path)


def _first_disk(candidates: Sequence[Path]) -> Path:
    usable = [one for one in candidates if os.access(one, os.W_OK)] or list(candidates)
    disks = [one for one in usable if machine.filesystem_of(one) not in _IN_MEMORY]
    return disks[0] if disks else max(usable, key=lambda one: shutil.disk_usage(one).free)
