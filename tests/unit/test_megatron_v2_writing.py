"""Checkpoints are written as by Megatron v2; the oracle is made by hand in the original's layout."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._prims_common import CUDARngStateHelper

from megatron.checkpoint.contents import Checkpoint, stored
from megatron.checkpoint.convert.megatron_v2 import read, write
from megatron.checkpoint.convert.vocabulary import trimmed
from megatron.errors import CheckpointError, ConfigError
from tests.megatron_checks import check_values, same_but_random_states
from tests.megatron_files import ITERATION, LAYERS, ROWS, loaded, wholes, write_original


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 4)])
def test_what_is_written_is_what_the_original_writes(precision, tensor, pipeline, tmp_path):
    write_original(tmp_path / "one", precision=precision, tensor=2, pipeline=(2, 2))
    stages = (LAYERS // pipeline,) * pipeline
    made = write_original(tmp_path / "made", precision=precision, tensor=tensor, pipeline=stages)
    written = write(read(tmp_path / "one"), tmp_path / "written", tensor=tensor, pipeline=pipeline)
    assert (tmp_path / "written" / "latest_checkpointed_iteration.txt").read_text() == str(ITERATION)
    files = sorted(file.relative_to(made) for file in made.rglob("*.pt"))
    assert files == sorted(file.relative_to(written) for file in written.rglob("*.pt"))
    for file in files:
        same_but_random_states(loaded(written / file), loaded(made / file))
    check_values(read(written), wholes())


def test_fresh_random_states_can_be_set(tmp_path):
    write_original(tmp_path / "made")
    tree = loaded(write(read(tmp_path / "made"), tmp_path / "written") / "mp_rank_00" / "model_optim_rng.pt")
    random.Random().setstate(tree["random_rng_state"])
    np.random.RandomState().set_state(tree["np_rng_state"])
    torch.Generator().set_state(tree["torch_rng_state"])
    assert tree["rng_tracker_states"].keys() == {"model-parallel-rng"}


def test_states_of_a_gpu_are_written_as_pytorch_makes_them_on_a_machine_without_one(tmp_path, monkeypatch):
    write_original(tmp_path / "made")
    tree = loaded(write(read(tmp_path / "made"), tmp_path / "written", tensor=2) / "mp_rank_01" / "model_optim_rng.pt")
    made = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", made.append)
    for seed in (tree["args"].seed, tree["args"].seed + 2718 + 1):  # Megatron's of a data and of a tensor rank
        CUDARngStateHelper.set_torch_state_tensor(torch.tensor(seed), torch.tensor(0))
    assert torch.equal(tree["cuda_rng_state"], made[0])
    assert torch.equal(tree["rng_tracker_states"]["model-parallel-rng"], made[1])


def test_weights_alone_are_written_as_a_release(tmp_path):
    values = {name: stored(value) for name, value in wholes().items() if "/" not in name}
    config = {"num_attention_heads": 4, "make_vocab_size_divisible_by": 4}
    written = write(Checkpoint(Path("x"), 0, values, None, {"config": config}), tmp_path, tensor=2)
    assert written == tmp_path / "release"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "release"
    again = read(tmp_path)
    assert again.optimizer is None
    assert "schedule" not in again.state
    check_values(again, {name: tensor.read() for name, tensor in values.items()})


@pytest.mark.parametrize(("ours", "theirs"), [([0.3], 0.3), ([0.3, 0.15, 5000.0], 0.15)], ids=str)
def test_the_share_of_masked_residues_is_one_number_there(tmp_path, ours, theirs):
    values = {name: stored(value) for name, value in wholes().items() if "/" not in name}
    config = {"num_attention_heads": 4, "make_vocab_size_divisible_by": 4, "mask_prob": ours}
    written = write(Checkpoint(Path("x"), 0, values, None, {"config": config}), tmp_path)
    assert loaded(written / "mp_rank_00" / "model_optim_rng.pt")["args"].mask_prob == theirs
    assert read(tmp_path).state["config"]["mask_prob"] == [theirs]


def test_rows_that_are_added_to_the_vocabulary_take_no_part(tmp_path):
    write_original(tmp_path / "made")
    checkpoint = read(tmp_path / "made")
    checkpoint.state["config"]["make_vocab_size_divisible_by"] = ROWS
    write(checkpoint, tmp_path / "wide", tensor=2)
    wide, values = read(tmp_path / "wide"), wholes()
    words, bias = "embedding.word_embeddings.weight", "lm_head.bias"
    assert torch.equal(wide.model[words].read(), torch.cat([values[words], torch.zeros(ROWS, 16)]))
    assert torch.equal(wide.model[bias].read()[:ROWS], values[bias])
    hidden = torch.randn(5, 16)
    narrow_th = torch.log_softmax(hidden @ values[words].T + values[bias], 1)
    wide_th = torch.log_softmax(hidden @ wide.model[words].read().T + wide.model[bias].read(), 1)
    assert torch.equal(wide_th[:, :ROWS], narrow_th)
    assert not wide.optimizer[f"exp_avg/{bias}"].read()[ROWS:].any()
    again = read(write(trimmed(wide, ROWS - 1), tmp_path / "narrow"))
    check_values(again, values)


@pytest.mark.parametrize(("layout", "message"), [
    ({"tensor": 3}, "tensor-parallel size to write for is 3, by which 4 attention heads"),
    ({"pipeline": 3}, "pipeline-parallel size to write for is 3, by which 4 layers"),
    ({"tensor": 0}, "tensor-parallel size to write for is 0")])
def test_layouts_that_do_not_divide_are_refused(layout, message, tmp_path):
    write_original(tmp_path / "made")
    with pytest.raises(ConfigError, match=message):
        write(read(tmp_path / "made"), tmp_path / "written", **layout)
    assert not (tmp_path / "written").exists()


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    place = write_original(tmp_path / "made")
    checkpoint = read(tmp_path / "made")
    os.truncate(place / "mp_rank_00" / "model_optim_rng.pt", 20000)
    with pytest.raises(CheckpointError, match="cut off"):
        write(checkpoint, tmp_path / "written")
    assert list((tmp_path / "written").iterdir()) == []
