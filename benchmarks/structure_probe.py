"""How well frozen hidden states tell secondary structure, by a multinomial logistic regression on each residue's.

Shapes: t residues of all proteins, f features, c classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.infer.pretrained import Pretrained

CLASSES = "HEC"
UNCOUNTED = -1
L2, MAX_STEPS = 1e-4, 200
WINDOW = 7  # letters to each side
NUM_LETTERS = 27  # A to Z, and none


@dataclass(frozen=True)
class Labelled:
    """A protein's residues with their classes, H, E or C; `counts` has "1" for those that are resolved."""

    sequence: str
    classes: str
    counts: str

    def cropped(self, size: int) -> "Labelled":
        """Its first residues."""
        return Labelled(self.sequence[:size], self.classes[:size], self.counts[:size])


def labels(proteins: Sequence[Labelled]) -> Tensor:
    """The classes by number, int64 [t], UNCOUNTED where a residue does not count."""
    return torch.tensor([CLASSES.index(letter) if counts == "1" else UNCOUNTED for protein in proteins
                         for letter, counts in zip(protein.classes, protein.counts, strict=True)])


def hidden_states(pretrained: Pretrained, proteins: Sequence[Labelled]) -> Tensor:
    """What the model gives behind its last norm for each residue, fp32 [t, f]."""
    return torch.from_numpy(np.concatenate(pretrained.embed_residues([protein.sequence for protein in proteins])))


def windows(proteins: Sequence[Labelled]) -> Tensor:
    """The letters around each residue, each as one number of NUM_LETTERS that is 1: fp32 [t, f]."""
    size, outside = 2 * WINDOW + 1, NUM_LETTERS - 1
    letters = [F.pad(torch.tensor([ord(letter) - ord("A") for letter in protein.sequence]), (WINDOW, WINDOW),
                     value=outside) for protein in proteins]
    return torch.cat([F.one_hot(each, NUM_LETTERS).float().unfold(0, size, 1).flatten(1) for each in letters])


def accuracy(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """The share of test residues that a regression on train residues has right; each is features and labels."""
    (train_features_tf, train_labels_t), (features_tf, labels_t) = map(_counted, (train, test))
    deviation_f, mean_f = torch.std_mean(train_features_tf, dim=0)
    for each_tf in (train_features_tf, features_tf):
        each_tf.sub_(mean_f).div_(deviation_f.clamp(min=1e-6))  # they are copies
    weight_cf, bias_c = fit(train_features_tf, train_labels_t)
    return float((F.linear(features_tf, weight_cf, bias_c).argmax(1) == labels_t).float().mean())


def fit(features_tf: Tensor, labels_t: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [c, f] and bias [c] that minimise the mean cross entropy plus L2 / 2 times the weights' square."""
    weight_cf = torch.zeros(len(CLASSES), features_tf.shape[1], requires_grad=True)
    bias_c = torch.zeros(len(CLASSES), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_cf, bias_c], max_iter=MAX_STEPS, tolerance_grad=1e-5, tolerance_change=1e-7,
                                  line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(F.linear(features_tf, weight_cf, bias_c), labels_t) + L2 / 2 * weight_cf.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    return weight_cf.detach(), bias_c.detach()


def _counted(residues: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A copy of those that count."""
    features, labels_t = residues
    is_counted_t = labels_t != UNCOUNTED
    return features[is_counted_t], labels_t[is_counted_t]
