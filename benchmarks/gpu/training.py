"""The training that is saved: a transformer in bfloat16 whose AdamW keeps float32 masters and moments.

Fourteen bytes to a parameter, five tensors to a weight: itself, its master, two moments, a step counter.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- as everybody calls it
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..workload import tensors_of

COMPUTE_PER_COPY = 1.25  # forward and backward outlast the copy by a quarter
_TENSORS_PER_WEIGHT = 5
_BYTES_PER_PARAMETER = 2 + 4 + 4 + 4
_STEP_COUNTER_NBYTES = 4


@dataclass(frozen=True)
class Shape:
    """How large a transformer, and how many tokens it sees at a time."""

    layers: int
    width: int
    hidden: int
    vocabulary: int
    heads: int
    batch: int = 8
    tokens: int = 1024

    @property
    def parameters(self) -> int:
        """Numbers in all weights; the head shares the embedding."""
        layer = 4 * self.width**2 + 3 * self.width * self.hidden + 2 * self.width
        return self.layers * layer + self.vocabulary * self.width + self.width

    @property
    def weights(self) -> int:
        """Weight tensors."""
        return 7 * self.layers + 2

    @property
    def tensors(self) -> int:
        """Tensors of the whole state."""
        return _TENSORS_PER_WEIGHT * self.weights

    @property
    def nbytes(self) -> int:
        """Of the whole state."""
        return self.parameters * _BYTES_PER_PARAMETER + self.weights * _STEP_COUNTER_NBYTES


SHAPES = {
    "2 GB": Shape(layers=12, width=896, hidden=2432, vocabulary=32_000, heads=14),
    "10 GB": Shape(layers=13, width=2048, hidden=5504, vocabulary=32_000, heads=16),
    "> 20 GB": Shape(layers=28, width=1536, hidden=8960, vocabulary=65_536, heads=12),
}
TINY_SHAPES = {
    name: Shape(layers=2, width=32, hidden=64, vocabulary=128, heads=2, batch=2, tokens=16) for name in SHAPES
}


def micro_batches(copy_s: float, micro_s: float) -> int:
    """How many make forward and backward outlast a copy of `copy_s`."""
    return max(1, math.ceil(COMPUTE_PER_COPY * copy_s / micro_s))


class _Layer(torch.nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, hidden = shape.width, shape.hidden
        self.heads = shape.heads
        self.norm_attention = torch.nn.RMSNorm(width)
        self.qkv = torch.nn.Linear(width, 3 * width, bias=False)
        self.out = torch.nn.Linear(width, width, bias=False)
        self.norm_hidden = torch.nn.RMSNorm(width)
        self.gate = torch.nn.Linear(width, hidden, bias=False)
        self.up = torch.nn.Linear(width, hidden, bias=False)
        self.down = torch.nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = (one.transpose(1, 2) for one in parts.unbind(2))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        normed = self.norm_hidden(x)
        hidden: torch.Tensor = self.down(F.silu(self.gate(normed)) * self.up(normed))
        return x + hidden


class _Transformer(torch.nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(shape.vocabulary, shape.width)
        self.layers = torch.nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = torch.nn.RMSNorm(shape.width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.embedding.weight)


class _Mixed(torch.nn.Module):
    """What computes, in bfloat16, and what the optimizer works on."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.working = _Transformer(shape)
        self.master = copy.deepcopy(self.working)
        self.working.bfloat16()


@dataclass(frozen=True)
class StepTime:
    """One step.

    Attributes:
        gpu_s: from its first kernel to its last, on the GPU's clock; waits of the GPU are in it.
        host_s: until the host had enqueued all of it.
        fence_s: what guards and hooks made the host wait before the optimizer; part of host_s.
    """

    gpu_s: float
    host_s: float
    fence_s: float


class Training:
    """Forward, backward and AdamW, for real. Make it before any saver: its hook must be the first.

    Attributes:
        guard: what the saver wants around the optimizer's step.
    """

    def __init__(self, gpu: Any, shape: Shape) -> None:
        self.shape = shape
        self.guard: Callable[[], AbstractContextManager[object]] = nullcontext
        self._gpu = gpu
        torch.manual_seed(0)
        with torch.device(gpu.device):
            self.model = _Mixed(shape)
            self._tokens = torch.randint(shape.vocabulary, (shape.batch, shape.tokens + 1))
        self._pairs = list(zip(self.model.working.parameters(), self.model.master.parameters(), strict=True))
        for _, master in self._pairs:
            master.grad = torch.zeros_like(master)
        self.optimizer = torch.optim.AdamW(self.model.master.parameters(), lr=1e-3, fused=True)
        # Hooks for all optimizers run before those of one: what lies between the two is the fence.
        self._entered_s = self._fenced_s = 0.0
        self._hooks = [
            register_optimizer_step_pre_hook(self._enter),
            self.optimizer.register_step_pre_hook(self._leave),
        ]
        self._micro_batches = 1
        self._remembered: dict[str, torch.Tensor] = {}
        self.step()  # makes the moments

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._entered_s = time.perf_counter()

    def _leave(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._fenced_s += time.perf_counter() - self._entered_s

    def calibrate(self, copy_s: float) -> int:
        """Take as many micro-batches to a step as make forward and backward outlast a copy."""
        stream, began, ended = self._gpu.current(), self._gpu.event(), self._gpu.event()
        took_s = []
        for _ in range(4):
            began.record(stream)
            self._compute()
            ended.record(stream)
            ended.synchronize()
            took_s.append(began.elapsed_time(ended) / 1e3)
        self._micro_batches = micro_batches(copy_s, median(took_s[1:]))
        return self._micro_batches

    def _compute(self) -> None:
        logits = self.model.working(self._tokens[:, :-1])
        loss: Any = F.cross_entropy(logits.flatten(0, 1), self._tokens[:, 1:].flatten())
        loss.backward()

    def step(self) -> StepTime:
        """One step; returns when the GPU has done it."""
        stream, began, ended = self._gpu.current(), self._gpu.event(), self._gpu.event()
        began_s = time.perf_counter()
        began.record(stream)
        for _ in range(self._micro_batches):
            self._compute()
        for working, master in self._pairs:
            assert working.grad is not None
            assert master.grad is not None
            master.grad.copy_(working.grad)
            working.grad.zero_()
        guarded_s = time.perf_counter()
        with self.guard():
            self._fenced_s = time.perf_counter() - guarded_s
            self.optimizer.step()
            with torch.no_grad():
                for working, master in self._pairs:
                    working.copy_(master)
        ended.record(stream)
        host_s = time.perf_counter() - began_s
        ended.synchronize()
        return StepTime(began.elapsed_time(ended) / 1e3, host_s, self._fenced_s)

    # ---- the state

    def tree(self) -> dict[str, Any]:
        """The state, nested and named as stock tools do: what every peer is given."""
        names: dict[Any, str] = {parameter: name for name, parameter in self.model.named_parameters()}
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

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def remember(self, names: Iterable[str]) -> None:
        """Keep copies of some tensors as they are now, on the device."""
        wanted = set(names)
        self._remembered = {name: tensor.clone() for name, tensor in self.tensors() if name in wanted}
        self._gpu.synchronize()

    @property
    def remembered(self) -> set[str]:
        """Their names."""
        return set(self._remembered)

    def changed(self) -> int:
        """How many of them are not as remembered any more: unless they moved, a check proves nothing."""
        live = dict(self.tensors())
        return sum(not torch.equal(live[name], one) for name, one in self._remembered.items())

    def judge(self, loaded: Mapping[str, torch.Tensor]) -> str:
        """ "right" if `loaded` is what was remembered, bit for bit; else what is wrong."""
        if missing := self._remembered.keys() - loaded.keys():
            return f"missing: {sorted(missing)[:3]}"
        wrong = [
            name
            for name, value in self._remembered.items()
            if loaded[name].dtype != value.dtype or not torch.equal(loaded[name].cpu(), value.cpu())
        ]
        return f"wrong values in {len(wrong)} tensors, {wrong[0]} first" if wrong else "right"


def sample(sizes: Mapping[str, int], nbytes_max: int, count: int = 32) -> list[str]:
    """Names to check where all would take too long: the largest, and an even choice of the others.

    Args:
        sizes: bytes by name.
        nbytes_max: of all that are chosen; the largest is taken in any case.
        count: how many, at most.
    """
    names = list(sizes)
    largest = max(names, key=lambda name: sizes[name])
    chosen, room = {largest}, nbytes_max - sizes[largest]
    for index in range(count - 1):
        name = names[index * (len(names) - 1) // max(1, count - 2)]
        if name not in chosen and sizes[name] <= room:
            chosen.add(name)
            room -= sizes[name]
    return [name for name in names if name in chosen]
