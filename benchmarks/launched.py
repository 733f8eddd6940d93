"""Records what the parts of a training step would launch on a GPU: a block, what is around the blocks, the update.

Each part runs forward and backward on tensors without values (`benchmarks/compiled.py`). Only the proteins' boundaries
have values, which are needed to count attention's work. Used by `benchmarks/roofline.py`,
`benchmarks/triton_kernels.py` and the tests.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction

from benchmarks.compiled import Launches, RecordedLaunch
from megatron.config import Config
from megatron.data.batches.batch import Batch
from megatron.data.batches.typical import typical_batch
from megatron.kernels import device
from megatron.kernels.attention.maps_triton import launch_map
from megatron.kernels.packed_sequence import PackedSequence
from megatron.kernels.rotary import Rotation
from megatron.model.protein_model import ProteinModel, compute_dtype
from megatron.optim.optimizer import Optimizer
from megatron.optim.scaling import LossScale
from megatron.parallel.pipeline.partition import Stage
from megatron.parallel.tensor.copies import ComputeCopies
from megatron.parallel.tensor.layers import Matrix

Passes = tuple[Launches, Launches]
NUM_IDS = 128  # the padded vocabulary of every family on one rank


def launches_of_block(config: Config, num_tokens: int | None = None, takes_triton: bool = True,
                      batch: Batch | None = None) -> Passes:
    """The launches of the model's first block, forward and backward, with weights' copies made and no gradients yet.

    `num_tokens`: by default those of the batch; `takes_triton`: whether to use our Triton kernels; `batch`: by default
    a typical micro-batch of the configuration.
    """
    with patch.object(device, "_DTYPES", device._DTYPES if takes_triton else ()):
        return _launches_of_block(config, num_tokens, batch or _batch_of(config))


def _launches_of_block(config: Config, num_tokens: int | None, batch: Batch) -> Passes:
    model, dtype = config.model, compute_dtype(config.precision)
    stream_dtype = torch.float32 if model.fp32_residual_connection else dtype
    num_tokens = num_tokens or len(batch.sequence.tokens_t)
    with torch.device("meta"):
        whole = ProteinModel(model, config.precision, NUM_IDS, stage=Stage(0, 2, range(1)), mask_id=4)
        transformer = whole.transformer
        hidden_uh = torch.empty(num_tokens, model.hidden_size, dtype=stream_dtype, requires_grad=True)
        half = transformer.rotary_width // 2
        rotation = Rotation(*torch.empty(2, num_tokens, 1, 1, half).unbind()) if half else None
        block = transformer.layers["0"]
        ComputeCopies((layer for layer in block.modules() if isinstance(layer, Matrix)), dtype)
        with Launches() as forward:
            out_uh = block(hidden_uh.view_as(hidden_uh), _without_values(batch.sequence), rotation)
        with Launches() as backward:
            out_uh.backward(torch.empty_like(out_uh))
    return forward, backward


def launches_of_loss(config: Config, softcap: float | None = None) -> Passes:
    """The launches of the head and the loss for a micro-batch's targets, forward and backward."""
    dtype, batch = compute_dtype(config.precision), _batch_of(config)
    with torch.device("meta"):
        model = replace(config.model, num_layers=1)
        if softcap is not None:
            model = replace(model, final_logit_softcapping=softcap)
        stage = ProteinModel(model, config.precision, NUM_IDS, stage=Stage(1, 2, range(1)), mask_id=4)
        ComputeCopies(stage.matrices(), dtype)
        hidden_uh = torch.empty(len(batch.sequence.tokens_t), model.hidden_size, dtype=dtype, requires_grad=True)
        targets = batch.targets.map(lambda tensor: torch.empty_like(tensor, device="meta"))
        with Launches() as forward:
            loss, _ = stage.loss(hidden_uh, targets)
        with Launches() as backward:
            loss.backward()
    return forward, backward


def launches_around_blocks(config: Config, batch: Batch) -> Passes:
    """The launches of everything outside the blocks, forward and backward.

    That is the embedding, the rotary angles, the final normalisation, the head and the loss.
    """
    with torch.device("meta"):
        model = ProteinModel(config.model, config.precision, NUM_IDS, stage=Stage(0, 1, range(0)), mask_id=4)
        ComputeCopies(model.matrices(), compute_dtype(config.precision))
        targets = batch.targets.map(lambda tensor: torch.empty_like(tensor, device="meta"))
        with Launches() as forward:
            loss, _ = model(_without_values(batch.sequence), targets)
        with Launches() as backward:
            loss.backward()
    return forward, backward


def launches_of_update(config: Config) -> Launches:
    """The launches of one step of the optimizer, and of refreshing the copies of weights and biases after it."""
    with FakeTensorMode():  # PyTorch's fused optimizers do not run on `meta`
        model = ProteinModel(config.model, config.precision, NUM_IDS, mask_id=4)
        optimizer = Optimizer(dict(model.named_parameters()), config.optimizer, peak_lr=config.schedule.lr)
        copies = ComputeCopies(model.matrices(), compute_dtype(config.precision))
        loss_scale = LossScale(config.precision, torch.device("cpu"))
        _give_gradients(model)
        optimizer.step(1e-3, loss_scale)  # makes the optimizer's state
        _give_gradients(model)
        with Launches() as launches:
            optimizer.step(1e-3, loss_scale)
            copies.refresh()
    return launches


def launch_of_map(dtype: torch.dtype, width: int, num_tokens: int, length: int, groups: int = 16,
                  queries: int = 1) -> RecordedLaunch:
    """The launch that computes the attention maps of all heads for a protein of `length` among `num_tokens` tokens."""
    found: list[RecordedLaunch] = []

    def record(kernel: Any, _: object) -> Callable[..., None]:
        return lambda *arguments, **options: found.append(RecordedLaunch(kernel, arguments, options))

    with torch.device("meta"), patch.object(JITFunction, "__getitem__", record):
        qkv = torch.empty(num_tokens, groups, queries + 2, width, dtype=dtype)
        heads = groups * queries
        launch_map(qkv, torch.empty(heads, num_tokens), 320, None, torch.empty(heads, length, length))
    return found[0]


def _give_gradients(model: ProteinModel) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None


def _batch_of(config: Config) -> Batch:
    return typical_batch(config.data, config.training.micro_batch_size)


def _without_values(sequence: PackedSequence) -> PackedSequence:
    """The sequence without values, except for the boundaries."""
    return replace(sequence.map(lambda tensor: torch.empty_like(tensor, device="meta")),
                   cu_seqlens=sequence.cu_seqlens)
