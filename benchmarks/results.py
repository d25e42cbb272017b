"""One JSON document per benchmark, and the command line that every script has."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import machine

RESULTS = machine.ROOT / "benchmarks" / "results"
_TINY_ROUNDS = 2
_TINY_RESULTS = machine.ROOT / "build" / "benchmarks-tiny"


@dataclass(frozen=True)
class Options:
    """What a script was asked to do.

    Attributes:
        directory: files are written in a fresh directory in here, and deleted.
        out: where the JSON goes.
        tiny: seconds instead of minutes, and figures that mean nothing: does it run?
        rounds: how often everything is measured; None for what each script finds enough.
    """

    directory: Path
    out: Path
    tiny: bool
    rounds: int | None

    @classmethod
    def make(
        cls,
        *,
        directory: Path | None = None,
        out: Path | None = None,
        tiny: bool = False,
        rounds: int | None = None,
    ) -> Options:
        """With defaults for what is None. A tiny run never overwrites the results of a full one.

        Exits if files would be written to memory, or nowhere.
        """
        directory = directory or machine.ROOT.parent
        if directory.exists() and not directory.is_dir():
            raise SystemExit(f"{directory} is no directory")
        if not tiny:
            machine.refuse_memory(directory)
        return cls(
            directory,
            out or (_TINY_RESULTS if tiny else RESULTS),
            tiny,
            rounds,
        )

    def rounds_or(self, full: int) -> int:
        """How often to measure; `full` is what a full run needs for figures that mean something."""
        return self.rounds or (min(full, _TINY_ROUNDS) if self.tiny else full)

    @classmethod
    def parse(cls, description: str, arguments: Sequence[str] | None) -> Options:
        """From a command line."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--dir", type=Path, help="scratch, on the disk to measure (beside the checkout)")
        parser.add_argument("--out", type=Path, help="directory for the JSON (benchmarks/results)")
        parser.add_argument("--tiny", action="store_true", help="does it run? The figures mean nothing")
        parser.add_argument(
            "--rounds", type=rounds, help="how often everything is measured (each has its own)"
        )
        given = parser.parse_args(arguments)
        return cls.make(directory=given.dir, out=given.out, tiny=given.tiny, rounds=given.rounds)

    def arguments(self) -> list[str]:
        """The command line that `parse` makes the same of, wherever it is started."""
        given = ["--dir", str(self.directory.resolve()), "--out", str(self.out.resolve())]
        if self.tiny:
            given.append("--tiny")
        if self.rounds is not None:
            given += ["--rounds", str(self.rounds)]
        return given

    @contextlib.contextmanager
    def scratch(self, needed_bytes: int) -> Iterator[Path]:
        """A new directory, gone afterwards. Exits if it would be too small."""
        self.directory.mkdir(parents=True, exist_ok=True)
        machine.require_room(self.directory, needed_bytes)
        path = Path(tempfile.mkdtemp(prefix="asyncckpt-benchmark-", dir=self.directory))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def result(self, name: str) -> Path:
        """Where a benchmark's document is, or will be."""
        return self.out / f"{name}.json"

    def write(self, name: str, document: dict[str, Any]) -> Path:
        """Keep a result."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.result(name)
        path.write_text(json.dumps(document, indent=1) + "\n")
        return path


def rounds(text: str) -> int:
    """A number of rounds, from a command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rounds: 1 or more")
    return int(text)


def summary(values: Iterable[float]) -> dict[str, float]:
    """Median and spread."""
    ordered = sorted(values)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {
        "median": quartiles[1],
        "first_quartile": quartiles[0],
        "third_quartile": quartiles[2],
        "min": ordered[0],
        "max": ordered[-1],
        "count": len(ordered),
    }


def summaries(rows: list[dict[str, Any]], keys: Iterable[str]) -> dict[str, Any]:
    """Of what there is: of a save that is durable at once there is no slowdown."""
    found = {key: [row[key] for row in rows if row.get(key) is not None] for key in keys}
    return {key: summary(values) for key, values in found.items() if values}


def verdicts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often the contents were right, and what they were otherwise."""
    found = [row["contents"] for row in rows]
    return {"contents_right": found.count("right"), "contents_wrong": sorted({*found} - {"right"})}


def target(
    what: str, where: str, unit: str, limit: float, measured: dict[str, float], beside: str | None = None
) -> dict[str, Any]:
    """A promise beside its summary; kept if the median is within the limit.

    `what` and `where` are its name, the same in every full run. `beside` is what it was measured against,
    where that is found in the run only. Units: those of `cells.value`.
    """
    return {
        "what": what,
        "where": where,
        "unit": unit,
        "limit": limit,
        "measured": measured,
        "beside": beside,
        "met": measured["median"] <= limit,
    }


def best_peer_target(
    where: str, limit: float, rows: Sequence[dict[str, Any]], ours: str, peers: Iterable[str]
) -> dict[str, Any]:
    """Blocked beside the peer whose median is the lowest, pair by pair: ours and the peer's of a round.

    A peer that ever saved something else than the state at the call is no peer here.
    """
    blocked: dict[str, dict[int, float]] = {}
    wrong = set()
    for row in rows:
        blocked.setdefault(row["saver"], {})[row["round"]] = row["blocked_s"]
        if row["contents"] != "right":
            wrong.add(row["saver"])
    right = [name for name in peers if name in blocked and name not in wrong]
    best = min(right, key=lambda name: statistics.median(blocked[name].values()))
    ratio = summary(blocked[ours][number] / peer_s for number, peer_s in blocked[best].items())
    return target("blocked beside the best peer", where, "x", limit, ratio, beside=best)
