"""Lists of datasets give the very rows of the merged files, and mistakes in a list are reported by line."""

import dataclasses
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron.config import DataConfig
from megatron.data.corpus.documents import Documents
from megatron.data.corpus.joined import open_corpus
from megatron.data.corpus.vocab import Vocab
from megatron.data.preprocess.flags import PreprocessConfig
from megatron.data.preprocess.merging import merge
from megatron.data.preprocess.run import preprocess
from megatron.data.rows.data_path import parse_data_path
from megatron.data.rows.dataset import build_datasets, corpora_of
from megatron.errors import ConfigError, DataError
from tests.indexed_files import write_indexed

VOCAB = Vocab.from_file()


def write_shards(folder: Path, sizes: list[int]) -> list[str]:
    """Datasets of so many proteins each, and `shards.txt`, which names them."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    names = [f"s_{number}" for number in range(len(sizes))]
    for name, size in zip(names, sizes, strict=True):
        write_indexed(folder / name, [rng.choice(VOCAB.residue_ids, rng.integers(0, 90)) for _ in range(size)])
    (folder / "shards.txt").write_text("# all of them\n\n" + "".join(f"  {name}  # {name}\n" for name in names))
    return [str(folder / name) for name in names]


def rows_of(dataset, count: int):
    return [dataclasses.astuple(dataset[sample]) for sample in range(count)]


@pytest.mark.parametrize("flags", [{}, {"long_proteins": "split"}])
@pytest.mark.parametrize("kept", [0, 1 << 14])
def test_a_list_has_the_rows_of_the_merged_files_whatever_its_parts(tmp_path, flags, kept, monkeypatch):
    monkeypatch.setattr("megatron.data.rows.dataset.IN_MEMORY_DOCUMENTS", kept)
    prefixes = write_shards(tmp_path / "shards", [20, 0, 1, 60, 40])
    merge([str(tmp_path / "shards")], str(tmp_path / "merged"))
    ways = [(str(tmp_path / "merged"),), (f"@{tmp_path / 'shards' / 'shards.txt'}",), tuple(prefixes),
            tuple(f"{prefix}.bin" for prefix in prefixes)]
    all_splits = [build_datasets(DataConfig(data_path=way, seq_length=64, split="8,1,1", **flags), VOCAB, 1)
                  for way in ways]
    expected = all_splits[0]
    for splits in all_splits[1:]:
        for part in ("train", "valid", "test"):
            merged, joined = getattr(expected, part), pickle.loads(pickle.dumps(getattr(splits, part)))
            count = merged.num_epoch_rows(0)
            assert joined.num_epoch_rows(0) == count > 0
            for left, right in zip(rows_of(merged, count + 3), rows_of(joined, count + 3), strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))
            assert "of 5 files" in joined.describe() and joined.describe().replace(" of 5 files", "") == (
                merged.describe())
            assert merged.documents.indexed.contents == joined.documents.indexed.contents


@pytest.mark.parametrize("sizes", [[2000, 3], [3, 0, 2000, 1]])
def test_joined_files_are_told_apart_as_the_merged_one_is(tmp_path, sizes):
    prefixes = write_shards(tmp_path / "shards", sizes)
    merge(prefixes, str(tmp_path / "merged"))
    joined, merged = open_corpus("x", tuple(prefixes)), open_corpus("y", (str(tmp_path / "merged"),))
    assert (joined.identity, joined.contents) == (merged.identity, merged.contents)
    assert joined.num_documents == merged.num_documents
    assert open_corpus("x", tuple(prefixes[::-1])).contents != joined.contents


def test_what_a_corpus_holds_is_read_once(tmp_path, monkeypatch):
    corpus = open_corpus("x", tuple(write_shards(tmp_path, [20, 3])))
    found = corpus.contents
    monkeypatch.setattr("megatron.data.corpus.joined.hashlib.sha256", pytest.fail)
    assert corpus.contents == found


def test_lists_are_weighted_as_prefixes_are_and_named_by_their_files(tmp_path):
    for name in ("one", "two"):
        write_shards(tmp_path / name, [30, 30])
        (tmp_path / name / "shards.txt").rename(tmp_path / name / f"{name}.txt")
    paths = [f"@{tmp_path / name / name}.txt" for name in ("one", "two")]
    train = build_datasets(DataConfig(data_path=("1", paths[0], "3", paths[1]), seq_length=64), VOCAB, 1).train
    assert list(corpora_of(train)) == ["one", "two"] and train.weights == [1, 3]


def test_a_list_with_weights_is_a_blend(tmp_path):
    (tmp_path / "list").write_text(f"0.5 a\n  1.5\tb c  # two words\n2 {tmp_path}/d#1\n")
    weights, corpora = parse_data_path([f"@{tmp_path / 'list'}"])
    assert weights == [Fraction(1, 2), Fraction(3, 2), 2]
    assert [corpus.prefixes for corpus in corpora] == [(f"{tmp_path}/{name}",) for name in ("a", "b c", "d#1")]


def test_a_list_may_begin_with_the_mark_of_utf_8(tmp_path):
    (tmp_path / "list").write_text("1 a\n2 b\n", encoding="utf-8-sig")
    assert parse_data_path([f"@{tmp_path / 'list'}"])[0] == [1, 2]


def test_prefixes_of_a_list_are_relative_to_its_folder(tmp_path, monkeypatch):
    write_shards(tmp_path / "shards", [5, 5])
    monkeypatch.chdir(tmp_path)
    assert parse_data_path(["@shards/shards.txt"])[1][0].prefixes == ("shards/s_0", "shards/s_1")


@pytest.mark.parametrize(("lines", "expected"), [
    ("# none\n", "names no prefix"), ("a\n1 b\n", "line 2 of .* has a weight"), ("1 a\nb\n", "line 2 of .* has no we"),
    ("a\n@b\n", "line 2 of .* names a list"), ("a\nb\n./a\n", "twice"), ("0 a\n1 b\n", "0 is not a weight")])
def test_a_malformed_list_is_refused(tmp_path, lines, expected):
    (tmp_path / "list").write_text(lines)
    with pytest.raises(ConfigError, match=expected):
        parse_data_path([f"@{tmp_path / 'list'}"])


def test_a_list_that_is_not_there_or_is_weighted_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_data_path([f"@{tmp_path / 'list'}"])
    (tmp_path / "list").write_text("1 a\n2 b\n")
    with pytest.raises(ConfigError, match="gives weights"):
        parse_data_path(["1", f"@{tmp_path / 'list'}", "2", "c"])


def test_parts_of_one_corpus_have_one_vocabulary(tmp_path):
    (tmp_path / "in.txt").write_text("MKVLAAGIV\n" * 9)
    for family in ("iupac", "esm"):
        preprocess(PreprocessConfig(input=(str(tmp_path / "in.txt"),), output_prefix=str(tmp_path / family),
                                    vocab_file=family))
    paths = tuple(f"{tmp_path / family}_text_document" for family in ("iupac", "esm"))
    with pytest.raises(DataError, match="different vocabularies"):
        build_datasets(DataConfig(data_path=paths, seq_length=64), VOCAB, 1)


def test_a_document_is_named_by_its_own_file(tmp_path):
    for name in "ab":
        write_indexed(tmp_path / name, [np.full(9, 6)] * 20)
    joined = open_corpus("x", (str(tmp_path / "a"), str(tmp_path / "b")))
    assert Documents(joined, range(5, 40)).place(20) == (str(tmp_path / 'b'), 5)


def test_clusters_of_several_files_are_those_of_the_merged_one(tmp_path):
    write_shards(tmp_path / "shards", [20, 30])
    for name, first, last in (("s_0", 0, 20), ("s_1", 20, 50)):
        (tmp_path / "shards" / f"{name}.names").write_text("".join(f"P{n}\n" for n in range(first, last)))
    merge([str(tmp_path / "shards")], str(tmp_path / "merged"))
    (tmp_path / "clusters.tsv").write_text("".join(f"P{n % 7}\tP{n}\n" for n in range(50)))
    lists, merged = (build_datasets(DataConfig(data_path=(path,), seq_length=64, split="1", blend_by="cluster",
                                               cluster_file=str(tmp_path / "clusters.tsv")), VOCAB, 1).train
                     for path in (f"@{tmp_path / 'shards' / 'shards.txt'}", str(tmp_path / "merged")))
    assert "7 clusters" in lists.describe()
    assert all(np.array_equal(a, b) for a, b in zip(dataclasses.astuple(lists[3]), dataclasses.astuple(merged[3]),
                                                    strict=True))
