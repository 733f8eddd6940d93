"""Linear layers compute with copies of their weights, made once per update, and sum gradients within the product."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config import Config, DataConfig, ModelConfig, PrecisionConfig, TrainingConfig
from megatron.parallel.mesh import Mesh
from megatron.parallel.tensor.layers import Matrix, linear
from megatron.parallel.tensor.stream import ONE_RANK_STREAM
from megatron.parallel.tensor.weight_gradients import WeightGradients, added_weight_gradient
from megatron.train.step.engine import build_engine
from megatron.train.step.meters import Meters
from megatron.train.step.train_step import TrainStep
from tests.packed import packed_batch

MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, kv_channels=8,
                    max_position_embeddings=64, attention_dropout=0.1, hidden_dropout=0.1)


def three_steps(precision, casts_at_every_use):
    """All parameters after three steps of two micro-batches, and how many of the steps were skipped."""
    config = Config(model=MODEL, data=DataConfig(seq_length=64), precision=precision,
                    training=TrainingConfig(micro_batch_size=1, global_batch_size=2))
    engine = build_engine(config, Mesh(), padded_vocab_size=128)
    matrices = [layer for layer in engine.stages[0].modules() if isinstance(layer, Matrix)]
    assert all(layer.copy is not None for layer in matrices)
    if casts_at_every_use:
        for layer in matrices:
            layer.copy = layer.bias_copy = None
        engine.compute_copies._layers.clear()
    meters = Meters(engine.mesh.world, engine.mesh.device)
    step = TrainStep(engine, meters)
    for number in range(3):
        batches = [packed_batch(20, 30, filler=14, padding=2, seed=2 * number + seed) for seed in range(2)]
        step(batches, learning_rate=1e-2, wishes=(False, False))
    return dict(engine.stages[0].named_parameters()), meters.read().num_skipped


@pytest.mark.parametrize(("precision", "num_skipped"), [
    (PrecisionConfig(bf16=True), 0), (PrecisionConfig(fp16=True, initial_loss_scale=1024), 0),
    (PrecisionConfig(fp16=True, initial_loss_scale=2.0**18, hysteresis=1), 1)])
def test_copies_made_once_an_update_give_the_bits_of_casts_at_every_use(precision, num_skipped):
    kept, skipped = three_steps(precision, casts_at_every_use=False)
    cast, _ = three_steps(precision, casts_at_every_use=True)
    assert skipped == num_skipped
    for name, parameter in kept.items():
        assert torch.equal(parameter, cast[name]), name


def micro_batches(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(40, 24, generator=generator).to(dtype) for _ in range(4)]


def weights_gradient(inputs, waits):
    """The gradient of the summed squares of all micro-batches' outputs."""
    weight = torch.nn.Parameter(torch.randn(16, 24, generator=torch.Generator().manual_seed(1)))
    waiting, memory = WeightGradients(), set()
    for x in inputs:
        with waiting.collecting() if waits else nullcontext():
            y = linear(x, weight, weight.detach().to(x.dtype), torch.zeros(16), None, ONE_RANK_STREAM, waiting)
            y.float().square().sum().backward()
        if not waits:
            memory.add(weight.grad.data_ptr())
    for _ in inputs if waits else ():
        waiting.compute_oldest()
        memory.add(weight.grad.data_ptr())
    assert len(memory) == 1
    return weight.grad


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_summed_inside_the_product_are_those_summed_outside(dtype, waits):
    together = weights_gradient(micro_batches(dtype), waits)
    apart = sum(weights_gradient([x], waits) for x in micro_batches(dtype))
    assert together.dtype == torch.float32
    assert (together - apart).norm() <= 1e-6 * apart.norm()


class Products(TorchDispatchMode):
    """Lists the matrix products within it, with the dtype that they give."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.found.append((func.overloadpacket.__name__, result.dtype))
        return result


@pytest.mark.skipif(torch.__version__ < "2.13", reason="PyTorch 2.11 has no such sum for tensors without values")
def test_on_gpus_no_rounded_gradient_lies_between_the_product_and_the_sum():
    with FakeTensorMode(), Products() as products:
        weight = torch.nn.Parameter(torch.empty(16, 24))
        gradient, x = torch.empty(40, 16, dtype=torch.bfloat16), torch.empty(40, 24, dtype=torch.bfloat16)
        weight.grad = added_weight_gradient(weight, gradient, x)
        assert added_weight_gradient(weight, gradient, x) is None
    assert products.found == [("mm", torch.float32), ("addmm", torch.float32)]
