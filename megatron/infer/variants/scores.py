"""Scores of variants by a masked language model: higher is likelier to work. Shapes: v tokens of the vocabulary.

- masked-marginals: over the substituted sites, the sum of log p(mutant) - log p(wild type), where the wild type is seen
  with that site alone masked. A site is computed once for all variants.
- wt-marginals: the same, nothing masked: one pass for a protein, or for each of its windows.
- pseudo-ppl: over all residues of the mutated protein, the sum of their log p, each masked in turn. Only the 20
  standard amino acids count: an X elsewhere is seen, but not scored.

Meier et al. 2021, doi 10.1101/2021.07.09.450648. The last is by the definition: ESM's own `predict.py` leaves both ends
out and takes at each masked place the probability of the residue behind it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from megatron.data.corpus.vocab import AMINO_ACIDS
from megatron.infer.predictions import copy_of, log_probabilities
from megatron.infer.pretrained import Pretrained
from megatron.infer.variants.mutants import Mutant, has_score, mutated, standard_sites
from megatron.infer.windows import window_around
from megatron.parallel.collectives import all_gather_in_turn

MASKED, WILD_TYPE, PSEUDO = "masked-marginals", "wt-marginals", "pseudo-ppl"
SCORINGS = (MASKED, WILD_TYPE, PSEUDO)
MARGINALS = (MASKED, WILD_TYPE)

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Way:
    """How to score: one of SCORINGS, the most residues in a window (None: whole proteins), the number of the first
    residue, the name of the score column.

    `budget`: tokens in a row; None for as many as memory allows. `skips`: leave out variants that do not fit their
    protein.
    """

    scoring: str
    longest: int | None = None
    offset: int = 1
    column: str = "score"
    budget: int | None = None
    skips: bool = False


def scores_of(pretrained: Pretrained, way: Way, wild_type: str, mutants: Sequence[Mutant],
              progress: Progress = lambda copies: None) -> np.ndarray:
    """The score of each mutant, fp64 [mutants]; nan for a mutant for which `has_score` is False.

    `progress` as in `log_probabilities`; it counts this rank's share. Data ranks divide the work; all ranks must call
    this together, and each gets the same result.
    """
    distinct = list(dict.fromkeys(filter(has_score, mutants)))
    score = _pseudo_likelihoods if way.scoring == PSEUDO else _marginals
    found = score(pretrained, way, wild_type, distinct, progress) if distinct else ()
    of_mutant = dict(zip(distinct, found, strict=True))
    return np.array([of_mutant.get(mutant, np.nan) for mutant in mutants])


def all_substitutions(pretrained: Pretrained, way: Way, wild_type: str, progress: Progress = lambda copies: None
                      ) -> np.ndarray:
    """The score of each amino acid at each residue, fp32 [residues, 20] in the order of AMINO_ACIDS, by one of
    MARGINALS; the wild type's is 0.

    A residue that is not one of these (such as X) has nan in its whole row; at least one residue must be. All ranks
    must call this together, and each gets the same result.
    """
    sites, ids = standard_sites(wild_type), pretrained.vocab.ids
    table = _site_table(pretrained, way, wild_type, sites, progress)
    there = table[np.arange(len(sites)), [ids[wild_type[site]] for site in sites]]
    scores = np.full((len(wild_type), len(AMINO_ACIDS)), np.nan, np.float32)
    scores[sites] = table[:, [ids[letter] for letter in AMINO_ACIDS]] - there[:, None]
    return scores


def num_copies(way: Way, wild_type: str, mutants: Sequence[Mutant]) -> int:
    """How many copies of a protein all ranks together compute in `scores_of`."""
    distinct = set(filter(has_score, mutants))
    if way.scoring == PSEUDO:
        return len(distinct) * len(standard_sites(wild_type))
    return len(together(way, sites_of(distinct), len(wild_type)))


def sites_of(mutants: Iterable[Mutant]) -> list[int]:
    """All sites that any of the mutants substitutes, ascending, from 0."""
    return sorted({one.site for mutant in mutants for one in mutant})


def together(way: Way, sites: Sequence[int], num_residues: int) -> list[list[int]]:
    """Groups of sites that are computed in one copy of the protein: single sites if they are masked, else all that
    share a window.
    """
    if way.scoring == MASKED:
        return [[site] for site in sites]
    return [list(group) for _, group in groupby(sites, lambda site: window_around(site, num_residues, way.longest))]


def _site_table(pretrained: Pretrained, way: Way, wild_type: str, sites: Sequence[int], progress: Progress
                ) -> np.ndarray:
    """The log-probabilities of all tokens at sites of a protein, in ascending order, fp32 [sites, v]."""
    residues, axis = _ids(pretrained, wild_type), pretrained.mesh.data
    copies = (copy_of(pretrained, residues, group, way.longest, way.scoring == MASKED)
              for group in together(way, sites, len(residues))[axis.rank::axis.size])
    found = log_probabilities(pretrained, copies, way.budget, progress)
    return np.concatenate(all_gather_in_turn(list(found), axis))


def _marginals(pretrained: Pretrained, way: Way, wild_type: str, mutants: Sequence[Mutant], progress: Progress
               ) -> list[float]:
    sites = sites_of(mutants)
    table = _site_table(pretrained, way, wild_type, sites, progress)
    row, ids = {site: row for row, site in enumerate(sites)}, pretrained.vocab.ids
    return [sum(float(table[row[one.site], ids[one.mutant]]) - float(table[row[one.site], ids[one.wild]])
                for one in mutant) for mutant in mutants]


def _pseudo_likelihoods(pretrained: Pretrained, way: Way, wild_type: str, mutants: Sequence[Mutant],
                        progress: Progress) -> list[float]:
    axis, sites = pretrained.mesh.data, standard_sites(wild_type)
    mine = [_ids(pretrained, mutated(wild_type, mutant)) for mutant in mutants[axis.rank::axis.size]]
    copies = (copy_of(pretrained, residues, [site], way.longest, is_masked=True) for residues in mine for site in sites)
    found = log_probabilities(pretrained, copies, way.budget, progress)
    sums = [sum(float(next(found)[0, residue]) for residue in residues[sites]) for residues in mine]
    return all_gather_in_turn(sums, axis)


def _ids(pretrained: Pretrained, protein: str) -> np.ndarray:
    return np.array([pretrained.vocab.ids[letter] for letter in protein])
