"""Plots the evaluations of several models: the loss by letter and by position in the protein."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megatron.files import replacing
from megatron.infer.evaluation.tally import bin_names

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")


def draw(reports: Mapping[str, Mapping[str, Any]], title: str, path: Path) -> None:
    """Write the plot of the reports on one corpus (see `TargetTally.report`), by model name, to `path`.

    The baselines are those of the first report that has them.
    """
    figure = Figure(figsize=(10, 8), dpi=120, layout="constrained")
    letters, positions = figure.subplots(2, 1)
    first = next(iter(reports.values()))
    by_share = sorted(first["by_letter"], key=lambda name: -first["by_letter"][name]["targets"])
    _bars(letters, reports, "by_letter", by_share, "residue, the most frequent first")
    _bars(positions, reports, "by_position", [name for name in bin_names() if name in first["by_position"]],
          "number of the residue in its protein")
    letters.set_title(title)
    figure.legend(*letters.get_legend_handles_labels(), loc="outside upper center", fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _bars(panel: Any, reports: Mapping[str, Mapping[str, Any]], what: str, names: Sequence[str], label: str) -> None:
    """One group of bars per name with one bar per model; the mean losses and the baselines are lines."""
    width = 0.8 / len(reports)
    for number, (model, report) in enumerate(reports.items()):
        losses = [report[what].get(name, {}).get("loss", np.nan) for name in names]
        colour = COLOURS[number % len(COLOURS)]
        panel.bar(np.arange(len(names)) - 0.4 + (number + 0.5) * width, losses, width, color=colour,
                  label=f"{model}: {report['loss']:.4f} nats, {report['accuracy']:.1%} right")
        panel.axhline(report["loss"], color=colour, linewidth=0.8, linestyle="--")
    baselines = next((report for report in reports.values() if "letters_and_visible" in report), {})
    for name, words, style in (("letters_alone", "letter frequencies", "-."),
                               ("letters_and_visible", "letter frequencies and visible letters", ":")):
        if name in baselines:
            panel.axhline(baselines[name], color="black", linewidth=1, linestyle=style,
                          label=f"{words}: {baselines[name]:.4f} nats")
    panel.set_xticks(range(len(names)), names)
    panel.set_xlabel(label)
    panel.set_ylabel("loss (nats a masked residue)")
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
