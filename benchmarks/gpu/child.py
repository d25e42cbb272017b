"""A measurement in a process of its own: what crashes, hangs or loses its device spoils only its own row.

The child calls `module:function(emit, **arguments)`; each row that it emits arrives at once, as a line of
JSON in a pipe that nothing else writes to. It ends itself, with its stacks on stderr, when its time is up.

    python -m benchmarks.gpu.child PIPE DEADLINE MODULE:FUNCTION ARGUMENTS
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import machine
from .journal import Emit, Row

GRACE_S = 10.0  # between the child's own end and the parent's patience
_STDERR_LINES = 6
_END = "end\n"
_PATH = re.compile(r"(?<![\w.])(?:/[\w.+@-]+)+/")  # where a machine keeps its files is nobody's business


@dataclass(frozen=True)
class Task:
    """One child.

    Attributes:
        target: "module:function".
        arguments: for it; anything JSON.
        labels: go into every row.
        environment: variables to set; None removes one.
    """

    target: str
    arguments: Row = field(default_factory=dict)
    labels: Row = field(default_factory=dict)
    environment: Mapping[str, str | None] = field(default_factory=dict)


def run(task: Task, add: Emit, timeout_s: float) -> bool:
    """Run it, and add its rows as they come. False, and a row with `error`, if it did not end well.

    Whatever processes it left behind are ended too.
    """
    reading, writing = os.pipe()
    environment = {**os.environ, **{key: one for key, one in task.environment.items() if one is not None}}
    for key, value in task.environment.items():
        if value is None:
            environment.pop(key, None)
    words = [str(writing), str(time.monotonic() + timeout_s), task.target, json.dumps(task.arguments)]
    failed = False
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.child", *words],
            cwd=machine.ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        patience = threading.Timer(timeout_s + GRACE_S, _end, (process,))
        patience.start()
        try:
            with os.fdopen(reading) as lines:
                for line in lines:
                    if line == _END:
                        break  # the end of the pipe may never come: forks of the child hold it too
                    row = _parsed(line)
                    failed = failed or "error" in row
                    add({**task.labels, **row})
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass  # it closed the pipe, and hangs at its exit
        finally:
            patience.cancel()
            _end(process)
            process.wait()
        if process.returncode and not failed:
            stderr.seek(0)
            add({**task.labels, "error": _ended(process.returncode, stderr.read())})
            failed = True
    return not failed


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _parsed(line: str) -> Row:
    try:
        row: Row = json.loads(line)
    except ValueError:
        return {"error": "died while it wrote a row"}
    return row


def _ended(code: int, stderr: str) -> str:
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    lines = [line.strip() for line in _PATH.sub("", stderr).splitlines() if line.strip()]
    # faulthandler says first what happened, and python last.
    title = [line for line in lines if line.startswith(("Timeout", "Fatal Python error"))][:1]
    return "; ".join([how, *title, *lines[-_STDERR_LINES:]])[:800]


def main(words: list[str]) -> None:
    """In the child."""
    pipe, deadline_s, target, arguments = words
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(1.0, float(deadline_s) - time.monotonic()), exit=True)
    with os.fdopen(int(pipe), "w", buffering=1) as rows:

        def emit(row: Row) -> None:
            rows.write(json.dumps(row) + "\n")

        try:
            module, name = target.split(":")
            function: Any = getattr(importlib.import_module(module), name)
            function(emit, **json.loads(arguments))
        except Exception as problem:  # noqa: BLE001 -- whatever it is, it is this row's finding
            emit({"error": described(problem)})
        rows.write(_END)
    # Threads and destructors of a driver that is in no good state any more may never end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def described(problem: BaseException) -> str:
    """One line, without the paths of this machine."""
    text = _PATH.sub("", str(problem)).strip()
    return f"{type(problem).__name__}: {text.splitlines()[0][:300]}" if text else type(problem).__name__


if __name__ == "__main__":
    main(sys.argv[1:])
