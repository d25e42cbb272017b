"""The tree of a training state: named leaves, and what stands for a tensor that is not read yet.

Branches are mappings with string keys, and lists that hold a tensor or a branch. All else is a leaf: a
tensor, or python that is pickled whole, whatever tensors it may hold inside.
"""

from __future__ import annotations

import types
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch

from . import devices
from .errors import LeafError
from .formats.refs import span_elements
from .shards import Block, Blocks, Boxed, Holders
from .shared import SharedFile, SlicedTensor
from .survey import Survey

Path = tuple[str | int, ...]

# What each rank has for itself; all else is the same on every rank, or spread over them as torch knows.
OWN_SECTIONS = ("dataloader", "per_rank", "rng")


@dataclass(frozen=True, eq=False)
class Structure:
    """What some tensors of a tree are, apart from their values. The same object says that nothing changed.

    Attributes:
        names: of these leaves.
        forms: see `survey.Survey`.
    """

    names: tuple[str, ...]
    forms: bytes


class Steady(NamedTuple):
    """The tensors of a tree that training only changes in place, most of the time.

    Attributes:
        tensors: the live ones, as `structure` names them.
        survey: of them, at the beginning of a save.
    """

    structure: Structure
    tensors: list[torch.Tensor]
    survey: Survey


class StateTree(dict[str, Any]):
    """A tree, and what planners cannot tell from its leaves.

    Attributes:
        parameters: keys of the model's branch that are parameters, which training keeps equal on all ranks
            that have the same of them. Its buffers may differ.
        write_only: branches that are for other tools; a load here passes over them.
        steady: tensors that can be had from here too, where there are such.
        is_whole: whether they are in the tree besides. If not, branches of them alone are absent.
    """

    parameters: frozenset[str] = frozenset()
    write_only: frozenset[str] = frozenset()
    steady: Steady | None = None
    is_whole = True
    _leaves: list[Leaf] | None = None

    def like(self, branches: Mapping[str, Any]) -> StateTree:
        """Other branches, of which the same is to be said."""
        tree = StateTree(branches)
        tree.parameters, tree.write_only = self.parameters, self.write_only
        tree.steady, tree.is_whole = self.steady, self.is_whole
        return tree

    def leaves(self) -> list[Leaf]:
        """What `flatten` says of it; found once: the tree must not change any more."""
        if self._leaves is None:
            self._leaves = flatten(self)
        return self._leaves


def leaves_of(tree: Mapping[str, Any]) -> list[Leaf]:
    """The leaves of a tree, in its order."""
    return tree.leaves() if isinstance(tree, StateTree) else flatten(tree)


def restored(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The branches of a tree that a load brings back."""
    write_only = tree.write_only if isinstance(tree, StateTree) else frozenset()
    return {name: branch for name, branch in tree.items() if name not in write_only}


class Leaf(NamedTuple):
    """A value of the tree that is saved as one: a tensor, or python that is pickled."""

    name: str  # the path, joined with "."
    path: Path
    value: Any


@dataclass(frozen=True, eq=False)
class Keyed:
    """A leaf: python that is saved under a name of its own, for this rank to write.

    Attributes:
        key: unique over all ranks.
    """

    key: str
    value: Any


# Values that hold no others. A list of thousands of names, or of numbers, is not gone through one by one.
_ATOMS = frozenset((str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device))


def _are_atoms(values: Collection[Any]) -> bool:
    return _ATOMS.issuperset(map(type, values))


def _grown(values: Iterable[Any]) -> list[Any]:
    """Those that may hold others; `values` may be good for one pass only."""
    if not isinstance(values, list | tuple):
        values = list(values)
    return [] if _are_atoms(values) else [value for value in values if type(value) not in _ATOMS]


def flatten(tree: Mapping[str, Any]) -> list[Leaf]:
    """The leaves of a tree, in its order.

    The rule is stock DCP's (torch/distributed/checkpoint/_traverse.py), but nothing is lost here: an
    empty mapping is a leaf, and so is a mapping whose keys are not all strings.

    Raises:
        LeafError: two leaves have the same name.
    """
    leaves: dict[str, Leaf] = {}
    try:
        for key, child in tree.items():
            _flatten(str(key), (key,), child, leaves)
    except RecursionError:
        raise LeafError("the state refers to itself, or is nested too deeply to be saved") from None
    return list(leaves.values())


# Here and below, functions that call themselves are no closures: such a closure is a cycle, and would
# keep tensors (of devices, even) until the garbage collector comes by.
def _flatten(name: str, path: Path, value: Any, leaves: dict[str, Leaf]) -> None:
    if not isinstance(value, torch.Tensor) and _is_branch(value):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, child in items:
            _flatten(f"{name}.{key}", (*path, key), child, leaves)
        return
    if name in leaves:
        raise LeafError(f"two leaves are called {name!r}: {leaves[name].path} and {path}; rename one key")
    leaves[name] = Leaf(name, path, value)


def _is_branch(value: Any) -> bool:
    if type(value) in (dict, OrderedDict):  # others mean more than their items
        return bool(value) and all(type(key) is str for key in value)
    if type(value) is list:
        return any(isinstance(item, torch.Tensor) or _is_branch(item) for item in _grown(value))
    return False


def unflatten(leaves: Iterator[tuple[Path, Any]]) -> dict[str, Any]:
    """The tree that `flatten` would have taken apart into these leaves; integer keys make lists."""
    root: dict[Any, Any] = {}
    lists: list[tuple[dict[Any, Any], Any]] = []  # (parent, key) of every list, parents first

    for path, value in leaves:
        node = root
        for key, following in pairwise(path):
            if key not in node:
                node[key] = {}
                if type(following) is int:
                    lists.append((node, key))
            node = node[key]
        node[path[-1]] = value
    for parent, key in reversed(lists):  # innermost first, so that a list's items are final
        children = parent[key]
        parent[key] = [children[index] for index in sorted(children)]
    return root


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested mappings, lists and tuples, in their order, also if they contain themselves; of
    files that ranks share, this rank's pieces."""
    if type(value) in _ATOMS:
        return
    seen: set[int] = set()
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, SlicedTensor):
            yield from (piece for _, piece in value.pieces)
        elif isinstance(value, SharedFile):
            rest.append(value.content)
        elif isinstance(value, Boxed):
            yield value.tensor
        elif isinstance(value, Keyed):
            rest.append(value.value)
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            rest += reversed(_grown(value.values() if isinstance(value, Mapping) else value))


def named_tensors_in(leaf: Leaf) -> Iterator[tuple[str, torch.Tensor]]:
    """Its tensors, and what to call each: in a list of files that ranks share, by the file."""
    if isinstance(leaf.value, torch.Tensor):
        yield leaf.name, leaf.value
        return
    for value in _grown(leaf.value if isinstance(leaf.value, list) else [leaf.value]):
        name = value.path if isinstance(value, SharedFile) else leaf.name
        yield from ((name, tensor) for tensor in tensors_in(value))


def rebuilt(
    value: Any, kind: type | tuple[type, ...], convert: Callable[[Any], Any], *, objects: bool = True
) -> Any:
    """`value` with every `kind` in it converted. Containers are new, what they hold besides is not.

    `objects`: also attributes of other objects are converted, in place; for values that nobody else has.
    """
    try:
        return _Rebuilding(kind, convert, objects).visit(value)
    except RecursionError:
        raise LeafError("a value is nested too deeply to be saved") from None


class _Rebuilding:
    def __init__(self, kind: type | tuple[type, ...], convert: Callable[[Any], Any], objects: bool) -> None:
        self._kind = kind
        self._convert = convert
        self._objects = objects
        self._seen: dict[int, Any] = {}

    def visit(self, value: Any) -> Any:
        if isinstance(value, self._kind):
            return self._convert(value)
        if type(value) in _ATOMS or isinstance(value, torch.Tensor):
            return value
        seen, visit = self._seen, self.visit
        if id(value) in seen:
            return seen[id(value)]
        if isinstance(value, MutableMapping) and hasattr(value, "copy"):
            copy = value.copy()
            seen[id(value)] = copy
            for key, child in value.items():
                copy[key] = child if type(child) in _ATOMS else visit(child)
            return copy
        if isinstance(value, list):
            copy = value.copy()
            seen[id(value)] = copy
            copy[:] = [child if type(child) in _ATOMS else visit(child) for child in value]
            return copy
        if isinstance(value, torch.Size) or (type(value) is tuple and _are_atoms(value)):
            return value
        if isinstance(value, tuple):
            children = [child if type(child) in _ATOMS else visit(child) for child in value]
            if all(new is old for new, old in zip(children, value, strict=True)):
                return value
            copy = tuple.__new__(type(value), children)  # whatever its own constructor asks for
            if hasattr(value, "__dict__"):
                vars(copy).update(vars(value))
            return copy
        if isinstance(value, deque):
            return deque((visit(child) for child in value), value.maxlen)
        if isinstance(value, set | frozenset):
            return type(value)(visit(child) for child in value)
        if self._objects and hasattr(value, "__dict__") and not isinstance(value, _CODE):
            seen[id(value)] = value
            for name, child in list(vars(value).items()):
                vars(value)[name] = visit(child)
        return value


_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


# ---------------------------------------------------------------------------- loading's vocabulary


class StoredPart(NamedTuple):
    """One stored block of a tensor.

    Attributes:
        file: relative to the step directory.
        data_offset: of the block's first element, in the file.
        nbytes: from there to the end of its last element.
        offsets, shape: which part of the whole tensor this is, in elements.
        stride: of the stored elements.
        conj, neg: the values are the conjugate, the negative, of the stored bytes.
    """

    file: str
    data_offset: int
    nbytes: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    conj: bool = False
    neg: bool = False

    def within(self, offsets: Sequence[int], shape: Sequence[int], itemsize: int) -> StoredPart | None:
        """What of it lies in a box of the whole tensor; None if nothing does. The stride stays."""
        if self.offsets == offsets and self.shape == shape and 0 not in shape:
            return self
        begins = [max(a, b) for a, b in zip(self.offsets, offsets, strict=True)]
        ends = [
            min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.shape, offsets, shape, strict=True)
        ]
        if any(end <= begin for begin, end in zip(begins, ends, strict=True)):
            return None
        cut = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
        if cut == self.shape:
            return self
        skipped = sum((a - b) * n for a, b, n in zip(begins, self.offsets, self.stride, strict=True))
        return self._replace(
            data_offset=self.data_offset + skipped * itemsize,
            nbytes=span_elements(cut, self.stride) * itemsize,
            offsets=tuple(begins),
            shape=cut,
        )


@dataclass(frozen=True)
class UnparsedPart:
    """One of many stored blocks of a tensor. Only where it belongs is known: ranks parse what they need.

    Attributes:
        file: relative to the step directory.
        item_offset: of the item that holds it, in the file.
        offsets, shape: which part of the whole tensor this is, in elements.
        parse: the part. Raises CorruptStepError if the item holds something else.
    """

    file: str
    item_offset: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    parse: Callable[[], StoredPart] = field(compare=False, repr=False)

    def meets(self, offsets: Sequence[int], shape: Sequence[int]) -> bool:
        """Whether it has elements in a box of the whole tensor."""
        return all(
            max(a, b) < min(a + n, b + m)
            for a, n, b, m in zip(self.offsets, self.shape, offsets, shape, strict=True)
        )


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint, not read yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[StoredPart | UnparsedPart, ...]

    def needed(self, block: Block) -> NeededTensor:
        """What of it has to be read for a block; parsed."""
        if self._is_one(block):
            return NeededTensor(self.dtype, cast("tuple[StoredPart]", self.parts))
        return NeededTensor(
            self.dtype,
            tuple(
                part if isinstance(part, StoredPart) else part.parse()
                for part in self.parts
                if isinstance(part, StoredPart) or part.meets(block.offsets, block.shape)
            ),
        )

    def covers(self, block: Block) -> bool:
        """Whether all of a block is there; parts do not overlap. Of what is on one node, it may not be."""
        if self._is_one(block):
            return True
        there = 0
        for part in self.parts:
            common = [
                min(a + n, b + m) - max(a, b)
                for a, n, b, m in zip(part.offsets, part.shape, block.offsets, block.shape, strict=True)
            ]
            there += _elements(common) if all(size > 0 for size in common) else 0
        return there == _elements(block.shape)

    def _is_one(self, block: Block) -> bool:
        """Whether a block is the tensor's only part, as most are."""
        only = self.parts[0] if len(self.parts) == 1 else None
        return isinstance(only, StoredPart) and (only.offsets, only.shape) == (block.offsets, block.shape)


class NeededTensor(NamedTuple):
    """The parts of a stored tensor that a block of it needs; there may be more."""

    dtype: torch.dtype
    parts: tuple[StoredPart, ...]


class Read(NamedTuple):
    """What is stored of a block of a tensor, and the live tensor whose memory it goes to."""

    name: str
    stored: NeededTensor
    block: Block
    live: torch.Tensor


def fits(live: torch.Tensor, stored: StoredTensor) -> bool:
    """Whether a stored tensor has the live one's shape and dtype."""
    return tuple(live.shape) == stored.shape and live.dtype == stored.dtype


@dataclass
class Matching:
    """What a load has to do.

    Attributes:
        reads: what is stored of a block of a tensor, and the live memory it goes to.
        afterwards: run in order once every read was verified.
        missing: leaves that the live objects have and the checkpoint has not.
        unexpected: leaves that only the checkpoint has.
        missing_sections, unexpected_sections: the same of whole sections.
        differences: leaves that both have but that do not fit.
    """

    reads: list[Read] = field(default_factory=list)
    afterwards: list[Callable[[], None]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    missing_sections: list[str] = field(default_factory=list)
    unexpected_sections: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    _blocks: Blocks = field(default_factory=lambda: Blocks(1))

    def into(self, name: str, stored: Any, live: torch.Tensor) -> None:
        """Plan to read `stored` into `live`, if it fits."""
        if not isinstance(stored, StoredTensor):
            self.differences.append(f"{name}: a tensor here, {type(stored).__name__} in the checkpoint")
        elif live.device.type == "meta":
            self.differences.append(f"{name}: lives on the meta device; call to_empty() before loading")
        elif not devices.is_reachable(live):
            self.differences.append(
                f"{name}: lives on {live.device}; only the host and CUDA devices are read to"
            )
        elif tuple(live.shape) != stored.shape or live.dtype != stored.dtype:
            self.differences.append(
                f"{name}: {describe(live.dtype, live.shape)} here, "
                f"{describe(stored.dtype, stored.shape)} in the checkpoint"
            )
        else:
            self._read(name, stored, live)

    def into_slice(self, name: str, stored: Any, begin: int, live: torch.Tensor) -> None:
        """Plan to read into `live`, a flat tensor, what a flat `stored` one has from element `begin` on."""
        end = begin + live.numel()
        if not isinstance(stored, StoredTensor) or len(stored.shape) != 1 or stored.shape[0] < end:
            self.differences.append(f"{name}: {end} elements here, not so many in the checkpoint")
        elif stored.dtype != live.dtype:
            self.differences.append(
                f"{name}: {describe(live.dtype, live.shape)} here, "
                f"{describe(stored.dtype, stored.shape)} in the checkpoint"
            )
        else:
            self._read_box(name, stored, (begin,), live)

    def into_box(self, name: str, stored: Any, box: Boxed, *, resized: bool = False) -> None:
        """Plan to read what a stored tensor has at the place of a live box.

        Args:
            resized: the stored one may be of another size: what it lacks becomes zeros.
        """
        live = box.tensor
        if not isinstance(stored, StoredTensor):
            self.differences.append(f"{name}: a tensor here, {type(stored).__name__} in the checkpoint")
            return
        fits = len(stored.shape) == len(box.whole) if resized else stored.shape == box.whole
        if not fits or stored.dtype != live.dtype:
            self.differences.append(
                f"{name}: {describe(live.dtype, box.whole)} here, "
                f"{describe(stored.dtype, stored.shape)} in the checkpoint"
            )
            return
        lacking = []
        for dim, (size, begin) in enumerate(zip(stored.shape, box.offsets, strict=True)):
            there = min(max(size - begin, 0), live.shape[dim])
            if there < live.shape[dim]:
                lacking.append(live.narrow(dim, there, live.shape[dim] - there))
                live = live.narrow(dim, 0, there)

        def clear() -> None:
            for part in lacking:
                part.zero_()

        self.afterwards.append(clear)
        self._read_box(name, stored, box.offsets, live)

    def _read_box(
        self, name: str, stored: StoredTensor, offsets: tuple[int, ...], live: torch.Tensor
    ) -> None:
        self._read_block(name, stored, Block(stored.shape, offsets, tuple(live.shape), Holders("", ())), live)

    def _read(self, name: str, stored: StoredTensor, live: torch.Tensor) -> None:
        self._read_block(name, stored, self._blocks.of(name, live), live)

    def _read_block(self, name: str, stored: StoredTensor, block: Block, live: torch.Tensor) -> None:
        if not stored.covers(block):
            self.differences.append(f"{name}: not all of what is here of it was saved on this node")
            return
        self.reads.append(Read(name, stored.needed(block), block, live))

    def fresh(self, name: str, stored: Any, like: torch.Tensor | None = None) -> Any:
        """`stored` with new tensors in place of stored ones, to be filled by the reads.

        `like` says where they live and, for those of its shape, how they lie in memory: kernels that
        walk a parameter and its moments together pair them by address.
        """
        made: dict[StoredTensor, torch.Tensor] = {}
        if like is not None and not devices.is_reachable(like):
            self.differences.append(
                f"{name}: belongs on {like.device}; only the host and CUDA devices are read to"
            )
            like = None

        def make(value: Any) -> torch.Tensor:
            if value not in made:
                made[value] = _allocate(value, like)
                self._read(name, value, made[value])
            return made[value]

        return rebuilt(stored, StoredTensor, make)


def _allocate(stored: StoredTensor, like: torch.Tensor | None) -> torch.Tensor:
    if like is not None and tuple(like.shape) == stored.shape:
        return torch.empty_like(like, dtype=stored.dtype, requires_grad=False)
    first = stored.parts[0] if len(stored.parts) == 1 else None
    if isinstance(first, StoredPart) and first.nbytes == _elements(stored.shape) * stored.dtype.itemsize:
        if like is not None:
            return like.new_empty_strided(stored.shape, first.stride, dtype=stored.dtype)
        return torch.empty_strided(stored.shape, first.stride, dtype=stored.dtype)
    if like is not None:
        return like.new_empty(stored.shape, dtype=stored.dtype)
    return torch.empty(stored.shape, dtype=stored.dtype)


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def describe(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
