"""Python's garbage collector, kept away from where thousands of objects are made that are no cycles."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """The collector would go through all objects of the program whenever we have made some thousands: a few
    for each tensor of a state. None of them are cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
