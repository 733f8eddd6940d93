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
from itertools import groupby

import numpy as np

from megatron.infer.predictions import copy_of, log_probabilities
from megatron.infer.pretrained import Pretrained
from megatron.infer.variants.mutants import Mutant, Variant, has_score, mutated, standard_sites
from megatron.infer.windows import window_around
from megatron.parallel.collectives import all_gather_in_turn

MASKED, WILD_TYPE, PSEUDO = "masked-marginals", "wt-marginals", "pseudo-ppl"
SCORINGS = (MASKED, WILD_TYPE, PSEUDO)
MARGINALS = (MASKED, WILD_TYPE)

Progress = Callable[[int], object]


def scores_of(pretrained: Pretrained, scoring: str, wild_type: str, variants: Sequence[Variant], longest: int | None,
              budget: int | None = None, progress: Progress = lambda copies: None) -> np.ndarray:
    """The score of each variant by one of SCORINGS, fp64 [variants]; nan for one for which `has_score` is False.

    Variants whose substitutions are not known can be scored by pseudo-ppl alone; the wild type is not used for them.
    `longest`: the most residues in a window, None for whole proteins. `budget` and `progress` as in
    `log_probabilities`; progress counts this rank's share. Data ranks divide the work; all ranks must call this
    together, and each gets the same result.
    """
    distinct = list(dict.fromkeys(filter(has_score, variants)))
    if scoring == PSEUDO:
        found = _pseudo_likelihoods(pretrained, wild_type, distinct, longest, budget, progress)
    else:
        mutants = [variant for variant in distinct if not isinstance(variant, str)]
        assert len(mutants) == len(distinct), "only pseudo-ppl scores proteins whose substitutions are not known"
        found = _marginals(pretrained, wild_type, mutants, longest, budget, progress, scoring)
    of_variant = dict(zip(distinct, found, strict=True))
    return np.array([of_variant.get(variant, np.nan) for variant in variants])


def site_table(pretrained: Pretrained, scoring: str, wild_type: str, sites: Sequence[int], longest: int | None,
               budget: int | None = None, progress: Progress = lambda copies: None) -> np.ndarray:
    """The log-probabilities of all tokens at sites of a protein, in ascending order, fp32 [sites, v], by one of
    MARGINALS.
    """
    residues, axis = _ids(pretrained, wild_type), pretrained.mesh.data
    copies = (copy_of(pretrained, residues, group, longest, scoring == MASKED)
              for group in together(scoring, sites, len(residues), longest)[axis.rank::axis.size])
    return np.concatenate(all_gather_in_turn(list(log_probabilities(pretrained, copies, budget, progress)), axis))


def num_copies(scoring: str, wild_type: str, variants: Sequence[Variant], longest: int | None) -> int:
    """How many copies of a protein all ranks together compute in `scores_of`."""
    distinct = set(filter(has_score, variants))
    if scoring == PSEUDO:
        return sum(len(standard_sites(mutated(wild_type, variant))) for variant in distinct)
    return len(together(scoring, sites_of(distinct), len(wild_type), longest))


def sites_of(variants: Iterable[Variant]) -> list[int]:
    """All sites that any of the variants is known to substitute, ascending, from 0."""
    return sorted({one.site for variant in variants if not isinstance(variant, str) for one in variant})


def together(scoring: str, sites: Sequence[int], num_residues: int, longest: int | None) -> list[list[int]]:
    """Groups of sites that are computed in one copy of the protein: single sites if they are masked, else all that
    share a window.
    """
    if scoring == MASKED:
        return [[site] for site in sites]
    return [list(group) for _, group in groupby(sites, lambda site: window_around(site, num_residues, longest))]


def _marginals(pretrained: Pretrained, wild_type: str, mutants: Sequence[Mutant], longest: int | None,
               budget: int | None, progress: Progress, scoring: str) -> list[float]:
    sites = sites_of(mutants)
    if not sites:  # wild types alone
        return [0.0] * len(mutants)
    table = site_table(pretrained, scoring, wild_type, sites, longest, budget, progress)
    row, ids = {site: row for row, site in enumerate(sites)}, pretrained.vocab.ids
    return [sum(float(table[row[one.site], ids[one.mutant]]) - float(table[row[one.site], ids[one.wild]])
                for one in mutant) for mutant in mutants]


def _pseudo_likelihoods(pretrained: Pretrained, wild_type: str, variants: Sequence[Variant], longest: int | None,
                        budget: int | None, progress: Progress) -> list[float]:
    axis = pretrained.mesh.data
    mine = [mutated(wild_type, variant) for variant in variants[axis.rank::axis.size]]
    copies = (copy_of(pretrained, residues, [site], longest, is_masked=True)
              for residues, protein in ((_ids(pretrained, protein), protein) for protein in mine)
              for site in standard_sites(protein))
    found = log_probabilities(pretrained, copies, budget, progress)
    sums = [sum(float(next(found)[0, residue]) for residue in _ids(pretrained, protein)[standard_sites(protein)])
            for protein in mine]
    return all_gather_in_turn(sums, axis)


def _ids(pretrained: Pretrained, protein: str) -> np.ndarray:
    return np.array([pretrained.vocab.ids[letter] for letter in protein])
