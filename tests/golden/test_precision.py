"""`--precision auto` takes bf16 where that is faster; a resumed run keeps the precision that it began with."""

import pytest

from megatron.train.setup import precision
from pretrain_tape import main
from tests.golden.training import TINY, losses


def train(corpus, folder, *flags):
    return main([*TINY, "--data-path", corpus, "--save", str(folder), "--load", str(folder), *map(str, flags)])


@pytest.fixture
def speeds(monkeypatch):
    """A function that sets how fast this device multiplies in fp32 and in bf16."""
    def are(fp32, bf16):
        monkeypatch.setattr(precision, "gain_of_bf16", lambda *_: bf16 / fp32)

    return are


@pytest.mark.parametrize(("bf16", "chosen", "flag"), [(2e9, "bf16", "--bf16"), (1.1e9, "fp32", "--no-bf16")])
def test_the_faster_precision_is_taken_and_the_run_is_the_same_as_with_its_flag(corpus, tmp_path, speeds, capsys, bf16,
                                                                                chosen, flag):
    speeds(1e9, bf16)
    assert train(corpus, tmp_path / "auto", "--train-iters", 3, "--precision", "auto") == 0
    said = f"precision: {chosen}; this device multiplies {bf16 / 1e9:.2f} times as fast in bf16 as in fp32"
    assert said in capsys.readouterr().out
    assert train(corpus, tmp_path / "told", "--train-iters", 3, flag) == 0
    assert losses(tmp_path / "auto") == losses(tmp_path / "told")


def test_a_run_goes_on_in_its_precision_whatever_is_faster_now(corpus, tmp_path, speeds, capsys):
    flags = ["--train-iters", 4, "--precision", "auto"]
    speeds(1e9, 2e9)
    assert train(corpus, tmp_path / "whole", *flags) == 0
    assert train(corpus, tmp_path / "parts", *flags, "--exit-interval", 2) == 0
    capsys.readouterr()
    speeds(2e9, 1e9)
    assert train(corpus, tmp_path / "parts", *flags) == 0
    assert "precision: bf16; as in the run that is resumed" in capsys.readouterr().out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_what_this_machine_does_is_measured(corpus, tmp_path, capsys):
    assert train(corpus, tmp_path, "--train-iters", 1, "--precision", "auto") == 0
    assert "times as fast in bf16 as in fp32" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--bf16", "--fp16"])
def test_auto_beside_a_precision_is_refused(flag, capsys):
    assert main([*TINY, "--data-path", "x", "--train-iters", "2", "--precision", "auto", flag]) == 2
    assert "--precision auto chooses by itself" in capsys.readouterr().err
