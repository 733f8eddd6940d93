"""Files of TAPE and of others with the same tasks: found by name, read in every format, distinguished by their keys."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from megatron.errors import ConfigError, DataError
from megatron.finetune.data.examples import load_task, read_proteins
from megatron.finetune.data.tasks import TASKS, split_files, task_of
from megatron.finetune.flags import TaskConfig, task_and_files
from megatron.kernels.packed_sequence import NO_TARGET
from megatron.log import Log
from tests.unit.labelled_files import TOKENIZER, json_lines, labels, lmdb, loaded

DOWNSTREAM = Path(__file__).resolve().parents[3] / "shared" / "data" / "downstream"
PLACES = np.array([[0, 0, 0], [3, 0, 0], [0, 0, 0]], dtype=np.float32)

# A record of each of TAPE's tasks as its LMDBs have it, and its label as it is read.
TAPE = {
    "secondary_structure": ({"ss3": np.array([0, 2, 1]), "ss8": np.array([1, 7, 4]), "valid_mask": np.array([1., 1, 0]),
                             "evolutionary": np.zeros((3, 30), np.float32)}, [0, 2, NO_TARGET]),
    "secondary_structure_8": ({"ss3": np.array([0, 2, 1]), "ss8": np.array([1, 7, 4])}, [1, 7, 4]),
    "contacts": ({"tertiary": PLACES, "valid_mask": np.array([True, True, False])},
                 [[1], [1], [0]]),  # no pair of so few residues counts
    "fluorescence": ({"log_fluorescence": np.array([3.5], np.float32), "num_mutations": 1}, 3.5),
    "stability": ({"stability_score": np.array([-0.5], np.float32), "topology": "HHH"}, -0.5),
}


def as_json(value):
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("name", TAPE)
def test_tapes_lmdbs_and_json_files_are_read(tmp_path, name):
    fields, expected = TAPE[name]
    record = {"primary": "MKV", "protein_length": 3, "id": b"1abc", **fields}
    task, stem = task_of(name), TASKS[name].stems[0]
    (tmp_path / stem).mkdir()
    lmdb(tmp_path / stem / f"{stem}_train.lmdb", [record])
    data = load_task(task, split_files(task, str(tmp_path)), TOKENIZER)
    assert [example.name for example in data.parts["train"]] == ["1abc"]
    np.testing.assert_array_equal(labels(data)[0], expected)
    plain = {key: as_json(value) for key, value in record.items() if key != "id"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / f"{stem}_train.json").write_text(json.dumps([plain]))
    np.testing.assert_array_equal(
        labels(load_task(task, split_files(task, str(tmp_path / "other")), TOKENIZER))[0], expected)


def test_folds_are_classes_in_the_order_of_their_numbers(tmp_path):
    records = [{"primary": "MKV", "fold_label": np.int64(fold), "family_label": fold // 2} for fold in (11, 2, 0, 11)]
    files = {"train": str(lmdb(tmp_path / "remote_homology_train.lmdb", records))}
    data = load_task(task_of("remote_homology"), files, TOKENIZER)
    assert (data.space.class_names, labels(data)) == (("0", "2", "11"), [2, 1, 0, 2])
    families = load_task(task_of("remote_homology", label_key="family_label"), files, TOKENIZER)
    assert (families.space.class_names, labels(families)) == (("0", "1", "5"), [2, 1, 0, 2])


def test_letters_and_numbers_of_structure_mean_the_same(tmp_path):
    letters = loaded(tmp_path, [{"seq": "MKV", "ss3": "HCE", "mask": "110"}], name="secondary_structure")
    numbers = loaded(tmp_path, [{"seq": "MKV", "ss3": [0, 2, 1], "mask": [1, 1, 0]}], name="secondary_structure")
    assert labels(letters)[0].tolist() == labels(numbers)[0].tolist() == [0, 2, NO_TARGET]
    eight = loaded(tmp_path, [{"seq": "MKV", "ss8": "H-C"}], name="secondary_structure_8")
    assert labels(eight)[0].tolist() == [1, NO_TARGET, 7]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl.gz", "parquet"])
def test_ones_own_labels_are_read_from_every_kind_of_file(tmp_path, ending):
    rows = [("MKV", 1.5), ("ACD", -2.0)]
    path = tmp_path / f"mine.{ending}"
    if ending in ("csv", "tsv"):
        mark = {"csv": ",", "tsv": "\t"}[ending]
        path.write_text(f"protein{mark}y\n" + "".join(f"{seq}{mark}{y}\n" for seq, y in rows))
    elif ending == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"protein": [seq for seq, _ in rows], "y": [y for _, y in rows]}), path)
    else:
        json_lines(path, [{"protein": seq, "y": y} for seq, y in rows])
        path.write_bytes(gzip.compress(path.read_bytes()))
    config = TaskConfig(train_data=str(path), test_data=(str(path),), sequence_key="protein", label_key="y")
    data = load_task(*task_and_files("own", config), TOKENIZER)
    assert labels(data) == labels(data, "test") == [1.5, -2.0]
    assert [example.ids.tolist() for example in data.parts["train"]] == [TOKENIZER.encode(seq).tolist()
                                                                         for seq, _ in rows]
    assert [example.name for example in data.parts["train"]] == ["1", "2"]


def test_files_are_found_in_order_by_their_parts(tmp_path):
    task = task_of("secondary_structure")
    for name in ("valid.jsonl.gz", "train.jsonl.gz", "test_cb513.jsonl.gz", "test.csv", "README.md", "train_more.txt"):
        (tmp_path / name).touch()
    assert [*split_files(task, str(tmp_path))] == ["train", "valid", "test", "test_cb513"]
    (tmp_path / "secondary_structure_train.lmdb").touch()
    with pytest.raises(DataError, match="of the part train, secondary_structure_train.lmdb and train.jsonl.gz; move"):
        split_files(task, str(tmp_path))
    within = tmp_path / "unpacked" / "secondary_structure"
    within.mkdir(parents=True)
    expected = {part: str(within / f"secondary_structure_{part}.lmdb")
                for part in ("train", "valid", "casp12", "cb513", "ts115")}
    for path in expected.values():
        Path(path).mkdir()
    found = split_files(task, str(tmp_path / "unpacked"))
    assert (found, [*found]) == (expected, [*expected])
    with pytest.raises(DataError, match=f"{tmp_path / 'nowhere'}: holds no training file of stability; expected stab"):
        split_files(task_of("stability"), str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("name", "flags", "message"), [
    ("folding", {"data": "x"}, "the task is folding; it must be one of secondary_structure, .*own"),
    ("own", {}, "--data is missing; give the folder of the task's files, or --train-data FILE"),
    ("own", {"data": "x", "train_data": "y", "test_data": ("z",)},
     "--data x and --train-data and --test-data exclude each other"),
    ("own", {"train_data": "y", "test_data": ("a/x.csv", "b/x.csv")}, "--test-data names two files x"),
    ("stability", {"label_kind": "class", "train_data": "y"}, "--label-kind is class, but the labels of stability are"),
])
def test_flags_that_do_not_go_together_are_refused(name, flags, message):
    with pytest.raises(ConfigError, match=message):
        task_and_files(name, TaskConfig(**flags))


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}/none.csv: no such file"):
        load_task(task_of("own"), {"train": f"{tmp_path}/none.csv"}, TOKENIZER)


def test_proteins_without_labels_are_read_from_fasta_too(tmp_path):
    (tmp_path / "in.fasta").write_text(">sp|P1|A of man\nMK\nV\n>P2\nA\n")
    proteins = read_proteins(str(tmp_path / "in.fasta"), task_of("own"), TOKENIZER, False, Log())
    assert [(protein.name, len(protein.ids), protein.label) for protein in proteins] == [("sp|P1|A", 3, None),
                                                                                       ("P2", 1, None)]


def test_proteins_are_named_by_the_column_that_is_said(tmp_path):
    (tmp_path / "in.csv").write_text("id,entry,seq\n1,P1,MKV\n2,,AC\n")
    arguments = (str(tmp_path / "in.csv"), task_of("own"), TOKENIZER, False, Log())
    assert [one.name for one in read_proteins(*arguments, name_key="entry")] == ["P1", "2"]
    assert [one.name for one in read_proteins(*arguments)] == ["1", "2"]
    with pytest.raises(DataError, match="line 2: no name under 'none'; it has 'id', 'entry', 'seq'. --name-key names"):
        read_proteins(*arguments, name_key="none")


def test_a_column_is_found_in_another_case_if_only_one_is_meant(tmp_path):
    (tmp_path / "in.csv").write_text("ID,Sequence,Label\nP1,MKV,0.5\nP2,AC,0.7\n")
    (tmp_path / "two.csv").write_text("Sequence,SEQUENCE,label\nMKV,AAA,1\nMK,AA,2\n")
    (tmp_path / "exact.csv").write_text("SEQ,sequence,Label,label\nAAA,MKV,1,3\nAA,MK,2,4\n")
    files = {"train": str(tmp_path / "in.csv"), "valid": str(tmp_path / "exact.csv")}
    data = load_task(task_of("own"), files, TOKENIZER)
    assert [(one.name, len(one.ids), one.label) for one in data.parts["train"]] == [("P1", 3, 0.5), ("P2", 2, 0.7)]
    assert data.parts["valid"][0].ids.tolist() == TOKENIZER.encode("MKV").tolist() and labels(data, "valid") == [3, 4]
    assert read_proteins(str(tmp_path / "in.csv"), task_of("own"), TOKENIZER, False, Log())[1].name == "P2"
    with pytest.raises(DataError, match="no sequence under .*; it has 'Sequence', 'SEQUENCE', 'label'"):
        load_task(task_of("own"), {"train": str(tmp_path / "two.csv")}, TOKENIZER)


def test_a_key_that_is_not_there_is_told_with_each_that_was_looked_for_once(tmp_path):
    (tmp_path / "in.csv").write_text("protein\nMKV\n")
    with pytest.raises(DataError, match="no sequence under 'primary' or 'seq' or 'sequence' or 'text'; it has "
                                        "'protein'. --sequence-key names it"):
        read_proteins(str(tmp_path / "in.csv"), task_of("own"), TOKENIZER, False, Log())
    assert len(read_proteins(str(tmp_path / "in.csv"), task_of("own"), TOKENIZER, False, Log(), "protein")[0].ids) == 3


@pytest.mark.skipif(not DOWNSTREAM.exists(), reason=f"{DOWNSTREAM} is not there")
@pytest.mark.parametrize(("name", "folder", "keys", "kind", "num_classes", "sizes"), [
    ("secondary_structure", "secondary_structure", {}, "residues", 3, (9712, 1080, 364, 513)),
    ("remote_homology", "remote_homology", {}, "class", 1195, (12312, 736, 718)),
    ("fluorescence", "fluorescence", {}, "number", 0, (21446, 5362, 27217)),
    ("stability", "stability", {}, "number", 0, (53614, 2512, 12851)),
    ("contacts", "contacts", {}, "contacts", 0, (782, 101, 157)),
    ("secondary_structure_8", "contacts", {}, "residues", 8, (782, 101, 157)),
    ("own", "localisation_deeploc", {"label_key": "location"}, "class", 10, (2768, 1655, 490)),
    ("own", "go_localisation", {}, "class", 8, (4657, 630))])
def test_the_real_files_of_all_tasks_are_read_whole(name, folder, keys, kind, num_classes, sizes):
    config = TaskConfig(data=str(DOWNSTREAM / folder), **keys)
    data = load_task(*task_and_files(name, config), TOKENIZER)
    assert (data.space.kind, len(data.space.class_names)) == (kind, num_classes)
    assert tuple(len(part) for part in data.parts.values()) == sizes
