"""The benchmarks run, check what they wrote, and their page is made of their results."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(600)  # seconds: all run in one setup, the peers that are installed too
ROOT = Path(__file__).resolve().parent.parent


def run(module: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it, as `make bench` runs it, tiny."""
    directory = tmp_path_factory.mktemp("bench")
    out = directory / "results"
    run(
        "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", "--benchmark-only",
        "--tiny", f"--bench-dir={directory / 'scratch'}", f"--bench-out={out}",
    )  # fmt: skip
    assert not list((directory / "scratch").iterdir()), "scratch was left behind"
    return out


def test_stall_verifies_every_save_of_ours_and_of_the_peers(results: Path) -> None:
    document = json.loads((results / "stall.json").read_text())
    assert document["tiny"]
    alone_rounds, peer_rounds = document["config"]["rounds"], document["config"]["peer_rounds"]
    rows = document["rows"]
    assert list(document["alone"]) == ["asyncckpt", "asyncckpt, low priority", "asyncckpt, small arena"]
    assert document["summary"].keys() > document["alone"].keys()
    assert len(rows) == alone_rounds * len(document["alone"]) + peer_rounds * len(document["summary"])
    for name in (*document["alone"], "torch.save", "dcp.save"):
        found = [(row["alone"], row["contents"]) for row in rows if row["saver"] == name]
        alone = [(True, "right")] * alone_rounds * (name in document["alone"])
        assert found == alone + [(False, "right")] * peer_rounds
    assert document["targets"][0]["measured"] == document["alone"]["asyncckpt"]["blocked_s"]
    for row in rows:
        assert row["raw"]["nbytes"] >= document["config"]["nbytes"]
        assert row["blocked_s"] == row["call_s"] + row["fence_s"]
        assert 0 < row["call_s"] < row["durable_s"] + 1e-3
        assert 0 < row["call_cpu_s"] <= row["call_s"] + 1e-3
        assert row["stolen"] >= 0
    assert len(document["summary"]) + len(document["cannot_run"]) == 12


def test_slowdown_is_of_the_time_in_flight() -> None:
    from benchmarks.stall import _slowdown
    from benchmarks.workload import StepTime

    quiet = StepTime(1.0, 0.0)
    steps = [StepTime(1.5, 0.0), StepTime(1.5, 0.0), quiet]
    assert _slowdown(steps, quiet, 3.0) == pytest.approx(0.5)  # until the second step ended
    assert _slowdown(steps, quiet, 4.0) == pytest.approx(1 / 3)  # in all of them, on average
    waited = [StepTime(2.5, 1.0), StepTime(1.5, 0.0), quiet]
    assert _slowdown(waited, quiet, 4.0) == pytest.approx(0.5)  # waits are blocked, not slow
    with_hooks = [StepTime(one.total_s + 0.1, one.fence_s + 0.1) for one in waited]
    assert _slowdown(with_hooks, StepTime(1.1, 0.1), 4.3) == pytest.approx(
        0.5
    )  # those of quiet steps neither
    assert _slowdown([quiet], quiet, 0.4) is None  # hardly any of it was in flight
    assert _slowdown([StepTime(9.0, 0.0)], quiet, 2.0) == pytest.approx(
        10
    )  # it stood still: no more than that


def test_a_peer_that_fails_or_hangs_is_out_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import lineup
    from benchmarks.workload import TINY, Workload

    class Pending:
        def __init__(self, wait: Callable[[], None]) -> None:
            self.wait = wait

    class Peer:
        def __init__(self, name: str, workload: Workload, directory: Path) -> None:
            self.name = name

        def save(self, step: int) -> Pending:
            assert self.name != "fails", "no disk"
            return Pending(threading.Event().wait if self.name == "hangs" else lambda: None)

        def delete(self, step: int) -> None:
            pass

        def close(self) -> None:
            raise RuntimeError("what was measured stands")

    def fails_later() -> dict[str, Any]:
        raise OSError("no disk any more")

    monkeypatch.setattr(lineup, "PEERS", dict.fromkeys(("fails", "hangs", "works", "fails later"), Peer))
    monkeypatch.setattr(lineup, "DEADLINE_S", 0.2)
    workload = Workload(TINY)
    try:
        ours: Any = Peer("ours", workload, tmp_path)
        found = lineup.Lineup([ours], workload, tmp_path)
        assert found.turns(3) == [ours]
        assert found.cannot_run == {}
        found.invite()
        assert found.cannot_run == {
            "fails": "AssertionError: no disk",
            "hangs": "TimeoutError: no answer within 0.2 s",
        }
        orders = [[saver.name for saver in found.turns(number)] for number in range(20)]
        assert {frozenset(names) for names in orders} == {frozenset(("ours", "works", "fails later"))}
        assert len({tuple(names) for names in orders}) == 6  # all that there are
        assert orders == [[saver.name for saver in found.turns(number)] for number in range(20)]
        assert found.measure(found.savers[1], lambda: {"saver": "works"}) == {"saver": "works"}
        assert found.measure(found.savers[2], fails_later) is None
        assert found.cannot_run["fails later"] == "OSError: no disk any more"
        assert found.kept([{"saver": "works"}, {"saver": "fails later"}]) == [{"saver": "works"}]
        with pytest.raises(OSError, match="no disk any more"):
            found.measure(ours, fails_later)
        assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
        with pytest.raises(RuntimeError):
            found.close()  # ours is heard
        found = lineup.Lineup([], workload, tmp_path)
        found.invite()
        found.close()
        assert [saver.name for saver in found.savers] == ["works", "fails later"]
    finally:
        workload.close()


def test_what_is_reported_as_blocked_is_what_was_measured_from_outside(results: Path) -> None:
    document = json.loads((results / "stall.json").read_text())
    shares = []
    for row in document["rows"]:
        if "reported_blocked_s" in row:
            hooks_s = len(row["steps_in_flight_s"]) * row["idle_fence_s"]  # a report counts them too
            shares.append(row["reported_blocked_s"] / (row["blocked_s"] + hooks_s))
    assert max(shares) <= 1
    assert max(shares) > 0.5  # one at least was not interrupted just outside of what is counted


def test_many_tensors_verifies_every_save_at_every_size(results: Path) -> None:
    document = json.loads((results / "many_tensors.json").read_text())
    leaves = [size["leaves"] for size in document["sizes"]]
    assert leaves == sorted(set(leaves))
    for size in document["sizes"]:
        for name in ("asyncckpt", "asyncckpt, megatron", "torch.save"):
            assert size["summary"][name]["contents_right"] == size["summary"][name]["x_dcp"]["count"]
        assert list(size["alone"]) == ["asyncckpt", "asyncckpt, megatron"]
        for one in size["alone"].values():
            assert one["contents_right"] == one["x_dcp"]["count"] == size["rounds"]
        assert size["summary"]["asyncckpt"]["x_dcp"]["count"] == size["peer_rounds"]
        assert size["summary"]["torch.save"]["x_dcp"]["count"] <= size["peer_rounds"]
        assert size["summary"]["asyncckpt"]["x_dcp"]["max"] == 1
    blocked, beside_peer, megatron = (document["targets"][at::3] for at in range(3))
    assert len(blocked) == len(beside_peer) == len(megatron) == len(leaves)
    for size, alone, beside, ratio in zip(document["sizes"], blocked, beside_peer, megatron, strict=True):
        assert alone["measured"] == size["alone"]["asyncckpt"]["blocked_s"]
        assert beside["measured"]["count"] == size["summary"][beside["beside"]]["blocked_s"]["count"]
        assert ratio["measured"] == size["alone"]["asyncckpt, megatron"]["x_dcp"]


@pytest.mark.parametrize(("name", "sizes", "ours"), [("stall", 1, 3), ("many_tensors", 3, 2), ("cpu", 1, 1)])
def test_ours_are_alone_until_the_first_peer_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, sizes: int, ours: int
) -> None:
    """In the rounds that absolute targets are about, and of every size."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import lineup, savers
    from benchmarks.results import Options

    events: list[str] = []

    class Peer:
        note = "is slow"

        def __init__(self, name: str, workload: Any, directory: Path) -> None:
            events.append("peer made")
            self.name = name
            self._saver = savers.Asyncckpt(name, workload, directory, 64 << 20)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._saver, name)

    script = importlib.import_module(f"benchmarks.{name}")
    real = lineup.Lineup.measure

    def measured(self: Any, saver: Any, measurement: Any) -> Any:
        events.append(saver.name)
        return real(self, saver, measurement)

    monkeypatch.setattr(lineup, "PEERS", {"torch.save": Peer})
    monkeypatch.setattr(lineup.Lineup, "measure", measured)
    document = script.run(Options.make(directory=tmp_path / "scratch", out=tmp_path, tiny=True, rounds=2))
    before = events[: events.index("peer made")]
    assert events.count("peer made") == sizes
    again = ours if name == "many_tensors" else 0  # warmed up once more, by now of the first size
    assert len(before) == sizes * ours * 3 + again
    rows = document["rows"]
    assert [row["alone"] for row in rows] == [True] * (sizes * ours * 2) + [False] * (sizes * (ours + 1) * 2)
    assert "torch.save" not in {row["saver"] for row in rows if row["alone"]}


def test_the_share_of_processors_that_are_stolen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import machine

    real, now_s, ticks = Path.read_text, 100.0, 55

    def read_text(path: Path) -> str:
        return (
            f"cpu  100 0 50 800 10 0 5 {ticks} 20 0\ncpu0 1 2 3\n"
            if str(path) == "/proc/stat"
            else real(path)
        )

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now_s)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine.os, "sysconf", {"SC_CLK_TCK": 100}.get)
    stolen = machine.Stolen()
    now_s, ticks = 100.5, 75  # 0.2 of one processor's second, in half a second of two
    assert stolen.share() == pytest.approx(0.2)


def test_loads_are_verified_and_paired_with_raw_reads_in_either_order(results: Path) -> None:
    document = json.loads((results / "load.json").read_text())
    rows = document["rows"]
    assert len(rows) == 2 * document["config"]["rounds"]
    assert [row["first"] for row in rows[:2]] == ["apart", "raw"]
    assert {row["contents"] for row in (*rows, *document["stock_rows"])} == {"right"}
    for row in rows:
        assert list(row["phases"]) == ["listed", "parsed", "matched", "read", "applied"]
        assert row["phases"]["applied"] <= row["ours_s"]
    assert document["targets"][0]["measured"]["count"] == len(rows)


def test_saves_are_verified_and_paired_with_raw_writes_in_either_order(results: Path) -> None:
    document = json.loads((results / "write.json").read_text())
    rows = document["rows"]
    assert len(rows) == 2 * document["config"]["rounds"]
    assert [row["first"] for row in rows[:2]] == ["apart", "raw"]
    assert {row["contents"] for row in rows} == {"right"}
    assert all(row["raw"]["nbytes"] >= document["config"]["nbytes"] for row in rows)
    assert all(0 < row["reported_s"] <= row["ours_s"] for row in rows)
    assert document["targets"][0]["measured"]["count"] == len(rows)


def test_processor_time_is_that_of_saves_that_were_right(results: Path) -> None:
    document = json.loads((results / "cpu.json").read_text())
    for row in (*document["rows"], *document["raw_rows"], *document["copy_rows"]):
        assert row["cpu_s_per_gib"] == row["user_s_per_gib"] + row["system_s_per_gib"] > 0
    assert document["alone"]["contents_right"] == document["config"]["rounds"]
    assert document["summary"]["asyncckpt"]["contents_right"] == document["config"]["peer_rounds"]
    assert document["targets"][0]["measured"] == document["alone"]["cpu_s_per_gib"]


def test_saves_at_each_step_are_right_and_reported(results: Path) -> None:
    document = json.loads((results / "every_step.json").read_text())
    for row in document["rows"]:
        assert row["contents"] == "right"
        assert len(row["blocked_s"]) == len(row["starved_s"]) == document["config"]["steps"]
        assert min(row["blocked_s"]) > 0
        assert 0 < row["reported_s"] <= sum(row["blocked_s"]) < row["seconds"]
        assert row["reported_s"] < row["training_s"] <= row["seconds"]
        assert row["best_s"] > max(row["quiet_s"], row["raw_s"])
        assert row["unreported"] * row["training_s"] == pytest.approx(row["lost_s"] - row["reported_s"])
    assert len(document["targets"]) == 2 * len(document["summary"])


def test_a_step_that_fails_beside_raw_writes_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that waits for the first step to end does not wait for ever."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import every_step
    from benchmarks.raw_disk import RawDisk

    class Broken:
        def step(self) -> None:
            raise ArithmeticError("no step")

    broken: Any = Broken()
    with pytest.raises(ArithmeticError, match="no step"):
        every_step._beside(broken, RawDisk(tmp_path), 4096, 2)


@pytest.mark.parametrize("nbytes", [1, 4096, (4 << 20) + 5, 13 << 20])
def test_raw_writes_and_reads_move_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    """Out of one block and into a few, over and over; out of and into as much memory as there are bytes."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.raw_disk import BLOCK_NBYTES, RawDisk

    disk = RawDisk(tmp_path, [nbytes, nbytes])
    path = disk.keep(tmp_path / "kept", nbytes)
    kept = path.read_bytes()
    assert len(kept) == nbytes
    assert all(kept[at] == kept[at - BLOCK_NBYTES] for at in range(BLOCK_NBYTES, nbytes, 4095))
    whole = -(-nbytes // 4096) * 4096
    assert disk._write(tmp_path / "apart", whole, disk._apart) in (True, False)
    written = (tmp_path / "apart").read_bytes()
    assert written == disk._apart[:whole]
    assert nbytes <= BLOCK_NBYTES or written[:4096] != written[BLOCK_NBYTES : BLOCK_NBYTES + 4096]
    assert disk.direct(nbytes, apart=True).nbytes == whole
    disk._apart[:] = bytes(len(disk._apart))
    assert disk.read([path, path]).nbytes == 2 * nbytes
    assert not any(disk._apart)
    assert disk.read([path, path], apart=True).nbytes == 2 * nbytes
    second = -(-nbytes // BLOCK_NBYTES) * BLOCK_NBYTES
    assert disk._apart[:nbytes] == disk._apart[second : second + nbytes] == kept
    with pytest.raises(OSError, match="bytes read where"):
        disk.read([path, path, path], apart=True)  # there is no memory for so much
    with pytest.raises(ValueError, match="memory for"):
        disk.direct(len(disk._apart) + 1, apart=True)
    assert not (tmp_path / "raw").exists()


def test_a_raw_transfer_that_fails_in_a_thread_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.raw_disk import _in_threads

    def fail(thread: int) -> None:
        if thread:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _in_threads(2, fail)


def test_whole_saves_and_loads_are_compared_with_both_kinds_of_raw(results: Path) -> None:
    for name in ("write", "load"):
        document = json.loads((results / f"{name}.json").read_text())
        for row in document["rows"]:
            raw_s = row["raw"]["seconds"] if name == "write" else row["raw_s"]
            apart_s = row["apart"]["seconds"] if name == "write" else row["apart_s"]
            assert (row["ratio"], row["x_apart"]) == (row["ours_s"] / raw_s, row["ours_s"] / apart_s)
            assert row["contents"] == "right"


def test_a_first_save_is_compared_with_later_ones_of_its_process(results: Path) -> None:
    document = json.loads((results / "first_save.json").read_text())
    assert [row["when"] for row in document["rows"]] == ["memory present", "at once"]
    for row in document["rows"]:
        assert row["contents"] == "right"
        assert len(row["durable_s"]) == len(row["blocked_s"]) == document["config"]["saves"]
        assert row["x_later"] == row["durable_s"][0] / sorted(row["durable_s"][1:])[1]
        assert (row["present_s"] is not None) == (row["when"] == "memory present")


def test_memory_is_counted_for_saves_that_were_right(results: Path) -> None:
    document = json.loads((results / "memory.json").read_text())
    for row in document["rows"]:
        assert row["contents"] == "right"
        assert row["extra_bytes"] > 0
        assert row["over_bytes"] == row["extra_bytes"] - row["host_memory"]
    assert len(document["targets"]) == len(document["summary"])
    assert not document["cannot_run"]
    assert "host_memory = state / 10, huge state" in document["summary"]


def test_a_huge_state_is_left_out_where_it_has_no_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import machine, memory

    monkeypatch.setattr(machine, "available_bytes", lambda: 4 << 30)
    small, huge = memory.CASES[0], memory.CASES[-1]
    assert small.cannot_run(tmp_path) is None
    assert huge.cannot_run(tmp_path) == "4096 MiB of memory are available, 13317 MiB are needed"


def test_the_page_is_made_of_the_results(results: Path, tmp_path: Path) -> None:
    run("benchmarks.render", "--results", str(results), "--out", str(tmp_path / "page.md"))
    page = (tmp_path / "page.md").read_text()
    assert page.replace("(page/", "(benchmarks/") == (results / "benchmarks.md").read_text()
    pictures = {path.name for path in (tmp_path / "page").iterdir()}
    assert pictures == {"stall.svg", "many_tensors.svg", "write.svg", "load.svg"}
    for name in pictures:
        drawn = (tmp_path / "page" / name).read_bytes()
        assert drawn == (results / "benchmarks" / name).read_bytes()
        assert f"](page/{name})" in page
    stall = json.loads((results / "stall.json").read_text())
    for name in (*stall["summary"], *stall["cannot_run"]):
        assert name in page
    documents = [json.loads(path.read_text()) for path in results.glob("*.json")]
    lines = page.splitlines()
    for target in (target for document in documents for target in document.get("targets", ())):
        name = f": {target['what']} | {target['where']} | "
        assert len([line for line in lines if name in line]) == 1
    assert "figures mean nothing" in page
    assert str(ROOT) not in page


def a_document(met: bool, tiny: bool = False) -> dict[str, Any]:
    """Of a run with one target, for a page with nothing but that."""
    measured = {**dict.fromkeys(("median", "min", "max"), 1.0 if met else 3.0), "count": 1}
    target = {"what": "time", "where": "here", "unit": "s", "limit": 2, "measured": measured, "met": met}
    return {"tiny": tiny, "targets": [target]}


@pytest.mark.parametrize("met", [True, False])
def test_a_limit_is_told_where_its_target_is_not_met(
    met: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import limits, render

    path = tmp_path / "limits.toml"
    limit = '[[limit]]\nbenchmark = "write"\nwhat = "time"\nwhere = "here"\nnote = "The disk."\n'
    path.write_text(limit)
    notes = limits.read(path)
    assert notes == {("write", "time", "here"): "The disk."}
    text = "\n".join(render._targets({"write": a_document(met)}, notes))
    assert ("The disk." in text) is not met
    assert ("1.00 s (once)" if met else "3.00 s (once)") in text

    limits.refuse_strangers(notes, {"write": a_document(met)})
    limits.refuse_strangers(notes, {})
    stranger = {("write", "time", "there"): "The disk."}
    limits.refuse_strangers(stranger, {"write": a_document(met, tiny=True)})
    with pytest.raises(ValueError, match="write has no target 'time' with 'there'"):
        limits.refuse_strangers(stranger, {"write": a_document(met)})

    path.write_text(limit * 2)
    with pytest.raises(ValueError, match="two limits for"):
        limits.read(path)
    path.write_text(limit.replace("The disk.", "The disk takes 220 ms."))
    with pytest.raises(ValueError, match="'0 ms' is for a JSON to say"):
        limits.read(path)
    path.write_text(limit.replace("note", "why"))
    with pytest.raises(ValueError, match="a limit has"):
        limits.read(path)


def test_the_committed_limits_are_of_the_committed_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import limits

    results = ROOT / "benchmarks" / "results"
    documents = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    notes = limits.read()
    limits.refuse_strangers(notes, documents)
    missed = {
        (name, one["what"], one["where"])
        for name, document in documents.items()
        for one in document.get("targets", ())
        if not one["met"]
    }
    assert missed <= notes.keys(), "what is not met has a note that says why"


@pytest.mark.parametrize("by", ["Copies", "Checksums"])
def test_wrong_contents_are_called_wrong(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import workload as workloads

    workload = workloads.Workload(workloads.TINY, getattr(workloads, by)())
    try:
        workload.remember()
        kept = {name: tensor.clone() for name, tensor in workload.tensors()}
        assert workload.judge(kept) == "right"
        workload.step()
        live = dict(workload.tensors())
        assert workload.judge(live) == f"wrong values in {len(live)} tensors, {next(iter(live))} first"
        kept.pop(next(iter(kept)))
        assert workload.judge(kept).startswith("wrong names")
    finally:
        workload.close()


def test_a_full_run_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import machine
    from benchmarks.results import Options

    memory = Path("/dev/shm")  # noqa: S108 -- its filesystem is the point
    if not memory.is_dir() or machine.filesystem_of(memory) != "tmpfs":
        pytest.skip("no tmpfs at /dev/shm")
    with pytest.raises(SystemExit, match="is on tmpfs, which is memory"):
        machine.refuse_memory(memory)
    with pytest.raises(SystemExit, match="is on tmpfs, which is memory"):
        Options.parse("benchmark", ["--dir", str(memory / "not there")])  # before anything is built
    assert Options.parse("benchmark", ["--dir", str(memory), "--tiny"]).tiny


def test_a_command_line_that_makes_no_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.results import Options

    for rounds in ("0", "-1", "some"):
        with pytest.raises(SystemExit):
            Options.parse("benchmark", ["--rounds", rounds])
        assert f"'{rounds}' is no number of rounds" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file is no directory"):
        Options.parse("benchmark", ["--dir", str(tmp_path / "file"), "--tiny"])


def test_options_are_the_same_in_a_process_of_another_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.results import Options

    monkeypatch.chdir(tmp_path)
    given = Options.make(directory=Path("scratch"), out=Path("out"), tiny=True, rounds=3).arguments()
    monkeypatch.chdir(ROOT)
    told = Options.parse("benchmark", given)
    assert told == Options(tmp_path / "scratch", tmp_path / "out", tiny=True, rounds=3)
    full = Options(tmp_path, tmp_path, tiny=False, rounds=None)
    monkeypatch.setattr("benchmarks.machine.refuse_memory", lambda directory: None)
    assert Options.parse("benchmark", full.arguments()) == full


def test_a_script_that_fails_fails_the_run_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "write.json").write_text("{}")  # of a run before, it must not pass for this one's
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_write.py",
            "--benchmark-only", "--tiny", "--bench-dir=/proc/nowhere", f"--bench-out={tmp_path}",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "No such file or directory: '/proc/nowhere'" in done.stdout
    assert " passed" not in done.stdout


def test_scale_runs_and_its_page_is_made_of_its_results(tmp_path: Path) -> None:
    run("benchmarks.scale", "--tiny", "--out", str(tmp_path), "--rounds", "2")
    document = json.loads((tmp_path / "scale.json").read_text())
    page = (tmp_path / "scale.md").read_text()
    assert document["tiny"]
    assert "figures mean nothing" in page
    assert str(ROOT) not in page
    for row in document["plans"]:
        assert min(row["served_s"]) > 0
        assert min(row["first_s"]) > 0
    for row in document["votes"]:
        assert row["real_clients"] + row["simulated"] == row["world_size"] - 1
        assert all(save["latency_s"] > 0 for save in (row["first"], *row["later"]))
        of = row["traffic"]
        assert of["first_save"]["one_rank"]["up_bytes"] > of["later_save"]["one_rank"]["up_bytes"]
        assert of["later_save"]["other_ranks"]["calls"] == 5 * (row["world_size"] - 1)
    assert [row["simulated"] for row in document["votes"]] == [2]


def test_the_committed_page_on_scale_is_made_of_the_committed_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.scale import page

    document = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text())
    assert not document["tiny"]
    assert page.page(document) == (ROOT / "docs" / "scale.md").read_text()


def test_the_committed_page_is_made_of_the_committed_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import matplotlib as mpl

    from benchmarks.render import render
    from benchmarks.sections import SECTIONS

    results = ROOT / "benchmarks" / "results"
    documents = [json.loads((results / f"{name}.json").read_text()) for name in SECTIONS]
    assert not any(document["tiny"] for document in documents)
    render(results, tmp_path / "benchmarks.md")
    assert (tmp_path / "benchmarks.md").read_text() == (ROOT / "docs" / "benchmarks.md").read_text()
    committed = ROOT / "docs" / "benchmarks"
    drawn = {path.name for path in (tmp_path / "benchmarks").iterdir()}
    assert drawn == {path.name for path in committed.iterdir()}
    if f"matplotlib=={mpl.__version__};" in (ROOT / "constraints.txt").read_text():  # another draws otherwise
        for name in drawn:
            assert (tmp_path / "benchmarks" / name).read_bytes() == (committed / name).read_bytes()
