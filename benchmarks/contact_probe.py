"""How well attention maps tell contacts, as ESM measures it (Rao et al., 2021, bioRxiv 2020.12.15.422761).

Maps are symmetrised and corrected for their average product; a logistic regression with an L1 penalty, fitted on 20
chains alone, weighs the heads of all blocks. Other than there, C-alpha atoms, not C-beta, are to be within 8 angstrom,
and the bias is not penalised. Shapes: r residues and k tokens of a chain, n heads of a block, f heads of all blocks, p
pairs, d draws of the 20 chains.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.l1_logistic import fit
from megatron.infer.pretrained import Pretrained
from megatron.model.contacts import watch_maps

CUTOFF_ANGSTROM, C, NUM_FITTED = 8.0, 0.15, 20
SEPARATIONS = (6, 24)  # the least of all pairs, and of those of long range
DIVISORS = (1, 2, 5)  # of the residues: as many pairs are predicted


@dataclass(frozen=True)
class Chain:
    """A protein's residues, and where their C-alpha atoms are, fp32 [r, 3] in angstrom, NaN where unresolved."""

    sequence: str
    atoms_r3: Tensor

    def cropped(self, size: int) -> "Chain":
        """Its first residues."""
        return Chain(self.sequence[:size], self.atoms_r3[:size])

    def pairs(self) -> "Pairs":
        """All pairs of resolved residues that are far enough apart in the sequence."""
        size = len(self.sequence)
        first_p, second_p = torch.triu_indices(size, size, SEPARATIONS[0]).unbind()
        distance_p = (self.atoms_r3[first_p] - self.atoms_r3[second_p]).norm(dim=1)
        is_resolved_p = ~distance_p.isnan()
        return Pairs(first_p[is_resolved_p], second_p[is_resolved_p], distance_p[is_resolved_p] < CUTOFF_ANGSTROM)


@dataclass(frozen=True)
class Pairs:
    """Pairs of residues by their places, and whether they touch."""

    first_p: Tensor
    second_p: Tensor
    touches_p: Tensor


def contact_precision(pretrained: Pretrained, train: Sequence[Chain], test: Sequence[Chain],
                      num_draws: int) -> np.ndarray:
    """The mean precision on `test` for each draw of `train`, [d, 6]: at L, L/2 and L/5 of all pairs, of long range."""
    weights_df = torch.stack([_fitted(pretrained, train, draw) for draw in range(num_draws)])
    found = [[precisions(score_p, pairs, len(chain.sequence)) for score_p in
              weights_df[:, :-1].float() @ features_pf.T] for chain, pairs, features_pf in _described(pretrained, test)]
    return np.nanmean(np.array(found), axis=0)


def chance(chains: Sequence[Chain]) -> np.ndarray:
    """The mean precision of pairs drawn at random, [6]: the share of contacts."""
    shares = []
    for pairs in (chain.pairs() for chain in chains):
        separation_p = pairs.second_p - pairs.first_p
        shares.append([float(pairs.touches_p[separation_p >= least].float().mean()) for least in SEPARATIONS])
    return np.nanmean(shares, axis=0).repeat(len(DIVISORS))


def precisions(scores_p: Tensor, pairs: Pairs, length: int) -> list[float]:
    """The shares of contacts among the L, L/2, L/5 pairs of the highest scores, of all and of those of long range.

    L is `length`; where there are fewer pairs, among all; NaN where there are none. Equal scores rank at random.
    """
    found, order_p = list[float](), torch.randperm(len(scores_p), generator=torch.Generator().manual_seed(0))
    for least in SEPARATIONS:
        is_far_p = (pairs.second_p - pairs.first_p)[order_p] >= least
        candidates = order_p[is_far_p]
        ranked = pairs.touches_p[candidates[scores_p[candidates].argsort(descending=True, stable=True)]].float()
        found += [float(ranked[:max(1, length // divisor)].mean()) for divisor in DIVISORS]
    return found


def corrected(maps_nrr: Tensor) -> Tensor:
    """Each map plus its transpose, less its average product (Dunn et al., 2008, doi 10.1093/bioinformatics/btm604)."""
    sums_nrr = maps_nrr + maps_nrr.transpose(1, 2)
    margins_nr = sums_nrr.sum(2)
    return sums_nrr - margins_nr[:, :, None] * (margins_nr / margins_nr.sum(1, keepdim=True))[:, None]


def pair_features(pretrained: Pretrained, sequence: str, pairs: Pairs) -> Tensor:
    """What the heads of all blocks say of each pair, fp32 [p, f]."""
    parts: list[Tensor] = []
    residues = slice(1, 1 + len(sequence))

    def take(_: int, maps: Iterator[Tensor]) -> None:
        for map_nkk in maps:
            parts.append(corrected(map_nkk[:, residues, residues])[:, pairs.first_p, pairs.second_p])

    watch_maps(pretrained.model, pretrained.row([sequence]), take)
    return torch.cat(parts).T.contiguous()


def _fitted(pretrained: Pretrained, train: Sequence[Chain], draw: int) -> Tensor:
    """The regression's weights and bias, [f + 1], on draw number `draw` of chains, the same for every model."""
    drawn = np.random.default_rng(draw).permutation(len(train))[:NUM_FITTED]
    described = list(_described(pretrained, [train[number] for number in drawn]))
    return fit([features_pf for _, _, features_pf in described], [pairs.touches_p for _, pairs, _ in described], C)


def _described(pretrained: Pretrained, chains: Sequence[Chain]) -> Iterator[tuple[Chain, Pairs, Tensor]]:
    """One chain at a time with its pairs and their features."""
    for chain in chains:
        pairs = chain.pairs()
        yield chain, pairs, pair_features(pretrained, chain.sequence, pairs)
