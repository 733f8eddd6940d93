"""The flags of continued pretraining follow from the model and the proteins, and mistakes are reported first."""

import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron.checkpoint.convert.families import esm, hf
from megatron.config import DataConfig
from megatron.config.command_line import parse
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.dataset import build_datasets
from megatron.train.state import BatchSizes
from tests.families import ESM2, PROTBERT
from tests.indexed_files import write_indexed
from tests.transformers_models import trained_here
from tools import continued_flags

LETTERS = "MKTAYIAKQRQISFVKSHFS"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An ESM-2 and a ProtBERT of 64 positions as folders of transformers, and the ESM-2 as a file of fair-esm."""
    folder = tmp_path_factory.mktemp("models")
    esm2 = trained_here(replace(ESM2, ffn_hidden_size=128), "esm", "both")
    return {"esm": hf.write(esm2, folder / "esm"), "pt": esm.write(esm2, folder / "esm2_pt"),
            "protbert": hf.write(trained_here(PROTBERT, "protbert", "both"), folder / "protbert")}


@pytest.fixture
def place(tmp_path):
    """A folder with proteins.fasta and what a script would have made of it."""
    (tmp_path / "proteins.fasta").write_text(">a\nMKTAYIAK\n" * 5)
    (tmp_path / "out" / "data").mkdir(parents=True)
    ids = [Vocab.from_file().ids[letter] for letter in LETTERS]
    for name, count in (("new", 400), ("old", 300)):
        write_indexed(tmp_path / "out" / "data" / f"{name}_text_document", [np.array(ids * 5, dtype=np.uint16)] * count)
    return tmp_path


@pytest.fixture
def ask(place, models, monkeypatch, capsys):
    """A function that runs the tool; gives the exit status, the words and the errors."""
    def run(*flags, model="esm", proteins=None):
        monkeypatch.setattr(sys, "argv", ["tool", str(models.get(model, model)),
                                          str(proteins or place / "proteins.fasta"), str(place / "out"), *flags])
        status = continued_flags.main()
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err

    return run


def values(words):
    """Flags by their names, the first value of each; the last one wins."""
    found = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            found[word] = None if following.startswith("--") else following
    return found


def test_a_run_takes_so_many_passes_over_the_new_proteins_whatever_is_mixed_in(ask, place):
    new = str(place / "out" / "data" / "new_text_document")
    data = DataConfig(data_path=(new,), seq_length=1024, split="90,10", vocab_file="esm", protein_ends="both")
    num_rows = build_datasets(data, Vocab.from_file("esm"), 1234).train.num_epoch_rows(0)
    assert num_rows > 30
    alone = ask("--epochs", "2.5")[1]
    assert values(alone)["--train-samples"] == str(round(2.5 * num_rows))
    assert alone[:2] == ["--data-path", new]
    mixed = ask("--epochs", "2.5", "--old-proteins", str(place / "proteins.fasta"), "--old-share", "0.2")[1]
    assert values(mixed)["--train-samples"] == str(round(2.5 * num_rows / 0.8))
    assert mixed[:5] == ["--data-path", "0.8", new, "0.2", new.replace("new_", "old_")]
    prefix = str(place / "out" / "data" / "old_text_document")  # one that is preprocessed already
    assert ask("--epochs", "2.5", "--old-proteins", prefix)[1] == mixed


@pytest.mark.parametrize(("processes", "gpus"), [(1, 0), (3, 0), (2, 2), (8, 8)])
def test_the_program_takes_the_flags_whatever_shares_a_batch(ask, processes, gpus):
    status, words, _ = ask("--processes", str(processes), "--gpus", str(gpus))
    training, schedule = parse(words)[0].training, parse(words)[0].schedule
    assert status == 0
    assert training.global_batch_size % (training.micro_batch_size * processes) == 0
    assert 8 <= training.global_batch_size < 8 + 2 * processes
    assert schedule.lr == pytest.approx(1e-4 * math.sqrt(training.global_batch_size / 256), rel=0.05)
    assert schedule.min_lr == pytest.approx(schedule.lr / 10)
    assert parse(words)[0].precision.bf16 == (gpus > 0)


def test_a_batch_and_its_learning_rate_grow_with_the_proteins_up_to_their_peak(ask):
    sizes = [values(ask("--epochs", epochs)[1]) for epochs in ("1", "200", "2000", "20000")]
    assert [int(size["--global-batch-size"]) for size in sizes] == [8, 8, 128, 256]
    assert [float(size["--lr"]) for size in sizes] == [1.8e-5, 1.8e-5, 7.1e-5, 1e-4]


def test_rows_are_as_long_as_esms_or_as_the_table_of_positions(ask):
    assert [values(ask(model=model)[1])["--seq-length"] for model in ("esm", "protbert")] == ["1024", "64"]


@pytest.mark.parametrize(("number", "at_once", "is_recomputed"), [
    (8e6, "32", False), (650e6, "8", False), (3e9, "2", True)])
def test_what_a_gpu_takes_at_once_follows_from_the_size_of_the_model(ask, monkeypatch, number, at_once, is_recomputed):
    monkeypatch.setattr(continued_flags, "_num_parameters", lambda model: number)
    said = values(ask("--gpus", "1", "--epochs", "20000")[1])
    assert said["--micro-batch-size"] == at_once
    assert ("--checkpoint-activations" in said) == is_recomputed


def test_a_file_of_fair_esm_is_a_model_too(ask, models):
    folder, file = (values(ask(model=model)[1]) for model in ("esm", "pt"))
    assert file.pop("--load") == str(models["pt"]) and models["pt"].is_file()
    assert file == {name: value for name, value in folder.items() if name != "--load"}


def test_the_users_flags_win_and_what_they_say_in_other_words_goes(ask):
    said = values(ask("--gpus", "1", "--", "--train-iters", "70", "--lr", "5e-6", "--fp16", "--lr-warmup-iters=3",
                      "--global-batch-size", "64")[1])
    assert not said.keys() & {"--train-samples", "--bf16", "--lr-warmup-fraction"}
    assert (said["--lr"], float(said["--min-lr"]), said["--global-batch-size"]) == ("5e-6", 5e-7, "64")
    assert (said["--eval-interval"], said["--log-interval"], said["--eval-iters"]) == ("7", "1", "8")


@pytest.mark.parametrize(("rows", "processes", "at_once"), [("7", 1, 1), ("6", 1, 2), ("6", 2, 1), ("300", 1, 2)])
def test_rows_at_once_divide_the_batch_that_is_given(ask, rows, processes, at_once):
    flags = ["--processes", str(processes), "--", "--global-batch-size", rows]
    assert ask("--check", *flags) == (0, [], "")
    training = parse(ask(*flags)[1])[0].training
    BatchSizes(training, processes)
    assert training.micro_batch_size == at_once


def test_a_batch_is_of_the_rows_at_once_that_are_given(ask):
    flags = ["--processes", "2", "--", "--micro-batch-size", "5"]
    assert ask("--check", *flags) == (0, [], "")
    assert parse(ask(*flags)[1])[0].training.global_batch_size == 10


def test_a_file_of_the_users_wins_as_its_flags_do(ask, tmp_path):
    (tmp_path / "run.toml").write_text('train-iters = 70\nadam-beta2 = 0.999\neval-at-start = false\nlr = 1e-3\n')
    words = ask("--", "--config", str(tmp_path / "run.toml"), "--lr", "5e-6")[1]
    config, _ = parse([*words, "--seq-length", "64"])
    assert (config.training.train_iters, config.training.train_samples) == (70, None)
    assert (config.optimizer.adam_beta2, config.training.eval_at_start, config.schedule.lr) == (0.999, False, 5e-6)


def test_a_run_begins_with_the_models_weights_and_goes_on_with_its_own(ask, place, models):
    said = values(ask()[1])
    assert said["--load"] == str(models["esm"]) and "--finetune" in said
    (place / "out" / "run" / "iter_0000003").mkdir(parents=True)
    said = values(ask()[1])
    assert said["--load"] == said["--save"] == str(place / "out" / "run") and "--finetune" not in said


def test_the_check_says_nothing_where_nothing_is_wrong(ask):
    assert ask("--check", "--", "--lr", "1e-5") == (0, [], "")
    assert ask("--check", "--", "--train-samples", "16") == (0, [], "")  # enough where there are few proteins
    rates = [word for group in ("muon", "embedding", "head", "scalar") for word in (f"--{group}-lr", "1e-4")]
    assert ask("--check", "--", "--optimizer", "muon", *rates) == (0, [], "")


@pytest.mark.parametrize(("flags", "said"), [
    (["--epochs", "0"], "EPOCHS is '0'; set it to a number above 0"), (["--epochs", "few"], "EPOCHS is 'few'"),
    (["--old-share", "1"], "OLD_SHARE is '1'; set it to a number above 0 and below 1"),
    (["--processes", "0"], "--processes 0 with --gpus 0; give at least 1 and 0"),
    (["--old-share", "nan"], "OLD_SHARE is 'nan'"), (["--old-proteins", "/nowhere"], "/nowhere: no such file"),
    (["--processes", "2", "--", "--global-batch-size", "7"], "--global-batch-size 7 is not divisible by"),
    (["--", "--micro-batch-size", "3", "--global-batch-size", "8"], "--global-batch-size 8 is not divisible by"),
    (["--processes", "2", "--", "--tensor-model-parallel-size", "4"], "--tensor-model-parallel-size"),
    (["--", "--lrr", "1"], "unknown argument --lrr; did you mean --lr?"),
    (["--", "--num-layers", "3"], "--num-layers is 3, but the checkpoint was trained with 4; give --num-layers 4"),
    (["--", "--optimizer", "muon", "--muon-lr", "1e-3"], "--optimizer muon has peak learning rates for random weights"),
    (["--", "--vocab-file", "iupac"], "--vocab-file is iupac, whose tokens are not those")])
def test_wrong_flags_are_said_in_one_line(ask, flags, said):
    status, words, wrong = ask("--check", *flags)
    assert (status, words) == (2, [])
    assert wrong.startswith(f"error: {said}") and wrong.count("\n") == 1


def test_wrong_places_are_said_in_one_line(ask, place, models):
    def said(**given):
        status, words, wrong = ask("--check", **given)
        assert (status, words, wrong.count("\n")) == (2, [], 1)
        return wrong

    out = place / "out"
    assert f"MODEL {place / 'none'} does not exist" in said(model=place / "none")
    assert "holds no checkpoint of a known format" in said(model=place)
    assert "lies in OUT_FOLDER" in said(model=Path(shutil.copytree(models["esm"], out, dirs_exist_ok=True)))
    assert f"{place / 'none'}: no such file" in said(proteins=place / "none")
    (out / "data" / "new.stats.json").write_text('{"inputs": [{"path": "others.fasta", "bytes": 77}]}')
    assert f"OUT_FOLDER {out} was begun with the 77 bytes of others.fasta" in said()
    (out / "data" / "new.stats.json").write_text("{")
    assert "new.stats.json is damaged; remove it" in said()
    (out / "model").mkdir()
    assert "holds a model/ that is of no run there" in said()
    assert f"lies in OUT_FOLDER {out}" in said(model=models["esm"].rename(out / "mine"))
    (out / "mine").rename(models["esm"])
