"""What processor time a save takes: what it must steal from training's loaders, or from training itself.

Training is idle, so that all that the process spends between the call and durable is the save's, and so is
what the processes spend that some peers write with; of these the kernel tells hundredths of a second. First
ours alone, then the peers are made, and all take turns. Our checksums are in it; the peers make none. What
the kernel writes back on threads of its own, for whoever writes through the page cache, is in nobody's
account: it flatters the peers. Beside the savers as many bytes are written raw, which is what the disk alone
costs: with Python between the calls there, without it in ours. And the state is copied to memory that is
there already, tensor by tensor, by torch on one thread: it tells what memory gives at the time.

    cpu_s_per_gib   seconds on processors, user and system, all threads and processes, for each GiB saved
    user_s_per_gib, system_s_per_gib    its two parts

    python -m benchmarks.cpu [--tiny] [--dir DISK] [--out DIRECTORY] [--rounds COUNT]
"""

from __future__ import annotations

import os
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

from . import machine
from .lineup import Lineup
from .peers import PEERS
from .raw_disk import RAW_THREADS, RawDisk, settle
from .results import Options, summaries, summary, target, verdicts
from .savers import Asyncckpt, Saver
from .workload import FULL, TINY, Workload

TARGET_S_PER_GIB = 0.25
OURS = "asyncckpt"
SAVERS = (OURS, *PEERS)
_ROUNDS, _PEER_ROUNDS = 12, 3  # more of ours alone, since a limit is set to them
_MEASURED = ("cpu_s_per_gib", "user_s_per_gib", "system_s_per_gib", "durable_s")
_GIB = 1 << 30


def run(options: Options) -> dict[str, Any]:
    """Measure and return the document."""
    warnings.filterwarnings("ignore", module="torch")  # as in stall.py
    workload = Workload(TINY if options.tiny else FULL)
    try:
        with options.scratch(4 * workload.nbytes) as scratch:
            return _run(options, workload, scratch)
    finally:
        workload.close()


def _run(options: Options, workload: Workload, scratch: Path) -> dict[str, Any]:
    facts = machine.describe(scratch)
    alone_rounds, peer_rounds = options.rounds_or(_ROUNDS), options.rounds_or(_PEER_ROUNDS)
    rounds = alone_rounds + 1 + peer_rounds
    ours = Asyncckpt(OURS, workload, scratch / "ours", workload.nbytes + (64 << 20))
    lineup = Lineup([ours], workload, scratch)
    disk = RawDisk(scratch)
    rows: list[dict[str, Any]] = []
    raw_rows: list[dict[str, Any]] = []
    copy_rows: list[dict[str, Any]] = []
    try:
        for number in range(rounds + 1):
            warms_up = number in (0, alone_rounds + 1)  # ours; everybody
            if number == alone_rounds + 1:
                lineup.invite()
            for saver in lineup.turns(number):
                found = lineup.measure(saver, partial(_measure, workload, saver, number + 1))
                if found is None:
                    continue
                row = {"round": number, "alone": number <= alone_rounds, **found}
                print(
                    f"cpu {number}/{rounds} {saver.name}: {row['cpu_s_per_gib']:.3f} s per GiB, "
                    f"contents {row['contents']}",
                    file=sys.stderr,
                )
                if not warms_up:
                    rows.append(row)
            raw = {"round": number, **_measure_raw(disk, workload.nbytes)}
            copy = {"round": number, **_measure_copy(workload)}
            if not warms_up:
                raw_rows.append(raw)
                copy_rows.append(copy)
    finally:
        lineup.close()
    rows = lineup.kept(rows)
    alone = _summarise([row for row in rows if row["alone"]])
    beside = [row for row in rows if not row["alone"]]
    by_saver = {
        saver.name: _summarise([row for row in beside if row["saver"] == saver.name])
        for saver in lineup.savers
    }
    measured = alone["cpu_s_per_gib"]
    return {
        "benchmark": "cpu",
        "tiny": options.tiny,
        "machine": facts,
        "config": {
            "nbytes": workload.nbytes,
            "raw_threads": RAW_THREADS,
            "rounds": alone_rounds,
            "peer_rounds": peer_rounds,
        },
        "targets": [target("processor time per GiB", "checksums included", "s", TARGET_S_PER_GIB, measured)],
        "cannot_run": lineup.cannot_run,
        "alone": alone,
        "summary": by_saver,
        "raw": {key: summary(row[key] for row in raw_rows) for key in _MEASURED},
        "copy": {key: summary(row[key] for row in copy_rows) for key in _MEASURED if key != "durable_s"},
        "rows": rows,
        "raw_rows": raw_rows,
        "copy_rows": copy_rows,
    }


def _measure(workload: Workload, saver: Saver, step: int) -> dict[str, Any]:
    """One save, nothing else running. Leaves no files."""
    workload.step()
    workload.remember()
    settle()
    workload.all_threads()
    began_s, before = time.perf_counter(), _cpu()
    pending = saver.save(step)
    pending.wait()
    spent = _per_gib(_cpu() - before, workload.nbytes)
    workload.one_thread()
    row = {
        "saver": saver.name,
        **spent,
        "durable_s": pending.durable_at_s - began_s,
        "contents": workload.judge(saver.load(step)),
    }
    saver.delete(step)
    return row


def _measure_raw(disk: RawDisk, nbytes: int) -> dict[str, Any]:
    settle()
    before = _cpu()
    write = disk.direct(nbytes)
    return {**_per_gib(_cpu() - before, nbytes), "durable_s": write.seconds}


def _measure_copy(workload: Workload) -> dict[str, Any]:
    settle()
    workload.step()
    before = _cpu()
    workload.remember()
    return _per_gib(_cpu() - before, workload.nbytes)


@dataclass(frozen=True)
class _Cpu:
    """Seconds on processors."""

    user_s: float
    system_s: float

    def __sub__(self, earlier: _Cpu) -> _Cpu:
        return _Cpu(self.user_s - earlier.user_s, self.system_s - earlier.system_s)


def _cpu() -> _Cpu:
    """What this process and those that it has started have spent so far; none of them ends in between."""
    user_ticks = system_ticks = 0
    for process in active_children():
        # proc(5): fields 14 and 15; the second, a name in parentheses, may hold blanks
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        user_ticks += int(fields[11])
        system_ticks += int(fields[12])
    own, tick_s = resource.getrusage(resource.RUSAGE_SELF), 1 / os.sysconf("SC_CLK_TCK")
    return _Cpu(own.ru_utime + user_ticks * tick_s, own.ru_stime + system_ticks * tick_s)


def _per_gib(spent: _Cpu, nbytes: int) -> dict[str, float]:
    gib = nbytes / _GIB
    user, system = spent.user_s / gib, spent.system_s / gib
    return {"cpu_s_per_gib": user + system, "user_s_per_gib": user, "system_s_per_gib": system}


def _summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return summaries(rows, _MEASURED) | verdicts(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write cpu.json."""
    options = Options.parse(__doc__.splitlines()[0], arguments)
    print(options.write("cpu", run(options)))


if __name__ == "__main__":
    main()
