"""The manifest: what is written comes back, and nothing else is let in."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt.errors import CorruptStepError, LoadError, OptionError
from asyncckpt.formats.manifest import (
    FORMAT_VERSION,
    FileEntry,
    Fragment,
    FragmentRef,
    Manifest,
    check_path,
    fragment_name,
)

BAD_PATHS = [
    "", "/etc/passwd", "..", "../other_step/file", "a/../b", "a/..", ".", "./a", "a/.", "a//b", "a/", "/",
    "a\\b", "..\\a", "C:\\a", "a\0b", "\0", "\ud800",
]  # fmt: skip

counts = st.integers(0, 2**63)
texts = st.text(min_size=1)
names = st.text(st.characters(exclude_characters="/\\\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name not in (".", "..")
)
paths = st.lists(names, min_size=1, max_size=4).map("/".join)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@st.composite
def file_entries(draw: st.DrawFn, path: str) -> FileEntry:
    blocks = draw(st.integers(0, 5))
    block_nbytes = draw(st.integers(1, 2**40))
    nbytes = blocks * block_nbytes - (draw(st.integers(0, block_nbytes - 1)) if blocks else 0)
    crcs = draw(st.lists(st.integers(0, 2**32 - 1), min_size=blocks, max_size=blocks))
    return FileEntry(path, nbytes, block_nbytes, tuple(crcs))


@st.composite
def fragments(draw: st.DrawFn) -> Fragment:
    files = [draw(file_entries(path)) for path in draw(st.lists(paths, unique=True, max_size=4))]
    return Fragment(draw(texts), draw(counts), tuple(files))


@st.composite
def part_sizes(draw: st.DrawFn) -> dict[str, int]:
    return draw(st.dictionaries(texts, st.integers(1, 2**20), min_size=1, max_size=4))


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    return Manifest(
        attempt=draw(texts),
        ordinal=draw(st.integers(1, 2**63)),
        step=draw(counts),
        layout=draw(texts),
        world_size=draw(st.integers(1, 2**20)),
        parts=tuple(draw(st.lists(texts, max_size=3))),
        fragments=tuple(
            FragmentRef(path, draw(counts), draw(st.integers(0, 2**32 - 1)))
            for path in draw(st.lists(paths, unique=True, min_size=1, max_size=4))
        ),
        metadata=draw(st.dictionaries(st.text(), json_values, max_size=4)),
    )


FRAGMENT = Fragment(
    "0123456789abcdef-000001", 0, (FileEntry("mp_rank_00/model.pt", 9, 4, (1, 2**31, 2**32 - 1)),)
)
MANIFEST = Manifest(
    attempt="0123456789abcdef-000001",
    ordinal=3,
    step=50,
    layout="dcp",
    world_size=1,
    parts=("main",),
    fragments=(FragmentRef(fragment_name(0), 345, 0xDEADBEEF),),
    metadata={"note": "ä", "lr": 1e-3},
)


def sealed(fields: Any) -> bytes:
    """Any JSON, with the CRC that makes it look like ours: what a hostile writer can do."""
    body = json.dumps(fields, indent=1).removesuffix("\n}").encode()
    return body + b',\n "crc32": "%08x"\n}\n' % zlib.crc32(body)


def fields_of(data: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(data)
    del fields["crc32"]
    return fields


@settings(deadline=None)
@given(fragments())
def test_fragment_round_trip(fragment: Fragment) -> None:
    assert Fragment.from_bytes(fragment.to_bytes()) == fragment


@settings(deadline=None)
@given(manifests())
def test_manifest_round_trip(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    assert Manifest.from_bytes(data) == manifest
    assert fields_of(data)["step"] == manifest.step  # plain JSON to everybody else


PARSERS: list[tuple[bytes, Callable[[bytes], object]]] = [
    (FRAGMENT.to_bytes(), Fragment.from_bytes),
    (MANIFEST.to_bytes(), Manifest.from_bytes),
]


@pytest.mark.parametrize(("data", "parse"), PARSERS, ids=["fragment", "manifest"])
def test_every_flipped_bit_is_found(data: bytes, parse: Callable[[bytes], object]) -> None:
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptStepError):
            parse(bytes(damaged))


@pytest.mark.parametrize(("data", "parse"), PARSERS, ids=["fragment", "manifest"])
def test_every_truncation_and_extension_is_found(data: bytes, parse: Callable[[bytes], object]) -> None:
    for end in range(len(data)):
        with pytest.raises(CorruptStepError):
            parse(data[:end])
    for tail in (b"\n", b" ", b"\0", data):
        with pytest.raises(CorruptStepError):
            parse(data + tail)


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_are_refused_in_an_orderly_way(data: bytes) -> None:
    for parse in (Fragment.from_bytes, Manifest.from_bytes):
        with pytest.raises(LoadError):
            parse(data)
        with pytest.raises(LoadError):
            parse(data + b',\n "crc32": "%08x"\n}\n' % zlib.crc32(data))


@settings(deadline=None)
@given(json_values)
def test_any_json_with_a_good_crc_is_refused_in_an_orderly_way(value: Any) -> None:
    for key in fields_of(MANIFEST.to_bytes()):
        fields = {**fields_of(MANIFEST.to_bytes()), key: value}
        try:
            manifest = Manifest.from_bytes(sealed(fields))
        except LoadError:
            continue
        assert Manifest.from_bytes(manifest.to_bytes()) == manifest


@pytest.mark.parametrize("path", BAD_PATHS)
def test_paths_outside_the_step_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        check_path(path)
    fields = fields_of(FRAGMENT.to_bytes())
    fields["files"][0]["path"] = path
    with pytest.raises(CorruptStepError, match="path"):
        Fragment.from_bytes(sealed(fields), "here")
    fields = fields_of(MANIFEST.to_bytes())
    fields["fragments"][0]["path"] = path
    with pytest.raises(CorruptStepError, match="path"):
        Manifest.from_bytes(sealed(fields), "here")


def test_a_path_twice_is_refused() -> None:
    fields = fields_of(FRAGMENT.to_bytes())
    fields["files"] *= 2
    with pytest.raises(CorruptStepError, match="listed twice"):
        Fragment.from_bytes(sealed(fields))
    fields = fields_of(MANIFEST.to_bytes())
    fields["fragments"] *= 2
    with pytest.raises(CorruptStepError, match="listed twice"):
        Manifest.from_bytes(sealed(fields))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nbytes", -1), ("nbytes", 1.0), ("nbytes", True), ("nbytes", "9"), ("nbytes", 13), ("nbytes", 8),
        ("nbytes", 10**30), ("block_nbytes", 0), ("block_nbytes", -4), ("block_nbytes", 5),
        ("block_crcs", ""), ("block_crcs", "AAAA"), ("block_crcs", "!!!!"), ("block_crcs", "ä"),
        ("block_crcs", [1, 2, 3]), ("path", None),
    ],
)  # fmt: skip
def test_files_whose_blocks_do_not_tile_them_are_refused(key: str, value: object) -> None:
    fields = fields_of(FRAGMENT.to_bytes())
    fields["files"][0][key] = value
    with pytest.raises(CorruptStepError):
        Fragment.from_bytes(sealed(fields))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -1), ("step", True), ("step", "50"), ("ordinal", 0), ("world_size", 0), ("layout", ""),
        ("attempt", None), ("parts", [1]), ("parts", "main"), ("fragments", []), ("fragments", [None]),
        ("metadata", []), ("format_version", 0), ("format_version", "1"), ("format_version", None),
    ],
)  # fmt: skip
def test_manifests_with_wrong_fields_are_refused(key: str, value: object) -> None:
    fields = {**fields_of(MANIFEST.to_bytes()), key: value}
    with pytest.raises(CorruptStepError, match=r"^corrupt: some/where"):
        Manifest.from_bytes(sealed(fields), "some/where")
    del fields[key]
    with pytest.raises(CorruptStepError):
        Manifest.from_bytes(sealed(fields))


def test_newer_versions_are_told_from_damage() -> None:
    fields = {"format_version": FORMAT_VERSION + 1, "all": "different"}
    for parse in (Fragment.from_bytes, Manifest.from_bytes):
        with pytest.raises(LoadError, match="upgrade") as caught:
            parse(sealed(fields))
        assert not isinstance(caught.value, CorruptStepError)


@pytest.mark.parametrize(
    "body",
    [
        b'{"format_version": 1, "step": NaN',
        b'{"format_version": 1, "format_version": 1',
        b'{"format_version": ' + b"[" * 100_000,
        b'{"format_version": ' + b"9" * 10_000,
        b"\xff\xfe",
    ],
    ids=["nan", "duplicate-key", "deep", "long-number", "not-text"],
)
def test_hostile_json_is_refused(body: bytes) -> None:
    with pytest.raises(LoadError):
        Manifest.from_bytes(body + b',\n "crc32": "%08x"\n}\n' % zlib.crc32(body))


@pytest.mark.parametrize(
    "metadata", [{"a": float("nan")}, {"a": {1}}, {1: "a"}, {"a": (1, 2)}, {"a": b"bytes"}, {"a": {None: 1}}]
)
def test_metadata_that_json_would_change_is_refused(metadata: dict[Any, Any]) -> None:
    manifest = Manifest("a", 1, 0, "dcp", 1, (), (FragmentRef("f", 1, 2),), metadata)
    with pytest.raises(OptionError, match="metadata is not JSON"):
        manifest.to_bytes()


def test_fragment_reference_verifies() -> None:
    data = FRAGMENT.to_bytes()
    ref = FragmentRef(fragment_name(0), len(data), zlib.crc32(data))
    ref.verify(data, "here")
    with pytest.raises(CorruptStepError, match=f"{len(data)} bytes expected"):
        ref.verify(data + b" ", "here")
    with pytest.raises(CorruptStepError, match="CRC-32"):
        ref.verify(data[:-1] + b" ", "here")


def test_a_terabyte_stays_small() -> None:
    blocks = 2**40 // 2**22
    fragment = Fragment("a", 0, (FileEntry("big", 2**40, 2**22, tuple(range(blocks))),))
    data = fragment.to_bytes()
    assert len(data) < 6 * blocks
    assert Fragment.from_bytes(data) == fragment


@given(manifests(), part_sizes())
def test_parts_say_how_many_ranks_each_had(manifest: Manifest, sizes: dict[str, int]) -> None:
    declared = replace(
        manifest,
        world_size=sum(sizes.values()),
        parts=tuple(sizes),
        part_world_sizes=tuple(sizes.values()),
    )
    found = Manifest.from_bytes(declared.to_bytes())
    assert found == declared
    assert found.world_sizes == sizes


def test_a_manifest_without_parts_is_what_it_was_before_there_were_any() -> None:
    assert b"part_world_sizes" not in MANIFEST.to_bytes()
    assert Manifest.from_bytes(MANIFEST.to_bytes()).world_sizes == {"main": MANIFEST.world_size}


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [(("a", "b"), (1,)), (("a", "b"), (1, 5)), (("a", "a"), (1, 3)), (("a", "b"), (4, 0)), (("a",), (True,))],
)
def test_parts_that_do_not_add_up(parts: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="part"):
        replace(MANIFEST, world_size=4, parts=parts, part_world_sizes=sizes)
