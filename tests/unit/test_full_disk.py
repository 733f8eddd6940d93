"""On a full disk one line names the file and the reason, and no half-written file lies under a final name.

A limit on the size of files stands in for the full disk.
"""

import resource
import shutil
import sys
from collections import namedtuple

import pytest

from tests.unit.test_pretrained import saved
from tools import embed, evaluate, predict_contacts, score_variants


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """What a program says that may not write so much; proteins and a checkpoint stand before what it is given."""
    checkpoint, proteins = saved(tmp_path / "run"), tmp_path / "in.fasta"
    proteins.write_text("".join(f">p{number}\n{'MKTAYIAKQR' * 4}{'ACDEF'[number]}\n" for number in range(5)))

    def run(program, *arguments, limit=3000):
        given = [str(argument).replace("INPUT", str(proteins)) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["program.py", str(checkpoint), *given])
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            status = program.main()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        error = capsys.readouterr().err
        assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        assert not list(tmp_path.rglob(".unfinished-*"))
        return error

    return run


@pytest.mark.parametrize("name", ["out.h5", "out.npz", "out.parquet", "out"])
def test_embeddings(refused, tmp_path, name):
    error = refused(embed, "INPUT", tmp_path / name, limit=1500)
    assert "File too large" in error and str(tmp_path / name) in error and not (tmp_path / name).exists()


def test_parts_of_embeddings(refused, tmp_path):
    error = refused(embed, "INPUT", tmp_path / "out.h5", "--include", "per_tok")
    assert "File too large" in error and f"{tmp_path}/out.h5.parts/0000000" in error
    assert [path.name for path in (tmp_path / "out.h5.parts").iterdir()] == ["asked.json"]


def test_an_output_for_which_there_is_no_room_is_not_begun(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    error = refused(embed, "INPUT", tmp_path / "out.h5")
    assert f"{tmp_path}/out.h5 cannot be written: its disk has 0.0 MB free" in error
    assert not (tmp_path / "out.h5").exists() and (tmp_path / "out.h5.parts" / "0000000").exists()


def test_evaluations_and_their_pictures(refused, tmp_path):
    error = refused(evaluate, "--on", "INPUT", "--output", tmp_path / "out")
    assert "File too large" in error and f"{tmp_path}/out/" in error


def test_pictures_of_variants(refused, tmp_path):
    error = refused(score_variants, "INPUT", tmp_path / "out", "--heatmap")
    assert "File too large" in error and f"{tmp_path}/out/p0.substitutions." in error


@pytest.mark.parametrize("name", ["out.hdf5", "out.npz"])
def test_contacts(refused, tmp_path, name):
    output = tmp_path / name
    error = refused(predict_contacts, "--input", "INPUT", "--output", output, "--method", "jacobian")
    assert "File too large" in error and str(output) in error and not output.exists()
