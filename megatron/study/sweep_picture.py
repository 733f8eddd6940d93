"""Draws a sweep: the loss over each varied flag, or a map for two flags."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from megatron.files import replacing
from megatron.study.outcome import Outcome, tried
from megatron.study.settings import is_number

COLOUR, STOPPED_COLOUR = "#0072B2", "#D55E00"
LOG_FROM = 4  # an axis is logarithmic if the largest value is this many times the smallest


def draw_sweep(found: Sequence[Outcome], ylabel: str, path: Path) -> None:
    """Write the picture of the settings that have a loss to `path`; `ylabel`: what the loss is called."""
    found = [one for one in found if one.losses]
    values = {name: those for name, those in tried(found).items() if len(those) > 1} or tried(found)
    if len(values) == 2:
        figure = Figure(figsize=(8, 5.5), dpi=120, layout="constrained")
        _draw_map(figure, figure.subplots(), found, values, ylabel)
    else:
        width = min(len(values), 2 if len(values) == 4 else 3)
        height = -(-len(values) // width)
        figure = Figure(figsize=(max(8, 4.5 * width), 5 * height), dpi=120, layout="constrained")
        panels = figure.subplots(height, width, squeeze=False, sharey=True)
        for panel in panels.flat[len(values):]:
            panel.remove()
        for (name, those), panel in zip(values.items(), panels.flat, strict=False):
            _draw_flag(panel, found, name, those)
        for panel in panels[:, 0]:
            panel.set_ylabel(ylabel)
        _explain(figure, found)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_flag(panel: Any, found: Sequence[Outcome], name: str, values: Sequence[str]) -> None:
    """Draw the loss over one flag: every setting (at the upper edge if it is above), and the best of each value."""
    is_scale = all(map(is_number, values))
    at = [float(value) for value in values] if is_scale else list(range(len(values)))
    place = dict(zip(values, at, strict=True))
    if not is_scale:
        panel.set_xlim(-0.5, len(values) - 0.5)
    elif at[0] > 0 and at[-1] >= LOG_FROM * at[0]:
        panel.set_xscale("log")
    panel.set_xticks(at, values)
    panel.xaxis.set_minor_locator(NullLocator())
    lowest, highest = _limits(found)
    panel.set_ylim(lowest, highest)
    best = {value: min(means) for value in values
            if (means := [one.mean for one in found if one.is_finished and one.values[name] == value])}
    panel.plot([place[value] for value in best], list(best.values()), color=COLOUR, linewidth=1.2,
               linestyle="-" if is_scale else "", marker="o", markersize=7)
    for one in found:
        x, colour = place[one.values[name]], COLOUR if one.is_finished else STOPPED_COLOUR
        marker = "o" if one.is_finished else "x"
        if one.mean > highest:
            panel.plot(x, highest, marker="^", color=colour, clip_on=False)
            panel.annotate(f"{one.mean:.3g}", (x, highest), (0, 5), textcoords="offset points", ha="center", fontsize=8)
        else:
            panel.errorbar(x, one.mean, one.spread, color=colour, fmt=marker, capsize=3, markersize=5,
                           markerfacecolor="none")
    panel.set_xlabel(f"--{name}")
    panel.grid(alpha=0.3)


def _explain(figure: Any, found: Sequence[Outcome]) -> None:
    """Draw the legend of all panels, above them."""
    seeds = " (mean and sd of seeds)" if any(one.spread is not None for one in found) else ""
    lines: list[tuple[str, dict[str, Any]]] = [
        ("best of each value", {"color": COLOUR, "marker": "o", "markersize": 7}),
        (f"a setting{seeds}", {"color": COLOUR, "marker": "o", "linestyle": "", "markerfacecolor": "none"}),
        ("stopped before its end", {"color": STOPPED_COLOUR, "marker": "x", "linestyle": ""})]
    lines = lines[:2] if all(one.is_finished for one in found) else lines
    figure.legend(handles=[Line2D([], [], label=label, **style) for label, style in lines],
                  loc="outside upper center", ncols=len(lines))


def _limits(found: Sequence[Outcome]) -> tuple[float, float]:
    """The range of losses to show: the better half fills a third, since diverged settings would flatten the rest."""
    means = sorted(one.mean for one in found)
    spread = max(one.spread or 0.0 for one in found[:1])
    room = min(3 * (float(np.median(means)) - means[0]) or np.inf, means[-1] - means[0]) + 2 * spread or 0.01
    return means[0] - 0.08 * room - spread, means[0] + 1.08 * room


def _draw_map(figure: Any, panel: Any, found: Sequence[Outcome], values: dict[str, list[str]], label: str) -> None:
    """Draw the mean loss for each pair of values, as colour and number; in brackets if the setting was stopped."""
    (down, rows), (across, columns) = values.items()
    cells = np.full((len(rows), len(columns)), np.nan)
    best: dict[tuple[int, int], Outcome] = {}
    for one in reversed(found):  # the best last, as several settings may share a cell
        place = rows.index(one.values[down]), columns.index(one.values[across])
        cells[place], best[place] = one.mean, one
    image = panel.imshow(cells, cmap="cividis_r", aspect="auto", origin="lower", vmin=_limits(found)[0],
                         vmax=_limits(found)[1])
    middle = np.interp(0.6, (0, 1), _limits(found))
    for (row, column), one in best.items():
        text = f"{one.mean:.4f}" + ("" if one.spread is None else f"\n± {one.spread:.4f}")
        panel.text(column, row, text if one.is_finished else f"({text})", ha="center", va="center",
                   color="black" if one.mean < middle else "white", fontweight="bold" if one is found[0] else "normal")
    panel.set_yticks(range(len(rows)), rows)
    panel.set_xticks(range(len(columns)), columns)
    panel.set(ylabel=f"--{down}", xlabel=f"--{across}")
    figure.colorbar(image, label=label)
    if not all(one.is_finished for one in found):
        panel.set_title("in brackets: where it was stopped", fontsize=9)
