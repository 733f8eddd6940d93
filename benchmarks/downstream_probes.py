"""Predicts tasks with scikit-learn from the features of frozen models, or from letters only: `told(features, data)`.

For a number or class of a protein: ridge regression, with the penalty chosen by leave-one-out, on the means of the
hidden states of all layers, or on the frequencies of letters and pairs of letters. For a class of each residue:
logistic regression on its hidden states, or on the letters from 7 before to 7 after it. For contacts: ESM's regression
on attention maps, fitted on 20 random chains, or how often two such letters at that distance touch. Shapes: g proteins,
r residues of one, f features.
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

WINDOW, NUM_LETTERS = 7, 32  # letters to each side; an upper bound on the ids of residues
PENALTIES = np.logspace(-4, 5, 19)
MOST_ITERATIONS = 200
FARTHEST = 100  # greater distances in the sequence are treated as this one
TellContacts = Callable[[Chain], np.ndarray]


class Features(Protocol):
    """Features of proteins, from which a task's labels are predicted."""

    def of_proteins(self, examples: Sequence[Example]) -> np.ndarray:
        """The features of each protein, [g, f]."""

    def of_residues(self, examples: Sequence[Example]) -> np.ndarray:
        """The features of all residues of all proteins, [residues, f]."""

    def contacts(self, train: Sequence[Chain], seed: int) -> TellContacts:
        """A function that scores each pair of residues of a chain, [r, r], learnt from the contacts in `train`."""


def told(features: Features, data: TaskData) -> list[Any]:
    """The predictions for the test examples, learnt from the training examples, in the form that `metrics.measure`
    takes; not for contacts.
    """
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
    """Features made of letters, without a model."""

    def of_proteins(self, examples: Sequence[Example]) -> np.ndarray:
        """Frequencies of letters and of pairs of neighbouring letters, and the logarithm of the length."""
        size = NUM_LETTERS
        rows = []
        for ids in (example.ids.astype(np.int64) for example in examples):
            pairs = np.bincount(ids[:-1] * size + ids[1:], minlength=size**2) / max(1, len(ids) - 1)
            rows.append([*np.bincount(ids, minlength=size) / len(ids), *pairs, np.log(len(ids))])
        return np.array(rows)

    def of_residues(self, examples: Sequence[Example]) -> np.ndarray:
        """The letters around each residue, one-hot over NUM_LETTERS, the last of which means outside the protein."""
        size, outside = 2 * WINDOW + 1, NUM_LETTERS - 1
        padded = [np.pad(example.ids, WINDOW, constant_values=outside) for example in examples]
        around = np.concatenate([np.lib.stride_tricks.sliding_window_view(ids, size) for ids in padded])
        return np.eye(NUM_LETTERS, dtype=np.float32)[around].reshape(len(around), -1)

    def contacts(self, train: Sequence[Chain], seed: int) -> TellContacts:
        """Scores by naive Bayes on the two letters and their distance in the sequence."""
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
        """The two letters of each pair and their distance in the sequence, [p, 3]."""
        letters = np.frombuffer(chain.sequence.encode(), np.uint8) % NUM_LETTERS
        return np.stack([letters[first_p], letters[second_p], np.minimum(second_p - first_p, FARTHEST)], 1)


class States:
    """Features made of a model's hidden states and attention maps; the means of each protein are cached."""

    def __init__(self, pretrained: Pretrained) -> None:
        self._pretrained, self._means = pretrained, dict[str, np.ndarray]()
        self._layers = tuple(range(pretrained.config.model.num_layers + 1))

    def of_proteins(self, examples: Sequence[Example]) -> np.ndarray:
        """The means over residues of the hidden states of all layers, concatenated."""
        texts = [self._pretrained.vocab.letters(example.ids) for example in examples]
        new = [text for text in dict.fromkeys(texts) if text not in self._means]
        answers = self._pretrained.ask(new, Asked(("mean",), self._layers)) if new else []
        self._means |= {text: np.concatenate(answer["mean"]) for text, answer in zip(new, answers, strict=True)}
        return np.array([self._means[text] for text in texts])

    def of_residues(self, examples: Sequence[Example]) -> np.ndarray:
        """The hidden states of all layers, concatenated."""
        answers = self._pretrained.ask([self._pretrained.vocab.letters(each.ids) for each in examples],
                                       Asked(("per_tok",), self._layers))
        return np.concatenate([np.concatenate(answer["per_tok"], axis=1) for answer in answers])

    def contacts(self, train: Sequence[Chain], seed: int) -> TellContacts:
        """Scores by ESM's regression on attention maps."""
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
