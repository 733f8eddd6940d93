"""Labels in files: their kind is detected, they are read as the model learns them, or refused."""

import json
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from megatron.config.declaration import with_tuples
from megatron.finetune.data.contacts import pairs_in, table_of_atoms
from megatron.finetune.data.labels import LabelSpace, class_weights
from megatron.finetune.data.record import ProteinRecord
from megatron.infer.contacts import chains
from megatron.kernels.packed_sequence import NO_TARGET
from tests.unit.labelled_files import labels, loaded, refused

X = NO_TARGET


def of(*values, sequences=("MKV", "ACDE", "GG")):
    return [{"seq": sequence, "label": value} for sequence, value in zip(sequences, values, strict=False)]


@pytest.mark.parametrize(("values", "kind", "names", "expected"), [
    ((1.5, -2, 0), "number", (), [1.5, -2.0, 0.0]),
    (("1.5", "-2e1", " 3"), "number", (), [1.5, -20.0, 3.0]),
    (([0.5], [1], [2.5]), "number", (), [0.5, 1.0, 2.5]),
    (("b", "a", "b"), "class", ("a", "b"), [1, 0, 1]),
    ((True, False, True), "class", ("False", "True"), [1, 0, 1]),
    (("3", "a", "b"), "class", ("3", "a", "b"), [0, 1, 2]),
    (("x;y", "y", "z; x"), "classes", ("x", "y", "z"), [[1, 1, 0], [0, 1, 0], [1, 0, 1]]),
    (("x;y", ";", "z"), "classes", ("x", "y", "z"), [[1, 1, 0], [0, 0, 0], [0, 0, 1]]),
    ((["x", "y"], [], ["z"]), "classes", ("x", "y", "z"), [[1, 1, 0], [0, 0, 0], [0, 0, 1]]),
    (([10, 9], [9], [2]), "classes", ("2", "9", "10"), [[0, 1, 1], [0, 1, 0], [1, 0, 0]]),
    (("HEC", "HHCC", "EE"), "residues", ("C", "E", "H"), [[2, 1, 0], [2, 2, 0, 0], [1, 1]]),
    (("012", "0011", "10"), "residues", ("0", "1", "2"), [[0, 1, 2], [0, 0, 1, 1], [1, 0]]),
    (("1.5", "0.11", "10"), "number", (), [1.5, 0.11, 10.0]),
    ((["a", None, "b"], ["a"] * 4, [-1, "b"]), "residues", ("a", "b"), [[0, X, 1], [0] * 4, [X, 1]])])
def test_the_kind_of_labels_is_told_from_them_and_each_is_read(tmp_path, values, kind, names, expected):
    data = loaded(tmp_path, of(*values))
    assert (data.space.kind, data.space.class_names) == (kind, names)
    assert [np.asarray(label).tolist() for label in labels(data)] == expected
    assert LabelSpace(**with_tuples(json.loads(json.dumps(asdict(data.space))))) == data.space


def test_numbers_are_classes_if_it_is_said(tmp_path):
    data = loaded(tmp_path, of(10, 9.0, "2"), label_kind="class")
    assert (data.space.class_names, labels(data)) == (("2", "9", "10"), [2, 1, 0])
    assert "line 1: 1.5 is no class; expected text or a whole number" in refused(tmp_path, of(1.5, 2, 3),
                                                                                 label_kind="class")


def pairs_of(table):
    """The pairs that touch, in order, and which residues are resolved."""
    touching = [(place, place + offset) for place, row in enumerate(table.tolist()) for offset in row[1:] if offset]
    return touching, table[:, 0].tolist()


def test_contacts_by_coordinates_are_nearer_than_8_angstrom_and_what_is_masked_or_unknown_is_unresolved(tmp_path):
    rng = np.random.default_rng(0)
    places = rng.normal(scale=5.0, size=(20, 3)).round(3).tolist()
    places[4] = None
    mask = [1] * 19 + [0]
    data = loaded(tmp_path, [{"seq": "M" * 20, "label": places}, {"seq": "M" * 20, "label": places, "mask": mask}])
    assert data.space.kind == "contacts"
    for table, last in zip(labels(data), (20, 19), strict=True):
        expected = [(i, j) for i in range(20) for j in range(i + 6, last) if 4 not in (i, j)
                    and np.linalg.norm(np.subtract(places[i], places[j])) < 8]
        assert len(expected) > 10
        assert pairs_of(table) == (expected, [int(place != 4 and place < last) for place in range(20)])


@pytest.mark.parametrize("first", [0, 1])
def test_contacts_may_be_lists_of_pairs_whose_first_residue_is_told(tmp_path, first):
    pairs = [[first + 11, first], [first, first + 11], [first, first + 6], [first, first + 5], [first + 2, first + 9]]
    data = loaded(tmp_path, [{"seq": "M" * 12, "label": pairs, "mask": "1" * 11 + "0"}, {"seq": "MKV", "label": []}],
                  pairs_from=first)
    assert data.space.kind == "contacts"
    assert pairs_of(labels(data)[0]) == ([(0, 6), (0, 11), (2, 9)], [1] * 11 + [0])
    assert pairs_of(labels(data)[1]) == ([], [1] * 3)


@pytest.mark.parametrize(("label", "first", "message"), [
    ([[0, 7]], None, "the label [[0, 7]] lists pairs, in which the first residue is 0 or 1; --pairs-from says which"),
    ([[0, 7]], 1, "the label has the pair [0, 7]; expected two of the residues 1 to 8"),
    ([[1, 7], [8, 1]], 0, "the label has the pair [8, 1]; expected two of the residues 0 to 7"),
    ([[1, 2.5]], 0, "the label has the pair [1, 2.5]; expected two of the residues"),
    ([[1, True]], 0, "the label has the pair [1, True]; expected two"),
    ([[1, 2, 3]], 0, "8 residues, but 1 places in the label"),
    ([], None, "the label [] is neither a place [x, y, z], or null, for each residue, nor a list of pairs"),
    (None, 0, "the label is missing")])
def test_pairs_that_cannot_be_are_refused(tmp_path, label, first, message):
    records = [{"seq": "MKVLACDE", "label": label}]
    assert refused(tmp_path, records, label_kind="contacts", pairs_from=first).startswith(
        f"train.jsonl: line 1: {message}")


def test_contacts_of_a_table_are_those_of_its_coordinates():
    rng = np.random.default_rng(1)
    atoms = np.cumsum(rng.normal(scale=2.0, size=(30, 3)), axis=0).astype(np.float32)
    atoms[[3, 20]] = np.nan
    for length in (30, 18):  # the whole, and its beginning
        expected, found = chains.pairs_of(torch.from_numpy(atoms[:length])), pairs_in(table_of_atoms(atoms)[:length])
        assert expected.touches_p.any()
        for name, tensor in vars(expected).items():
            assert torch.equal(tensor, getattr(found, name))


@pytest.mark.parametrize(("values", "expected"), [
    (([1.5, None, 2], [0, 0, 0.25, 1], [3.0, 4]), [[1.5, np.nan, 2], [0, 0, 0.25, 1], [3, 4]]),
    (("1.5;;2", "0;0;.25;1", "3;4e1"), [[1.5, np.nan, 2], [0, 0, 0.25, 1], [3, 40]])])
def test_numbers_of_residues_are_told_from_lists_that_are_as_long(tmp_path, values, expected):
    data = loaded(tmp_path, of(*values))
    assert (data.space.kind, data.space.class_names) == ("numbers", ())
    for label, one in zip(labels(data), expected, strict=True):
        assert label.dtype == np.float32
        np.testing.assert_array_equal(label, np.float32(one))
    masked = loaded(tmp_path, [{"seq": "MKV", "label": [5, 6, "?"], "mask": "010"}], label_kind="numbers")
    np.testing.assert_array_equal(labels(masked)[0], [np.nan, 6, np.nan])


@pytest.mark.parametrize("mask", ["0110", [0, 1, 1, 0], [False, True, True, False], [0.0, 1.0, 1.0, 0.0]])
def test_residues_that_a_mask_leaves_out_have_no_label_and_give_no_class(tmp_path, mask):
    data = loaded(tmp_path, [{"seq": "MKVL", "label": "?HE?", "ok": mask}], mask_key="ok")
    assert (data.space.class_names, labels(data)[0].tolist()) == (("E", "H"), [X, 1, 0, X])


def test_gaps_of_a_sequence_have_no_label(tmp_path):
    assert labels(loaded(tmp_path, [{"seq": "M-KV*", "label": "HEC"}], label_kind="residues"))[0].tolist() == [2, 1, 0]


@pytest.mark.parametrize(("records", "message"), [
    (of("a", "", "b"), "train.jsonl: line 2: the label is missing"),
    (of("a", None, "b"), "train.jsonl: line 2: the label is missing"),
    ([*of("a", "b"), {"seq": "MK", "y": 1}], "train.jsonl: line 3: no label under 'label' or 'labels' or 'target'; it "
                                             "has 'seq', 'y'. --label-key names it"),
    ([*of(1), {"id": 3, "label": 2}], "train.jsonl: line 2: no sequence under 'primary' or 'seq'"),
    (of(1, float("nan")), "train.jsonl: line 2: the label is nan; expected a finite number"),
    (of("1", "-inf"), "train.jsonl: line 2: the label is -inf; expected a finite number"),
    (of(1.5, "a"), "train.jsonl: line 2: the label 'a' is of another kind than those before it (number); --label-kind"),
    (of("a", {"b": 1}), "train.jsonl: line 2: the label {'b': 1} is of another kind"),
    (of("a", "a"), "train.jsonl: line 1: all labels of the training file are of the class a; there is nothing to"),
    ([{"seq": "MK1", "label": 1}], "train.jsonl: line 1, column 3 of the sequence: '1' is not a residue"),
    ([{"seq": "M*K", "label": 1}], "train.jsonl: line 1, column 2 of the sequence: an internal stop"),
    ([{"seq": "", "label": 1}], "train.jsonl: line 1: the sequence has no residue"),
    ([{"seq": 5, "label": 1}], "train.jsonl: line 1: the sequence is of type int; expected text of residues"),
    ([], "train.jsonl: is empty; expected proteins as JSON lines")])
def test_a_bad_record_is_one_line_that_names_file_and_place(tmp_path, records, message):
    assert refused(tmp_path, records).startswith(message)


@pytest.mark.parametrize(("good", "odd", "found", "kind"), [
    ("HEC", "HHCC", "has 4 letters for 3 residues", "class"), ("HEC", "HE", "has 2 letters for 3 residues", "class"),
    ("010", "0110", "has 4 letters for 3 residues", "number"), ("HEC", 5, "is one value for 3 residues", "class"),
    (["a", "b", "a"], ["a"], "has 1 items for 3 residues", "classes"), ([1, 2, 2], [1, 2], "has 2 items", "classes"),
    ("1.5;2;3", "1.5;2", "has 2 items for 3 residues", "classes"), ([.5, 1, 2], [.5, 1], None, None)])
def test_a_label_that_is_not_as_long_as_its_protein_where_others_are_is_refused(tmp_path, good, odd, found, kind):
    records = [{"seq": "MKV", "label": label} for label in (good, good, odd, good, odd)]
    message = refused(tmp_path, records)
    if found is None:
        assert message.startswith(f"train.jsonl: line 3: the label {odd} is of another kind than those before it (")
    else:
        assert message.startswith(f"train.jsonl: line 3: the label {found}") and "(so in 2 records)" in message
        assert message.endswith(f"while 3 of the labels are as long as their sequences; mend it, or give --label-kind "
                                f"{kind} if that is the kind")
        assert loaded(tmp_path, records, label_kind=kind).space.kind == kind


def test_labels_that_are_nearly_all_different_are_no_classes_unless_it_is_said(tmp_path):
    records = [{"seq": "MKVLA", "label": f"L{number}"} for number in range(100)]
    message = refused(tmp_path, records + records[:5])
    assert message.startswith("train.jsonl: line 1: 105 labels of the training file are 100 different texts (L0, L1, "
                              "L10, ")
    assert ", … (100 in all)), too many for classes; this one has 2 letters for 5 residues. --label-kind" in message
    assert len(loaded(tmp_path, records, label_kind="class").space.class_names) == 100
    assert loaded(tmp_path, records * 2).space.kind == "class"
    message = refused(tmp_path, records * 2, others=of("c"))
    assert message.startswith("valid.jsonl: line 1: the class 'c' is none of the training file's (L0, L1, ")
    assert message.endswith(", … (100 in all))")


def test_long_labels_are_shown_in_short_and_gaps_that_make_lengths_differ_are_named(tmp_path):
    generator = np.random.default_rng(0)
    records = [{"seq": "MKV-LA." * 20, "label": "".join(generator.choice(list("HEC"), 140))} for _ in range(30)]
    message, gaps = refused(tmp_path, records), "residues (gaps, - or ., are none, and the sequence has {})"
    assert "this one has 140 letters for 100 " + gaps.format(40) in message and len(message) < 350
    for label, mask, odd in (("HE", "111", "a mask of 3"), ("HEC", None, "3 classes in the label")):
        found = refused(tmp_path, [{"seq": "MK-", "label": label, "mask": mask}], label_kind="residues")
        assert f"2 {gaps.format(1)}, but {odd}" in found
    assert "gap" not in refused(tmp_path, [{"seq": "MK-", "label": "HECH"}], label_kind="residues")


@pytest.mark.parametrize(("kind", "record", "message"), [
    ("number", {"label": "high"}, "the label 'high' is no number"),
    ("number", {"label": True}, "the label True is no number"),
    ("number", {"label": [1.0, 2.0]}, "the label [1.0, 2.0] is no number"),
    ("residues", {"label": "HE"}, "3 residues, but 2 classes in the label"),
    ("residues", {"label": 5}, "the label 5 is neither text nor a list with a class for each residue"),
    ("residues", {"label": [[1], [2], [3]]}, "the label [[1], [2], [3]] has no class for some residue"),
    ("residues", {"label": ["a", 1.5, "b"]}, "1.5 is no class"),
    ("residues", {"label": "HEC", "mask": "11"}, "3 residues, but a mask of 2"),
    ("residues", {"label": "HEC", "mask": "1?1"}, "the mask has '?'; expected 0 or 1 for each residue"),
    ("residues", {"label": "HEC", "mask": [1, None, [2]]}, "the mask has None; expected 0 or 1"),
    ("residues", {"label": "HEC", "mask": 1}, "the mask 1 is neither text nor a list"),
    ("contacts", {"label": [[0, 1, 2]] * 2}, "3 residues, but 2 places in the label"),
    ("contacts", {"label": [[0, 1, 2], [0, 1], None]}, "the label [[0, 1, 2], [0, 1], [nan, nan, nan]] is neither"),
    ("contacts", {"label": 7}, "the label 7 is neither a place"),
    ("numbers", {"label": [1, 2]}, "3 residues, but 2 numbers in the label"),
    ("numbers", {"label": 1.5}, "the label 1.5 is no list with a number, or null, for each residue"),
    ("numbers", {"label": [1, "high", 2]}, "the label has 'high' for residue 2; expected a number, or null where"),
    ("numbers", {"label": [1, 2, float("inf")]}, "the label has inf for residue 3; expected a number"),
    ("numbers", {"label": None}, "the label is missing"),
    ("contacts", {"label": [[0, 1, float("inf")]] * 3}, "a place of the label is infinite")])
def test_a_label_of_another_form_than_was_said_is_refused(tmp_path, kind, record, message):
    assert refused(tmp_path, [{"seq": "MKV", **record}], label_kind=kind).startswith(f"train.jsonl: line 1: {message}")


def test_a_class_that_training_has_not_is_refused_elsewhere(tmp_path):
    message = refused(tmp_path, of("a", "b"), others=of("a", "c"), name="own")
    assert message == "valid.jsonl: line 2: the class 'c' is none of the training file's (a, b)"
    message = refused(tmp_path, [{"seq": "MK", "ss3": "HQ"}], name="secondary_structure")
    assert message == "train.jsonl: line 1: the class 'Q' is none of the task's (H, E, C)"
    message = refused(tmp_path, [{"seq": "MK", "ss3": [0, 3]}], name="secondary_structure")
    assert message == "train.jsonl: line 1: the class '3' is none of the task's (H, E, C)"


def test_a_class_of_many_is_found_without_a_search_and_what_finds_it_is_not_written():
    class Unsearched(tuple):
        __contains__ = index = None

    space = LabelSpace("class", Unsearched(map(str, range(1000))))
    record = ProteinRecord("a place", "a", np.zeros(1, np.uint8))
    assert [space.index(record, value) for value in ("999", 3)] == [999, 3]
    assert asdict(LabelSpace("class", ("a", "b"))).keys() == asdict(space).keys() == {
        item.name for item in fields(LabelSpace)}


def test_balanced_weights_are_scikit_learns(tmp_path):
    rng = np.random.default_rng(0)
    classes = rng.choice(4, size=200, p=[0.6, 0.3, 0.05, 0.05])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=classes)
    assert class_weights(LabelSpace("class", tuple("abcd")), classes) == pytest.approx(expected)
    of_residues = [np.append(part, X) for part in np.split(classes, [30, 90])]
    assert class_weights(LabelSpace("residues", tuple("abcd")), of_residues) == pytest.approx(expected)
    assert class_weights(LabelSpace("class", tuple("abcde")), classes)[4] == 0
    several = rng.random((50, 3)) < [0.5, 0.1, 0]
    weights = class_weights(LabelSpace("classes", tuple("abc")), list(several))
    assert weights == pytest.approx([(~several[:, c]).sum() / max(several[:, c].sum(), 1) * (c < 2) for c in range(3)])
