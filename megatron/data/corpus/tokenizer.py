"""Turns residues into token ids, one id for each residue, by a lookup table of bytes.

Residues may be separated by spaces or not, in upper or lower case. White space and the gap characters `-` and `.` are
dropped; `*` may end a protein; a letter without a token (J) becomes the unknown token; any other character is an error,
and so is a cell or line that is no sequence although its letters are residues: `NaN`, or `Met-Lys-Thr`.
Ids are handled as bytes, one for each residue, until they are stored.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron.data.corpus.vocab import RESIDUE_LETTERS, THREE_LETTERS, Vocab
from megatron.errors import ResidueError, UserError, VocabError

TOKENIZER_TYPES = ("BertWordPieceLowerCase", "BertWordPieceCase")
GAPS = (b"-", b".")
DROPPED = b" \t\n\r\v\f" + b"".join(GAPS)
INTERNAL_STOP = "internal stop"
MISSING_VALUES = frozenset((b"nan", b"NaN", b"NA", b"N/A", b"#N/A", b"None", b"null", b"NULL"))

_STOP, _BAD = 254, 255
_NOT_PROTEIN = re.compile(rb"[^A-Za-z*\-.\s]")
_SHORT = 8  # bytes; a missing value is shorter, even with some white space around it
_NAME = b"|".join(name.encode() for name in THREE_LETTERS)
_NAMES = re.compile(rb"\s*(%b)(-(%b))+\s*" % (_NAME, _NAME), re.IGNORECASE)
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
        ids, problems = self.encode_many([text.encode(errors="replace")], are_sequences=True)
        if problems:
            problem = problems[0]
            raise ResidueError(f"column {problem.offset + 1}: {problem.found}")
        return np.frombuffer(ids[0], dtype=np.uint8).astype(np.uint16)

    def encode_many(self, texts: list[bytes], are_sequences: bool = False) -> tuple[list[bytes], dict[int, Problem]]:
        """The ids of each text, one byte for each residue, and the problems by the index of the text.

        A text that is not a protein has no ids. `are_sequences`: the texts are known to be sequences, as those under
        the headers of FASTA are; otherwise a missing value such as `NaN`, and three-letter names, are problems.
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
        for index, problem in () if are_sequences else _no_sequences(texts):
            problems[index], encoded[index] = problem, b""
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


def _no_sequences(texts: list[bytes]) -> Iterator[tuple[int, Problem]]:
    """The index and the problem of each text that is a missing value, or residues by their three-letter names."""
    if min(map(len, texts), default=_SHORT) >= _SHORT and b"-" not in b"".join(texts):
        return  # nearly always, and fast
    for index, text in enumerate(texts):
        if len(text) < _SHORT and (value := text.strip()) in MISSING_VALUES:
            yield index, Problem("missing value", 0, f"{value.decode()!r} is a missing value, not a protein")
        elif b"-" in text[:_SHORT] and _NAMES.fullmatch(text):
            yield index, Problem("three-letter names", 0, "three-letter names of residues; write one letter for each")


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
