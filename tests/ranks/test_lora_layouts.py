"""Models with LoRA adapters and dropout, in each kind of parallelism, agree with the same model on one rank."""

import itertools
from dataclasses import replace

import pytest
import torch

from megatron.config import Config, DataConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron.config.lora import LORA_TARGETS, LoraConfig
from megatron.model.lora import adapt, adapters_in
from megatron.model.protein_model import ProteinModel
from megatron.parallel.data.data_parallel import data_parallel
from megatron.parallel.mesh import Mesh, build_mesh
from megatron.train.step.engine import build_stages, with_optimizer
from megatron.train.step.meters import Meters
from megatron.train.step.train_step import TrainStep
from tests.families import FAMILIES, MASK_ID
from tests.ranks.launch import TIMEOUT, run_ranks
from tests.ranks.test_model_layouts import (
    CPU,
    LAYOUTS,
    ON_FOUR,
    PROTEINS,
    SEQ_LENGTH,
    VOCABULARY,
    layers_for,
    micro_batches,
    row,
    varied,
)
from tests.wholes import wholes

LORA = LoraConfig(lora_rank=3, lora_dropout=0.3)
KINDS = {
    "esm2, recomputed": (replace(FAMILIES["esm2"], checkpoint_activations=True),
                         replace(LORA, lora_targets=("query", "value", "dense", "dense_4h_to_h"))),
    "recipe": (FAMILIES["recipe"], replace(LORA, lora_targets=LORA_TARGETS))}
ON_TWO = {name: LAYOUTS[name] for name in ("data", "overlapped", "zero-bubble", "interleaved", "context", "tensor",
                                           "sequence")} | {
    kind: ParallelConfig(data_parallel_sharding=kind) for kind in ("optimizer", "gradients", "parameters")}
FOUR = {name: ON_FOUR[name] for name in ("pipeline, sequence, zero-bubble", "sequence, sharded")}
RATE = 0.01
ROWS = [row(lengths, number) for number, lengths in enumerate(PROTEINS[:4])]


class Living:
    """A model with adapters in one layout, ready to step."""

    def __init__(self, mesh, parallel, kind, num_layers):
        model, lora = KINDS[kind]
        training = TrainingConfig(micro_batch_size=1, global_batch_size=len(ROWS))
        config = Config(model=replace(model, num_layers=num_layers), data=DataConfig(seq_length=SEQ_LENGTH),
                        parallel=parallel, training=training, optimizer=OptimizerConfig(clip_grad=0.0))
        with torch.device("meta"):
            stages = build_stages(config, mesh, VOCABULARY, MASK_ID)
        for stage in stages:
            adapt(stage, lora)
        shared = data_parallel(stages, ProteinModel.blocks, mesh, parallel, torch.float32)
        varied(shared.parameters)
        self.engine = with_optimizer(config, mesh, VOCABULARY, stages, shared)
        self.meters = Meters(mesh.world, CPU)

    def outcome(self):
        """Loss, norm and the gradients' wholes of a step, and the weights' before and behind it."""
        parameters = self.weights()
        TrainStep(self.engine, self.meters)(micro_batches(self.engine, ROWS), RATE)
        reading, state = self.meters.read(), self.engine.optimizer.state()
        moments = {name: tensor for name, tensor in state.items() if name.startswith("exp_avg/")}
        return [{"loss": torch.tensor(reading.loss), "norm": torch.tensor(reading.grad_norm),
                 **wholes(moments, self.engine.model.parameters)}, parameters, self.weights()]

    def weights(self):
        """The parameters' wholes."""
        return {name: tensor.clone() for name, tensor in
                wholes(self.engine.model.parameters, self.engine.model.parameters).items()}


def outcomes(axis, layouts):
    return {(layout, kind, layers_for(parallel)):
            Living(build_mesh(parallel, CPU, TIMEOUT), parallel, kind, layers_for(parallel)).outcome()
            for layout, parallel in layouts.items() for kind in KINDS}


@pytest.fixture(scope="module", params=[
    pytest.param((2, ON_TWO), id="2 ranks"), pytest.param((4, FOUR), id="4 ranks", marks=pytest.mark.table)])
def results(request):
    return run_ranks(outcomes, *request.param)[0]


@pytest.fixture(scope="module")
def on_one_rank():
    return {(kind, num_layers): Living(Mesh(), ParallelConfig(), kind, num_layers).outcome()
            for kind in KINDS for num_layers in (2, 4)}


def test_every_layout_drops_and_learns_what_one_rank_does(results, on_one_rank):
    for (layout, *kind), (ours, start, _) in results.items():
        expected, first, _ = on_one_rank[tuple(kind)]
        assert ours.keys() == expected.keys()
        assert all(torch.equal(start[name], first[name]) for name in first), (layout, kind)
        for name, one in expected.items():
            error = (ours[name] - one).norm() / one.norm().clamp(min=1e-6)
            assert error < 1e-5, f"{layout}, {kind}, {name}: off by {error}"


def test_adapters_alone_are_stepped_and_the_rest_stays_bit_by_bit(results, on_one_rank):
    for (layout, *kind), (state, start, end) in itertools.chain(results.items(), {
            ("one rank", *kind): outcome for kind, outcome in on_one_rank.items()}.items()):
        trained = adapters_in(start)
        assert {name.removeprefix("exp_avg/") for name in state} - {"loss", "norm"} == trained.keys()
        for name, before in start.items():
            assert torch.equal(before, end[name]) != (name in trained), f"{layout}, {kind}, {name}"
