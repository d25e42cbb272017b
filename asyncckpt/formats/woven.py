"""The pickle of a tree that is mostly the same in every save: frames that are kept, loose values in between.

Pickling a tensor takes python far longer than finding out that nothing of it changed but values.
So what a pickle says of steady tensors is kept as bytes, and only what is between them is pickled again.

What a pickle says depends on what it said before: a value that was met is put into the unpickler's memo, and
called by its number there. Here loose values have the first numbers to themselves, and frames those behind
them; neither calls anything of the other. What they had in common, a load would have twice: so memory that
both speak of is refused. Attributes that a user hangs on a steady tensor later are not seen.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .pickles import Pickled, TreePickler
from .raw_pickle import RawPickle

Path = tuple[Any, ...]
_LOOSE_MAX = 1 << 16  # numbers in the memo: unpicklers have room for twice as many as the highest
_LOOSE_MIN = 1 << 12


class CannotWeaveError(Exception):
    """It has to be pickled as a whole."""


class SteadyStorage(NamedTuple):
    """Memory of steady tensors: the one of this row, and those that are tied to it, fill it."""

    storage: torch.UntypedStorage
    row: int


class Loose(NamedTuple):
    """A value without steady tensors, and where in the tree it is."""

    path: Path
    value: Any


@dataclass(frozen=True, eq=False)
class Weave:
    """All of a tree's pickle but the loose values.

    Attributes:
        frames: one before each loose value, and one at the end.
        paths: of the loose values.
        branches: what is on the way to steady tensors.
        storages: how many the loose values speak of; they have the first keys.
        numbers: how many of the memo's are for loose values.
    """

    frames: tuple[bytes, ...]
    paths: tuple[Path, ...]
    branches: frozenset[Path]
    storages: int
    numbers: int

    def pickle(self, tree: Mapping[str, Any]) -> Pickled:
        """Of the same tree with other loose values; `tree` may lack all else.

        Raises:
            CannotWeaveError: others are there, or more memory is spoken of.
            Exception: whatever pickling one of them raises.
        """
        values = dict(_loose_in(tree, (), self.branches))
        if values.keys() != set(self.paths):
            raise CannotWeaveError
        pickler = _PartPickler()
        parts = [pickler.part(values[path]) for path in self.paths]
        if pickler.said() > self.numbers or len(pickler.storages) != self.storages:
            raise CannotWeaveError
        return self.woven(parts, pickler)

    def woven(self, parts: list[bytes], pickler: _PartPickler) -> Pickled:
        """With these loose values, which `pickler` pickled."""
        woven = [part for pair in zip(self.frames, (*parts, b""), strict=True) for part in pair]
        return Pickled(b"".join(woven), tuple(pickler.storages), tuple(pickler.tensors.values()))


class Woven(NamedTuple):
    """A tree as it was woven.

    Attributes:
        pickled: the whole pickle; storages and tensors are those of the loose values.
        storages: of the steady tensors; their keys are the last.
    """

    weave: Weave
    pickled: Pickled
    storages: tuple[SteadyStorage, ...]


def weave(tree: Mapping[str, Any], steady: Mapping[int, int]) -> Woven:
    """Pickle a tree whose steady tensors, by `id`, have these rows.

    Raises:
        CannotWeaveError: loose values speak of a steady tensor's memory, are too many, or a steady tensor has
            not all of a storage, or attributes of the user's.
        Exception: whatever pickling one of them raises.
    """
    branches: set[Path] = set()
    parts = _parts(tree, (), steady, branches)
    if parts is None:
        raise CannotWeaveError
    for part in parts:
        if isinstance(part, torch.Tensor) and not (_fills(part, part.untyped_storage()) and _is_bare(part)):
            raise CannotWeaveError
    paths = tuple(part.path for part in parts if isinstance(part, Loose))
    loose = _PartPickler()
    values = [loose.part(part.value) for part in parts if isinstance(part, Loose)]
    numbers = max(_LOOSE_MIN, 1 << (2 * loose.said()).bit_length())
    if numbers > _LOOSE_MAX:
        raise CannotWeaveError
    frames = _PartPickler(numbers, len(loose.storages))
    rows: list[int] = []
    ended: list[bytes] = []
    open_frame = [b"\x80\x02"]  # PROTO 2
    for part in parts:
        if isinstance(part, Loose):
            ended.append(b"".join(open_frame))
            open_frame = []
        elif isinstance(part, torch.Tensor):
            open_frame.append(frames.part(part))
            if len(frames.storages) > len(rows):
                rows.append(steady[id(part)])
        else:
            open_frame.append(part)
    ended.append(b"".join([*open_frame, b"."]))
    theirs = {storage.data_ptr() for storage in loose.storages} - {0}
    if any(storage.data_ptr() in theirs for storage in frames.storages):
        raise CannotWeaveError
    made = Weave(tuple(ended), paths, frozenset(branches), len(loose.storages), numbers)
    return Woven(
        made,
        made.woven(values, loose),
        tuple(map(SteadyStorage, frames.storages, rows)),
    )


class _PartPickler(TreePickler):
    """Pickles values one by one, with one memo."""

    def __init__(self, number: int = 0, key: int = 0) -> None:
        self._sink = io.BytesIO()
        super().__init__(self._sink, key)
        if number:  # the next is that of the memo's length
            self.memo = dict(enumerate((index, object()) for index in range(number)))

    def part(self, value: Any) -> bytes:
        """What pushes one value."""
        self._sink.seek(0)
        self._sink.truncate()
        self.dump(value)
        return self._sink.getvalue()[2:-1]  # without PROTO and STOP

    def said(self) -> int:
        """How many numbers of the memo are taken."""
        return len(self.memo.copy())


def _fills(tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
    return tensor.data_ptr() == storage.data_ptr() and tensor.nbytes == storage.nbytes()


def _is_bare(tensor: torch.Tensor) -> bool:
    return not (vars(tensor) or tensor._backward_hooks)


def _parts(
    value: Any, path: Path, steady: Mapping[int, int], branches: set[Path]
) -> list[bytes | torch.Tensor | Loose] | None:
    """A value in parts; None if there is nothing steady in it."""
    if isinstance(value, torch.Tensor):
        return [value] if id(value) in steady else None
    if type(value) is not dict:
        return None
    children = [(key, child, _parts(child, (*path, key), steady, branches)) for key, child in value.items()]
    if all(parts is None for _, _, parts in children):
        return None
    branches.add(path)
    found: list[bytes | torch.Tensor | Loose] = [b"}("]  # EMPTY_DICT, MARK
    for key, child, parts in children:
        found.append(RawPickle.plain(key))
        found += [Loose((*path, key), child)] if parts is None else parts
    return [*found, b"u"]  # SETITEMS


def _loose_in(value: Mapping[Any, Any], path: Path, branches: frozenset[Path]) -> Iterator[Loose]:
    for key, child in value.items():
        below = (*path, key)
        if below in branches:
            yield from _loose_in(child, below, branches)
        else:
            yield Loose(below, child)
