"""Models with frozen parameters, in each kind of parallelism, agree with the same model on one rank."""

import itertools
from dataclasses import replace

import pytest
import torch

from megatron.config import Config, DataConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron.errors import ConfigError
from megatron.model.initialisation import initialise
from megatron.parallel.mesh import Mesh, build_mesh
from megatron.parallel.placement import placement_of
from megatron.train.step.engine import build_engine
from megatron.train.step.meters import Meters
from megatron.train.step.train_step import TrainStep
from tests.families import PROTEINLM
from tests.ranks.launch import TIMEOUT, run_ranks
from tests.ranks.test_model_layouts import CPU, LAYOUTS, PROTEINS, SEQ_LENGTH, VOCABULARY, micro_batches, row
from tests.wholes import wholes

TRAINED = {
    "all but the embedding": lambda name: not name.startswith("embedding."),
    "the first block": lambda name: name.startswith("transformer.layers.0."),  # nothing of the last pipeline stage
    # Nothing of the first stage, and beside them weights without a gradient.
    "the last block's biases": lambda name: name.startswith("transformer.layers.3.") and name.endswith("bias"),
}
ROWS = [row(lengths, number) for number, lengths in enumerate(PROTEINS[:4])]
FULL = replace(PROTEINLM, checkpoint_activations=True, distribute_checkpointed_activations=True)
WAYS = {
    **{name: (PROTEINLM, LAYOUTS[name])
       for name in ("data", "overlapped", "pipeline", "zero-bubble", "interleaved", "context", "sequence")},
    "optimizer": (PROTEINLM, ParallelConfig(data_parallel_sharding="optimizer")),
    "parameters": (PROTEINLM, ParallelConfig(data_parallel_sharding="parameters")),
    "tensor, recomputed": (FULL, LAYOUTS["tensor"]),
}


class Living:
    """A model of which some parameters are frozen, with what trains it."""

    def __init__(self, mesh, trained, model=PROTEINLM, parallel=ParallelConfig(), weights=None):  # noqa: B008
        training = TrainingConfig(micro_batch_size=1, global_batch_size=len(ROWS))
        optimizer = OptimizerConfig(optimizer="sgd", weight_decay=0.1)
        config = Config(model=model, data=DataConfig(seq_length=SEQ_LENGTH), parallel=parallel, training=training,
                        optimizer=optimizer)

        def load(parameters):
            initialise(parameters, seed=1)
            for name, parameter in parameters.items() if weights is not None else ():
                parameter.data.copy_(placement_of(parameter).cut(weights[name], parameter))

        self.mesh = mesh
        self.engine = build_engine(config, mesh, VOCABULARY, load, is_frozen=lambda name: not trained(name))
        self.meters = Meters(mesh.world, CPU)
        self.step = TrainStep(self.engine, self.meters)

    def train(self):
        """One step on all rows; returns loss and norm."""
        self.step(micro_batches(self.engine, ROWS), 0.1)
        reading = self.meters.read()
        return {"loss": torch.tensor(reading.loss), "norm": torch.tensor(reading.grad_norm)}

    def wholes(self):
        """Weights and optimizer state, as a checkpoint gets them, on the first rank."""
        parameters, optimizer = self.engine.model.parameters, self.engine.optimizer
        return [wholes(tensors, parameters) for tensors in (parameters, optimizer.state())]


def two_steps(living):
    living.train()
    return [living.train(), *living.wholes()]


def outcomes(axis):
    found = {}
    for way, (model, parallel) in WAYS.items():
        mesh = build_mesh(parallel, CPU, TIMEOUT)
        found[way] = {kind: two_steps(Living(mesh, trained, model, parallel)) for kind, trained in TRAINED.items()}
    return found


def test_every_layout_trains_what_is_not_frozen_as_one_rank_does():
    start = {name: weight.clone() for name, weight in Living(Mesh(), TRAINED["the first block"]).wholes()[0].items()}
    expected = {kind: two_steps(Living(Mesh(), trained)) for kind, trained in TRAINED.items()}
    first, _ = run_ranks(outcomes, 2)
    for way, (kind, trained) in itertools.product(WAYS, TRAINED.items()):
        _, weights, state = first[way][kind]
        assert state.keys() == {f"momentum_buffer/{name}" for name in start if trained(name)}, (way, kind)
        assert weights.keys() == start.keys()
        for name, before in start.items():
            assert torch.equal(weights[name], before) != trained(name), f"{way}, {kind}, {name}"
        for ours, one in zip(first[way][kind], expected[kind], strict=True):
            for name, tensor in one.items():
                error = (ours[name] - tensor).norm() / tensor.norm().clamp(min=1e-6)
                assert error < 1e-5, f"{way}, {kind}, {name}: off by {error}"


def test_a_checkpoint_goes_on_with_what_was_trained_and_leaves_out_what_is_frozen_since():
    first = Living(Mesh(), TRAINED["all but the embedding"])
    first.train()
    weights, state = ({name: tensor.clone() for name, tensor in named.items()} for named in first.wholes())
    first.train()
    same, fewer = (Living(Mesh(), TRAINED[kind], weights=weights)
                   for kind in ("all but the embedding", "the last block's biases"))
    fewer.engine.optimizer.load_state(state)
    names = {key.split("/")[1] for key in fewer.engine.optimizer.state()}
    assert names == set(filter(TRAINED["the last block's biases"], weights))
    same.engine.optimizer.load_state(state)
    same.train()
    for ours, theirs in zip(same.wholes(), first.wholes(), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def refusal(axis):
    parallel = LAYOUTS["pipeline"]
    try:
        Living(build_mesh(parallel, CPU, TIMEOUT), lambda name: False, parallel=parallel)
    except ConfigError as error:
        return str(error)


def test_a_model_of_which_nothing_is_trained_is_refused_on_every_rank():
    with pytest.raises(ConfigError, match="every parameter of the model is frozen.*leave some trainable"):
        Living(Mesh(), lambda name: False)
    assert ["every parameter of the model is frozen" in text for text in run_ranks(refusal, 2)] == [True, True]
