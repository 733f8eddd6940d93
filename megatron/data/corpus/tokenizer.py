"""Turns residues into token ids, one id for each residue, by a lookup table of bytes.

Residues may be separated by spaces or not, in upper or lower case. White space and the gap characters `-` and `.` are
dropped; `*` may end a protein; a letter without a token (J) becomes the unknown token; any other character is an error.
Ids are handled as bytes, one for each residue, until they are stored.
"""

import re
from dataclasses import dataclass

import numpy as np

from megatron.data.corpus.vocab import RESIDUE_LETTERS, Vocab
from megatron.errors import ResidueError, UserError, VocabError

TOKENIZER_TYPES = ("BertWordPieceLowerCase", "BertWordPieceCase")
GAPS = (b"-", b".")
DROPPED = b" \t\n\r\v\f" + b"".join(GAPS)
INTERNAL_STOP = "internal stop"

_STOP, _BAD = 254, 255
_NOT_PROTEIN = re.compile(rb"[^A-Za-z*\-.\s]")
_RESIDUE_AFTER_STOP = re.compile(rb"\*[*\-.\s]*[A-Za-z]")


@dataclass(frozen=True)
class Problem:
    """Why a text is not a protein.

    `reason`: the category that it is counted under; `offset`: of the offending byte; `found`: a description.
    """

    reason: str
    offset: int
    found: str


class ResidueTokenizer:
    """Turns texts of residues into ids; stateless and picklable."""

    def __init__(self, vocab: Vocab) -> None:
        ids = [vocab.ids.get(letter, vocab.unk_id) for letter in RESIDUE_LETTERS]
        if max(ids) >= _STOP:
            raise VocabError(f"a residue has the id {max(ids)}; residues must stand in the first {_STOP} lines")
        table = bytearray([_BAD]) * 256
        table[ord("*")] = _STOP
        for letter, index in zip(RESIDUE_LETTERS, ids, strict=True):
            table[ord(letter)] = table[ord(letter.lower())] = index
        self._table = bytes(table)

    def encode(self, text: str) -> np.ndarray:
        """The ids of one text, uint16 [residues]; raises ResidueError."""
        ids, problems = self.encode_many([text.encode(errors="replace")])
        if problems:
            problem = problems[0]
            raise ResidueError(f"column {problem.offset + 1}: {problem.found}")
        return np.frombuffer(ids[0], dtype=np.uint8).astype(np.uint16)

    def encode_many(self, texts: list[bytes]) -> tuple[list[bytes], dict[int, Problem]]:
        """The ids of each text, one byte for each residue, and the problems by the index of the text.

        A text that is not a protein has no ids.
        """
        table = self._table
        encoded = [text.translate(table, DROPPED) for text in texts]
        joined = b"".join(encoded)
        problems: dict[int, Problem] = {}
        if _STOP in joined or _BAD in joined:
            for index, ids in enumerate(encoded):
                protein = ids.rstrip(bytes([_STOP]))
                if _STOP in protein or _BAD in protein:
                    problems[index] = _problem(texts[index])
                    protein = b""
                encoded[index] = protein
        return encoded, problems


def build_tokenizer(tokenizer_type: str, vocab: Vocab) -> ResidueTokenizer:
    """The tokenizer for --tokenizer-type: the same for all of TOKENIZER_TYPES; raises UserError for any other."""
    if tokenizer_type not in TOKENIZER_TYPES:
        raise UserError(f"--tokenizer-type is {tokenizer_type}; it must be one of {', '.join(TOKENIZER_TYPES)}, "
                        "each of which reads residues")
    return ResidueTokenizer(vocab)


def split_sentences(text: bytes) -> list[bytes]:
    """The sentences of a text, found by NLTK's untrained Punkt; a text without `.?!` is one sentence.

    Raises ImportError that says what to install if NLTK is needed and missing.
    """
    if not any(end in text for end in b".?!"):
        return [text] if text.strip() else []
    try:
        from nltk.tokenize.punkt import PunktSentenceTokenizer
    except ImportError:
        raise ImportError("--split-sentences met a text with '.', which needs NLTK: pip install nltk") from None
    return [sentence.encode() for sentence in PunktSentenceTokenizer().tokenize(text.decode(errors="replace"))]


def _problem(text: bytes) -> Problem:
    """The first problem of a text that is not a protein."""
    bad = _NOT_PROTEIN.search(text)
    if bad:
        return Problem("not protein", bad.start(), f"{_first_character(text[bad.start():])} is not a residue")
    stop = _RESIDUE_AFTER_STOP.search(text)
    assert stop is not None
    return Problem(INTERNAL_STOP, stop.start(), "an internal stop '*' (residues follow it)")


def _first_character(text: bytes) -> str:
    """The first character, quoted, decoded as UTF-8 if possible, else as Latin-1."""
    for size in range(1, 5):
        try:
            return repr(text[:size].decode())
        except UnicodeDecodeError:
            continue
    return repr(chr(text[0]))
