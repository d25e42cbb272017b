"""The sections of the page, one for each document: how it was measured, and its figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .cells import bullets, size, spread, table, value

_GIB = 1 << 30
_HOW_STALL = """
**How.** {state}: {weights} weights of {rows} x {columns} in float32, both moments of AdamW and a step counter
each, {tensors} tensors in all. A training step is {compute_ms:.0f} ms of matmul on one thread, then a fused
AdamW step over every weight; {step_ms:.0f} ms when nothing is being saved. {rounds} rounds are of ours alone,
before the process makes any peer: these are what training loses to us, and all targets but the best peer's
are about them. Then the peers are made, and {peer_rounds} rounds are of everybody: these are how we compare,
and the best peer's target is about them. One of each kind warms up. The two are apart in time: what differs
between them may be the machine's hour as well as the peers. In each round every saver in turn, in an order
that chance has made. A turn is a few quiet steps, a save, steps until that save is durable, quiet steps
again. By then every tensor has changed; the files are read back with what the saver's users read them with,
compared bit for bit with the state at the call, and deleted. Beside each save, before it in one round and
after it in the next, as many bytes are written raw: {raw_threads} threads, O_DIRECT out of huge pages, one
new preallocated file, fsync; training is idle then. Once in a round of ours alone as many are written raw
while training goes on, by threads of the same process: what it costs the steps that something is written at
all. A peer that does not answer in time is out.

- *Blocked*: the time inside the call, and what optimizer hooks made the step wait afterwards, both timed from
  outside, less what those hooks take in a quiet step ({idle_us:.0f} us in rounds of ours alone): all our
  checkpointers stay in the run, and their hooks in everybody's steps. The nested dictionary that a peer is
  given is made inside its call, as its users make it.
- *Slowdown*: how much longer a step takes while the save is in flight, from the return of the call until
  durable: what the steps that began in that time took beyond quiet ones, by the rest of that time. Waits in
  hooks are in *blocked*, not here. Nothing is said where that time is less than half a quiet step.
- *x ours*: blocked, beside the first line's save of the same round.
- *Stolen*: the share of the processors' time that a virtual machine was not given, though there was something
  to do: of a whole turn, not of the call. No figure is corrected by it.
- *Lost*: all of it: from the call to the end of the last of those steps, less as many quiet steps.
- *Durable*: from the call until files and their fsync are done; ours as its report says. Where the peer knows
  no fsync, a thread of the benchmark adds it.
"""
_HOW_PHASES = """
In the rounds of ours alone: what blocked, as measured and as `SaveReport` has it; then the time from the call
to each phase. A call that takes longer than its thread was on a processor has waited (the two are told by
different clocks, which need not agree to a per cent); switches count how often it left the processor, and
page faults how often memory was not there.
"""
_HOW_MANY_TENSORS = """
**How.** Saves under training as above, of states that have about the same bytes in ever more leaves: four for
each weight. Here too some rounds are of ours alone, of all these states before the process makes any peer,
and all targets but the best peer's are about these; that is about rounds of everybody, of all states again.
The more leaves, the longer peers take, and whoever reads back what was saved: so there are {rounds} rounds of
ours alone, and {peer_rounds} of everybody, either after one of ours to warm up; peers come with one idle save
behind them, and get no other once a save took more than {slow_s:.0f} s. The host memory is {arena}, so that
nothing waits for the disk. *Blocked* is as above, without what hooks take in a quiet step: {idle_us} us in
rounds of ours alone; *x layout dcp* compares saves of one round; *stolen* is as above. Contents are compared
after training changed every tensor.
"""
_HOW_WRITE = """
**How.** Training idle; {rounds} rounds after one to warm up, two pairs in each, one in either order, {pairs}
pairs in all: a whole save of {state} until durable, with everything that makes it crash-safe; a raw write of
as many bytes by {raw_threads} threads with O_DIRECT in blocks of {block} out of huge pages into one new
preallocated file, and fsync. Before each, all is synced. Training changes every tensor before each save, and
the files are compared with it. Saves are timed from outside, from the call until waiting for them ends. Once
a round: one buffered writer, and fsync.

The raw write of a pair, which the target is about, sends the same block over and over. Here host memory is
{arena}, so that every byte of a save has a place of its own in it; with less, its chunks are used again.
Disks may take that more slowly: on the other side of each save, as many bytes are written raw out of as much
memory.
"""
_HOW_LOAD = """
**How.** Training idle; {rounds} rounds after one to warm up, two pairs in each, one in either order, {pairs}
pairs in all: load() of {state} in {files} files into the live tensors, every byte verified; a raw read of
files of the same sizes by {raw_threads} threads with O_DIRECT in blocks of {block} into huge pages. Before
each, all is synced and the page cache has nothing of the files. Training changes every tensor before each
load, and what is there after it is compared with what was saved. Once a round, as cold: stock dcp.load into
tensors that were made before.

The raw read of a pair, which the target is about, fills the same few blocks over and over. So does load(): it
fills a block for each of its threads, checks it, and copies it to its place. The other way is to read every
byte where it belongs, into as much memory, before it is checked. On the other side of each load, that is done
raw.
"""
_HOW_CPU = """
**How.** Training idle; each saves {state}. {rounds} rounds are of ours alone, before the process makes any
peer, and the target is about these; then {peer_rounds} are of everybody, in an order that chance has made.
One of each kind warms up. What all threads of the process spend on processors, user and system, from the call
until durable, is the save's, and what processes beside it spend that some peers write with. Our checksums are
in it; the peers make none. What the kernel writes back on threads of its own, for whoever writes through the
page cache, is in nobody's account: it flatters the peers. Once a round, as many bytes are written raw by
{raw_threads} threads: what the disk alone costs. And the state is copied by torch, on one thread, to memory
that is there already: what a copy alone costs.
"""
_HOW_EVERY_STEP = """
**How.** In each of {rounds} rounds, after one to warm up: {steps} quiet steps; {steps} steps with a save of
{state} after each, until waiting for the last save ends; {steps} quiet steps again; raw writes of as many
bytes by {raw_threads} threads, one file for each save. The last two saves and raw files are kept and older
ones deleted meanwhile, in that time: deletions take the disk's time too, most of all where the filesystem is
mounted with `discard`. The last save is compared with the state that it left, and a step from the last but
one must lead to the same state.

- *Time*: that of the steps with saves, until the last is durable and what it makes superfluous is deleted.
- *x best*: beside what could be reached: all quiet steps and then one raw write, or one quiet step and then
  all raw writes and deletions, whichever is longer. The target allows a tenth more.
- *x beside*: beside the same steps and as many raw writes and deletions at the same time, by threads of the
  same process, the first write after the first step: nothing is copied or waited for there, but steps and
  disk slow each other down.
- *Lost*: from the first step until the last save() returned, less the quiet steps.
- *Unreported*: what of it no report had in *blocked* by then, as a share of that time: steps that run slower
  while something is saved, for one.
- *Blocked* and *starved*: of one save, as `SaveReport` has them.
"""
_HOW_FIRST_SAVE = """
**How.** In {rounds} processes of their own for each line: training makes {state} of state, a checkpointer
with host memory for all of it is made, and {saves} saves under training follow. Its memory is made present in
the background: the first save finds it so where training went on until the process had grown by it. Where the
first save is at once, it comes as soon as the constructor has returned. *Memory present after*: that time,
from the call of the constructor. *x later*: seconds until the first save is durable, as its report says, by
the median of the later ones of that process.
"""
_HOW_MEMORY = """
**How.** Processes of their own for each line: training makes a state; the kernel's high-water mark of
resident memory is reset; a checkpointer is made and saves a few times while training goes on; the mark is
read. *Extra* is the mark less what was resident before. A huge state is remembered by checksums and read back
weight by weight, so that there is never a second one in memory.
"""


def _stall(document: dict[str, Any]) -> list[str]:
    config, summaries = document["config"], document["summary"]
    weights, rows, columns = config["weights"]
    alone, raw = document["alone"], document["beside_raw"]
    return [
        _HOW_STALL.format(
            state=size(config["nbytes"]),
            weights=weights,
            rows=rows,
            columns=columns,
            tensors=config["tensors"],
            compute_ms=config["compute_s"] * 1e3,
            step_ms=config["step_s"] * 1e3,
            idle_us=_idle_us(alone),
            rounds=config["rounds"],
            peer_rounds=config["peer_rounds"],
            raw_threads=config["raw_threads"],
        ),
        "### Ours alone\n",
        table(
            _STALL_HEAD,
            (
                *_stall_lines(alone),
                (
                    "raw writes, nothing saved",
                    "",
                    "",
                    spread(raw["slowdown"], "%") if "slowdown" in raw else "",
                    spread(raw["lost_s"], "s"),
                    spread(raw["raw_s"], "s"),
                    "",
                    spread(raw["stolen"], "%"),
                    "",
                ),
            ),
        ),
        "### Beside the peers\n",
        table(_STALL_HEAD, _stall_lines(summaries)),
        bullets(f"*{name}*: {note}." for name, note in config["notes"].items()),
        _cannot_run(document),
        "### Where the time of a save goes\n",
        _HOW_PHASES,
        _phases(alone),
    ]


_STALL_HEAD = (
    "Saver", "Blocked", "x ours", "Slowdown", "Lost", "Durable", "x paired raw", "Stolen", "Contents right"
)  # fmt: skip


def _stall_lines(summaries: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            spread(one["blocked_s"], "s"),
            spread(one["x_ours"], "x"),
            spread(one["slowdown"], "%") if "slowdown" in one else "",
            spread(one["lost_s"], "s"),
            spread(one["durable_s"], "s"),
            spread(one["ratio"], "x"),
            spread(one["stolen"], "%"),
            _contents(one),
        )
        for name, one in summaries.items()
    ]


def _phases(summaries: dict[str, dict[str, Any]]) -> str:
    lines: list[tuple[str, ...]] = [
        (what, *(spread(one[key], "s") for one in summaries.values()))
        for what, key in (
            ("inside save()", "call_s"),
            ("inside save(), on a processor", "call_cpu_s"),
            ("in the step's fence", "fence_s"),
            ("blocked, reported", "reported_blocked_s"),
        )
    ]
    lines += [
        (what, *(spread(one[key], "") for one in summaries.values()))
        for what, key in (
            ("switches inside save()", "call_switches"),
            ("page faults inside save()", "call_faults"),
        )
    ]
    return table(("", *summaries), (*lines, *_until(summaries)))


def _until(summaries: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """When each phase was reached, in their order."""
    names = dict.fromkeys(name for one in summaries.values() for name in one["phases"])

    def reached_s(name: str) -> float:
        return next(
            float(one["phases"][name]["median"]) for one in summaries.values() if name in one["phases"]
        )

    def cell(one: dict[str, Any], name: str) -> str:
        return spread(one["phases"][name], "s") if name in one["phases"] else ""

    return [
        (f"until {name}", *(cell(one, name) for one in summaries.values()))
        for name in sorted(names, key=reached_s)
    ]


def _write(document: dict[str, Any]) -> list[str]:
    config, summaries = document["config"], document["summary"]
    names = {
        "raw_s": f"raw, {config['raw_threads']} threads, O_DIRECT",
        "apart_s": "the same, out of as much memory",
        "ours_s": "asyncckpt, whole save",
        "buffered_s": "one buffered writer",
    }
    return [
        _HOW_WRITE.format(
            rounds=config["rounds"],
            pairs=summaries["ratio"]["count"],
            state=size(config["nbytes"]),
            arena=size(config["arena_bytes"]),
            raw_threads=config["raw_threads"],
            block=size(config["block_bytes"]),
        ),
        _times(names, document),
        bullets(
            (
                f"Beside the raw write out of as much memory: {spread(summaries['x_apart'], 'x')}.",
                f"Contents right: {summaries['contents_right']} of {len(document['rows'])}.",
                f"O_DIRECT: {'all writes' if summaries['direct'] else 'refused here, all was buffered'}.",
            )
        ),
    ]


def _many_tensors(document: dict[str, Any]) -> list[str]:
    config = document["config"]
    return [
        _HOW_MANY_TENSORS.format(
            rounds=", ".join(str(scale["rounds"]) for scale in document["sizes"]),
            peer_rounds=", ".join(str(scale["peer_rounds"]) for scale in document["sizes"]),
            slow_s=config["slow_s"],
            idle_us=", ".join(f"{_idle_us(scale['alone']):.0f}" for scale in document["sizes"]),
            arena=size(config["arena_bytes"]),
        ),
        "### Ours alone\n",
        _many_tensors_table(document, "alone"),
        "### Beside the peers\n",
        _many_tensors_table(document, "summary"),
        _cannot_run(document),
        "### Where the time of a save goes\n",
        "In the rounds of ours alone, as in stall: what blocked, and the time from the call to each phase.\n",
        *(f"{scale['leaves']:,} leaves:\n\n{_phases(scale['alone'])}" for scale in document["sizes"]),
    ]


def _many_tensors_table(document: dict[str, Any], which: str) -> str:
    return table(
        ("Leaves", "State", "Saver", "Blocked", "x layout dcp", "Durable", "Stolen", "Contents right"),
        (
            (
                f"{scale['leaves']:,}",
                size(scale["nbytes"]),
                name,
                spread(one["blocked_s"], "s"),
                spread(one["x_dcp"], "x"),
                spread(one["durable_s"], "s"),
                spread(one["stolen"], "%"),
                _contents(one),
            )
            for scale in document["sizes"]
            for name, one in scale[which].items()
        ),
    )


def _idle_us(alone: dict[str, dict[str, Any]]) -> float:
    """What hooks take in a quiet step; those of all ours are called in it."""
    return float(alone["asyncckpt"]["idle_fence_s"]["median"]) * 1e6


def _cannot_run(document: dict[str, Any]) -> str:
    return bullets(f"*{name}* cannot run here: {why}" for name, why in document["cannot_run"].items())


def _load(document: dict[str, Any]) -> list[str]:
    config, summaries = document["config"], document["summary"]
    names = {
        "raw_s": f"raw, {config['raw_threads']} threads, O_DIRECT",
        "apart_s": "the same, every byte where it belongs",
        "ours_s": "asyncckpt, load()",
        "stock_s": "dcp.load",
    }
    return [
        _HOW_LOAD.format(
            rounds=config["rounds"],
            pairs=summaries["ratio"]["count"],
            state=size(config["nbytes"]),
            files=config["files"],
            raw_threads=config["raw_threads"],
            block=size(config["block_bytes"]),
        ),
        _times(names, document),
        bullets(
            (
                f"Beside the raw read of every byte where it belongs: {spread(summaries['x_apart'], 'x')}.",
                f"Contents right: {summaries['contents_right']} of {len(document['rows'])}.",
                f"Of dcp.load: {summaries['stock_contents_right']} of {summaries['stock_s']['count']}.",
                f"O_DIRECT: {'all raw reads' if summaries['direct'] else 'refused here, all was buffered'}.",
            )
        ),
        "### Where the time of a load goes\n",
        "From the call to each phase, as `Resume` has it.\n",
        table(("", "asyncckpt, load()"), _until({"asyncckpt": summaries})),
    ]


def _cpu(document: dict[str, Any]) -> list[str]:
    config = document["config"]
    return [
        _HOW_CPU.format(
            rounds=config["rounds"],
            peer_rounds=config["peer_rounds"],
            state=size(config["nbytes"]),
            raw_threads=config["raw_threads"],
        ),
        "### Beside the peers\n",
        table(
            ("Saver", "Processor time per GiB", "User", "System", "Durable", "Contents right"),
            (
                ("asyncckpt, alone", *_processor_times(document["alone"]), _contents(document["alone"])),
                *(
                    (name, *_processor_times(one), _contents(one))
                    for name, one in document["summary"].items()
                ),
                ("raw writes, nothing saved", *_processor_times(document["raw"]), ""),
                ("a copy, nothing saved", *_processor_times(document["copy"]), ""),
            ),
        ),
        _cannot_run(document),
    ]


def _processor_times(one: dict[str, Any]) -> tuple[str, ...]:
    keys = ("cpu_s_per_gib", "user_s_per_gib", "system_s_per_gib", "durable_s")
    return tuple(spread(one[key], "s") if key in one else "" for key in keys)


def _every_step(document: dict[str, Any]) -> list[str]:
    config = document["config"]
    return [
        _HOW_EVERY_STEP.format(
            rounds=config["rounds"],
            steps=config["steps"],
            state=size(config["nbytes"]),
            raw_threads=config["raw_threads"],
        ),
        table(
            (
                "Saver",
                "Time",
                "x best",
                "x beside",
                "x quiet steps",
                "x raw writes",
                "Lost",
                "Unreported",
                "Blocked",
                "Starved",
                "Rounds right",
            ),
            (
                (
                    name,
                    spread(one["seconds"], "s"),
                    spread(one["x_best"], "x"),
                    spread(one["x_beside"], "x"),
                    spread(one["x_quiet"], "x"),
                    spread(one["x_raw"], "x"),
                    spread(one["lost_s"], "s"),
                    spread(one["unreported"], "%"),
                    spread(one["blocked_s"], "s"),
                    spread(one["starved_s"], "s"),
                    _contents(one, "seconds"),
                )
                for name, one in document["summary"].items()
            ),
        ),
        bullets(f"*{name}*: {note}." for name, note in config["notes"].items()),
    ]


def _first_save(document: dict[str, Any]) -> list[str]:
    config = document["config"]
    return [
        _HOW_FIRST_SAVE.format(rounds=config["rounds"], state=size(config["nbytes"]), saves=config["saves"]),
        table(
            (
                "First save",
                "Memory present after",
                "Durable, first",
                "Durable, later",
                "x later",
                "Blocked, first",
                "Blocked, later",
                "Contents right",
            ),
            (
                (
                    when,
                    spread(one["present_s"], "s") if "present_s" in one else "",
                    spread(one["first_durable_s"], "s"),
                    spread(one["later_durable_s"], "s"),
                    spread(one["x_later"], "x"),
                    spread(one["first_blocked_s"], "s"),
                    spread(one["later_blocked_s"], "s"),
                    _contents(one, "x_later"),
                )
                for when, one in document["summary"].items()
            ),
        ),
    ]


def _memory(document: dict[str, Any]) -> list[str]:
    return [
        _HOW_MEMORY,
        table(
            ("With", "State", "Host memory", "Extra at the peak", "Contents right"),
            (
                (
                    where,
                    size(one["nbytes"]["median"]),
                    value(one["host_memory"]["median"], "bytes"),
                    spread(one["extra_bytes"], "bytes"),
                    _contents(one, "extra_bytes"),
                )
                for where, one in document["summary"].items()
            ),
        ),
        _cannot_run(document),
    ]


def _times(names: dict[str, str], document: dict[str, Any]) -> str:
    """Times of the same bytes, and the speeds that they come to."""
    nbytes, summaries = document["config"]["nbytes"], document["summary"]
    return table(
        ("", "Time", "Speed"),
        (
            (what, spread(summaries[key], "s"), f"{nbytes / summaries[key]['median'] / _GIB:.2f} GiB/s")
            for key, what in names.items()
        ),
    )


def _contents(one: dict[str, Any], key: str = "durable_s") -> str:
    text = f"{one['contents_right']} of {one[key]['count']}"
    return f"{text}: {'; '.join(one['contents_wrong'])}" if one["contents_wrong"] else text


@dataclass(frozen=True)
class Section:
    """Of the page: a document's. `body` writes it."""

    title: str
    subject: str
    body: Callable[[dict[str, Any]], list[str]]


SECTIONS = {
    "stall": Section("Stall", "what training loses to a save", _stall),
    "many_tensors": Section("Many tensors", "what a leaf costs", _many_tensors),
    "write": Section("Write", "what the disk takes", _write),
    "load": Section("Load", "what the disk gives", _load),
    "cpu": Section("Processor time", "what a save takes from others", _cpu),
    "every_step": Section("Every step", "training that never stops saving", _every_step),
    "first_save": Section("First save", "what it costs that nothing is warm", _first_save),
    "memory": Section("Memory", "what a save takes beside the state", _memory),
}
