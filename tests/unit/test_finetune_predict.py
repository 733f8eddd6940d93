"""The files of predictions, and the flags of fine-tuning."""

import csv
import json
from contextlib import nullcontext
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron.config import Config
from megatron.errors import ConfigError, DataError, UserError
from megatron.finetune.data.examples import Example
from megatron.finetune.data.labels import LabelSpace
from megatron.finetune.flags import _TAKEN, parse_flags
from megatron.finetune.predictions import files
from megatron.finetune.predictions.files import _record, _write, predict
from megatron.finetune.run import check_data, run
from megatron.infer.contacts.output import best_pairs
from megatron.log import Log
from megatron.parallel.mesh import Mesh
from tests.tasks import SPACES
from tests.unit.labelled_files import loaded

PROTEINS = [Example("first, of two", np.zeros(8, dtype=np.uint8)), Example("b", np.zeros(7, dtype=np.uint8))]
CONTACTS = np.zeros((8, 8), dtype=np.float32)
CONTACTS[0, 7], CONTACTS[1, 7], CONTACTS[0, 1] = 0.9, 0.5, 1.0  # the last is too near to count
PAIRS = [best_pairs(CONTACTS, None), best_pairs(CONTACTS[:7, :7], None)]
VALUES = {
    "number": [1.5, -2.0], "class": [np.array([0.25, 0.5, 0.25]), np.array([0.75, 0.125, 0.125])],
    "classes": [np.array([0.5, 0.25, 0.75]), np.array([0.125, 0.0, 0.25])],
    "residues": [np.eye(3)[[0, 1, 2, 0, 1, 2, 0, 1]], np.eye(3)[[2] * 7]],
    "numbers": [np.arange(8) / 4, np.full(7, -0.5)], "contacts": PAIRS}
PREDICTED = {
    "numbers": [[0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75], [-0.5] * 7],
    "number": [1.5, -2.0], "class": ["b", "a"], "classes": [["a", "c"], []], "residues": ["abcabcab", "ccccccc"],
    "contacts": [[[1, 8], [2, 8], [1, 7]], [[1, 7]]]}
CELLS = PREDICTED | {"numbers": ["0.0;0.25;0.5;0.75;1.0;1.25;1.5;1.75", ";".join(["-0.5"] * 7)],
                     "number": ["1.5", "-2.0"], "classes": ["a;c", ";"], "contacts": ["1-8;2-8;1-7", "1-7"]}


@pytest.mark.parametrize("kind", VALUES)
def test_json_lines_have_each_prediction_with_its_probabilities(kind, tmp_path):
    _write(tmp_path / "out.jsonl", SPACES[kind], PROTEINS, VALUES[kind])
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(one["name"], one["prediction"]) for one in found] == [
        (protein.name, value) for protein, value in zip(PROTEINS, PREDICTED[kind], strict=True)]
    if kind in ("number", "numbers"):
        assert "probabilities" not in found[0]
    elif kind == "contacts":
        assert found[0]["probabilities"] == pytest.approx([0.9, 0.5, 0.0])
    else:
        assert list(found[0]["probabilities"].values()) == VALUES[kind][0].T.tolist()


@pytest.mark.parametrize("kind", VALUES)
def test_a_table_has_a_row_a_protein_and_a_column_a_class(kind, tmp_path):
    _write(tmp_path / "out.csv", SPACES[kind], PROTEINS, VALUES[kind])
    heads, *rows = csv.reader((tmp_path / "out.csv").open())
    columns = ["a", "b", "c"] if kind in ("class", "classes") else []
    assert heads == ["name", "prediction", *columns]
    assert [row[:2] for row in rows] == [[protein.name, cell] for protein, cell in
                                         zip(PROTEINS, CELLS[kind], strict=True)]
    assert [[float(cell) for cell in row[2:]] for row in rows] == (
        [value.tolist() for value in VALUES[kind]] if columns else [[], []])


def test_classes_of_residues_with_longer_names_are_parted(tmp_path):
    space = LabelSpace("residues", ("in", "out", "x"))
    _write(tmp_path / "out.csv", space, PROTEINS[1:], VALUES["residues"][1:])
    assert (tmp_path / "out.csv").read_text().splitlines()[1] == "b," + ";".join("x" * 7)


def test_a_record_is_written_before_the_next_is_made(monkeypatch, tmp_path):
    seen = list[str]()

    def made(*arguments):
        seen.append("made")
        return _record(*arguments)

    def written(record, **flags):
        seen.append("written")
        return json.dumps(record, **flags)

    monkeypatch.setattr(files, "_record", made)
    monkeypatch.setattr(files, "json", SimpleNamespace(dumps=written))
    _write(tmp_path / "out.jsonl", SPACES["residues"], PROTEINS, VALUES["residues"])
    assert seen == ["made", "written"] * 2


def test_a_table_is_made_without_the_probabilities_of_residues():
    assert _record(SPACES["residues"], VALUES["residues"][0], is_table=True) == {"prediction": "abcabcab"}


@pytest.mark.parametrize(("output", "what"), [
    ("out.xml", "ends in .csv or .jsonl"), ("folder.csv", "is no folder"),
    ("old.csv", "old.csv is there already; give another output, or --overwrite"),
    ("file/out.csv", r"file/out.csv cannot be written \(\w"), ("new/out.csv", "MODEL holds no fine-tuned model")])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(output, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "old.csv").touch()
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=what):
        predict("MODEL", "in.fasta", output, "fp32", False, Mesh(), Log(is_speaker=True))


def test_an_output_that_is_there_is_replaced_where_asked(tmp_path):
    (tmp_path / "old.csv").touch()
    with pytest.raises(UserError, match="MODEL holds no fine-tuned model"):
        predict("MODEL", "in.fasta", str(tmp_path / "old.csv"), "fp32", False, Mesh(), Log(), overwrite=True)


@pytest.mark.parametrize("left", ["task.json", "unfinished"])
def test_several_seeds_do_not_write_into_the_run_of_one(left, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / left).touch()
    flags = ["own", "--load", "/nowhere", "--data", "/nowhere", "--save", str(tmp_path / "out"), "--seeds"]
    with pytest.raises(ConfigError, match="out holds a run of one seed"):
        run(parse_flags([*flags, "1", "2"], ""), Mesh(), Log(is_speaker=False))
    with pytest.raises(UserError, match="/nowhere holds no checkpoint"):
        run(parse_flags([*flags, "1"], ""), Mesh(), Log(is_speaker=False))


def test_every_flag_that_is_taken_is_one_of_pretrainings():
    sections = dict(Config().sections())
    assert _TAKEN.keys() <= sections.keys()
    for name, names in _TAKEN.items():
        assert names <= {item.name for item in fields(sections[name])}


SAVED = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 48, "hidden_dropout": 0.25,
         "position_embedding_type": "rope"}


@pytest.mark.parametrize(("argv", "lr", "dropout"), [
    ([], 1e-4, 0.25), (["--head-only"], 1e-3, 0.0), (["--lora-rank", "2"], 1e-3, 0.25), (["--lr", "3"], 3.0, 0.25),
    (["--head-only", "--hidden-dropout", "0.5"], 1e-3, 0.5)])
def test_what_is_not_given_follows_from_the_model_and_what_is_trained(argv, lr, dropout):
    config = parse_flags(["own", "--load", "x", "--save", "y", *argv], "").config(SAVED, 3)
    assert (config.schedule.lr, config.model.hidden_dropout, config.model.num_layers) == (lr, dropout, 2)
    assert (config.data.seq_length, config.training.micro_batch_size, config.training.global_batch_size) == (48, 2, 12)


@pytest.mark.parametrize(("argv", "hidden_size", "head_lr"), [
    ([], 16, 0.02), ([], 128, 0.02), (["--head-only"], 1280, 0.002), (["--lr", "3e-2"], 1280, 3e-2),
    (["--lr", "3e-2", "--head-lr", "0.5"], 16, 0.5)])
def test_under_muon_the_head_has_the_rate_that_is_given_or_one_that_falls_with_its_width(argv, hidden_size, head_lr):
    saved = {**SAVED, "hidden_size": hidden_size}
    config = parse_flags(["own", "--load", "x", "--save", "y", "--optimizer", "normuon", *argv], "").config(saved, 1)
    assert config.optimizer.head_lr == pytest.approx(head_lr)
    assert (config.optimizer.muon_lr, config.optimizer.embedding_lr) == (0.01, 0.02), "as in pretraining"
    assert parse_flags(["own", "--load", "x", "--save", "y"], "").config(SAVED, 1).optimizer.head_lr is None


def test_help_tells_of_predict_and_the_defaults_that_are_not_pretrainings(capsys):
    with pytest.raises(SystemExit):
        parse_flags(["--help"], "")
    told = " ".join(capsys.readouterr().out.split())
    config = parse_flags(["own", "--load", "x", "--save", "y"], "").config({}, 1)
    values = {"--micro-batch-size N": config.training.micro_batch_size, "--log-interval N": config.logging.log_interval,
              "--global-batch-size N": config.training.global_batch_size,
              "--lr-warmup-fraction X": config.schedule.lr_warmup_fraction, "--lr X": f"{config.schedule.lr:g}"}
    of_flags = told[told.index("TASK secondary_structure"):]  # behind the usage
    for name, value in values.items():
        text = of_flags[of_flags.index(f" {name}"):]
        assert text[text.index("(default: "):].startswith(f"(default: {value}"), name
    assert "or predict instead (see `predict --help`)" in told
    assert "(default: )" not in told


def test_runs_that_differ_in_seeds_and_place_alone_are_of_one_identity():
    common = ["own", "--load", "x"]
    first = parse_flags([*common, "--save", "y", "--seeds", "1"], "").identity()
    assert parse_flags([*common, "--save", "z", "--seeds", "2", "3"], "").identity() == first
    for other in (["--epochs", "3"], ["--lr", "1"], ["--lora-rank", "2"], ["--label-key", "k"]):
        assert parse_flags([*common, "--save", "y", *other], "").identity() != first


def test_pretrainings_other_flags_are_unknown():
    for flag in ("--ema", "--mask-prob", "--data-path", "--cuda-graph", "--num-layers"):
        with pytest.raises(ConfigError, match=f"unrecognized arguments: {flag}"):
            parse_flags(["own", "--load", "x", "--save", "y", flag, "1"], "")


@pytest.mark.parametrize(("kind", "label", "said"), [
    ("number", lambda number: 0.1, "all labels of the training file are 0.1; there is nothing to learn"),
    ("numbers", lambda number: [2, None, 2], "all labels of the training file are 2; there is nothing to learn"),
    ("numbers", lambda number: [None] * 3, "no residue of its proteins has a number; there is nothing to learn"),
    ("number", lambda number: number, None)])
def test_numbers_that_are_all_the_same_are_refused(tmp_path, kind, label, said):
    data = loaded(tmp_path, [{"seq": "MKV", "label": label(number)} for number in range(4)], label_kind=kind)
    with nullcontext() if said is None else pytest.raises(DataError, match=f"^train.csv: {said}$"):
        check_data(data, {"train": "train.csv"})


@pytest.mark.parametrize(("labels", "found"), [
    ("aabb", (0, 0)), ("aaab", (1, 2)), ("abab", (2, 4)), ([1, 1.5, 2, 2.0], (1, 2)), (["HE", "HC", "H", "H"], (1, 2))])
def test_sequences_with_labels_that_differ_are_counted(tmp_path, labels, found):
    data = loaded(tmp_path, [{"seq": sequence, "label": label} for sequence, label in
                             zip(("MK", "mk", "A", "A"), labels, strict=True)])
    assert data.contradictions() == found


def test_proteins_that_are_in_another_part_too_are_counted_by_their_sequences(tmp_path):
    def of(*sequences):
        return [{"seq": sequence, "label": number} for number, sequence in enumerate(sequences)]

    data = loaded(tmp_path, of("MKV", "ACD", "GG"), others=of("mkv", "W", "ac-d", "MK"))
    assert data.overlaps() == [("valid", 2, "train")]
    parts = {**data.parts, "test": loaded(tmp_path, of("W", "WW", "GG", "GG")).parts["train"]}
    assert replace(data, parts=parts).overlaps() == [("valid", 2, "train"), ("test", 2, "train"), ("test", 1, "valid")]
    assert replace(data, parts={"train": parts["train"], "test": parts["valid"][1:2]}).overlaps() == []
