"""The lease: with real processes, one owner at a time; dead owners hold nobody up, live ones always."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asyncckpt.errors import RootBusyError, RootError, WriteError
from asyncckpt.lease import LEASE_NAME, LeaseRecord, RootLease

OWNER = """
import os, sys
from pathlib import Path
from asyncckpt.lease import RootLease

def say(word):  # in one system call: parent and child share the pipe
    os.write(1, f"{word}\\n".encode())

lease = RootLease.acquire(Path(sys.argv[1]), owner="other")
child = os.fork() if sys.argv[2] == "fork" else None
if child == 0:
    lease.release()  # not the child's to release
    say(os.getpid())
    sys.stdin.read()
    os._exit(0)
say("owner")
sys.stdin.readline()
if sys.argv[2] == "release":
    lease.release()
    say("released")
    sys.stdin.readline()
"""


def never(delay_s: float) -> None:
    raise AssertionError(f"nothing to wait for here, but {delay_s} s were asked for")


class Time:
    """A clock that only waiting moves; `while_waiting` happens meanwhile."""

    def __init__(self, while_waiting: Callable[[], None] = lambda: None) -> None:
        self.now_s = 0.0
        self.while_waiting = while_waiting
        self.waits = 0

    def clock(self) -> float:
        return self.now_s

    def wait(self, delay_s: float) -> None:
        self.waits += 1
        assert self.waits < 100
        self.now_s += delay_s
        self.while_waiting()


def acquire(root: Path, time: Time | None = None) -> RootLease:
    if time is None:
        return RootLease.acquire(root, owner="us", wait=never)
    return RootLease.acquire(root, owner="us", clock=time.clock, wait=time.wait)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts owners in processes of their own; returns when they own `tmp_path`."""
    started: list[subprocess.Popen[str]] = []

    def start(mode: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def write_record(root: Path, count: int = 7, boot_id: str = "another-boot") -> LeaseRecord:
    record = LeaseRecord("stranger", "elsewhere", boot_id, 4242, "2024-01-01T00:00:00+0000", count)
    (root / LEASE_NAME).write_bytes(record.to_bytes())
    return record


def record_of(root: Path) -> LeaseRecord | None:
    """Read in a process of its own: closing the file here would drop a lock that we hold."""
    command = [sys.executable, "-c", "import sys; print(open(sys.argv[1]).read())", str(root / LEASE_NAME)]
    return LeaseRecord.from_bytes(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def test_live_owner_is_named(tmp_path: Path, start: Callable[[str], subprocess.Popen[str]]) -> None:
    owner = start("hold")
    assert line_of(owner) == "owner"
    for _ in range(3):  # a refused attempt takes nothing from the owner
        with pytest.raises(RootBusyError, match=rf"other \(pid {owner.pid} on {os.uname().nodename}, since "):
            acquire(tmp_path)


def test_killed_owner_is_followed_at_once(
    tmp_path: Path, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    owner = start("hold")
    assert line_of(owner) == "owner"
    owner.kill()
    owner.wait()
    with acquire(tmp_path):
        record = record_of(tmp_path)
        assert record is not None
        assert record.owner == "us"


def test_forked_child_of_a_killed_owner_does_not_hold_the_root(
    tmp_path: Path, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    owner = start("fork")
    lines = {line_of(owner), line_of(owner)}
    assert "owner" in lines
    (child,) = map(int, lines - {"owner"})
    with pytest.raises(RootBusyError):  # the child's release did nothing
        acquire(tmp_path)
    os.kill(owner.pid, signal.SIGKILL)
    os.waitpid(owner.pid, 0)
    os.kill(child, 0)  # still there, with the descriptor that it inherited
    acquire(tmp_path).release()


def test_stopped_owner_still_owns(tmp_path: Path, start: Callable[[str], subprocess.Popen[str]]) -> None:
    owner = start("hold")
    assert line_of(owner) == "owner"
    os.kill(owner.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, owner.pid, os.WSTOPPED | os.WNOWAIT)
    with pytest.raises(RootBusyError):
        acquire(tmp_path)


def test_release_frees_the_root_while_the_process_lives(
    tmp_path: Path, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    owner = start("release")
    assert line_of(owner) == "owner"
    tell(owner)
    assert line_of(owner) == "released"
    assert (tmp_path / LEASE_NAME).read_bytes() == b""
    acquire(tmp_path).release()
    assert owner.poll() is None


def test_one_lease_per_process_and_root(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "second").mkdir()
    with acquire(tmp_path) as lease:
        for path in (tmp_path, tmp_path / "link", tmp_path / "second" / ".."):
            with pytest.raises(RootBusyError, match="this very process"):
                acquire(path)
        acquire(tmp_path / "second").release()
        lease.renew()
    lease.release()  # twice does nothing
    with pytest.raises(RootBusyError, match="released"):
        lease.renew()
    acquire(tmp_path).release()


def test_in_a_forked_child_the_lease_is_nobodys(tmp_path: Path) -> None:
    lease = acquire(tmp_path)
    child = os.fork()
    if child == 0:
        outcome = 1
        try:
            lease.release()
            lease.renew()
        except RootBusyError:
            try:
                acquire(tmp_path)
            except RootBusyError as problem:
                outcome = 0 if "live run: us" in str(problem) else 2
        os._exit(outcome)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    lease.renew()
    lease.release()


def test_silent_stranger_is_followed_after_the_deadline(tmp_path: Path) -> None:
    write_record(tmp_path)
    time = Time()
    with acquire(tmp_path, time) as lease:
        assert 30 <= time.now_s < 45
        lease.renew()
        record = record_of(tmp_path)
        assert record is not None
        assert (record.owner, record.count) == ("us", 1)


def test_stranger_with_a_heartbeat_is_respected(tmp_path: Path) -> None:
    write_record(tmp_path)
    time = Time(lambda: write_record(tmp_path, count=7 + int(time.now_s >= 25)) and None)
    with pytest.raises(RootBusyError, match=r"stranger \(pid 4242 on elsewhere.*heartbeat was seen"):
        acquire(tmp_path, time)
    assert time.now_s < 30
    acquire(tmp_path, Time()).release()  # a refused attempt holds nothing


def test_stranger_who_says_good_bye_is_not_waited_for(tmp_path: Path) -> None:
    write_record(tmp_path)
    time = Time(lambda: (tmp_path / LEASE_NAME).write_bytes(b"") and None)
    acquire(tmp_path, time).release()
    assert time.waits == 1


def test_dead_owner_of_this_boot_is_not_waited_for(tmp_path: Path) -> None:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    write_record(tmp_path, boot_id=boot_id)
    acquire(tmp_path).release()


@pytest.mark.parametrize("content", [b"garbage", b"{}", b"[" * 5000, b"null", b'{"pid": "x"}'])
def test_unreadable_record_is_watched_like_a_stranger(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LEASE_NAME).write_bytes(content)
    time = Time()
    acquire(tmp_path, time).release()
    assert time.now_s >= 30


def test_two_observers_of_one_dead_stranger(tmp_path: Path) -> None:
    write_record(tmp_path)
    rival = json.loads(write_record(tmp_path).to_bytes())

    def overwrite() -> None:
        # On a mount without shared locks a rival comes to the same conclusion, and writes last.
        if b'"us"' in (tmp_path / LEASE_NAME).read_bytes():
            (tmp_path / LEASE_NAME).write_bytes(LeaseRecord(**{**rival, "owner": "rival"}).to_bytes())

    with pytest.raises(RootBusyError, match="lost to rival"):
        acquire(tmp_path, Time(overwrite))


def test_without_locks_the_heartbeat_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    time = Time()
    lease = acquire(tmp_path, time)
    assert time.waits == 1  # one heartbeat, in which a rival would have shown up
    lease.renew()
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    lease.release()
    write_record(tmp_path, boot_id=boot_id)
    time = Time(lambda: write_record(tmp_path, boot_id=boot_id, count=int(time.now_s)) and None)
    with pytest.raises(RootBusyError, match="heartbeat was seen"):
        acquire(tmp_path, time)
    write_record(tmp_path, boot_id=boot_id)
    time = Time()
    acquire(tmp_path, time).release()
    assert time.now_s >= 30


def test_lost_leases_are_noticed(tmp_path: Path) -> None:
    lease = acquire(tmp_path)
    (tmp_path / LEASE_NAME).unlink()
    for check in (lease.renew, lease.check):
        with pytest.raises(RootBusyError, match="removed or replaced"):
            check()
    write_record(tmp_path)
    with pytest.raises(RootBusyError, match="removed or replaced"):
        lease.renew()
    lease.release()
    assert b"stranger" in (tmp_path / LEASE_NAME).read_bytes()  # the other one's is left alone


def test_release_leaves_a_record_alone_that_is_not_ours(tmp_path: Path) -> None:
    lease = acquire(tmp_path)
    write_record(tmp_path)
    with pytest.raises(RootBusyError, match="lost to stranger"):
        lease.check()
    lease.release()
    assert b"stranger" in (tmp_path / LEASE_NAME).read_bytes()


def test_renewal_takes_back_a_lock_that_was_dropped_by_accident(
    tmp_path: Path, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    with acquire(tmp_path) as lease:
        (tmp_path / LEASE_NAME).read_bytes()  # somebody here copies the root: closing drops our lock
        lease.renew()
        other = start("hold")
        assert line_of(other) == ""  # it was refused
        assert other.wait() != 0


def test_file_replaced_between_open_and_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = fcntl.lockf
    replaced = []

    def replace_first(fd: int, operation: int) -> None:
        if not replaced:
            replaced.append(True)
            (tmp_path / LEASE_NAME).unlink()
            (tmp_path / LEASE_NAME).touch()
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "lockf", replace_first)
    with acquire(tmp_path) as lease:
        assert replaced
        lease.renew()


def test_renewal_that_fails_is_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.EIO, "flaky")

    with acquire(tmp_path) as lease:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(WriteError, match="EIO"):
                lease.renew()
        lease.renew()


def test_roots_that_cannot_be_owned(tmp_path: Path) -> None:
    with pytest.raises(RootError, match="cannot be owned"):
        acquire(tmp_path / "absent")
    (tmp_path / LEASE_NAME).mkdir()
    with pytest.raises(RootError, match="cannot be used"):
        acquire(tmp_path)
    (tmp_path / LEASE_NAME).rmdir()
    acquire(tmp_path).release()  # and nothing stays registered


def test_descriptors_are_closed(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    acquire(tmp_path).release()
    write_record(tmp_path)
    acquire(tmp_path, Time()).release()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
