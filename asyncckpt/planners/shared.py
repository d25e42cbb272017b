"""Files that several ranks write: this rank's part of their images.

SharedFile -> the image of the whole file, from sizes alone -> who writes which bytes -> this rank's part

What a rank has of a file that is closed on another node goes to a file of its own: its slices, as torch.save
would write them. From there they are sent to the closer, and from there this rank loads them.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import LeafError
from ..formats import slices, torch_zip
from ..formats.image import LITERAL, FileImage, ImageBuilder, Int64Array
from ..formats.pickles import Elsewhere, pickle_tree
from ..formats.slices import ZEROS, ZEROS_NBYTES
from ..plan import Apart, SharedPart
from ..shared import SharedFile, SlicedTensor, sliced_in, slices_path, to_slices
from ..tree import rebuilt

_zeros = torch.zeros(ZEROS_NBYTES, dtype=torch.uint8)

Span = tuple[torch.Tensor, int, int]  # a tensor, first byte of its memory, number of bytes


@dataclass(frozen=True, eq=False)
class SharedPlan:
    """This rank's part of a file that several ranks write.

    Attributes:
        images: what it writes: of the file, and of what it hands over.
        part: for the committer; its images are numbered from 0.
        sources: (sliced tensor, piece, first byte, nbytes) of each source, by index; no tensor for zeros.
        names: of the sources.
    """

    images: tuple[FileImage, ...]
    part: SharedPart
    sources: tuple[tuple[int, int, int, int], ...]
    names: tuple[str, ...]

    def spans(self, file: SharedFile) -> list[Span]:
        """The memory of the sources now."""
        tensors = list(sliced_in(file))
        return [
            (_zeros, 0, nbytes) if sliced == ZEROS else (tensors[sliced].pieces[piece][1], begin, nbytes)
            for sliced, piece, begin, nbytes in self.sources
        ]

    def spans_of(self, tensors: Sequence[torch.Tensor]) -> list[Span]:
        """The same where each sliced tensor has one piece: those pieces, for all sliced tensors in order."""
        return [
            (_zeros, 0, nbytes) if sliced == ZEROS else (tensors[sliced], begin, nbytes)
            for sliced, _, begin, nbytes in self.sources
        ]


def signature_of(file: SharedFile) -> object:
    """Plans of files with equal signatures are equal."""
    tensors = list(sliced_in(file))
    return (
        file.path,
        file.closer,
        _pickled(file)[0],
        tuple((t.slices.tobytes(), tuple((begin, p.numel()) for begin, p in t.pieces)) for t in tensors),
    )


def lay_out(
    file: SharedFile, rank: int, first_source: int, here: Collection[int] | None = None
) -> SharedPlan:
    """This rank's part of a file.

    Args:
        first_source: number of the first source of this part in the plan.
        here: the ranks that write to the same disk; None is all.

    Raises:
        LeafError: a piece is not what a slice of the file can be copied from.
    """
    tensors = list(sliced_in(file))
    for tensor in tensors:
        _check(file, tensor)
    pickle, order = _pickled(file)
    builder = ImageBuilder(file.path)
    sizes = [tensors[index].nbytes for index in order]
    torch_zip.lay_out(builder, torch_zip.stem_of(file.path), pickle, list(enumerate(sizes)))
    image = builder.build()
    places = _places(image, order)
    rows = [_in_bytes(tensors[index], record) for index, record in places.records.items()]
    table = np.concatenate([np.zeros((0, 4), np.int64), *rows])
    is_closer = rank == file.closer
    own = _spans(image, places, table[table[:, 3] == rank])
    spans = slices.spans_of(image, table) if is_closer else own
    pieces = [
        (places.offsets[index] + begin * t.dtype.itemsize, piece.numel() * t.dtype.itemsize, index, n)
        for index, t in enumerate(tensors)
        for n, (begin, piece) in enumerate(t.pieces)
        if piece.numel()
    ]
    pieces.sort()
    _check_within(file, pieces, own)
    if here is not None and file.closer not in here:
        if not len(own):
            return SharedPlan((), SharedPart(file.path, file.closer, _digest(image), None, None), (), ())
        return _lay_out_apart(file, tensors, image, pieces, rank, first_source)
    part = slices.part_of(
        image, own, [piece[:2] for piece in pieces], edges_path(file.path, rank), first_source
    )
    sources = tuple(
        (ZEROS, 0, 0, cut.nbytes) if cut.piece == ZEROS else (*pieces[cut.piece][2:], cut.begin, cut.nbytes)
        for cut in part.cuts
    )
    names = tuple(f"{file.path} (piece {piece} of tensor {index})" for index, piece, _, _ in sources)
    images = tuple(made for made in (part.inside, part.edges) if made is not None)
    return SharedPlan(
        images,
        SharedPart(
            path=file.path,
            closer=file.closer,
            digest=_digest(image),
            inside=0 if part.inside is not None else None,
            edges=len(images) - 1 if part.edges is not None else None,
            image=image if is_closer else None,
            spans=spans if is_closer else None,
        ),
        sources,
        names,
    )


def _digest(image: FileImage) -> str:
    """Of all that does not depend on the rank."""
    return hashlib.sha256(image.literals + b"%d" % image.nbytes).hexdigest()[:16]


def _lay_out_apart(
    file: SharedFile,
    tensors: Sequence[SlicedTensor],
    image: FileImage,
    pieces: Sequence[tuple[int, int, int, int]],
    rank: int,
    first_source: int,
) -> SharedPlan:
    """What this rank has of a file, in one of its own."""
    numbers = {id(tensor): index for index, tensor in enumerate(tensors)}
    placed: dict[int, tuple[int, int]] = {}  # stand-ins: which piece of which tensor

    def stand_in(tensor: SlicedTensor) -> dict[str, Any]:
        index = numbers[id(tensor)]
        parts = [(n, begin, piece) for n, (begin, piece) in enumerate(tensor.pieces) if piece.numel()]
        made = [Elsewhere(tensor.dtype, tuple(piece.shape)) for _, _, piece in parts]
        placed.update({id(one): (index, n) for one, (n, _, _) in zip(made, parts, strict=True)})
        return to_slices(tensor.dtype, tensor.shape, [begin for _, begin, _ in parts], made)

    pickled = pickle_tree(rebuilt(file.content, SlicedTensor, stand_in), where=file.path)
    order = [placed[id(one)] for one in pickled.elsewhere]
    sizes = [one.nbytes() for one in pickled.elsewhere]
    path = slices_path(file.path, rank)
    builder = ImageBuilder(path)
    storages = list(enumerate(sizes, start=first_source))
    torch_zip.lay_out(builder, torch_zip.stem_of(path), pickled.data, storages)
    own = builder.build()
    rows = own.extents[own.extents[:, 2] != LITERAL].tolist()
    found = {order[source - first_source]: (offset, record) for offset, _, source, _, record in rows}
    table = [(offset, nbytes, *found[index, n]) for offset, nbytes, index, n in pieces]
    apart = Apart(
        0,
        np.array([row[:3] for row in table], np.int64).reshape(-1, 3),
        tuple(row[3] for row in table),
        file.is_loaded,
    )
    sources = tuple((index, n, 0, nbytes) for (index, n), nbytes in zip(order, sizes, strict=True))
    return SharedPlan(
        (own,),
        SharedPart(file.path, file.closer, _digest(image), None, None, apart=apart),
        sources,
        tuple(f"{file.path} (piece {n} of tensor {index})" for index, n in order),
    )


def edges_path(path: str, rank: int) -> str:
    """The file in which a rank hands over what it does not write itself; gone once the step is visible."""
    return f"{path}.edges_{rank:05d}"


@dataclass(frozen=True, eq=False)
class _Places:
    records: dict[int, int]  # of each tensor, by its index
    offsets: dict[int, int]  # in the file


def _places(image: FileImage, order: Sequence[int]) -> _Places:
    rows = image.extents[image.extents[:, 2] != LITERAL].tolist()
    offsets = {int(source): int(offset) for offset, _, source, _, _ in rows}
    records = {int(source): int(record) for _, _, source, _, record in rows}
    return _Places(
        {index: records[key] for key, index in enumerate(order) if key in records},
        {index: offsets.get(key, 0) for key, index in enumerate(order)},
    )


def _pickled(file: SharedFile) -> tuple[bytes, list[int]]:
    """The pickle of a file's content, and which tensor each storage is, by key."""
    tensors = list(sliced_in(file))
    numbers = {id(tensor): index for index, tensor in enumerate(tensors)}
    stands_for: dict[int, int] = {}

    def stand_in(tensor: SlicedTensor) -> Elsewhere:
        made = Elsewhere(tensor.dtype, tensor.shape)
        stands_for[id(made)] = numbers[id(tensor)]
        return made

    pickled = pickle_tree(rebuilt(file.content, SlicedTensor, stand_in), where=file.path)
    if pickled.storages:
        raise LeafError(f"{file.path}: a tensor in it is not in slices")
    return pickled.data, [stands_for[id(made)] for made in pickled.elsewhere]


def _in_bytes(tensor: SlicedTensor, record: int) -> Int64Array:
    table = np.empty((len(tensor.slices), 4), np.int64)
    table[:, 0] = record
    table[:, 1:3] = tensor.slices[:, :2] * tensor.dtype.itemsize
    table[:, 3] = tensor.slices[:, 2]
    return table


def _spans(image: FileImage, places: _Places, own: Int64Array) -> Int64Array:
    """Of one rank; what others have need not be known."""
    begins = {record: places.offsets[index] for index, record in places.records.items()}
    offsets = np.array([begins[record] for record in own[:, 0].tolist()], np.int64)
    return slices.joined(np.stack([offsets + own[:, 1], offsets + own[:, 2], own[:, 3]], axis=1))


def _check(file: SharedFile, tensor: SlicedTensor) -> None:
    for _, piece in tensor.pieces:
        if piece.dtype != tensor.dtype or not piece.is_contiguous() or piece.is_conj() or piece.is_neg():
            raise LeafError(
                f"{file.path}: a slice of a {tensor.dtype} tensor cannot be copied from a tensor of "
                f"{piece.dtype} with strides {piece.stride()}"
            )


def _check_within(file: SharedFile, pieces: list[tuple[int, int, int, int]], own: Int64Array) -> None:
    """Raise LeafError unless pieces do not overlap and lie within this rank's spans."""
    begins = own[:, 0].tolist()
    end_before = 0
    for offset, nbytes, _, _ in pieces:
        row = bisect_right(begins, offset) - 1
        if row < 0 or offset + nbytes > int(own[row, 1]) or offset < end_before:
            raise LeafError(f"{file.path}: a tensor is not within the slice that its rank has")
        end_before = offset + nbytes
