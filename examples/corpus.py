"""Real text that lies on every machine, and a shuffled loader that resumes in the middle of an epoch."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import TypedDict

import torch


class LoaderState(TypedDict):
    """Where a `WindowLoader` stands: all that the next batch depends on."""

    epoch: int
    position: int
    seed: int
    corpus_sha256: str


def read_stdlib_sources() -> bytes:
    """The top-level modules of CPython's standard library, in the order of their names: some 5 MB."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))


class WindowLoader:
    """Endless shuffled batches of byte windows.

    Every epoch cuts the corpus at another phase into windows of `context` + 1 bytes and deals them in
    another order. Both follow from (seed, epoch) alone, so that epoch, position and seed are the whole
    state: no permutation needs to be saved.
    """

    def __init__(self, corpus: bytes, *, batch: int, context: int, seed: int) -> None:
        if len(corpus) < (batch + 1) * (context + 1):
            raise ValueError(f"corpus of {len(corpus)} bytes is too short for {batch} x {context + 1} bytes")
        self._bytes = torch.frombuffer(bytearray(corpus), dtype=torch.uint8)
        self._sha256 = hashlib.sha256(corpus).hexdigest()
        self._batch = batch
        self._window = context + 1
        self._seed = seed
        self._epoch = 0
        self._position = 0  # windows of this epoch that were dealt
        self._starts = self._deal()

    def _deal(self) -> torch.Tensor:
        """Start offsets of this epoch's windows, shuffled."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        phase = int(torch.randint(self._window, (), generator=generator))
        windows = (len(self._bytes) - phase) // self._window
        return phase + torch.randperm(windows, generator=generator) * self._window

    def __iter__(self) -> WindowLoader:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64 [batch, context]."""
        if self._position + self._batch > len(self._starts):  # the short last batch is dropped
            self._epoch += 1
            self._position = 0
            self._starts = self._deal()
        starts = self._starts[self._position : self._position + self._batch]
        self._position += self._batch
        windows = self._bytes[starts[:, None] + torch.arange(self._window)].long()
        return windows[:, :-1], windows[:, 1:]

    def state_dict(self) -> LoaderState:
        """The state after the last batch that was dealt."""
        return LoaderState(
            epoch=self._epoch, position=self._position, seed=self._seed, corpus_sha256=self._sha256
        )

    def load_state_dict(self, state: LoaderState) -> None:
        """Go on after the batch that `state` was taken behind.

        Raises:
            ValueError: the state was taken over another corpus.
        """
        if state["corpus_sha256"] != self._sha256:
            raise ValueError("the checkpoint was trained on another corpus (another Python version?)")
        self._epoch = state["epoch"]
        self._position = state["position"]
        self._seed = state["seed"]
        self._starts = self._deal()
