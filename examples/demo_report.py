"""The demo's table and picture, made from the log of a training run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from rich.table import Table

mpl.use("Agg")  # no display is needed to write a PNG

from matplotlib import pyplot as plt  # a backend is chosen before pyplot is imported


@dataclass(frozen=True)
class Save:
    """One durable save, as its SaveReport told."""

    step: int
    nbytes: int
    blocked_s: float
    durable_s: float


@dataclass
class RunLog:
    """What one training run wrote to its log."""

    resumed_from: int | None = None
    losses: dict[int, str] = field(default_factory=dict)  # step -> float.hex of the loss
    step_s: dict[int, float] = field(default_factory=dict)
    saved: list[int] = field(default_factory=list)  # steps that called save()
    saves: list[Save] = field(default_factory=list)
    torch_save_s: dict[int, float] = field(default_factory=dict)  # step after which it was timed

    @classmethod
    def read(cls, path: Path) -> RunLog:
        """Read a log; the last line of a killed run may be cut short."""
        log = cls()
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                log.add(json.loads(line))
        return log

    def add(self, values: dict[str, Any]) -> None:
        """Take one line of the log."""
        event = values["event"]
        if event == "start":
            self.resumed_from = values["resumed_from"]
        elif event == "step":
            step = values["step"]
            self.losses[step] = values["loss"]
            self.step_s[step] = values["step_s"]
            if values["saved"]:
                self.saved.append(step)
            if values["torch_save_s"] is not None:
                self.torch_save_s[step] = values["torch_save_s"]
        elif event == "save":
            self.saves.append(
                Save(values["step"], values["nbytes"], values["blocked_s"], values["durable_s"])
            )


def save_table(log: RunLog) -> Table:
    """One row for each save, torch.save's time beside it; the last row holds medians."""
    table = Table(
        caption="durable: a commit waits until the next step's fence found nothing torn. "
        "torch.save: the same state, timed half an interval earlier, with fsync"
    )
    columns = ("step", "MB", "blocked ms", "durable s", "GB/s", "torch.save blocked ms", "less by")
    for name in columns:
        table.add_column(name, justify="right")
    baselines = sorted(log.torch_save_s.items())
    for save in sorted(log.saves, key=lambda save: save.step):
        earlier = [seconds for step, seconds in baselines if step <= save.step]
        table.add_row(str(save.step), *cells(save, earlier[-1] if earlier else None))
    if log.saves:
        table.add_section()
        middle = Save(
            step=0,
            nbytes=int(median(save.nbytes for save in log.saves)),
            blocked_s=median(save.blocked_s for save in log.saves),
            durable_s=median(save.durable_s for save in log.saves),
        )
        baseline = median(log.torch_save_s.values()) if log.torch_save_s else None
        table.add_row("median", *cells(middle, baseline), style="bold")
    return table


def cells(save: Save, torch_save_s: float | None) -> list[str]:
    """The columns after the step."""
    return [
        f"{save.nbytes / 1e6:.1f}",
        f"{save.blocked_s * 1e3:.2f}",
        f"{save.durable_s:.3f}",
        f"{save.nbytes / save.durable_s / 1e9:.2f}",
        f"{torch_save_s * 1e3:.1f}" if torch_save_s is not None else "-",
        f"{torch_save_s / save.blocked_s:.0f}x" if torch_save_s is not None and save.blocked_s else "-",
    ]


def plot_step_times(log: RunLog, path: Path) -> None:
    """Milliseconds of every step, the steps with a save and those with a torch.save marked."""
    figure, axes = plt.subplots(figsize=(10, 4), layout="constrained")
    times_ms = {step: seconds * 1e3 for step, seconds in log.step_s.items()}
    axes.plot(list(times_ms), list(times_ms.values()), color="0.6", linewidth=1, label="step", zorder=1)
    marks = (
        ("with asyncckpt's save()", [save.step for save in log.saves], "tab:green", "o"),
        ("with torch.save + fsync", list(log.torch_save_s), "tab:red", "x"),
    )
    for label, steps, color, marker in marks:
        axes.scatter(steps, [times_ms[step] for step in steps], color=color, marker=marker, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    axes.set_title("Time of each training step")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
