"""A process that imported torch once and forks a fresh child per call: a kill costs milliseconds.

The server never starts a thread, so what its children inherit is as good as new. One child at a time.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_PATIENCE_S = 60.0


def say(*words: object) -> None:
    """Tell the test something; one write, so that a kill never cuts a line in two."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class Child:
    """A running child. `lines` is what it said so far."""

    def __init__(self, server: WarmProcess) -> None:
        self._server = server
        self.lines: list[str] = []
        self.status: int | None = None
        self.pid = int(self.expect("pid").split()[1])

    def next_line(self) -> str | None:
        """What it says next; None once it is dead."""
        if self.status is not None:
            return None
        line = self._server.readline()
        if line.startswith("exit "):
            self.status = int(line.split()[1])
            return None
        self.lines.append(line)
        return line

    def expect(self, beginning: str) -> str:
        """Wait for a line that begins so."""
        while (line := self.next_line()) is not None:
            if line.startswith(beginning):
                return line
        raise AssertionError(f"ended with {self.status} before it said {beginning!r}: {self.lines[-10:]}")

    def kill(self) -> None:
        """SIGKILL. It is not reaped before the server says so, hence the pid is still its own."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)

    def finish(self) -> int:
        """Wait for the end; the exit code, or minus the signal."""
        while self.next_line() is not None:
            pass
        assert self.status is not None
        return self.status


class WarmProcess:
    """The test's side of it; a context manager."""

    def __init__(self, *preload: str) -> None:
        root = str(Path(__file__).resolve().parents[1])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join([root, *(path for path in sys.path if path)])
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm_process", *preload],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=root,
        )  # fmt: skip
        assert self.readline() == "ready"

    def start(self, target: str, **arguments: Any) -> Child:
        """Run `module:function(**arguments)` in a fresh child. Arguments are JSON."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([target, arguments]).encode() + b"\n")
        self._process.stdin.flush()
        return Child(self)

    def readline(self) -> str:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        deadline_s = time.monotonic() + _PATIENCE_S
        while b"\n" not in self._buffer:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, "the child hangs"
            if select.select([fd], [], [], left_s)[0]:
                data = os.read(fd, 65536)
                assert data, "the server died"
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def __enter__(self) -> WarmProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def _serve(preload: list[str]) -> None:
    for module in preload:
        importlib.import_module(module)
    say("ready")
    for line in iter(sys.stdin.buffer.readline, b""):
        target, arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            say("pid", os.getpid())
            module, _, function = target.partition(":")
            getattr(importlib.import_module(module), function)(**arguments)
            return  # the ordinary way out of an interpreter: atexit, destructors and all
        _, status = os.waitpid(pid, 0)
        say("exit", os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    _serve(sys.argv[1:])
