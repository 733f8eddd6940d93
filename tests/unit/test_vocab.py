"""Token ids are frozen; a vocabulary that is none is refused by name."""

import pickle
from pathlib import Path

import pytest

from megatron.data.corpus.vocab import DEFAULT_VOCAB, Vocab
from megatron.errors import VocabError


def test_the_shipped_vocabulary_has_the_published_ids():
    vocab = Vocab.from_file()
    special = ["[PAD]", "[MASK]", "[CLS]", "[SEP]", "[UNK]", "[unused1]"]
    assert vocab.tokens == (*special, *"ABCDEFGHIKLMNOPQRSTUVWXYZ")
    assert (vocab.pad_id, vocab.mask_id, vocab.cls_id, vocab.sep_id, vocab.unk_id) == (0, 1, 2, 3, 4)
    assert vocab.size == 31
    assert vocab.residue_ids.tolist() == list(range(6, 31))
    assert vocab.residue_ids.dtype == "uint16"


@pytest.mark.parametrize(("multiple", "padded"), [(1, 31), (31, 31), (128, 128), (2, 32)])
def test_the_padded_size_is_the_next_multiple(multiple, padded):
    assert Vocab.from_file().padded_size(multiple) == padded


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
