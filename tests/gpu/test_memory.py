"""The planner's estimate of memory agrees with what CUDA allocates in real steps. Skipped without CUDA."""

import gc

import pytest
import torch

from megatron.config.command_line import parse
from megatron.data.batches.typical import typical_batch
from megatron.parallel.mesh import Mesh
from megatron.plan.memory import peak_memory
from megatron.plan.rank import Rank, padded_vocab_size
from megatron.train.step.engine import build_engine
from megatron.train.step.meters import Meters
from megatron.train.step.train_step import TrainStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MODEL = ["--preset", "proteinlm-200m", "--micro-batch-size", "4", "--global-batch-size", "12"]


def allocated_at_most(config):
    """Bytes that two steps allocate at their peak, beside what was allocated before."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    mesh = Mesh(device=torch.device("cuda", 0))
    step = TrainStep(build_engine(config, mesh, padded_vocab_size(config)), Meters(mesh.world, mesh.device))
    batches = [typical_batch(config.data, config.training.micro_batch_size)] * 3
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step(batches, learning_rate=1e-4, wishes=(False, False))
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("precision", [["--bf16"], ["--no-bf16"]], ids=["bf16", "fp32"])
@pytest.mark.parametrize("recompute", [[], ["--recompute-granularity", "selective"], ["--checkpoint-activations"]],
                         ids=["none", "selective", "full"])
def test_the_planners_memory_is_within_10_percent_of_cudas(precision, recompute):
    config, _ = parse([*MODEL, *precision, *recompute])
    assert peak_memory(Rank(config, 1)).peak == pytest.approx(allocated_at_most(config), rel=0.1)
