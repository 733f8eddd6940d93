"""Checkpoints of one layout, loaded and saved again by others, keep every bit of weights and moments."""

import itertools
import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from megatron.checkpoint.loading import load_model, load_optimizer
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.saving import Saver, parts_of
from megatron.checkpoint.store import find, open_place, place_of
from megatron.config import CheckpointConfig, Config, DataConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron.log import Log
from megatron.parallel.mesh import Mesh, build_mesh, with_writers
from megatron.train.step.engine import build_engine
from megatron.train.step.meters import Meters
from megatron.train.step.train_step import TrainStep
from tests.families import PROTEINLM
from tests.ranks.launch import TIMEOUT, run_ranks
from tests.ranks.test_model_layouts import CPU, PROTEINS, SEQ_LENGTH, VOCABULARY, micro_batches, row
from tests.tables import tried

# Rows that no number of ranks divides, and a vocabulary whose last slices hold padding.
ODD = replace(PROTEINLM, hidden_size=24, kv_channels=6, ffn_hidden_size=52, max_position_embeddings=61,
              make_vocab_size_divisible_by=31)
TP2 = ParallelConfig(tensor_model_parallel_size=2)
WRITERS = {name: replace(TP2, data_parallel_sharding=name) for name in ("none", "optimizer", "gradients", "parameters")}
READERS = {
    "pipeline": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "tensor": (4, ParallelConfig(tensor_model_parallel_size=4)),
    "context": (2, ParallelConfig(context_parallel_size=2)),
    "one rank": (1, ParallelConfig()),
}
MORE_READERS = {
    "interleaved": (2, ParallelConfig(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)),
    "shares": (4, ParallelConfig(data_parallel_sharding="parameters", shard_within=2)),
}

PAIRS = [*itertools.product(WRITERS, READERS), *itertools.product(["parameters"], MORE_READERS)]
ROWS = [row(lengths, number) for number, lengths in enumerate(PROTEINS[:2])]
EACH_TIME = [*zip(WRITERS, READERS, strict=True), ("parameters", "shares")]


def pass_on(axis, parallel, source, target):
    """What a run in one layout does: load, or else take a step, and save."""
    mesh = with_writers(build_mesh(parallel, CPU, TIMEOUT), TIMEOUT) if axis is not None else Mesh()
    training = TrainingConfig(micro_batch_size=1, global_batch_size=len(ROWS))
    config = Config(model=ODD, data=DataConfig(seq_length=SEQ_LENGTH), parallel=parallel, training=training,
                    optimizer=OptimizerConfig())
    checkpoint = None if source is None else find(source, mesh.world, Log(is_speaker=False))
    if checkpoint is None:
        engine = build_engine(config, mesh, VOCABULARY - 1)
        TrainStep(engine, Meters(mesh.world, CPU))(micro_batches(engine, ROWS), 1e-3)
    else:
        engine = build_engine(config, mesh, VOCABULARY - 1,
                              lambda parameters: load_model(parameters, checkpoint, checkpoint.model.keys()))
        engine.optimizer.load_state(load_optimizer(engine.model.parameters, checkpoint))
    saver = Saver(CheckpointConfig(save=target), mesh, None, Log(is_speaker=False), 0)
    for iteration, moments in ((0, {}), (1, engine.optimizer.state())):  # so that there is more to share the next time
        saver.save(iteration, parts_of(engine.model.parameters, moments), {"iteration": iteration})
    saver.close()


def content(folder):
    """Every tensor of the checkpoint, whole."""
    checkpoint = open_place(place_of(folder, 1))
    return {name: tensor.read() for table in (checkpoint.model, checkpoint.optimizer) for name, tensor in table.items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """A function that has dp2 x tp2 save in one of the ways to share out, once: the folder, the layout, the content."""
    @cache
    def once(name):
        folder = tmp_path_factory.mktemp("written")
        run_ranks(pass_on, 4, WRITERS[name], None, str(folder))
        return folder, WRITERS[name], content(folder)

    return once


@pytest.fixture
def written(request, write):
    return write(request.param)


@pytest.mark.parametrize(("written", "name"), tried(PAIRS, EACH_TIME), indirect=["written"])
def test_a_checkpoint_goes_into_another_layout_and_back_without_a_changed_bit(written, tmp_path, name):
    folder, writer, expected = written
    ranks, reader = (READERS | MORE_READERS)[name]
    if ranks == 1:
        pass_on(None, reader, str(folder), str(tmp_path / "there"))
    else:
        run_ranks(pass_on, ranks, reader, str(folder), str(tmp_path / "there"))
    assert_equal(content(tmp_path / "there"), expected)
    run_ranks(pass_on, 4, writer, str(tmp_path / "there"), str(tmp_path / "back"))
    assert_equal(content(tmp_path / "back"), expected)


@pytest.mark.parametrize("written", WRITERS, indirect=True)
def test_ranks_that_hold_the_same_share_the_writing(written):
    manifest = read_manifest(place_of(written[0], 1))
    sizes = [facts.num_bytes for name, facts in manifest.files.items() if name.startswith("optimizer")]
    assert len(sizes) == 4
    assert max(sizes) < 0.4 * sum(sizes)
    pieces = [sizes for facts in manifest.tensors.values() for _, sizes, _ in facts.pieces]
    assert sum(map(math.prod, pieces)) == sum(tensor.numel() for tensor in written[2].values())  # each element once
