"""The table of all substitutions of one protein, and its CSV."""

from pathlib import Path

import numpy as np

from megatron.data.corpus.vocab import AMINO_ACIDS
from megatron.infer.pretrained import Pretrained
from megatron.infer.variants.mutants import standard_sites
from megatron.infer.variants.scores import Progress, site_table
from megatron.infer.variants.tables import write_csv


def all_substitutions(pretrained: Pretrained, scoring: str, wild_type: str, longest: int | None,
                      budget: int | None = None, progress: Progress = lambda copies: None) -> np.ndarray:
    """The score of each amino acid at each residue, fp32 [residues, 20] in the order of AMINO_ACIDS; the wild type's is
    0.

    A residue that is not one of these (such as X) has nan in its whole row; at least one residue must be. Arguments as
    in `scores_of`; all ranks must call this together, and each gets the same result.
    """
    sites, ids = standard_sites(wild_type), pretrained.vocab.ids
    table = site_table(pretrained, scoring, wild_type, sites, longest, budget, progress)
    there = table[np.arange(len(sites)), [ids[wild_type[site]] for site in sites]]
    scores = np.full((len(wild_type), len(AMINO_ACIDS)), np.nan, np.float32)
    scores[sites] = table[:, [ids[letter] for letter in AMINO_ACIDS]] - there[:, None]
    return scores


def write_substitutions(path: Path, wild_type: str, scores: np.ndarray, offset: int = 1) -> None:
    """Write a CSV with a line for each residue: its number, its letter and the score of each amino acid, empty where it
    is nan.
    """
    write_csv(path, ["position", "wild_type", *AMINO_ACIDS],
              ([str(number), letter, *("" if np.isnan(score) else f"{score:.6f}" for score in row)]
               for number, (letter, row) in enumerate(zip(wild_type, scores, strict=True), offset)))
