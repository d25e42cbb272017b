"""What keeps a target from being met, written by hand: limits.toml."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parent / "limits.toml"
Key = tuple[str, str, str]
_FIELDS = {"benchmark", "what", "where", "note"}
_MEASURED = re.compile(r"\d\s*(%|x\b|s\b|ms\b|µs\b|[GM]i?B/s)")


def read(path: Path = PATH) -> dict[Key, str]:
    """The notes by benchmark, target and where.

    Raises:
        ValueError: two notes for one target, a figure that was measured, or not the fields of a limit.
    """
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    notes: dict[Key, str] = {}
    for limit in toml.loads(path.read_text()).get("limit", []):
        if limit.keys() != _FIELDS:
            raise ValueError(f"{path.name}: a limit has {sorted(_FIELDS)}, not {sorted(limit)}")
        key = (limit["benchmark"], limit["what"], limit["where"])
        if key in notes:
            raise ValueError(f"{path.name}: two limits for {key}")
        if measured := _MEASURED.search(limit["note"]):
            raise ValueError(f"{path.name}: {key}: {measured[0]!r} is for a JSON to say")
        notes[key] = limit["note"]
    return notes


def refuse_strangers(notes: Mapping[Key, str], documents: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError for a note on a target that a full run's document does not have.

    Tiny runs have targets of other sizes, and what was not run has none: they prove nothing.
    """
    for name, what, where in notes:
        document = documents.get(name)
        if document is None or document["tiny"]:
            continue
        if (what, where) not in {(one["what"], one["where"]) for one in document.get("targets", ())}:
            raise ValueError(f"{PATH.name}: {name} has no target {what!r} with {where!r}")
