"""What an option may be. Every check raises OptionError and says what it got."""

from __future__ import annotations

import operator
from typing import Any

from .errors import OptionError
from .memory import available_bytes

WRITERS_MAX = 256  # arbitrary; far more than any disk rewards
FOREVER_S = 1e8  # three years; clocks overflow far beyond

_HOST_MEMORY_MIN = 1 << 16


def as_step(step: Any) -> int:
    """A step number, from whatever counts as an integer."""
    try:
        if isinstance(step, bool):
            raise TypeError
        return operator.index(step)
    except TypeError:
        raise OptionError(f"step must be an int, got {step!r}") from None


def as_host_memory(value: Any) -> int | None:
    """Bytes that can be had now; None stays None."""
    if value is None:
        return None
    if not _is_whole(value, at_least=_HOST_MEMORY_MIN):
        raise OptionError(f"host_memory is a number of bytes, at least {_HOST_MEMORY_MIN}; got {value!r}")
    available = available_bytes()
    if value > available:
        raise OptionError(f"host_memory: {value} bytes, but only {available} are available")
    return int(value)


def as_timeout(name: str, value: Any) -> float:
    """Seconds that clocks can count."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise OptionError(f"{name} is a positive number of seconds; got {value!r}")
    return min(float(value), FOREVER_S)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of `choices`."""
    if value not in choices:
        raise OptionError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_positive(**options: int | None) -> None:
    """Whole numbers from 1, or None."""
    for name, value in options.items():
        if not (value is None or _is_whole(value, at_least=1)):
            raise OptionError(f"{name} must be a positive whole number, got {value!r}")


def _is_whole(value: object, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least
