"""A loader beside a writer that deletes, and in a root that somebody else's hands were in."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from asyncckpt import AsyncCheckpointer, _native
from asyncckpt.errors import CheckpointError, LoadError, NoIntactStepError, OptionError
from asyncckpt.filesystem import Filesystem
from asyncckpt.formats.manifest import MANIFEST_NAME
from asyncckpt.layouts.megatron import TRACKER_NAME
from asyncckpt.steps import RootView, StepEntry

LAYOUTS = ["dcp", "megatron"]
STEP_NAME = {"dcp": "step-{}", "megatron": "iter_{:07d}"}


@pytest.fixture(autouse=True)
def no_faults_left() -> Iterator[None]:
    yield
    _native.faults.disarm()


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def write(root: Path, layout: str, *steps: int, **options: Any) -> None:
    """Steps whose weight is their number."""
    model = nn.Linear(8, 8)
    with AsyncCheckpointer(root, model=model, layout=layout, **options) as checkpointer:
        for step in steps:
            fill(model, step)
            checkpointer.save(step).wait()


def fill(model: nn.Linear, value: float) -> None:
    with torch.no_grad():
        model.weight.fill_(value)


# ---------------------------------------------------------------------------- retention overtakes a loader


def test_a_listing_that_retention_emptied_is_looked_at_again(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the loader's listing and its first look the writer commits 2 and deletes 1."""
    writer_model, model = nn.Linear(8, 8), nn.Linear(8, 8)
    with AsyncCheckpointer(tmp_path, model=writer_model, layout=layout, keep_last=1) as writer:
        fill(writer_model, 1)
        writer.save(1).wait()
        with AsyncCheckpointer(tmp_path, model=model, layout=layout, read_only=True) as reader:
            listdir = Filesystem.listdir
            overtaken: list[str] = []

            def overtake(fs: Filesystem, path: Path) -> list[str]:
                names = listdir(fs, path)
                if not overtaken and path == tmp_path:
                    overtaken.append(str(path))
                    fill(writer_model, 2)
                    writer.save(2).wait()
                return names

            monkeypatch.setattr(Filesystem, "listdir", overtake)
            resume = reader.load_latest()
    assert overtaken
    assert resume is not None
    assert resume.step == 2
    assert bool((model.weight == 2).all())


def test_one_empty_listing_does_not_mean_that_nothing_is_good(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, layout, 1, 2)
    model = nn.Linear(8, 8)
    candidates = RootView.candidates
    asked: list[int] = []

    def empty_at_first(root: RootView, below: int | None = None) -> list[StepEntry]:
        asked.append(1)
        return candidates(root, below) if len(asked) > 1 else []

    monkeypatch.setattr(RootView, "candidates", empty_at_first)
    with AsyncCheckpointer(tmp_path, model=model, layout=layout, read_only=True) as checkpointer:
        resume = checkpointer.load_latest()
    assert resume is not None
    assert (resume.step, resume.passed_over) == (2, ())
    assert bool((model.weight == 2).all())


def test_listings_that_stay_empty_come_to_an_end(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, layout, 1)
    monkeypatch.setattr(RootView, "candidates", lambda root, below=None: [])
    with (
        AsyncCheckpointer(tmp_path, model=nn.Linear(8, 8), layout=layout, read_only=True) as checkpointer,
        pytest.raises(NoIntactStepError),
    ):
        checkpointer.load_latest()


# ---------------------------------------------------------------------------- a newer version wrote here


def newer(step: Path) -> None:
    """The step as a version of ours to come may write it: all sums are right."""
    path = step / MANIFEST_NAME
    fields = json.loads(path.read_bytes())
    fields.pop("crc32")
    fields["format_version"] = 7
    body = json.dumps(fields, indent=1).encode()[:-2]
    path.write_bytes(body + b',\n "crc32": "%08x"\n}\n' % zlib.crc32(body))


def contents(step: Path) -> dict[str, bytes]:
    return {str(path.relative_to(step)): path.read_bytes() for path in step.rglob("*") if path.is_file()}


@pytest.mark.parametrize("read_only", [False, True])
def test_a_step_of_a_newer_version_is_not_fallen_back_from(
    tmp_path: Path, layout: str, read_only: bool
) -> None:
    write(tmp_path, layout, 1, 2)
    newer(tmp_path / STEP_NAME[layout].format(2))
    model = nn.Linear(8, 8)
    fill(model, -1)
    with AsyncCheckpointer(tmp_path, model=model, layout=layout, read_only=read_only) as checkpointer:
        with pytest.raises(LoadError, match=r"\b7\b") as caught:
            checkpointer.load_latest()
        assert not isinstance(caught.value, NoIntactStepError)
        assert bool((model.weight == -1).all())
        with pytest.raises(LoadError, match=r"\b7\b"):
            checkpointer.load(2)
        assert checkpointer.load(1).step == 1  # who asks for an older one by number gets it
    assert bool((model.weight == 1).all())


@pytest.mark.parametrize("loading", [False, True])
def test_saving_on_leaves_a_step_of_a_newer_version_where_it_is(
    tmp_path: Path, layout: str, loading: bool
) -> None:
    write(tmp_path, layout, 1, 2)
    step = tmp_path / STEP_NAME[layout].format(2)
    newer(step)
    before = contents(step)
    with AsyncCheckpointer(
        tmp_path, model=nn.Linear(8, 8), layout=layout, keep_last=1, on_error="warn"
    ) as checkpointer:
        if loading:
            with pytest.raises(LoadError):
                checkpointer.load_latest()
        for number in (2, 3, 4):
            try:
                checkpointer.save(number).wait()
            except CheckpointError:
                logging.getLogger(__name__).info("step %d was refused, which is as good", number)
    assert contents(step) == before
    assert not list(tmp_path.glob(".abandoned-*"))
    assert not [path for path in tmp_path.glob(".asyncckpt-*") if path.is_dir()]


# ---------------------------------------------------------------------------- the other layout


@pytest.mark.parametrize("read_only", [False, True])
def test_steps_of_the_other_layout_are_not_nothing(tmp_path: Path, layout: str, read_only: bool) -> None:
    other = next(name for name in LAYOUTS if name != layout)
    write(tmp_path, other, 1, 2)
    with (
        AsyncCheckpointer(
            tmp_path, model=nn.Linear(8, 8), layout=layout, read_only=read_only
        ) as checkpointer,
        pytest.raises(OptionError, match=other),
    ):
        checkpointer.load_latest()


def test_a_root_with_steps_of_both_layouts_is_each_ones_own(tmp_path: Path, layout: str) -> None:
    write(tmp_path, "dcp", 1)
    write(tmp_path, "megatron", 2)
    with AsyncCheckpointer(tmp_path, model=nn.Linear(8, 8), layout=layout) as checkpointer:
        resume = checkpointer.load_latest()
    assert resume is not None
    assert resume.step == {"dcp": 1, "megatron": 2}[layout]


def test_what_is_no_step_of_any_layout_is_nothing(tmp_path: Path, layout: str) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "step-x").mkdir()
    (tmp_path / "iter_").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with AsyncCheckpointer(tmp_path, model=nn.Linear(8, 8), layout=layout) as checkpointer:
        assert checkpointer.load_latest() is None


@pytest.mark.parametrize("at", range(12))
def test_a_first_step_that_appears_while_somebody_looks_is_no_damage(tmp_path: Path, at: int) -> None:
    """Another run commits its first step right before the reader's `at`-th look at the disk."""
    with AsyncCheckpointer(tmp_path / "there", model=nn.Linear(2, 2), layout="megatron") as checkpointer:
        checkpointer.save(1).wait()
    root, looks = tmp_path / "root", [0]
    root.mkdir()

    def observer(op: str, path: str) -> None:
        if looks[0] == at:
            (tmp_path / "there/iter_0000001").rename(root / "iter_0000001")
            (tmp_path / "there" / TRACKER_NAME).rename(root / TRACKER_NAME)
        looks[0] += 1

    with AsyncCheckpointer(root, model=nn.Linear(2, 2), layout="megatron", read_only=True) as reader:
        reader._root.fs = Filesystem(observer)
        resume = reader.load_latest()
    assert looks[0] > at or resume is None
    assert resume is None or resume.step == 1
