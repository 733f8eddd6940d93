"""Models with a task's head: which parameters are trained, and what the model's folder says."""

from dataclasses import replace

import pytest
import torch

from megatron.config import OptimizerConfig
from megatron.errors import CheckpointError
from megatron.finetune.data.batches import PackedExamples
from megatron.finetune.model import TASK_FILE, Described
from megatron.finetune.predictions.collected import settings_of
from megatron.parallel.mesh import Mesh
from megatron.train.step.meters import Meters
from megatron.train.step.train_step import TrainStep
from tests.families import ESM2, PROTEINLM
from tests.tasks import SPACES, VOCAB, checkpoint_of, config_of, described, examples_of


@pytest.fixture(params=[PROTEINLM, ESM2], ids=["proteinlm", "esm2"])
def model(request):
    return request.param


def begun(model, is_head_only, seed=7):
    return described("residues").begin(config_of(model), Mesh(), VOCAB, checkpoint_of(model), seed, is_head_only)


def step_of(engine):
    """Takes one step; gives the gradients that there were, by name."""
    rows = PackedExamples(examples_of("residues", 10), SPACES["residues"], VOCAB, settings_of(engine, 0), True)
    found = {}
    before_update = engine.optimizer.step

    def step(*arguments):
        found.update({name: parameter.grad for name, parameter in engine.model.parameters.items()
                      if parameter.grad is not None})
        return before_update(*arguments)

    engine.optimizer.step = step
    TrainStep(engine, Meters(Mesh().world, torch.device("cpu")))(next(rows.steps(0)), 0.1)
    return found


def test_a_frozen_model_stays_bit_by_bit_and_keeps_neither_gradients_nor_activations(model):
    engine = begun(model, is_head_only=True)
    before = {name: parameter.clone() for name, parameter in engine.model.parameters.items()}
    inputs = []
    engine.stages[0].task_head.register_forward_pre_hook(lambda head, arguments: inputs.append(arguments[0]))
    gradients = step_of(engine)
    head = {name for name in before if name.startswith("task_head.")}
    assert gradients.keys() == head and len(head) == 4
    assert inputs and not any(hidden.requires_grad for hidden in inputs), "so that nothing is kept to go back through"
    assert {key.split("/")[1] for key in engine.optimizer.state()} == head
    for name, parameter in engine.model.parameters.items():
        assert torch.equal(parameter, before[name]) != (name in head), name


def test_all_of_a_model_is_trained_unless_it_is_frozen(model):
    engine = begun(model, is_head_only=False)
    assert step_of(engine).keys() == engine.model.parameters.keys()


def test_weights_come_from_the_checkpoint_and_those_of_the_head_from_the_seed(model):
    first, same, other = (begun(model, False, seed).model.parameters for seed in (7, 7, 8))
    stored = checkpoint_of(model).model
    for name, parameter in first.items():
        assert torch.equal(parameter, same[name])
        if name.startswith("task_head."):
            assert torch.equal(parameter, other[name]) != name.endswith("weight")
        else:
            assert torch.equal(parameter, stored[name].read())
    assert not any(name.startswith(("lm_head.", "contact_head.")) for name in first)


def test_a_checkpoint_of_another_shape_is_refused():
    config = config_of(PROTEINLM)
    for checkpoint, said in ((checkpoint_of(replace(PROTEINLM, num_layers=2)), "is not in"),
                             (checkpoint_of(replace(PROTEINLM, ffn_hidden_size=32)), "and .* here")):
        with pytest.raises(CheckpointError, match=said):
            described("class").begin(config, Mesh(), VOCAB, checkpoint, 1, False)


def test_rates_of_their_own_are_for_the_head():
    config = config_of(PROTEINLM, optimizer=OptimizerConfig(head_lr=1e-3))
    engine = described("class").begin(config, Mesh(), VOCAB, checkpoint_of(PROTEINLM), 1, False)
    heads = [group for group in engine.optimizer._param_groups() if group["group"] == "head"]
    assert sum(len(group["params"]) for group in heads) == 4


@pytest.mark.parametrize("kind", SPACES)
def test_what_a_folder_tells_is_what_was_written(kind, tmp_path):
    told = described(kind, class_weights=(0.5, 1.0), mean=2.5, pooling="cls")
    told.write(tmp_path)
    assert Described.read(tmp_path) == told


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"task": {"name": 3}, "space": {}, "head": {"new": 1}}'])
def test_a_damaged_folder_is_refused(content, tmp_path):
    (tmp_path / TASK_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=f"{TASK_FILE} cannot be read"):
        Described.read(tmp_path)
