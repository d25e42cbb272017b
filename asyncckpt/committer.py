"""The thread that turns written snapshots into visible steps, one at a time, in order; and the
heartbeat of the lease beside it, which nothing holds up.

    written and fenced -> fragment, manifest -> lease still ours -> rename -> tracker -> retention

Guarantees:
- A save ends, durable or failed, whatever happens to it; whoever waits for it is woken. One that has
  failed ends soon, also if a device hangs that copies for it: what that may still read is held on.
- A save that nobody fenced is never committed.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from .commit import CheckpointRoot
from .errors import CheckpointError, RootError, SaveError
from .inflight import ABORT_S, Save
from .lease import RootLease
from .snapshot import Snapshot

_log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
_LOOK_S = 0.1  # how often a save that waits for its copies is looked at: it may have failed


class Committer:
    """Commits saves in the background.

    Args:
        keep: keep_last and keep_every of retention.
        on_failure: told of a save that failed, before anybody who waits for it is woken.
        fence_timeout_s: how long a fence waits; a failed save has no longer to let go of training's memory.
    """

    def __init__(
        self,
        root: CheckpointRoot,
        lease: RootLease,
        keep: tuple[int | None, int | None],
        on_failure: Callable[[Save], None],
        fence_timeout_s: float,
    ) -> None:
        self._root = root
        self._lease = lease
        self._keep = keep
        self._on_failure = on_failure
        self._release_timeout_s = min(fence_timeout_s, ABORT_S)
        self._said_buffered = self._said_unchecked = self._said_unpinned = self._said_unbatched = False
        self._in_flight: list[Save] = []  # oldest first; replaced, never changed, so reading needs no lock
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Save | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="asyncckpt-heartbeat", daemon=True)
        self._thread = threading.Thread(target=self._run, name="asyncckpt-committer", daemon=True)
        self._heart.start()
        try:
            self._thread.start()
        except BaseException:
            self._stopped.set()
            self._heart.join()
            raise

    @property
    def in_flight(self) -> list[Save]:
        """Saves that have not ended, oldest first."""
        return self._in_flight

    def take(self, save: Save) -> None:
        """Finish `save`, whose snapshot has begun."""
        with self._lock:
            self._in_flight = [*self._in_flight, save]
        self._queue.put(save)

    def stop(self) -> None:
        """End the threads, once everything taken has ended."""
        self._queue.put(None)
        self._thread.join()
        self._stopped.set()
        self._heart.join()

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S):
            try:
                self._lease.renew()
            except Exception as error:  # noqa: BLE001 -- the heart goes on; the check before a publish decides
                _log.warning("the lease was not renewed: %s", error)

    def _run(self) -> None:
        while (save := self._queue.get()) is not None:
            try:
                self._commit(save)
            except CheckpointError as error:
                save.fail(error)
            except BaseException as error:  # noqa: BLE001 -- a bug of ours must not become a hang of theirs
                failure = SaveError(f"step {save.step} was not saved: {type(error).__name__}: {error}")
                failure.__cause__ = error
                save.fail(failure)
            finally:
                self._end(save)

    def _commit(self, save: Save) -> None:
        snapshot, attempt = save.begun()
        visible = False

        def mark(phase: str) -> None:
            nonlocal visible
            visible = visible or phase == "renamed"
            save.mark(phase)
            if phase == "manifest":
                self._check_lease(save)  # the last look: a suspended process may have lost it meanwhile

        try:
            self._await_release(save, snapshot)
            if save.checked.is_set():
                snapshot.let_go()
            snapshot.wait_written()
            save.note_written(snapshot)
            if not snapshot.direct and not self._said_buffered:
                self._said_buffered = True
                _log.warning(
                    "%s: no O_DIRECT here; files are written through the page cache", self._root.path
                )
            if snapshot.batch_failure and not self._said_unbatched:
                self._said_unbatched = True
                _log.warning(
                    "copies from devices go one by one, small tensors are slow: %s", snapshot.batch_failure
                )
            if snapshot.pin_failure and not self._said_unpinned:
                self._said_unpinned = True
                _log.warning(
                    "host_memory is not pinned, copies from devices are slow: %s",
                    snapshot.pin_failure,
                )
            save.checked.wait()
            if save.error is not None:
                raise save.error
            save.mark("checked")
            fragment = self._root.write_fragment(attempt, 0, snapshot.files())
            self._root.publish(attempt, [fragment], metadata=save.metadata, on_phase=mark)
            save.report.durable_s = save.elapsed_s()
        except BaseException:
            if not visible:
                self._root.discard(attempt)
            raise
        try:
            if self._root.retain(*self._keep):
                save.mark("retained")
        except CheckpointError as error:
            _log.warning("older steps could not be removed, the next save tries again: %s", error)

    def _await_release(self, save: Save, snapshot: Snapshot) -> None:
        while not snapshot.wait_released(_LOOK_S):
            if save.error is not None:
                snapshot.give_up(self._release_timeout_s)
                raise save.error

    def _check_lease(self, save: Save) -> None:
        try:
            self._lease.check()
        except RootError as error:
            raise SaveError(f"step {save.step} was not saved: {error}") from error

    def _end(self, save: Save) -> None:
        try:
            if save.error is not None:
                # Whatever failed, the engine may still be looking at the memory that the save holds.
                if not save.begun()[0].released:
                    save.begun()[0].give_up(0)
                self._on_failure(save)
        finally:
            with self._lock:
                self._in_flight = [other for other in self._in_flight if other is not save]
            save.finish()
