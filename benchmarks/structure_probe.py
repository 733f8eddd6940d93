"""How well frozen hidden states tell secondary structure, by a multinomial logistic regression on each residue's.

Shapes: t residues of all proteins, f features, w letters of a window, c classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


@torch.no_grad()
def hidden_states(pretrained: Pretrained, proteins: Sequence[Labelled]) -> Tensor:
    """What the model gives behind its last norm for each residue, fp32 [t, f]."""
    return torch.cat([pretrained.model.hidden(row)[pretrained.is_residue(row)]
                      for row in pretrained.rows(protein.sequence for protein in proteins)])


def windows(proteins: Sequence[Labelled]) -> Tensor:
    """The letters around each residue as features that are 1, all others being 0: their numbers, int64 [t, w]."""
    places, outside = torch.arange(2 * WINDOW + 1), NUM_LETTERS - 1
    letters = [F.pad(torch.tensor([ord(letter) - ord("A") for letter in protein.sequence]), (WINDOW, WINDOW),
                     value=outside).unfold(0, len(places), 1) for protein in proteins]
    return torch.cat(letters) + places * NUM_LETTERS


def accuracy(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """The share of test residues that a regression on train residues has right; each is features and labels.

    Features are `hidden_states`, or `windows`.
    """
    (train_features, train_labels_t), (features, labels_t) = map(_counted, (train, test))
    if train_features.is_floating_point():
        deviation_f, mean_f = torch.std_mean(train_features, dim=0)
        for each in (train_features, features):
            each.sub_(mean_f).div_(deviation_f.clamp(min=1e-6))  # they are copies
    num_features = train_features.shape[1] if train_features.is_floating_point() else (2 * WINDOW + 1) * NUM_LETTERS
    weight_cf, bias_c = fit(train_features, train_labels_t, num_features)
    return float((logits(features, weight_cf, bias_c).argmax(1) == labels_t).float().mean())


def fit(features: Tensor, labels_t: Tensor, num_features: int) -> tuple[Tensor, Tensor]:
    """Weights [c, f] and bias [c] that minimise the mean cross entropy plus L2 / 2 times the weights' square."""
    parameters = [torch.zeros(len(CLASSES), *width, requires_grad=True) for width in ((num_features,), ())]
    optimizer = torch.optim.LBFGS(parameters, max_iter=MAX_STEPS, tolerance_grad=1e-5, tolerance_change=1e-7,
                                  line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(logits(features, *parameters), labels_t) + L2 / 2 * parameters[0].square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    weight_cf, bias_c = (parameter.detach() for parameter in parameters)
    return weight_cf, bias_c


def logits(features: Tensor, weight_cf: Tensor, bias_c: Tensor) -> Tensor:
    """[t, c], of numbers [t, f], or of the features [t, w] that are 1."""
    if features.is_floating_point():
        return F.linear(features, weight_cf, bias_c)
    return F.embedding_bag(features, weight_cf.T.contiguous(), mode="sum") + bias_c


def _counted(residues: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A copy of those that count."""
    features, labels_t = residues
    is_counted_t = labels_t != UNCOUNTED
    return features[is_counted_t], labels_t[is_counted_t]
