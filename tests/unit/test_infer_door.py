"""The flags that all inference programs share."""

import argparse
import sys
from pathlib import Path

import pytest

from megatron.data.corpus.vocab import Vocab
from megatron.errors import ConfigError, DataError
from megatron.infer import door
from megatron.infer.embed.writers import check_form
from megatron.infer.proteins import ProteinFiles
from megatron.infer.rows import MOST_TOKENS
from megatron.infer.variants.wild_types import read_proteins
from megatron.parallel.launch.environment import Launch
from tools import embed, evaluate, finetune, predict_contacts, score_variants


def asked_for(monkeypatch, *words):
    """The layout of a program that has the flags of models alone."""
    flags, found = argparse.ArgumentParser(), []
    door.add_model_flags(flags)
    monkeypatch.setattr(sys, "argv", ["program", *words])
    monkeypatch.setattr(door, "status_of", lambda prepare: found.append(prepare(Launch())[0]))
    door.asked(flags, lambda given, mesh, log: None)
    return found[0]


def predicting(monkeypatch, *words):
    return finetune.prepare(["predict", "model", "in.fasta", "out.csv", *words], Launch())[0]


@pytest.mark.parametrize("layout_of", [asked_for, predicting])
def test_how_long_ranks_wait_for_each_other_is_said_as_in_pretraining(layout_of, monkeypatch):
    assert layout_of(monkeypatch).distributed_timeout_minutes == 10
    assert layout_of(monkeypatch, "--distributed-timeout-minutes", "90").distributed_timeout_minutes == 90
    with pytest.raises(ConfigError, match="--distributed-timeout-minutes is 0.0; it must be greater than 0"):
        layout_of(monkeypatch, "--distributed-timeout-minutes", "0")


@pytest.mark.parametrize(("tool", "words"), [
    (finetune, ["predict", "nowhere", "in.fasta", "new/one/out.csv"]),
    (evaluate, ["nowhere", "--on", "in.fasta", "--output", "new/one"])])
def test_a_refusal_leaves_no_folder_behind(tool, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program", *words])
    assert tool.main() == 2 and "nowhere holds no " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_tells_the_most_tokens_of_each_device():
    flags = argparse.ArgumentParser()
    door.add_model_flags(flags)
    assert all(f"{most:,} on" in " ".join(flags.format_help().split()) for most in MOST_TOKENS.values())


@pytest.mark.parametrize("place", ["", "nothing.fasta"])
def test_what_is_wrong_with_a_file_names_no_flag_for_programs_call_it_otherwise(tmp_path, place):
    with pytest.raises(DataError, match="give files") as raised:
        ProteinFiles([str(tmp_path / place)], "text", None, Vocab.from_file("iupac"))
    assert "--" not in str(raised.value)


def test_the_flag_that_a_missing_key_asks_for_is_there(tmp_path):
    (tmp_path / "in.json").write_text('{"protein": "MKV"}\n')
    with pytest.raises(DataError, match="--json-keys names the keys"):
        read_proteins([str(tmp_path / "in.json")], Vocab.from_file("iupac"))
    assert read_proteins([str(tmp_path / "in.json")], Vocab.from_file("iupac"), "protein") == {"1": "MKV"}
    for program in (embed, evaluate, predict_contacts, score_variants):
        assert "--json-keys" in program.parser().format_help()
    assert "--sequence-key" in finetune.predict_parser().format_help()


def test_a_form_that_is_none_is_told_with_what_a_folder_would_hold():
    with pytest.raises(ConfigError, match="without one it is a folder of tables, a .tsv"):
        check_form(Path("out.csv"), "tables, a .tsv of pairs a protein")
