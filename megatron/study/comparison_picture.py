"""Draws the losses of several runs over steps, residues, seconds and FLOPs, and marks where they reach a given loss."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from megatron.files import replacing
from megatron.study.curves import AXES, Curve

# The palette of Okabe and Ito, safe for the colour-blind (doi 10.1038/nmeth.1618), without yellow; then line styles.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", ":", "-.")
LABELS = {"steps": "steps", "residues": "residues read in training", "flops": "model FLOPs of training"}
UNITS = (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
LOG_FROM = 4  # an axis is logarithmic if the longest run is this many times as long as the shortest


def draw_comparison(curves: Mapping[str, Curve], behind: Mapping[str, Curve], loss: float, ylabel: str,
                    path: Path) -> None:
    """Write the picture of `curves` (by name) to `path`, with the curves of `behind` thin in the same colours.

    `loss`: the one to mark where a curve reaches it.
    """
    figure = Figure(figsize=(12, 8.5), dpi=120, layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    lowest, highest = _limits(list(curves.values()), loss)
    panels[0, 0].set_ylim(lowest, highest)
    for axis, panel in zip(AXES, panels.flat, strict=True):
        with_it = {name: curve for name, curve in curves.items() if axis in curve.axes}
        _draw_panel(panel, axis, with_it, {name: curve for name, curve in behind.items() if name in with_it}, loss,
                    highest, list(curves))
    for panel in panels[:, 0]:
        panel.set_ylabel(ylabel)
    lines = [Line2D([], [], **_style(index), label=name) for index, name in enumerate(curves)]
    widest = max(map(len, curves))
    figure.legend(handles=lines, loc="outside upper center", ncols=max(1, min(len(lines), 4, 130 // (widest + 8))))
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or "png")


def _draw_panel(panel: Any, axis: str, curves: Mapping[str, Curve], behind: Mapping[str, Curve], loss: float,
                highest: float, names: list[str]) -> None:
    """Draw one panel, with `axis` as its x; `names`: of all curves, which determine the colours."""
    panel.grid(alpha=0.3)
    if not curves:
        panel.text(0.5, 0.5, f"no run recorded its {axis}", transform=panel.transAxes, ha="center")
        return
    ends = [curve.axes[axis][-1] for curve in curves.values()]
    unit, scale = next(((unit, scale) for unit, scale in UNITS if max(ends) >= 2 * scale), UNITS[-1])
    if axis != "seconds":
        scale = 1
    panel.set_xlabel(LABELS.get(axis, f"time of training ({unit}), without evaluation and saving"))
    if max(ends) >= LOG_FROM * min(ends) > 0:
        seen = [point[axis] for curve in curves.values() if (point := curve.reached(highest)) and point[axis] > 0]
        panel.set(xscale="log", xlim=(0.9 * min(seen, default=min(ends)) / scale, 1.1 * max(ends) / scale))
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        panel.set_xlim(0, 1.03 * (max(ends) or 1) / scale)
    panel.xaxis.set_major_formatter(EngFormatter(sep=" ") if axis != "seconds" else "{x:g}")
    panel.axhline(loss, color="gray", linewidth=0.8, linestyle=(0, (1, 3)))
    for name, curve in curves.items():
        style, x = _style(names.index(name)), curve.axes[axis] / scale
        if name in behind and axis in behind[name].axes:
            panel.plot(behind[name].axes[axis] / scale, behind[name].losses, color=style["color"], linewidth=0.7,
                       alpha=0.6)
        panel.plot(x, curve.losses, **style, marker="o" if len(x) <= 40 else None, markersize=3)
        if curve.spread is not None:
            panel.fill_between(x, curve.losses - curve.spread, curve.losses + curve.spread, color=style["color"],
                               alpha=0.2, linewidth=0)
        if (point := curve.reached(loss)) is not None:
            panel.plot(point[axis] / scale, min(loss, curve.losses[0]), marker="D", markersize=7,
                       color=style["color"], markerfacecolor="white")


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": LINES[index // len(COLOURS) % len(LINES)]}


def _limits(curves: list[Curve], loss: float) -> tuple[float, float]:
    """The range of losses to show: such that the second half of a typical run fills at most a quarter of the height.

    The high losses of the first steps are cut off, since they would flatten the rest.
    """
    lowest = min(loss, *(curve.losses.min() for curve in curves))
    halfway = np.median([np.interp(0.5 * curve.axes["steps"][-1], curve.axes["steps"], curve.losses)
                         for curve in curves])
    highest = max(loss, *(curve.losses.max() for curve in curves))
    room = min(max(4 * (halfway - lowest), 1.5 * (loss - lowest)), 1.05 * (highest - lowest)) or 0.01
    return lowest - 0.05 * room, lowest + room
