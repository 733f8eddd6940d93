"""Inference programs on records that are not proteins: the first is refused, or all are left out on request."""

import argparse
import json

import numpy as np
import pytest

from megatron.errors import DataError
from megatron.finetune.data.examples import read_proteins
from megatron.finetune.data.tasks import task_of
from megatron.infer.door import add_protein_flags, proteins_of
from megatron.log import Log
from megatron.parallel.mesh import Mesh
from tests.unit.labelled_files import TOKENIZER, VOCAB
from tests.unit.test_pretrained import saved
from tools import embed, evaluate, predict_contacts

# A name that is another's as a file's, one twice, no residue, no protein.
RECORDS = [("a/1", "MKV"), ("b", ""), ("c", "MK1"), ("a_1", "ACD"), ("d", "ACDEFGHIKL"), ("d", "MKVL"), ("e", "MKVLA")]
TOLD = ["skipped: FILE: protein 2, b, has no residue",
        "skipped: FILE: line 6, column 3: '1' is not a residue",
        "skipped: FILE: proteins 1 and 4 both have the name a_1 (/ counts as _); each needs its own",
        "skipped: FILE: proteins 5 and 6 both have the name d (/ counts as _); each needs its own",
        "skipped 4 records of FILE, 3 are left: name of another 2, not protein 1, without residues 1"]


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">{name}\n{text}\n" for name, text in RECORDS))
    return path


def files(path, *words, has_names=True):
    flags = argparse.ArgumentParser()
    add_protein_flags(flags, has_names)
    return proteins_of(flags.parse_args(words), [str(path)], VOCAB)


def told(capsys, path):
    return [line.replace(str(path), "FILE") for line in capsys.readouterr().out.splitlines() if "skipped" in line]


def test_what_is_no_protein_is_left_out_counted_and_told_where_that_is_asked_for(fasta, capsys):
    proteins = files(fasta, "--skip-bad-records")
    for _ in range(2):  # each pass leaves out the same
        assert [(protein.name, len(protein)) for protein in proteins] == [("a/1", 3), ("d", 10), ("e", 5)]
    proteins.tell_skipped(Log())
    assert sorted(told(capsys, fasta)) == sorted(TOLD)
    assert files(fasta).identity() != proteins.identity() != files(fasta, has_names=False).identity()


@pytest.mark.parametrize(("number", "finding"), [
    (1, "protein 1, b, has no residue"), (2, "line 2, column 3: '1' is not a residue"), (5, "proteins 1 and 2 both")])
def test_the_first_that_is_no_protein_is_refused_with_the_flag_that_leaves_such_out(number, finding, fasta):
    records = [*(RECORDS[4:5] if number == 5 else []), RECORDS[number], ("x", "MK"), ("y", "M")]
    fasta.write_text("".join(f">{name}\n{text}\n" for name, text in records))
    with pytest.raises(DataError) as caught:
        list(files(fasta))
    assert str(caught.value).startswith(f"{fasta}: {finding}")
    assert str(caught.value).endswith("; mend it, or leave such records out with --skip-bad-records")


def test_a_protein_without_a_name_keeps_its_number_in_the_file(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for _, text in RECORDS))
    assert [protein.name for protein in files(path, "--skip-bad-records")] == ["1", "4", "5", "6", "7"]


def test_names_are_told_apart_only_where_answers_stand_under_them(fasta):
    assert [len(protein) for protein in files(fasta, "--skip-bad-records", has_names=False)] == [3, 3, 10, 4, 5]


def test_a_file_of_which_nothing_is_left_is_refused(fasta, tmp_path):
    fasta.write_text(">a\n\n>b\n\n")
    proteins = files(fasta, "--skip-bad-records")
    assert not list(proteins)
    with pytest.raises(DataError, match=f"{fasta}: no protein is left .skipped: without residues 2.$"):
        proteins.tell_skipped(Log(is_speaker=False))


def test_every_program_that_asks_leaves_them_out(fasta, tmp_path, capsys):
    run, out = str(saved(tmp_path / "run")), tmp_path / "out.npz"
    given = embed.parser().parse_args([run, str(fasta), str(out), "--skip-bad-records"])
    for _ in range(2):  # it is whole when it is asked for again
        embed.embed_files(given, Mesh(), Log())
    assert np.load(out).files == ["a_1", "d", "e"]
    assert sorted(told(capsys, fasta)) == sorted(TOLD)
    pairs = ["--input", str(fasta), "--output", str(tmp_path / "pairs"), "--method", "jacobian", "--skip-bad-records"]
    predict_contacts.tell(predict_contacts.parser().parse_args([run, *pairs]), Mesh(), Log())
    assert sorted(path.stem for path in (tmp_path / "pairs").iterdir()) == ["a_1", "d", "e"]
    assert sorted(told(capsys, fasta)) == sorted(TOLD)
    words = ["--on", f"x={fasta}", "--skip-bad-records", "--output", str(tmp_path / "evaluation")]
    evaluate.evaluate(evaluate.parser().parse_args([run, run, *words]), Mesh(), Log())
    assert told(capsys, fasta)[-1] == "skipped 2 records of FILE, 5 are left: not protein 1, without residues 1"


def test_predictions_of_a_task_leave_them_out_too(fasta, capsys):
    task = task_of("own")
    with pytest.raises(DataError, match="line .*: the sequence has no residue; mend it, .* with --skip-bad-records"):
        read_proteins(str(fasta), task, TOKENIZER, False, Log())
    names = [protein.name for protein in read_proteins(str(fasta), task, TOKENIZER, True, Log())]
    assert names == ["a/1", "a_1", "d", "d", "e"]
    assert told(capsys, fasta)[-1] == "skipped 2 records of FILE, 5 are left: not protein 2"


@pytest.mark.parametrize(("name", "content", "reasons"), [
    ("in.jsonl", '{"sequence": "MKV"}\n{bad\n[1]\n{"id": "x"}\n{"sequence": 5}\n{"sequence": "ACD"}\n',
     "bad JSON 2, not protein 2"),
    ("in.json", '[{"sequence": "MKV"}, 5, {"id": "x"}, {"sequence": ""}, {"sequence": 1}, {"sequence": "ACD"}]',
     "bad JSON 1, not protein 3"),
    ("in.csv", "sequence,y\nMKV,1\nMK\nMK,1,2\n,1\nM1,1\nACD,1\n", "bad row 2, not protein 2")])
def test_predictions_of_a_task_leave_out_what_is_no_record(name, content, reasons, tmp_path, capsys):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=f"{name}: .*; mend it, or leave such records out with --skip-bad-records"):
        read_proteins(str(path), task_of("own"), TOKENIZER, False, Log())
    assert [protein.name for protein in read_proteins(str(path), task_of("own"), TOKENIZER, True, Log())] == ["1", "6"]
    assert told(capsys, path)[-1] == f"skipped 4 records of FILE, 2 are left: {reasons}"
