"""Runs with --ema: what they evaluate and save of the averaged weights, resuming, and new runs from the average."""

import pytest
import torch

from megatron.checkpoint.convert.conversion import convert
from megatron.checkpoint.store import open_place
from megatron.log import Log
from pretrain_tape import main
from tests.golden.training import TINY, losses, run_on_ranks

FLAGS = [*TINY, "--ema", "0.8", "--train-iters", "8", "--eval-interval", "4", "--log-interval", "2"]


def run(corpus, folder, *flags, status=0):
    assert main([*FLAGS, "--data-path", corpus, "--save", str(folder), *map(str, flags)]) == status


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(corpus, folder)
    return folder


def average(folder):
    return {name: tensor.read() for name, tensor in open_place(folder / "iter_0000008").average.items()}


def test_it_is_evaluated_beside_the_weights_and_changes_no_bit_of_the_run(corpus, unbroken, tmp_path, capsys):
    assert list(losses(unbroken, "valid_ema")) == list(losses(unbroken, "valid")) == [4, 8]
    assert losses(unbroken, "valid_ema")[8] != losses(unbroken, "valid")[8]
    assert list(losses(unbroken, "test_ema")) == [8]
    assert main([*FLAGS, "--data-path", corpus, "--save", str(tmp_path), "--eval-at-start"]) == 0
    said = capsys.readouterr().out
    assert " validation loss of the average at iteration 8 | lm loss value: " in said
    assert f"  validation loss of the average  {losses(unbroken, 'valid_ema')[8]:.4f} nats" in said
    plain = [flag for flag in FLAGS if flag not in ("--ema", "0.8")]
    assert main([*plain, "--data-path", corpus, "--save", str(tmp_path / "plain")]) == 0
    for kind in ("train", "valid", "test"):
        assert losses(tmp_path / "plain", kind) == losses(unbroken, kind)


def test_a_run_goes_on_with_it_bit_by_bit(corpus, unbroken, tmp_path):
    run(corpus, tmp_path, "--load", tmp_path, "--exit-interval", 3, "--no-save-optim")
    run(corpus, tmp_path / "again", "--load", tmp_path / "again", "--exit-interval", 3)
    run(corpus, tmp_path / "again", "--load", tmp_path / "again")
    assert open_place(tmp_path / "iter_0000003").average is not None
    expected = average(unbroken)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in average(tmp_path / "again").items())
    assert losses(tmp_path / "again", "valid_ema") == losses(unbroken, "valid_ema")


def test_a_run_goes_on_with_it_in_another_layout(corpus, unbroken, tmp_path):
    flags = [*FLAGS, "--data-path", corpus, "--save", tmp_path, "--load", tmp_path]
    assert run_on_ranks(*flags, "--exit-interval", 3, "--tensor-model-parallel-size", 2, ranks=2) == [0, 0]
    assert run_on_ranks(*flags, "--micro-batch-size", 1, "--data-parallel-sharding", "parameters", ranks=2) == [0, 0]
    for step, loss in losses(unbroken, "valid_ema").items():
        assert losses(tmp_path, "valid_ema")[step] == pytest.approx(loss, rel=1e-5)


def test_a_run_from_the_average_begins_where_that_was_left(corpus, unbroken, tmp_path, capsys):
    run(corpus, tmp_path, "--load", unbroken, "--load-ema", status=2)
    assert "--load-ema takes the average of a run's weights, from which that run cannot go on; give --finetune" in (
        capsys.readouterr().err)
    run(corpus, tmp_path, "--load", unbroken, "--load-ema", "--finetune", "--eval-at-start", "--train-iters", 2,
        "--bf16")
    assert losses(tmp_path, "valid")[0] == pytest.approx(losses(unbroken, "valid_ema")[8], rel=1e-3)
    # In bf16 as well what computes is the average, and not copies of the weights.
    run(corpus, tmp_path / "again", "--load", tmp_path, "--load-ema", "--finetune", "--eval-at-start", "--train-iters",
        1, "--bf16")
    assert losses(tmp_path / "again", "valid")[0] == losses(tmp_path, "valid_ema")[2] != losses(tmp_path, "valid")[2]


def test_what_is_written_from_the_average_says_so_with_its_loss(unbroken, tmp_path):
    said = []
    for takes_average in (False, True):
        folder = tmp_path / str(takes_average)
        convert(unbroken, folder, "auto", "hf", tensor=1, pipeline=1, iteration=None, vocab_size=None,
                log=Log(is_speaker=False), takes_average=takes_average)
        said.append((folder / "README.md").read_text())
    for card, kind in zip(said, ("valid", "valid_ema"), strict=True):
        assert card.count("validation loss") == 1
        assert f"validation loss {losses(unbroken, kind)[8]:.4f} nats" in card
        assert ("exponential average of those of the steps, of decay 0.8" in card) is (kind == "valid_ema")
