"""Archives that are alike are parsed once, and come to what each would have come to by itself."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence

import pytest
import torch

from asyncckpt.formats import torch_zip
from asyncckpt.formats.alike import Archives


def saved(value: object) -> bytes:
    sink = io.BytesIO()
    torch.save(value, sink)
    return sink.getvalue()


def outcome(read_tree: Callable[..., object], data: bytes, offset: int, nbytes: int) -> object:
    """What it comes to; of a failure, that it is one."""
    try:
        return read_tree(lambda at, size: data[at : at + size], offset, nbytes)
    except ValueError:
        return "refused"


def compare(archives: Sequence[bytes]) -> None:
    """All of them in one file, read by one reader and each by itself."""
    data = b"".join(archives)
    together = Archives()
    offset = 0
    for archive in archives:
        alone = outcome(torch_zip.read_tree, data, offset, len(archive))
        assert outcome(together.read_tree, data, offset, len(archive)) == alone
        offset += len(archive)


def test_those_that_differ_in_their_values_alone() -> None:
    archives = [saved(torch.full((50,), float(value))) for value in range(5)]
    assert len({len(archive) for archive in archives}) == 1
    compare(archives)


def test_those_of_one_size_that_differ_in_form() -> None:
    flat = torch.arange(12.0)
    tensors = [
        flat,
        flat.view(3, 4),
        flat.view(4, 3),
        flat.view(3, 4).t(),
        flat[:6],
        flat[6:],
        flat.int(),
        flat.clone().requires_grad_(),
        torch.nn.Parameter(flat),
    ]
    archives = [saved(tensor) for tensor in (*tensors, *reversed(tensors))]
    assert len({len(archive) for archive in archives}) < len(tensors)
    compare(archives)


@pytest.mark.parametrize("size", [3, 5000])
def test_any_byte_that_differs_between_two_of_them(size: int) -> None:
    """Also where a byte decides nothing, the outcome is that of reading it by itself."""
    archive = saved(torch.arange(float(size)))
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        storage = next(info for info in opened.infolist() if "/data/" in info.filename)
    begin = storage.header_offset + 200
    places = [at for at in range(len(archive)) if not begin <= at < begin + storage.file_size - 200]
    for at in places:
        changed = bytearray(archive)
        changed[at] ^= 0x20
        compare([archive, bytes(changed), archive])


def test_a_file_that_ends_within_one_of_them() -> None:
    archive = saved(torch.arange(3.0))
    compare([archive])
    data = archive + archive[:-100]
    together = Archives()
    first = outcome(together.read_tree, data, 0, len(archive))
    assert first == outcome(torch_zip.read_tree, data, 0, len(archive))
    assert outcome(together.read_tree, data, len(archive), len(archive)) == "refused"
