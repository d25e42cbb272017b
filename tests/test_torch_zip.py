"""The torch.save container: our bytes are torch's bytes, and what we read is what zipfile reads."""

from __future__ import annotations

import io
import os
import struct
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt.formats import pickles, torch_zip
from asyncckpt.formats.image import LITERAL, FileImage, ImageBuilder
from asyncckpt.formats.refs import SparseRef, TensorRef
from tests.strategies import foreign, harmless, same, scalars, storage_bytes, trees

THOROUGH = settings(max_examples=200, deadline=None)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """One directory for all examples of a property."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def image_of(tree: Any, file_name: str, slot_nbytes: int = 0) -> tuple[FileImage, list[bytes]]:
    """Our image of `tree` and the bytes of its sources; the pickle is padded to `slot_nbytes`."""
    pickled = pickles.pickle_tree(tree, where="tree")
    data = pickled.data.ljust(slot_nbytes, b"\0")
    builder = ImageBuilder(file_name)
    storages = [(key + 1, storage.nbytes()) for key, storage in enumerate(pickled.storages)]
    torch_zip.lay_out(builder, torch_zip.stem_of(file_name), (0, len(data)), storages)
    return builder.build(), [data, *(storage_bytes(storage) for storage in pickled.storages)]


def ours(tree: Any, file_name: str = "model.pt", slot_nbytes: int = 0) -> bytes:
    image, sources = image_of(tree, file_name, slot_nbytes)
    return image.render(sources)


def torchs(tree: Any, path: Path) -> bytes:
    torch.save(tree, path)
    return path.read_bytes()


def masked(data: bytes) -> bytes:
    """An archive with the serialization id and its two CRCs blanked: all that may differ."""
    blank = bytearray(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("serialization_id"))
        name_nbytes, extra_nbytes = struct.unpack_from("<2H", data, info.header_offset + 26)
        begin = info.header_offset + 30 + name_nbytes + extra_nbytes
        blank[begin : begin + 40 + 8] = bytes(48)  # the id, the descriptor's magic and CRC
        entry = data.index(info.filename.encode(), archive.start_dir) - 46
        blank[entry + 16 : entry + 20] = bytes(4)
    return bytes(blank)


def reader(data: bytes) -> torch_zip.Read:
    return lambda offset, nbytes: data[offset : offset + nbytes]


def restored(tree: Any, data: bytes, memory: dict[str, torch.UntypedStorage]) -> Any:
    """`tree` with its refs made into tensors from the bytes of the file."""
    if isinstance(tree, TensorRef):
        raw = data[tree.data_offset : tree.data_offset + tree.storage_nbytes]
        if tree.key not in memory:
            memory[tree.key] = (
                torch.frombuffer(bytearray(raw), dtype=torch.uint8).untyped_storage()
                if raw
                else torch.UntypedStorage(0)
            )
        empty = torch.empty(0, dtype=tree.dtype)
        tensor = empty.set_(memory[tree.key], tree.storage_offset, tree.shape, tree.stride)
        tensor = tensor.conj() if tree.conj else tensor
        if tree.is_parameter:
            return torch.nn.Parameter(tensor, requires_grad=tree.requires_grad)
        return tensor.requires_grad_(tree.requires_grad)
    if isinstance(tree, SparseRef):
        return torch._utils._rebuild_sparse_tensor(
            tree.layout,
            (*(restored(part, data, memory) for part in tree.parts), torch.Size(tree.shape))
            + ((tree.is_coalesced,) if tree.layout is torch.sparse_coo else ()),
        )
    if type(tree) in (dict, OrderedDict):
        return type(tree)((key, restored(value, data, memory)) for key, value in tree.items())
    if type(tree) in (list, tuple):
        return type(tree)(restored(value, data, memory) for value in tree)
    return tree


# ---------------------------------------------------------------------------- writing


@THOROUGH
@given(trees(st.one_of(harmless(), foreign()), sparse=True))
def test_our_bytes_are_torchs_bytes(scratch: Path, tree: dict[str, Any]):
    path = scratch / "model.v1.pt"
    image, sources = image_of(tree, path.name)
    written = image.render(sources)
    assert masked(written) == masked(torchs(tree, path))
    assert zipfile.ZipFile(io.BytesIO(written)).testzip() is None
    ends = image.extents[:, 0] + image.extents[:, 1]
    assert image.extents[:, 0].tolist() == [0, *ends[:-1].tolist()]
    assert ends[-1] == image.nbytes
    path.write_bytes(written)
    assert same(tree, torch.load(path, weights_only=False))


@THOROUGH
@given(trees(scalars()), st.integers(0, 300))
def test_plain_trees_load_in_every_mode(scratch: Path, tree: dict[str, Any], padding: int):
    """Also with a pickle that is shorter than its slot."""
    path = scratch / "plain.pt"
    slot_nbytes = len(pickles.pickle_tree(tree, where="tree").data) + padding
    path.write_bytes(ours(tree, path.name, slot_nbytes))
    assert same(tree, torch.load(path, weights_only=True))
    assert same(tree, torch.load(path, weights_only=True, mmap=True))
    assert same(tree, torch.load(path, weights_only=False))
    on_meta = torch.load(path, weights_only=True, map_location="meta")
    assert [str(key) for key in on_meta] == [str(key) for key in tree]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_offsets_that_torch_recomputes_are_right(tmp_path: Path):
    """With this option torch.load ignores the directory and works the offsets out by miniz's rules."""
    tree = {f"layer.{i}": torch.full((i % 5,), float(i)) for i in range(40)}
    path = tmp_path / "model.pt"
    path.write_bytes(ours(tree, path.name, 4000))
    option = torch.utils.serialization.config.load
    option.calculate_storage_offsets = True
    try:
        assert same(tree, torch.load(path, mmap=True))
    finally:
        option.calculate_storage_offsets = False


def test_one_image_serves_every_save_of_the_same_sizes(tmp_path: Path):
    weight, path = torch.arange(5.0), tmp_path / "model.pt"
    image, _ = image_of({"weight": weight, "step": 1}, path.name)
    weight.mul_(-3)
    tree = {"weight": weight, "step": 2}
    pickled = pickles.pickle_tree(tree, where="tree")
    assert masked(image.render([pickled.data, storage_bytes(weight.untyped_storage())])) == masked(
        torchs(tree, path)
    )


def test_archives_are_appended_with_their_own_offsets():
    trees_ = [{"a": torch.ones(3)}, [torch.zeros(0), "text"], torch.arange(100)]
    builder, sources, spans = ImageBuilder("__0_0.distcp"), [], []
    builder.literal(b"seven b")  # alignment counts from the archive's start, wherever that is
    for tree in trees_:
        pickled = pickles.pickle_tree(tree, where="tree")
        first, start = len(sources), builder.offset
        sources += [pickled.data, *(storage_bytes(storage) for storage in pickled.storages)]
        storages = [(first + 1 + key, storage.nbytes()) for key, storage in enumerate(pickled.storages)]
        torch_zip.lay_out(builder, "archive", (first, len(pickled.data)), storages)
        spans.append((start, builder.offset))
    whole = builder.build().render(sources)
    for tree, (start, end) in zip(trees_, spans, strict=True):
        stock = io.BytesIO()
        torch.save(tree, stock)
        assert masked(whole[start:end]) == masked(stock.getvalue())
        ref = torch_zip.read_tree(reader(whole), start, end - start)
        assert same(tree, restored(ref, whole, {}))


def test_a_literal_pickle_gives_the_same_bytes():
    tree = [torch.ones(3)]
    pickled = pickles.pickle_tree(tree, where="tree")
    builder = ImageBuilder("x.pt")
    torch_zip.lay_out(builder, "x", pickled.data, [(0, 12)])
    assert builder.build().render([storage_bytes(tree[0].untyped_storage())]) == ours(tree, "x.pt")


GIB4 = 1 << 32


@pytest.mark.parametrize(
    "sizes",
    [
        [5, GIB4 + 7, 0, 10],  # a large storage, then an empty and a small one at large offsets
        [GIB4 - 1, 5],  # the first size that needs 64 bits
        [GIB4 - 2, 5],  # the last that does not, then an offset that does
        [GIB4 - 1200, 0, 5, 0, 7],  # the offset passes the limit among the small ones
    ],
)
def test_beyond_4_gib_every_header_is_torchs(tmp_path: Path, sizes: list[int]):
    """skip_data makes torch write all of an archive but the storages' bytes: the file stays sparse."""
    tree = [torch.UntypedStorage(nbytes) for nbytes in sizes]
    path = tmp_path / "big.pt"
    with torch.serialization.skip_data():
        torch.save(tree, path)
    pickled = pickles.pickle_tree(tree, where="tree")
    builder = ImageBuilder(path.name)
    torch_zip.lay_out(builder, "big", pickled.data, [(0, nbytes) for nbytes in sizes])
    image = builder.build()
    assert image.nbytes == path.stat().st_size
    free = {offset + i for offset, _ in image.fixups.tolist() for i in range(4)}  # CRCs of what was skipped
    with path.open("rb") as file:

        def read(offset: int, nbytes: int) -> bytes:
            return os.pread(file.fileno(), nbytes, offset)

        records = torch_zip.read_directory(read, 0, image.nbytes)
        begin = records[torch_zip.SERIALIZATION_ID].data_offset
        free |= set(range(begin, begin + 48))
        crc_of_id = zlib.crc32(read(begin, 40)).to_bytes(4, "little")
        for offset, nbytes, source, start, _ in image.extents.tolist():
            if source != LITERAL:
                continue
            stock, literal = read(offset, nbytes), image.literals[start : start + nbytes]
            differing = {offset + i for i in range(nbytes) if stock[i] != literal[i]} - free
            if differing:  # only the second CRC of the id, in the directory
                at = min(differing) - offset
                assert max(differing) - min(differing) < 4
                assert crc_of_id in stock[at - 3 : at + 4]
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                record = records[info.filename.partition("/")[2]]
                name_nbytes, extra_nbytes = struct.unpack("<2H", read(info.header_offset + 26, 4))
                assert record.data_offset == info.header_offset + 30 + name_nbytes + extra_nbytes
                assert record.nbytes == info.file_size


def test_more_entries_than_16_bits_count(tmp_path: Path):
    tree = [torch.UntypedStorage(i % 2) for i in range(65_536)]
    for storage in tree:
        storage.fill_(7)
    path = tmp_path / "many.pt"
    stock = torchs(tree, path)
    written = ours(tree, path.name)
    assert masked(written) == masked(stock)
    assert len(torch_zip.read_directory(reader(written), 0, len(written))) == 65_536 + 6


def test_another_alignment_is_torchs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save = pytest.importorskip("torch.utils.serialization.config").save
    if not hasattr(save, "storage_alignment"):
        pytest.skip("this torch has one alignment only")
    tree, path = {"a": torch.ones(3), "b": torch.ones(2000)}, tmp_path / "aligned.pt"
    before = save.storage_alignment
    save.storage_alignment = 4096
    try:
        stock, written = torchs(tree, path), ours(tree, path.name)
    finally:
        save.storage_alignment = before
    assert masked(written) == masked(stock)
    assert torch_zip.read_directory(reader(stock), 0, len(stock))["data/1"].data_offset % 4096 == 0
    assert same(tree, restored(torch_zip.read_tree(reader(stock), 0, len(stock)), stock, {}))


def test_an_older_dialect_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Storages in the order of their names, no record of version or alignment: as torch 2.4 wrote."""
    order = (("data.pkl", b""), ("byteorder", b"little"), ("data/*", b""), ("version", b"3\n"))
    monkeypatch.setattr(torch_zip, "dialect", lambda: torch_zip.Dialect(order, 64, lexicographic=True))
    tree, path = [torch.full((3,), float(i)) for i in range(12)], tmp_path / "old.pt"
    path.write_bytes(ours(tree, path.name))
    names = zipfile.ZipFile(path).namelist()
    assert names.index("old/data/10") == names.index("old/data/1") + 1
    assert same(tree, torch.load(path, weights_only=True, mmap=True))
    assert same(tree, torch.load(path, weights_only=False))


@pytest.mark.parametrize("name", ["model.pt", "model.v1.pt", "noext", "dir.d/x.bin", "gewürz.pt"])
def test_the_stem_is_torchs(tmp_path: Path, name: str):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    torch.save([1], path)
    assert zipfile.ZipFile(path).namelist()[0] == f"{torch_zip.stem_of(str(path))}/data.pkl"


# ---------------------------------------------------------------------------- reading


@THOROUGH
@given(trees(harmless(), sparse=True))
def test_what_stock_torch_wrote_is_read(scratch: Path, tree: dict[str, Any]):
    data = torchs(tree, scratch / "stock.pt")
    records = torch_zip.read_directory(reader(data), 0, len(data))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert {f"stock/{name}" for name in records} == set(archive.namelist())
        for name, record in records.items():
            content = data[record.data_offset : record.data_offset + record.nbytes]
            assert content == archive.read(f"stock/{name}")
            assert zlib.crc32(content) == record.crc
    assert same(tree, restored(torch_zip.read_tree(reader(data), 0, len(data)), data, {}))


@THOROUGH
@given(trees(foreign()))
def test_trusted_reading_imports_what_is_named(scratch: Path, tree: dict[str, Any]):
    data = torchs(tree, scratch / "stock.pt")
    ref = torch_zip.read_tree(reader(data), 0, len(data), trusted=True)
    assert same(tree, restored(ref, data, {}))


def test_few_reads_suffice(tmp_path: Path):
    calls: list[tuple[int, int]] = []

    def counted(data: bytes) -> torch_zip.Read:
        def read(offset: int, nbytes: int) -> bytes:
            calls.append((offset, nbytes))
            return data[offset : offset + nbytes]

        return read

    small = torchs(torch.ones(3), tmp_path / "small.pt")
    torch_zip.read_tree(counted(small), 0, len(small))
    assert len(calls) == 1
    calls.clear()
    large = torchs([torch.zeros(100) for _ in range(1000)], tmp_path / "large.pt")
    torch_zip.read_tree(counted(large), 0, len(large))
    assert len(calls) <= 5, calls


@pytest.mark.parametrize("comment", [b"", b"written by hand PK"])
def test_a_repacked_archive_is_read(tmp_path: Path, comment: bytes):
    """Other writers pad differently and leave out what torch always writes."""
    tree = {"a": torch.arange(10.0), "b": torch.zeros(0)}
    stock = torchs(tree, tmp_path / "stock.pt")
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(stock)) as source, zipfile.ZipFile(packed, "w") as target:
        for name in source.namelist():
            target.writestr(zipfile.ZipInfo(name), source.read(name))
        target.comment = comment
    data = packed.getvalue()
    assert same(tree, restored(torch_zip.read_tree(reader(data), 0, len(data)), data, {}))


def test_a_file_without_crcs_is_read(tmp_path: Path):
    torch.serialization.set_crc32_options(False)
    try:
        data = torchs([torch.ones(2)], tmp_path / "fast.pt")
        assert torch_zip._learn.__wrapped__(64) == torch_zip.dialect()
    finally:
        torch.serialization.set_crc32_options(True)
    assert {record.crc for record in torch_zip.read_directory(reader(data), 0, len(data)).values()} == {0}
    assert same([torch.ones(2)], restored(torch_zip.read_tree(reader(data), 0, len(data)), data, {}))


def deflated(tmp_path: Path) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02]." * 50)
    return packed.getvalue()


def outside(tmp_path: Path) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02].")
        archive.writestr("../data/0", b"")
    return packed.getvalue()


def before_1_6(tmp_path: Path) -> bytes:
    sink = io.BytesIO()
    torch.save([torch.ones(1)], sink, _use_new_zipfile_serialization=False)
    return sink.getvalue()


def big_endian(tmp_path: Path) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02].")
        archive.writestr("x/byteorder", b"big")
    return packed.getvalue()


def no_pickle(tmp_path: Path) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("x/notes.txt", b"hello")
    return packed.getvalue()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: b"", "empty"),
        (lambda _: b"hello world" * 400, "not a zip"),
        (lambda _: bytes(257) + b"ustar" + bytes(800), "tar archive"),
        (lambda tmp_path: torchs([torch.ones(9)], tmp_path / "a.pt")[:-30], "end of the file is missing"),
        (before_1_6, "before torch 1.6"),
        (deflated, "compressed"),
        (outside, "outside"),
        (big_endian, "byte order b'big'"),
        (no_pickle, "no data.pkl"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, make: Any, message: str):
    data = make(tmp_path)
    with pytest.raises(torch_zip.BadZipError, match=message):
        torch_zip.read_tree(reader(data), 0, len(data))


def test_a_flipped_bit_in_the_pickle_is_found(tmp_path: Path):
    data = bytearray(torchs({"weight": torch.ones(3)}, tmp_path / "a.pt"))
    data[data.index(b"weight")] ^= 1
    with pytest.raises(torch_zip.BadZipError, match=r"data\.pkl: CRC"):
        torch_zip.read_tree(reader(bytes(data)), 0, len(data))


def test_a_storage_of_another_size_is_refused():
    tree = [torch.ones(3)]
    pickled = pickles.pickle_tree(tree, where="tree")
    for storages, message in (([(0, 8)], "8 bytes, but the pickle says 12"), ([], "missing")):
        builder = ImageBuilder("x.pt")
        torch_zip.lay_out(builder, "x", pickled.data, storages)
        data = builder.build().render([bytes(8)])
        with pytest.raises(pickles.BadPickleError, match=message):
            torch_zip.read_tree(reader(data), 0, len(data))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_ends_in_a_clear_error_or_in_data(data: st.DataObject):
    """Never in another exception, whichever bytes are damaged or missing."""
    whole = bytearray(ours({"weight": torch.ones(3), "names": ["a", {"b": (1, 2.5)}]}))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    kept = bytes(whole[: data.draw(st.sampled_from([len(whole), data.draw(st.integers(0, len(whole)))]))])
    try:
        torch_zip.read_tree(reader(kept), 0, len(kept))
    except (torch_zip.BadZipError, pickles.BadPickleError) as error:
        assert str(error)  # noqa: PT017 - the point is which exceptions there are
