"""The pieces of a `torch.distributed.checkpoint` directory: items in `.distcp` files, and `.metadata`.

A `.distcp` file is one torch.save archive per item, back to back. `.metadata` is a pickle that says which
item of which file holds what; several names may point to one item (tied weights).

A tensor item holds the tensor's *span*: the bytes from its first element to the last that its strides
reach, as a storage of its own. So a view never drags its whole storage along, an expanded tensor costs its
one row, and nothing has to be made contiguous. Its pickle is known without looking at a tensor, and always
says "cpu": items are device-independent.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from asyncckpt.errors import LeafError
from asyncckpt.formats import torch_zip
from asyncckpt.formats.image import ImageBuilder
from asyncckpt.formats.inert import Inert
from asyncckpt.formats.raw_pickle import RawPickle
from asyncckpt.formats.refs import span_elements
from asyncckpt.formats.tensor_form import TypedView, form_of
from asyncckpt.formats.unpickle import unpickle

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

_STEM = "archive"  # what torch.save calls an archive that has no file name
_PICKLE_PROTOCOL = 4  # of `.metadata`; every supported Python reads it

_Sizes = tuple[int, ...]
_LITERALS = frozenset((str, int, bool, float, type(None), torch.Size, torch.dtype))
PathStep = str | int  # into a nested state dict: a key, or an index of a list


class BadMetadataError(ValueError):
    """These bytes are not the `.metadata` of a DCP checkpoint."""


class Span(NamedTuple):
    """Bytes of a file."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class ItemSpec:
    """What an item says about its tensor, apart from the bytes.

    Attributes:
        fqn: the tensor's name; it does not influence the item.
        stride: in elements.
        span_nbytes: from the first element to the end of the last one that the strides reach.
        conj, neg: the values are the conjugate, the negative, of the bytes.
    """

    fqn: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    span_nbytes: int
    requires_grad: bool = False
    conj: bool = False
    neg: bool = False

    @classmethod
    def of(cls, fqn: str, tensor: torch.Tensor) -> ItemSpec:
        """The spec of a dense tensor; its span begins at `tensor.data_ptr()`.

        Raises:
            LeafError: torch itself cannot save a tensor of this kind.
        """
        if tensor.is_quantized:
            raise LeafError(f"{fqn} cannot be saved: it is quantised; dequantise it first")
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise LeafError(f"{fqn} cannot be saved as a dense tensor: its layout is {tensor.layout}")
        if form_of(tensor.dtype) is None:
            raise LeafError(f"{fqn} cannot be saved: torch has no pickle for {tensor.dtype}")
        shape, stride = tuple(tensor.shape), tensor.stride()
        span_nbytes = span_elements(shape, stride) * tensor.element_size()
        return cls(
            fqn, tensor.dtype, shape, stride, span_nbytes,
            tensor.requires_grad, tensor.is_conj(), tensor.is_neg(),
        )  # fmt: skip

    def cut(self, shape: tuple[int, ...]) -> ItemSpec:
        """Of a piece of the tensor's memory that is a box of this shape; the tensor is contiguous."""
        stride = []
        elements = 1
        for size in reversed(shape):
            stride.append(elements)
            elements *= max(1, size)
        nbytes = span_elements(shape, stride[::-1]) * self.dtype.itemsize
        return dataclasses.replace(self, shape=shape, stride=tuple(stride[::-1]), span_nbytes=nbytes)


# ---------------------------------------------------------------------------- items


def lay_out_tensor(builder: ImageBuilder, spec: ItemSpec, source: int) -> Span:
    """Append a tensor item; `source` is the span's memory. Its one record is the span."""
    item = _item(spec.dtype, spec.shape, spec.stride, spec.span_nbytes, spec.conj, spec.neg)
    start = builder.offset
    builder.literal(item.head)
    record = builder.record(source, spec.span_nbytes)
    builder.literal(item.tail, record, item.crcs)
    return Span(start, builder.offset - start)


def lay_out_bytes(
    builder: ImageBuilder,
    pickle_source: int,
    slot_nbytes: int,
    storages: Sequence[tuple[int, int]] = (),
) -> Span:
    """Append a byte item: any object, pickled into a slot of `slot_nbytes`, and its storages."""
    start = builder.offset
    torch_zip.lay_out(builder, _STEM, (pickle_source, slot_nbytes), storages)
    return Span(start, builder.offset - start)


class _Item(NamedTuple):
    """The literal bytes of a tensor item before and after its record, whose CRC belongs at these offsets in
    the tail."""

    head: bytes
    tail: bytes
    crcs: tuple[int, ...]


@lru_cache(maxsize=8192)  # models repeat a few shapes over and over
def _item(
    dtype: torch.dtype, shape: _Sizes, stride: _Sizes, span_nbytes: int, conj: bool, neg: bool
) -> _Item:
    builder = ImageBuilder("item")
    data = _tensor_pickle(dtype, shape, stride, span_nbytes, conj, neg)
    torch_zip.lay_out(builder, _STEM, data, [(0, span_nbytes)])
    image = builder.build()
    head_nbytes = int(image.extents[0, 1]) if span_nbytes else 0
    tail_offset = head_nbytes + span_nbytes
    crcs = tuple(offset - tail_offset for offset, _ in image.fixups.tolist())
    return _Item(image.literals[:head_nbytes], image.literals[head_nbytes:], crcs)


def _tensor_pickle(
    dtype: torch.dtype, shape: _Sizes, stride: _Sizes, span_nbytes: int, conj: bool, neg: bool
) -> bytes:
    """What torch.save pickles for a CPU tensor that fills its storage, without such a tensor."""
    form = form_of(dtype)
    if form is None:
        raise LeafError(f"torch has no pickle for {dtype}")
    flags = {name: True for name, is_set in (("conj", conj), ("neg", neg)) if is_set}
    sink = io.BytesIO()
    pickler = _SpanPickler(sink, protocol=2)
    pickler.dump(_Reduced(form.reduce(None, span_nbytes, 0, shape, stride, False, (flags,) if flags else ())))
    return sink.getvalue()


class _Reduced:
    """An object that pickles as it was told to."""

    def __init__(self, reduced: tuple[Any, ...]) -> None:
        self._reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


class _SpanPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[str, type, str, str, int] | None:
        return ("storage", obj.kind, "0", "cpu", obj.elements) if type(obj) is TypedView else None


# ---------------------------------------------------------------------------- .metadata


@dataclass(frozen=True)
class Entry:
    """One name of the state dict, and the item that holds it.

    Attributes:
        file: path of the `.distcp` file, relative to the checkpoint's directory.
        spec: of a tensor item; None for a byte item.
        global_shape, offsets: of the whole tensor and of this piece in it, if the item holds a piece only.
    """

    fqn: str
    file: str
    span: Span
    spec: ItemSpec | None = None
    global_shape: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None


def metadata_bytes(
    entries: Iterable[Entry], paths: Mapping[str, tuple[PathStep, ...]], *, save_id: str | None = None
) -> bytes:
    """The contents of `.metadata`, as stock DCP pickles it.

    Args:
        entries: pieces of one tensor follow each other in the order of their index.
        paths: where each name lies in the nested state dict; stock tools rebuild the nesting from it.
    """
    described = _Description(save_id)
    for entry in entries:
        spec = entry.spec
        if spec is None:
            described.add_bytes(entry.fqn, entry.file, entry.span)
            continue
        if entry.fqn not in described:
            whole = spec.shape if entry.global_shape is None else entry.global_shape
            described.begin_tensor(entry.fqn, spec.dtype, whole, spec.requires_grad)
        offsets = (0,) * len(spec.shape) if entry.offsets is None else entry.offsets
        described.add_piece(entry.fqn, entry.file, entry.span, offsets, spec.shape)
    return described.to_bytes(paths)


class _Description:
    """Builds the pickle of a `Metadata`. Equal values in it are one object, written once, and a piece is a
    few parts put together: two million of them are a matter of seconds."""

    def __init__(self, save_id: str | None = None) -> None:
        self._dcp, self._filesystem = _stock()
        self._save_id = save_id
        self._out = RawPickle()
        self._bytes_item = self._out.plain(self._dcp.BytesStorageMetadata())
        index, info = self._dcp.MetadataIndex("", None, None), self._filesystem._StorageInfo("", 0, 0)
        self._index = self._out.template(index, "fqn", "offset", "index")
        self._info = self._out.template(info, "relative_path", "offset", "length")
        self._properties_of = cache(self._dcp.TensorProperties)
        self._chunk_of = cache(self._chunk)
        self._size_of = cache(lambda sizes: self._out.shared(torch.Size(sizes)))
        self._tensors: dict[str, tuple[bytes, _Sizes]] = {}  # properties and shape
        self._chunks: dict[str, list[bytes]] = {}
        self._described: dict[str, bytes] = {}
        self._stored: list[bytes] = []

    def __contains__(self, fqn: str) -> bool:
        return fqn in self._tensors

    def add_bytes(self, fqn: str, file: str, span: Span) -> None:
        self._described[fqn] = self._bytes_item
        none = self._out.plain(None)
        self._store(fqn, none, none, file, span)

    def begin_tensor(self, fqn: str, dtype: torch.dtype, shape: _Sizes, requires_grad: bool) -> None:
        properties = self._properties_of(dtype, torch.strided, requires_grad)
        self._tensors[fqn] = (self._out.shared_once(properties), shape)
        self._chunks[fqn] = []
        self._described[fqn] = b""  # keeps its place

    def add_piece(self, fqn: str, file: str, span: Span, offsets: _Sizes, shape: _Sizes) -> None:
        """In the order of their index."""
        chunks = self._chunks[fqn]
        self._store(fqn, self._size_of(offsets), self._out.integer(len(chunks)), file, span)
        chunks.append(self._chunk_of(offsets, shape))

    def _chunk(self, offsets: _Sizes, shape: _Sizes) -> bytes:
        size = torch.Size
        return self._out.shared_once(self._dcp.ChunkStorageMetadata(size(offsets), size(shape)))

    def _store(self, fqn: str, offset: bytes, index: bytes, file: str, span: Span) -> None:
        out, key, info = self._out, self._index, self._info
        self._stored.append(
            b"".join(
                (
                    *(key[0], out.shared(fqn), key[1], offset, key[2], index, key[3]),
                    *(info[0], out.shared(file), info[1], out.integer(span.offset)),
                    *(info[2], out.integer(span.nbytes), info[3]),
                )
            )
        )

    def to_bytes(self, paths: Mapping[str, tuple[PathStep, ...]]) -> bytes:
        out = self._out
        like = self._dcp.TensorStorageMetadata(None, None, None)
        begin, size, chunks, end = out.template(like, "properties", "size", "chunks")
        for fqn, (properties, shape) in self._tensors.items():
            self._described[fqn] = b"".join(
                (begin, properties, size, self._size_of(shape), chunks, out.sequence(self._chunks[fqn]), end)
            )
        storage = self._dcp.StorageMeta(save_id=self._save_id)
        whole = self._dcp.Metadata({}, None, None, storage)
        version = getattr(self._filesystem, "CURRENT_DCP_VERSION", None)
        if version is not None:
            whole.version = version
        return out.to_bytes(
            out.instance(
                whole,
                state_dict_metadata=_dictionary(out, self._described),
                planner_data=_dictionary(out, {fqn: out.plain(path) for fqn, path in paths.items()}),
                storage_data=out.dictionary(self._stored),
            )
        )


def _dictionary(out: RawPickle, values: Mapping[str, bytes]) -> bytes:
    return out.dictionary(part for key, value in values.items() for part in (out.shared(key), value))


# ---------------------------------------------------------------------------- .metadata of several ranks


class TensorForm(NamedTuple):
    """What all ranks know of a tensor alike."""

    dtype: torch.dtype
    shape: _Sizes  # of the whole
    requires_grad: bool

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def pack_tree(paths: Mapping[str, tuple[PathStep, ...]], forms: Mapping[str, TensorForm]) -> bytes:
    """The leaves that a rank has, for `merged_metadata` on another: the same bytes from all ranks that have
    the same. Those without a form are byte items."""
    rows = [
        [
            fqn,
            path,
            [str(form.dtype).removeprefix("torch."), form.shape, form.requires_grad] if form else None,
        ]
        for fqn, path, form in ((fqn, path, forms.get(fqn)) for fqn, path in paths.items())
    ]
    return json.dumps(rows, separators=(",", ":")).encode()


def pickled_names(tree: bytes) -> list[str]:
    """The byte items of a packed tree, in its order."""
    return [fqn for fqn, _, form in json.loads(tree) if form is None]


def pack_layout(file: str, entries: Iterable[Entry], paths: Mapping[str, tuple[PathStep, ...]]) -> bytes:
    """Where the items of one rank lie, all in one file; leaves go by their place in `pack_tree`."""
    place = {fqn: index for index, fqn in enumerate(paths)}
    rows = [
        (
            place[entry.fqn],
            *entry.span,
            *((*(entry.offsets or ()), *entry.spec.shape) if entry.spec is not None else ()),
        )
        for entry in entries
    ]
    return json.dumps([file, rows], separators=(",", ":")).encode()


class _Leaf:
    """One name, as the ranks have described it so far."""

    def __init__(self, path: tuple[PathStep, ...], form: TensorForm | None) -> None:
        self.path = path
        self.form = form
        # By offsets: file, offset in it, bytes, shape. Flat, since there may be millions.
        self.pieces: dict[_Sizes, tuple[str, int, int, _Sizes]] = {}


def merged_metadata(packed: Iterable[tuple[bytes, bytes]], *, of_all: bool = True) -> bytes:
    """The contents of `.metadata` for the items of several ranks: of each, `pack_tree` and `pack_layout`.

    Args:
        of_all: False where these are some of the ranks, whose pieces need not be the whole of a tensor.

    Raises:
        LeafError: the pieces of a tensor are not the whole of it, or ranks disagree on what it is.
    """
    leaves: dict[str, _Leaf] = {}
    trees: dict[bytes, list[_Leaf]] = {}
    known: dict[_Sizes, _Sizes] = {}  # shapes and offsets repeat from layer to layer
    for tree, layout in packed:
        here = trees.get(tree)
        if here is None:
            here = trees[tree] = _read_tree(tree, leaves)
        file, rows = json.loads(layout)
        for place, offset, nbytes, *box in rows:
            ndim = len(box) // 2
            offsets, shape = tuple(box[:ndim]), tuple(box[ndim:])
            piece = (file, offset, nbytes, known.setdefault(shape, shape))
            # Of a piece without elements, several ranks may have written the same.
            here[place].pieces.setdefault(known.setdefault(offsets, offsets), piece)
    described = _Description()
    for fqn, leaf in leaves.items():
        if of_all or leaf.form is None:
            _check_whole(fqn, leaf)
        if leaf.form is None:
            file, offset, nbytes, _ = leaf.pieces[()]
            described.add_bytes(fqn, file, Span(offset, nbytes))
            continue
        described.begin_tensor(fqn, *leaf.form)
        for offsets in sorted(leaf.pieces):
            file, offset, nbytes, shape = leaf.pieces[offsets]
            described.add_piece(fqn, file, Span(offset, nbytes), offsets, shape)
    return described.to_bytes({fqn: leaf.path for fqn, leaf in leaves.items()})


def _read_tree(tree: bytes, leaves: dict[str, _Leaf]) -> list[_Leaf]:
    """The leaves of one rank by their place; those that no rank before had are added to `leaves`."""
    found = []
    for fqn, path, packed in json.loads(tree):
        form = None
        if packed is not None:
            form = TensorForm(getattr(torch, packed[0]), tuple(packed[1]), packed[2])
        leaf = leaves.setdefault(fqn, _Leaf(tuple(path), form))
        if (leaf.form and leaf.form[:2]) != (form and form[:2]):
            here, there = leaf.form or "no tensor", form or "no tensor"
            raise LeafError(f"{fqn} is {here} on one rank and {there} on another")
        found.append(leaf)
    return found


def _check_whole(fqn: str, leaf: _Leaf) -> None:
    if not leaf.pieces:
        raise LeafError(f"{fqn} was written by no rank")
    if leaf.form is not None:
        elements = sum(prod(shape) for *_, shape in leaf.pieces.values())
        if elements != prod(leaf.form.shape):
            raise LeafError(f"{fqn}: the ranks have {elements} of its {prod(leaf.form.shape)} elements")
        if not tile(leaf.form.shape, [(offsets, shape) for offsets, (*_, shape) in leaf.pieces.items()]):
            raise LeafError(f"{fqn}: the ranks have some of its elements twice, and others not at all")


def tile(whole: _Sizes, boxes: Iterable[tuple[_Sizes, _Sizes]]) -> bool:
    """Whether boxes, each its offsets and its shape, cover a tensor of shape `whole`, each element once."""
    boxes = list(boxes)
    if boxes == [((0,) * len(whole), whole)]:
        return True  # most tensors are in one piece
    filled = [(offsets, shape) for offsets, shape in boxes if prod(shape)]
    # With as many elements as the whole, it is covered unless two overlap.
    return sum(prod(shape) for _, shape in filled) == prod(whole) and are_apart(whole, filled)


def are_apart(whole: _Sizes, boxes: Iterable[tuple[_Sizes, _Sizes]]) -> bool:
    """Whether boxes lie within a tensor of shape `whole`, and none over another."""
    filled = [(offsets, shape) for offsets, shape in boxes if prod(shape)]
    if any(a < 0 or a + n > size for box in filled for a, n, size in zip(*box, whole, strict=True)):
        return False
    if not whole or not filled:
        return len(filled) <= 1
    # Sorted along the dimension that has the most places, a box needs to be compared with few others.
    along = max(range(len(whole)), key=lambda dim: len({offsets[dim] for offsets, _ in filled}))
    filled.sort(key=lambda box: box[0][along])
    for index, (offsets, shape) in enumerate(filled):
        end = offsets[along] + shape[along]
        for others, size in islice(filled, index + 1, None):
            if others[along] >= end:
                break
            if all(a < b + n and b < a + m for a, m, b, n in zip(offsets, shape, others, size, strict=True)):
                return False
    return True


def read_metadata(data: bytes, *, trusted: bool = False) -> Metadata:
    """The `Metadata` in the bytes of a `.metadata` file. Nothing in it can run, unless `trusted`.

    Paths in it are whatever the file says: check them before opening any.

    Raises:
        BadMetadataError: the file is empty, damaged or something else.
    """
    if not data:
        raise BadMetadataError("the .metadata file is empty: its save was cut off")
    try:
        tree = unpickle(data, trusted=trusted)
        whole = tree if trusted else _Conversion().convert(tree)
        _check(whole)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise BadMetadataError(f"not the .metadata of a DCP checkpoint: {error}") from error
    checked: Metadata = whole
    return checked


def _check(whole: Any) -> None:
    """Types of all that a reader computes with."""
    dcp, filesystem = _stock()
    if not isinstance(whole, dcp.Metadata) or not isinstance(whole.state_dict_metadata, dict):
        raise BadMetadataError(f"it holds a {type(whole).__name__}")
    for fqn, described in whole.state_dict_metadata.items():
        if isinstance(described, dcp.BytesStorageMetadata):
            continue
        is_sound = (
            isinstance(described, dcp.TensorStorageMetadata)
            and isinstance(described.properties, dcp.TensorProperties)
            and type(described.properties.dtype) is torch.dtype
            and type(described.size) is torch.Size
            and type(described.chunks) is list
            and all(isinstance(chunk, dcp.ChunkStorageMetadata) for chunk in described.chunks)
        )
        if not is_sound or not all(
            len(chunk.offsets) == len(chunk.sizes) == len(described.size) for chunk in described.chunks
        ):
            raise BadMetadataError(f"the description of {fqn!r} is garbled")
    if not isinstance(whole.storage_data, dict):
        raise BadMetadataError("it does not say where anything is stored")
    for index, info in whole.storage_data.items():
        is_sound = (
            isinstance(index, dcp.MetadataIndex)
            and type(index.fqn) is str
            and type(index.offset) in (torch.Size, type(None))
            and isinstance(info, filesystem._StorageInfo)
            and type(info.relative_path) is str
            and type(info.offset) is type(info.length) is int
        )
        if not is_sound or min(info.offset, info.length) < 0:
            raise BadMetadataError(f"the place of {getattr(index, 'fqn', index)!r} is garbled")


def _stock() -> tuple[Any, Any]:
    """The modules of DCP's own classes, imported when first needed: that takes a second."""
    from torch.distributed.checkpoint import filesystem, metadata

    return metadata, filesystem


class _Conversion:
    """Turns what stands for DCP's classes into those classes, by their constructors."""

    def __init__(self) -> None:
        dcp, filesystem = _stock()
        self._memory_format = dcp._MEM_FORMAT_ENCODING
        self._properties = dcp.TensorProperties
        kinds: tuple[type, ...] = (
            dcp.ChunkStorageMetadata, dcp.TensorStorageMetadata, dcp.BytesStorageMetadata,
            dcp.Metadata, dcp.MetadataIndex, dcp.StorageMeta, filesystem._StorageInfo,
        )  # fmt: skip
        self._kinds = {(kind.__module__, kind.__name__): (kind, _field_names(kind)) for kind in kinds}
        self._done: dict[int, Any] = {}

    def convert(self, value: Any) -> Any:
        """`value` with all stand-ins for DCP's classes replaced; other stand-ins stay inert."""
        if type(value) in _LITERALS:
            return value
        if isinstance(value, Inert):
            if id(value) not in self._done:
                self._done[id(value)] = self._build(value)
            return self._done[id(value)]
        if type(value) is dict:
            return {self.convert(key): self.convert(child) for key, child in value.items()}
        if type(value) is list:
            return [self.convert(child) for child in value]
        return value

    def _build(self, value: Inert) -> Any:
        if (value.module, value.name) == (self._properties.__module__, "TensorProperties"):
            dtype, layout, requires_grad, memory_format, pin_memory = value.state
            properties: Any = self._properties.__new__(self._properties)
            encoding = self._memory_format(memory_format.args[0])
            properties.__setstate__((dtype, layout, requires_grad, encoding, pin_memory))
            return properties
        if (value.module, value.name) not in self._kinds:
            return value
        kind, names = self._kinds[value.module, value.name]
        built: Any
        if type(value.state) is dict and value.state.keys() == names:
            built = object.__new__(kind)  # as unpickling does; the constructors take four times as long
            state = value.state
            vars(built).update({n: c if type(c) in _LITERALS else self.convert(c) for n, c in state.items()})
            return built
        state = {name: self.convert(child) for name, child in (value.state or {}).items()}
        built = kind(**{name: child for name, child in state.items() if name in names})
        if kind.__name__ == "Metadata":  # others keep notes of their own there
            vars(built).update({name: child for name, child in state.items() if name not in names})
        return built


def _field_names(kind: Any) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(kind))
