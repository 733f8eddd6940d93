"""Token ids mean the same letters to the model as to the preprocessing, whatever vocabulary each has."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.data import VOCABULARIES
from megatron.data.corpus import origin
from megatron.data.corpus.indexed import open_indexed
from megatron.data.corpus.origin import corpus_vocabulary, id_table
from megatron.data.corpus.vocab import RESIDUE_LETTERS, Vocab
from megatron.errors import DataError
from tests.indexed_files import write_indexed

VOCAB = Vocab.from_file()
SWAPPED = Vocab((*VOCAB.tokens[:-2], VOCAB.tokens[-1], VOCAB.tokens[-2]))
families = st.sampled_from([*map(Vocab.from_file, VOCABULARIES), SWAPPED])


def write(prefix, ids, tokens=None, stem=None):
    """A dataset, and beside it what preprocessing says of it."""
    write_indexed(prefix, [np.array(ids, dtype=np.uint16)])
    if tokens is not None:
        stats = {"vocabulary": {"tokens": tokens},
                 "outputs": {"text": {"files": [{"path": f"elsewhere/{prefix.name}.bin"}]}}}
        prefix.with_name(f"{stem}.stats.json").write_text(json.dumps(stats))
    return open_indexed(str(prefix))


def test_vocabularies_are_told_apart_by_their_order():
    assert Vocab(VOCAB.tokens).identity == VOCAB.identity != SWAPPED.identity


@pytest.mark.parametrize(("name", "stem"), [
    ("p_text_document", "p"), ("p_q_my_key_sentence", "p_q"), ("p_text_document_train", "p_text")])
def test_what_the_statistics_say_counts(tmp_path, name, stem):
    assert corpus_vocabulary(write(tmp_path / name, VOCAB.residue_ids, SWAPPED.tokens, stem)) == SWAPPED


def test_statistics_of_other_files_do_not_count(tmp_path):
    write(tmp_path / "p_other_document", VOCAB.residue_ids, SWAPPED.tokens, "p")
    assert corpus_vocabulary(write(tmp_path / "p_text_document", VOCAB.residue_ids)) == VOCAB
    (tmp_path / "p.stats.json").write_text("damaged")
    assert corpus_vocabulary(open_indexed(str(tmp_path / "p_text_document"))) == VOCAB


def test_statistics_that_name_another_kind_of_vocabulary_are_refused(tmp_path):
    data = write(tmp_path / "p_text_document", [1, 2], ["[UNK]", *"ACGT"], "p")
    with pytest.raises(DataError, match="p_text_document: its statistics name a vocabulary .* lacks D E F .* again$"):
        corpus_vocabulary(data)


@pytest.mark.parametrize(("wrong", "meaning"), [
    (VOCAB.pad_id, r"\[PAD\]"), (VOCAB.mask_id, r"\[MASK\]"), (VOCAB.cls_id, r"\[CLS\]"), (5, r"\[unused1\]"),
    (VOCAB.size, f"past the {VOCAB.size} tokens")])
def test_without_statistics_ids_that_no_protein_has_are_noticed(tmp_path, wrong, meaning):
    data = write(tmp_path / "a", [*VOCAB.residue_ids, wrong])
    with pytest.raises(DataError, match=f"it holds id {wrong}, which is {meaning} there and in no protein; put"):
        corpus_vocabulary(data)


@pytest.mark.parametrize("family", ["esm", "protbert"])
def test_another_familys_proteins_without_statistics_are_not_taken_for_iupacs(tmp_path, family):
    vocab = Vocab.from_file(family)
    with pytest.raises(DataError, match="no statistics name its vocabulary"):
        corpus_vocabulary(write(tmp_path / "a", [vocab.ids[letter] for letter in "MKVLA"]))


def test_of_large_data_a_sample_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(origin, "_SAMPLES", 4)
    monkeypatch.setattr(origin, "_SAMPLE_TOKENS", 10)
    ids = np.full(1000, VOCAB.ids["A"])
    assert corpus_vocabulary(write(tmp_path / "a", ids)) == VOCAB
    ids[::9] = VOCAB.pad_id
    with pytest.raises(DataError):
        corpus_vocabulary(write(tmp_path / "b", ids))


@settings(deadline=None)
@given(families, families, st.text(RESIDUE_LETTERS, min_size=1))
def test_ids_are_mapped_by_letter_and_back(corpus, model, protein):
    there, back = id_table(corpus, model), id_table(model, corpus)
    if corpus == model:
        assert there is back is None
        return
    assert there is not None and back is not None
    ids = np.array([corpus.ids.get(letter, corpus.unk_id) for letter in protein])
    both_have = [letter in corpus.ids and letter in model.ids for letter in protein]
    assert there[ids].tolist() == [model.ids[letter] if known else model.unk_id
                                   for letter, known in zip(protein, both_have, strict=True)]
    assert back[there[ids]].tolist() == np.where(both_have, ids, corpus.unk_id).tolist()


@pytest.mark.parametrize("family", ["esm", "protbert"])
def test_no_special_token_becomes_a_residue_and_the_end_of_a_protein_stays_one(family):
    model = Vocab.from_file(family)
    table = id_table(VOCAB, model)
    assert table is not None and table[VOCAB.sep_id] == model.sep_id
    others = [token for token in VOCAB.tokens if len(token) > 1 and token != "[SEP]"]
    assert {int(table[VOCAB.ids[token]]) for token in others} == {model.unk_id}


def test_a_letter_without_a_token_becomes_the_unknown_one_and_not_x():
    fewer = Vocab(tuple(token for token in VOCAB.tokens if token not in "UO"))
    table = id_table(VOCAB, fewer)
    assert table is not None
    assert [table[VOCAB.ids[letter]] for letter in "UOXA"] == [fewer.unk_id, fewer.unk_id, fewer.ids["X"],
                                                               fewer.ids["A"]]


def test_a_mask_token_of_another_name_changes_no_id_of_a_corpus():
    assert id_table(VOCAB, Vocab(VOCAB.tokens, "[unused1]")) is None
