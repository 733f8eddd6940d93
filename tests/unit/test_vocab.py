"""The token ids of each family are frozen; a file that is not a vocabulary is refused by name."""

import json
import pickle
from pathlib import Path

import pytest

from megatron.config import ModelConfig
from megatron.config.data import VOCABULARIES
from megatron.data.corpus.tokenizer import ResidueTokenizer
from megatron.data.corpus.vocab import DEFAULT_VOCAB, RESIDUE_LETTERS, Vocab
from megatron.errors import VocabError

# As fair-esm's Alphabet has it with its "proteinseq_toks", and as ProtBERT's vocab.txt.
ESM_IDS = {
    "<cls>": 0, "<pad>": 1, "<eos>": 2, "<unk>": 3, "L": 4, "A": 5, "G": 6, "V": 7, "S": 8, "E": 9, "R": 10, "T": 11,
    "I": 12, "D": 13, "P": 14, "K": 15, "Q": 16, "N": 17, "F": 18, "Y": 19, "M": 20, "H": 21, "W": 22, "C": 23,
    "X": 24, "B": 25, "U": 26, "Z": 27, "O": 28, ".": 29, "-": 30, "<null_1>": 31, "<mask>": 32}
PROTBERT_IDS = {
    "[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "L": 5, "A": 6, "G": 7, "V": 8, "E": 9, "S": 10,
    "I": 11, "K": 12, "R": 13, "D": 14, "T": 15, "P": 16, "N": 17, "Q": 18, "F": 19, "Y": 20, "M": 21, "H": 22,
    "C": 23, "W": 24, "X": 25, "U": 26, "B": 27, "Z": 28, "O": 29}


def test_the_shipped_vocabulary_has_the_published_ids():
    vocab = Vocab.from_file()
    special = ["[PAD]", "[MASK]", "[CLS]", "[SEP]", "[UNK]", "[unused1]"]
    assert vocab.tokens == (*special, *"ABCDEFGHIKLMNOPQRSTUVWXYZ")
    assert (vocab.pad_id, vocab.mask_id, vocab.cls_id, vocab.sep_id, vocab.unk_id) == (0, 1, 2, 3, 4)
    assert vocab.size == 31
    assert vocab.residue_ids.tolist() == list(range(6, 31))
    assert vocab.residue_ids.dtype == "uint16"


@pytest.mark.parametrize(("family", "ids", "special"), [
    ("esm", ESM_IDS, (1, 32, 0, 2, 3)), ("protbert", PROTBERT_IDS, (0, 4, 2, 3, 1))])
def test_other_families_have_the_ids_of_their_published_models(family, ids, special):
    vocab = Vocab.from_file(family)
    assert vocab.ids == ids
    assert (vocab.pad_id, vocab.mask_id, vocab.cls_id, vocab.sep_id, vocab.unk_id) == special
    assert vocab.residue_ids.tolist() == sorted(index for token, index in ids.items() if token.isalpha())


@pytest.mark.parametrize("family", VOCABULARIES)
def test_every_letter_in_either_case_has_its_id_in_each_family_and_gaps_have_none(family):
    vocab = Vocab.from_file(family)
    expected = [vocab.unk_id if letter == "J" else vocab.tokens.index(letter) for letter in RESIDUE_LETTERS]
    encode = ResidueTokenizer(vocab).encode
    assert encode(RESIDUE_LETTERS).tolist() == encode(RESIDUE_LETTERS.lower()).tolist() == expected
    assert encode("M-K .v").tolist() == [vocab.ids[letter] for letter in "MKV"]


def test_a_name_is_a_familys_and_nothing_is_iupacs(tmp_path, monkeypatch):
    assert Vocab.from_file() == Vocab.from_file("iupac") == Vocab.from_file(DEFAULT_VOCAB)
    monkeypatch.chdir(tmp_path)
    Path("esm").write_text(DEFAULT_VOCAB.read_text())
    assert Vocab.from_file("esm").ids == ESM_IDS
    assert Vocab.from_file("./esm") == Vocab.from_file()
    with pytest.raises(VocabError, match="ems: cannot read .* names a file, a folder .* or one of iupac, esm"):
        Vocab.from_file("ems")


def test_the_mask_token_of_another_name_can_be_named(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text(DEFAULT_VOCAB.read_text().replace("[MASK]", "#"))
    vocab = Vocab.from_file(path, "#")
    assert vocab.mask_id == 1 and vocab.tokens[1] == "#"
    assert pickle.loads(pickle.dumps(vocab)) == vocab
    with pytest.raises(VocabError, match=r"lacks \[MASK\]/<mask>; .*--mask-token names"):
        Vocab.from_file(path)


def test_a_folder_of_a_tokenizer_is_a_vocabulary_with_its_added_tokens(tmp_path):
    with pytest.raises(VocabError, match=r"holds no vocab.txt or tokenizer.json"):
        Vocab.from_file(tmp_path)
    added = [{"id": 34, "content": "J"}, {"id": 32, "content": "<mask>"}, {"id": 33, "content": "<family>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ESM_IDS}, "added_tokens": added}))
    assert Vocab.from_file(tmp_path).tokens == (*ESM_IDS, "<family>", "J")


@pytest.mark.parametrize(("name", "what"), [
    ("#", "is none of its tokens"), ("A", "means something else"), ("[CLS]", "means something else")])
def test_a_mask_token_that_cannot_be_one_is_refused_in_one_line(name, what):
    with pytest.raises(VocabError, match=rf"iupac_vocab.txt: --mask-token .* {what}; name the token .*\Z"):
        Vocab.from_file("iupac", name)


def test_another_mask_token_is_another_vocabulary_and_the_same_one_named_is_not():
    plain, same, other = (Vocab.from_file("iupac", name) for name in (None, "[MASK]", "[unused1]"))
    assert plain.identity == same.identity != other.identity
    assert (plain.mask_id, other.mask_id) == (1, 5)


def test_identities_of_checkpoints_and_statistics_stay():
    assert Vocab.from_file().identity == "11351d4709aec372"


@pytest.mark.parametrize(("multiple", "padded"), [(1, 31), (31, 31), (128, 128), (2, 32)])
def test_the_padded_size_is_the_next_multiple(multiple, padded):
    assert Vocab.from_file().padded_size(ModelConfig(make_vocab_size_divisible_by=multiple)) == padded


def test_a_vocabulary_survives_pickling():
    vocab = Vocab.from_file()
    assert pickle.loads(pickle.dumps(vocab)) == vocab


def changed(tmp_path: Path, change) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(change(DEFAULT_VOCAB.read_text().split())))
    return path


@pytest.mark.parametrize(("change", "expected"), [
    (lambda tokens: [*tokens, "A"], "line 32 repeats A of line 7"),
    (lambda tokens: tokens[1:], r"lacks \[PAD\]"),
    (lambda tokens: [t for t in tokens if t not in "CW"], "lacks C W"),
    (lambda tokens: [*tokens[:6], "", *tokens[6:]], "line 7 is blank"),
])
def test_a_vocabulary_that_cannot_be_used_is_refused_by_line(tmp_path, change, expected):
    with pytest.raises(VocabError, match=expected):
        Vocab.from_file(changed(tmp_path, change))


def test_missing_and_binary_vocabularies_are_refused(tmp_path):
    with pytest.raises(VocabError, match="cannot read the vocabulary"):
        Vocab.from_file(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(VocabError, match="not UTF-8"):
        Vocab.from_file(tmp_path / "binary")


def test_line_ends_and_a_byte_order_mark_do_not_matter(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"\xef\xbb\xbf" + DEFAULT_VOCAB.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert Vocab.from_file(path) == Vocab.from_file()
