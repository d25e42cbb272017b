"""What a result was measured on; nothing that names a host, a user or a path."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
_ELSEWHERE = "give --dir, or BENCH_ARGS=--bench-dir=... to `make bench`, on a disk with room"


def describe(directory: Path) -> dict[str, object]:
    """The machine, the filesystem of `directory`, and the versions of what runs."""
    commit, clean = _commit()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "filesystem": filesystem_of(directory),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "commit_is_clean": clean,
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_average_before": os.getloadavg()[0],
    }


def filesystem_of(path: Path) -> str:
    """The type of the filesystem that holds `path`, as in proc(5), mountinfo."""
    target = path.resolve()
    found = (0, "unknown")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        mounted_on = Path(fields.split()[4].encode().decode("unicode_escape"))  # blanks are written \040
        if target.is_relative_to(mounted_on):
            found = max(found, (len(mounted_on.parts), rest.split()[0]), key=lambda one: one[0])
    return found[1]


def refuse_memory(directory: Path) -> None:
    """Exit if `directory` is no disk: nothing measured there would mean anything."""
    kind = filesystem_of(directory)
    if kind in _IN_MEMORY:
        raise SystemExit(f"{directory} is on {kind}, which is memory: {_ELSEWHERE}")


def require_room(directory: Path, needed_bytes: int) -> None:
    """Exit now rather than with a full disk in the middle."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise SystemExit(
            f"{directory} has {free >> 20} MiB free, {needed_bytes >> 20} MiB are needed: {_ELSEWHERE}"
        )


class Stolen:
    """Processor time that a hypervisor keeps from this machine from now on, though there is something to do.
    By proc(5), stat, which counts hundredths of a second."""

    def __init__(self) -> None:
        self._before_s, self._began_s = self._so_far_s(), time.perf_counter()

    def share(self) -> float:
        """Of the time of all processors since then, a tick more or less."""
        elapsed_s = time.perf_counter() - self._began_s
        return (self._so_far_s() - self._before_s) / (elapsed_s * (os.cpu_count() or 1))

    @staticmethod
    def _so_far_s() -> float:
        # user, nice, system, idle, iowait, irq, softirq, steal
        ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        return int(ticks[7]) / os.sysconf("SC_CLK_TCK")


def available_bytes() -> int:
    """What new processes can have without swapping, by proc(5), meminfo."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def process_bytes(name: str) -> int:
    """What this process has of it by proc(5), status: VmRSS, VmHWM."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


def _commit() -> tuple[str | None, bool | None]:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # What benchmarks have just written, and notes on the page, are no change of what is measured.
    pages = ("benchmarks.md", "benchmarks", "gpu.md", "scale.md")
    beside = ("benchmarks/results", "benchmarks/limits.toml", *(f"docs/{page}" for page in pages))
    measured = (".", *(f":!{path}" for path in beside))
    changes = git("status", "--porcelain", "--untracked-files=no", "--", *measured)
    return git("rev-parse", "--short=12", "HEAD"), None if changes is None else not changes
