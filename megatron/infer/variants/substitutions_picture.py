"""One picture of all substitutions of a protein: a heat map of positions and amino acids, in several lines."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from megatron.data.corpus.vocab import AMINO_ACIDS
from megatron.files import replacing

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402 (the backend is chosen first: there may be no display)

# Amino acids by what their side chains are like, from above, with a line between the groups.
GROUPS = {"special": "GP", "aliphatic": "AVILM", "aromatic": "FYW", "polar": "STNQCH", "negative": "DE",
          "positive": "KR"}
LETTERS = "".join(GROUPS.values())
A_LINE, MOST_LINES = 100, 30  # positions of a line, and more where there would be too many lines
_CELL_INCHES = 0.135
_SHARE_IN_RANGE = 99.0  # per cent of the scores that the colours tell apart


def draw_substitutions(wild_type: str, scores: np.ndarray, offset: int, title: str, path: Path) -> None:
    """Write the picture of scores [residues, 20], in the order of AMINO_ACIDS, to `path` as PNG.

    Blue is likelier than the wild type, red less; white is the wild type's own, which a dot marks. Below each line
    stands the mean of a position.
    """
    limit = float(np.percentile(np.abs(scores), _SHARE_IN_RANGE)) or 1.0
    ordered = scores[:, [AMINO_ACIDS.index(letter) for letter in LETTERS]]
    num_lines = min(-(-len(wild_type) // A_LINE), MOST_LINES)
    width = -(-len(wild_type) // num_lines)
    figure, panels = pyplot.subplots(
        2 * num_lines, 1, squeeze=False, dpi=160, layout="constrained",
        figsize=(max(6.0, _CELL_INCHES * width + 2.2), num_lines * (_CELL_INCHES * 22 + 0.9) + 0.9),
        height_ratios=[len(LETTERS), 1.3] * num_lines)
    for line, (panel, strip) in enumerate(panels.reshape(-1, 2)):
        part = slice(line * width, (line + 1) * width)
        image = _draw_line(panel, strip, wild_type[part], ordered[part], offset + part.start, width, limit)
    panels[-1, 0].set_xlabel("residue number")
    figure.suptitle(title)
    bar = figure.colorbar(image, ax=panels[:, 0], extend="both", shrink=min(1.0, 0.9 if num_lines == 1 else 0.5),
                          aspect=30, pad=0.01)
    bar.set_label("log p(substitution) − log p(wild type)   (• wild type)")
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")
    finally:
        pyplot.close(figure)


def _draw_line(panel: Any, strip: Any, wild_type: str, scores: np.ndarray, first: int, width: int, limit: float
               ) -> Any:
    """One line of `width` positions, of which the last line has fewer, and below it their means; the image."""
    colours = {"cmap": "RdBu", "vmin": -limit, "vmax": limit, "aspect": "auto", "interpolation": "nearest"}
    extent = (first - 0.5, first - 0.5 + len(wild_type))
    image = panel.imshow(scores.T, extent=(*extent, len(LETTERS) - 0.5, -0.5), **colours)
    at = [(number, LETTERS.index(letter)) for number, letter in enumerate(wild_type, first) if letter in LETTERS]
    panel.scatter(*zip(*at, strict=True), s=5, color="black", linewidths=0)
    panel.set_yticks(range(len(LETTERS)), LETTERS, fontsize=7, family="monospace")
    ends = np.cumsum([len(letters) for letters in GROUPS.values()])
    for end in ends[:-1]:
        panel.axhline(end - 0.5, color="black", linewidth=0.4)
    names = panel.secondary_yaxis("right")
    names.set_yticks([end - len(letters) / 2 - 0.5 for end, letters in zip(ends, GROUPS.values(), strict=True)],
                     list(GROUPS), fontsize=6)
    names.tick_params(length=0, pad=2)
    means = scores.sum(1) / (len(LETTERS) - 1)
    strip.imshow(means[None], extent=(*extent, 0.5, -0.5), **colours)
    strip.set_yticks([0], ["mean"], fontsize=7)
    top = panel.secondary_xaxis("top")
    top.set_xticks(range(first, first + len(wild_type)), wild_type, fontsize=6, family="monospace")
    top.tick_params(length=0, pad=1)
    panel.set_xticks([])
    tens = [number for number in range(first, first + len(wild_type)) if number % 10 == 0]
    strip.set_xticks(tens if len(tens) > 1 else [first, first + len(wild_type) - 1])
    strip.tick_params(axis="x", labelsize=7)
    for each in (panel, strip):
        each.set_xlim(first - 0.5, first - 0.5 + width)
        each.tick_params(axis="y", length=0)
        for spine in each.spines.values():
            spine.set_linewidth(0.5)
    return image
