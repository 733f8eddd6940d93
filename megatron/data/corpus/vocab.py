"""The vocabulary of residues: one token a line, line number = id; J has no token of its own.

The special tokens are [PAD] [MASK] [CLS] [SEP] [UNK]; a single letter A-Z is a residue.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron.errors import VocabError

DEFAULT_VOCAB = Path(__file__).resolve().parents[3] / "protein_tools" / "iupac_vocab.txt"
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
RESIDUE_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SPECIAL_TOKENS = ("[PAD]", "[MASK]", "[CLS]", "[SEP]", "[UNK]")
_IDENTITY_BYTES = 8


@dataclass(frozen=True)
class Vocab:
    """Tokens in the order of their ids."""

    tokens: tuple[str, ...]

    @classmethod
    def from_file(cls, path: str | Path = DEFAULT_VOCAB) -> "Vocab":
        """The vocabulary in a text file, one token a line; raises VocabError."""
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise VocabError(f"{path}: cannot read the vocabulary ({error.strerror}); --vocab-file names it") from None
        except UnicodeDecodeError:
            raise VocabError(f"{path}: not a vocabulary: it is not UTF-8 text with one token a line") from None
        tokens = tuple(line.strip() for line in lines)
        while tokens and not tokens[-1]:
            tokens = tokens[:-1]
        _check(path, tokens)
        return cls(tokens)

    @property
    def size(self) -> int:
        """How many tokens there are, padding excluded."""
        return len(self.tokens)

    @cached_property
    def identity(self) -> str:
        """A short digest of the tokens in order: two vocabularies share it only if each id means the same in both."""
        return hashlib.blake2b(json.dumps(self.tokens).encode(), digest_size=_IDENTITY_BYTES).hexdigest()

    def padded_size(self, multiple: int) -> int:
        """The size rounded up to a multiple of `multiple`."""
        return -(-self.size // multiple) * multiple

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each token."""
        return {token: index for index, token in enumerate(self.tokens)}

    @cached_property
    def residue_ids(self) -> np.ndarray:
        """The ids of the single letters A-Z that have a token, ascending, uint16."""
        return np.array(sorted(self.ids[letter] for letter in RESIDUE_LETTERS if letter in self.ids), dtype=np.uint16)

    @property
    def pad_id(self) -> int:
        """The id of [PAD]."""
        return self.ids["[PAD]"]

    @property
    def mask_id(self) -> int:
        """The id of [MASK]."""
        return self.ids["[MASK]"]

    @property
    def cls_id(self) -> int:
        """The id of [CLS]."""
        return self.ids["[CLS]"]

    @property
    def sep_id(self) -> int:
        """The id of [SEP]."""
        return self.ids["[SEP]"]

    @property
    def unk_id(self) -> int:
        """The id of [UNK]."""
        return self.ids["[UNK]"]


def _check(path: str | Path, tokens: tuple[str, ...]) -> None:
    first_line: dict[str, int] = {}
    for line, token in enumerate(tokens, start=1):
        if not token:
            raise VocabError(f"{path}: line {line} is blank; a vocabulary has one token a line, without gaps")
        if token in first_line:
            raise VocabError(f"{path}: line {line} repeats {token} of line {first_line[token]}; remove one of them")
        first_line[token] = line
    missing = [token for token in SPECIAL_TOKENS if token not in first_line]
    missing += [letter for letter in AMINO_ACIDS if letter not in first_line]
    if missing:
        raise VocabError(f"{path}: not a protein vocabulary: it lacks {' '.join(missing)}; "
                         f"{DEFAULT_VOCAB.name} of protein_tools has all of them")
