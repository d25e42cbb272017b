"""numpy arrays and dtypes from a pickle that nobody vouches for.

numpy's own `__setstate__` believes what the pickle says about a dtype, down to the flags that decide
whether raw bytes are taken for object pointers. So descriptions are collected first, and arrays are built
from them by numpy's public constructors, which check.
"""

from __future__ import annotations

import math
import types
from collections import OrderedDict, deque
from typing import Any

import numpy as np

from asyncckpt.formats.inert import Inert, inert_type
from asyncckpt.formats.refs import BadPickleError, sizes_of

_UNSTATED = (3, "=", None, None, None, -1, -1, 0)  # the state of a dtype of native byte order
_CANNOT_BUILD = (TypeError, ValueError, LookupError, AttributeError, BadPickleError)


class DtypeDescription:
    """Takes the calls that would have made a numpy dtype."""

    __slots__ = ("_spec", "_state")

    def __init__(self, spec: Any, align: Any = False, copy: Any = False) -> None:
        self._spec = spec
        self._state: Any = _UNSTATED

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def build(self) -> np.dtype[Any] | Inert:
        """The dtype; inert if numpy's constructors do not know it."""
        try:
            return self._build()
        except _CANNOT_BUILD:
            return inert_type("numpy", "dtype")(self._spec)

    def _build(self) -> np.dtype[Any]:
        built: np.dtype[Any]
        _, order, subarray, names, fields, itemsize = self._state[:6]
        if type(self._spec) is not str or order not in ("<", ">", "=", "|"):
            raise TypeError("not a dtype")
        if subarray is not None:
            built = np.dtype((_built(subarray[0]), sizes_of(subarray[1])))
        elif names is not None:
            layout: Any = {
                "names": list(names),
                "formats": [_built(fields[name][0]) for name in names],
                "offsets": [fields[name][1] for name in names],
                "itemsize": itemsize,
            }
            built = np.dtype(layout)
        elif self._spec in ("M8", "m8"):
            unit, count = self._state[8][1][:2]
            built = np.dtype(f"{self._spec}[{int(count)}{unit.decode()}]").newbyteorder(order)
        else:
            built = np.dtype(self._spec).newbyteorder(order)
        return built


class ArrayDescription:
    """Takes the calls that would have made a numpy array."""

    __slots__ = ("_state",)

    def __init__(self, kind: Any, shape: Any, code: Any) -> None:
        self._state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def build(self) -> np.ndarray[Any, Any] | Inert:
        """The array; inert if its dtype is."""
        try:
            _, shape, dtype, is_fortran, raw = self._state
            order, built = "F" if is_fortran else "C", _built(dtype)
            if built.hasobject:
                flat = np.empty(math.prod(sizes_of(shape)), built)
                if type(raw) is not list or built != np.dtype("O") or len(raw) != flat.size:
                    raise TypeError("not an array of objects")
                for index, element in enumerate(raw):
                    flat[index] = settled(element)
            else:
                flat = np.frombuffer(bytearray(raw), built)
            return flat.reshape(sizes_of(shape), order=order)  # type: ignore[call-overload, no-any-return]
        except _CANNOT_BUILD:
            return inert_type("numpy", "ndarray")(self._state)


def scalar(dtype: Any, raw: Any = None) -> Any:
    """numpy's `scalar`: one value from its bytes."""
    built = dtype.build() if type(dtype) is DtypeDescription else None
    if not isinstance(built, np.dtype) or built.hasobject or type(raw) is not bytes:
        return inert_type("numpy", "generic")(dtype, raw)
    if built.itemsize == 0:
        return built.type()
    return np.frombuffer(raw, built, count=1)[0]


def _built(dtype: Any) -> np.dtype[Any]:
    built = dtype.build() if type(dtype) is DtypeDescription else None
    if not isinstance(built, np.dtype):
        raise TypeError("not a dtype")
    return built


def settled(tree: Any) -> Any:
    """`tree` with every description replaced by what it describes; containers keep their identity."""
    return _Settling().settle(tree)


class _Settling:
    def __init__(self) -> None:
        self._done: dict[int, tuple[Any, Any]] = {}  # keeps what it has seen alive: ids stay taken

    def settle(self, value: Any) -> Any:
        kind = type(value)
        if kind in (int, str, float, bool, bytes, type(None)):
            return value
        if id(value) in self._done:
            return self._done[id(value)][1]
        self._done[id(value)] = value, value  # until it is replaced: a tree may contain itself
        new = value
        if kind in (DtypeDescription, ArrayDescription):
            new = value.build()
        elif kind is tuple or kind in (set, frozenset):
            children = [self.settle(child) for child in value]
            if any(child is not old for child, old in zip(children, value, strict=True)):
                new = kind(children)
        elif isinstance(value, dict):
            for key, child in list(value.items()):
                value[key] = self.settle(child)
            if kind is OrderedDict:
                self.settle(vars(value))
        elif kind in (list, deque):
            for index, child in enumerate(value):
                value[index] = self.settle(child)
        elif kind is types.SimpleNamespace:
            self.settle(vars(value))
        elif isinstance(value, Inert):
            value.args, value.state = self.settle(value.args), self.settle(value.state)
            self.settle(value.elements)
            value.pairs = [(self.settle(key), self.settle(child)) for key, child in value.pairs]
        self._done[id(value)] = value, new
        return new
