"""Files -> tensors: what a step holds, and reading it, verified, straight into live memory.

    manifest, fragments -> stored tree (no tensor byte read) -> matching -> one verified pass

Guarantees:
- With a manifest, every block of every file is checked against its CRC in the pass that reads it, and
  the files are those that the manifest lists. What is parsed on the way lies in blocks that are checked
  before anything but tensors has been touched.
- Without one (files of stock torch, DCP, Megatron), the tensors are read as they are; `verified` says so.
- Nothing is unpickled that can run code, unless `trusted`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import _native, devices
from .errors import CorruptStepError, DeviceError, LoadError, StepNotFoundError, UntrustedError
from .filesystem import OF_THIS_PROCESS
from .formats import distcp, torch_zip
from .formats.alike import Archives
from .formats.manifest import FileEntry, check_path
from .formats.pickles import SparseRef, TensorRef, find_inert
from .formats.refs import span_elements
from .layouts.megatron import COMMON_ITEM, COMMON_PATH, CONFIG_PATH, ModelRank
from .layouts.megatron_tree import from_megatron, from_megatron_dist
from .layouts.place import Place
from .layouts.rlinf import DATA_NAME
from .layouts.rlinf_tree import from_rlinf
from .shards import local_of
from .shared import SHARED_BRANCH, is_slices, slices_path
from .tree import Read, StoredPart, StoredTensor, UnparsedPart, rebuilt, unflatten

_THREADS_MAX = 12
_THREADS_TO_DEVICES = 4  # these have two buffers each, which are pinned
_BLOCK_NBYTES = 4 << 20  # of reads from files without a manifest
_BLOCK_NBYTES_MAX = 1 << 30  # a manifest that asks for larger buffers is not believed
_PAGE_NBYTES = 4096  # of the page cache, about
_OPEN_MAX = 64  # files of a step open at once for parsing; thousands of ranks have more than a process may


def _threads() -> int:
    # More than the disk needs: while some check and copy, it must not wait for the others. But each has a
    # buffer to be found and cleared, and those that read ahead take the cores that find out where bytes go.
    return min(_THREADS_MAX, 1 + 2 * len(os.sched_getaffinity(0)))


class StepFiles:
    """The files of one step, as small verified-enough reads for parsing need them.

    Args:
        directory: of the step.
        entries: what the files must be; None for a step without a manifest.
        all_here: all of them are verified by this process, and all goes to the host.
    """

    def __init__(
        self, directory: Path, entries: Mapping[str, FileEntry] | None, *, all_here: bool = False
    ) -> None:
        self.directory = directory
        self.entries = entries
        self._all_here = all_here
        self._fds: dict[str, int] = {}  # of the files used last, in that order
        self._early: _native.EarlyReading | None = None

    def __enter__(self) -> StepFiles:
        return self

    def __exit__(self, *_: object) -> None:
        if (early := self.take_early()) is not None:
            early.close()
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def begin_early(self) -> None:
        """Let the next pass over all files begin, if all of them is read in any case.

        That need not wait until it is found out where the bytes go; those that are checked meanwhile wait in
        the buffers of the pass. Small reads go before: from here on they may wait until these are full.
        """
        if self.entries and self._all_here and self._early is None:
            batch, _, _ = _batch(self, {name: _FileReads() for name in self.entries}, (0, 1))
            with contextlib.suppress(ValueError, RuntimeError):  # the pass itself will say what it is
                self._early = _native.EarlyReading(batch, _threads(), True)

    def take_early(self) -> _native.EarlyReading | None:
        """The pass that has begun, if one has; it is the caller's to finish, or to close."""
        early, self._early = self._early, None
        return early

    def path(self, name: str) -> str:
        """Where a file of the step is. Raises CorruptStepError for names that lead out of it."""
        try:
            check_path(name)
        except ValueError as error:
            raise CorruptStepError(str(self.directory), str(error)) from None
        if self.entries is not None and name not in self.entries:
            raise CorruptStepError(str(self.directory / name), "the manifest does not list it")
        return str(self.directory / name)

    def nbytes(self, name: str) -> int:
        """Size of a file in bytes."""
        size = os.fstat(self._open(name)).st_size
        if self.entries is not None and size != self.entries[name].nbytes:
            raise CorruptStepError(self.path(name), f"{self.entries[name].nbytes} bytes expected, got {size}")
        return size

    def reader(self, name: str) -> torch_zip.Read:
        """Reads of one file."""
        self._open(name)

        def read(offset: int, nbytes: int) -> bytes:
            fd = self._open(name)  # it may have been closed meanwhile, for others
            data = os.pread(fd, nbytes, offset)
            if len(data) == nbytes:
                return data
            pieces = [data]
            while pieces[-1] and sum(map(len, pieces)) < nbytes:  # the kernel stops short of 2 GiB
                done = sum(map(len, pieces))
                pieces.append(os.pread(fd, nbytes - done, offset + done))
            return b"".join(pieces)

        return read

    def expect(self, name: str, spans: Iterable[tuple[int, int]]) -> None:
        """Let the kernel fetch what will be read soon, (offset, nbytes), so that small reads all over a file
        do not wait for the disk one by one. A hint: nothing depends on it."""
        fd = self._open(name)
        begin = end = 0
        for offset, nbytes in [*sorted(spans), (1 << 62, 0)]:
            if offset > end + _PAGE_NBYTES:
                if end > begin:
                    with contextlib.suppress(OSError, OverflowError):
                        os.posix_fadvise(fd, begin, end - begin, os.POSIX_FADV_WILLNEED)
                begin = offset
            end = max(end, offset + nbytes)

    def content(self, name: str) -> bytes:
        """The whole of a file, each block checked where there is a manifest."""
        data = self.reader(name)(0, self.nbytes(name))
        entry = self.entries[name] if self.entries is not None else None
        for block, crc in enumerate(entry.block_crcs if entry is not None else ()):
            begin = block * (entry.block_nbytes if entry is not None else 0)
            got = zlib.crc32(data[begin : begin + (entry.block_nbytes if entry is not None else 0)])
            if got != crc:
                raise CorruptStepError(self.path(name), f"CRC-32 {crc:08x} expected, got {got:08x}", block)
        return data

    def _open(self, name: str) -> int:
        fd = self._fds.pop(name, None)
        if fd is None:
            fd = self._opened(name)
            while len(self._fds) >= _OPEN_MAX:
                os.close(self._fds.pop(next(iter(self._fds))))
        self._fds[name] = fd
        return fd

    def _opened(self, name: str) -> int:
        path = self.path(name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not self.directory.exists():
                raise StepNotFoundError(f"{self.directory} was deleted while it was read") from None
            _raise_if_ours(path, "open", error.errno)
            raise CorruptStepError(path, f"cannot be opened: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise CorruptStepError(path, "not a regular file")
        return fd


_OURS = OF_THIS_PROCESS | {errno.EACCES}


def _raise_if_ours(path: str, operation: str, number: int | None) -> None:
    """Raise LoadError where nothing is known of the file: an older step would be refused as well."""
    if number in _OURS:
        raise LoadError(
            f"{operation} failed: {path}: {errno.errorcode[number]} ({os.strerror(number)}); "
            f"the step may be good, raise what this process may use"
        )


# ---------------------------------------------------------------------------- what is stored


def read_tree(
    files: StepFiles,
    place: Place,
    *,
    trusted: bool = False,
    model_rank: ModelRank | None = None,
    shared: Sequence[str] = (),
    is_whole: bool = True,
    rank: int = 0,
) -> dict[str, Any]:
    """The tree of a part of a step, with a StoredTensor for every tensor.

    Args:
        model_rank: which part of a model this process has, where a tree has parts.
        shared: paths of files that ranks wrote together, of which this process has something; their contents
            come in the branch for those, by path.
        is_whole: False where other nodes have the rest of what ranks have together.
        rank: of this process within the part.

    Raises:
        CorruptStepError: something cannot be parsed.
        LoadError: it holds what this version cannot load (sparse tensors, say).
    """
    if place.format == "megatron":
        tree = _read_megatron(files, place, trusted, model_rank or ModelRank(), is_whole)
        if shared:
            tree[SHARED_BRANCH] = {
                path: _read_shared(files, place.path(path), trusted, is_whole, rank) for path in shared
            }
        return tree
    if place.format == "megatron-dist":
        return _read_megatron_dist(files, place, trusted)
    if place.format == "driver":
        return _read_driver(files, place, trusted)
    if place.format == "rlinf-dcp":
        return from_rlinf(_read_dcp(files, place.path(place.metadata), trusted, is_whole))
    return _read_dcp(files, place.path(place.metadata), trusted, is_whole)


def _read_dcp(files: StepFiles, described_in: str, trusted: bool, is_whole: bool) -> dict[str, Any]:
    items, paths = _read_items(files, described_in, trusted, is_whole)
    return unflatten((_as_path(paths.get(name), name), value) for name, value in items.items())


def _read_items(
    files: StepFiles, described_in: str, trusted: bool, is_whole: bool
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """What `.metadata` describes, by name; and the paths that it has for some of the names."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    content = files.content(described_in)
    try:
        metadata = distcp.read_metadata(content, trusted=trusted)
    except ValueError as error:
        raise CorruptStepError(files.path(described_in), str(error)) from error
    beside = described_in.rpartition("/")[0]

    def file_of(info: Any) -> str:
        return f"{beside}/{info.relative_path}" if beside else str(info.relative_path)

    places: dict[str, list[tuple[Any, Any]]] = {}
    for index, info in metadata.storage_data.items():
        places.setdefault(index.fqn, []).append((index, info))
    paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    parts: dict[tuple[str, int], TensorRef] = {}
    archives = Archives(trusted=trusted)
    readers: dict[str, torch_zip.Read] = {}

    def item(info: Any) -> Any:
        name = file_of(info)
        if name not in readers:
            readers[name] = files.reader(name)
        try:
            return archives.read_tree(readers[name], info.offset, info.length)
        except ValueError as error:
            raise CorruptStepError(files.path(name), f"item at {info.offset}: {error}") from error

    def parsed(
        name: str, described: Any, info: Any, offsets: tuple[int, ...], sizes: tuple[int, ...] | None
    ) -> StoredPart:
        key = (info.relative_path, info.offset)
        if key not in parts:
            ref = item(info)
            if not isinstance(ref, TensorRef):
                raise CorruptStepError(files.path(file_of(info)), f"{name}: no tensor at {info.offset}")
            parts[key] = ref
        ref = parts[key]
        if ref.dtype != described.properties.dtype:
            raise CorruptStepError(files.path(described_in), f"{name}: dtype differs from its items")
        if sizes is not None and ref.shape != sizes:
            raise CorruptStepError(
                files.path(described_in), f"{name}: shape differs from its item at {offsets}"
            )
        return _part(ref, file_of(info), offsets)

    def leaf(name: str, described: Any) -> Any:
        if name not in places and (is_whole or isinstance(described, BytesStorageMetadata)):
            raise CorruptStepError(files.path(described_in), f"{name} is described but stored nowhere")
        if isinstance(described, BytesStorageMetadata):
            _, info = places[name][0]
            return _stored(item(info), file_of(info))
        stored: list[StoredPart | UnparsedPart] = []
        found = places.get(name, [])
        sizes = _sizes_of(described) if len(found) > 1 else {}
        for index, info in found:
            offsets = tuple(index.offset) if index.offset is not None else (0,) * len(described.size)

            def part(info: Any = info, offsets: tuple[int, ...] = offsets) -> StoredPart:
                return parsed(name, described, info, offsets, sizes.get(offsets))

            if offsets in sizes:
                stored.append(UnparsedPart(file_of(info), info.offset, offsets, sizes[offsets], part))
            else:
                stored.append(part())
            if not _inside(offsets, stored[-1].shape, described.size):
                raise CorruptStepError(files.path(described_in), f"{name}: a chunk lies outside of it")
        tensor = StoredTensor(described.properties.dtype, tuple(described.size), tuple(stored))
        boxes = [(part.offsets, part.shape) for part in tensor.parts]
        if not (distcp.tile(tensor.shape, boxes) if is_whole else distcp.are_apart(tensor.shape, boxes)):
            raise CorruptStepError(files.path(described_in), f"{name}: its chunks do not tile it")
        return tensor

    _expect(files, (found[0][1] for found in places.values() if len(found) == 1), file_of)
    return {name: leaf(name, described) for name, described in metadata.state_dict_metadata.items()}, paths


def _expect(files: StepFiles, infos: Iterable[Any], file_of: Callable[[Any], str]) -> None:
    """Say which items will be parsed."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for info in infos:
        spans.setdefault(file_of(info), []).extend(torch_zip.read_ahead(info.offset, info.length))
    for name, of_file in spans.items():
        files.expect(name, of_file)
    files.begin_early()


def _sizes_of(described: Any) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a tensor's chunks by their offsets; none if several (without elements) are at one place."""
    sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in described.chunks}
    return sizes if len(sizes) == len(described.chunks) else {}


def _inside(offsets: tuple[int, ...], shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return len(offsets) == len(shape) == len(whole) and all(
        0 <= offset <= size - length for offset, length, size in zip(offsets, shape, whole, strict=True)
    )


def _as_path(path: Any, name: str) -> tuple[str | int, ...]:
    if isinstance(path, tuple) and path and all(type(step) in (str, int) for step in path):
        return path
    head, _, rest = name.partition(".")  # without planner data, as far as a name tells
    return (head, rest) if rest else (head,)


def _read_shared(files: StepFiles, name: str, trusted: bool, is_whole: bool, rank: int) -> Any:
    """A file that ranks wrote together; or, where that lies on another node, what this one has of it."""
    if is_whole or name in (files.entries or ()):
        return _read_any(files, name, trusted)
    return _from_slices(_read_any(files, slices_path(name, rank), trusted))


def _from_slices(value: Any) -> Any:
    """Stored tensors of which slices alone are there, in the places of these."""
    if is_slices(value):
        dtype, shape = getattr(torch, value["dtype"]), tuple(value["shape"])
        parts = zip(value["begins"], value["slices"], strict=True)
        return StoredTensor(
            dtype, shape, tuple(one.parts[0]._replace(offsets=(begin,)) for begin, one in parts)
        )
    if isinstance(value, dict):
        return {key: _from_slices(child) for key, child in value.items()}
    return [_from_slices(child) for child in value] if isinstance(value, list) else value


def _read_megatron(
    files: StepFiles, place: Place, trusted: bool, model_rank: ModelRank, is_whole: bool
) -> dict[str, Any]:
    directory = files.directory / place.base
    found = {path.name for path in directory.glob("mp_rank_*")}
    expected = model_rank.directories() if is_whole else {model_rank.directory}
    if not is_whole:  # ranks are known to be where they saved; others' parts may be here or not
        found &= expected
    if found > expected or (found and not found & expected):
        raise LoadError(
            f"{directory} has the parts of {len(found)} model-parallel ranks ({_some(found)}), here "
            f"are {len(expected)} ({_some(expected)}): it can only be loaded by as many, in the same roles. "
            f"A checkpoint in the dcp layout can be resharded"
        )
    if expected - found:
        missing = _some(expected - found)
        raise CorruptStepError(str(directory), f"parts of the model are missing: {missing}")
    return from_megatron(read_zip(files, place.path(model_rank.model_path), trusted=trusted))


def _read_megatron_dist(files: StepFiles, place: Place, trusted: bool) -> dict[str, Any]:
    """`torch_dist`: what is sharded goes to its branches by name, as one mapping for all ranks."""
    config_path = place.path(CONFIG_PATH)
    try:
        config = json.loads(files.content(config_path))
        backend = config["sharded_backend"], config["sharded_backend_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptStepError(
            files.path(config_path), f"not a checkpoint's description: {error!r}"
        ) from None
    if backend != ("torch_dist", 1):
        raise LoadError(f"{files.path(config_path)} names {backend}; only ('torch_dist', 1) is read here")
    items, _ = _read_items(files, place.path(place.metadata), trusted, is_whole=True)
    newer = items.pop(COMMON_ITEM, None)
    if isinstance(newer, list) and len(newer) == 1 and isinstance(newer[0], Mapping):
        return from_megatron_dist(newer[0], items)
    return from_megatron_dist(read_zip(files, place.path(COMMON_PATH), trusted=trusted), items)


def _some(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")


def _read_driver(files: StepFiles, place: Place, trusted: bool) -> dict[str, Any]:
    name = place.path(DATA_NAME)
    if not (files.directory / name).exists() and name not in (files.entries or ()):
        return {}  # a driver without a dataloader
    return {"dataloader": read_zip(files, name, trusted=trusted)}


def read_zip(files: StepFiles, name: str, *, trusted: bool = False) -> dict[str, Any]:
    """The dict in a file of torch.save, with a StoredTensor for every tensor."""
    tree = _read_any(files, name, trusted)
    if not isinstance(tree, Mapping):
        raise CorruptStepError(files.path(name), f"holds a {type(tree).__name__}, not a state dict")
    return dict(tree)


def _read_any(files: StepFiles, name: str, trusted: bool) -> Any:
    nbytes = files.nbytes(name)
    try:
        tree = torch_zip.read_tree(files.reader(name), 0, nbytes, trusted=trusted)
    except ValueError as error:
        raise CorruptStepError(files.path(name), str(error)) from error
    return _stored(tree, name)


def _stored(value: Any, file: str) -> Any:
    """`value` with a StoredTensor in place of every reference to one."""

    def convert(ref: Any) -> StoredTensor:
        if isinstance(ref, SparseRef):
            raise LoadError(f"{file} holds a sparse tensor; load it with torch.load")
        return StoredTensor(ref.dtype, ref.shape, (_part(ref, file, (0,) * len(ref.shape)),))

    return rebuilt(value, (TensorRef, SparseRef), convert)


def _part(ref: TensorRef, file: str, offsets: tuple[int, ...]) -> StoredPart:
    itemsize = ref.dtype.itemsize
    first = ref.data_offset + ref.storage_offset * itemsize
    nbytes = span_elements(ref.shape, ref.stride) * itemsize
    return StoredPart(file, first, nbytes, offsets, ref.shape, ref.stride, ref.conj, ref.neg)


def refuse_inert(tree: Mapping[str, Any], names: Iterator[str] | tuple[str, ...]) -> None:
    """Raise UntrustedError if a branch that will be applied holds objects of classes not imported."""
    for name in names:
        found = find_inert(tree.get(name))
        if found is not None:
            path, kind = found
            raise UntrustedError(f"{name}{path} is a {kind}, which is not loaded unless trusted=True")


# ---------------------------------------------------------------------------- reading


@dataclass
class _FileReads:
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    devices: list[int] = field(default_factory=list)


def read_tensors(
    files: StepFiles,
    reads: Sequence[Read],
    *,
    verify_only: bool = False,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Fill live tensors, verifying every block of every listed file in the same pass.

    Args:
        share: which of how many processes this is. Of blocks that it does not need, each verifies its share.

    Raises:
        CorruptStepError: a block is not what was written; names file and block. Targets may be
            half overwritten.
    """
    wanted: dict[str, _FileReads] = {name: _FileReads() for name in files.entries or ()}
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # (target, from); in order, so that the last wins
    values: dict[StoredPart, torch.Tensor] = {}  # where each item is read to: once, whatever its names
    targets = [placed for read in reads if not verify_only for placed in _targets(read)]
    contested = _contested(targets)
    for index, (part, target) in enumerate(targets):
        if part not in values:
            memory = target
            if index in contested or not _takes_span(target, part):
                memory = torch.empty_strided(part.shape, part.stride, dtype=target.dtype)
            values[part] = target if memory is target else _value(memory, part)
            reads_of_file = wanted.setdefault(part.file, _FileReads())
            reads_of_file.offsets.append(part.data_offset)
            reads_of_file.sizes.append(part.nbytes)
            reads_of_file.addresses.append(memory.data_ptr())
            reads_of_file.devices.append(devices.seam.device_of(memory))
        if values[part] is not target:
            copies.append((target, values[part]))
    _run(files, wanted, share)
    with torch.no_grad():
        for target, value in copies:
            if target.data_ptr() != value.data_ptr():
                _copy(target, value)


def _targets(read: Read) -> Iterator[tuple[StoredPart, torch.Tensor]]:
    """What is stored of the block that is here, and the memory it goes to."""
    _, stored, block, live = read
    for whole in stored.parts:
        part = whole.within(block.offsets, block.shape, stored.dtype.itemsize)
        if part is None or not part.nbytes:
            continue
        target = local_of(live)
        if part.shape != block.shape:
            places = zip(part.offsets, block.offsets, part.shape, strict=True)
            for dim, (offset, here, size) in enumerate(places):
                target = target.narrow(dim, offset - here, size)
        yield part, target


def _contested(targets: list[tuple[StoredPart, torch.Tensor]]) -> set[int]:
    """Targets whose memory several stored items go to: tied here, but not in the file. They are read
    aside, all of them: threads would mix the values, and copies from them would come too late."""
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + span_elements(t.shape, t.stride()) * t.element_size(), index)
        for index, (_, t) in enumerate(targets)
    )
    contested: set[int] = set()
    group: list[int] = []  # overlap each other, in a chain
    reach = 0
    for begin, end, index in [*spans, (1 << 64, 1 << 64, -1)]:
        if begin >= reach:
            if len({targets[i][0] for i in group}) > 1:
                contested.update(group)
            group = []
        group.append(index)
        reach = max(reach, end)
    return contested


def _takes_span(target: torch.Tensor, part: StoredPart) -> bool:
    """Whether the stored bytes, gaps included, can be written over the target's memory."""
    if part.conj or part.neg or target.is_conj() or target.is_neg():
        return False
    distinct = 1  # elements with memory of their own
    for size, here, there in zip(part.shape, target.stride(), part.stride, strict=True):
        if size > 1 and here != there:
            return False
        if here != 0:
            distinct *= size
    return span_elements(target.shape, target.stride()) == distinct  # no gaps


def _value(stored: torch.Tensor, part: StoredPart) -> torch.Tensor:
    """A view of stored elements that gives their values."""
    value = stored.conj() if part.conj else stored
    return torch._neg_view(value) if part.neg else value  # noqa: SLF001 -- there is no public name for it


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """target.copy_(source), also where the target repeats one element along a dimension."""
    for dim, (size, step) in enumerate(zip(target.shape, target.stride(), strict=True)):
        if step == 0 and size > 1:
            target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    target.copy_(source)


def _run(files: StepFiles, wanted: Mapping[str, _FileReads], share: tuple[int, int]) -> None:
    """One native pass over all files; more only where stored tensors overlap each other."""
    batch, used, left = _batch(files, wanted, share)
    streams = devices.current_streams(used - {devices.HOST})
    threads = _THREADS_TO_DEVICES if streams else _threads()
    early = files.take_early()
    try:
        if early is not None and not streams:
            error = early.finish(batch)
        else:
            if early is not None:
                early.close()
            error = _native.read_files(batch, threads, True, devices.seam.driver, streams)
    except _native.DeviceError as failure:
        raise DeviceError(str(failure)) from failure
    except ValueError as problem:
        raise CorruptStepError(str(files.directory), str(problem)) from problem
    except RuntimeError as problem:  # its threads cannot be made
        raise LoadError(
            f"reading {files.directory} with {threads} threads: {problem}; the step may be good, raise what "
            f"this process may use"
        ) from problem
    if error is not None:
        _raise(files, *error)
    if left:
        _run(files, left, share)


def _batch(
    files: StepFiles, wanted: Mapping[str, _FileReads], share: tuple[int, int]
) -> tuple[_native.FileReads, set[int], dict[str, _FileReads]]:
    """What one pass can read, to which devices; and what is left for another."""
    left: dict[str, _FileReads] = {}
    used: set[int] = set()
    batch = _native.FileReads()
    for name, reads in wanted.items():
        now, later = _apart(reads)
        if later.offsets:
            left[name] = later
        entry = files.entries[name] if files.entries is not None else None
        used.update(now.devices)
        block_nbytes = entry.block_nbytes if entry is not None else _BLOCK_NBYTES
        if block_nbytes % 4096 or block_nbytes > _BLOCK_NBYTES_MAX:
            raise CorruptStepError(files.path(name), f"blocks of {block_nbytes} bytes were never written")
        nbytes = entry.nbytes if entry is not None else files.nbytes(name)
        crcs = list(entry.block_crcs) if entry else []
        batch.add(
            files.path(name),
            nbytes,
            block_nbytes,
            crcs,
            np.array(now.offsets, dtype=np.uint64),
            np.array(now.sizes, dtype=np.uint64),
            np.array(now.addresses, dtype=np.uint64),
            np.array(now.devices, dtype=np.int32),
            checkers=share[1],
            checker=share[0],
        )
    return batch, used, left


def _apart(reads: _FileReads) -> tuple[_FileReads, _FileReads]:
    """Reads that do not overlap, in file order; and the rest."""
    now, later = _FileReads(), _FileReads()
    end = 0
    table = zip(reads.offsets, reads.sizes, reads.addresses, reads.devices, strict=True)
    for offset, nbytes, address, device in sorted(table):
        chosen = now if offset >= end else later
        chosen.offsets.append(offset)
        chosen.sizes.append(nbytes)
        chosen.addresses.append(address)
        chosen.devices.append(device)
        if chosen is now:
            end = offset + nbytes
    return now, later


def _raise(
    files: StepFiles,
    kind: str,
    operation: str,
    path: str,
    block: int,
    number: int,
    expected: int,
    got: int,
    reason: str,
) -> None:
    if kind == "device":
        raise DeviceError(f"{path}, block {block}: {operation}: {reason}")
    if kind == "crc":
        raise CorruptStepError(path, f"CRC-32 {expected:08x} expected, got {got:08x}", block)
    if kind == "size":
        raise CorruptStepError(path, f"{expected} bytes expected, got {got}")
    if not files.directory.exists():
        raise StepNotFoundError(f"{files.directory} was deleted while it was read")
    _raise_if_ours(path, operation, number)
    raise CorruptStepError(path, f"{operation} failed: {os.strerror(number)}", block)


def find_damage(files: StepFiles) -> CorruptStepError | None:
    """The first block that is not what was written; None if all are good, or nothing is known."""
    if files.entries is None:
        return None
    try:
        read_tensors(files, [], verify_only=True)
    except CorruptStepError as damage:
        return damage
    return None
