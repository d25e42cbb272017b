"""Probes of the machine around the GPU: what it is, and what pinning its memory costs."""

from __future__ import annotations

import errno
import os
import platform
import resource
import shutil
import subprocess
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .. import machine
from .child import described
from .journal import Emit, Row
from .pages import HUGE, KINDS, SMALL, huge_nbytes, pages

_NVIDIA_SMI = (
    "driver_version,pcie.link.gen.current,pcie.link.width.current,pcie.link.gen.max,pcie.link.width.max"
)
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")
_LAUNCHES_PER_SYNC = 256
_BASELINE_S = 0.5


def runtime(gpu: Any, emit: Emit, directory: str) -> None:
    """What runs here, and what limits it. One row per fact."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    facts: Row = {
        **gpu.driver.facts(),
        **_nvidia_smi(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "memory limit of the cgroup": _cgroup_limit(),
        "locked memory, soft limit": _limit(soft),
        "locked memory, hard limit": _limit(hard),
        "transparent huge pages": _text(_SYSTEM / "enabled"),
        "the same for shared memory": _text(_SYSTEM / "shmem_enabled"),
        "reserved huge pages": _text("/proc/sys/vm/nr_hugepages"),
        "filesystem": machine.filesystem_of(Path(directory)),
        "room there": shutil.disk_usage(directory).free,
        "O_DIRECT, 4096 byte blocks": _direct(Path(directory), 4096),
        "O_DIRECT, 512 byte blocks": _direct(Path(directory), 512),
    }
    for what, value in facts.items():
        emit({"what": what, "value": value})


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError as problem:
        return errno.errorcode.get(problem.errno or 0, "unreadable")


def _cgroup_limit() -> int | str:
    limits = []
    for line in _text("/proc/self/cgroup").splitlines():
        _, _, path = line.partition(":")[2].partition(":")
        for root, name in (
            ("/sys/fs/cgroup", "memory.max"),
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ):
            folder = Path(root + path)
            found = [_text(one / name) for one in (folder, *folder.parents)]  # every ancestor limits too
            limits += [int(one) for one in found if one.isdigit()]
    return min(limits, default="none")


def _limit(value: int) -> int | str:
    return "none" if value == resource.RLIM_INFINITY else value


def _nvidia_smi() -> Row:
    names = _NVIDIA_SMI.split(",")
    try:
        command = ["nvidia-smi", f"--query-gpu={_NVIDIA_SMI}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as problem:
        return {"nvidia-smi": type(problem).__name__}
    values = (done.stdout.splitlines() or [""])[0].split(",")
    return {name: value.strip() for name, value in zip(names, values, strict=False)}


def _direct(directory: Path, nbytes: int) -> str:
    path = directory / "direct"
    with pages(SMALL, 4096) as page:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        except OSError as problem:
            return f"open: {errno.errorcode.get(problem.errno or 0)}"
        try:
            return f"{os.pwrite(fd, page.view[:nbytes], 0)} written"
        except OSError as problem:
            return f"write: {errno.errorcode.get(problem.errno or 0)}"
        finally:
            os.close(fd)
            path.unlink()


class Launches:
    """Launches tiny kernels from a thread, and keeps how long each launch took. A context manager."""

    def __init__(self, gpu: Any) -> None:
        self._gpu = gpu
        self._stop = threading.Event()
        self._running = threading.Event()
        self._took_s: list[float] = []
        self._thread = threading.Thread(target=self._launch, daemon=True)

    def _launch(self) -> None:
        self._gpu.use_on_this_thread()
        target = self._gpu.bytes(64)
        target.zero_()
        stream, done = self._gpu.stream(), self._gpu.event()
        with self._gpu.on(stream):
            while not self._stop.is_set():
                for _ in range(_LAUNCHES_PER_SYNC):
                    began_s = time.perf_counter()
                    target.add_(1)
                    self._took_s.append(time.perf_counter() - began_s)
                done.record(stream)
                done.synchronize()  # a full queue would make the next launch wait, whatever else goes on
                self._running.set()

    def __enter__(self) -> Launches:
        self._thread.start()
        self._running.wait(30)
        self._took_s.clear()  # the first load a kernel
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def facts(self) -> Row:
        """Once it is over."""
        took_s = self._took_s or [0.0]
        return {
            "launches": len(self._took_s),
            "launch_median_s": median(took_s),
            "launch_worst_s": max(took_s),
        }


def registration(gpu: Any, emit: Emit, nbytes: int, slab_nbytes: int) -> None:
    """Seconds to pin memory of each kind, whole and by slabs, while another thread launches kernels."""
    with Launches(gpu) as launches:
        time.sleep(_BASELINE_S)  # the duration is what is measured: nothing is waited for
    emit({"kind": "none, for comparison", "calls": 0, **launches.facts()})
    for kind in KINDS:
        for step in (nbytes, slab_nbytes):
            try:
                emit({"kind": kind, "calls": nbytes // step, **_register(gpu, kind, nbytes, step)})
            except (OSError, RuntimeError) as problem:
                emit({"kind": kind, "calls": nbytes // step, "error": described(problem)})


def _register(gpu: Any, kind: str, nbytes: int, step: int) -> Row:
    per_gib = (1 << 30) / nbytes
    with pages(kind, nbytes) as memory:
        huge_before = huge_nbytes()
        began_s = time.perf_counter()
        memory.touch()
        touched_s = time.perf_counter() - began_s
        huge = huge_nbytes() if kind in (SMALL, HUGE) else None
        done: list[int] = []
        try:
            with Launches(gpu) as launches:
                began_s = time.perf_counter()
                for start in range(0, nbytes, step):
                    gpu.driver.register(memory.address + start, step)
                    done.append(memory.address + start)
                registered_s = time.perf_counter() - began_s
        finally:
            began_s = time.perf_counter()
            for address in done:
                gpu.driver.unregister(address)
            unregistered_s = time.perf_counter() - began_s
    return {
        "touch_s_per_gib": touched_s * per_gib,
        "register_s_per_gib": registered_s * per_gib,
        "unregister_s_per_gib": unregistered_s * per_gib,
        "huge_share": None if huge is None or huge_before is None else (huge - huge_before) / nbytes,
        **launches.facts(),
    }
