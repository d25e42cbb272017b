"""Failed saves that nobody was told of yet."""

from __future__ import annotations

import logging
import threading

from .inflight import Save

_log = logging.getLogger(__name__)


class Failures:
    """Keeps failures until they can be raised, each once. Thread-safe.

    Args:
        quiet: log them instead, and raise none.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._failed: list[Save] = []
        self._lock = threading.Lock()

    def note(self, save: Save) -> None:
        """A save has failed."""
        if self._quiet:
            save.heard = True
            _log.warning("step %d was not saved, the next save tries again: %s", save.step, save.error)
        else:
            with self._lock:
                self._failed.append(save)

    def raise_due(self, last_call: int | None = None) -> None:
        """Raise the first that nobody has heard of, of calls up to `last_call`; log those after it."""
        with self._lock:
            due = [save for save in self._failed if last_call is None or save.call <= last_call]
            self._failed = [save for save in self._failed if save not in due]
        unheard = [save for save in due if not save.heard]
        for save in unheard:
            save.heard = True
        for save in unheard[1:]:
            _log.error("step %d was not saved either: %s", save.step, save.error)
        if unheard and unheard[0].error is not None:
            raise unheard[0].error
