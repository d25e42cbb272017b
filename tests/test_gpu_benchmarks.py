"""The GPU benchmarks where there is no GPU: all that needs none runs for real, the rest on a stand-in.

The stand-in has host memory for device memory and does at once what a GPU does later. It proves that
probes and measurements run to their end and that the page can show what they say; it measures nothing,
and the command line never uses it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gzip
import importlib
import inspect
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks are not installed

from benchmarks.gpu import (  # noqa: E402
    child,
    driver,
    measure,
    peers,
    probe,
    probe_host,
    probe_link,
    probe_order,
    report,
)
from benchmarks.gpu.cells import NOT_YET, rate, seconds, size, spread  # noqa: E402
from benchmarks.gpu.child import Task  # noqa: E402
from benchmarks.gpu.journal import Budget, Journal, earlier_rows, scratch  # noqa: E402
from benchmarks.gpu.pages import HUGE, KINDS, SMALL, pages  # noqa: E402
from benchmarks.gpu.probe_tables import TABLES, probe_table  # noqa: E402
from benchmarks.gpu.render import page, render  # noqa: E402
from benchmarks.gpu.training import (  # noqa: E402
    SHAPES,
    TINY_SHAPES,
    Training,
    micro_batches,
    sample,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's insides, on threads of the peers

Row = dict[str, Any]
needs_absence = pytest.mark.skipif(driver.absent() is None, reason="there is a GPU here")


# ---- a stand-in for a GPU


class FakeStream:
    cuda_stream = 0

    def wait_event(self, event: FakeEvent) -> None:
        assert event.at_s is not None


class FakeEvent:
    at_s: float | None = None

    def record(self, stream: FakeStream) -> None:
        self.at_s = time.perf_counter()

    def synchronize(self) -> None:
        assert self.at_s is not None

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: FakeEvent) -> float:
        assert self.at_s is not None
        assert later.at_s is not None
        return (later.at_s - self.at_s) * 1e3


class FakeBatch:
    def __init__(self, targets: list[int], sources: list[int], nbytes: int) -> None:
        self._copies = list(zip(targets, sources, strict=True))
        self._nbytes = nbytes

    def enqueue(self, stream: int) -> None:
        for target, source in self._copies:
            ctypes.memmove(target, source, self._nbytes)


class FakeDriver:
    """`refuses`: entry points that answer CUDA_ERROR_INVALID_VALUE."""

    def __init__(self) -> None:
        self.refuses: set[str] = set()
        self.registered: dict[int, int] = {}
        self.modes: list[int] = []

    def facts(self) -> Row:
        return {"gpu": "stand-in", "gpu memory": 1 << 30, "CUDA of the driver": "13.0"}

    def call(self, name: str, *arguments: Any) -> None:
        if name in self.refuses:
            raise driver.CudaError(name, "CUDA_ERROR_INVALID_VALUE")

    def register(self, address: int, nbytes: int) -> None:
        self.call("cuMemHostRegister_v2")
        assert address not in self.registered
        self.registered[address] = nbytes

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def batch(self, targets: list[int], sources: list[int], nbytes: int) -> FakeBatch:
        self.call("cuMemcpyBatchAsync_v2")
        return FakeBatch(targets, sources, nbytes)

    def new_event(self) -> int:
        return 1

    def exchange_capture_mode(self, mode: int) -> int:
        self.modes.append(mode)
        return 0


class FakeGpu:
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.driver = FakeDriver()

    def bytes(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def stream(self) -> FakeStream:
        return FakeStream()

    current = stream

    def on(self, stream: FakeStream) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def event(self, blocking: bool = False) -> FakeEvent:
        return FakeEvent()

    def synchronize(self) -> None:
        pass

    empty_cache = use_on_this_thread = synchronize

    def has_expandable_segments(self) -> bool:
        return False

    def spin(self, seconds: float, stream: FakeStream) -> None:
        assert seconds < 1

    def copy(self, target: int, source: int, nbytes: int, stream: FakeStream) -> None:
        ctypes.memmove(target, source, nbytes)

    @contextlib.contextmanager
    def registered(self, address: int, nbytes: int) -> Iterator[None]:
        self.driver.register(address, nbytes)
        yield
        self.driver.unregister(address)

    @contextlib.contextmanager
    def host_alloc(self, nbytes: int) -> Iterator[int]:
        with pages(SMALL, nbytes) as memory:
            yield memory.address

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return work


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


# ---- the command line


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


@needs_absence
@pytest.mark.parametrize("what", ["probe", "report"])
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path, what: str) -> None:
    done = command(what, "--out", str(tmp_path / "out"), "--dir", str(tmp_path / "disk"))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("no GPU to measure here: ")
    assert not list(tmp_path.iterdir())


def test_a_tiny_report_never_goes_among_the_results() -> None:
    done = command("report", "--tiny", "--out", "benchmarks/results")
    assert done.returncode == 2
    assert "a tiny run never goes where" in done.stderr


def test_the_probes_need_no_product(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['asyncckpt'] = None\n"
        "from benchmarks.gpu import __main__, probe, probe_host, probe_link, probe_order\n"
        "print('imported')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "imported\n", done.stderr


# ---- the driver's bindings


def test_results_are_checked_and_named(tmp_path: Path) -> None:
    library = tmp_path / "libfake.so"
    source = tmp_path / "fake.c"
    source.write_text(
        "int cuInit(unsigned f) { return 0; }\n"
        "int cuDeviceGetCount(int* n) { *n = 1; return 0; }\n"
        "int cuMemHostRegister_v2(void* p, unsigned long n, unsigned f) { return n == 4096 ? 0 : 1; }\n"
        "int cuGetErrorName(int r, const char** name) {\n"
        '  *name = r == 1 ? "CUDA_ERROR_INVALID_VALUE" : 0; return r == 1 ? 0 : 1; }\n'
        "int cuThreadExchangeStreamCaptureMode(int* mode) { *mode = 7 - *mode; return 0; }\n"
        "int cuMemcpyBatchAsync(unsigned long* to, unsigned long* from, unsigned long* sizes,\n"
        "    unsigned long count, int* attributes, unsigned long* first, unsigned long how_many,\n"
        "    unsigned long* failed, void* stream) {\n"
        "  return count == 2 && to[1] == 3 && from[0] == 4 && from[1] == 1UL << 40 && sizes[1] == 64\n"
        "    && attributes[0] == 1 && attributes[5] == 0 && *first == 0 && how_many == 1\n"
        "    && failed && stream == (void*)9 ? 0 : 1; }\n"
    )
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no C compiler")
    fake = driver.Driver(str(library))
    fake.register(1 << 40, 4096)
    with pytest.raises(driver.CudaError, match=r"^cuMemHostRegister_v2: CUDA_ERROR_INVALID_VALUE$"):
        fake.register(1 << 40, 1)
    with pytest.raises(driver.CudaError, match=r"^cuMemHostUnregister: this driver does not have it$"):
        fake.unregister(1 << 40)
    assert fake.result_name(5) == "CUresult 5"
    assert fake.exchange_capture_mode(driver.CAPTURE_RELAXED) == 5
    assert not fake.has("cuMemcpyBatchAsync_v2")
    fake.batch([2, 3], [4, 1 << 40], 64).enqueue(9)


def test_no_driver_is_an_error_with_a_name() -> None:
    with pytest.raises(driver.CudaError, match=r"^loading the driver: "):
        driver.Driver("libno-such-driver.so.1")


@pytest.mark.parametrize("kind", KINDS)
def test_pages_are_there_aligned_and_writable(kind: str) -> None:
    try:
        with pages(kind, 8 << 20) as memory:
            assert memory.address % (2 << 20) == 0
            assert len(memory.view) == memory.nbytes == 8 << 20
            memory.touch(5)
            assert memory.view[0] == memory.view[-1] == 5
    except OSError:
        if not kind.startswith("hugetlb"):  # the only kind that an administrator has to allow
            raise


# ---- rows and time


def test_each_row_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.json"
    journal = Journal(path, {"benchmark": "x"}, kept=[{"n": 0}])
    for number in (1, 2):
        journal.add({"n": number})
        document = json.loads(path.read_text())
        assert [row["n"] for row in document["rows"]] == list(range(number + 1))
        assert document["complete"] is False
    journal.miss("three", "the time was up")
    journal.finish(seconds=1.5)
    document = json.loads(path.read_text())
    assert (document["complete"], document["seconds"]) == (True, 1.5)
    assert document["missing"] == {"three": "the time was up"}
    assert list(path.parent.iterdir()) == [path]


def test_an_earlier_document_may_be_absent_or_broken(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert earlier_rows(path) == []
    path.write_text("{")
    assert earlier_rows(path) == []
    path.write_text('{"rows": [{"probe": 1}]}')
    assert earlier_rows(path) == [{"probe": 1}]


def test_a_budget_is_never_negative() -> None:
    clock = Clock()
    budget = Budget(10, clock)
    clock.now_s += 4
    assert (budget.spent_s(), budget.left_s()) == (4, 6)
    clock.now_s += 100
    assert budget.left_s() == 0


def test_scratch_is_on_a_disk_if_one_can_be_found_and_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import machine

    in_memory, on_disk = tmp_path / "memory", tmp_path / "disk"
    in_memory.mkdir()
    on_disk.mkdir()
    monkeypatch.setattr(machine, "filesystem_of", lambda path: "tmpfs" if path == in_memory else "ext4")
    monkeypatch.setattr(machine, "ROOT", on_disk / "checkout")
    with scratch(None, in_memory) as where:
        assert where.parent == on_disk
        (where / "file").touch()
    assert not list(on_disk.iterdir())
    with scratch(in_memory, on_disk) as where:
        assert where.parent == in_memory  # what was asked for is what is done


# ---- children


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[bool, list[Row]]]:
    """Runs a function of a module that only these tests have."""
    (tmp_path / "rowmakers.py").write_text(
        "import os, signal, sys, threading\n"
        "def rows(emit, count):\n"
        "    for n in range(count):\n"
        "        emit({'n': n, 'set': os.environ.get('PROBED'), 'home': os.environ.get('HOME')})\n"
        "    print('not a row')\n"
        "def fails(emit):\n"
        "    emit({'n': 0})\n"
        "    open('/no/such/place/file')\n"
        "def crashes(emit):\n"
        "    emit({'n': 0})\n"
        "    os.kill(os.getpid(), signal.SIGSEGV)\n"
        "def hangs(emit):\n"
        "    emit({'n': 0})\n"
        "    threading.Event().wait()\n"
        "def leaves_a_child(emit):\n"
        "    pid = os.fork()\n"
        "    if pid == 0: signal.pause()\n"
        "    emit({'pid': pid})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(
        name: str, timeout_s: float = 60.0, environment: dict[str, str | None] | None = None, **arguments: Any
    ) -> tuple[bool, list[Row]]:
        found: list[Row] = []
        task = Task(f"rowmakers:{name}", arguments, {"probe": 9}, environment or {})
        return child.run(task, found.append, timeout_s), found

    return run


def test_rows_of_a_child_arrive_with_their_labels(children: Any) -> None:
    well, rows = children("rows", count=2, environment={"PROBED": "yes", "HOME": None})
    assert well
    assert rows == [{"probe": 9, "n": n, "set": "yes", "home": None} for n in (0, 1)]


def test_a_child_that_raises_is_a_row_without_paths(children: Any) -> None:
    well, rows = children("fails")
    assert not well
    assert rows[0] == {"probe": 9, "n": 0}
    assert rows[1] == {
        "probe": 9,
        "error": "FileNotFoundError: [Errno 2] No such file or directory: 'file'",
    }


def test_a_child_that_crashes_is_a_row(children: Any) -> None:
    well, rows = children("crashes")
    assert not well
    assert rows[0] == {"probe": 9, "n": 0}
    assert rows[1]["error"].startswith("SIGSEGV; Fatal Python error: Segmentation fault")
    assert str(ROOT) not in rows[1]["error"]


def test_a_child_that_hangs_is_ended_and_says_where(children: Any) -> None:
    well, rows = children("hangs", timeout_s=4.0)
    assert not well
    assert rows[0] == {"probe": 9, "n": 0}
    assert "Timeout" in rows[1]["error"]
    assert "in hangs" in rows[1]["error"]


def test_what_a_child_leaves_behind_is_ended(children: Any) -> None:
    _, rows = children("leaves_a_child")
    status = Path(f"/proc/{rows[0]['pid']}/stat")
    with contextlib.suppress(OSError):  # gone, or dead and not yet reaped by whoever adopted it
        deadline_s = time.monotonic() + 30
        while status.read_text().rpartition(")")[2].split()[0] not in "ZX":
            assert time.monotonic() < deadline_s
            os.sched_yield()


# ---- the probes, on the stand-in


def rows_of(function: Callable[..., None], gpu: Any = None, **arguments: Any) -> list[Row]:
    rows: list[Row] = []
    function(gpu or FakeGpu(), rows.append, **arguments)
    json.dumps(rows)  # all of it must survive the pipe
    return rows


MIB = 1 << 20
PROBES: dict[str, Callable[[Path], list[Row]]] = {
    "runtime": lambda disk: rows_of(probe_host.runtime, directory=str(disk)),
    "registration": lambda _: rows_of(probe_host.registration, nbytes=4 * MIB, slab_nbytes=MIB),
    "chunks": lambda _: rows_of(probe_link.chunks, nbytes=4 * MIB, smallest=MIB),
    "disk": lambda disk: rows_of(
        probe_link.disk, directory=str(disk), nbytes=8 * MIB, file_nbytes=16 * MIB, seconds=0.05
    ),
    "order": lambda _: rows_of(probe_order.order, nbytes=MIB, trials=3, slices=4),
    "slowdown": lambda _: rows_of(probe_order.slowdown, nbytes=MIB, side=32, steps=2, rounds=2),
    "freed": lambda _: [
        row
        for give_back in (True, False)
        for row in rows_of(probe_order.freed, nbytes=MIB, give_back=give_back)
    ],
    "capture": lambda _: [
        row
        for operation in probe_order.OPERATIONS
        for row in rows_of(probe_order.capture, operation=operation, relaxed=True, nbytes=MIB)
    ],
    "small": lambda _: rows_of(
        probe_link.small,
        ways=["loop", "batch", "batches of 1024", "torch.cat"],
        count=1100,
        sizes=[64, 128],
    ),
}


def test_every_child_of_the_probes_is_tried_here(tmp_path: Path) -> None:
    tasks = probe.tasks(tmp_path)
    assert {task.arguments["function"].split(":")[1] for task in tasks} == set(PROBES)
    assert {task.labels["probe"] for task in tasks} == set(probe.PROBES)
    assert len({probe.title(task) for task in tasks}) == len(tasks)
    for task in tasks:
        json.dumps(task.arguments)


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_fills_every_column_of_its_table(tmp_path: Path, name: str) -> None:
    number = {**{one: number for number, one in probe.PROBES.items()}, "slowdown": 5}[name]
    rows = [{"probe": number, "connections": "unset", **row} for row in PROBES[name](tmp_path)]
    assert rows
    assert not [row for row in rows if "error" in row and "hugetlb" not in str(row.get("kind"))]
    shown = next(
        one for one in TABLES if one.probe == number and any(one.columns[0].key in row for row in rows)
    )
    filled = {column.key for column in shown.columns if any(row.get(column.key) is not None for row in rows)}
    only_after_faults = {"fault", "why"}
    assert {column.key for column in shown.columns} - filled <= only_after_faults
    assert NOT_YET not in probe_table(shown, rows)
    assert not list(tmp_path.iterdir()), "the probe left files behind"


def test_what_the_probes_conclude_of_a_device_that_does_all_at_once(tmp_path: Path) -> None:
    for row in PROBES["order"](tmp_path):
        assert (row["new"], row["old"], row["torn"]) == (3, 0, 0)
    for row in PROBES["freed"](tmp_path):
        assert (row["contents"], row["in_flight_after_resize"]) == ("right", False)
    for row in PROBES["capture"](tmp_path):
        assert (row["outcome"], row["survived"], row["replayed"]) == ("CUDA_SUCCESS", True, "right")
    for row in PROBES["small"](tmp_path):
        assert row["contents"] == "right"


def test_a_copy_that_comes_before_the_kernels_is_seen_as_old_or_torn(monkeypatch: pytest.MonkeyPatch) -> None:
    def reads_early(part: float) -> list[Row]:
        class Early(FakeGpu):
            def copy(self, target: int, source: int, nbytes: int, stream: FakeStream) -> None:
                done = int(nbytes * part)
                ctypes.memset(target, 2, done)
                ctypes.memset(target + done, 1, nbytes - done)

        return rows_of(probe_order.order, Early(), nbytes=MIB, trials=2, slices=4)

    assert {row["old"] for row in reads_early(0.0)} == {2}
    assert {row["torn"] for row in reads_early(0.5)} == {2}


def test_a_way_that_copies_wrong_is_called_wrong() -> None:
    class Wrong(FakeGpu):
        def copy(self, target: int, source: int, nbytes: int, stream: FakeStream) -> None:
            ctypes.memmove(target, source, nbytes - 1)

    row, *_ = rows_of(probe_link.small, Wrong(), ways=["loop"], count=1000, sizes=[64])
    assert row["contents"].startswith("wrong in ")  # a byte in 256 happens to be right


def test_a_refusal_of_the_driver_is_a_row_and_the_probe_goes_on() -> None:
    gpu = FakeGpu()
    gpu.driver.refuses = {"cuMemHostRegister_v2"}
    rows = rows_of(probe_host.registration, gpu, nbytes=4 * MIB, slab_nbytes=MIB)
    assert len(rows) == 1 + 2 * len(KINDS)
    refused = [row for row in rows if row["kind"] in (SMALL, HUGE)]
    assert {row["error"] for row in refused} == {"CudaError: cuMemHostRegister_v2: CUDA_ERROR_INVALID_VALUE"}
    rows = rows_of(probe_link.chunks, gpu, nbytes=MIB, smallest=MIB)
    assert [("gb_per_s" in row, "error" in row) for row in rows] == [
        (False, True), (False, True), (True, False), (True, False)
    ]  # fmt: skip
    (row,) = rows_of(probe_order.capture, gpu, operation="cuMemHostRegister_v2", relaxed=False, nbytes=MIB)
    assert (row["outcome"], gpu.driver.modes) == ("CUDA_ERROR_INVALID_VALUE", [])


def test_a_way_that_cannot_run_here_is_a_row() -> None:
    if torch.cuda.is_available():
        pytest.skip("CuPy may run here")
    (row,) = rows_of(probe_link.small, ways=["kernel"], count=8, sizes=[64])
    assert "Error" in row["error"]


def test_the_run_of_probes_keeps_its_time_and_the_rows_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    asked: list[float] = []

    def run(task: Task, add: Callable[[Row], None], timeout_s: float) -> bool:
        asked.append(timeout_s)
        clock.now_s += 70
        add({**task.labels, "what": "said", "value": 1})
        return True

    monkeypatch.setattr(child, "run", run)
    monkeypatch.setattr(probe, "Driver", FakeDriver)
    monkeypatch.setattr(probe, "Budget", lambda seconds: Budget(seconds, clock))
    out = tmp_path / "out"
    out.mkdir()
    (out / "gpu_probe.json").write_text('{"rows": [{"probe": 3, "kept": 1}, {"probe": 1, "kept": 0}]}')
    path = probe.run(out, tmp_path, only=[1, 2, 4, 7], seconds_max=240)
    document = json.loads(path.read_text())
    assert asked == [60, 60, 60, 20]  # of 240, less the grace
    assert [row["probe"] for row in document["rows"]] == [3, 1, 2, 4, 7]
    assert len(document["missing"]) == 5
    assert all(why == "the time was up" for why in document["missing"].values())
    assert document["complete"]


# ---- the training


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_are_as_large_as_they_are_called(name: str) -> None:
    shape = SHAPES[name]
    low, high = {"2 GB": (1.9e9, 2.1e9), "10 GB": (9.9e9, 10.3e9), "> 20 GB": (20e9, 22e9)}[name]
    assert low < shape.nbytes < high
    assert shape.width % (2 * shape.heads) == 0
    assert (shape.tensors <= 500) == (name != "> 20 GB")


def test_the_largest_has_one_and_a_half_billion_parameters() -> None:
    assert 1.5e9 < SHAPES["> 20 GB"].parameters < 1.6e9


def test_a_shape_knows_its_state(training: Training) -> None:
    assert training.nbytes == training.shape.nbytes
    assert len(list(training.tensors())) == training.shape.tensors
    assert sum(one.numel() for one in training.model.working.parameters()) == training.shape.parameters


@pytest.mark.parametrize(
    ("copy_s", "micro_s", "count"),
    [(0.4, 0.5, 1), (0.4, 0.25, 2), (0.4, 0.0999, 6), (1.0, 1.25, 1), (0, 1, 1)],
)
def test_compute_outlasts_the_copy_by_a_quarter(copy_s: float, micro_s: float, count: int) -> None:
    assert micro_batches(copy_s, micro_s) == count
    assert count * micro_s >= 1.25 * copy_s
    assert count == 1 or (count - 1) * micro_s < 1.25 * copy_s


@pytest.fixture
def training() -> Iterator[Training]:
    made = Training(FakeGpu(), TINY_SHAPES["2 GB"])
    yield made
    made.close()


def test_calibration_counts_micro_batches(training: Training) -> None:
    assert training.calibrate(0.0) == 1
    assert training.calibrate(1e3) > 1000


def test_a_step_changes_every_tensor_and_what_was_remembered_stays(training: Training) -> None:
    names = [name for name, _ in training.tensors()]
    training.remember(names)
    before = {name: one.clone() for name, one in training.tensors()}
    assert training.changed() == 0
    assert training.judge(before) == "right"
    training.step()
    # Weights of norms in bfloat16 may round back to where they were; nothing else may.
    assert training.changed() >= len(names) * 4 // 5
    assert training.judge(before) == "right"
    live = dict(training.tensors())
    assert training.judge(live).startswith("wrong values in ")
    live.pop(names[0])
    assert training.judge(live) == f"missing: ['{names[0]}']"
    assert training.judge({**before, names[0]: before[names[0]].double()}).startswith("wrong values in 1")


def test_a_guard_and_hooks_are_timed_as_fence(training: Training) -> None:
    import threading

    never = threading.Event()

    @contextlib.contextmanager
    def guard() -> Iterator[None]:
        never.wait(0.02)
        yield

    assert training.step().fence_s < 0.02
    training.guard = guard
    took = training.step()
    assert 0.02 <= took.fence_s < took.host_s


def test_a_sample_has_the_largest_and_an_even_choice() -> None:
    sizes = {f"t{index}": 10 for index in range(100)} | {"big": 500, "too big": 400}
    names = sample(sizes, 600, count=32)
    assert "big" in names
    assert "too big" not in names
    assert sum(sizes[name] for name in names) <= 600
    assert len(names) == 11
    assert sample({"only": 7}, 0) == ["only"]
    spread_out = sample({f"t{index}": 1 for index in range(1000)}, 1000, count=32)
    picked = [int(name[1:]) for name in spread_out]
    assert len(picked) >= 31
    assert max(b - a for a, b in itertools.pairwise(picked)) <= 34


# ---- savers and measurements, on the stand-in


SAVERS: dict[str, Callable[[Training, Path], peers.Saver]] = {
    "ours": lambda training, path: peers.Ours(training, path, 64 * MIB),
    "torch.save": peers.TorchSave,
    "dcp": lambda training, path: peers.Dcp(training, path, process=False, pinned=False),
}


@pytest.mark.parametrize("name", SAVERS)
def test_a_saver_is_measured_and_its_files_are_checked(training: Training, tmp_path: Path, name: str) -> None:
    saver = SAVERS[name](training, tmp_path / "saver")
    training.guard = saver.updating
    names = [one for one, _ in training.tensors()]
    row = measure.one_save(training, saver, 3, names)
    assert row["contents"] == "right"
    assert 0 < row["changed"] <= row["checked"] == len(names)
    assert row["blocked_s"] == row["call_s"] + row["fence_s"]
    assert row["call_s"] > 0
    assert row["steps_in_flight"] >= 1
    if name == "ours":
        assert row["reported_blocked_s"] <= row["blocked_s"]
        assert row["copy_s"] == row["phases"]["released"] - row["phases"]["submitted"]
        assert row["file_nbytes"] > training.nbytes
    partial = measure.one_save(training, saver, 4, names[::7])
    assert (partial["contents"], partial["checked"]) == ("right", len(names[::7]))
    left = [path.name for path in (tmp_path / "saver").iterdir() if not path.name.startswith(".")]
    saver.close()
    assert left == []


def test_wrong_files_are_found(training: Training, tmp_path: Path) -> None:
    class Late(peers.TorchSave):
        """Saves what comes after the next step."""

        def read(self, step: int, names: set[str]) -> dict[str, torch.Tensor]:
            super().save(step)
            return super().read(step, names)

    row = measure.one_save(
        training, Late(training, tmp_path / "saver"), 1, [name for name, _ in training.tensors()]
    )
    assert row["contents"].startswith("wrong values in ")


def test_a_save_that_fails_is_not_durable(training: Training, tmp_path: Path) -> None:
    class Fails(peers.TorchSave):
        def save(self, step: int) -> peers.Flight:
            durable: Future[float] = Future()
            durable.set_exception(OSError("no"))
            return peers.Flight(0.0, 0.0, durable)

    with pytest.raises(OSError, match="no"):
        measure.one_save(training, Fails(training, tmp_path / "saver"), 1, [])


def saves(tmp_path: Path, **changed: Any) -> list[Row]:
    arguments = {
        "size": report.SMALL, "tiny": True, "saver": peers.OURS, "directory": str(tmp_path), "rounds": 2,
        "seconds": 60.0, "link_gb_per_s": 1.0, **changed,
    }  # fmt: skip
    return rows_of(measure.saves, **arguments)


def test_a_measurement_has_a_row_per_round_and_raw_writes_beside_ours(tmp_path: Path) -> None:
    rows = saves(tmp_path)
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert all(row["contents"] == "right" for row in rows)
    assert [row.get("raw_s", 0) > 0 for row in rows] == [False, True, True]
    assert {row["tensors"] for row in rows} == {TINY_SHAPES[report.SMALL].tensors}
    assert [path.name for path in tmp_path.iterdir()] == ["saver"]


def test_no_round_begins_that_time_would_not_hold(tmp_path: Path) -> None:
    assert len(saves(tmp_path, seconds=0.0, saver="torch.save")) == 1


def test_ceilings_are_measured_after_a_warm_up(tmp_path: Path) -> None:
    rows = rows_of(measure.ceilings, directory=str(tmp_path), nbytes=4 * MIB, rounds=2)
    assert [row["what"] for row in rows] == ["link", "link", "disk", "disk"]
    assert all(row["gb_per_s"] > 0 for row in rows)


def test_a_trace_is_exported_and_says_nothing_of_where_it_was_made(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (row,) = rows_of(
        measure.trace,
        size=report.SMALL, tiny=True, directory=str(tmp_path), out=str(out), link_gb_per_s=1.0,
    )  # fmt: skip
    assert row["copies"] == 0
    assert row["phases"]["durable"] > 0
    (path,) = out.iterdir()
    assert path.name == row["trace"] == "gpu_trace.json.gz"
    with gzip.open(path, "rt") as file:
        told = file.read()
    assert "traceEvents" in told
    assert str(out) not in told


def test_copies_in_a_trace_are_added_up(tmp_path: Path) -> None:
    def copy_event(began_us: float, took_us: float, name: str = "Memcpy DtoH (Device -> Pinned)") -> Row:
        return {"cat": "gpu_memcpy", "name": name, "ts": began_us, "dur": took_us}

    path = tmp_path / "trace.json.gz"
    events = [
        copy_event(1200, 100),
        copy_event(1000, 100),
        copy_event(1050, 100),
        copy_event(0, 1, "Memcpy HtoD (Pinned -> Device)"),
        {"cat": "kernel", "name": "DtoH", "ts": 5, "dur": 5},
        {"name": "metadata"},
    ]
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events, "traceName": "/some/where"}, file)
    row = measure.copies_in_trace(path)
    assert row["copies"] == 3
    assert row["span_s"] == pytest.approx(300e-6)
    assert row["busy_s"] == pytest.approx(250e-6)
    assert row["longest_gap_s"] == pytest.approx(50e-6)
    with gzip.open(path, "rt") as file:
        assert set(json.load(file)) == {"traceEvents"}


# ---- the report's time


def test_time_is_given_by_what_a_measurement_is_likely_to_take() -> None:
    shape = SHAPES[report.MIDDLE]
    save = report.Save(report.MIDDLE, "torch.save", rounds=2, crossings=4.0)
    one, two = (report.expected_s(save, shape, 1.0, rounds) for rounds in (1, 2))
    assert two - one == pytest.approx(4 * shape.nbytes / 1e9 + 5)
    assert report.allotted_s(save, shape, 1.0, one) is None
    assert report.allotted_s(save, shape, 1.0, one + child.GRACE_S) == pytest.approx(one)
    assert report.allotted_s(save, shape, 1.0, 1e6) == pytest.approx(4 * two)


class Run:
    """A report whose children take a while on a clock of ours and add rows like real ones."""

    def __init__(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        took_s: float,
        free: int = 1 << 40,
        resume: bool = False,
    ) -> None:
        self.clock = Clock()
        self.tasks: list[Task] = []
        self.took_s = took_s
        monkeypatch.setattr(child, "run", self.child)
        monkeypatch.setattr(report, "Driver", FakeDriver)
        monkeypatch.setattr(report, "Budget", lambda seconds_: Budget(seconds_, self.clock))
        monkeypatch.setattr(report, "unavailable", lambda name: None)
        monkeypatch.setattr(report.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free})())
        self.path = report.run(tmp_path / "out", tmp_path, 540, resume=resume)
        self.document = json.loads(self.path.read_text())

    def child(self, task: Task, add: Callable[[Row], None], timeout_s: float) -> bool:
        assert timeout_s > 0
        self.tasks.append(task)
        self.clock.now_s += min(self.took_s, timeout_s)
        what = task.arguments["function"]
        if what == "ceilings":
            for name, gb_per_s in (("link", 50.0), ("disk", 2.0)):
                add({**task.labels, "what": name, "round": 0, "gb_per_s": gb_per_s})
        elif what == "trace":
            add({**task.labels, "trace": "t", "copies": 5, "span_s": 0.1, "busy_s": 0.1, "longest_gap_s": 0})
        elif task.arguments["saver"] == "torch_checkpointing":
            add({**task.labels, "error": "ImportError: something | or other"})
        else:
            for number in range(task.arguments["rounds"] + 1):
                add({**task.labels, **save_row(task.arguments["size"], number)})
        return True


def save_row(size_: str, number: int) -> Row:
    shape = SHAPES[size_]
    return {
        "round": number, "nbytes": shape.nbytes, "tensors": shape.tensors, "parameters": shape.parameters,
        "micro_batches": 3, "note": "as it comes", "call_s": 4e-4, "fence_s": 1e-4,
        "blocked_s": 5e-4 if number else 7.0, "durable_s": shape.nbytes / 2e9, "raw_s": shape.nbytes / 2.2e9,
        "quiet_step_s": 0.5, "first_step_s": 0.505, "slowdown": 0.004, "lost_s": 0.01, "starved_s": 0.0,
        "copy_gb_per_s": 40.0, "changed": 5, "checked": 5, "contents": "right",
        "phases": {"submitted": 4e-4, "released": 0.1},
    }  # fmt: skip


def test_with_time_for_all_nothing_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, took_s=1)
    assert run.document["complete"]
    assert set(run.document["missing"]) == {
        "torch_checkpointing, 2 GB", "torch_checkpointing, 10 GB"
    }  # fmt: skip
    assert [task.arguments["function"] for task in run.tasks[:2]] == ["ceilings", "saves"]
    savers = [task.arguments.get("saver", "none: a trace") for task in run.tasks[1:]]
    assert savers == [
        *[peers.OURS] * 3, *peers.PEERS, peers.OURS, "none: a trace", *peers.PEERS
    ]  # fmt: skip
    assert len(run.tasks) == 2 + len(report.PLAN)
    assert run.tasks[1].arguments["link_gb_per_s"] == 50.0
    assert [task.environment[probe.MAX_CONNECTIONS] for task in run.tasks].count("1") == 1
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


def test_when_time_is_short_it_ends_in_time_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch, took_s=100)
    assert run.clock.now_s - 100 <= 540
    done = {
        (task.arguments["saver"], task.arguments["size"]) for task in run.tasks if "saver" in task.arguments
    }
    assert (peers.OURS, report.LARGE) in done  # the targets first
    for save in report.PLAN:
        missing = run.document["missing"].get(save.title)
        assert (missing is None) == bool(
            [row for row in run.document["rows"]
             if (row.get("saver"), row.get("size"), row.get("connections"))
             == (save.saver, save.size, save.connections)]
        )  # fmt: skip
    assert any(why.startswith("the time was up: ") for why in run.document["missing"].values())
    assert run.document["complete"]


def test_another_run_measures_what_one_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Run(tmp_path, monkeypatch, took_s=100)
    second = Run(tmp_path, monkeypatch, took_s=1, resume=True)
    assert first.document["rows"] == second.document["rows"][: len(first.document["rows"])]
    assert len(first.tasks) + len(second.tasks) == 2 + len(report.PLAN)
    assert set(second.document["missing"]) == {"torch_checkpointing, 2 GB", "torch_checkpointing, 10 GB"}
    assert "In more than one run" in page(None, second.document)
    third = Run(tmp_path, monkeypatch, took_s=1, resume=True)
    assert {task.arguments["saver"] for task in third.tasks} == {"torch_checkpointing"}  # it had failed


def test_what_children_are_asked_is_what_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is misspelt would be found out only on a GPU."""
    tasks = [*probe.tasks(tmp_path), *Run(tmp_path, monkeypatch, took_s=1).tasks]
    for task in tasks:
        arguments = json.loads(json.dumps(task.arguments))
        target = importlib.import_module(task.target.split(":")[0])
        assert callable(getattr(target, task.target.split(":")[1]))
        called = arguments.pop("function")
        module, _, name = called.rpartition(":")
        function = getattr(importlib.import_module(f"benchmarks.gpu.{module or 'measure'}"), name)
        inspect.signature(function).bind(None, None, **arguments)
        assert callable(
            getattr(importlib.import_module(task.target.split(":")[0]), task.target.split(":")[1])
        )


def test_children_call_what_they_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (probe, report):
        monkeypatch.setattr(module, "Gpu", FakeGpu)
    rows: list[Row] = []
    probe.on_gpu(rows.append, function="probe_order:freed", nbytes=MIB, give_back=True)
    report.on_gpu(rows.append, function="ceilings", directory=str(tmp_path), nbytes=MIB, rounds=1)
    assert [row.get("what", row.get("contents")) for row in rows] == ["right", "link", "disk"]


def test_a_small_disk_leaves_out_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, took_s=1, free=15 << 30)
    assert run.document["missing"]["asyncckpt, > 20 GB"] == "15 GiB are free on the disk, too few"
    assert "asyncckpt, 10 GB" not in run.document["missing"]


# ---- the page


def test_where_nothing_is_measured_every_cell_says_so(tmp_path: Path) -> None:
    render(tmp_path, tmp_path / "gpu.md")
    text = (tmp_path / "gpu.md").read_text()
    bodies = [
        block.split("\n| --- ")[1].splitlines()[1:] for block in text.split("\n\n") if "| --- " in block
    ]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for body in bodies for line in body]
    assert len(lines) > len(report.PLAN) + len(TABLES)
    for cells in lines:
        names = [cell for cell in cells if cell != NOT_YET]
        assert len(names) <= (3 if cells[-2:] == [NOT_YET] * 2 and len(cells) == 5 else 1), cells
    for number in probe.PROBES:
        assert f"### ({number}) " in text
    for words in (
        "probe --out",
        "report --out",
        "at most 1.00 ms",
        "at least 90.0 %",
        "at most 1.15",
        "at most 1.0 %",
    ):
        assert words in text


def test_the_page_in_the_repository_is_that_of_its_results(tmp_path: Path) -> None:
    render(ROOT / "benchmarks" / "results", tmp_path / "gpu.md")
    assert (tmp_path / "gpu.md").read_text() == (ROOT / "docs" / "gpu.md").read_text(), (
        "run `python -m benchmarks.gpu render`"
    )


def test_the_page_shows_each_target_beside_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page(None, Run(tmp_path, monkeypatch, took_s=1).document)
    lines = text.splitlines()

    def line(start: str) -> str:
        return next(one for one in lines if one.startswith(start))

    blocked = "500.0 µs (500.0 µs to 500.0 µs)"  # the first round, of 7 s, does not count
    assert line("| host blocked, 430 tensors") == (
        f"| host blocked, 430 tensors | 2 GB | at most 1.00 ms | {blocked} | yes |"
    )
    assert "| 0.4 % | yes |" in line("| step slowdown")
    assert "| at least 90.0 % | 80.0 % (80.0 % to 80.0 %) | **no** |" in line("| to the host, share")
    assert "| at most 1.15 | 1.10 (1.10 to 1.10) | yes |" in line("| durable, beside")
    ours = line("| asyncckpt |")
    assert f"| {blocked} |" in ours
    assert "| 40.0 GB/s, 80.0 % |" in ours
    assert ours.endswith("| 1.00 (1.00 to 1.00) | 4 of 4 |")
    failed = line("| torch_checkpointing |")
    assert failed.count(NOT_YET) == failed.count("|") - 2
    assert "- torch_checkpointing, 2 GB: ImportError: something | or other" in lines
    assert str(ROOT) not in text


def test_contents_that_never_changed_prove_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = Run(tmp_path, monkeypatch, took_s=1).document
    for row in document["rows"]:
        if "changed" in row:
            row["changed"] = 0
    assert next(one for one in page(None, document).splitlines() if one.startswith("| asyncckpt |")).endswith(
        "| 0 of 4 |"
    )


def test_a_run_that_was_cut_short_or_tiny_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = Run(tmp_path, monkeypatch, took_s=1).document
    text = page(None, {**document, "complete": False, "tiny": True})
    assert "**The run was cut short.**" in text
    assert "the figures mean nothing" in text
    assert "cut short" not in page(None, document)


def test_probe_rows_that_failed_stand_below_their_table() -> None:
    shown = next(one for one in TABLES if one.probe == 2)
    text = probe_table(shown, [{"probe": 2, "kind": "hugetlb", "calls": 1, "error": "OSError: no"}])
    assert text.endswith("\n- Failed (kind hugetlb, calls 1): OSError: no\n")
    assert NOT_YET in text


def test_the_pages_of_both_benchmarks_can_live_on_the_same_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.render import page as cpu_page

    path = Run(tmp_path, monkeypatch, took_s=1).path
    assert "Stall" not in cpu_page({path.stem: json.loads(path.read_text())})


@pytest.mark.parametrize(
    ("form", "value", "cell"),
    [
        (seconds, 1.5, "1.50 s"),
        (seconds, 2.5e-3, "2.50 ms"),
        (seconds, 3e-6, "3.0 µs"),
        (seconds, -0.02, "-20.00 ms"),
        (size, 64 << 10, "64 KiB"),
        (size, 141 << 30, "141 GiB"),
        (size, 64, "64 B"),
        (rate, 52.34, "52.3 GB/s"),
        (rate, 1.234, "1.23 GB/s"),
    ],
)
def test_values_as_cells(form: Callable[[float], str], value: float, cell: str) -> None:
    assert form(value) == cell


def test_a_spread_has_a_middle_and_two_ends() -> None:
    assert spread([3.0, 1.0, 2.0], seconds) == "2.00 s (1.00 s to 3.00 s)"
    assert spread([1.0], seconds) == "1.00 s"
    assert spread([], seconds) == NOT_YET
