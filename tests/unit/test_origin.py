"""Data made with another vocabulary are noticed before they are trained on."""

import json

import numpy as np
import pytest

from megatron.data.corpus import origin
from megatron.data.corpus.indexed import open_indexed
from megatron.data.corpus.indexed_writer import write_indexed
from megatron.data.corpus.origin import check_vocabulary
from megatron.data.corpus.vocab import Vocab
from megatron.errors import DataError

VOCAB = Vocab.from_file()
SWAPPED = Vocab((*VOCAB.tokens[:-2], VOCAB.tokens[-1], VOCAB.tokens[-2]))


def write(prefix, ids, vocab=None, stem=None):
    """A dataset, and beside it what preprocessing says of it."""
    write_indexed(prefix, [np.array(ids, dtype=np.uint16)])
    if vocab is not None:
        stats = {"vocabulary": {"identity": vocab.identity, "tokens": vocab.tokens},
                 "outputs": {"text": {"files": [{"path": f"elsewhere/{prefix.name}.bin"}]}}}
        prefix.with_name(f"{stem}.stats.json").write_text(json.dumps(stats))
    return open_indexed(str(prefix))


def test_vocabularies_are_told_apart_by_their_order():
    assert Vocab(VOCAB.tokens).identity == VOCAB.identity != SWAPPED.identity


@pytest.mark.parametrize(("name", "stem"), [
    ("p_text_document", "p"), ("p_q_my_key_sentence", "p_q"), ("p_text_document_train", "p_text")])
def test_what_the_statistics_say_counts(tmp_path, name, stem):
    data = write(tmp_path / name, VOCAB.residue_ids, SWAPPED, stem)
    check_vocabulary(data, SWAPPED, "v.txt")
    with pytest.raises(DataError, match=rf"{name}: its vocabulary is not v.txt: its id {VOCAB.size - 2} means "):
        check_vocabulary(data, VOCAB, "v.txt")
    with pytest.raises(DataError, match=f"id {VOCAB.size - 1} means .* and nothing there"):
        check_vocabulary(data, Vocab(SWAPPED.tokens[:-1]), "v.txt")


def test_statistics_of_other_files_do_not_count(tmp_path):
    write(tmp_path / "p_other_document", VOCAB.residue_ids, SWAPPED, "p")
    check_vocabulary(write(tmp_path / "p_text_document", VOCAB.residue_ids), VOCAB, "v.txt")
    (tmp_path / "p.stats.json").write_text("damaged")
    check_vocabulary(open_indexed(str(tmp_path / "p_text_document")), VOCAB, "v.txt")


@pytest.mark.parametrize(("wrong", "meaning"), [
    (VOCAB.pad_id, r"\[PAD\]"), (VOCAB.mask_id, r"\[MASK\]"), (VOCAB.cls_id, r"\[CLS\]"),
    (VOCAB.size, f"past the {VOCAB.size} tokens")])
def test_without_statistics_ids_that_no_protein_has_are_noticed(tmp_path, wrong, meaning):
    data = write(tmp_path / "a", [*VOCAB.residue_ids, wrong])
    with pytest.raises(DataError, match=f"it holds id {wrong}, which is {meaning} there and in no protein; give"):
        check_vocabulary(data, VOCAB, "v.txt")


def test_of_large_data_a_sample_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(origin, "_SAMPLES", 4)
    monkeypatch.setattr(origin, "_SAMPLE_TOKENS", 10)
    ids = np.full(1000, VOCAB.ids["A"])
    check_vocabulary(write(tmp_path / "a", ids), VOCAB, "v.txt")
    ids[::9] = VOCAB.pad_id
    with pytest.raises(DataError):
        check_vocabulary(write(tmp_path / "b", ids), VOCAB, "v.txt")
