"""Inspection of checkpoints: what it reports for each format, and that it finds missing and non-finite values."""

import re

import pytest
import torch

from megatron.checkpoint.convert.formats import FORMATS
from tests.megatron_files import wholes, write_original
from tests.unit.test_convert_checkpoint import run
from tools import inspect_checkpoint

NAME = "lm_head.dense.weight"


def written(folder, format_name, values=None):
    write_original(folder / "original", values=values, tensor=2)
    if format_name == "megatron-v2":
        return folder / "original"
    FORMATS[format_name].write(FORMATS["megatron-v2"].read(folder / "original"), folder / format_name)
    return folder / format_name


@pytest.mark.parametrize("format_name", ["sharded", "whole", "megatron-v2"])
def test_a_whole_checkpoint_is_told_in_full(format_name, tmp_path, monkeypatch, capsys):
    status, said, wrong = run(inspect_checkpoint, monkeypatch, capsys, written(tmp_path, format_name))
    assert (status, wrong) == (0, "")
    assert f": {format_name}, iteration 7\n" in said
    assert "progress: iteration 7, consumed samples 56" in said
    assert re.search(r"num_attention_heads \.+ 4$", said, re.MULTILINE)
    value = wholes()[NAME]
    line = next(line for line in said.splitlines() if line.strip().startswith(NAME))
    assert "16 x 16 float32" in line
    assert f"norm {value.norm().item():.5g}, largest {value.abs().max().item():.5g}" in line
    numbers = sum(value.numel() for name, value in wholes().items() if "/" not in name)
    assert said.count(f"{numbers:,} numbers") == 3  # parameters and two moments
    assert said.endswith("whole, and all numbers are finite\n")


@pytest.mark.parametrize("key", [NAME, f"exp_avg_sq/{NAME}"])
def test_numbers_that_are_not_finite_are_counted(key, tmp_path, monkeypatch, capsys):
    values = wholes()
    values[key][0, :2] = torch.tensor([torch.nan, torch.inf])
    status, said, _ = run(inspect_checkpoint, monkeypatch, capsys, written(tmp_path, "sharded", values))
    assert status == 1
    assert "2 NaN or infinite" in said
    assert said.endswith("whole, but 2 numbers are NaN or infinite\n")


@pytest.mark.parametrize("format_name", ["sharded", "megatron-v2"])
def test_a_flipped_bit_and_a_missing_end_are_found(format_name, tmp_path, monkeypatch, capsys):
    folder = written(tmp_path, format_name)
    file = sorted(folder.rglob("*.pt" if format_name == "megatron-v2" else "model*.safetensors"))[0]
    content = file.read_bytes()
    at = content.index(wholes()[NAME].numpy().tobytes())
    for damaged in (content[:at + 3] + bytes([content[at + 3] ^ 1]) + content[at + 4:], content[:-300]):
        file.write_bytes(damaged)
        status, said, wrong = run(inspect_checkpoint, monkeypatch, capsys, folder)
        assert (status, wrong) == (1, "")
        last = said.splitlines()[-1]
        assert last.startswith("not whole: ")
        assert str(file) in last


def test_what_is_no_checkpoint_is_told(tmp_path, monkeypatch, capsys):
    status, said, _ = run(inspect_checkpoint, monkeypatch, capsys, tmp_path)
    assert status == 1
    assert "holds no checkpoint of a known format" in said
    assert run(inspect_checkpoint, monkeypatch, capsys, tmp_path, "--loader", "x")[0] == 2
    for flags in ([], ["--loader", "whole"]):
        status, said, wrong = run(inspect_checkpoint, monkeypatch, capsys, tmp_path / "nope", *flags)
        assert (status, said) == (2, "")
        assert f"{tmp_path / 'nope'} is not there" in wrong and wrong.count("\n") == 1
