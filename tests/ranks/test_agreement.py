"""Ranks agree on wishes, such as to stop, in the steps themselves."""

import torch

from megatron.config import Config, DataConfig, ParallelConfig, TrainingConfig
from megatron.parallel.mesh import Mesh, build_mesh
from megatron.train.step.engine import build_engine
from megatron.train.step.meters import Meters
from megatron.train.step.train_step import TrainStep
from tests.families import PROTEINLM
from tests.ranks.launch import TIMEOUT, run_ranks
from tests.ranks.test_model_layouts import CPU, PROTEINS, SEQ_LENGTH, VOCABULARY, micro_batches, row


def answers(axis):
    """What three steps answer: in the first all ranks want the second thing and the last rank both, later none does."""
    mesh = Mesh() if axis is None else build_mesh(ParallelConfig(), CPU, TIMEOUT)
    config = Config(model=PROTEINLM, data=DataConfig(seq_length=SEQ_LENGTH),
                    training=TrainingConfig(micro_batch_size=1, global_batch_size=len(PROTEINS)))
    engine = build_engine(config, mesh, VOCABULARY)
    step = TrainStep(engine, Meters(mesh.world, CPU))
    batches = micro_batches(engine, [row(lengths, number) for number, lengths in enumerate(PROTEINS)])
    is_last = mesh.world.rank == mesh.world.size - 1
    given = [step(batches, 1e-3, wishes).read() for wishes in ((is_last, True), (False, False), (False, False))]
    return torch.tensor(given)


def test_one_rank_knows_at_once_and_several_one_step_later():
    assert answers(None).tolist() == [[1, 1], [0, 0], [0, 0]]
    assert [found.tolist() for found in run_ranks(answers, 2)] == [[[0, 0], [1, 2], [0, 0]]] * 2
