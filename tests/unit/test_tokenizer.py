"""Each residue becomes one id, whatever its case and spacing; what is not a protein is named."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.corpus.tokenizer import TOKENIZER_TYPES, build_tokenizer, split_sentences
from megatron.data.corpus.vocab import RESIDUE_LETTERS, Vocab
from megatron.errors import ResidueError, VocabError

VOCAB = Vocab.from_file()


@pytest.mark.parametrize("tokenizer_type", TOKENIZER_TYPES)
@pytest.mark.parametrize("text", ["MKVJ", "mkvj", "M K V J", " M\tK\nV\r\nJ ", "M-K..VJ", "MKVJ*",
                                  "M K V J * *", "MKVJ*-"])
def test_every_type_reads_residues_in_any_spelling(tokenizer_type, text):
    ids = build_tokenizer(tokenizer_type, VOCAB).encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == [17, 15, 26, 4]


@settings(deadline=None)
@given(st.text(alphabet=RESIDUE_LETTERS + RESIDUE_LETTERS.lower()))
def test_each_letter_gives_the_id_of_its_line(text):
    expected = [VOCAB.ids.get(letter.upper(), VOCAB.unk_id) for letter in text]
    assert build_tokenizer("BertWordPieceCase", VOCAB).encode(text).tolist() == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("MK1V", "column 3: '1'"), ("M*K", r"column 2: an internal stop"), ("[CLS] A", r"column 1: '\['"),
    ("AÅC", "column 2: 'Å'"), ("A\udce9C", r"column 2: '\?'"), ("A\x00", r"column 2: '\\x00'"),
    ("A*?", r"column 3: '\?'"), ("*A", "column 1: an internal"),
])
def test_what_is_no_protein_is_named_with_its_column(text, expected):
    with pytest.raises(ResidueError, match=expected):
        build_tokenizer("BertWordPieceCase", VOCAB).encode(text)


def test_many_texts_are_encoded_in_place_and_bad_ones_are_empty():
    encoded, problems = build_tokenizer("BertWordPieceCase", VOCAB).encode_many([b"AC", b"A?", b"", b"C*"])
    assert [list(ids) for ids in encoded] == [[6, 8], [], [], [8]]
    assert {index: problem.reason for index, problem in problems.items()} == {1: "not protein"}


def test_missing_values_and_three_letter_names_are_no_proteins_unless_they_are_known_to_be_sequences():
    missing, names = [b"NaN", b"nan", b" NA ", b"None", b"null", b"NULL"], [b"Met-Lys-Thr-Ala", b"ALA-GLY", b" met-lys"]
    proteins = [b"NAN", b"Na", b"NAK", b"NONE", b"A-", b"MET-LYSV", b"MKT-A", b"Met", b"MET-LYS-THR-A", b""]
    tokenizer = build_tokenizer("BertWordPieceCase", VOCAB)
    encoded, problems = tokenizer.encode_many([*missing, b"N/A", b"#N/A", *names, *proteins])
    assert [problem.reason for problem in problems.values()] == 8 * ["missing value"] + 3 * ["three-letter names"]
    assert not any(encoded[:11]) and all(encoded[11:-1])
    assert problems[2].found == "'NA' is a missing value, not a protein"
    assert tokenizer.encode_many([*missing, *names], are_sequences=True)[1] == {}


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(ValueError, match="GPT2BPETokenizer; it must be one of BertWordPieceLowerCase"):
        build_tokenizer("GPT2BPETokenizer", VOCAB)


def test_residues_far_down_a_vocabulary_are_refused():
    tokens = VOCAB.tokens[:6] + tuple(f"[unused{i}]" for i in range(2, 260)) + VOCAB.tokens[6:]
    with pytest.raises(VocabError, match="first 254 lines"):
        build_tokenizer("BertWordPieceCase", Vocab(tokens))


def test_a_text_without_full_stops_is_one_sentence_and_needs_no_nltk(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setitem(sys.modules, "nltk.tokenize.punkt", None)
    assert split_sentences(b"M K V") == [b"M K V"]
    assert split_sentences(b" \n") == []
    with pytest.raises(ImportError, match="pip install nltk"):
        split_sentences(b"M. K")


def test_sentences_end_where_untrained_punkt_ends_them():
    pytest.importorskip("nltk")
    assert split_sentences(b"H G G Y . L Y V F S") == [b"H G G Y .", b"L Y V F S"]
