"""The results as pictures: SVG, the same bytes for the same results.

Drawn without pyplot, which would ask for a display and keep what it drew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import cycle
from math import floor, log10
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

_GIB = 1 << 30
_STYLE: Any = {
    "svg.hashsalt": "asyncckpt",  # else names inside the file are random
    "svg.fonttype": "none",  # text stays text
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
}
_OURS = "#000000"
_PEERS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#17becf")
_MARKS = "os^vDPX*<"


def draw(documents: Mapping[str, dict[str, Any]], directory: Path) -> None:
    """Write the picture of each document that has one."""
    for name, picture in PICTURES.items():
        if name in documents:
            directory.mkdir(parents=True, exist_ok=True)
            with mpl.rc_context(_STYLE):
                figure = picture(documents[name])
                # Neither when nor by which version.
                figure.savefig(
                    directory / f"{name}.svg", format="svg", metadata={"Date": None, "Creator": None}
                )


def _stall(document: dict[str, Any]) -> Figure:
    summaries = document["summary"]
    figure, axes = _axes(height=0.6 + 0.3 * len(summaries))
    spreads = [one["blocked_s"] for one in summaries.values()]
    middles = [one["median"] * 1e3 for one in spreads]
    axes.barh(
        list(summaries),
        middles,
        xerr=[
            [middle - one["min"] * 1e3 for middle, one in zip(middles, spreads, strict=True)],
            [one["max"] * 1e3 - middle for middle, one in zip(middles, spreads, strict=True)],
        ],
        color=[_OURS if _is_ours(name) else _PEERS[0] for name in summaries],
        error_kw={"ecolor": "#999999", "capsize": 2},
    )
    axes.invert_yaxis()
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis)
    axes.set_xlim(left=10.0 ** floor(log10(min(one["min"] * 1e3 for one in spreads))))
    axes.set_xlabel("training blocked by a save beside the peers, ms (median; smallest to largest)")
    return figure


def _many_tensors(document: dict[str, Any]) -> Figure:
    figure, axes = _axes(height=4.0)
    peers = cycle(zip(_PEERS, _MARKS, strict=True))
    names = dict.fromkeys(name for size in document["sizes"] for name in size["summary"])
    for name in names:
        found = [size for size in document["sizes"] if name in size["summary"]]
        ours = _is_ours(name)
        color, mark = (_OURS, "o" if name == "asyncckpt" else "s") if ours else next(peers)
        axes.plot(
            [size["leaves"] for size in found],
            [size["summary"][name]["blocked_s"]["median"] * 1e3 for size in found],
            color=color,
            marker=mark,
            markersize=5,
            linewidth=2.5 if ours else 1.0,
            label=name,
        )
    axes.set_xscale("log")
    axes.set_xticks([size["leaves"] for size in document["sizes"]])
    _plain_ticks(axes.xaxis)
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis)
    axes.set_xlabel("tensors in the state")
    axes.set_ylabel("training blocked by a save beside the peers, ms (median)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _write(document: dict[str, Any]) -> Figure:
    return _speeds(
        document["config"]["nbytes"],
        {
            "raw write": [row["raw"]["seconds"] for row in document["rows"]],
            "asyncckpt, whole save": [row["ours_s"] for row in document["rows"]],
            "one buffered writer": [row["seconds"] for row in document["buffered_rows"]],
        },
    )


def _load(document: dict[str, Any]) -> Figure:
    return _speeds(
        document["config"]["nbytes"],
        {
            "raw read": [row["raw_s"] for row in document["rows"]],
            "asyncckpt, load()": [row["ours_s"] for row in document["rows"]],
            "dcp.load": [row["stock_s"] for row in document["stock_rows"]],
        },
    )


def _speeds(nbytes: int, seconds: Mapping[str, Iterable[float]]) -> Figure:
    """A dot for each measurement, a line at their median."""
    figure, axes = _axes(height=0.6 + 0.4 * len(seconds))
    for height, (name, measured) in enumerate(seconds.items()):
        speeds = [nbytes / one / _GIB for one in measured]
        color = _OURS if _is_ours(name) else _PEERS[0]
        axes.plot(speeds, [height] * len(speeds), "o", color=color, markersize=4, alpha=0.4)
        axes.plot([median(speeds)], [height], "|", color=color, markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(seconds)), list(seconds))
    axes.set_ylim(len(seconds) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("GiB/s (each measurement; median)")
    return figure


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.0, height), layout="constrained")
    return figure, figure.add_subplot()


def _plain_ticks(axis: Axis) -> None:
    """Of a logarithmic axis: 10, 100, 1,000 and not powers."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _is_ours(name: str) -> bool:
    return name.startswith("asyncckpt")


PICTURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "stall": _stall,
    "many_tensors": _many_tensors,
    "write": _write,
    "load": _load,
}
ALT = {
    "stall": "Bars: how long a save blocks training, by saver",
    "many_tensors": "Lines: how long a save blocks training, by saver, over the number of tensors",
    "write": "Dots: speed of whole saves beside raw and buffered writes",
    "load": "Dots: speed of loads beside raw reads and dcp.load",
}
