"""Steps run as graphs train as other steps do.

A trace of PyTorch's operations stands in for a CUDA graph: it too repeats the same operations in the same memory.
"""

from dataclasses import replace
from itertools import chain
from math import isnan

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainingConfig,
)
from megatron.errors import ConfigError
from megatron.kernels.attention.packed import attention_reference
from megatron.kernels.pointwise import native
from megatron.optim.optimizer import Optimizer
from megatron.parallel import context
from megatron.parallel.mesh import Mesh
from megatron.train.step.engine import build_engine
from megatron.train.step.graph import check_graph
from megatron.train.step.meters import Meters
from megatron.train.step.train_step import TrainStep
from tests.packed import packed_batch

MODEL = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, kv_channels=8, ffn_hidden_size=64,
                    max_position_embeddings=64, attention_dropout=0.1, hidden_dropout=0.1)


class Tracer:
    """Records what a function does to tensors; whatever Python alone knows stays as it was when it was recorded."""

    def __init__(self, kept):
        self.kept, self.num_recorded = kept, 0

    def run(self, function):
        return function()

    def record(self, function):
        self.num_recorded += 1
        before = [tensor.detach().clone() for tensor in self.kept()]
        trace = torch.no_grad()(make_fx(lambda: function())())
        for tensor, value in zip(self.kept(), before, strict=True):  # tracing computes; a graph's capture does not
            tensor.detach().copy_(value)
        outputs = [torch.empty_like(output) for output in trace()]
        for tensor, value in zip(self.kept(), before, strict=True):
            tensor.detach().copy_(value)

        def replay():
            for place, output in zip(outputs, trace(), strict=True):
                place.copy_(output)
        return replay, outputs


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Attention and what lies between products by PyTorch alone, whose operations a trace sees."""
    monkeypatch.setattr(native, "_helper", None)
    monkeypatch.setattr(context, "packed_attention", lambda *arguments: attention_reference(*arguments[:4]))


def trained(is_graph, precision, optimizer, course=None, fault=1.0):
    """Losses, norms and weights of five steps of two micro-batches, whose fourth has more proteins; what was traced.

    `fault`: the factor on the loss of the last.
    """
    config = Config(model=MODEL, data=DataConfig(seq_length=64), precision=precision, optimizer=optimizer,
                    training=TrainingConfig(micro_batch_size=1))
    mesh = Mesh()
    engine = build_engine(config, mesh, 128, mask_id=5)
    varies = course is not None
    engine = replace(engine, optimizer=Optimizer(engine.model.parameters, optimizer, mesh, 1e-3, is_graph, varies))
    meters = Meters(mesh.world, mesh.device)

    def kept():
        state = [tensor for inner in engine.optimizer.inner for values in inner.state.values()
                 for tensor in values.values()]
        parameters = list(engine.model.parameters.values())
        amaxes = engine.amaxes._before_slp, engine.amaxes._known_lp, *engine.amaxes._seen
        fp8_copies = [copy for layer in engine.stages[0].matrices() for copy in chain(*layer.fp8_copy or ())]
        copies = [copy for layer in engine.stages[0].matrices() for copy in (layer.copy, layer.bias_copy)]
        average = [] if engine.average is None else [*engine.average.tensors.values(), engine.average._num_steps]
        return [*parameters, *average, *(parameter.grad for parameter in parameters), *state, engine.loss_scale._state,
                *amaxes, *fp8_copies, *(copy for copy in copies if copy is not None)]

    tracer = Tracer(kept) if is_graph else None
    step, results = TrainStep(engine, meters, tracer), []
    for number in range(5):
        batches = [packed_batch(9 + number, 12, 3, filler=6 - number, empty=60 if number == 3 else 2, padding=3,
                                seed=2 * number + index) for index in range(2)]
        if course is not None:
            engine.optimizer.set_weight_decay(course * number)
        step(batches, 1e-3 * (number + 1), factor=fault if number == 4 else 1.0)
        reading = meters.read()
        results += [reading.loss, reading.masked_accuracy, reading.grad_norm]
    named = engine.model.parameters | ({} if engine.average is None else {
        f"average of {name}": tensor for name, tensor in engine.average.tensors.items()})
    return results, named, engine.loss_scale.state(), tracer


ADAM, SGD = OptimizerConfig(), OptimizerConfig(optimizer="sgd")
CAUTIOUS = OptimizerConfig(cautious_weight_decay=True, ema=0.3)


@pytest.mark.parametrize(("precision", "optimizer", "course"), [
    (PrecisionConfig(bf16=True), ADAM, None), (PrecisionConfig(), ADAM, 20.0), (PrecisionConfig(), SGD, 20.0),
    (PrecisionConfig(), CAUTIOUS, 20.0), (PrecisionConfig(bf16=True, fp8="hybrid", fp8_recipe="delayed"), ADAM, None),
    (PrecisionConfig(fp16=True, initial_loss_scale=2.0**40, loss_scale_window=2, hysteresis=1), ADAM, None)])
def test_graphs_train_as_steps_do_without_them(precision, optimizer, course):
    plain, expected, scale, _ = trained(False, precision, optimizer, course)
    graphs, parameters, its_scale, tracer = trained(True, precision, optimizer, course)
    assert tracer.num_recorded == 2  # micro-batches and update; the batch of another shape came too seldom
    assert graphs == pytest.approx(plain, rel=1e-6, nan_ok=True) and its_scale == scale
    for name, parameter in expected.items():
        torch.testing.assert_close(parameters[name], parameter, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("fault", [1e5, float("nan")])
def test_a_fault_that_is_made_on_purpose_is_one_in_graphs_too(fault):
    plain, graphs = (trained(is_graph, PrecisionConfig(), ADAM, fault=fault)[0] for is_graph in (False, True))
    assert graphs == pytest.approx(plain, rel=1e-6, nan_ok=True)
    assert plain[-3] > 1e5 or isnan(plain[-3])


def test_without_a_gpu_it_is_refused():
    with pytest.raises(ConfigError, match="--cuda-graph needs a GPU, and this run is on cpu; leave it out"):
        check_graph(Config(training=TrainingConfig(cuda_graph=True)), Mesh())


@pytest.mark.parametrize(("parallel", "optimizer", "words"), [
    (ParallelConfig(data_parallel_sharding="optimizer"), OptimizerConfig(), "--data-parallel-sharding optimizer; "),
    (ParallelConfig(DDP_impl="torch"), OptimizerConfig(), "--DDP-impl torch; leave it out, or give local there"),
    (ParallelConfig(), OptimizerConfig(optimizer_backend="apex"), "--optimizer-backend apex; leave"),
    (ParallelConfig(), OptimizerConfig(optimizer="normuon"), "--optimizer normuon; leave it out, or give adam there")])
def test_a_layout_or_optimizer_that_no_graph_can_hold_is_refused(parallel, optimizer, words):
    config = Config(training=TrainingConfig(cuda_graph=True), parallel=parallel, optimizer=optimizer)
    with pytest.raises(ConfigError, match=words):
        check_graph(config, Mesh(device=torch.device("cuda")))
    check_graph(replace(config, parallel=ParallelConfig(), optimizer=OptimizerConfig()),
                Mesh(device=torch.device("cuda")))
