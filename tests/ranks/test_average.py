"""The averaged weights in layouts of two ranks, after steps with cautious weight decay, equal those of one rank."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.checkpoint.loading import load_average
from megatron.checkpoint.saving import Saver, parts_of
from megatron.checkpoint.store import open_place, place_of
from megatron.config import CheckpointConfig, Config, DataConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron.log import Log
from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.mesh import Mesh, build_mesh, with_writers
from megatron.train.step.engine import build_engine
from megatron.train.step.meters import Meters
from megatron.train.step.passes import EvaluationPasses
from megatron.train.step.train_step import TrainStep
from tests.families import PROTEINLM
from tests.ranks.launch import TIMEOUT, run_ranks
from tests.ranks.test_model_layouts import CPU, PROTEINS, SEQ_LENGTH, VOCABULARY, micro_batches, row
from tests.wholes import wholes

LAYOUTS = {
    "tensor": ParallelConfig(tensor_model_parallel_size=2), "pipeline": ParallelConfig(pipeline_model_parallel_size=2),
    **{name: ParallelConfig(data_parallel_sharding=name) for name in ("optimizer", "gradients", "parameters")}}
DECAY, NUM_STEPS = 0.25, 4
ROWS = [row(lengths, number) for number, lengths in enumerate(PROTEINS[:4])]
# A denominator that no rounding of a gradient is large beside.
OPTIMIZER = OptimizerConfig(ema=DECAY, weight_decay=0.5, cautious_weight_decay=True, adam_eps=1e-2, clip_grad=0.0)


def made(mesh, parallel):
    config = Config(model=PROTEINLM, data=DataConfig(seq_length=SEQ_LENGTH), parallel=parallel, optimizer=OPTIMIZER,
                    training=TrainingConfig(micro_batch_size=1, global_batch_size=len(ROWS)))
    return build_engine(config, mesh, VOCABULARY)


def loss(engine, batches):
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad(), engine.evaluating():
        engine.pipeline.evaluate(EvaluationPasses(engine, iter(batches), sums), len(batches))
    sums = all_reduce_sum(sums, engine.mesh.world)
    return sums[0] / sums[2]


def trained(axis, parallel, target):
    """The weights before and after each step, and the average of the last; losses of each, own first and last."""
    mesh = with_writers(build_mesh(parallel, CPU, TIMEOUT), TIMEOUT) if axis is not None else Mesh()
    engine = made(mesh, parallel)
    batches = micro_batches(engine, ROWS)
    step, parameters = TrainStep(engine, Meters(mesh.world, CPU)), engine.model.parameters
    weights, losses = [wholes(parameters, parameters)], []
    for number in range(NUM_STEPS):
        step(batches, 1e-2)
        if number == NUM_STEPS - 2:  # evaluation between steps leaves nothing behind
            losses.append(loss(engine, batches))
            with engine.averaged():
                losses.append(loss(engine, batches))
            losses.append(loss(engine, batches))
        weights.append(wholes(parameters, parameters))
    saver = Saver(CheckpointConfig(save=target), mesh, None, Log(is_speaker=False), 0)
    saver.save(1, parts_of(parameters, {}, engine.average.tensors), {"iteration": 1})
    saver.close()
    return {"weights": weights, "average": wholes(engine.average.tensors, parameters), "losses": torch.stack(losses)}


def loaded(axis, parallel, source):
    """The average of a checkpoint in a layout."""
    engine = made(build_mesh(parallel, CPU, TIMEOUT), parallel)
    load_average(engine.average.tensors, engine.model.parameters, open_place(place_of(Path(source), 1)))
    return wholes(engine.average.tensors, engine.model.parameters)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, trained(None, ParallelConfig(), str(folder))


@pytest.fixture(scope="module", params=LAYOUTS)
def outcome(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return LAYOUTS[request.param], folder, run_ranks(trained, 2, LAYOUTS[request.param], str(folder))[0]


def plain_average(weights):
    """By a loop over the steps, in double precision."""
    average = weights[0].double().numpy()
    for number, weight in enumerate(weights[1:], 1):
        kept = min(DECAY, (1 + number) / (10 + number))
        average = kept * average + (1 - kept) * weight.double().numpy()
    return average


def test_it_is_that_of_a_plain_loop_and_of_one_rank(outcome, alone):
    _, _, ours = outcome
    for name, average in ours["average"].items():
        expected = plain_average([weights[name] for weights in ours["weights"]])
        np.testing.assert_allclose(average.numpy(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(average, alone[1]["average"][name], rtol=1e-4, atol=1e-5)
    assert ours["average"].keys() == alone[1]["average"].keys()


def test_evaluation_is_of_the_average_and_leaves_the_weights_as_they_were(outcome, alone):
    own, average, again = ours = outcome[2]["losses"]
    assert own == again != average
    torch.testing.assert_close(ours, alone[1]["losses"], rtol=1e-5, atol=0)
    for name, weight in outcome[2]["weights"][-1].items():
        torch.testing.assert_close(weight, alone[1]["weights"][-1][name], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_has_it_for_other_layouts_bit_for_bit(outcome, alone):
    parallel, folder, ours = outcome
    stored = open_place(place_of(folder, 1)).average
    assert stored.keys() == ours["average"].keys()
    assert all(torch.equal(tensor.read(), ours["average"][name]) for name, tensor in stored.items())
    there = run_ranks(loaded, 2, parallel, str(alone[0]))[0]
    assert all(torch.equal(tensor, alone[1]["average"][name]) for name, tensor in there.items())
