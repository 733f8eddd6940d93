"""A heat map of all substitutions of a protein: positions by amino acids, on several lines."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from megatron.data.corpus.vocab import AMINO_ACIDS
from megatron.files import replacing

# Amino acids by what their side chains are like, from above, with a line between the groups.
GROUPS = {"special": "GP", "aliphatic": "AVILM", "aromatic": "FYW", "polar": "STNQCH", "negative": "DE",
          "positive": "KR"}
LETTERS = "".join(GROUPS.values())
A_LINE, MOST_LINES = 100, 30  # positions of a line, and more where there would be too many lines
_GREY = "0.75"  # what has no score
_SHARE_IN_RANGE = 99.0  # per cent of the scores that the colours tell apart
# In inches: a cell, the margins of a figure, and of a line the strip below it and what is around both.
_CELL, _LEFT, _RIGHT, _TOP, _BOTTOM = 0.135, 0.55, 1.75, 0.5, 0.3
_LETTERS_ABOVE, _GAP, _STRIP, _NUMBERS = 0.22, 0.05, 0.15, 0.28
_LINE = _LETTERS_ABOVE + 20 * _CELL + _GAP + _STRIP + _NUMBERS


def draw_substitutions(wild_type: str, scores: np.ndarray, offset: int, title: str, path: Path) -> None:
    """Write the heat map of scores [residues, 20], in the order of AMINO_ACIDS, to `path` as PNG.

    Blue is likelier than the wild type, red less likely; the wild type itself is white with a dot. Positions whose
    scores are nan are grey and do not affect the range of colours. Below each line is the mean over a position's
    substitutions.
    """
    limit = float(np.nanpercentile(np.abs(scores), _SHARE_IN_RANGE)) or 1.0
    ordered = scores[:, [AMINO_ACIDS.index(letter) for letter in LETTERS]]
    num_lines = min(-(-len(wild_type) // A_LINE), MOST_LINES)
    width = -(-len(wild_type) // num_lines)
    across, down = max(_CELL * width, 3.0), _TOP + num_lines * _LINE + _BOTTOM
    figure = Figure(figsize=(_LEFT + across + _RIGHT, down), dpi=160)

    def place(x: float, y: float, wide: float, high: float) -> Any:
        """Axes whose upper left corner lies there, in inches from that of the figure."""
        whole = _LEFT + across + _RIGHT
        return figure.add_axes((x / whole, 1 - (y + high) / down, wide / whole, high / down))

    for line in range(num_lines):
        part, top = slice(line * width, (line + 1) * width), _TOP + line * _LINE + _LETTERS_ABOVE
        wide = across * len(wild_type[part]) / width
        panel = place(_LEFT, top, wide, 20 * _CELL)
        strip = place(_LEFT, top + 20 * _CELL + _GAP, wide, _STRIP)
        image = _draw_line(panel, strip, wild_type[part], ordered[part], offset + part.start, limit)
    strip.set_xlabel("residue number", fontsize=8)
    left = _LEFT / (_LEFT + across + _RIGHT)
    figure.text(left, 1 - 0.12 / down, f"{title}   (• wild type)", fontsize=11, va="top")
    if np.isnan(scores).any():
        figure.text(left, 1 - 0.36 / down, "grey: none of the 20 standard amino acids, no scores", fontsize=8, va="top")
    bar = figure.colorbar(image, cax=place(_LEFT + across + 0.8, _TOP + _LETTERS_ABOVE, 0.15, 20 * _CELL),
                          extend="both")
    bar.ax.tick_params(labelsize=7)
    bar.set_label("log p(substitution) − log p(wild type)", fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_line(panel: Any, strip: Any, wild_type: str, scores: np.ndarray, first: int, limit: float) -> Any:
    """Draw the positions of one line with their means below; returns the image of the positions."""
    colours = {"cmap": colormaps["RdBu"].with_extremes(bad=_GREY), "vmin": -limit, "vmax": limit, "aspect": "auto",
               "interpolation": "nearest"}
    numbers = range(first, first + len(wild_type))
    extent = (first - 0.5, first - 0.5 + len(wild_type))
    image = panel.imshow(scores.T, extent=(*extent, len(LETTERS) - 0.5, -0.5), **colours)
    strip.imshow(scores.sum(1)[None] / (len(LETTERS) - 1), extent=(*extent, 0.5, -0.5), **colours)
    known = [(number, LETTERS.index(letter)) for number, letter in zip(numbers, wild_type, strict=True)
             if letter in LETTERS]
    panel.scatter([number for number, _ in known], [row for _, row in known], s=5, color="black", linewidths=0)
    for number, letter in zip(numbers, wild_type, strict=True):
        panel.text(number, -0.8, letter, fontsize=6, family="monospace", ha="center")
    ends = np.cumsum([len(letters) for letters in GROUPS.values()])
    for (name, letters), end in zip(GROUPS.items(), ends, strict=True):
        panel.text(extent[1] + 0.4, end - len(letters) / 2 - 0.5, name, fontsize=6, va="center")
        panel.axhline(end - 0.5, color="black", linewidth=0.4)
    panel.set_xticks([])
    panel.set_yticks(range(len(LETTERS)), LETTERS, fontsize=7, family="monospace")
    strip.set_yticks([0], ["mean"], fontsize=7)
    tens = [number for number in numbers if number % 10 == 0]
    strip.set_xticks(tens if len(tens) > 1 else [*{numbers[0], numbers[-1]}])
    strip.tick_params(axis="x", labelsize=7)
    for each in (panel, strip):
        each.set_xlim(*extent)
        each.tick_params(axis="y", length=0)
        for spine in each.spines.values():
            spine.set_linewidth(0.5)
    return image
