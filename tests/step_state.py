"""Training state whose every value is a pure function of the step, so that a load can be judged alone."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

LAYOUTS = ("dcp", "megatron")
HOST_MEMORY_NBYTES = 1 << 16  # far below the state: saves stream, in blocks of BLOCK_NBYTES
BLOCK_NBYTES = 4096
DATA_FILE = {"dcp": "__0_0.distcp", "megatron": "mp_rank_00/model_optim_rng.pt"}
TRACKER = "latest_checkpointed_iteration.txt"

_STEP_DIRECTORY = {"dcp": re.compile(r"step-(\d+)"), "megatron": re.compile(r"iter_(\d+)")}


def pattern(shape: tuple[int, ...], dtype: torch.dtype, *salts: int | str) -> torch.Tensor:
    """Values that depend on all the salts and differ from element to element."""
    seed = sum((index + 1) * (hash_of(salt) % 9973) for index, salt in enumerate(salts))
    count = int(np.prod(shape, dtype=np.int64))
    numbers = (torch.arange(count, dtype=torch.int64) * 7919 + seed * 104729) % 241
    return numbers.reshape(shape).to(dtype)


def hash_of(salt: int | str) -> int:
    return (
        salt if isinstance(salt, int) else sum(byte * (place + 7) for place, byte in enumerate(salt.encode()))
    )


class Model(torch.nn.Module):
    """Several dtypes, a tied weight and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((96, 64), float("nan")))
        self.bias = torch.nn.Parameter(torch.full((33,), float("nan"), dtype=torch.bfloat16))
        self.tied = self.weight
        self.register_buffer("seen", torch.full((5,), -1))


class Setter(torch.optim.Optimizer):
    """An optimizer with two moments whose step() writes what `pattern` says."""

    def __init__(self, model: Model) -> None:
        self._named = dict(model.named_parameters())
        super().__init__(list(self._named.values()), {"lr": -1.0})
        self.now: tuple[int, str] = (-1, "")

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["lr"] = float(self.now[0])
        with torch.no_grad():
            for name, param in self._named.items():
                param.copy_(pattern(tuple(param.shape), param.dtype, name, *self.now))
                state = self.state[param]
                state.setdefault("step", torch.zeros(())).fill_(float(self.now[0]))
                for moment in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(moment, torch.zeros(param.shape)).copy_(
                        pattern(tuple(param.shape), torch.float32, name, moment, *self.now)
                    )


class Counter:
    """A scheduler or a dataloader, as far as a checkpoint is concerned."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: dict[str, Any] = {}

    def set(self, step: int, run: str) -> None:
        self.values = {"name": self.name, "at": step, "run": run, "history": [step, (step, str(step))]}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self.values = dict(values)


class StepState:
    """All the objects of a run. Freshly made, it holds no value that any step would have."""

    def __init__(self) -> None:
        self.model = Model()
        self.optimizer = Setter(self.model)
        self.lr_scheduler = Counter("scheduler")
        self.dataloader = Counter("dataloader")
        self.extra: dict[str, Any] = {"note": "", "order": torch.full((17,), -1)}

    @property
    def parts(self) -> dict[str, Any]:
        """The arguments of AsyncCheckpointer."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "lr_scheduler": self.lr_scheduler,
            "dataloader": self.dataloader,
            "extra": self.extra,
        }

    def advance(self, step: int, run: str = "") -> None:
        """Be the state of `step`. The optimizer goes first: its hook is the fence."""
        self.optimizer.now = (step, run)
        self.optimizer.step()
        self.model.seen.fill_(step)
        self.lr_scheduler.set(step, run)
        self.dataloader.set(step, run)
        self.extra["note"] = f"{run} {step}"
        self.extra["order"].copy_(pattern((17,), torch.int64, "order", step, run))
        random.seed(step)
        np.random.seed(step)  # noqa: NPY002 -- the global generator is part of the state
        torch.manual_seed(step)

    def wrong(self, step: int, run: str = "") -> list[str]:
        """Names of the values that are not those of `step`."""
        expected = StepState()
        keep = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        expected.advance(step, run)
        want = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        random.setstate(keep[0])
        np.random.set_state(keep[1])  # noqa: NPY002
        torch.set_rng_state(keep[2])
        here, there = self._named_values(), expected._named_values()
        wrong = [name for name in sorted({*here, *there}) if not _same(here.get(name), there.get(name))]
        if keep[0] != want[0]:
            wrong.append("rng.python")
        if not all(np.array_equal(a, b) for a, b in zip(keep[1], want[1], strict=True)):
            wrong.append("rng.numpy")
        if not torch.equal(keep[2], want[2]):
            wrong.append("rng.torch")
        return wrong

    def _named_values(self) -> dict[str, Any]:
        values: dict[str, Any] = dict(self.model.state_dict())
        for name, param in self.model.named_parameters():
            values.update({f"{name}.{key}": value for key, value in self.optimizer.state[param].items()})
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        values["scheduler"] = self.lr_scheduler.values
        values["dataloader"] = self.dataloader.values
        values.update(self.extra)
        return values


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def visible_steps(root: Path, layout: str) -> list[int]:
    """Step numbers by the names of directories alone, as a tool that knows only the layout sees them."""
    matches = (_STEP_DIRECTORY[layout].fullmatch(path.name) for path in root.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def step_directory(root: Path, layout: str, step: int) -> Path:
    """Where a step lies."""
    return root / (f"step-{step}" if layout == "dcp" else f"iter_{step:07d}")


def hidden_names(root: Path) -> list[str]:
    """What is there besides steps and tracker, the lease and abandoned steps aside."""
    return sorted(
        path.name
        for path in root.iterdir()
        if path.name.startswith(".")
        and path.name != ".asyncckpt-lease"
        and not path.name.startswith(".abandoned-")
    )
