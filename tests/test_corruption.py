"""Damage of every kind: it is found, named, and passed over; what is not damaged is never lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncckpt import AsyncCheckpointer, restore
from asyncckpt.errors import CorruptStepError, LoadError, NoIntactStepError
from asyncckpt.formats.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Fragment,
    FragmentRef,
    Manifest,
    fragment_name,
)
from tests.step_state import (
    BLOCK_NBYTES,
    DATA_FILE,
    HOST_MEMORY_NBYTES,
    LAYOUTS,
    TRACKER,
    StepState,
    hidden_names,
    pattern,
    step_directory,
    visible_steps,
)

STEPS = (10, 20, 30)
FRAGMENT_NAME = fragment_name(0)


def files_of(layout: str) -> list[str]:
    return [*([".metadata"] if layout == "dcp" else []), DATA_FILE[layout]]


def save(root: Path, layout: str, *steps: int, **options: Any) -> None:
    state = StepState()
    with AsyncCheckpointer(
        root, layout=layout, host_memory=HOST_MEMORY_NBYTES, **options, **state.parts
    ) as checkpointer:
        for step in steps:
            state.advance(step)
            checkpointer.save(step)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    roots = {layout: tmp_path_factory.mktemp(layout) for layout in LAYOUTS}
    for layout, root in roots.items():
        save(root, layout, *STEPS)
    return roots


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def root(pristine: dict[str, Path], layout: str, tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "root"
    shutil.copytree(pristine[layout], root)
    yield root
    assert hidden_names(root) == []


def load_latest(root: Path, layout: str) -> tuple[int | None, tuple[str, ...]]:
    """The step that is found, all its values checked, and why others were not."""
    state = StepState()
    with AsyncCheckpointer(root, layout=layout, read_only=True, **state.parts) as reader:
        resume = reader.load_latest()
    if resume is None:
        return None, ()
    assert resume.verified
    assert state.wrong(resume.step) == []
    return resume.step, resume.passed_over


def falls_back(root: Path, layout: str, *named: str) -> None:
    step, passed_over = load_latest(root, layout)
    assert step == 20
    assert len(passed_over) == 1
    for words in ("step 30", *named):
        assert words in passed_over[0]


def places(data: bytes, layout: str) -> dict[str, int]:
    """An offset of every kind of thing that a data file holds."""
    weight = pattern((96, 64), restore.torch.float32, "weight", 30, "").numpy().tobytes()
    found = {
        "first byte": 0,
        "last byte": len(data) - 1,
        "local header": data.index(b"PK\x03\x04") + 6,
        "name in a local header": data.index(b"/data.pkl") + 2,
        "padding": data.index(b"ZZZZ") + 1,
        "pickle": data.index(b"ctorch._utils") + 3,
        "tensor": data.index(weight) + len(weight) // 2,
        "last byte of a tensor": data.index(weight) + len(weight) - 1,
        "descriptor": data.index(b"PK\x07\x08") + 5,
        "central directory": data.rindex(b"PK\x01\x02") + 20,
        "end of central directory": data.rindex(b"PK\x05\x06") + 16,
    }
    return {**found, **{f"byte {i}/37": len(data) * i // 37 for i in range(1, 37)}}


def test_one_flipped_bit_in_a_data_file(root: Path, layout: str) -> None:
    path = step_directory(root, layout, 30) / DATA_FILE[layout]
    data = path.read_bytes()
    for number, (what, offset) in enumerate(places(data, layout).items()):
        damaged = bytearray(data)
        damaged[offset] ^= 1 << (number % 8)
        path.write_bytes(damaged)
        step, passed_over = load_latest(root, layout)
        assert step == 20, what
        assert f"{path}, block {offset // BLOCK_NBYTES}: CRC-32" in passed_over[0], what
    path.write_bytes(data)
    assert load_latest(root, layout) == (30, ())


def test_one_flipped_bit_in_the_metadata(pristine: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(pristine["dcp"], root)
    path = step_directory(root, "dcp", 30) / ".metadata"
    data = path.read_bytes()
    for offset in range(0, len(data), max(1, len(data) // 40)):
        damaged = bytearray(data)
        damaged[offset] ^= 1 << (offset % 8)
        path.write_bytes(damaged)
        falls_back(root, "dcp", f"{path}, block {offset // BLOCK_NBYTES}: CRC-32")


@pytest.mark.parametrize("name", [MANIFEST_NAME, FRAGMENT_NAME])
def test_one_flipped_bit_in_our_own_records(root: Path, layout: str, name: str) -> None:
    path = step_directory(root, layout, 30) / name
    data = path.read_bytes()
    for offset in range(0, len(data), max(1, len(data) // 40)):
        damaged = bytearray(data)
        damaged[offset] ^= 1 << (offset % 8)
        path.write_bytes(damaged)
        falls_back(root, layout, name)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _extend(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def _replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _replace_by_directory_of_that_size(path: Path) -> None:
    nbytes = path.stat().st_size
    path.unlink()
    path.mkdir()
    for number in range(nbytes // 250):  # a directory grows with the names in it
        (path / f"{number:0200}").touch()


def _link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _take_from_another_step(path: Path) -> None:
    older = next(p for p in path.parents if p.name.endswith("30"))
    shutil.copyfile(older.with_name(older.name.replace("30", "20")) / path.relative_to(older), path)


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _halve,
        _empty,
        _extend,
        Path.unlink,
        _replace_by_directory,
        _replace_by_directory_of_that_size,
        _link_to_nowhere,
        _link_to_itself,
        _take_from_another_step,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_file_is_not_what_it_was(root: Path, layout: str, damage: Callable[[Path], None]) -> None:
    directory = step_directory(root, layout, 30)
    intact = directory.with_name("intact")
    shutil.copytree(directory, intact)
    for name in (*files_of(layout), FRAGMENT_NAME, MANIFEST_NAME):
        damage(directory / name)
        if damage is _take_from_another_step and name == ".metadata":
            assert load_latest(root, layout) == (30, ())  # equal structure: equal bytes
        else:
            falls_back(root, layout, name if name != MANIFEST_NAME else str(directory))
        shutil.rmtree(directory)
        shutil.copytree(intact, directory)


def test_a_step_directory_under_another_number(root: Path, layout: str) -> None:
    step_directory(root, layout, 20).rename(step_directory(root, layout, 40))
    step, passed_over = load_latest(root, layout)
    assert step == 30
    assert "step 40" in passed_over[0]
    assert "holds step 20" in passed_over[0]


def test_a_file_in_place_of_a_step(root: Path, layout: str) -> None:
    step_directory(root, layout, 40).write_bytes(b"no directory")
    assert load_latest(root, layout) == (30, ())


def test_all_damaged_raises_and_save_refuses_until_a_load_succeeds(root: Path, layout: str) -> None:
    originals = {}
    for step in STEPS:
        path = step_directory(root, layout, step) / DATA_FILE[layout]
        originals[path] = path.read_bytes()
        _flip(path, len(originals[path]) // 2)
    state = StepState()
    with AsyncCheckpointer(
        root, layout=layout, host_memory=HOST_MEMORY_NBYTES, **state.parts
    ) as checkpointer:
        with pytest.raises(NoIntactStepError) as caught:
            checkpointer.load_latest()
        for step in STEPS:
            assert f"step {step}" in str(caught.value)
        state.advance(40)
        with pytest.raises(LoadError, match="refused until a load succeeds"):
            checkpointer.save(40)
        assert visible_steps(root, layout) == list(STEPS)
        path = step_directory(root, layout, 10) / DATA_FILE[layout]
        path.write_bytes(originals[path])
        resume = checkpointer.load_latest()
        assert resume is not None
        assert resume.step == 10
        assert len(resume.passed_over) == 2
        assert state.wrong(10) == []
        state.advance(11)
        checkpointer.save(11).wait()
    assert load_latest(root, layout) == (11, ())


def test_a_damaged_step_asked_for_by_number(root: Path, layout: str) -> None:
    path = step_directory(root, layout, 30) / DATA_FILE[layout]
    _flip(path, path.stat().st_size - 1)
    state = StepState()
    state.advance(7)
    with AsyncCheckpointer(
        root, layout=layout, host_memory=HOST_MEMORY_NBYTES, **state.parts
    ) as checkpointer:
        with pytest.raises(CorruptStepError) as caught:
            checkpointer.load(30, verify="before")
        assert caught.value.path == str(path)
        assert caught.value.block == (path.stat().st_size - 1) // BLOCK_NBYTES
        assert state.wrong(7) == []  # read twice, so that nothing was touched
        with pytest.raises(CorruptStepError):
            checkpointer.load(30)
        with pytest.raises(LoadError, match="refused"):
            checkpointer.save(31)
        assert checkpointer.load(20).step == 20
        assert state.wrong(20) == []


def test_nothing_committed_is_none(tmp_path: Path, layout: str) -> None:
    assert load_latest(tmp_path / "absent", layout) == (None, ())
    (tmp_path / "empty").mkdir()
    assert load_latest(tmp_path / "empty", layout) == (None, ())
    unfinished = step_directory(tmp_path / "unfinished", layout, 10) / DATA_FILE[layout]
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(b"another tool died here")
    assert load_latest(tmp_path / "unfinished", layout) == (None, ())


@pytest.mark.parametrize(
    "content", [None, b"", b"thirty", b"\xff\xfe", b"-1", b"99999999999999999999", b"70"]
)
def test_an_unreadable_tracker(pristine: dict[str, Path], tmp_path: Path, content: bytes | None) -> None:
    root = tmp_path / "root"
    shutil.copytree(pristine["megatron"], root)
    (root / TRACKER).unlink()
    if content is None:
        (root / TRACKER).mkdir()
    else:
        (root / TRACKER).write_bytes(content)
    assert load_latest(root, "megatron") == (30, ())
    if content is None:
        (root / TRACKER).rmdir()
    state = StepState()
    with AsyncCheckpointer(
        root, layout="megatron", host_memory=HOST_MEMORY_NBYTES, **state.parts
    ) as checkpointer:
        assert checkpointer.load_latest() is not None
        state.advance(40)
        checkpointer.save(40).wait()
    assert (root / TRACKER).read_bytes() == b"40"
    assert load_latest(root, "megatron") == (40, ())


# ---------------------------------------------------------------------------- lies with right checksums


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def sealed(fields: dict[str, Any]) -> bytes:
    """A record with a CRC that fits, whatever it says."""
    body = json.dumps({k: v for k, v in fields.items() if k != "crc32"}, indent=1).encode()[:-2]
    return body + b',\n "crc32": "%08x"\n}\n' % zlib.crc32(body)


def lie(directory: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Rewrite fragment and manifest with all CRCs right; `change` gets the fields of both."""
    fragment = json.loads((directory / FRAGMENT_NAME).read_bytes())
    manifest = json.loads((directory / MANIFEST_NAME).read_bytes())
    change(fragment, manifest)
    data = sealed(fragment)
    (directory / FRAGMENT_NAME).write_bytes(data)
    if manifest["fragments"]:
        manifest["fragments"][0].update(nbytes=len(data), crc=zlib.crc32(data))
    (directory / MANIFEST_NAME).write_bytes(sealed(manifest))


OUTSIDE = [
    "../outside",
    "/etc/hostname",
    "mp_rank_00/../../outside",
    "..",
    ".",
    "",
    "a//b",
    "a\\..\\b",
    "a\0b",
]


def test_the_forger_is_good_enough(root: Path, layout: str) -> None:
    lie(step_directory(root, layout, 30), lambda fragment, manifest: manifest["metadata"].update(forged=True))
    assert load_latest(root, layout) == (30, ())


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_record_with_a_path_outside_the_step(root: Path, layout: str, path: str) -> None:
    directory = step_directory(root, layout, 30)
    (root / "outside").write_bytes((directory / DATA_FILE[layout]).read_bytes())
    records = {name: (directory / name).read_bytes() for name in (FRAGMENT_NAME, MANIFEST_NAME)}

    lie(directory, lambda fragment, manifest: fragment["files"][0].update(path=path))
    falls_back(root, layout, FRAGMENT_NAME, "not a plain path")
    for name, data in records.items():
        (directory / name).write_bytes(data)

    manifest = json.loads(records[MANIFEST_NAME])
    manifest["fragments"][0]["path"] = path
    (directory / MANIFEST_NAME).write_bytes(sealed(manifest))
    falls_back(root, layout, MANIFEST_NAME, "not a plain path")


def test_metadata_that_points_outside_the_step(pristine: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(pristine["dcp"], root)
    directory = step_directory(root, "dcp", 30)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../step-20/__0_0.distcp"
    data = pickle.dumps(metadata)
    (directory / ".metadata").write_bytes(data)

    def vouch(fragment: dict[str, Any], manifest: dict[str, Any]) -> None:
        entries = [e for e in fragment["files"] if e["path"] != ".metadata"]
        blocks = [data[i : i + BLOCK_NBYTES] for i in range(0, len(data), BLOCK_NBYTES)]
        entry = FileEntry(".metadata", len(data), BLOCK_NBYTES, tuple(map(zlib.crc32, blocks)))
        text = Fragment(fragment["attempt"], 0, (entry,)).to_bytes()
        fragment["files"] = entries + json.loads(text)["files"]

    lie(directory, vouch)
    falls_back(root, "dcp", "not a plain path")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nbytes", 1 << 60),
        ("nbytes", -1),
        ("block_nbytes", 0),
        ("block_nbytes", 1 << 62),
        ("block_nbytes", 4097),
    ],
)
def test_a_record_with_absurd_sizes(root: Path, layout: str, field: str, value: int) -> None:
    lie(
        step_directory(root, layout, 30),
        lambda fragment, manifest: fragment["files"][0].update({field: value}),
    )
    falls_back(root, layout)


def test_a_record_without_the_file_that_holds_the_state(root: Path, layout: str) -> None:
    lie(step_directory(root, layout, 30), lambda fragment, manifest: fragment.update(files=[]))
    falls_back(root, layout, "does not list it")


def test_a_fragment_of_another_attempt(root: Path, layout: str) -> None:
    lie(
        step_directory(root, layout, 30),
        lambda fragment, manifest: fragment.update(attempt="f" * 16 + "-000001"),
    )
    falls_back(root, layout, FRAGMENT_NAME, "attempt")


def test_a_step_of_a_newer_format_is_not_taken_for_an_older_one(root: Path, layout: str) -> None:
    """It is not damaged: falling back would let the next save abandon it."""
    lie(step_directory(root, layout, 30), lambda fragment, manifest: manifest.update(format_version=2))
    with pytest.raises(LoadError, match=r"format version 2.*upgrade"):
        load_latest(root, layout)


def test_a_manifest_is_what_it_says_it_is() -> None:
    """The forger above and the real writer agree on the form; else the tests above prove nothing."""
    manifest = Manifest("a" * 16 + "-000001", 1, 2, "dcp", 1, ("main",), (FragmentRef("x.json", 1, 2),))
    fields = json.loads(manifest.to_bytes())
    assert sealed(fields) == manifest.to_bytes()


# ---------------------------------------------------------------------------- a loader and retention


@pytest.mark.parametrize("moment", ["read_tree", "read_tensors"])
@pytest.mark.parametrize("early", [True, False])
def test_a_step_that_vanishes_while_it_is_loaded(
    root: Path, layout: str, moment: str, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not early:
        monkeypatch.setattr(restore.StepFiles, "begin_early", lambda files: None)
    original = getattr(restore, moment)
    vanished = []

    def vanish(files: restore.StepFiles, *args: Any, **kwargs: Any) -> Any:
        if not vanished:
            vanished.append(files.directory.name)
            shutil.rmtree(files.directory)
        return original(files, *args, **kwargs)

    monkeypatch.setattr(restore, moment, vanish)
    step, passed_over = load_latest(root, layout)
    assert vanished == [step_directory(root, layout, 30).name]
    if early and moment == "read_tensors" and step == 30:
        return  # all its files were open by then: they lasted until they were read, and verified
    assert step == 20
    assert "deleted" in passed_over[0]


def test_a_loader_whose_every_choice_was_retired_meanwhile_chooses_again(
    root: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = restore.read_tree
    calls = []

    def overtaken(files: restore.StepFiles, *args: Any, **kwargs: Any) -> Any:
        calls.append(files.directory.name)
        if len(calls) == 1:  # the writer goes on, and keeps less than the loader has in its list
            monkeypatch.setattr(restore, "read_tree", original)
            save_on(root, layout)
        return original(files, *args, **kwargs)

    monkeypatch.setattr(restore, "read_tree", overtaken)
    step, _ = load_latest(root, layout)
    assert visible_steps(root, layout) == [40, 50]
    assert step == 50


def save_on(root: Path, layout: str) -> None:
    state = StepState()
    with AsyncCheckpointer(
        root, layout=layout, host_memory=HOST_MEMORY_NBYTES, keep_last=2, **state.parts
    ) as checkpointer:
        for step in (40, 50):
            state.advance(step)
            checkpointer.save(step)
