"""The file operations of a commit, one method each.

Guarantees:
- What changes the disk raises WriteError with operation and path, nothing else; what only looks
  raises the OSError itself, because "it is gone" is an answer there, not a failure.
- The observer hears of every system call before it is made. What it raises takes the place of that
  call, so a test can refuse, kill or log at each one. Production has none.
- No method retries, buffers or swallows; files are whole and fsynced when `write_file` returns.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import WriteError

# What the operating system says of this process, not of the file: nothing is known of that then.
OF_THIS_PROCESS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})

Observer = Callable[[str, str], None]

_log = logging.getLogger(__name__)


def boot_id() -> str:
    """Of the machine, since it was started; empty if it is unknown: then nobody is of this boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def disk_of(directory: Path) -> str:
    """The same for whoever sees this very directory from this machine; from another one, never.

    One that cannot be seen has its machine's: whoever uses it will hear why.
    """
    machine = boot_id() or os.uname().nodename
    try:
        status = os.stat(directory)
    except OSError:
        return machine
    return f"{machine} {status.st_dev} {status.st_ino}"


class Filesystem:
    """The real filesystem. Threads may share one; it has no state of its own."""

    def __init__(self, observer: Observer | None = None) -> None:
        self._observer = observer

    def mkdir(self, path: Path) -> None:
        """Create a directory; durable once its parent is fsynced."""
        with self._changing("mkdir", path):
            os.mkdir(path)

    def write_file(self, path: Path, data: bytes) -> None:
        """Create `path` with `data` and fsync it; its name is durable once its directory is fsynced."""
        with self._changing("open", path):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            with self._changing("write", path):
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(fd, rest) :]
            with self._changing("fsync", path):
                os.fsync(fd)
        except BaseException:
            with suppress(OSError):  # the first failure is the one to report
                os.close(fd)
            raise
        with self._changing("close", path):  # NFS reports late write errors here
            os.close(fd)

    def write_into(
        self, path: Path, writes: Iterable[tuple[int, bytes | bytearray]], nbytes: int, *, sync: bool = True
    ) -> None:
        """Write bytes at offsets of a file, made if it is not there; give it its size, and fsync it.

        Without `sync` the next call for this file has to: it hears of what failed meanwhile (fsync(2)).
        """
        with self._changing("open", path):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            with self._changing("write", path):
                for offset, data in writes:
                    done = 0
                    while done < len(data):
                        done += os.pwrite(fd, memoryview(data)[done:], offset + done)
            with self._changing("ftruncate", path):
                os.ftruncate(fd, nbytes)
            if sync:
                with self._changing("fsync", path):
                    os.fsync(fd)
        except BaseException:
            with suppress(OSError):  # the first failure is the one to report
                os.close(fd)
            raise
        with self._changing("close", path):
            os.close(fd)

    def replace_file(self, path: Path, data: bytes, temporary: Path) -> None:
        """Give `path` new content, atomically and durably; `temporary` is a free name beside it."""
        self.write_file(temporary, data)
        self.rename(temporary, path)
        self.fsync_dir(path.parent)

    def fsync_dir(self, path: Path) -> None:
        """Make the names in a directory durable."""
        with self._changing("fsync_dir", path):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            except OSError as problem:
                # Some FUSE and cloud mounts know no fsync of directories; there, rename is all
                # the durability there is. EIO and friends are failures.
                if problem.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
                _log.warning("%s: this filesystem cannot fsync directories", path)
            finally:
                os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Rename within one filesystem. A file is replaced; a directory that holds anything is not."""
        with self._changing("rename", target):
            os.rename(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file or a symbolic link; one that is gone already is no failure."""
        with self._changing("unlink", path), suppress(FileNotFoundError):
            os.unlink(path)

    def remove_tree(self, path: Path) -> None:
        """Remove a file, a link, or a directory with all it holds, never following a link."""
        try:
            is_directory = path.is_dir() and not path.is_symlink()
        except OSError as problem:
            raise WriteError("stat", str(path), problem.errno or errno.EIO) from problem
        if not is_directory:
            self.unlink(path)
            return
        with self._changing("scandir", path):
            try:
                with os.scandir(path) as entries:
                    names = [entry.name for entry in entries]
            except FileNotFoundError:
                return
        for name in names:
            self.remove_tree(path / name)
        with self._changing("rmdir", path), suppress(FileNotFoundError):
            os.rmdir(path)

    def listdir(self, path: Path) -> list[str]:
        """The names in a directory, sorted. Raises OSError."""
        self._observe("listdir", path)
        return sorted(os.listdir(path))

    def read(self, path: Path) -> bytes:
        """The whole of a file. Raises OSError."""
        self._observe("read", path)
        # Not to wait for a writer, should somebody have put a pipe there.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            return file.read()

    def read_ranges(
        self, path: Path, ranges: Iterable[tuple[int, int]], chunk_nbytes: int
    ) -> Iterator[bytes]:
        """What lies at (offset, nbytes) of a file, in no more than `chunk_nbytes` at a time.

        Raises WriteError: what was written cannot be read, which fails a save.
        """
        with self._changing("open", path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for begin, nbytes in ranges:
                at, end = begin, begin + nbytes
                while at < end:
                    with self._changing("read", path):
                        data = os.pread(fd, min(chunk_nbytes, end - at), at)
                        if not data:
                            raise OSError(errno.EIO, "ends too early")
                    at += len(data)
                    yield data
        finally:
            os.close(fd)

    def stat(self, path: Path) -> os.stat_result:
        """What `path` is, links followed. Raises OSError."""
        self._observe("stat", path)
        return os.stat(path)

    def _observe(self, operation: str, path: Path) -> None:
        if self._observer is not None:
            self._observer(operation, str(path))

    @contextmanager
    def _changing(self, operation: str, path: Path) -> Iterator[None]:
        try:
            self._observe(operation, path)
            yield
        except OSError as problem:
            raise WriteError(operation, str(path), problem.errno or errno.EIO) from problem
