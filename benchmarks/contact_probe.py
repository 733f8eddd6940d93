"""How well attention maps tell contacts, as ESM measures it: the regression of megatron/infer/contacts on other chains.

C-alpha atoms, not C-beta as there, are to be within 8 angstrom. Shapes: p pairs, f heads of all blocks, d draws of the
20 chains.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megatron.infer.contacts.chains import Chain
from megatron.infer.contacts.precision import DIVISORS, RANGES, precisions, shares
from megatron.infer.contacts.regression import NUM_FITTED, drawn, fitted, pair_features
from megatron.infer.pretrained import Pretrained

SHOWN = {"separation ≥ 6": list(RANGES).index("all"), "separation ≥ 24": list(RANGES).index("long")}


def contact_precision(pretrained: Pretrained, train: Sequence[Chain], test: Sequence[Chain],
                      num_draws: int) -> np.ndarray:
    """The mean precision on `test` for each draw of `train`, [d, 6]: at L, L/2 and L/5 for each of SHOWN."""
    weights_df = torch.stack([fitted(pretrained, drawn(train, NUM_FITTED, draw)) for draw in range(num_draws)])
    found = []
    for chain, pairs in ((chain, chain.pairs()) for chain in test):
        scores_dp = weights_df[:, :-1].float() @ pair_features(pretrained, chain, pairs).T
        found.append([precisions(score_p, pairs, len(chain.sequence))[list(SHOWN.values())].ravel()
                      for score_p in scores_dp])
    return np.nanmean(np.array(found), axis=0)


def chance(chains: Sequence[Chain]) -> np.ndarray:
    """The mean precision of pairs drawn at random, [6]: the share of contacts."""
    found = [shares(chain.pairs())[list(SHOWN.values())] for chain in chains]
    return np.nanmean(found, axis=0).repeat(len(DIVISORS))
