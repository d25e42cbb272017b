"""Who owns a root: one live run at a time.

The owner holds a POSIX record lock on a file in the root and keeps counting in it.

    the lock         the record         so the owner is              and we
    ---------------  -----------------  ---------------------------  --------------------------------
    is refused       (whatever)         alive                        raise RootBusyError
    is granted       empty              gone, it said good-bye       take over
    is granted       of this boot       dead: locks die with their   take over at once
                                        process on one machine
    is granted or    of another boot,   on a host whose locks we     watch the count: if it moves,
    unsupported      or unreadable      cannot see, or dead          raise; if it stands still for
                                                                     `stale_after_s`, take over

Staleness is judged by our own clock over our own observations; clocks of two hosts are never
compared. Pids are for the message only: they do not cross hosts or containers.

Why a POSIX lock and not flock: forked DataLoader workers do not inherit it, so a worker that
outlives a killed trainer does not keep the root busy. Its price: the process loses it as soon as it
closes *any* descriptor of that file. So nobody in the process that holds a lease opens the file
again (a registry of held roots sees to it), and every renewal takes the lock anew.

A release empties the file and never unlinks it: whoever unlinks a locked file lets two runs lock
two files of one name. If somebody else removed or replaced it, the lease is lost and `renew` says so.

On a mount that shares files but not locks between hosts, two runs that start within one heartbeat
of each other may both believe in their lease until the first `renew`, which fails for one of them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from .errors import RootBusyError, RootError, WriteError
from .filesystem import boot_id

LEASE_NAME = ".asyncckpt-lease"

_RECORD_NBYTES = 1024  # one size for ever: a renewal overwrites in place and needs no space
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)

_log = logging.getLogger(__name__)

_held: set[tuple[int, int]] = set()  # (device, inode) of the roots that this process owns, or is about to
_held_lock = threading.Lock()


def _forget_in_child() -> None:
    _held.clear()
    _held_lock.release()


# A fork while another thread holds it would leave it locked in the child for ever: so it is held
# across every fork.
os.register_at_fork(
    before=_held_lock.acquire,
    after_in_parent=_held_lock.release,
    after_in_child=_forget_in_child,
)


@dataclass(frozen=True)
class LeaseRecord:
    """What an owner writes about itself."""

    owner: str
    hostname: str
    boot_id: str
    pid: int
    since: str
    count: int

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode().ljust(_RECORD_NBYTES - 1) + b"\n"

    @staticmethod
    def from_bytes(data: bytes) -> LeaseRecord | None:
        """The record, or None if there is none that makes sense."""
        try:
            fields = json.loads(data)
            return LeaseRecord(
                owner=str(fields["owner"]),
                hostname=str(fields["hostname"]),
                boot_id=str(fields["boot_id"]),
                pid=int(fields["pid"]),
                since=str(fields["since"]),
                count=int(fields["count"]),
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def __str__(self) -> str:
        return f"{self.owner} (pid {self.pid} on {self.hostname}, since {self.since})"


def owner_of(root: Path) -> str:
    """The run that the lease of `root` names, as it is seen from here; empty if none is."""
    try:
        status = root.stat()
        with _held_lock:  # closing a descriptor of the file would lose the lock, see above
            if (status.st_dev, status.st_ino) in _held:
                raise RootBusyError(f"{root} is owned by this very process")
            record = LeaseRecord.from_bytes((root / LEASE_NAME).read_bytes())
    except OSError:
        return ""
    return record.owner if record is not None else ""


class RootLease:
    """The right to write under a root, until released or until the process dies.

    Thread-safe. In a forked child it is nobody's: `release` does nothing there, `renew` raises.
    """

    def __init__(self, path: Path, fd: int, key: tuple[int, int], record: LeaseRecord, locked: bool) -> None:
        """Use `acquire`."""
        self._path = path
        self._fd = fd
        self._key = key
        self._record = record
        self._locked = locked
        self._pid = os.getpid()
        self._released = False
        self._mutex = threading.Lock()

    @classmethod
    def acquire(
        cls,
        root: Path,
        *,
        owner: str | None = None,
        heartbeat_s: float = 5.0,
        stale_after_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], object] = time.sleep,
    ) -> RootLease:
        """Own `root`, an existing directory; call `renew` every `heartbeat_s` from then on.

        Takes milliseconds, but up to `stale_after_s` where a run on another host, or before a
        reboot, left its record. `owner` is this run's incarnation, for people to read.

        Raises:
            RootBusyError: another live run owns it; the message names host and pid.
            RootError: the lease file cannot be opened or written.
        """
        path = root / LEASE_NAME
        try:
            status = root.stat()
        except OSError as problem:
            raise RootError(f"{root} cannot be owned: {problem}") from problem
        key = (status.st_dev, status.st_ino)
        with _held_lock:
            if key in _held:
                raise RootBusyError(
                    f"{root} is owned by this very process (pid {os.getpid()}): close that one first"
                )
            _held.add(key)
        try:
            record = LeaseRecord(
                owner=owner if owner is not None else secrets.token_hex(8),
                hostname=os.uname().nodename,
                boot_id=boot_id(),
                pid=os.getpid(),
                since=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                count=0,
            )
            fd, locked, contested = _take(path, record.boot_id, heartbeat_s, stale_after_s, clock, wait)
            lease = cls(path, fd, key, record, locked)
            try:
                lease._write(record)
                if contested:
                    # Nothing but the record tells us apart from another observer who came to the
                    # same conclusion: the last one to write wins, and the others see it here.
                    wait(heartbeat_s)
                    lease._check()
            except BaseException:
                os.close(fd)
                raise
        except OSError as problem:
            _let_go(key)
            raise RootError(f"{path} cannot be used: {problem}") from problem
        except BaseException:
            _let_go(key)
            raise
        return lease

    def renew(self) -> None:
        """Show that we live. One small write; call it every `heartbeat_s`.

        Raises:
            RootBusyError: the lease was lost. Nothing may be written under the root any more.
            WriteError: the operating system refused; the lease stands, try again.
        """
        self._check_process()
        with self._mutex:
            try:
                self._check()
                if self._locked:
                    # Somebody in this process may have opened and closed the file, which dropped
                    # the lock. Taking a lock that is held is free.
                    fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                count = self._record.count + 1
                self._record = LeaseRecord(**{**asdict(self._record), "count": count})
                self._write(self._record)
            except OSError as problem:
                if problem.errno in (errno.EACCES, errno.EAGAIN):
                    raise RootBusyError(f"{self._path}: lost, another process locked it") from problem
                raise WriteError("renew", str(self._path), problem.errno or errno.EIO) from problem

    def check(self) -> None:
        """Raise RootBusyError if the lease was lost: the last look before a step becomes visible."""
        self._check_process()
        with self._mutex:
            try:
                self._check()
            except OSError as problem:
                raise WriteError("check", str(self._path), problem.errno or errno.EIO) from problem

    def release(self) -> None:
        """Give the root up; the second time, and in a forked child, nothing happens."""
        if os.getpid() != self._pid:
            # The child has no lock to drop, and closing its copy of the descriptor would drop
            # one that it may have taken itself meanwhile.
            return
        with self._mutex:
            if self._released:
                return
            self._released = True
            try:
                self._check_record()
                os.ftruncate(self._fd, 0)
                os.fsync(self._fd)
            except (OSError, RootBusyError) as problem:
                _log.warning("%s: not released in order: %s", self._path, problem)
            finally:
                os.close(self._fd)
                _let_go(self._key)

    def __enter__(self) -> RootLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _check_process(self) -> None:
        # Before the mutex: in a child it may be locked by a thread that does not exist there.
        if os.getpid() != self._pid:
            raise RootBusyError(f"{self._path}: owned by the parent process {self._pid}")

    def _check(self) -> None:
        if self._released:
            raise RootBusyError(f"{self._path}: already released")
        if not _names(self._path, self._fd):
            raise RootBusyError(f"{self._path}: lost, the file was removed or replaced")
        self._check_record()

    def _check_record(self) -> None:
        record = LeaseRecord.from_bytes(os.pread(self._fd, _RECORD_NBYTES, 0))
        if record is None or record.owner != self._record.owner or record.pid != self._record.pid:
            raise RootBusyError(f"{self._path}: lost to {record or 'nobody known'}")

    def _write(self, record: LeaseRecord) -> None:
        os.pwrite(self._fd, record.to_bytes(), 0)
        os.fdatasync(self._fd)  # on NFS, only this shows it to others


def _take(
    path: Path,
    boot_id: str,
    heartbeat_s: float,
    stale_after_s: float,
    clock: Callable[[], float],
    wait: Callable[[float], object],
) -> tuple[int, bool, bool]:
    """An open lease file that is ours to write: descriptor, locked or not, contested or not."""
    seen: bytes | None = None
    seen_s = 0.0
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            locked = _lock(fd)
            data = os.pread(fd, _RECORD_NBYTES, 0)
            record = LeaseRecord.from_bytes(data)
            if locked is None:
                raise RootBusyError(
                    f"{path.parent} is owned by a live run: {record or 'unknown'}; "
                    f"stop it first, or use another root"
                )
            if not _names(path, fd):
                pass  # replaced between open and lock: what we locked is nobody's
            elif not data:
                return fd, locked, not locked
            elif locked and record is not None and record.boot_id == boot_id and boot_id:
                _log.warning("%s: taking over from %s, which died", path.parent, record)
                return fd, locked, False
            elif data != seen:
                if seen is not None:
                    raise RootBusyError(
                        f"{path.parent} is owned by a live run: {record or 'unknown'}; its heartbeat was seen"
                    )
                seen, seen_s = data, clock()
                _log.warning(
                    "%s: watching for up to %g s whether %s still lives",
                    path.parent, stale_after_s, record or "its owner",
                )  # fmt: skip
            elif clock() - seen_s >= stale_after_s:
                _log.warning("%s: taking over from %s, silent for %g s", path.parent, record, stale_after_s)
                return fd, locked, True
        except BaseException:
            os.close(fd)
            raise
        # Reopened for every look: NFS shows another host's writes to those who open, not to those
        # who hold. Closing drops our lock; nobody is hurt, since nothing was decided yet.
        os.close(fd)
        if seen is not None:
            wait(min(heartbeat_s, stale_after_s) / 2)


def _lock(fd: int) -> bool | None:
    """True: ours. None: another process has it. False: this filesystem has no locks."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in (errno.EACCES, errno.EAGAIN):
            return None
        if problem.errno in _UNSUPPORTED:
            return False
        raise
    return True


def _names(path: Path, fd: int) -> bool:
    """Whether `path` still names the file behind `fd`."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _let_go(key: tuple[int, int]) -> None:
    with _held_lock:
        _held.discard(key)
