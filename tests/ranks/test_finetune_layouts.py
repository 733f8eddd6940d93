"""Fine-tuning in many layouts, with every kind of label, agrees with one rank in losses and predictions."""

import itertools
from dataclasses import replace

import torch

from megatron.config import OptimizerConfig, ParallelConfig
from megatron.config.lora import LoraConfig
from megatron.finetune.data.batches import PackedExamples
from megatron.finetune.data.tasks import LABEL_KINDS
from megatron.finetune.predictions.collected import predictions, settings_of
from megatron.log import Log
from megatron.parallel.mesh import Mesh, build_mesh
from megatron.train.step.meters import Meters
from megatron.train.step.train_step import TrainStep
from tests.families import ESM2
from tests.ranks.launch import TIMEOUT, run_ranks
from tests.ranks.test_model_layouts import CPU, LAYOUTS, layers_for
from tests.tasks import SPACES, VOCAB, as_tensors, checkpoint_of, config_of, described, examples_of

MODEL = replace(ESM2, hidden_dropout=0.1)
LORA = LoraConfig(lora_rank=4, lora_dropout=0.1)
HEADS = {kind: {"dropout": 0.2} for kind in LABEL_KINDS} | {"class": {"pooling": "cls", "class_weights": (0.5, 1, 2)}}
OTHERS = [("sequence", "number", "all"), ("sequence", "residues", "all"), ("sequence", "contacts", "all"),
          ("tensor", "class", "all"), ("zero-bubble", "residues", "all"), ("interleaved", "classes", "all"),
          ("parameters", "residues", "all"), ("parameters", "contacts", "all"), ("optimizer", "class", "all"),
          ("pipeline", "residues", "head"), ("data", "class", "head"), ("parameters", "number", "head"),
          ("pipeline", "number", "adapters"), ("tensor", "residues", "adapters"), ("data", "classes", "adapters")]


def outcome(mesh, parallel, kind, how, num_layers, num_steps=2):
    """The losses and norms of some steps, then the predictions for other proteins."""
    model = replace(MODEL, num_layers=num_layers)
    config = config_of(model, parallel, optimizer=OptimizerConfig(optimizer="sgd"))
    task = replace(described(kind, **HEADS[kind]), lora=LORA if how == "adapters" else None)
    engine = task.begin(config, mesh, VOCAB, checkpoint_of(model), 7, how == "head")
    meters = Meters(mesh.world, CPU)
    step, settings = TrainStep(engine, meters), settings_of(engine, 5)
    rows = PackedExamples(examples_of(kind, 30), SPACES[kind], VOCAB, settings, is_training=True)
    curve = []
    for batches in itertools.islice(rows.steps(0), num_steps):
        step(batches, 0.05)
        reading = meters.read()
        curve += [reading.loss, reading.grad_norm]
    others = PackedExamples(examples_of(kind, 9, seed=1), SPACES[kind], VOCAB, settings, is_training=False)
    predicted = predictions(engine, task.head, others, Log(is_speaker=False), "test")
    return {"curve": torch.tensor(curve), "predicted": as_tensors(predicted)}


def outcomes(axis, cases):
    meshes = {name: build_mesh(layout_of(name), CPU, TIMEOUT) for name in dict.fromkeys(name for name, *_ in cases)}
    return {case: outcome(meshes[case[0]], layout_of(case[0]), *kind_of(case)) for case in cases}


def layout_of(name):
    return LAYOUTS[name] if name in LAYOUTS else ParallelConfig(data_parallel_sharding=name)


def kind_of(case):
    """What it has in common with others on one rank: labels, what is trained, and the number of layers."""
    return *case[1:], layers_for(layout_of(case[0]))


def test_every_layout_learns_and_predicts_what_one_rank_does():
    cases = [*itertools.product(("data", "pipeline", "context"), LABEL_KINDS, ["all"]), *OTHERS]
    expected = {kind: outcome(Mesh(), ParallelConfig(), *kind) for kind in set(map(kind_of, cases))}
    for found in run_ranks(outcomes, 2, cases):
        for case, name in itertools.product(cases, ("curve", "predicted")):
            tensor = expected[kind_of(case)][name]
            error = (found[case][name] - tensor).norm() / tensor.norm()
            assert error < 1e-5, f"{case}, {name}: off by {error}"
