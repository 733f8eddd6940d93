"""The model, the loss and one optimizer step agree with the original program's numbers (../shared/fixtures)."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.config import ModelConfig, OptimizerConfig, PrecisionConfig, ScheduleConfig
from megatron.kernels.packed_sequence import PackedSequence, Targets
from megatron.model.protein_model import ProteinModel
from megatron.optim.optimizer import Optimizer
from megatron.optim.scaling import LossScale
from megatron.optim.schedule import build_schedule
from megatron.parallel.parameters import declaration_of

FIXTURE = Path(__file__).resolve().parents[2].parent / "shared" / "fixtures" / "proteinlm_tiny_seed1"
pytestmark = pytest.mark.skipif(not FIXTURE.is_dir(), reason="needs the folder shared/ beside the checkout")
CPU = torch.device("cpu")
CLS = 2
CONFIG = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=256, kv_channels=16,
                     max_position_embeddings=128, layernorm_epsilon=1e-12, attention_dropout=0.0, hidden_dropout=0.0)


def original_checkpoint(iteration):
    # Everything in it besides tensors and plain containers, by name; nothing else may be built while it is read.
    allowed = [argparse.Namespace, np.ndarray, np.dtype, np.dtypes.UInt32DType,
               np._core.multiarray._reconstruct]
    path = FIXTURE / "checkpoint" / f"iter_{iteration:07d}" / "mp_rank_00" / "model_optim_rng.pt"
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, weights_only=True, map_location="cpu")


def parameters_of(checkpoint):
    language_model, head = checkpoint["model"]["language_model"], checkpoint["model"]["lm_head"]
    embedding = language_model["embedding"]
    return {
        **{f"embedding.{kind}.weight": table["weight"] for kind, table in embedding.items()},
        **{f"transformer.{name}": value for name, value in language_model["transformer"].items()},
        **{f"lm_head.{name}": value for name, value in head.items()},
    }


def model_of_iteration_3():
    model = ProteinModel(CONFIG, PrecisionConfig(), padded_vocab_size=128)
    model.load_state_dict(parameters_of(original_checkpoint(3)), strict=True)
    return model


def flat(tokens_bs, padding_bs):
    """The real tokens of a padded batch, with the boundaries that the original used: every [CLS] begins a protein."""
    is_real_bs = torch.from_numpy(padding_bs).bool()
    tokens_t = torch.from_numpy(tokens_bs)[is_real_bs]
    starts = (tokens_t == CLS).nonzero().flatten()
    lengths = torch.diff(starts, append=torch.tensor([len(tokens_t)]))
    positions_t = torch.arange(len(tokens_t)) - torch.repeat_interleave(starts, lengths)
    cu_seqlens = torch.cat([starts, torch.tensor([len(tokens_t)])]).int()
    return is_real_bs, PackedSequence(tokens_t, positions_t, cu_seqlens, int(lengths.max()), num_filler=0)


def test_logits_and_losses_equal_the_originals():
    batch = np.load(FIXTURE / "forward.npz")
    is_real_bs, sequence = flat(batch["tokens"], batch["padding_mask"])
    model = model_of_iteration_3()
    with torch.no_grad():
        logits_tv = model.logits(model.hidden(sequence))
    torch.testing.assert_close(logits_tv, torch.from_numpy(batch["logits"])[is_real_bs], atol=2e-5, rtol=0)
    is_target_t = torch.from_numpy(batch["loss_mask"])[is_real_bs].bool()
    labels_t = torch.from_numpy(batch["labels"])[is_real_bs]
    loss_m = torch.nn.functional.cross_entropy(logits_tv[is_target_t], labels_t[is_target_t], reduction="none")
    expected_m = torch.from_numpy(batch["per_token_loss"])[is_real_bs][is_target_t]
    torch.testing.assert_close(loss_m, expected_m, atol=2e-5, rtol=0)
    with torch.no_grad():
        targets_m = is_target_t.nonzero().flatten()
        loss, _ = model(sequence, Targets(targets_m, labels_t[is_target_t]))
    assert loss.item() / is_target_t.sum().item() == pytest.approx(float(batch["loss"]), abs=2e-5)


def backward_of_step_4(model):
    step = np.load(FIXTURE / "train_step.npz")
    losses = []
    for micro in ("micro0", "micro1"):
        is_real_bs, sequence = flat(step[f"{micro}/text"], step[f"{micro}/padding_mask"])
        targets_m = torch.from_numpy(step[f"{micro}/loss_mask"])[is_real_bs].nonzero().flatten()
        ids_m = torch.from_numpy(step[f"{micro}/labels"])[is_real_bs][targets_m]
        loss_sum, _ = model(sequence, Targets(targets_m, ids_m))
        # The original averages the micro-batches' means; this project divides by the global batch's targets instead.
        loss = loss_sum / len(targets_m)
        (loss / 2).backward()
        losses.append(loss.item())
    return step, sum(losses) / 2


def test_gradients_equal_the_originals():
    model = model_of_iteration_3()
    step, loss = backward_of_step_4(model)
    assert loss == pytest.approx(float(step["loss"]), rel=1e-6)
    names = {name.replace("language_model.embedding", "embedding").replace("language_model.", ""): name
             for name in (key.removeprefix("grad/") for key in step.files if key.startswith("grad/"))}
    parameters = dict(model.named_parameters())
    assert parameters.keys() == names.keys()
    for name, original in names.items():
        expected = torch.from_numpy(step[f"grad/{original}"])
        error = (parameters[name].grad - expected).norm() / expected.norm()
        assert error < 1e-5, name


def test_one_step_with_the_originals_optimizer_state_gives_its_next_weights():
    checkpoint, scalars = original_checkpoint(3), json.loads((FIXTURE / "scalars.json").read_text())
    model = model_of_iteration_3()
    optimizer = Optimizer(dict(model.named_parameters()), OptimizerConfig())
    groups = checkpoint["optimizer"]["param_groups"]
    # The original has two groups: what decays, and what does not.
    ordered = sorted(model.parameters(), key=lambda parameter: not declaration_of(parameter).decays)
    names = {parameter: name for name, parameter in model.named_parameters()}
    indices = [index for group in groups for index in group["params"]]
    state = {}
    for index, parameter in zip(indices, ordered, strict=True):
        moments = checkpoint["optimizer"]["state"][index]
        state |= {f"{kind}/{names[parameter]}": value for kind, value in moments.items()}
        state[f"step/{names[parameter]}"] = torch.tensor(float(groups[0]["step"]))
    optimizer.load_state(state)
    backward_of_step_4(model)
    schedule = build_schedule(ScheduleConfig(lr=1e-3, min_lr=1e-4, lr_warmup_fraction=0.1), global_batch_size=4,
                              train_iters=20, train_samples=None)
    learning_rate = schedule.learning_rate(12)
    rates = [schedule.learning_rate(samples) for samples in (0, 4, 8, 12)]
    assert rates == pytest.approx(scalars["lr_of_steps_1_to_4"])
    outcome = optimizer.step(learning_rate, LossScale(PrecisionConfig(), CPU))
    assert outcome.grad_norm.item() == pytest.approx(scalars["grad_norm_before_clip_step4"], rel=1e-5)
    expected = parameters_of(original_checkpoint(4))
    for name, parameter in model.named_parameters():
        error = (parameter.detach() - expected[name]).abs()
        if name.endswith("query_key_value.bias"):
            # A key's bias shifts all scores of a query alike, so its true gradient is 0: both programs step along
            # rounding noise of 1e-9, which Adam divides by its own size: another on each processor, and no more than a
            # step. Nothing that the model computes depends on it.
            error_n3d = error.view(4, 3, 16)
            assert error_n3d[:, 1].max() < learning_rate, name
            error = error_n3d[:, [0, 2]]
        assert error.max() < 1e-6, name
