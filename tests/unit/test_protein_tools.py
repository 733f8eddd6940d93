"""The scripts of protein_tools turn files into loose JSON, and Pfam's folders into an indexed dataset."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.data.corpus.indexed import open_indexed
from megatron.data.sources.json_lines import convert
from megatron.errors import DataError

TOOLS = Path(__file__).resolve().parents[2] / "protein_tools"


def door(name: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    program = "bash" if name.endswith(".sh") else sys.executable
    return subprocess.run([program, str(TOOLS / name), *map(str, arguments)], capture_output=True, text=True,
                          timeout=60, env={**os.environ, "PYTHON": sys.executable, **environment})


@pytest.fixture
def pfam(tmp_path: Path) -> Path:
    lmdb = pytest.importorskip("lmdb")
    for name, proteins in (("train", ["MKV", "AC"]), ("valid", ["D"]), ("holdout", ["EE"])):
        with (lmdb.open(str(tmp_path / f"pfam_{name}.lmdb"), map_size=1 << 20) as environment,
              environment.begin(write=True) as transaction):
            transaction.put(b"num_examples", pickle.dumps(len(proteins)))
            for number, protein in enumerate(proteins):
                transaction.put(str(number).encode(), pickle.dumps({"primary": protein, "id": str(number)}))
    return tmp_path


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_fasta_becomes_loose_json(tmp_path):
    (tmp_path / "in.fasta").write_text(">a\nMKV\nla*\n>b\nA C\n")
    done = door("fasta2json.py", tmp_path / "in.fasta", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path / "out.json") == ["MKVla*", "AC"]


def test_pfam_becomes_one_loose_json_in_the_order_train_valid_holdout(pfam):
    done = door("pfam2json.sh", pfam)
    assert done.returncode == 0, done.stderr
    assert texts(pfam / "pfam_all.json") == ["MKV", "AC", "D", "EE"]


def test_pfam_is_preprocessed_from_its_folders(pfam):
    done = door("preprocess_tape.sh", PFAM=str(pfam), WORKERS="1")
    assert done.returncode == 0, done.stderr
    assert open_indexed(str(pfam / "tape_pfam_all_text_document")).tokens.tolist() == [17, 15, 26, 6, 8, 9, 10, 10]


def test_a_conversion_refuses_another_kind_and_leaves_nothing(tmp_path):
    (tmp_path / "in.json").write_text('{"text": "MK"}\n')
    done = door("fasta2json.py", tmp_path / "in.json", tmp_path / "out.json")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/in.json: is json, not fasta; preprocess_data.py reads it directly\n"
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]


def test_an_output_that_cannot_be_written_is_one_line_of_its_name(tmp_path):
    (tmp_path / "in.fasta").write_text(">a\nMK\n")
    with pytest.raises(DataError, match="nowhere/out.json: cannot be written"):
        convert([str(tmp_path / "in.fasta")], str(tmp_path / "nowhere" / "out.json"), "fasta")


def test_an_output_that_was_forgotten_destroys_no_input(tmp_path):
    for name in ("a.fasta", "b.fasta"):
        (tmp_path / name).write_text(">a\nMK\n")
    with pytest.raises(DataError, match=r"b.fasta: is there already and holds no JSON lines \(it begins b'>'\)"):
        convert([str(tmp_path / "a.fasta")], str(tmp_path / "b.fasta"), "fasta")
    assert (tmp_path / "b.fasta").read_text() == ">a\nMK\n"
    for _ in range(2):
        assert convert([str(tmp_path / "a.fasta")], str(tmp_path / "out.json"), "fasta") == 1


def test_standard_output_takes_the_json(tmp_path, capfd):
    (tmp_path / "in.fasta").write_text(">a\nMK\n")
    assert convert([str(tmp_path / "in.fasta")], "-", "fasta") == 1
    assert capfd.readouterr().out == '{"text": "MK"}\n'
