"""Detects DNA and RNA among the inputs; they are valid records, since each base is also the letter of an amino acid."""

import sys

import numpy as np

from megatron.data.corpus.vocab import Vocab
from megatron.data.preprocess.tally import count_ids

_BASES = ("A", "C", "G", "TU")
_FEW_LETTERS, _ENOUGH_LETTERS = 30, 10_000
_MIN_SHARE = 0.95  # of the bases and N together; in proteins it is 0.25
_MIN_BASE_SHARE = 0.05  # of each base, to exclude proteins with few kinds of residues, such as silk


class NucleotideWatch:
    """Warns on standard error, once for each file, if nearly all of its first letters are A C G T N, or U for T."""

    def __init__(self, vocab: Vocab) -> None:
        self._ids = [[vocab.ids[letter] for letter in letters if letter in vocab.ids] for letters in (*_BASES, "N")]
        self._source = ""
        self._counts: np.ndarray | None = None

    def see(self, source: str, ids: bytes) -> None:
        """Count the ids, one byte each, of the next documents of the file `source`."""
        if source != self._source:
            self.finish()
            self._source, self._counts = source, np.zeros(256, dtype=np.int64)
        if self._counts is not None:
            self._counts += count_ids(ids)
            if self._counts.sum() >= _ENOUGH_LETTERS:
                self.finish()

    def finish(self) -> None:
        """Decide on the last file, if that is not done yet."""
        if self._counts is None:
            return
        total = int(self._counts.sum())
        *bases, unknown = (int(self._counts[ids].sum()) for ids in self._ids)
        self._counts = None
        if (total >= _FEW_LETTERS and sum(bases) + unknown >= _MIN_SHARE * total
                and min(bases) >= _MIN_BASE_SHARE * total):
            print(f"warning: {self._source}: nearly all letters are A C G T U N, as in DNA and RNA; a protein file has "
                  "amino acids: translate it first", file=sys.stderr)
