"""Megatron's files that do not say the number of attention heads: no number is assumed, and the user can say it."""

import types

import pytest
import torch

from megatron.checkpoint.convert.formats import FORMATS
from megatron.checkpoint.newest import saved_flags
from megatron.config.command_line import left_open, parse
from megatron.errors import CheckpointError
from megatron.infer.pretrained import load_pretrained
from tests.megatron_files import HEADS, loaded, wholes, write_original
from tests.unit.test_convert_checkpoint import run
from tools import convert_checkpoint, merge_mp_partitions

FORMS = ("megatron-v2", "megatron-core", "megatron-core-dist")
RUN = ["--micro-batch-size", "1", "--train-iters", "1", "--lr", "1", "--seq-length", "12"]


def changed(folder, form, change):
    """A checkpoint in a run's folder, the arguments in which are what `change` makes of them; None: there are none."""
    write_original(folder / "original", with_optimizer=False)
    FORMATS[form].write(FORMATS["megatron-v2"].read(folder / "original"), folder / "run")
    for file in (folder / "run").rglob("common.pt" if form == "megatron-core-dist" else "*.pt"):
        tree = loaded(file)
        made = change(vars(tree.pop("args")))
        torch.save(tree if made is None else tree | {"args": made}, file)
    return folder / "run"


def without_heads(given):
    return types.SimpleNamespace(**{name: value for name, value in given.items() if name != "num_attention_heads"})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", [dict, lambda given: types.SimpleNamespace(**given)])
def test_arguments_may_be_a_dict_or_a_simple_namespace(change, form, tmp_path):
    checkpoint = FORMATS[form].read(changed(tmp_path, form, change))
    config = checkpoint.state["config"]
    assert (config["num_attention_heads"], config["layernorm_epsilon"]) == (HEADS, 1e-12)
    assert not any("does not say" in note for note in checkpoint.state["notes"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", [lambda given: None, lambda given: "none", without_heads])
def test_an_unknown_number_of_heads_is_asked_for_and_not_assumed(change, form, tmp_path, monkeypatch, capsys):
    folder = changed(tmp_path, form, change)
    with pytest.raises(CheckpointError, match=r"run.* does not say how many attention heads .* --num-attention-heads"):
        load_pretrained(str(folder))
    argv = ["--load", str(folder), *RUN]
    with pytest.raises(CheckpointError, match="does not say how many attention heads"):
        left_open(argv, saved_flags)
    status, _, wrong = run(convert_checkpoint, monkeypatch, capsys, "--load-dir", folder, "--to", "whole",
                           "--save-dir", tmp_path / "out")
    assert status == 2 and "does not say how many attention heads" in wrong and wrong.count("\n") == 1
    assert not (tmp_path / "out").exists()
    for told in (["--num-attention-heads", "8"], ["--preset", "demo"]):
        assert "num_attention_heads" not in left_open([*argv, *told], saved_flags)
    argv += ["--num-attention-heads", "8"]
    assert parse(argv, left_open(argv, saved_flags))[0].model.num_attention_heads == 8


def test_merging_says_so_too(tmp_path, monkeypatch, capsys):
    folder = changed(tmp_path, "megatron-v2", without_heads)
    status, _, wrong = run(merge_mp_partitions, monkeypatch, capsys, "--model-type", "BERT", "--load", folder,
                           "--num-attention-heads", HEADS)
    assert status == 2 and "does not say how many attention heads" in wrong


def test_what_else_is_assumed_is_noted_in_one_line(tmp_path):
    folder = changed(tmp_path, "megatron-v2", lambda given: {"num_attention_heads": HEADS})
    checkpoint = FORMATS["megatron-v2"].read(folder)
    assert [note for note in checkpoint.state["notes"] if "does not say" in note] == [
        "it does not say its layernorm_epsilon: unless flags say otherwise, taken to be 1e-05, the default"]
    folder = changed(tmp_path / "none", "megatron-v2", lambda given: None)
    assert "layernorm_epsilon and bias_gelu_fusion: unless flags say otherwise, taken to be 1e-05 and True" in (
        FORMATS["megatron-v2"].read(folder).state["notes"][0])
    assert torch.equal(checkpoint.model["lm_head.bias"].read(), wholes()["lm_head.bias"])
