"""The kernel of `asyncckpt.kernels` without a GPU: its text compiled for the CPU, and a gatherer over the
driver double that launches it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from asyncckpt import kernels
from tests.cuda_double import BUILT
from tests.fake_cuda import FakeCuda

HARNESS = Path(__file__).with_suffix(".cpp")
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
LIBRARY = ["-shared", "-fPIC"]
PROGRAM = ["-DPROGRAM", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiled(source: str, flags: list[str], target: Path) -> Path:
    """The kernel's source behind the harness."""
    target.parent.mkdir(parents=True, exist_ok=True)
    kernel = target.with_name(target.name + ".cu")
    kernel.write_text(source)
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or "g++"]
    command = [*compiler, *FLAGS, *flags, f'-DKERNEL="{kernel}"', str(HARNESS), "-o", str(target)]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    assert answer.returncode == 0, f"the kernel does not compile:\n{answer.stderr}"
    return target


@cache
def _launch() -> Any:
    key = hashlib.sha256(kernels.SOURCE.encode() + HARNESS.read_bytes()).hexdigest()[:16]
    target = BUILT / f"gather-{key}.so"
    if not target.exists():
        compiled(kernels.SOURCE, LIBRARY, target.with_suffix(f".{os.getpid()}")).replace(target)
    function = ctypes.CDLL(str(target)).launch_gather
    function.restype = None
    function.argtypes = [*[ctypes.c_void_p] * 2, ctypes.c_ulonglong, ctypes.c_uint, ctypes.c_uint]
    return function


class DoubleGatherer:
    """In place of CuPy's, in a world of the driver double.

    Attributes:
        launches: (device, tensors) of each.
    """

    def __init__(self, world: FakeCuda) -> None:
        self.world = world
        self.launches: list[tuple[int, int]] = []

    def gather(self, device: int, table: kernels.Table, nbytes: int) -> torch.Tensor:
        """See `kernels.Gatherer`."""
        self.launches.append((device, len(table)))
        world = self.world
        target = world._new_tensor(torch.empty(nbytes, dtype=torch.uint8, device="meta"), device)
        rows = table.copy()
        for row in rows:
            row[0] = world.double.backdoor(int(row[0]))
        alias = world.peek(target)
        launch = _launch()

        def kernel() -> None:
            alias.fill_(0xA5)  # literals that nobody writes would show
            launch(rows.ctypes.data, alias.data_ptr(), len(rows), 48, 32)

        self.enqueue(device, kernel)
        return target

    def enqueue(self, device: int, kernel: Any) -> None:
        """On the stream that is current, as torch and CuPy would."""
        self.world.launch(device, kernel)
