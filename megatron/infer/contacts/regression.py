"""ESM's contact regression on attention maps: features, fitting (Rao et al., 2021, bioRxiv 2020.12.15.422761).

Attention maps are symmetrised and average-product corrected; a logistic regression with an L1 penalty, fitted on a few
chains, weights the heads of all layers. Unlike in the paper, the bias is not penalised. Shapes: r residues and k tokens
of a chain, n heads of a layer, f heads of all layers, p pairs.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron.errors import DataError
from megatron.infer.contacts.chains import Chain, Pairs
from megatron.infer.contacts.l1_logistic import fit
from megatron.infer.pretrained import Pretrained
from megatron.infer.rows import packed
from megatron.model.contacts import watch_maps

C, NUM_FITTED = 0.15, 20


def fitted(pretrained: Pretrained, chains: Sequence[Chain], c: float = C,
           progress: Callable[[int], object] = lambda chains: None) -> Tensor:
    """The regression's weights, in the order of the heads, followed by its bias, fp64 [f + 1], fitted on `chains`.

    `c`: the weight of the loss relative to the penalty. `progress` is called with 1 after each chain. The whole model
    must be on one rank. Chains longer than the model's positions are cropped. Raises DataError if no pair is a contact,
    or if all are.
    """
    features, touches = [], []
    for chain in chains:
        cropped = chain.cropped(pretrained.max_residues)
        pairs = cropped.pairs()
        features.append(pair_features(pretrained, cropped, pairs))
        touches.append(pairs.touches_p)
        progress(1)
    if len(torch.cat(touches).unique()) < 2:
        raise DataError(f"{', '.join(chain.name for chain in chains[:3])}{' …' * (len(chains) > 3)}: of the pairs of "
                        "resolved residues none, or each, is a contact; fit on whole structures of proteins")
    return fit(features, touches, c)


def drawn(chains: Sequence[Chain], number: int, seed: int) -> list[Chain]:
    """`number` of the chains, drawn at random without replacement; the same `seed` gives every model the same ones."""
    return [chains[place] for place in np.random.default_rng(seed).permutation(len(chains))[:number]]


def pair_features(pretrained: Pretrained, chain: Chain, pairs: Pairs) -> Tensor:
    """The corrected attention of each pair in the heads of all layers, fp32 [p, f], on the CPU."""
    parts: list[Tensor] = []
    residues = slice(1, 1 + len(chain.sequence))

    def take(_: int, maps: Iterator[Tensor]) -> None:
        for map_nkk in maps:
            parts.append(corrected(map_nkk[:, residues, residues])[:, pairs.first_p, pairs.second_p].cpu())

    row = packed([pretrained.encode(chain.sequence, chain.name)], pretrained.mesh.device)
    watch_maps(pretrained.model, row, take)
    return torch.cat(parts).T.contiguous()


def corrected(maps_nrr: Tensor) -> Tensor:
    """The symmetrised maps after average product correction, [n, r, r]: M + Mᵀ less the product of its margins.

    The margins' product is divided by the sum of all (Dunn et al., 2008, doi 10.1093/bioinformatics/btm604).
    """
    sums_nrr = maps_nrr + maps_nrr.transpose(1, 2)
    margins_nr = sums_nrr.sum(2)
    return sums_nrr - margins_nr[:, :, None] * (margins_nr / margins_nr.sum(1, keepdim=True))[:, None]
