"""What plans and votes cost from 8 to 16,384 ranks: benchmarks/results/scale.json and docs/scale.md.

python -m benchmarks.scale [--tiny] [--out DIRECTORY] [--rounds N]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing import forkserver
from typing import Any

from asyncckpt import patience, ranks, store

from .. import machine
from ..results import RESULTS, Options
from . import merge, plans, together, votes
from .page import NAME, render
from .state import TINY, XL, Gpt, Spread, layouts, plan_at, spreads
from .traffic import SILENCE_S, Part, store_calls_per_s, traffic

_ROUNDS = 10
VOTED = "HSDP"  # whose layouts and ballots cross the store


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        votes: the world sizes in which ranks vote.
        clients: ranks besides rank 0 that are real clients of the store, at most.
    """

    gpt: Gpt
    world_sizes: tuple[int, ...]
    votes: tuple[int, ...]
    clients: int
    processes: int
    later_saves: int
    probe_s: float


_MANY = (8, 64, 1024, 16_384)
FULL_SIZE = Size(XL, _MANY, _MANY, clients=256, processes=4, later_saves=10, probe_s=2.0)
TINY_SIZE = Size(TINY, (4, 8), (8,), clients=5, processes=2, later_saves=1, probe_s=0.05)


def run(options: Options) -> dict[str, Any]:
    """All of it."""
    rounds = options.rounds_or(_ROUNDS)
    size = TINY_SIZE if options.tiny else FULL_SIZE
    about = machine.describe(options.out if options.out.exists() else machine.ROOT)
    began_s = time.monotonic()
    forkserver.ensure_running()  # it imports torch, which takes seconds, while this process plans
    document: dict[str, Any] = {
        "tiny": options.tiny,
        "machine": about,
        "config": {
            **asdict(size),
            "parameters": size.gpt.parameters,
            "weights": len(list(size.gpt.weights())),
            "rounds": rounds,
            "voted": VOTED,
            "spreads": {count: _shown(spreads(count)) for count in size.world_sizes},
            "store_calls_per_s": store_calls_per_s(size.probe_s),
            "polls_per_s": patience.POLLS_PER_S,
            "keys_per_call": store._KEYS_PER_CALL,  # noqa: SLF001
            "beat_every_s": SILENCE_S / ranks._BEATS_PER_SILENCE,  # noqa: SLF001 -- said on the page
            "full_collection_s": plans.full_collection_s(),
        },
        "plans": [],
        "merges": [],
        "together": [],
        "votes": [],
    }
    for world_size in size.world_sizes:
        for name, spread in spreads(world_size).items():
            where = {"spread": name, "world_size": world_size}
            _say(began_s, f"plans of {world_size} ranks, {name}")
            document["plans"].append(where | plans.plan_times(size.gpt, spread, rounds))
            _say(began_s, f"layouts of {world_size} ranks, {name}")
            measured = merge.measure if options.tiny else merge.measured_apart
            document["merges"].append(where | measured(size.gpt, spread))
    for world_size in size.world_sizes:
        _say(began_s, f"a file of {world_size} ranks")
        document["together"].append(together.together(size.gpt, world_size, rounds))
    for world_size in size.votes:
        _say(began_s, f"votes of {world_size} ranks")
        document["votes"].append(_votes(size, spreads(world_size)[VOTED]))
    document["took_s"] = time.monotonic() - began_s
    return document


def _votes(size: Size, spread: Spread) -> dict[str, Any]:
    first = plan_at(size.gpt, spread, 0)
    parts = [Part.of(rank, first, layout) for rank, layout in enumerate(layouts(size.gpt, spread, first))]
    real = min(size.clients, spread.world_size - 1)
    with votes.world_of(parts, real, size.processes) as world:
        saves = [world.save(number) for number in range(1, size.later_saves + 2)]
    return {
        "world_size": spread.world_size,
        "longest_pause_s": votes.longest_pause_s(spread.world_size),
        "real_clients": real,
        "simulated": spread.world_size - 1 - real,
        "traffic": traffic(parts),
        "first": saves[0],
        "later": saves[1:],
    }


def _shown(found: dict[str, Spread]) -> dict[str, dict[str, int]]:
    return {name: asdict(spread) for name, spread in found.items()}


def _say(began_s: float, what: str) -> None:
    print(f"{time.monotonic() - began_s:5.0f} s  {what}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, keep, and render."""
    options = Options.parse(__doc__.splitlines()[0] if __doc__ else "", arguments)
    written = options.write(NAME, run(options))
    page = machine.ROOT / "docs" / "scale.md" if options.out == RESULTS else options.out / "scale.md"
    render(written, page)
    print(page)


if __name__ == "__main__":
    main()
