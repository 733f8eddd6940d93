"""ProteinLM's own checkpoint (../shared/fixtures): our model computes its logits, and we write its files again."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.checkpoint.convert.formats import FORMATS
from megatron.checkpoint.convert.megatron_v2 import read, write
from megatron.config import OptimizerConfig, PrecisionConfig
from megatron.model.protein_model import ProteinModel
from megatron.optim.optimizer import Optimizer
from megatron.optim.scaling import LossScale
from megatron.optim.schedule import schedule_of
from tests.megatron_checks import same_but_random_states
from tests.megatron_files import loaded
from tests.unit.test_fixture_parity import (
    CONFIG,
    FIXTURE,
    backward_of_step_4,
    flat,
    original_checkpoint,
    parameters_of,
)

pytestmark = pytest.mark.skipif(not FIXTURE.is_dir(), reason="needs the folder shared/ beside the checkout")
ORIGINAL = FIXTURE / "checkpoint"


def first_rows(tensors):
    """Their values, without the rows that more tensor ranks add to the vocabulary."""
    return {name: tensor.read()[:128] if tensor.shape and name.endswith(("word_embeddings.weight", "lm_head.bias"))
            else tensor.read() for name, tensor in tensors.items()}


def logits(checkpoint):
    batch = np.load(FIXTURE / "forward.npz")
    is_real_bs, sequence = flat(batch["tokens"], batch["padding_mask"])
    model = ProteinModel(CONFIG, PrecisionConfig(), padded_vocab_size=128)
    model.load_state_dict(first_rows(checkpoint.model))
    with torch.no_grad():
        return model.logits(model.hidden(sequence)), torch.from_numpy(batch["logits"])[is_real_bs]


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_logits_are_the_originals_whatever_the_layout_of_the_files(tensor, pipeline, tmp_path):
    written = write(read(ORIGINAL, 3), tmp_path, tensor=tensor, pipeline=pipeline)
    ours, theirs = logits(read(written))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("through", ["megatron-v2", "sharded", "whole"])
def test_a_step_after_loading_gives_the_originals_next_weights(through, tmp_path):
    """Through files of two tensor and two pipeline ranks, or a format of ours."""
    layout = {"tensor": 2, "pipeline": 2} if through == "megatron-v2" else {}
    checkpoint = FORMATS[through].read(FORMATS[through].write(read(ORIGINAL, 3), tmp_path, **layout))
    model = ProteinModel(CONFIG, PrecisionConfig(), padded_vocab_size=128)
    model.load_state_dict(first_rows(checkpoint.model))
    optimizer = Optimizer(dict(model.named_parameters()), OptimizerConfig())
    optimizer.load_state(first_rows(checkpoint.optimizer))
    backward_of_step_4(model)
    rate = schedule_of(checkpoint.state["schedule"]).learning_rate(checkpoint.state["progress"]["consumed_samples"])
    optimizer.step(rate, LossScale(PrecisionConfig(), torch.device("cpu")))
    expected = read(ORIGINAL, 4).model
    for name, parameter in model.named_parameters():
        error = (parameter.detach() - expected[name].read()).abs()
        if name.endswith("query_key_value.bias"):  # a key's bias does nothing, and steps along rounding noise
            error = error.view(4, 3, 16)[:, [0, 2]]
        assert error.max() < 1e-6, name


@pytest.mark.parametrize("iteration", [3, 4])
def test_what_is_written_again_equals_the_original_files(iteration, tmp_path):
    file = Path(f"iter_{iteration:07d}") / "mp_rank_00" / "model_optim_rng.pt"
    write(read(ORIGINAL, iteration), tmp_path)
    written, original = loaded(tmp_path / file), loaded(ORIGINAL / file)
    known = vars(written["args"])
    model_flags = {name: value for name, value in vars(original["args"]).items() if known.get(name) == value}
    assert {"num_layers", "hidden_size", "padded_vocab_size", "consumed_train_samples", "params_dtype",
            "tensor_model_parallel_size", "seq_length", "lr", "train_iters"} <= model_flags.keys()
    assert vars(original["args"]).keys() <= known.keys()
    original["args"].__dict__ = model_flags
    same_but_random_states(written, original)
    for name in ("torch_rng_state", "cuda_rng_state"):
        assert written[name].dtype == original[name].dtype


def test_the_optimizers_state_is_read_under_the_parameters_names():
    checkpoint, tree = read(ORIGINAL, 3), original_checkpoint(3)
    assert checkpoint.model.keys() == parameters_of(tree).keys()
    assert len(checkpoint.optimizer) == 3 * len(checkpoint.model)
    state = tree["optimizer"]["state"]
    for number, name in ((0, "embedding.word_embeddings.weight"), (10, "lm_head.dense.weight"), (29, "lm_head.bias"),
                         (13, "transformer.layers.0.attention.query_key_value.bias")):
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(checkpoint.optimizer[f"{kind}/{name}"].read(), state[number][kind])
        assert checkpoint.optimizer[f"step/{name}"].read() == 3
