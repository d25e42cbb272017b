"""The generators of python, numpy and torch."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from ..devices import in_use
from ..tree import Matching


class RngSection:
    """Every generator that a training step may draw from."""

    def capture(self) -> Any:
        states: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=True),  # noqa: NPY002 -- the global one is what there is to save
            "torch": torch.get_rng_state(),
        }
        if in_use():  # a run that uses no device is not made to
            states["cuda"] = torch.cuda.get_rng_state_all()
        return states

    def match(self, name: str, stored: Any, matching: Matching) -> None:
        states = matching.fresh(name, stored)

        def restore() -> None:
            if "python" in states:
                version, internal, gauss = states["python"]
                random.setstate((version, tuple(internal), gauss))
            if "numpy" in states:
                np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
            if "torch" in states:
                torch.set_rng_state(states["torch"])
            if states.get("cuda") and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])

        matching.afterwards.append(restore)
