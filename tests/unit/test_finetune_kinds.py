"""Labels in real tables: what is missing, written otherwise or unlike most is refused, or left out where asked."""

import numpy as np
import pytest

from megatron.finetune.data.labels import LabelSpace, class_counts
from megatron.finetune.data.record import shown_counts
from megatron.kernels.packed_sequence import NO_TARGET
from megatron.log import Log
from tests.unit.labelled_files import labels, loaded, refused
from tests.unit.test_finetune_labels import of

X = NO_TARGET


@pytest.mark.parametrize(("odd", "remedy"), [
    ("<0.1", "give a number, or leave the record out, as --skip-bad-records does"), ("12%", "give a number"),
    ("n.d.", "give a number"), ("0,13", "write a decimal point"), ("1,830.5", "write a decimal point")])
def test_a_label_that_is_no_number_makes_no_classes_of_numbers(tmp_path, odd, remedy):
    records = of("0.4", "0.5", odd, "0.5", sequences=("MKVA", "ACDEF", "GG", "MK"))
    message = refused(tmp_path, records)
    assert message.startswith(f"train.jsonl: line 3: the label '{odd}' is no number, while 3 of 4 labels are; {remedy}")
    assert message.endswith("; --label-kind class if they are classes")
    assert loaded(tmp_path, records, label_kind="class").space.class_names == tuple(sorted({"0.4", "0.5", odd}))
    assert "line 1: the label 'n.d.' is no number; give a number" in refused(tmp_path, of("0.1"), others=of("n.d."),
                                                                             label_kind="number")


@pytest.mark.parametrize("texts", [("0,4", "0,5", "0,5"), ("18.5%", "2%", "2%"), ("<1", "0.3", "<2")])
def test_numbers_that_are_all_written_otherwise_are_no_classes(tmp_path, texts):
    assert refused(tmp_path, of(*texts)).startswith(f"train.jsonl: line 1: the label {texts[0]!r} is no number")


def test_classes_some_of_which_look_like_numbers_stay_classes(tmp_path):
    assert loaded(tmp_path, of("1.1.1.1", "2.7.11", "3")).space.kind == "class"
    assert loaded(tmp_path, of("1;2", "3", "4")).space.kind == "classes"


@pytest.mark.parametrize("missing", ["nan", "NaN", "NA", "N/A", "None", "null"])
@pytest.mark.parametrize("others", [("yes", "no"), ("0.5", "0.7")])
def test_a_text_for_a_missing_value_is_a_missing_label_unless_it_is_said_to_be_a_class(tmp_path, missing, others):
    message = refused(tmp_path, of(others[0], missing, others[1]))
    assert message == (f"train.jsonl: line 2: the label is missing ({missing!r} stands for none; --label-kind class if "
                       "it is a class); give it, or leave the record out, as --skip-bad-records does")
    assert f"valid.jsonl: line 1: the label is missing ({missing!r} stands for none)" in refused(
        tmp_path, of(*others), others=of(missing))
    assert missing in loaded(tmp_path, of(others[0], missing), label_kind="class").space.class_names


def test_a_missing_label_is_told_in_terms_of_classes_only_where_there_may_be_several(tmp_path):
    remark = "of a protein of no class it is ; alone"
    assert remark in refused(tmp_path, of("a;b", None)) and remark not in refused(tmp_path, of(1.5, None))
    assert remark in refused(tmp_path, of(None), label_kind="classes")


@pytest.mark.parametrize(("values", "kind", "expected"), [
    ((1.5, None, 2), "number", [1.5, 2]), (("1.5", "NA", "2"), "number", [1.5, 2]),
    (("1.5", "2", "<2.5"), "number", [1.5, 2]), (("a", "", "b"), "class", [0, 1]),
    (("HEC", "HHCC", "E"), "residues", [[2, 1, 0], [2, 2, 0, 0]])])
def test_records_without_a_label_that_can_be_read_are_left_out_and_counted_where_asked(tmp_path, capsys, values, kind,
                                                                                       expected):
    records = [*of(*values), {"seq": "M1", "label": values[0]}]
    data = loaded(tmp_path, records, others=records, skips=True, log=Log())
    assert data.space.kind == kind
    for part in ("train", "valid"):
        assert [np.asarray(label).tolist() for label in labels(data, part)] == expected
    said = capsys.readouterr().out
    assert said.count("records of") == 2 == said.count(", 2 are left: bad label 1, not protein 1")
    assert "no protein is left (skipped: bad label 1)" in refused(tmp_path, of(None), skips=True)


@pytest.mark.parametrize(("values", "hint"), [
    (("0", "1", "1"), "there are only 2 different ones, all whole"), ((0, 1.0, 2), "only 3 different ones, all whole"),
    (("1.1", "1.10", "2.3"), "the labels 1.1 and 1.10 are read as the same number"),
    (("0.5", "1", "0.5"), None), (tuple(range(11)), None), (("a", "b", "a"), None)])
def test_numbers_that_may_be_classes_are_said_to_be_read_as_numbers(tmp_path, capsys, values, hint):
    records = of(*values, sequences=["MKVLAA"] * len(values))
    loaded(tmp_path, records, log=Log())
    said = capsys.readouterr().out
    assert said == "" if hint is None else said.startswith("note: ") and f"{hint}; --label-kind class if" in said
    loaded(tmp_path, records, label_kind="class" if values[0] == "a" else "number", log=Log())
    assert "--label-kind" not in capsys.readouterr().out


def test_labels_are_counted_for_each_class(tmp_path):
    counts = {kind: class_counts(LabelSpace(kind, tuple("abc")), labels).tolist() for kind, labels in (
        ("class", [0, 0, 2]), ("residues", [np.array([0, X, 1]), np.array([1])]),
        ("classes", [np.array([True, False, True]), np.array([True, False, False])]))}
    assert counts == {"class": [2, 0, 1], "residues": [1, 2, 0], "classes": [2, 0, 1]}
    assert shown_counts([f"c{place}" for place in range(14)], [1000] * 14) == ", ".join(
        f"c{place} 1,000" for place in range(12)) + ", …"
