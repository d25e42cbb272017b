"""The last looks before a step becomes visible: is the root still ours, and was nothing torn?"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from asyncckpt import AsyncCheckpointer, _native
from asyncckpt.errors import CheckpointError, TornStateError
from asyncckpt.lease import LEASE_NAME, LeaseRecord

LAYOUTS = ("dcp", "megatron")
STRANGER = LeaseRecord("stranger", "elsewhere", "another-boot", 4242, "2024-01-01T00:00:00+0000", 7)
Op, Kind = _native.faults.Op, _native.faults.Kind


@pytest.fixture(autouse=True)
def no_faults_left() -> Iterator[None]:
    yield
    _native.faults.disarm()


def visible(root: Path) -> dict[str, bytes]:
    """Everything that a tool could take for a checkpoint."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.relative_to(root).parts[0].startswith(".")
    }


def read_by_another(path: Path) -> bytes:
    """Not by this process: if it closes the file, it loses a lock that it may hold."""
    return subprocess.run(["cat", path], stdout=subprocess.PIPE, check=True).stdout


def remove(lease: Path) -> None:
    lease.unlink()


def replace(lease: Path) -> None:
    other = lease.with_name(".stranger")
    other.write_bytes(STRANGER.to_bytes())
    other.replace(lease)


def overwrite(lease: Path) -> None:
    other = lease.with_name(".stranger")
    other.write_bytes(STRANGER.to_bytes())
    subprocess.run(["cp", other, lease], check=True)
    other.unlink()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lose", [remove, replace, overwrite])
@pytest.mark.parametrize("at", ["submitted", "written", "checked", "manifest"])
def test_a_lease_lost_during_a_save_fails_it_unseen(
    tmp_path: Path, layout: str, lose: Callable[[Path], None], at: str
) -> None:
    lease = tmp_path / LEASE_NAME
    phases: list[str] = []

    def on_phase(step: int, phase: str) -> None:
        if step == 2:
            phases.append(phase)
            if phase == at:
                lose(lease)

    model = nn.Linear(8, 8)
    checkpointer = AsyncCheckpointer(
        tmp_path, model=model, layout=layout, host_memory=1 << 16, keep_last=1, on_phase=on_phase
    )
    checkpointer.save(1).wait()
    before = visible(tmp_path)
    with torch.no_grad():
        model.weight.add_(1)
    handle = checkpointer.save(2)
    with pytest.raises(CheckpointError, match=rf"{LEASE_NAME}: lost"):
        handle.wait()
    assert phases.count(at) == 1
    assert not {"abandoned", "renamed", "durable", "tracked", "retained"} & set(phases)
    assert handle.report.durable_s is None
    assert visible(tmp_path) == before
    assert checkpointer.steps() == [1]
    assert list(tmp_path.glob(".asyncckpt-tmp-*")) == []

    # The root is not ours any more: not for the next save either, nor to be signed off.
    with pytest.raises(CheckpointError, match=rf"{LEASE_NAME}: lost"):
        checkpointer.save(3).wait()
    checkpointer.close()
    assert visible(tmp_path) == before
    if lose is remove:
        assert not lease.exists()
    else:
        assert read_by_another(lease) == STRANGER.to_bytes()


class Observed(threading.Event):
    """Tells when somebody begins to wait for it."""

    def __init__(self, waited_for: threading.Event) -> None:
        super().__init__()
        self._waited_for = waited_for

    def wait(self, timeout: float | None = None) -> bool:
        self._waited_for.set()
        return super().wait(timeout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("torn", [True, False], ids=["torn", "whole"])
def test_a_written_save_waits_unseen_until_training_has_checked_it(
    tmp_path: Path, layout: str, torn: bool
) -> None:
    phases: list[str] = []
    written, decided = threading.Event(), threading.Event()  # decided: it waits, or goes on without

    def on_phase(_step: int, phase: str) -> None:
        phases.append(phase)
        if phase == "written":
            written.set()
        elif phase in ("checked", "manifest"):
            decided.set()

    model = nn.Linear(64, 64)
    with AsyncCheckpointer(
        tmp_path, model=model, layout=layout, host_memory=1 << 20, on_phase=on_phase
    ) as checkpointer:
        _native.faults.arm(Op.copy, 0, Kind.pause)
        try:
            handle = checkpointer.save(1)
            assert _native.faults.wait_for_hits(Op.copy, 1)
            handle._save.checked = Observed(decided)
            if torn:
                with torch.no_grad():
                    model.weight.add_(1)
        finally:
            _native.faults.disarm()
        assert written.wait(30)
        assert decided.wait(30)
        assert not {"checked", "manifest", "renamed"} & set(phases)
        assert checkpointer.steps() == []
        assert visible(tmp_path) == {}
        checkpointer.fence()
        if torn:
            with pytest.raises(TornStateError, match=r"model\.weight"):
                handle.wait()
        else:
            handle.wait()
        assert checkpointer.steps() == ([] if torn else [1])
        assert bool(visible(tmp_path)) is not torn
