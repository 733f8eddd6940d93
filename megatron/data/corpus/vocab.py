"""The vocabulary of residues: a file with one token a line, whose id is the line's number from 0, or a folder with the
files of a tokenizer of transformers.

A token of a single letter A-Z is a residue. Special tokens are named as in BERT ([CLS]) or as in ESM (<cls>). A letter
without a token (J in all families) becomes the unknown token, never X.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron.config.data import VOCABULARIES
from megatron.config.model import ModelConfig
from megatron.data.corpus.tokenizer_folder import lines_of, tokens_in
from megatron.errors import VocabError

_FOLDER = Path(__file__).resolve().parents[3] / "protein_tools"
DEFAULT_VOCAB = _FOLDER / "iupac_vocab.txt"
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
RESIDUE_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
THREE_LETTERS = {  # IUPAC's three-letter names of residues
    "Ala": "A", "Asx": "B", "Cys": "C", "Asp": "D", "Glu": "E", "Phe": "F", "Gly": "G", "His": "H", "Ile": "I",
    "Lys": "K", "Leu": "L", "Met": "M", "Asn": "N", "Pyl": "O", "Pro": "P", "Gln": "Q", "Arg": "R", "Ser": "S",
    "Thr": "T", "Sec": "U", "Val": "V", "Trp": "W", "Xaa": "X", "Tyr": "Y", "Glx": "Z"}
# The possible names of each special token; "sep" ends a protein.
SPECIAL_TOKENS = {
    "mask": ("[MASK]", "<mask>"), "pad": ("[PAD]", "<pad>"), "cls": ("[CLS]", "<cls>"), "sep": ("[SEP]", "<eos>"),
    "unk": ("[UNK]", "<unk>")}
_IDENTITY_BYTES = 8


@dataclass(frozen=True)
class Vocab:
    """Tokens in the order of their ids; `mask_token`: the mask, if it has neither usual name."""

    tokens: tuple[str, ...]
    mask_token: str | None = None

    @classmethod
    def from_file(cls, name: str | Path | None = None, mask_token: str | None = None) -> "Vocab":
        """The vocabulary of a family (None: iupac), in a file with one token a line, or in a folder of transformers.

        `name`: a family's name or a path; write ./NAME for a path that is called like a family. Raises VocabError.
        """
        path = _FOLDER / f"{name or VOCABULARIES[0]}_vocab.txt" if name in (None, *VOCABULARIES) else Path(name)
        try:
            tokens = tuple(tokens_in(path) if path.is_dir() else lines_of(path))
        except OSError as error:
            raise VocabError(f"{path}: cannot read the vocabulary ({error.strerror}); --vocab-file names a file, a "
                             f"folder with a transformers tokenizer, or one of {', '.join(VOCABULARIES)}") from None
        except UnicodeDecodeError:
            raise VocabError(f"{path}: not a vocabulary: it is not UTF-8 text with one token a line") from None
        _check(path, tokens, mask_token)
        return cls(tokens, mask_token)

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "Vocab | None":
        """The vocabulary that the state of a checkpoint keeps; None where it only names a file, or nothing."""
        vocab = cls(tuple(state.get("tokens") or ()), state.get("mask_token"))
        return vocab if vocab.identity == state.get("vocabulary") else None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON: its file may then be moved, or change."""
        return {"vocabulary": self.identity, "tokens": list(self.tokens), "mask_token": self.mask_token}

    @property
    def size(self) -> int:
        """The number of tokens, without padding."""
        return len(self.tokens)

    @cached_property
    def identity(self) -> str:
        """A short digest of the tokens, in order, and of an unusual `mask_token`.

        Two vocabularies have the same identity only if each id means the same in both.
        """
        of_family = next((name for name in SPECIAL_TOKENS["mask"] if name in self.ids), None)
        meaning = self.tokens if self.mask_token in (None, of_family) else [self.tokens, self.mask_token]
        return hashlib.blake2b(json.dumps(meaning).encode(), digest_size=_IDENTITY_BYTES).hexdigest()

    def padded_size(self, model: ModelConfig) -> int:
        """The size rounded up to a multiple of the model's --make-vocab-size-divisible-by, for one tensor rank."""
        return -(-self.size // model.make_vocab_size_divisible_by) * model.make_vocab_size_divisible_by

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each token."""
        return {token: index for index, token in enumerate(self.tokens)}

    @cached_property
    def residue_ids(self) -> np.ndarray:
        """The ids of the letters A-Z that have a token, in ascending order, uint16."""
        return np.array(sorted(self.ids[letter] for letter in RESIDUE_LETTERS if letter in self.ids), dtype=np.uint16)

    def letters(self, ids: np.ndarray) -> str:
        """The protein as text, with X for any token that is not a single character."""
        return "".join(token if len(token) == 1 else "X" for token in map(self.tokens.__getitem__, ids))

    @property
    def pad_id(self) -> int:
        """The id of [PAD] or <pad>."""
        return self._special("pad")

    @property
    def mask_id(self) -> int:
        """The id of [MASK] or <mask>, or of `mask_token`."""
        return self._special("mask") if self.mask_token is None else self.ids[self.mask_token]

    @property
    def cls_id(self) -> int:
        """The id of [CLS] or <cls>, which precedes each protein."""
        return self._special("cls")

    @property
    def sep_id(self) -> int:
        """The id of [SEP] or <eos>, which may end a protein."""
        return self._special("sep")

    @property
    def unk_id(self) -> int:
        """The id of [UNK] or <unk>, which stands for every letter without a token."""
        return self._special("unk")

    def _special(self, role: str) -> int:
        return next(self.ids[name] for name in SPECIAL_TOKENS[role] if name in self.ids)


def lacking(tokens: Sequence[str], roles: Sequence[str] = tuple(SPECIAL_TOKENS)) -> list[str]:
    """The special tokens of `roles` and the amino acids, of 20, that are not among `tokens`."""
    missing = ["/".join(SPECIAL_TOKENS[role]) for role in roles if not set(SPECIAL_TOKENS[role]) & set(tokens)]
    return missing + [letter for letter in AMINO_ACIDS if letter not in tokens]


def _check(path: Path, tokens: tuple[str, ...], mask_token: str | None) -> None:
    """Raises VocabError unless `tokens` are a protein vocabulary, and `mask_token` one of them without another role."""
    first_line: dict[str, int] = {}
    for line, token in enumerate(tokens, start=1):
        if not token:
            raise VocabError(f"{path}: line {line} is blank; a vocabulary has one token a line, without gaps")
        if token in first_line:
            raise VocabError(f"{path}: line {line} repeats {token} of line {first_line[token]}; remove one of them")
        first_line[token] = line
    roles = [role for role in SPECIAL_TOKENS if role != "mask" or mask_token is None]
    taken = {*RESIDUE_LETTERS, *(name for role in roles if role != "mask" for name in SPECIAL_TOKENS[role])}
    if mask_token is not None and (mask_token not in first_line or mask_token in taken):
        what = "means something else" if mask_token in first_line else "is none of its tokens"
        raise VocabError(f"{path}: --mask-token {mask_token} {what}; name the token that stands for a masked residue")
    missing = lacking(tokens, roles)
    if missing:
        hint = ", and --mask-token names the mask token of a file that calls it otherwise"
        raise VocabError(f"{path}: not a protein vocabulary: it lacks {' '.join(missing)}; {DEFAULT_VOCAB.name} of "
                         f"protein_tools has all of them{hint if '[MASK]' in missing[0] else ''}")
