"""All substitutions of one protein as a table, and its file."""

from pathlib import Path

import numpy as np

from megatron.data.corpus.vocab import AMINO_ACIDS
from megatron.infer.pretrained import Pretrained
from megatron.infer.variants.scores import Progress, site_table
from megatron.infer.variants.tables import write_csv


def all_substitutions(pretrained: Pretrained, scoring: str, wild_type: str, longest: int | None,
                      budget: int | None = None, progress: Progress = lambda copies: None) -> np.ndarray:
    """The score of each amino acid at each residue, fp32 [residues, 20] in the order of AMINO_ACIDS, 0 the wild type's.

    The arguments as those of `scores_of`; ranks call this together and get the same.
    """
    table = site_table(pretrained, scoring, wild_type, range(len(wild_type)), longest, budget, progress)
    ids = pretrained.vocab.ids
    there = table[np.arange(len(wild_type)), [ids[letter] for letter in wild_type]]
    return table[:, [ids[letter] for letter in AMINO_ACIDS]] - there[:, None]


def write_substitutions(path: Path, wild_type: str, scores: np.ndarray, offset: int = 1) -> None:
    """A CSV with a line for each residue: its number, its letter, and the score of each amino acid there."""
    write_csv(path, ["position", "wild_type", *AMINO_ACIDS],
              ([str(number), letter, *(f"{score:.6f}" for score in row)]
               for number, (letter, row) in enumerate(zip(wild_type, scores, strict=True), offset)))
