"""The training that a save must not disturb: a real module, a real AdamW, work of known length."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Iterator, KeysView, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


@dataclass(frozen=True)
class Size:
    """How much state, and how long training computes before it changes it.

    Each weight makes four tensors: itself, two moments and a step counter.
    """

    weights: int
    rows: int
    columns: int
    compute_s: float

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: float32, the weight and two moments, and a counter."""
        return self.weights * (3 * 4 * self.rows * self.columns + 4)


FULL = Size(weights=64, rows=1366, columns=1024, compute_s=0.25)  # 256 tensors, 1.0005 GiB
HUGE = Size(weights=640, rows=1366, columns=1024, compute_s=0.25)  # ten times as much
TINY = Size(weights=4, rows=256, columns=256, compute_s=0.005)


@dataclass(frozen=True)
class StepTime:
    """One step. `fence_s` is what hooks made the optimizer wait; part of `total_s`.

    With nothing to wait for it is not quite nothing: hooks are called, those of savers that stay in a run
    while others are measured too. So it counts beside that of quiet steps.
    """

    total_s: float
    fence_s: float


class Copies:
    """Remembers tensors by copies of them, which take as much memory again."""

    def __init__(self) -> None:
        self._copies: dict[str, torch.Tensor] = {}

    def keep(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """These are the ones, as they are now; with the same names each time."""
        for name, tensor in tensors:
            if name in self._copies:
                self._copies[name].copy_(tensor)
            else:
                self._copies[name] = tensor.clone()

    def names(self) -> KeysView[str]:
        """Of what is kept."""
        return self._copies.keys()

    def same(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether it is what was kept, bit for bit."""
        return name in self._copies and torch.equal(tensor, self._copies[name])


class Checksums:
    """Remembers tensors by their CRC, which takes no memory but time."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[torch.Size, int]] = {}

    def keep(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """These are the ones, as they are now."""
        self._sums = {name: self._sum(tensor) for name, tensor in tensors}

    def names(self) -> KeysView[str]:
        """Of what is kept."""
        return self._sums.keys()

    def same(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether it has the shape and the CRC of what was kept."""
        return self._sums.get(name) == self._sum(tensor)

    @staticmethod
    def _sum(tensor: torch.Tensor) -> tuple[torch.Size, int]:
        return tensor.shape, zlib.crc32(tensor.detach().contiguous().reshape(-1).numpy().data)


class Workload:
    """One-thread matmul for a fixed number of rounds, then AdamW over every weight.

    Training uses one thread, so that a core is left to whoever saves; `all_threads()` gives torch back
    those that it starts with, because the peers' copies use them.
    """

    def __init__(self, size: Size, remembered: Copies | Checksums | None = None) -> None:
        self.size = size
        self._remembered = remembered or Copies()
        self._threads = torch.get_num_threads()
        torch.manual_seed(0)
        with torch.no_grad():
            layers = [torch.nn.Linear(size.columns, size.rows, bias=False) for _ in range(size.weights)]
        self.model = torch.nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        gradient = torch.randn(size.rows, size.columns)
        for parameter in self.model.parameters():
            # Checksums are for states that leave no room for anything else: one gradient does for all.
            parameter.grad = gradient if isinstance(remembered, Checksums) else torch.randn_like(parameter)
        self._operand = torch.randn(512, 512)
        self._product = torch.empty(512, 512)
        # Hooks for all optimizers run before those of one: what lies between the two is the fence.
        # So this must exist before any checkpointer does.
        self._entered_s = self._fenced_s = 0.0
        self._hooks = [
            register_optimizer_step_pre_hook(self._enter),
            self.optimizer.register_step_pre_hook(self._leave),
        ]
        torch.set_num_threads(1)
        self._matmuls = 1
        self._matmuls = max(1, round(size.compute_s / min(self._compute() for _ in range(50))))
        self.optimizer.step()  # makes the moments
        self.nbytes = sum(tensor.nbytes for _, tensor in self.tensors())
        self.tensor_count = sum(1 for _ in self.tensors())
        self.remember()

    def _enter(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._entered_s = time.perf_counter()

    def _leave(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._fenced_s = time.perf_counter() - self._entered_s

    def close(self) -> None:
        """Take the hooks away and give torch its threads back."""
        for hook in self._hooks:
            hook.remove()
        torch.set_num_threads(self._threads)

    def _compute(self) -> float:
        began_s = time.perf_counter()
        for _ in range(self._matmuls):
            torch.mm(self._operand, self._operand, out=self._product)
        return time.perf_counter() - began_s

    def step(self) -> StepTime:
        """Compute, then change every tensor of the state."""
        began_s = time.perf_counter()
        self._compute()
        self.optimizer.step()
        return StepTime(time.perf_counter() - began_s, self._fenced_s)

    def all_threads(self) -> None:
        """For the call that saves."""
        torch.set_num_threads(self._threads)

    def one_thread(self) -> None:
        """For training."""
        torch.set_num_threads(1)

    def tree(self) -> dict[str, Any]:
        """The state, nested and named as stock tools do: what every peer is given."""
        names: dict[torch.Tensor, str] = {
            parameter: name for name, parameter in self.model.named_parameters()
        }
        groups = self.optimizer.param_groups
        return {
            "model": self.model.state_dict(),
            "optimizer": {
                "state": {names[parameter]: dict(state) for parameter, state in self.optimizer.state.items()},
                "param_groups": [
                    {**group, "params": [names[one] for one in group["params"]]} for group in groups
                ],
            },
        }

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of the state by name."""
        return tensors_of(self.tree())

    def remember(self) -> None:
        """Keep what the state is now: what the next save has to have saved."""
        self._remembered.keep(self.tensors())

    def adopt(self, loaded: Mapping[str, torch.Tensor]) -> None:
        """Go on from another state."""
        with torch.no_grad():
            for name, tensor in self.tensors():
                tensor.copy_(loaded[name])

    def judge(self, loaded: Mapping[str, torch.Tensor]) -> str:
        """ "right" if `loaded` is what was remembered, bit for bit; else what is wrong."""
        return self.judge_each(loaded.items())

    def judge_each(self, loaded: Iterable[tuple[str, torch.Tensor]]) -> str:
        """The same for tensors of which not all are there at a time."""
        found = {name: self._remembered.same(name, tensor) for name, tensor in loaded}
        if found.keys() != self._remembered.names():
            return f"wrong names: {sorted(found.keys() ^ self._remembered.names())[:3]}"
        wrong = [name for name in self._remembered.names() if not found[name]]
        return f"wrong values in {len(wrong)} tensors, {wrong[0]} first" if wrong else "right"


def tensors_of(tree: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested mappings, by dotted name."""
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from tensors_of(child, f"{name}.{key}" if name else str(key))
