"""Whole models in many layouts, whose ranks all run in one process, agree with the model on one rank.

The micro-batches of the layouts have filler and padding, those of the one rank have neither: neither changes anything.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron.config import (
    Config,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainingConfig,
)
from megatron.data.batches.batch import BatchShape, collate
from megatron.data.rows.packed import Row
from megatron.model.initialisation import initialise
from megatron.parallel.mesh import Mesh, build_mesh
from megatron.parallel.placement import placement_of
from megatron.parallel.randomness import seed_for
from megatron.train.step.engine import build_engine, stream_of
from megatron.train.step.meters import Meters
from megatron.train.step.train_step import TrainStep
from tests.families import FAMILIES, MASK_ID
from tests.ranks.launch import TIMEOUT, run_ranks
from tests.wholes import wholes

VOCABULARY, SEQ_LENGTH, CPU = 32, 40, torch.device("cpu")
PROTEINS = ((40,), (7, 1, 12), (), (3, 30, 5), (1,), (20, 20), (9, 9, 9), (2,))  # rows, one of them empty

PP2 = ParallelConfig(pipeline_model_parallel_size=2)
LAYOUTS = {
    "data": ParallelConfig(), "overlapped": ParallelConfig(DDP_impl="torch"),
    "gradients": ParallelConfig(data_parallel_sharding="gradients"),
    "pipeline": PP2, "zero-bubble": replace(PP2, pipeline_schedule="zero-bubble"),
    "interleaved": replace(PP2, num_layers_per_virtual_pipeline_stage=1),
    "uneven": replace(PP2, decoder_first_pipeline_num_layers=1),
    "context": ParallelConfig(context_parallel_size=2),
    "tensor": ParallelConfig(tensor_model_parallel_size=2),
    "sequence": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
}
ON_FOUR = {
    "pipeline of 4": ParallelConfig(pipeline_model_parallel_size=4),
    "zero-bubble of 4": ParallelConfig(pipeline_model_parallel_size=4, pipeline_schedule="zero-bubble"),
    "pipeline, sharded": replace(PP2, data_parallel_sharding="parameters"),
    "pipeline, interleaved, sharded": replace(PP2, data_parallel_sharding="optimizer",
                                              num_layers_per_virtual_pipeline_stage=1),
    "pipeline, sequence, zero-bubble": replace(PP2, tensor_model_parallel_size=2, sequence_parallel=True,
                                               pipeline_schedule="zero-bubble"),
    "pipeline, context": replace(PP2, context_parallel_size=2),
    "pipeline, overlapped": replace(PP2, DDP_impl="torch"),
    "sequence, sharded": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True,
                                        data_parallel_sharding="parameters"),
    "context, tensor": ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=2),
    "context of 4": ParallelConfig(context_parallel_size=4),
    "sharded within 2": ParallelConfig(data_parallel_sharding="parameters", shard_within=2),
}


def row(lengths, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(6, 31, sum(lengths))
    targets = np.arange(seed % 3, len(tokens), 4)
    return Row(tokens_t=tokens, lengths=np.array(lengths, dtype=np.int64), target_positions_m=targets,
               target_ids_m=tokens[targets])


def micro_batches(engine, rows):
    """This rank's share of `rows`, one in each micro-batch; with filler and padding unless there is one rank."""
    mesh, multiple = engine.mesh, stream_of(engine.config, engine.mesh).token_multiple
    if mesh.world.size == 1:
        return [collate([each], BatchShape(len(each.tokens_t), max(1, len(each.lengths)), len(each.target_ids_m),
                                           max_length=SEQ_LENGTH)) for each in rows]
    shape = BatchShape(num_tokens=SEQ_LENGTH + -SEQ_LENGTH % multiple, num_proteins=4, num_targets=12,
                       max_length=SEQ_LENGTH, share=mesh.context.rank, num_shares=mesh.context.size)
    return [collate([each], shape) for each in rows[mesh.data.rank::mesh.data.size]]


def layers_for(parallel: ParallelConfig) -> int:
    """Two for each stage of a pipeline of two, one for each of four; two where all are on each rank."""
    return 4 if parallel.pipeline_model_parallel_size > 1 else 2


class Living:
    """A model of a family in one layout, ready to step."""

    def __init__(self, mesh: Mesh, parallel: ParallelConfig, family: str, precision: str, num_layers: int) -> None:
        training = TrainingConfig(micro_batch_size=1, global_batch_size=len(PROTEINS))
        config = Config(model=replace(FAMILIES[family], num_layers=num_layers), parallel=parallel, training=training,
                        data=DataConfig(seq_length=SEQ_LENGTH), precision=PRECISIONS[precision],
                        optimizer=OptimizerConfig(clip_grad=0.0))
        self.engine = build_engine(config, mesh, VOCABULARY, varied, mask_id=MASK_ID)
        self.meters = Meters(mesh.world, CPU)
        self.step = TrainStep(self.engine, self.meters)

    def outcome(self):
        """Loss, norm, and the gradients' wholes (from Adam's first moment) after one step on all rows."""
        rows = [row(lengths, number) for number, lengths in enumerate(PROTEINS)]
        self.step(micro_batches(self.engine, rows), 0.0)
        reading = self.meters.read()
        state = self.engine.optimizer.state()
        moments = {name: tensor for name, tensor in state.items() if name.startswith("exp_avg/")}
        gradients = wholes(moments, self.engine.model.parameters)
        return {"loss": torch.tensor(reading.loss), "norm": torch.tensor(reading.grad_norm), **gradients,
                "counted": torch.tensor([reading.num_tokens, reading.num_residues, reading.masked_accuracy])}


PRECISIONS = {"fp32": PrecisionConfig(), "bf16": PrecisionConfig(bf16=True)}
KINDS = [("proteinlm", "fp32"), ("esm2", "fp32"), ("esm2", "bf16"), ("protbert", "fp32"), ("recipe", "fp32")]


def varied(parameters):
    """Fills parameters so that none is without effect: what starts at 0 or 1 is near it."""
    initialise(parameters, 1234)
    with torch.no_grad():
        for name, parameter in parameters.items():
            generator = torch.Generator().manual_seed(seed_for(5, name))
            whole = 0.02 * torch.randn(placement_of(parameter).whole_shape(parameter), generator=generator)
            parameter.add_(placement_of(parameter).cut(whole, parameter))


def outcomes(axis, layouts):
    """What each layout's models give after a step, all of them built before the first one's step."""
    living = {}
    for layout, parallel in layouts.items():
        mesh = build_mesh(parallel, CPU, TIMEOUT)
        kinds = [(*kind, layers_for(parallel)) for kind in KINDS]
        living |= {(layout, *kind): Living(mesh, parallel, *kind) for kind in kinds}
    return {name: each.outcome() for name, each in living.items()}


@pytest.fixture(scope="module", params=[
    pytest.param((2, LAYOUTS), id="2 ranks"), pytest.param((4, ON_FOUR), id="4 ranks", marks=pytest.mark.table)])
def results(request):
    return run_ranks(outcomes, *request.param)


@pytest.fixture(scope="module")
def on_one_rank():
    kinds = [(*kind, num_layers) for kind in KINDS for num_layers in (2, 4)]
    return {kind: Living(Mesh(), ParallelConfig(), *kind).outcome() for kind in kinds}


def test_models_of_all_layouts_live_in_one_process_and_learn_what_one_rank_learns(results, on_one_rank):
    first, *others = results
    for layout, ours in first.items():
        if "fp32" in layout:
            for name, expected in on_one_rank[layout[1:]].items():
                error = (ours[name] - expected).norm() / expected.norm().clamp(min=1e-6)
                is_scale = name.endswith("_scale")  # one number: a sum of thousands of both signs
                assert error < (5e-5 if is_scale else 1e-5), f"{layout}, {name}: off by {error}"
    for other, layout in itertools.product(others, first):
        assert other[layout]["loss"] == first[layout]["loss"]
        assert other[layout]["norm"] == first[layout]["norm"]


def test_in_bf16_every_layout_is_as_near_to_fp32_as_one_rank_is(results, on_one_rank):
    for layout, ours in results[0].items():
        if "bf16" in layout:
            exact, twin = (on_one_rank[layout[1], precision, layout[3]] for precision in PRECISIONS)
            assert distance(ours, exact) < 1.5 * distance(twin, exact), layout


def distance(outcome, exact):
    return torch.cat([(outcome[name] - exact[name]).flatten() for name in exact if name.startswith("exp_avg/")]).norm()
