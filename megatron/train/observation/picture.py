"""One picture of a run: training and validation loss over iterations, with the letter-frequency baselines."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from megatron.checkpoint.metrics import evaluations_of, read_records
from megatron.checkpoint.places import LOSSES
from megatron.data.rows.baselines import Baselines
from megatron.files import replacing


def draw_losses(metrics: Path, baselines: Baselines | None) -> Path:
    """Draw the records of `metrics` to `loss.png` beside it and return its path."""
    records = [record for record in read_records(metrics)
               if isinstance(record.get("loss"), float) and math.isfinite(record["loss"])]
    figure = Figure(figsize=(8, 5), dpi=150)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.1, top=0.94)
    drawn: list[float] = []
    ends: list[float] = []  # the last loss of each curve
    for kind, label, style in (("train", "training", {"linewidth": 1.0, "alpha": 0.8}),
                               ("valid", "validation", {"marker": "o", "markersize": 4}),
                               ("valid_ema", "validation of the average", {"marker": "s", "markersize": 4})):
        found, num_others = evaluations_of(records, kind)
        points = {record["iteration"]: record["loss"] for record in found}
        if points:
            drawn += points.values()
            ends.append(drawn[-1])
            others = f"; {num_others} on other data left out" if num_others else ""
            [curve] = axes.plot(list(points), list(points.values()), label=f"{label} ({drawn[-1]:.4f}{others})",
                                **style)
            if kind == "train" and len(points) == 1:  # a line needs two points
                curve.set_marker("o")
    if baselines is not None:
        axes.axhline(baselines.letters, color="gray", linestyle="--",
                     label=f"letter frequencies ({baselines.letters:.4f})")
        axes.axhline(baselines.visible, color="gray", linestyle=":",
                     label=f"letter frequencies and visible letters ({baselines.visible:.4f})")
        # The first steps are near ln(vocabulary): cut off, so that the interesting part fills the picture. A curve that
        # ends up there is shown.
        highest, cut = max([*drawn, baselines.letters]) + 0.02, baselines.letters + 0.35
        axes.set_ylim(min([*drawn, baselines.visible]) - 0.02,
                      highest if max(ends, default=0.0) > cut else min(highest, cut))
    axes.set_xlabel("iteration")
    axes.set_ylabel("masked residue loss (nats)")
    axes.set_title("Protein masked language model")
    axes.grid(alpha=0.3)
    axes.legend()
    path = metrics.with_name(LOSSES)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
