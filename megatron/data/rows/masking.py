"""Masks a row for the masked language model: chosen residues become the mask token, stay, or become another residue.

Only residues are chosen as targets or drawn as replacements, never special tokens or the unknown token. Boundaries of
proteins come from the packing, not from token ids, so masking cannot change them.
"""

from dataclasses import dataclass

import numpy as np

from megatron.config import DataConfig
from megatron.data.corpus.vocab import Vocab
from megatron.errors import ConfigError


@dataclass(frozen=True)
class Masking:
    """How to mask; the defaults are BERT's (arXiv 1810.04805), which evaluation always uses."""

    prob: float = 0.15  # share of residues that are targets
    mask_token_prob: float = 0.8  # share of targets that become the mask token
    random_prob: float = 0.1  # share of targets that become a random residue
    span_length: float = 1.0  # mean length of a span of targets
    final_prob: float | None = None  # if given, `prob` changes linearly to this over the first `ramp_rows` rows
    ramp_rows: float = 1.0

    @classmethod
    def from_config(cls, data: DataConfig) -> "Masking":
        """The masking that the flags describe; raises ConfigError for an invalid --mask-prob."""
        start, *ramp = data.mask_prob
        if len(ramp) not in (0, 2) or not all(0 < share < 1 for share in (start, *ramp[:1])):
            raise ConfigError(f"--mask-prob is {' '.join(map(str, data.mask_prob))}; give a share between 0 and 1, or "
                              "START END SAMPLES: such a share, another, and the rows from the one to the other")
        return cls(start, data.mask_token_prob, data.mask_random_prob, data.mask_span_length, *ramp)

    def prob_at(self, sample: int) -> float:
        """The share of residues that are targets in row number `sample` of a run."""
        if self.final_prob is None:
            return self.prob
        return self.prob + (self.final_prob - self.prob) * min(1.0, sample / self.ramp_rows)


class Masker:
    """Masks rows of ids of one vocabulary."""

    def __init__(self, masking: Masking, vocab: Vocab) -> None:
        self.masking = masking
        self._mask_id = vocab.mask_id
        self._residue_ids = vocab.residue_ids
        self._is_residue = np.zeros(vocab.size, dtype=bool)
        self._is_residue[vocab.residue_ids] = True

    def most_chosen(self, num_residues: int) -> int:
        """The largest number of targets in a row of `num_residues`, at any time of a run."""
        return _num_chosen(max(self.masking.prob, self.masking.final_prob or 0), num_residues)

    def mask(self, tokens_t: np.ndarray, lengths: np.ndarray, rng: np.random.Generator, sample: int = 0
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The masked copy of a row, the positions of the targets (int64, ascending) and their original ids.

        `lengths`: the tokens of each protein in the row; `sample`: the row's number in the run. There is at least one
        target if the row has a residue.
        """
        residues = np.flatnonzero(self._is_residue[tokens_t])
        num_chosen = _num_chosen(self.masking.prob_at(sample), len(residues))
        if self.masking.span_length > 1:
            chosen = _choose_spans(residues, num_chosen, self.masking.span_length, lengths, rng)
        else:
            chosen = residues[rng.choice(len(residues), num_chosen, replace=False, shuffle=False)]
        chosen.sort()
        original = tokens_t[chosen]
        return self._replace(tokens_t, chosen, rng), chosen, original

    def _replace(self, tokens_t: np.ndarray, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A copy of a row in which the targets at `chosen` are replaced or kept at random."""
        draw = rng.random(len(chosen))
        becomes_mask = draw < self.masking.mask_token_prob
        becomes_random = ~becomes_mask & (draw < self.masking.mask_token_prob + self.masking.random_prob)
        masked_t = tokens_t.copy()
        masked_t[chosen[becomes_mask]] = self._mask_id
        drawn = rng.integers(len(self._residue_ids), size=np.count_nonzero(becomes_random))
        masked_t[chosen[becomes_random]] = self._residue_ids[drawn]
        return masked_t


def _num_chosen(share: float, num_residues: int) -> int:
    return min(max(1, round(share * num_residues)), num_residues)


def _choose_spans(residues: np.ndarray, num_chosen: int, mean_length: float, lengths: np.ndarray,
                  rng: np.random.Generator) -> np.ndarray:
    """`num_chosen` of the positions `residues`, in spans of geometrically distributed length within one protein.

    `lengths`: the tokens of each protein. Spans are added in the order drawn until they cover enough positions; the
    last one is cut to reach the exact number.
    """
    num_tokens = int(lengths.sum())
    num_spans = 8 + int(2 * num_chosen / mean_length)
    starts = rng.choice(residues, num_spans) if len(residues) else residues
    ends = np.repeat(np.cumsum(lengths), lengths)[starts]
    span_lengths = np.minimum(rng.geometric(1 / mean_length, len(starts)), ends - starts)
    span_starts = np.cumsum(span_lengths) - span_lengths
    positions = np.arange(span_lengths.sum()) + np.repeat(starts - span_starts, span_lengths)
    first_span = num_spans + rng.random(num_tokens)  # positions in no span come last, in random order
    np.minimum.at(first_span, positions, np.repeat(np.arange(len(starts)), span_lengths).astype(float))
    return residues[np.argsort(first_span[residues], kind="stable")[:num_chosen]]
