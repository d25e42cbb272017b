"""One save, from the call of save() until it is durable or has failed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from .commit import Attempt
from .errors import CheckpointError, SaveTimeoutError, TornStateError
from .report import SaveReport
from .snapshot import Snapshot
from .trial import Sample

_log = logging.getLogger(__name__)

ABORT_S = 10.0  # a job that was given up lets go as soon as the copies under way return; a device may hang

PhaseObserver = Callable[[int, str], None]  # (step, phase that was reached)


class Deadline:
    """A time limit that several waits share; it begins when this is made.

    Attributes:
        timeout_s: all of it.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._ends_s = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Seconds until then; 0 afterwards."""
        return max(0.0, self._ends_s - time.monotonic())


class Save:
    """A save in flight. The training thread fences it, the committer finishes it.

    Attributes:
        sample: to be told what the save cost, should it succeed.
        checked: set once the training thread has decided that nothing was torn, or that something was.
        done: set at the very end, durable or failed.
        heard: somebody was told of the error.
        refused: why it could not even begin, where other ranks must hear of that.
        call: the how-manieth call of save() it is; the same on every rank.
        thread: that called save(); the one whose word on torn tensors counts.
    """

    def __init__(self, step: int, observer: PhaseObserver | None, call: int = 0) -> None:
        self.report = SaveReport(step)
        self.call = call
        self.snapshot: Snapshot | None = None
        self.attempt: Attempt | None = None
        self.metadata: dict[str, object] = {}
        self.sample: Sample | None = None
        self.checked = threading.Event()
        self.done = threading.Event()
        self.heard = False
        self.refused: CheckpointError | None = None
        self.thread = threading.get_ident()
        self.submitting_s = 0.0  # after the call; the engine's clock begins here
        self._copying_s = 0.0  # without the waits for the disk
        self._error: CheckpointError | None = None
        self._lock = threading.Lock()
        self._began_s = time.perf_counter()
        self._observer = observer

    @property
    def step(self) -> int:
        """The step number."""
        return self.report.step

    @property
    def error(self) -> CheckpointError | None:
        """Why it failed, if it did."""
        return self._error

    def elapsed_s(self) -> float:
        """Seconds since the call of save()."""
        return time.perf_counter() - self._began_s

    def begun(self) -> tuple[Snapshot, Attempt]:
        """The snapshot and the attempt of a save that has begun."""
        if self.snapshot is None or self.attempt is None:
            raise RuntimeError(f"step {self.step} has not begun")
        return self.snapshot, self.attempt

    def note_written(self, snapshot: Snapshot) -> None:
        """Take over the engine's times: all files are synced."""
        enqueued_s, released_s, _, _, starved_s = snapshot.times_s()
        self.report.starved_s = starved_s
        self._copying_s = released_s - starved_s
        self.report.prefault_s = snapshot.prefault_s
        self.report.direct = snapshot.direct
        submitted_s = self.report.phases["submitted"]
        self.mark("enqueued", max(submitted_s, self.submitting_s + enqueued_s))
        self.mark("released", max(submitted_s, self.submitting_s + released_s))
        self.mark("written")

    def mark(self, phase: str, at_s: float | None = None) -> None:
        """Note that a phase was reached, now or `at_s` seconds after the call."""
        self.report.phases[phase] = self.elapsed_s() if at_s is None else at_s
        if self._observer is not None:
            try:
                self._observer(self.step, phase)
            except Exception:  # noqa: BLE001 -- whatever an observer does, the save goes on
                _log.exception("on_phase(%d, %r) failed", self.step, phase)

    def fail(self, error: CheckpointError) -> None:
        """Fail, for the first reason given; the engine stops working for it."""
        with self._lock:
            if self._error is None:
                self._error = error
        snapshot = self.snapshot
        if snapshot is not None:
            snapshot.abort()

    def fence(self, deadline: Deadline, on_host: bool = True, captured: bool = False) -> None:
        """Check that nothing was torn, and see to it that training may change everything.

        On the thread that is about to change it, before it does. Never raises: a failure is the save's,
        not training's.

        Args:
            on_host: wait until all is copied: then memory may also be freed. Otherwise wait until all
                copies are on their way, and let this thread's device streams wait for those.
            captured: the change goes into a CUDA graph, whose replays nothing fences. On the host, then:
                that asks nothing of the driver.
        """
        snapshot = self.snapshot  # the committer may end a failed save at any moment
        if snapshot is None:
            return
        if self.checked.is_set() and snapshot.released:
            snapshot.let_go()
            return
        began_s = time.perf_counter()
        if self.checked.is_set():  # by a fence that left the waiting to devices; what they do is no tear
            if not self._let_pass(snapshot, deadline, on_host):
                self._give_up(snapshot, deadline, captured)
        else:
            passed = self._let_pass(snapshot, deadline, on_host)
            self.decide(snapshot)  # now: another thread may have written while this one waited
            if not passed:
                self._give_up(snapshot, deadline, captured)
        self.report.blocked_s += time.perf_counter() - began_s
        self.checked.set()
        if snapshot.released:  # after checked: the committer looks in the other order
            snapshot.let_go()

    def _let_pass(self, snapshot: Snapshot, deadline: Deadline, on_host: bool) -> bool:
        if on_host:
            return snapshot.wait_released(deadline.left_s())
        if not snapshot.wait_enqueued(deadline.left_s()):
            return False
        try:
            snapshot.hold_back()
        except CheckpointError as error:
            self.fail(error)
        return True

    def _give_up(self, snapshot: Snapshot, deadline: Deadline, captured: bool) -> None:
        within = f"its tensors were not copied within {deadline.timeout_s:g} s"
        if captured:
            self.fail(
                TornStateError(
                    f"step {self.step} was not saved: an optimizer's step was captured into a CUDA graph "
                    f"meanwhile, and {within}; call fence() before the capture"
                )
            )
        else:
            self.fail(
                SaveTimeoutError(
                    f"step {self.step} was given up: {within}; raise fence_timeout_s or host_memory, "
                    f"unless a device hangs"
                )
            )
        snapshot.wait_released(min(deadline.timeout_s, ABORT_S))

    def decide(self, snapshot: Snapshot) -> None:
        """Fail if a tensor has changed since save()."""
        what = snapshot.changed()
        if what is not None:
            self.fail(
                TornStateError(
                    f"step {self.step} was not saved: {what} before all was copied. Let the optimizer's "
                    f"step hook fence (it does by default), or call fence() before changing the state"
                )
            )

    def finish(self) -> None:
        """Whatever came of it, it is over."""
        if self.sample is not None and self._error is None:
            self.sample.note(self.report.pack_s + self._copying_s)
        self.checked.set()
        self.done.set()
        self.snapshot = None  # a handle that is kept must not keep the arena


class SaveHandle:
    """What save() returns: a view of one save."""

    def __init__(self, save: Save, settle: Callable[[Save, float | None], None]) -> None:
        self._save = save
        self._settle = settle

    @property
    def step(self) -> int:
        """The step number."""
        return self._save.step

    @property
    def report(self) -> SaveReport:
        """Times and sizes; complete once `done()`."""
        return self._save.report

    @property
    def error(self) -> CheckpointError | None:
        """Why it failed, if it did so already."""
        return self._save.error

    def done(self) -> bool:
        """Whether it is over: durable, failed or skipped."""
        return self._save.done.is_set()

    def wait(self, timeout_s: float | None = None) -> SaveReport:
        """Wait until durable. On the thread that saved, this fences too; on another, it waits for that.

        Raises:
            SaveError: it failed; the same as `error`.
            TimeoutError: `timeout_s` seconds passed; the save goes on.
        """
        self._settle(self._save, timeout_s)
        if self._save.error is not None:
            self._save.heard = True
            raise self._save.error
        return self.report

    def __repr__(self) -> str:
        if not self.done():
            what = "in flight"
        elif self._save.error is not None:
            what = "failed"
        else:
            what = "skipped" if self.report.skipped else "durable"
        return f"<SaveHandle step {self.step}: {what}>"
