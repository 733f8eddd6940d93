"""The bytes that real ranks send in a training step are exactly those that the planner predicts."""

import pytest
import torch
import torch.distributed as dist

from megatron.config.command_line import parse
from megatron.data.batches.typical import typical_batch
from megatron.parallel.mesh import build_mesh
from megatron.parallel.traffic import TrafficCounter
from megatron.plan.messages import step_traffic
from megatron.plan.rank import Rank, padded_vocab_size
from megatron.train.step.engine import build_engine, stream_of
from megatron.train.step.meters import Meters
from megatron.train.step.spikes import SpikeJudge
from megatron.train.step.train_step import TrainStep
from tests.packed import fused_by_definition
from tests.ranks.launch import TIMEOUT, run_ranks

MODEL = ["--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "64", "--lr", "1e-3",
         "--train-iters", "1", "--micro-batch-size", "2", "--global-batch-size", "8"]
LAYOUTS = {
    "tp2-sequence": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "tp2-fp8": ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--bf16", "--fp8", "hybrid"],
    "tp2-full": ["--tensor-model-parallel-size", "2", "--checkpoint-activations", "--hidden-dropout", "0"],
    "dp2-parameters": ["--data-parallel-sharding", "parameters"],
    "pp2-skip": ["--pipeline-model-parallel-size", "2", "--on-spike", "skip"],
    "cp2": ["--context-parallel-size", "2"],
}


def configuration(name):
    return parse([*MODEL, *LAYOUTS[name]])[0]


def sent_in_a_step(axis):
    """The bytes that this rank sends in one step of each layout, by axis and operation."""
    return {name: counted_step(configuration(name)) for name in LAYOUTS}


def counted_step(config):
    mesh = build_mesh(config.parallel, torch.device("cpu"), TIMEOUT)
    judge = SpikeJudge(config.guards, mesh.device, False) if config.guards.on_spike == "skip" else None
    step = TrainStep(build_engine(config, mesh, padded_vocab_size(config)), Meters(mesh.world, mesh.device),
                     judge=judge)
    rows = config.training.micro_batch_size
    stream = stream_of(config, mesh)
    batch = typical_batch(config.data, rows, stream.token_multiple, mesh.context.rank, mesh.context.size)
    batches = [batch] * (config.training.global_batch_size // (rows * mesh.data.size))
    # What a planner's tensors stand for is a GPU's; on CPUs context ranks keep less, and gather once more instead.
    with TrafficCounter(mesh) as counter, fused_by_definition():
        step(batches, learning_rate=1e-3, wishes=(False, False))
    return dict(counter.traffic.sent)


@pytest.fixture(scope="module")
def counted():
    assert not dist.is_initialized()
    return run_ranks(sent_in_a_step, 2)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("number", [0, 1])
def test_real_ranks_send_what_the_planner_says(counted, name, number):
    planned = step_traffic(Rank(configuration(name), 2, number)).sent
    # The two ranks of a layout are one group, whatever axes it has: bytes of one operation are counted together.
    assert by_operation(counted[number][name]) == by_operation(planned)


def by_operation(sent):
    totals = {}
    for (_, operation), size in sent.items():
        totals[operation] = totals.get(operation, 0) + size
    return {operation: size for operation, size in totals.items() if size}
