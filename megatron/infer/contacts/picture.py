"""Draws a protein's contact map: the model's prediction above the diagonal, the structure's contacts below.

Shapes: r residues of a protein.
"""

from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure

from megatron.files import replacing
from megatron.infer.contacts.chains import CUTOFF_ANGSTROM, LEAST_SEPARATION, Chain

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#E4E4E4"  # Okabe and Ito's palette, safe for the colour-blind
INCHES, DPI = 6.2, 160


def draw_contacts(path: Path, title: str, scores_rr: np.ndarray, are_probabilities: bool, truth: Chain | None) -> None:
    """Write the contact map of one protein as PNG to `path`.

    Below the diagonal, the structure's pairs with an unresolved residue are grey. Pairs closer than LEAST_SEPARATION in
    the sequence are left out on both sides. Without a structure both sides show the prediction.
    """
    size = len(scores_rr)
    row, column = np.indices((size, size))
    is_told = (abs(column - row) >= LEAST_SEPARATION) & ((column > row) | (truth is None))
    highest = 1.0 if are_probabilities else max(float(np.quantile(scores_rr[is_told], 0.998)) if is_told.any() else 0,
                                                1e-9)
    figure = Figure(figsize=(INCHES, INCHES), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    extent = (0.5, size + 0.5, size + 0.5, 0.5)  # residues are numbered from 1
    image = axes.imshow(np.where(is_told, scores_rr, np.nan), cmap=LinearSegmentedColormap.from_list(
        "told", ["white", BLUE]), vmin=0, vmax=highest, extent=extent, interpolation="nearest")
    if truth is not None:
        below = _below(truth, row, column)
        axes.imshow(np.ma.masked_less(below, 0), cmap=ListedColormap(["white", GREY, ORANGE]), vmin=0, vmax=2,
                    extent=extent, interpolation="nearest")
        axes.text(0.98, 0.98, "predicted", transform=axes.transAxes, ha="right", va="top", color=BLUE)
        label = f"structure: < {CUTOFF_ANGSTROM:g} Å{' (grey: unresolved)' if (below == 1).any() else ''}"
        axes.text(0.02, 0.02, label, transform=axes.transAxes, color=ORANGE)
    axes.plot([0.5, size + 0.5], [0.5, size + 0.5], color="black", linewidth=0.6)
    axes.set(xlabel="residue", ylabel="residue")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02,
                    label="probability of a contact" if are_probabilities else "score of the Jacobian")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _below(truth: Chain, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """What to draw below the diagonal: 2 contact, 1 unresolved pair, 0 no contact; -1 for all that is not drawn."""
    atoms_r3 = truth.atoms_r3.numpy()
    distance_rr = np.linalg.norm(atoms_r3[:, None] - atoms_r3[None], axis=2)
    kind = np.where(np.isnan(distance_rr), 1, np.where(distance_rr < CUTOFF_ANGSTROM, 2, 0))
    return np.where(row - column >= LEAST_SEPARATION, kind, -1)
