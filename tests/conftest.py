"""Settings and fixtures that all tests share."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no reason to fail: how long examples take to draw says nothing about the code.
settings.register_profile("asyncckpt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("asyncckpt")


@pytest.fixture
def scratch_path(tmp_path: Path) -> Iterator[Path]:
    """For thousands of fsyncs that nobody checks: memory, where the machine has such a directory."""
    memory = Path("/dev/shm")  # noqa: S108 -- mkdtemp below makes a private one
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)
