"""Pickles written opcode by opcode: what is said a million times is made of parts that are written once.

`pickle.dumps` needs every object to exist, all at the same time, and looks at each with care; a `.metadata`
of 1.5 million pieces took 26 s and two gigabytes. Here an object of a known kind is a template and values.

Parts that are used again are put into the memo in front of the pickle and dropped from the stack at once, so
that they are on hand whatever comes first. Opcodes: pickletools.py of CPython.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Iterable, Mapping
from typing import Any


class RawPickle:
    """One pickle under construction. All of its methods but `to_bytes` return bytes that push one value."""

    def __init__(self) -> None:
        self._shared: dict[Any, bytes] = {}
        self._front: list[bytes] = []

    @staticmethod
    def plain(value: Any) -> bytes:
        """Any value that is said once, is small and does not contain itself."""
        if type(value) is str:  # most of what is said
            data = value.encode("utf-8", "surrogatepass")
            return b"X" + len(data).to_bytes(4, "little") + data  # BINUNICODE
        sink = io.BytesIO()
        pickler = pickle.Pickler(sink, protocol=2)
        pickler.fast = True  # uses no memo: that is ours
        pickler.dump(value)
        return sink.getvalue()[2:-1]  # without PROTO and STOP

    @staticmethod
    def integer(value: int) -> bytes:
        if -(1 << 31) <= value < 1 << 31:
            return b"J" + value.to_bytes(4, "little", signed=True)  # BININT
        nbytes = value.bit_length() // 8 + 1
        return b"\x8a" + bytes((nbytes,)) + value.to_bytes(nbytes, "little", signed=True)  # LONG1

    def shared(self, value: Any) -> bytes:
        """A hashable value that is one object wherever it is said. Equal values must be of one type."""
        found = self._shared.get(value)
        if found is None:
            found = self._shared[value] = self._remember(self.plain(value))
        return found

    def shared_once(self, value: Any) -> bytes:
        """A value that may be said again; the caller keeps what this returns, and says that."""
        return self._remember(self.plain(value))

    def _remember(self, part: bytes) -> bytes:
        number = struct.pack("<I", len(self._front))
        self._front.append(part + b"r" + number + b"0")  # LONG_BINPUT, POP
        return b"j" + number  # LONG_BINGET

    def dictionary(self, items: Iterable[bytes]) -> bytes:
        """Keys and values in turn."""
        return b"".join((b"}(", *items, b"u"))  # EMPTY_DICT, MARK, SETITEMS

    def sequence(self, items: Iterable[bytes]) -> bytes:
        """A list."""
        return b"".join((b"](", *items, b"e"))  # EMPTY_LIST, MARK, APPENDS

    def instance(self, like: Any, **attributes: bytes) -> bytes:
        """An object of the class of `like` and with its attributes, but for those that are given."""
        parts = self.template(like, *attributes)
        return b"".join(
            part for pair in zip(parts, (*attributes.values(), b""), strict=True) for part in pair
        )

    def template(self, like: Any, *open_attributes: str) -> tuple[bytes, ...]:
        """What stands before, between and behind the values of these attributes, in this order."""
        _, (kind,), state, *_ = like.__reduce_ex__(2)
        closed: Mapping[str, Any] = {key: value for key, value in state.items() if key not in open_attributes}
        begin = self.shared(kind) + b")\x81}("  # EMPTY_TUPLE, NEWOBJ, EMPTY_DICT, MARK
        begin += b"".join(self.shared(key) + self.plain(value) for key, value in closed.items())
        names = [self.shared(name) for name in open_attributes]
        return (begin + names[0], *names[1:], b"ub")  # SETITEMS, BUILD

    def to_bytes(self, value: bytes) -> bytes:
        """The pickle of `value`, which is what one of the methods returned."""
        return b"".join((b"\x80\x04", *self._front, value, b"."))  # PROTO 4, STOP
