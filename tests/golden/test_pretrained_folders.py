"""Runs that continue from a transformers folder: what they take from it, and that they never save into it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.checkpoint.store import read_state
from pretrain_tape import main
from tests.golden.training import run_on_ranks
from tools.convert_checkpoint import main as convert

RUN = ("--seq-length 128 --micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --train-iters 1 --eval-iters 1 "
       "--num-workers 0 --peak-tflops 1 --log-interval 1 --finetune").split()


@pytest.fixture
def folder(their_folders, tmp_path):
    """ESM-2 that was saved with dropout of its own."""
    shutil.copytree(their_folders / "esm2", tmp_path / "given")
    said = json.loads((tmp_path / "given" / "config.json").read_text())
    said |= {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.25}
    (tmp_path / "given" / "config.json").write_text(json.dumps(said))
    return tmp_path / "given"


def train(corpus, folder, save, *flags):
    return main([*RUN, "--data-path", corpus, "--load", str(folder), "--save", str(save), *flags])


def test_a_models_dropout_comes_with_it_unless_a_flag_says_otherwise(corpus, folder, tmp_path, capsys):
    for name, flags, expected in (("taken", [], (0.0, 0.25)), ("told", ["--hidden-dropout", "0.1"], (0.0, 0.1))):
        assert train(corpus, folder, tmp_path / name, *flags) == 0
        output = capsys.readouterr().out
        assert "taken from the checkpoint" in output and "--attention-dropout 0.0" in output
        config = read_state(tmp_path / name / "iter_0000001" / "state.json")["config"]
        assert (config["attention_dropout"], config["hidden_dropout"]) == expected


def test_a_run_is_not_saved_into_the_folder_of_a_model(corpus, folder, capsys):
    before = sorted(folder.iterdir())
    assert train(corpus, folder, folder) == 2
    assert f"--save {folder} holds a model of another program (hf)" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_a_refused_run_leaves_no_folder_behind_and_one_that_was_there_stays(corpus, folder, tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        assert train(corpus, folder, tmp_path / name, "--position-embedding-type", "learned_absolute") == 2
    assert (tmp_path / "there").is_dir() and not (tmp_path / "new").exists()
    flags = [*RUN, "--data-path", corpus, "--load", folder, "--save", tmp_path / "ranks", "--swiglu"]
    assert 2 in run_on_ranks(*flags, ranks=2)
    assert not (tmp_path / "ranks").exists()


def test_a_conversion_says_which_tensors_hold_what_is_no_number(folder, tmp_path, monkeypatch, capsys):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.bias"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", "--load-dir", str(folder), "--save-dir",
                                     str(tmp_path / "out"), "--to", "sharded"])
    assert convert() == 0
    assert "note: lm_head.bias held numbers that are not finite, and still does" in capsys.readouterr().out
