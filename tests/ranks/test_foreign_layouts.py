"""ProteinLM's checkpoint, and hand-made ones of its kind, give the same logits loaded into several layouts."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron.checkpoint.convert import megatron_v2
from megatron.checkpoint.loading import load_model
from megatron.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainingConfig
from megatron.parallel.mesh import Mesh, build_mesh
from megatron.parallel.placement import Part
from megatron.train.step.engine import build_engine
from tests.megatron_files import ROWS, wholes, write_original
from tests.packed import packed_batch
from tests.ranks.launch import TIMEOUT, run_ranks
from tests.unit.test_fixture_parity import CONFIG, FIXTURE, flat
from tests.wholes import assembled

LAYOUTS = {
    "tensor of 2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "tensor of 4": (4, ParallelConfig(tensor_model_parallel_size=4)),
    "pipeline": (2, ParallelConfig(pipeline_model_parallel_size=2)),
}
SMALL = ModelConfig(num_layers=4, hidden_size=16, num_attention_heads=4, ffn_hidden_size=24, kv_channels=4,
                    max_position_embeddings=12, layernorm_epsilon=1e-12, make_vocab_size_divisible_by=ROWS,
                    attention_dropout=0.0, hidden_dropout=0.0)


def logits(axis, parallel, folder, model, sequence, num_rows):
    """[t, rows] of a sequence by the checkpoint's weights, on every rank."""
    mesh = build_mesh(parallel, torch.device("cpu"), TIMEOUT) if axis is not None else Mesh()
    config = Config(model=model, data=DataConfig(seq_length=len(sequence.tokens_t)), parallel=parallel,
                    training=TrainingConfig(micro_batch_size=1))
    checkpoint = megatron_v2.read(folder)
    engine = build_engine(config, mesh, num_rows,
                          lambda parameters: load_model(parameters, checkpoint, checkpoint.model.keys()))
    [stage] = engine.stages
    with torch.no_grad():
        hidden = stage.embedding(sequence) if stage.stage.is_first else torch.empty(
            len(sequence.tokens_t), model.hidden_size)
        if not stage.stage.is_first:
            dist.recv(hidden, 0)
        hidden = stage.transformer(hidden, sequence)
        if not stage.stage.is_last:
            dist.send(hidden, 1)
            return assembled({})["logits"]
        positions = torch.arange(len(sequence.tokens_t))
        local = stage.logits(stage.stream.pick(hidden, positions))
    shape = (len(local), num_rows)
    kept = local[:, :max(0, num_rows - mesh.tensor.rank * local.shape[1])]
    return assembled({"logits": Part(kept, (0, mesh.tensor.rank * local.shape[1]), shape)})["logits"]


def on_layout(name, *what):
    ranks, parallel = LAYOUTS[name]
    return run_ranks(logits, ranks, parallel, *what)[0]


@pytest.mark.skipif(not FIXTURE.is_dir(), reason="needs the folder shared/ beside the checkout")
@pytest.mark.parametrize("name", LAYOUTS)
def test_proteinlms_weights_give_its_logits_in_every_layout(name, tmp_path):
    batch = np.load(FIXTURE / "forward.npz")
    is_real_bs, sequence = flat(batch["tokens"], batch["padding_mask"])
    place = FIXTURE / "checkpoint" / "iter_0000003"
    ours = on_layout(name, place, CONFIG, sequence, 128)
    torch.testing.assert_close(ours, torch.from_numpy(batch["logits"])[is_real_bs], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_of_any_layout_give_the_logits_of_one_rank_in_every_layout(name, tmp_path):
    sequence, values = packed_batch(12, 3, 8, 1).sequence, wholes()
    write_original(tmp_path / "one", values=values)
    expected = logits(None, ParallelConfig(), tmp_path / "one", SMALL, sequence, ROWS)
    for version, tensor, pipeline in ((0, 2, (4,)), (1.0, 4, (4,)), (2.0, 1, (3, 1)), (3.0, 2, (2, 2))):
        folder = tmp_path / f"{tensor} x {len(pipeline)}"
        write_original(folder, values=values, version=version, tensor=tensor, pipeline=pipeline)
        torch.testing.assert_close(on_layout(name, folder, SMALL, sequence, ROWS), expected, atol=2e-5, rtol=1e-5)
