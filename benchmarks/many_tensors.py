"""What a save blocks training when the state has many tensors.

The same bytes in ever more leaves: what training waits for must be the work of a copy, not of a loop over
leaves. Each save is measured as in stall.py, training goes on, and what was saved is compared with the
state at the call. First ours alone, of all sizes; then, of all sizes again, beside the peers. The more
leaves, the longer peers take, and whoever reads back what was saved: the fewer rounds there are, and for a
peer only one if a save takes very long.

    blocked     seconds inside save(), and in the optimizer's hooks afterwards, as in stall.py

    python -m benchmarks.many_tensors [--tiny] [--dir DISK] [--out DIRECTORY] [--rounds COUNT]
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import machine
from .lineup import Lineup
from .peers import PEERS
from .results import Options, best_peer_target, summaries, summary, target, verdicts
from .savers import Asyncckpt, AsyncckptMegatron, Saver
from .stall import MEASURED, measure, phases
from .workload import Size, Workload

DCP, MEGATRON = "asyncckpt", "asyncckpt, megatron"
SAVERS = (DCP, MEGATRON, *PEERS)
MEGATRON_TARGET_RATIO = 2.0
BEST_PEER_TARGET_RATIO = 0.2  # five times less
_SLOW_S = 45.0  # a peer that takes longer for a save does not get another of that state
_ARENA_BYTES = 128 << 20  # twice the state: here, nothing is to wait for the disk


@dataclass(frozen=True)
class Scale:
    """A state of some leaves (four for each weight), and how long a save of it may block.

    `rounds` is how often ours save it before there are peers, `peer_rounds` how often all do at most.
    """

    size: Size
    target_s: float
    rounds: int
    peer_rounds: int

    @property
    def leaves(self) -> int:
        return 4 * self.size.weights


FULL = (  # 64 MiB each
    Scale(Size(weights=64, rows=256, columns=341, compute_s=0.05), target_s=0.005, rounds=10, peer_rounds=10),
    Scale(Size(weights=1024, rows=64, columns=85, compute_s=0.05), target_s=0.010, rounds=10, peer_rounds=6),
    Scale(Size(weights=12_500, rows=8, columns=56, compute_s=0.05), target_s=0.060, rounds=6, peer_rounds=2),
)
TINY = (
    Scale(Size(weights=2, rows=64, columns=64, compute_s=0.005), target_s=0.005, rounds=2, peer_rounds=2),
    Scale(Size(weights=8, rows=8, columns=64, compute_s=0.005), target_s=0.010, rounds=2, peer_rounds=2),
    Scale(Size(weights=16, rows=8, columns=32, compute_s=0.005), target_s=0.060, rounds=2, peer_rounds=1),
)


def run(options: Options) -> dict[str, Any]:
    """Measure and return the document."""
    warnings.filterwarnings("ignore", module="torch")  # as in stall.py
    scales = TINY if options.tiny else FULL
    # Of all sizes before there is a peer of any.
    alone = [_rounds(options, scale, with_peers=False) for scale in scales]
    beside = [_rounds(options, scale, with_peers=True) for scale in scales]
    sizes: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []
    cannot: dict[str, str] = {}
    for scale, of_ours, of_all in zip(scales, alone, beside, strict=True):
        sizes.append(
            {
                "leaves": scale.leaves,
                "rounds": options.rounds_or(scale.rounds),
                "peer_rounds": options.rounds_or(scale.peer_rounds),
                "nbytes": of_ours.nbytes,
                "alone": _summaries(of_ours.rows),
                "summary": _summaries(of_all.rows),
            }
        )
        targets += _targets(scale, sizes[-1]["alone"], of_all.rows)
        # The fewest leaves that it could not save.
        cannot = {name: f"{scale.leaves:,} leaves: {why}" for name, why in of_all.cannot_run.items()} | cannot
    return {
        "benchmark": "many_tensors",
        "tiny": options.tiny,
        "machine": alone[0].machine,
        "config": {"slow_s": _SLOW_S, "arena_bytes": _ARENA_BYTES},
        "targets": targets,
        "cannot_run": cannot,
        "sizes": sizes,
        "rows": [row for found in (*alone, *beside) for row in found.rows],
    }


@dataclass(frozen=True)
class _Rounds:
    machine: dict[str, object]
    nbytes: int
    rows: list[dict[str, Any]]
    cannot_run: dict[str, str]


def _rounds(options: Options, scale: Scale, *, with_peers: bool) -> _Rounds:
    workload = Workload(scale.size)
    try:
        with options.scratch(8 * workload.nbytes) as scratch:
            facts = machine.describe(scratch)
            ours: list[Saver] = [
                Asyncckpt(DCP, workload, scratch / "dcp", _ARENA_BYTES),
                AsyncckptMegatron(MEGATRON, workload, scratch / "megatron", _ARENA_BYTES),
            ]
            lineup = Lineup(ours, workload, scratch)
            try:
                rows = _measure(options, scale, workload, lineup, with_peers=with_peers)
            finally:
                lineup.close()
            return _Rounds(facts, workload.nbytes, lineup.kept(rows), lineup.cannot_run)
    finally:
        workload.close()


def _measure(
    options: Options, scale: Scale, workload: Workload, lineup: Lineup, *, with_peers: bool
) -> list[dict[str, Any]]:
    rounds = options.rounds_or(scale.peer_rounds if with_peers else scale.rounds)
    slow: set[str] = set()
    rows: list[dict[str, Any]] = []
    for number in range(rounds + 1):  # the first warms up ours; peers come warm
        if with_peers and number == 1:
            lineup.invite()
        for saver in lineup.turns(number):
            if saver.name in slow:
                continue
            found = lineup.measure(saver, partial(measure, workload, saver, number + 1))
            if found is None:
                continue
            if saver.name in PEERS and found["durable_s"] > _SLOW_S:
                slow.add(saver.name)
            row = {"leaves": scale.leaves, "alone": not with_peers, "round": number, **found}
            print(
                f"many_tensors {scale.leaves} {'beside peers' if with_peers else 'alone'} {number}/{rounds} "
                f"{saver.name}: blocked {row['blocked_s'] * 1e3:.1f} ms, contents {row['contents']}",
                file=sys.stderr,
            )
            if number:
                rows.append(row)
    return rows


def _summaries(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each saver that is there."""
    there = {row["saver"] for row in rows}
    return {saver: _summarise(rows, saver) for saver in SAVERS if saver in there}


def _summarise(rows: list[dict[str, Any]], saver: str) -> dict[str, Any]:
    of_saver = [row for row in rows if row["saver"] == saver]
    dcp_s = {row["round"]: row["blocked_s"] for row in rows if row["saver"] == DCP}
    result: dict[str, Any] = summaries(of_saver, MEASURED)
    result["x_dcp"] = summary(row["blocked_s"] / dcp_s[row["round"]] for row in of_saver)
    return result | verdicts(of_saver) | phases(of_saver)


def _targets(scale: Scale, alone: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours of the rounds before there were peers; beside the best peer those with them."""
    where = f"{scale.leaves:,} leaves"
    megatron = alone[MEGATRON]["x_dcp"]
    return [
        target("blocked per save", f"{where}, layout dcp", "s", scale.target_s, alone[DCP]["blocked_s"]),
        best_peer_target(f"{where}, layout dcp", BEST_PEER_TARGET_RATIO, rows, DCP, PEERS),
        target(
            "blocked beside layout dcp", f"{where}, layout megatron", "x", MEGATRON_TARGET_RATIO, megatron
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write many_tensors.json."""
    options = Options.parse(__doc__.splitlines()[0], arguments)
    print(options.write("many_tensors", run(options)))


if __name__ == "__main__":
    main()
