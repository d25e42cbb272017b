"""The native engine: file images to disk and back, without the GIL. Contracts are in csrc/*.h."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_Int64 = npt.NDArray[np.int64]
_UInt64 = npt.NDArray[np.uint64]
_Int32 = npt.NDArray[np.int32]

class DeviceError(RuntimeError):
    """A CUDA device or its driver refused; the message says what, and the driver's own reason."""

class Image:
    """A FileImage, checked and compiled."""

    @property
    def path(self) -> str: ...
    @property
    def nbytes(self) -> int: ...

def make_image(
    path: str,
    nbytes: int,
    literals: bytes,
    extents: _Int64,
    fixups: _Int64,
    records: int,
    partial: bool = False,
) -> Image:
    """Raises ValueError naming what breaks an image's guarantees."""

class Job:
    """One save in the engine. Keeps its engine alive."""

    def wait_enqueued(self, timeout_s: float = ...) -> bool: ...
    def hold_back(self, device: int, stream: int) -> None:
        """Once enqueued. Raises DeviceError."""

    def wait_released(self, timeout_s: float = ...) -> bool: ...
    def wait_finished(self, timeout_s: float = ...) -> bool: ...
    def abort(self) -> None: ...
    @property
    def released(self) -> bool: ...
    @property
    def finished(self) -> bool: ...
    @property
    def direct(self) -> bool: ...
    @property
    def error(self) -> tuple[str, str, int, int, int, str] | None:
        """Operation, path, offset in file or -1, source or -1, errno; or what a device's driver said."""

    @property
    def times_s(self) -> tuple[float, float, float, float, float]:
        """Seconds from submission to enqueued, released, written, finished (negative: not yet); starved."""

    def block_crcs(self, file: int, /) -> list[int]: ...
    def runs(self, file: int, /) -> list[tuple[int, int, int]]:
        """Offset, nbytes and CRC-32 of what was written, in file order: of a whole file, its blocks."""

    def record_crcs(self, file: int, /) -> list[int]: ...

class Engine:
    def __init__(
        self,
        *,
        arena_nbytes: int,
        chunk_nbytes: int,
        copiers: int,
        writers: int,
        direct: bool,
        prefault: bool,
        driver: str = ...,
        yielding: bool = ...,
        copiers_checksum: bool | None = ...,
    ) -> None:
        """copiers_checksum: None leaves it to the processor: they do where that is nearly free."""

    def use_device(self, ordinal: int) -> None:
        """Raises DeviceError."""

    def submit(
        self,
        directory: str,
        images: Sequence[Image],
        addresses: _UInt64,
        sizes: _UInt64,
        devices: _Int32,
        streams: Sequence[tuple[int, int]] = ...,
        slabs: _Int32 | None = ...,
    ) -> Job:
        """Sources must stay as they are until the job is released. Raises DeviceError.

        `slabs`: in which allocation each source lies whose other bytes may be read too; -1 for none.
        """

    def close(self, timeout_s: float = ...) -> bool:
        """False when it takes too long, a device hangs: engine and arena are left as they are, for good."""

    @property
    def forked(self) -> bool: ...
    @property
    def arena_nbytes(self) -> int: ...
    @property
    def chunk_nbytes(self) -> int: ...
    @property
    def prefault_s(self) -> float: ...
    @property
    def pin_s(self) -> float: ...
    @property
    def pin_failure(self) -> str:
        """Empty when there is none."""

    @property
    def batch_failure(self) -> str:
        """The same."""

class FileReads:
    """What to read; see Reading in csrc/reader.h."""

    def __init__(self) -> None: ...
    def add(
        self,
        path: str,
        nbytes: int,
        block_nbytes: int,
        block_crcs: Sequence[int],
        offsets: _UInt64,
        sizes: _UInt64,
        addresses: _UInt64,
        devices: _Int32,
        checkers: int = ...,
        checker: int = ...,
    ) -> None: ...

def read_files(
    reads: FileReads,
    threads: int,
    direct: bool,
    driver: str = ...,
    streams: Sequence[tuple[int, int]] = ...,
) -> tuple[str, str, str, int, int, int, int, str] | None:
    """None, or: kind ("os", "size", "crc", "device"), operation, path, block, errno, expected, got, reason.

    Raises DeviceError where a device cannot be used at all.
    """

class EarlyReading:
    """Begins to read and check whole files, as far as there are buffers, before it is known where bytes go.

    `finish` says where, on the host, and returns what `read_files` does; `close` ends it unfinished.
    """

    def __init__(self, reads: FileReads, threads: int, direct: bool) -> None: ...
    def finish(self, reads: FileReads) -> tuple[str, str, str, int, int, int, int, str] | None: ...
    def close(self) -> None: ...

def crc32(address: int, nbytes: int, crc: int = 0) -> int: ...
def crc32_copy(to: int, address: int, nbytes: int, crc: int = 0) -> int: ...
def device_crc32(driver: str, device: int, stream: int, address: int, nbytes: int) -> int:
    """Raises DeviceError."""

def crc32_portable(data: bytes, crc: int = 0) -> int: ...
def crc32_combine(crc_a: int, crc_b: int, nbytes_b: int) -> int: ...
def crc32_kernel() -> str: ...
def survey(
    tensors: list[torch.Tensor],
    kinds: tuple[type, ...],
    exchange_api: object,
    forms: bool = False,
    storages: bool = False,
    inside: bool = False,
) -> tuple[_UInt64, _Int64, bytes, list[torch.UntypedStorage], bool] | None:
    """Addresses and `_version` of tensors of exactly these types; if asked for, what they are, and storages.
    And whether torch's C++ functions were asked.

    Args:
        exchange_api: what the types have as `__dlpack_c_exchange_api__`; None comes back if it is of another
            major version than DLPack 1.
        inside: ask the C++ functions behind torch's attributes, if all of them are found, objects have the
            layout that is known, and nobody replaced such an attribute.

    Raises TypeError for other types, ValueError where a form is asked of what is not dense, and whatever the
    library raises of a tensor that has no address.
    """

def columns(
    objects: list[Any], names: tuple[str, ...], absent: tuple[str, ...], empty: tuple[str, ...]
) -> tuple[set[type], list[tuple[bytes, list[str], bytes, list[Any]]]] | None:
    """Dictionaries that objects have in their own `__dict__`, as columns over all objects.

    Args:
        names: of these dictionaries.
        absent, empty: what no object has, and what is empty in each; None comes back otherwise.

    Returns:
        The classes, and for each name: int64 lengths; all keys; for each key a byte, whether there is
        something but None under it; and what is there.

    Raises:
        AttributeError: an object without a `__dict__`; KeyError: one that lacks such a dictionary.
    """

def entries_of(dicts: list[Any], kind: type) -> tuple[bytes, list[Any], bytes, list[Any], list[Any]] | None:
    """What is in many dictionaries; None if one of them is no dictionary, or of a class of its own.

    Returns:
        int64 lengths; all keys; for each key a byte, whether its value is of `kind` and no subclass; the
        values that are; and those that are not.
    """

def identities(objects: list[Any]) -> bytes:
    """`id()` of each, as int64: equal bytes are the same objects, while they are alive."""

def copy_is_checked() -> bool: ...

class faults:  # noqa: N801 -- a module, in truth
    class Op(Enum):
        open = ...
        allocate = ...
        pwrite = ...
        pread = ...
        fsync = ...
        copy = ...

    class Kind(Enum):
        error = ...
        shorten = ...
        kill = ...
        pause = ...

    @staticmethod
    def arm(op: Op, nth: int, kind: Kind, error_number: int = 0, repeat: bool = False) -> None: ...
    @staticmethod
    def disarm() -> None: ...
    @staticmethod
    def resume() -> None: ...
    @staticmethod
    def hits(op: Op) -> int: ...
    @staticmethod
    def wait_for_hits(op: Op, n: int, timeout_s: float = 30.0) -> bool: ...
