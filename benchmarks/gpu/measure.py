"""One saver at one size, in a process of its own: rounds of quiet steps, a save, steps until it is durable.

    call       inside save()
    fence      what guards and hooks made the host wait before the next update of the state
    blocked    both: what the host loses
    slowdown   steps that began before the save was durable, against the quiet steps just before, on the
               GPU's clock: waits on the GPU and memory or copy engines that are shared show here
    lost       from the call to the end of the last of those steps, less as many quiet steps
    durable    from the call until files and their fsync are done

Round 0 warms up: memory is made and pinned in it.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from typing import Any

from asyncckpt import memory

from ..raw_disk import RawDisk, settle
from .journal import Budget, Emit, Row
from .pages import HUGE, pages
from .peers import OURS, Saver, make
from .probe_link import link_gb_per_s
from .training import SHAPES, TINY_SHAPES, Training, sample

_QUIET_STEPS = 8
_ROUND_MARGIN = 1.3  # a round may take so many times as long as the one before
_LINK_CHUNK_NBYTES = 64 << 20
_SAMPLE_NBYTES = 1 << 30
_CHECK_ALL_NBYTES = 3 << 30
_TRACE_NBYTES_MAX = 8 << 20
_TRACE_KEYS = ("schemaVersion", "deviceProperties", "displayTimeUnit", "baseTimeNanoseconds", "traceEvents")


def ceilings(gpu: Any, emit: Emit, directory: str, nbytes: int, rounds: int) -> None:
    """What the link and the disk take, with nothing else going on."""
    chunk = min(_LINK_CHUNK_NBYTES, nbytes)
    source = gpu.bytes(4 * chunk)
    source.fill_(1)
    gpu.synchronize()
    with pages(HUGE, 4 * chunk) as target:
        target.touch()
        with gpu.registered(target.address, 4 * chunk):
            for number in range(rounds):
                rate, _ = link_gb_per_s(gpu, target.address, source.data_ptr(), 4 * chunk, chunk)
                emit({"what": "link", "round": number, "gb_per_s": rate})
    disk = RawDisk(Path(directory))
    for number in range(rounds + 1):
        settle()
        raw = disk.direct(nbytes)
        if number:  # the first warms up
            rate = raw.nbytes / raw.seconds / 1e9
            emit({"what": "disk", "round": number, "gb_per_s": rate, "direct": raw.direct})


def saves(
    gpu: Any,
    emit: Emit,
    *,
    size: str,
    tiny: bool,
    saver: str,
    directory: str,
    rounds: int,
    seconds: float,
    link_gb_per_s: float,
) -> None:
    """One row per round. Ends early rather than late: no round begins that `seconds` would not hold."""
    warnings.filterwarnings("ignore", module="torch")  # of its own insides, and of being a single process
    budget = Budget(seconds)
    training = Training(gpu, (TINY_SHAPES if tiny else SHAPES)[size])
    nbytes = training.nbytes
    facts = {
        "nbytes": nbytes,
        "tensors": training.shape.tensors,
        "parameters": training.shape.parameters,
        "micro_batches": training.calibrate(nbytes / link_gb_per_s / 1e9),
    }
    disk = RawDisk(Path(directory))
    with contextlib.ExitStack() as stack:
        stack.callback(training.close)
        subject = make(saver, training, Path(directory) / "saver", memory.available_bytes() // 2)
        stack.callback(subject.close)
        training.guard = subject.updating
        sizes = {name: tensor.nbytes for name, tensor in training.tensors()}
        names = list(sizes) if nbytes <= _CHECK_ALL_NBYTES else sample(sizes, _SAMPLE_NBYTES)
        for number in range(rounds + 1):
            began_s = budget.spent_s()
            row = one_save(training, subject, number + 1, names)
            if saver == OURS and number:
                settle()
                row["raw_s"] = disk.direct(row["file_nbytes"]).seconds
            emit({"round": number, **facts, "note": subject.note, **row})
            if budget.left_s() < _ROUND_MARGIN * (budget.spent_s() - began_s):
                break


def one_save(training: Training, saver: Saver, step: int, names: Iterable[str]) -> Row:
    """One save under training, its contents checked. Leaves no files."""
    settle()
    quiet = [training.step() for _ in range(_QUIET_STEPS)]
    training.remember(names)
    flight = saver.save(step)
    flying = [training.step()]
    while not flight.durable.done():
        flying.append(training.step())
    ended_s = time.perf_counter()
    durable_s = flight.durable.result() - flight.began_s
    quiet_s = median(one.gpu_s for one in quiet)
    fence_s = sum(one.fence_s for one in flying)
    row: Row = {
        "call_s": flight.call_s,
        "fence_s": fence_s,
        "blocked_s": flight.call_s + fence_s,
        "durable_s": durable_s,
        "quiet_step_s": quiet_s,
        "quiet_spread": (max(one.gpu_s for one in quiet) - min(one.gpu_s for one in quiet)) / quiet_s,
        "quiet_host_s": median(one.host_s for one in quiet),
        "first_host_s": flying[0].host_s,
        "first_step_s": flying[0].gpu_s,
        "steps_in_flight": len(flying),
        "step_in_flight_s": mean(one.gpu_s for one in flying),
        "slowdown": mean(one.gpu_s for one in flying) / quiet_s - 1,
        "lost_s": ended_s - flight.began_s - len(flying) * quiet_s,
        "changed": training.changed(),
        "checked": len(training.remembered),
    }
    if flight.report is not None:
        report = flight.report()
        copy_s = report.phases["released"] - report.phases["submitted"]
        row |= {
            "reported_blocked_s": report.blocked_s,
            "phases": dict(report.phases),
            "starved_s": report.starved_s,
            "replanned": report.replanned,
            "direct": report.direct,
            "file_nbytes": report.nbytes,
            "copy_s": copy_s,
            "copy_gb_per_s": report.nbytes / copy_s / 1e9 if copy_s > 0 else None,
        }
    row["contents"] = training.judge(saver.read(step, training.remembered))
    saver.delete(step)
    return row


# ---- a trace of one save


def trace(
    gpu: Any, emit: Emit, *, size: str, tiny: bool, directory: str, out: str, link_gb_per_s: float
) -> None:
    """What GPU and host do around one save: a chrome trace, kept if it is small, and its copies."""
    from torch.profiler import ProfilerActivity, profile

    path = Path(out) / "gpu_trace.json.gz"
    training = Training(gpu, (TINY_SHAPES if tiny else SHAPES)[size])
    with contextlib.ExitStack() as stack:
        stack.callback(training.close)
        training.calibrate(training.nbytes / link_gb_per_s / 1e9)
        saver = make(OURS, training, Path(directory) / "saver", memory.available_bytes() // 2)
        stack.callback(saver.close)
        training.guard = saver.updating
        one_save(training, saver, 1, sample({name: one.nbytes for name, one in training.tensors()}, 1 << 20))
        settle()
        activities = [ProfilerActivity.CPU]
        if gpu.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiler:
            training.step()
            flight = saver.save(2)
            training.step()
            training.step()
            gpu.synchronize()
        flight.durable.result()
        phases = dict(flight.report().phases) if flight.report is not None else {}
        profiler.export_chrome_trace(str(path))
    row = copies_in_trace(path)
    if path.stat().st_size > _TRACE_NBYTES_MAX:
        row["left_out"] = f"the trace has {path.stat().st_size} bytes"
        path.unlink()
    emit({**row, "phases": phases})


def copies_in_trace(path: Path) -> Row:
    """From a chrome trace: the copies to the host, how long they took, and what lay between them.

    Takes out of the trace what says where it was made.
    """
    with gzip.open(path, "rt") as file:
        document = json.load(file)
    document = {key: one for key, one in document.items() if key in _TRACE_KEYS}
    with gzip.open(path, "wt") as file:
        json.dump(document, file)
    events = document["traceEvents"]
    copies = sorted(
        (float(one["ts"]), float(one["dur"]))
        for one in events
        if one.get("cat") == "gpu_memcpy" and "DtoH" in one.get("name", "")
    )
    row: Row = {"trace": path.name, "copies": len(copies)}
    if not copies:
        return row
    ended_us, longest_us, busy_us = copies[0][0], 0.0, 0.0
    for began_us, took_us in copies:
        longest_us = max(longest_us, began_us - ended_us)
        busy_us += max(0.0, began_us + took_us - max(began_us, ended_us))
        ended_us = max(ended_us, began_us + took_us)
    return {
        **row,
        "span_s": (ended_us - copies[0][0]) / 1e6,
        "busy_s": busy_us / 1e6,
        "longest_gap_s": longest_us / 1e6,
    }
