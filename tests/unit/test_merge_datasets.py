"""Merged datasets have the bytes of preprocessing all inputs at once; refusals come before anything is written."""

import errno
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.data.corpus.indexed import open_indexed
from megatron.data.corpus.indexed_writer import IndexedWriter
from megatron.data.corpus.origin import corpus_vocabulary
from megatron.data.corpus.vocab import Vocab
from megatron.data.preprocess.flags import PreprocessConfig
from megatron.data.preprocess.merging import merge, natural_order
from megatron.data.preprocess.run import preprocess
from megatron.errors import DataError
from tests.indexed_files import write_indexed
from tests.unit.protein_files import PROTEINS, ROOT, as_fasta, as_json

TEXTS = {"s_2": ["MKVLAAGIV", "", "GGGG"], "s_10": ["ACDEFGHIKLMNPQRSTVWY"], "s_1": [*PROTEINS, "MK"]}
IN_ORDER = ("s_1", "s_2", "s_10")
VOCAB = Vocab.from_file()


def write(folder: Path, output: str, *names: str, **options) -> dict:
    """Preprocesses the texts of those names; gives the statistics."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.fasta").write_bytes(as_fasta(TEXTS[name]))
    return preprocess(PreprocessConfig(input=tuple(str(folder / f"{name}.fasta") for name in names),
                                       output_prefix=str(folder / output), overwrite=True, **options))


def shards(folder: Path, **options) -> Path:
    for name in TEXTS:
        write(folder, name, name, **options)
    return folder


@pytest.mark.parametrize("options", [
    {"dataset_impl": "mmap", "names": True}, {"dataset_impl": "cached"}, {"dataset_impl": "lazy", "append_eod": True},
    {"vocab_file": "esm", "min_length": 2}])
def test_a_merge_has_the_bytes_and_statistics_of_preprocessing_all_inputs_at_once(tmp_path, options, monkeypatch):
    monkeypatch.setattr("megatron.data.preprocess.merging._CHUNK_ITEMS", 3)
    at_once = write(tmp_path / "shards", "all", *IN_ORDER, **options)
    endings = [path.suffix for path in (tmp_path / "shards").glob("all_text_document.*")]
    expected = {ending: (tmp_path / "shards" / f"all_text_document{ending}").read_bytes() for ending in endings}
    for ending in endings:
        (tmp_path / "shards" / f"all_text_document{ending}").unlink()
    merge([str(shards(tmp_path / "shards", **options))], str(tmp_path / "merged"))
    assert {ending: (tmp_path / f"merged{ending}").read_bytes() for ending in endings} == expected
    assert not list(tmp_path.glob("*.partial"))
    merged = json.loads((tmp_path / "merged.stats.json").read_text())
    at_once = json.loads(json.dumps(at_once))
    for stats in (merged, at_once):
        for file in stats["outputs"]["text"]["files"]:
            file["path"] = Path(file["path"]).suffix
    assert [one["documents"] for one in merged.pop("merged")] == [
        open_indexed(str(tmp_path / "shards" / f"{name}_text_document")).num_documents for name in IN_ORDER]
    assert merged == at_once
    assert list(corpus_vocabulary(open_indexed(str(tmp_path / "merged"))).tokens) == at_once["vocabulary"]["tokens"]


def test_prefixes_and_bin_files_one_by_one_keep_their_order(tmp_path):
    shards(tmp_path)
    given = [str(tmp_path / f"{name}_text_document{ending}") for name, ending in (("s_10", ""), ("s_1", ".bin"))]
    merge(given, str(tmp_path / "out" / "merged"))
    merged = open_indexed(str(tmp_path / "out" / "merged"))
    assert merged.sizes.tolist() == [20, *map(len, TEXTS["s_1"])]


def test_other_dtypes_and_documents_of_several_sequences_are_joined_as_they_are(tmp_path):
    for name, ids in (("a", [6, 7, 8]), ("b", [9, 10, 11])):
        with IndexedWriter(tmp_path / name, dtype=np.dtype(np.int64)) as writer:
            writer.add(np.array(ids), np.array([1, 2]), np.array([0, 2]))
    merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "c"))
    merged = open_indexed(str(tmp_path / "c"))
    assert merged.dtype == np.int64 and merged.tokens.tolist() == [6, 7, 8, 9, 10, 11]
    assert merged.doc_idx.tolist() == [0, 0, 2, 2, 4] and merged.sizes.tolist() == [1, 2, 1, 2]


def test_without_statistics_the_output_names_its_vocabulary(tmp_path, capsys):
    for name in "ab":
        write_indexed(tmp_path / name, [np.array([6, 7])])
    merge([str(tmp_path)], str(tmp_path / "c"))
    assert "note: " in capsys.readouterr().out
    stats = json.loads((tmp_path / "c.stats.json").read_text())
    assert stats["vocabulary"]["tokens"] == list(corpus_vocabulary(open_indexed(str(tmp_path / "c"))).tokens)
    assert "options" not in stats


def test_preprocessing_over_a_merge_takes_its_statistics_away(tmp_path):
    shards(tmp_path, vocab_file="esm")
    merge([str(tmp_path / "s_1_text_document")], str(tmp_path / "all_text_document"))
    stats = write(tmp_path, "all", "s_1")
    found = corpus_vocabulary(open_indexed(str(tmp_path / "all_text_document")))
    assert list(found.tokens) == list(stats["vocabulary"]["tokens"])


def identity(prefix: Path) -> str:
    return corpus_vocabulary(open_indexed(str(prefix))).identity


def test_a_merge_and_preprocessing_of_one_prefix_keep_each_others_statistics(tmp_path):
    esm = Vocab.from_file("esm").identity
    shards(tmp_path / "shards", vocab_file="esm")
    merge([str(tmp_path / "shards")], str(tmp_path / "pfam"))
    of_merge = (tmp_path / "pfam.stats.json").read_bytes()
    for _ in range(2):
        write(tmp_path, "pfam", "s_1")
        assert (identity(tmp_path / "pfam"), identity(tmp_path / "pfam_text_document")) == (esm, VOCAB.identity)
        assert (tmp_path / "pfam.stats.json").read_bytes() == of_merge
    write(tmp_path, "other", "s_1", vocab_file="esm")
    write(tmp_path, "out", "s_2")
    merge([str(tmp_path / "out_text_document")], str(tmp_path / "other"), overwrite=True)
    assert (identity(tmp_path / "other"), identity(tmp_path / "other_text_document")) == (VOCAB.identity, esm)


def test_statistics_of_what_a_merge_has_replaced_come_back_to_nobody(tmp_path):
    write(tmp_path, "all", "s_1")
    shards(tmp_path / "shards", vocab_file="esm")
    merge([str(tmp_path / "shards")], str(tmp_path / "all_text_document"), overwrite=True)
    write(tmp_path, "all", "s_1", split_sentences=True)
    assert identity(tmp_path / "all_text_document") == Vocab.from_file("esm").identity


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other_dtype(folder: Path) -> None:
    write(folder, "s_3", "s_2", dataset_impl="cached")


@pytest.mark.parametrize(("damage", "expected"), [
    (lambda folder: (folder / "s_2_text_document.bin").unlink(), "s_2_text_document.bin: no such file"),
    (lambda folder: (folder / "s_2_text_document.idx").unlink(), "s_2_text_document.idx: no such file"),
    (lambda folder: os.truncate(folder / "s_2_text_document.bin", 4), "cut short or belongs to another dataset"),
    (lambda folder: os.truncate(folder / "s_2_text_document.idx", 50), "its header needs"),
    (lambda folder: flip_a_byte(folder / "s_2_text_document.bin"), "contents are not those"),
    (lambda folder: (folder / "s_2_text_document.names").unlink(), "names"),
    (lambda folder: (folder / "s_2.stats.json").write_text((folder / "s_2.stats.json").read_text().replace(
        '"kept"', '"left"')), "s_2.stats.json: it is damaged"),
    (lambda folder: (folder / "s_9.partial").mkdir(), "at work or was killed"),
    (other_dtype, "dtype"),
    (lambda folder: write(folder, "s_3", "s_2", vocab_file="esm", names=True), "vocabularies differ"),
    (lambda folder: write(folder, "s_3", "s_2", append_eod=True, names=True), "--append-eod"),
    (lambda folder: write(folder, "s_3", "s_2", max_length=50, names=True), "--max-length"),
])
def test_what_does_not_fit_together_is_refused_in_one_line_and_nothing_is_left(tmp_path, damage, expected):
    folder = shards(tmp_path / "shards", names=True)
    damage(folder)
    with pytest.raises(DataError, match=expected) as caught:
        merge([str(folder)], str(tmp_path / "merged"))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_outputs_of_two_keys_are_not_one_corpus(tmp_path):
    for key in ("seq", "text"):
        (tmp_path / "in.json").write_bytes(as_json(["MK"]).replace(b'"text"', f'"{key}"'.encode()))
        preprocess(PreprocessConfig(input=(str(tmp_path / "in.json"),), output_prefix=str(tmp_path / key),
                                    json_keys=(key,)))
    with pytest.raises(DataError, match="of the key 'seq', the other of 'text'"):
        merge([str(tmp_path)], str(tmp_path / "out" / "merged"))


def test_outputs_that_exist_or_are_inputs_are_spared(tmp_path):
    folder = shards(tmp_path / "shards")
    merge([str(folder)], str(tmp_path / "merged"))
    before = (tmp_path / "merged.bin").read_bytes()
    with pytest.raises(DataError, match="merged.bin is there already.*--overwrite"):
        merge([str(folder / "s_1_text_document")], str(tmp_path / "merged"))
    assert (tmp_path / "merged.bin").read_bytes() == before
    merge([str(folder / "s_1_text_document")], str(tmp_path / "merged"), overwrite=True)
    assert (tmp_path / "merged.bin").read_bytes() == (folder / "s_1_text_document.bin").read_bytes()
    with pytest.raises(DataError, match="is among the inputs"):
        merge([str(folder)], str(folder / "s_1_text_document"), overwrite=True)
    with pytest.raises(DataError, match="twice"):
        merge([str(folder), str(folder / "s_1_text_document")], str(tmp_path / "merged"), overwrite=True)


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    folder = shards(tmp_path / "shards")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DataError, match="GB are free"):
        merge([str(folder)], str(tmp_path / "merged"))
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_a_disk_that_fills_up_in_the_last_step_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def refuse(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    folder = shards(tmp_path / "shards")
    monkeypatch.setattr(IndexedWriter, "commit", refuse)
    with pytest.raises(DataError, match=r"merged: cannot be read or written \(No space left on device\); make room"):
        merge([str(folder)], str(tmp_path / "merged"))
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_natural_order_is_by_the_value_of_numbers():
    assert sorted(["x_10", "x_2", "10", "x", "9a"], key=natural_order) == ["9a", "10", "x", "x_2", "x_10"]
    for names in (["x_1", "x_01"], ["x_01", "x_1"]):
        assert sorted(names, key=natural_order) == ["x_01", "x_1"]


@pytest.mark.parametrize("options", [{"dedup": "exact"}, {}])
def test_merges_of_merges_are_merged(tmp_path, options):
    folder = shards(tmp_path / "shards", **options)
    one, two, ten = (str(folder / f"s_{number}_text_document") for number in (1, 2, 10))
    merge([one, two], str(tmp_path / "some"))
    merge([str(tmp_path / "some"), ten], str(tmp_path / "all"))
    merge([one, two, ten], str(tmp_path / "at_once"))
    stats = [json.loads((tmp_path / f"{name}.stats.json").read_text()) for name in ("all", "at_once")]
    assert stats[0]["options"] == stats[1]["options"] and (tmp_path / "all.bin").read_bytes() == (
        tmp_path / "at_once.bin").read_bytes()
    assert not options or stats[0]["options"]["dedup"] == "exact, in each of 3 datasets by itself"


def test_a_merge_of_datasets_without_statistics_is_merged_with_others(tmp_path):
    for name in "ab":
        write_indexed(tmp_path / name, [np.array([6, 7])])
    merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "c"))
    write(tmp_path, "s_2", "s_2")
    merge([str(tmp_path / "s_2_text_document"), str(tmp_path / "c")], str(tmp_path / "d"))
    assert open_indexed(str(tmp_path / "d")).num_documents == 5


def test_a_merge_beside_what_it_holds_is_refused_wherever_they_were_moved(tmp_path):
    folder = shards(tmp_path / "shards")
    merge([str(folder)], str(folder / "all"))
    for place in (folder, tmp_path / "moved"):
        folder.rename(place)
        folder = place
        with pytest.raises(DataError, match="all is a merge that holds .*s_1_text_document, whose proteins would"):
            merge([str(folder)], str(tmp_path / "merged"))
    merge([str(folder / "all"), str(shards(tmp_path / "others") / "s_2_text_document")], str(tmp_path / "merged"))


def test_the_tool_takes_megatrons_flags(tmp_path, monkeypatch, capsys):
    folder = shards(tmp_path / "shards")
    spec = importlib.util.spec_from_file_location("door", ROOT / "tools" / "merge_datasets.py")
    assert spec is not None and spec.loader is not None
    door = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(door)
    monkeypatch.setattr(sys, "argv", ["x", "--input", str(folder), "--output-prefix", str(tmp_path / "merged")])
    assert door.main() == 0 and "3 datasets, 11 proteins" in capsys.readouterr().out
    assert door.main() == 2 and "already" in capsys.readouterr().err
