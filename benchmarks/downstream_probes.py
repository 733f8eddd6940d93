"""How well frozen models tell a task, by scikit-learn, and how well letters alone do: `told(features, data)`.

Number and class of a protein: ridge regression, whose penalty is chosen by leaving one protein out, on the means of the
hidden states of all layers, or on the frequencies of letters and of their pairs. Class of a residue: logistic
regression on its hidden states, or on the letters from 7 before it to 7 behind. Contacts: ESM's regression on the
attention maps of 20 chains that are drawn, or how often two letters so far apart touch. Shapes: g proteins, r residues
of one, f features.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV, RidgeCV
from sklearn.naive_bayes import CategoricalNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from megatron.finetune.data.examples import Example, TaskData
from megatron.finetune.data.tasks import NUMBER, RESIDUES
from megatron.infer.answers import Asked
from megatron.infer.contacts.chains import LEAST_SEPARATION, Chain
from megatron.infer.contacts.regression import NUM_FITTED, drawn, fitted, pair_features
from megatron.infer.pretrained import Pretrained
from megatron.kernels.packed_sequence import NO_TARGET

WINDOW, NUM_LETTERS = 7, 32  # letters to each side; ids that a vocabulary of residues does not exceed
PENALTIES = np.logspace(-4, 5, 19)
MOST_ITERATIONS = 200
FARTHEST = 100  # residues so far apart in the sequence, or farther, count alike
TellContacts = Callable[[Chain], np.ndarray]


class Features(Protocol):
    """What is known of proteins, from which the answer is told."""

    def of_proteins(self, examples: Sequence[Example]) -> np.ndarray:
        """[g, f]."""

    def of_residues(self, examples: Sequence[Example]) -> np.ndarray:
        """[residues of all, f]."""

    def contacts(self, train: Sequence[Chain], seed: int) -> TellContacts:
        """What gives a score of each pair of a chain's residues [r, r], learnt from those of `train`."""


def told(features: Features, data: TaskData) -> list[Any]:
    """Of each test example what was learnt from the training ones, as `metrics.measure` takes it; no contacts."""
    train, test, kind = data.parts["train"], data.parts["test"], data.space.kind
    if kind == RESIDUES:
        labels = np.concatenate([example.label for example in train])
        counts = labels != NO_TARGET
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MOST_ITERATIONS))
        model.fit(features.of_residues(train)[counts], labels[counts])
        classes = model.predict(features.of_residues(test))
        return np.split(classes, np.cumsum([len(example.ids) for example in test])[:-1])
    ridge = RidgeCV(PENALTIES) if kind == NUMBER else RidgeClassifierCV(PENALTIES)
    model = make_pipeline(StandardScaler(), ridge)
    model.fit(features.of_proteins(train), [example.label for example in train])
    return list(model.predict(features.of_proteins(test)))


class Letters:
    """What letters tell without any model."""

    def of_proteins(self, examples: Sequence[Example]) -> np.ndarray:
        """Frequencies of letters and of pairs of neighbours, and the logarithm of the length."""
        size = NUM_LETTERS
        rows = []
        for ids in (example.ids.astype(np.int64) for example in examples):
            pairs = np.bincount(ids[:-1] * size + ids[1:], minlength=size**2) / max(1, len(ids) - 1)
            rows.append([*np.bincount(ids, minlength=size) / len(ids), *pairs, np.log(len(ids))])
        return np.array(rows)

    def of_residues(self, examples: Sequence[Example]) -> np.ndarray:
        """The letters around each residue, one of NUM_LETTERS each; the last of these is outside the protein."""
        size, outside = 2 * WINDOW + 1, NUM_LETTERS - 1
        padded = [np.pad(example.ids, WINDOW, constant_values=outside) for example in examples]
        around = np.concatenate([np.lib.stride_tricks.sliding_window_view(ids, size) for ids in padded])
        return np.eye(NUM_LETTERS, dtype=np.float32)[around].reshape(len(around), -1)

    def contacts(self, train: Sequence[Chain], seed: int) -> TellContacts:
        """By how often pairs of such letters touch, and how often those so far apart do, as if independent."""
        pairs = [(chain, chain.pairs()) for chain in train]
        model = CategoricalNB(min_categories=[NUM_LETTERS, NUM_LETTERS, FARTHEST + 1])
        model.fit(np.concatenate([self._pairs(chain, known.first_p.numpy(), known.second_p.numpy())
                                  for chain, known in pairs]),
                  np.concatenate([known.touches_p.numpy() for _, known in pairs]))

        def tell(chain: Chain) -> np.ndarray:
            first_p, second_p = np.triu_indices(len(chain.sequence), LEAST_SEPARATION)
            return _as_map(model.predict_log_proba(self._pairs(chain, first_p, second_p))[:, 1],
                           first_p, second_p, len(chain.sequence))

        return tell

    def _pairs(self, chain: Chain, first_p: np.ndarray, second_p: np.ndarray) -> np.ndarray:
        """The letters of each pair and how far apart they are, [p, 3]."""
        letters = np.frombuffer(chain.sequence.encode(), np.uint8) % NUM_LETTERS
        return np.stack([letters[first_p], letters[second_p], np.minimum(second_p - first_p, FARTHEST)], 1)


class States:
    """What a model tells. The means of each protein's states are computed once, whatever seed they are asked for."""

    def __init__(self, pretrained: Pretrained) -> None:
        self._pretrained, self._means = pretrained, dict[str, np.ndarray]()
        self._layers = tuple(range(pretrained.config.model.num_layers + 1))

    def of_proteins(self, examples: Sequence[Example]) -> np.ndarray:
        """The means over residues of the hidden states of all layers, one behind the other."""
        texts = [self._pretrained.vocab.letters(example.ids) for example in examples]
        new = [text for text in dict.fromkeys(texts) if text not in self._means]
        answers = self._pretrained.ask(new, Asked(("mean",), self._layers)) if new else []
        self._means |= {text: np.concatenate(answer["mean"]) for text, answer in zip(new, answers, strict=True)}
        return np.array([self._means[text] for text in texts])

    def of_residues(self, examples: Sequence[Example]) -> np.ndarray:
        """The hidden states of all layers, one behind the other."""
        answers = self._pretrained.ask([self._pretrained.vocab.letters(each.ids) for each in examples],
                                       Asked(("per_tok",), self._layers))
        return np.concatenate([np.concatenate(answer["per_tok"], axis=1) for answer in answers])

    def contacts(self, train: Sequence[Chain], seed: int) -> TellContacts:
        """By ESM's regression on attention maps."""
        theta = fitted(self._pretrained, drawn(train, NUM_FITTED, seed)).float()

        def tell(chain: Chain) -> np.ndarray:
            pairs = chain.pairs()
            scores_p = pair_features(self._pretrained, chain, pairs) @ theta[:-1]
            return _as_map(scores_p.numpy(), pairs.first_p.numpy(), pairs.second_p.numpy(), len(chain.sequence))

        return tell


def _as_map(scores_p: np.ndarray, first_p: np.ndarray, second_p: np.ndarray, size: int) -> np.ndarray:
    scores_rr = np.full((size, size), -np.inf)
    scores_rr[first_p, second_p] = scores_rr[second_p, first_p] = scores_p
    return scores_rr
