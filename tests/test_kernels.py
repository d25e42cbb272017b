"""The kernel's text, run on a CPU under sanitizers and compiled by NVIDIA's compiler; its launch by CuPy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from asyncckpt import kernels
from tests.gather_on_cpu import PROGRAM, compiled


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(kernels.SOURCE, PROGRAM, tmp_path_factory.mktemp("kernel") / "gather")


@pytest.mark.parametrize("seed", range(4))
def test_the_kernel_copies_what_its_table_says(program: Path, seed: int) -> None:
    answer = subprocess.run([program, str(seed)], check=False, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("row += gridDim.x", "row += gridDim.x + 1", "wrong bytes"),
        ("units * sizeof(Unit) + threadIdx.x", "threadIdx.x * 2", "wrong bytes"),
        ("aligned % 16 == 0", "aligned % 8 == 0", "misaligned"),
        ("(Count)from | (Count)to", "(Count)from", "misaligned"),
        ("i < nbytes;", "i <= nbytes;", "heap-buffer-overflow"),
    ],
)
def test_the_harness_finds_what_is_wrong(tmp_path: Path, right: str, wrong: str, said: str) -> None:
    assert kernels.SOURCE.count(right) == 1
    program = compiled(kernels.SOURCE.replace(right, wrong), PROGRAM, tmp_path / "gather")
    answers = [
        subprocess.run([program, str(seed)], check=False, capture_output=True, text=True) for seed in range(4)
    ]
    assert any(answer.returncode != 0 and said in answer.stdout + answer.stderr for answer in answers)


def test_nvidias_compiler_takes_it(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    source = tmp_path / "gather.cu"
    source.write_text(kernels.SOURCE)
    command = [nvcc, "-ptx", "-Werror", "all-warnings", str(source), "-o", str(tmp_path / "gather.ptx")]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    ptx = (tmp_path / "gather.ptx").read_text()
    assert ".entry gather(" in ptx
    assert re.search(r"ld\S*\.v4", ptx)  # 16 bytes at a time, where they are aligned


# ---------------------------------------------------------------------------- CuPy


def test_without_cupy_there_is_no_gatherer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ModuleNotFoundError):
        import cupy  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: F401
    assert kernels.gatherer() is None


def test_a_broken_cupy_is_no_missing_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("import what_cupy_needs_and_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    with pytest.raises(ModuleNotFoundError, match="what_cupy_needs"):
        kernels.gatherer()


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 MiB"), True),
        (MemoryError(), True),  # CuPy's OutOfMemoryError is one
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"), True),
        (RuntimeError("CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure"), False),
    ],
)
def test_what_says_that_memory_is_full(error: Exception, is_full: bool) -> None:
    assert kernels.is_out_of_memory(error) is is_full


@pytest.fixture
def cupy() -> Any:
    """The real one, on a real device."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return pytest.importorskip("cupy", reason="CuPy is not installed")


def random_table(sources: list[torch.Tensor], rng: np.random.Generator) -> tuple[kernels.Table, int]:
    rows, end = [], int(rng.integers(100))
    for source in sources:
        end += int(rng.integers(100))
        rows.append((source.data_ptr(), end, source.nbytes))
        end += source.nbytes
    return np.array(rows, dtype=np.uint64), end


@pytest.mark.gpu
@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
@pytest.mark.parametrize("seed", range(3))
def test_on_a_device(cupy: Any, seed: int, side: bool) -> None:
    """Behind what the stream still has to do, before what comes next; the host waits for neither."""
    rng = np.random.default_rng(seed)
    gatherer = kernels.CupyGatherer(cupy)
    stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(stream):
        memory = torch.randint(0, 256, (6000, 2048), dtype=torch.uint8, device="cuda")
        begins, sizes = rng.integers(0, 17, 6000), rng.integers(0, 2000, 6000)
        sources = [
            row[begin : begin + nbytes] for row, begin, nbytes in zip(memory, begins, sizes, strict=True)
        ]
        expected = [source.clone() for source in sources]
        memory.zero_()
        table, nbytes = random_table(sources, rng)
        gatherer.gather(0, table, nbytes)  # compiled
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        for source, value in zip(sources, expected, strict=True):
            source.copy_(value)
        target = gatherer.gather(0, table, nbytes)
        assert not stream.query(), "the host waited for the device"
        memory.zero_()
        found = target.cpu().numpy()
    for (_, place, size), value in zip(table.tolist(), expected, strict=True):
        assert found[place : place + size].tobytes() == value.cpu().numpy().tobytes()


@pytest.mark.gpu
def test_on_the_last_device(cupy: Any) -> None:
    """Whichever device is current."""
    last = torch.cuda.device_count() - 1
    sources = [torch.full((n,), n % 251, dtype=torch.uint8, device=f"cuda:{last}") for n in range(1, 400)]
    table, nbytes = random_table(sources, np.random.default_rng(0))
    target = kernels.CupyGatherer(cupy).gather(last, table, nbytes)
    assert target.device.index == last
    assert torch.cuda.current_device() == 0
    found = target.cpu().numpy()
    for _, place, size in table.tolist():
        assert (found[place : place + size] == size % 251).all()


@pytest.mark.parametrize("version", [13, 14])
def test_the_launch_is_on_torchs_current_stream(monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """With stand-ins for both libraries: which device, which stream, which arguments, in which order."""
    said: list[Any] = []

    class Entered:
        def __init__(self, *what: Any) -> None:
            self.what = what

        def __enter__(self) -> None:
            said.append(("enter", *self.what))

        def __exit__(self, *_: object) -> None:
            said.append(("leave", *self.what))

    class Kernel:
        def __init__(self, source: str, name: str) -> None:
            assert (source, name) == (kernels.SOURCE, "gather")

        def __call__(self, grid: Any, block: Any, arguments: Any) -> None:
            said.append(("launch", grid, block, arguments))

    class Pinned:
        def to(self, place: torch.device, *, non_blocking: bool) -> torch.Tensor:
            assert non_blocking
            said.append(("upload", place.index))
            return uploaded

    uploaded, target = torch.zeros(3), torch.zeros(5, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "device", lambda place: Entered("torch", place.index))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch, "empty", lambda nbytes, dtype, device: target)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: Pinned())
    cupy = SimpleNamespace(
        RawKernel=Kernel,
        cuda=SimpleNamespace(
            Device=lambda ordinal: Entered("cupy", ordinal),
            Stream=SimpleNamespace(
                from_external=lambda stream: Entered("stream", stream.__cuda_stream__()[1])
            ),
        ),
    )
    if version < 14:
        cupy.cuda.Stream = SimpleNamespace()
        cupy.cuda.ExternalStream = lambda handle: Entered("stream", handle)
    table = np.zeros((5000, 3), dtype=np.uint64)
    assert kernels.CupyGatherer(cupy).gather(3, table, 5) is target
    launch = ((4096,), (128,), (uploaded.data_ptr(), target.data_ptr(), 5000))
    entered = [("enter", "torch", 3), ("enter", "cupy", 3)]
    assert said[:5] == [*entered, ("upload", 3), ("enter", "stream", 77), ("launch", *launch)]
    assert all(isinstance(argument, np.uint64) for argument in said[4][3])
