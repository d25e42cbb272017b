"""Hypothesis strategies for what people put into checkpoints, and what makes two of them equal."""

from __future__ import annotations

import argparse
import datetime
import enum
import functools
import io
import math
import operator
import pathlib
import types
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st


def _savable_dtypes() -> list[torch.dtype]:
    """Every dtype of the installed torch that its own torch.save and torch.load take."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ComplexHalf is experimental, quantised dtypes are deprecated
        for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
            try:
                sink = io.BytesIO()
                torch.save(torch.empty(1, dtype=dtype), sink)
                torch.load(io.BytesIO(sink.getvalue()), weights_only=True)
            except (RuntimeError, KeyError):
                continue
            found.append(dtype)
    return sorted(found, key=str)


DTYPES = _savable_dtypes()


class Colour(enum.Enum):
    """An enumeration, as configurations have them."""

    RED = 1
    BLUE = "blue"


@dataclass
class Settings:
    """A dataclass, as configurations are."""

    name: str = "adam"
    betas: tuple[float, float] = (0.9, 0.95)
    extra: dict[str, Any] = field(default_factory=dict)


def _describe(tensor: torch.Tensor, printer: Any, cycle: bool) -> None:
    kind, shape, stride = type(tensor).__name__, list(tensor.shape), "-"
    if tensor.layout is torch.strided:
        stride = f"{list(tensor.stride())} at {tensor.storage_offset()}"
    printer.text(f"<{kind} {tensor.dtype} {shape} {stride}>")


torch.Tensor._repr_pretty_ = _describe  # type: ignore[attr-defined]  # torch cannot print every dtype


# ---------------------------------------------------------------------------- tensors


@st.composite
def _storages(draw: st.DrawFn) -> tuple[torch.UntypedStorage, torch.dtype]:
    """Some memory with arbitrary bytes, and the one dtype that it is seen as."""
    dtype = draw(st.sampled_from(DTYPES))
    elements = draw(st.integers(0, 24))
    nbytes = elements * dtype.itemsize
    if nbytes == 0:
        return torch.UntypedStorage(0), dtype
    raw = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, 256, nbytes, np.uint8)
    if dtype is torch.bool:
        raw &= 1
    return torch.from_numpy(raw).clone().untyped_storage(), dtype


@st.composite
def _views(draw: st.DrawFn, pool: list[tuple[torch.UntypedStorage, torch.dtype]]) -> torch.Tensor:
    """A tensor on one of the storages: offset, strided, transposed, expanded, empty or 0-d."""
    storage, dtype = pool[draw(st.integers(0, len(pool) - 1))]
    room = storage.nbytes() // dtype.itemsize
    offset = draw(st.integers(0, room))
    shape, stride, reach = [], [], 0
    for _ in range(draw(st.integers(0, 3))):
        step = draw(st.integers(0, 4))
        left = room - offset - 1 - reach
        size_max = 4 if step == 0 else left // step + 1
        size = draw(st.integers(0, max(0, min(4, size_max))))
        shape.append(size)
        stride.append(step)
        reach += max(0, size - 1) * step
    if offset >= room:  # no element left to show
        shape.append(0)
        stride.append(1)
    tensor = torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
    if dtype.is_complex and dtype is not torch.complex32 and draw(st.booleans()):
        tensor = tensor.conj()
    return tensor


def tensors() -> st.SearchStrategy[torch.Tensor]:
    """One dense tensor of any dtype on memory of its own."""
    return _storages().flatmap(lambda memory: _views([memory]))


def _dress(pool: list[tuple[torch.UntypedStorage, torch.dtype]]) -> st.SearchStrategy[torch.Tensor]:
    """Tensors on these storages, some of them parameters, some that require grad."""

    def dress(view: torch.Tensor, dressing: int) -> torch.Tensor:
        differentiable = view.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
        if dressing == 0:
            return torch.nn.Parameter(view, requires_grad=differentiable)
        if dressing == 1 and differentiable:
            return view.requires_grad_()
        return view

    return st.builds(dress, _views(pool), st.integers(0, 3))


@st.composite
def _sparse(draw: st.DrawFn) -> torch.Tensor:
    dense = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.0, 1.5]), min_size=4, max_size=4)))
    layout = draw(st.sampled_from(["coo", "csr", "csc"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compressed layouts are in beta
        matrix = dense.reshape(2, 2)
        if layout == "coo":
            return matrix.to_sparse()
        return matrix.to_sparse_csr() if layout == "csr" else matrix.to_sparse_csc()


# ---------------------------------------------------------------------------- python leaves


def scalars() -> st.SearchStrategy[Any]:
    """Leaves that weights_only loading takes."""
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=12),
    )


def _arrays() -> st.SearchStrategy[Any]:
    kinds = ["?", "i1", "<i8", ">i4", "f2", "f4", "f8", "c8", "c16", "S3", "U2", "M8[ns]", "m8[s]", "V4"]
    structured = np.dtype([("count", "<i4"), ("mean", ">f8", (2,))])

    def build(dtype: Any, shape: list[int], order: Any, seed: int) -> Any:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        raw = np.random.default_rng(seed).integers(0, 2, nbytes, np.uint8).tobytes()
        return np.frombuffer(raw, dtype).reshape(shape).copy(order)

    return st.builds(
        build,
        st.sampled_from([*kinds, structured]),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from(["C", "F"]),
        st.integers(0, 99),
    )


def harmless() -> st.SearchStrategy[Any]:
    """Leaves that come back equal even from a reader that trusts nobody."""
    text = st.text(max_size=6)
    return st.one_of(
        scalars(),
        st.binary(max_size=12),
        st.binary(max_size=12).map(bytearray),
        st.complex_numbers(allow_nan=False),
        st.sampled_from([..., NotImplemented, range(3, 9, 2), slice(1, None, 2)]),
        st.sets(st.integers(), max_size=3),
        st.frozensets(text, max_size=3),
        st.lists(st.integers(0, 9), max_size=3).map(torch.Size),
        st.sampled_from(DTYPES),
        st.sampled_from([torch.device("cpu"), torch.device("cuda", 1), torch.device("meta")]),
        st.sampled_from([torch.strided, torch.sparse_coo]),
        _arrays(),
        st.floats(allow_nan=False).map(np.float64),
        st.integers(-9, 9).map(np.int16),
        st.sampled_from([np.bool_(True), np.str_("né"), np.datetime64("2024-02-29", "D")]),
        st.sampled_from([np.dtype("f4"), np.dtype(">i8"), np.dtype([("a", "<i4"), ("b", "?")])]),
        st.datetimes(timezones=st.sampled_from([None, datetime.timezone.utc])),
        st.timedeltas(),
        st.dates(),
        text.map(lambda name: pathlib.PurePosixPath("runs") / name.replace("\0", "")),
        st.just(pathlib.Path("checkpoints/step-50")),
        st.decimals(allow_nan=False),
        st.fractions(),
        st.dictionaries(text, st.integers(), max_size=3).map(Counter),
        st.lists(st.integers(), max_size=3).map(lambda items: deque(items, maxlen=4)),
        st.dictionaries(text, st.integers(), max_size=2).map(lambda items: defaultdict(list, items)),
        st.dictionaries(text, st.integers(), max_size=2).map(lambda items: types.SimpleNamespace(**items)),
    )


def foreign() -> st.SearchStrategy[Any]:
    """Leaves of classes that a reader must import."""
    return st.one_of(
        st.sampled_from(list(Colour)),
        st.builds(Settings, st.text(max_size=5)),
        st.dictionaries(st.sampled_from(["lr", "seed"]), st.integers()).map(
            lambda values: argparse.Namespace(**values)
        ),
        st.integers().map(lambda value: functools.partial(operator.add, value)),
        st.sampled_from([operator.add, Settings, torch.nn.functional.relu]),
    )


# ---------------------------------------------------------------------------- trees


@st.composite
def trees(draw: st.DrawFn, leaves: st.SearchStrategy[Any], *, sparse: bool = False) -> dict[str, Any]:
    """A nested state dict of `leaves` and of tensors that share a few storages."""
    pool = draw(st.lists(_storages(), min_size=1, max_size=4))
    shown = [_dress(pool)]
    if sparse:
        shown.append(_sparse())
    kept = draw(st.lists(st.one_of(*shown), min_size=1, max_size=3))  # these may appear more than once
    again = st.integers(0, len(kept) - 1).map(lambda index: kept[index])
    leaf = st.one_of(again, *shown, leaves)
    keys = st.one_of(st.sampled_from(["weight", "bias", "0", "cpu", "storage"]), st.text(max_size=4))
    tree = st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(keys, inner, max_size=4),
            st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
            st.dictionaries(st.integers(0, 99), inner, max_size=2),
        ),
        max_leaves=12,
    )
    return draw(st.dictionaries(keys, tree, min_size=1, max_size=5))


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal in types, values (NaN equals NaN), strides, and memory of every tensor."""
    if isinstance(one, torch.Tensor):
        return type(one) is type(other) and _same_tensor(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(map(repr, one)) == list(map(repr, other)) and all(
            same(a, b) for a, b in zip(one.values(), other.values(), strict=True)
        )
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, (np.ndarray, np.generic)):
        native = one.dtype.newbyteorder("=")  # numpy itself swaps bytes when it unpickles
        if native != other.dtype.newbyteorder("=") or one.shape != other.shape:
            return False
        return one.astype(native).tobytes() == other.astype(native).tobytes()
    if isinstance(one, functools.partial):
        return same((one.func, one.args), (other.func, other.args))
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other)


def _same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape, one.layout, one.requires_grad) != (
        other.dtype, other.shape, other.layout, other.requires_grad,
    ):  # fmt: skip
        return False
    if one.layout is not torch.strided:
        return torch.equal(one.to_dense(), other.to_dense())
    return (
        (one.stride(), one.storage_offset()) == (other.stride(), other.storage_offset())
        and (one.is_conj(), one.is_neg()) == (other.is_conj(), other.is_neg())
        and storage_bytes(one.untyped_storage()) == storage_bytes(other.untyped_storage())
    )


def storage_bytes(storage: torch.UntypedStorage) -> bytes:
    """What a storage holds."""
    if storage.nbytes() == 0:
        return b""
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()
