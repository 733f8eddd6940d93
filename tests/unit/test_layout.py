"""The layout of ranks: which ranks communicate, which layouts are refused, and the same weights in all of them."""

import pytest
import torch

from megatron.config import ModelConfig, PrecisionConfig
from megatron.config.command_line import parse
from megatron.errors import ConfigError
from megatron.model.initialisation import initialise
from megatron.model.protein_model import ProteinModel
from megatron.parallel.layout import check_layout
from megatron.parallel.mesh import Axis, line_through
from megatron.parallel.placement import placement_of
from megatron.parallel.tensor.stream import Stream
from pretrain_tape import main

CONFIG = ModelConfig(num_layers=1, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, kv_channels=8,
                     max_position_embeddings=16)


def test_tensor_ranks_are_neighbours():
    grid = {"pipeline": 2, "data": 2, "context": 2, "tensor": 2}
    assert [line_through(grid, [name], 5) for name in grid] == [[5, 13], [1, 5], [5, 7], [4, 5]]
    assert line_through(grid, ["data", "context"], 5) == [1, 3, 5, 7]
    assert line_through(grid, ["data", "context"], 10) == [8, 10, 12, 14]


@pytest.mark.parametrize(("flags", "ranks", "message"), [
    ("--tensor-model-parallel-size 3", 3,
     "--num-attention-heads 4 is not divisible by --tensor-model-parallel-size 3; the nearest size that can be is 2"),
    ("--tensor-model-parallel-size 4 --ffn-hidden-size 6", 4,
     "--ffn-hidden-size 6 is not divisible by --tensor-model-parallel-size 4; the nearest size that can be is 2"),
    ("--tensor-model-parallel-size 2", 1,
     "--tensor-model-parallel-size 2 does not divide the number of ranks, 1; start 2, or give "
     "--tensor-model-parallel-size 1"),
    ("--tensor-model-parallel-size 4", 6,
     "--tensor-model-parallel-size 4 does not divide the number of ranks, 6; start 4 or 8, or give "
     "--tensor-model-parallel-size 2"),
    ("--sequence-parallel", 2, "--sequence-parallel shares the tokens out among tensor-parallel ranks, and "
     "--tensor-model-parallel-size is 1; leave it out, or give 2 there"),
    ("--distribute-checkpointed-activations --tensor-model-parallel-size 2", 2,
     "--distribute-checkpointed-activations is about what --checkpoint-activations keeps; give both, or neither"),
    ("--distribute-checkpointed-activations --checkpoint-activations", 2,
     "--tensor-model-parallel-size is 1; leave it out"),
    ("--distribute-checkpointed-activations --checkpoint-activations --tensor-model-parallel-size 2 "
     "--sequence-parallel", 2, "has nothing to add to --sequence-parallel"),
    ("--pipeline-model-parallel-size 5", 5, "--num-layers 4 is fewer than the stages of "
     "--pipeline-model-parallel-size 5; "
     "the nearest size that can be is 4"),
    ("--pipeline-model-parallel-size 2", 3, "--pipeline-model-parallel-size 2 does not divide the number of ranks, 3; "
     "start 2 or 4, or give --pipeline-model-parallel-size 1"),
    ("--pipeline-model-parallel-size 2 --tensor-model-parallel-size 4", 12,
     "--pipeline-model-parallel-size 2 x --tensor-model-parallel-size 4 does not divide the number of ranks, 12; "
     "start 8 "
     "or 16, or give --pipeline-model-parallel-size 1 --tensor-model-parallel-size 4"),
    ("--context-parallel-size 4", 6, "--context-parallel-size 4 does not divide the number of ranks, 6; start 4 or "
     "8, or "
     "give --context-parallel-size 3"),
    ("--num-layers-per-virtual-pipeline-stage 1", 2, "--num-layers-per-virtual-pipeline-stage 1 is about pipeline "
     "stages, "
     "and --pipeline-model-parallel-size is 1; leave it out, or give 2 there"),
    ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3", 2,
     "--num-layers-per-virtual-pipeline-stage 3 x --pipeline-model-parallel-size 2 does not divide --num-layers 4; the "
     "nearest number is 2"),
    ("--pipeline-model-parallel-size 3 --num-layers-per-virtual-pipeline-stage 1", 6,
     "does not divide --num-layers 4; the nearest --pipeline-model-parallel-size is 2, with "
     "--num-layers-per-virtual-pipeline-stage 1"),
    ("--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 12", 4,
     "the interleaved schedule takes micro-batches in groups of --pipeline-model-parallel-size 4, and "
     "--global-batch-size "
     "12 is not a multiple of that x --micro-batch-size 2 x 1 data-parallel ranks; the nearest is 16"),
    ("--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 4", 4,
     "the nearest is 8"),
    ("--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 5", 2,
     "--decoder-first-pipeline-num-layers 5 leave -1 of --num-layers 4 to 1 other stages; leave them out"),
    ("--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 1", 2,
     "--decoder-first-pipeline-num-layers 1 and --decoder-last-pipeline-num-layers 1 leave 2 of --num-layers 4 to 0"),
    ("--decoder-last-pipeline-num-layers 2", 1, "and --pipeline-model-parallel-size is 1; leave it out"),
    ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --decoder-last-pipeline-num-layers "
     "1", 2,
     "--decoder-last-pipeline-num-layers and --num-layers-per-virtual-pipeline-stage exclude each other"),
    ("--pipeline-schedule zero-bubble", 1, "fills the gaps of a pipeline, and --pipeline-model-parallel-size is 1"),
    ("--pipeline-model-parallel-size 2 --pipeline-schedule zero-bubble --num-layers-per-virtual-pipeline-stage 1", 2,
     "has one stage a rank, and --num-layers-per-virtual-pipeline-stage asks for several; leave one of the two out"),
    ("--pipeline-model-parallel-size 2 --pipeline-schedule zero-bubble --use-distributed-optimizer", 2,
     "defers weight gradients past the backward pass in which --data-parallel-sharding optimizer would sum them"),
    ("--pipeline-model-parallel-size 2 --pipeline-schedule zero-bubble --compile", 2,
     "a block of --compile computes them; leave one of the two out"),
    ("--pipeline-model-parallel-size 2 --pipeline-schedule zero-bubble --DDP-impl torch", 2, "--DDP-impl torch "
     "would sum"),
    ("--data-parallel-sharding gradients --DDP-impl torch", 2, "--DDP-impl torch keeps everything on every rank"),
    ("--shard-within 2", 4, "--shard-within 2 says among whom to share out, and --data-parallel-sharding is none"),
    ("--shard-within 4 --use-distributed-optimizer", 6, "--shard-within 4 does not divide the 6 ranks that hold the "
     "same "
     "parameters; the nearest number is 3"),
    ("--shard-within 1 --use-distributed-optimizer", 2, "--shard-within 1 shares nothing out; leave "),
    ("--context-parallel-size 4 --qkv-conv-kernel 65 --seq-length 64 --micro-batch-size 1", 4,
     "--qkv-conv-kernel 65 needs 32 tokens of the ranks beside, and each of --context-parallel-size 4 has 16; give a "),
    ("--sequence-parallel --group-query-attention --num-query-groups 1", 2, "is 1; leave it out"),
])
def test_what_cannot_work_is_refused_with_the_nearest_that_can(flags, ranks, message):
    config, _ = parse(f"--preset demo {flags}".split())
    with pytest.raises(ConfigError) as caught:
        check_layout(config, ranks)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("flags", "ranks", "remedy"), [
    ("--num-layers 3 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1", 2,
     "leave --num-layers-per-virtual-pipeline-stage out"),
    ("--pipeline-model-parallel-size 3 --num-layers-per-virtual-pipeline-stage 1", 3,
     "leave --num-layers-per-virtual-pipeline-stage out"),
    ("--num-layers-per-virtual-pipeline-stage 1", 3, "leave it out"),
    ("--num-layers-per-virtual-pipeline-stage 1", 8, "leave it out, or give 2 there"),
    ("--num-layers-per-virtual-pipeline-stage 3", 2, "leave it out"),
    ("--num-layers 1 --decoder-first-pipeline-num-layers 1", 2, "leave it out"),
    ("--decoder-first-pipeline-num-layers 2", 3, "leave it out, or give 3 there"),
    ("--decoder-first-pipeline-num-layers 3", 3, "leave it out"),
    ("--decoder-last-pipeline-num-layers 2 --context-parallel-size 2", 2, "leave it out"),
    ("--sequence-parallel", 3, "leave it out"), ("--sequence-parallel --context-parallel-size 2", 2, "leave it out"),
    ("--shard-within 2", 1, "leave it out"), ("--shard-within 1", 3, "leave it out, or give 3"),
    ("--shard-within 2 --use-distributed-optimizer", 1, "leave it out"),
    ("--shard-within 2 --use-distributed-optimizer", 3, "the nearest number is 3"),
    ("--distribute-checkpointed-activations", 2, "leave it out")])
def test_what_is_refused_once_is_not_refused_again_with_the_remedy(flags, ranks, remedy):
    with pytest.raises(ConfigError) as caught:
        check_layout(parse(f"--preset demo {flags}".split())[0], ranks)
    assert str(caught.value).split("; ")[-1] == remedy


@pytest.mark.parametrize(("flags", "ranks"), [
    ("--pipeline-model-parallel-size 4 --context-parallel-size 3", 24),
    ("--pipeline-model-parallel-size 3", 3), ("--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers "
     "0", 2),
    ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 8", 4),
    ("--data-parallel-sharding parameters --shard-within 2 --context-parallel-size 2", 4),
    ("", 1), ("", 3), ("--tensor-model-parallel-size 2", 6), ("--tensor-model-parallel-size 4 --sequence-parallel", 4)])
def test_what_can_work_is_not_refused(flags, ranks):
    check_layout(parse(f"--preset demo {flags}".split())[0], ranks)


@pytest.mark.parametrize("flags", ["--tensor-model-parallel-size 2", "--global-batch-size 4"])
@pytest.mark.parametrize(("rank", "num_lines"), [(0, 1), (2, 0)])
def test_every_rank_refuses_before_it_waits_for_the_others_and_one_says_why(monkeypatch, capsys, rank, num_lines,
                                                                            flags):
    for name, value in {"WORLD_SIZE": 3, "RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": 6000}.items():
        monkeypatch.setenv(name, str(value))
    assert main(f"--preset demo {flags}".split()) == 2
    assert capsys.readouterr().err.count("\n") == num_lines


def test_a_dry_run_is_one_process_and_is_refused_what_ranks_are(monkeypatch, capsys):
    assert main("--preset demo --dry-run --dry-run-ranks 3 --global-batch-size 4".split()) == 2
    assert "is not divisible by --micro-batch-size 2 x 3 data-parallel ranks" in capsys.readouterr().err
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 6000}.items():
        monkeypatch.setenv(name, str(value))
    assert main("--preset demo --dry-run".split()) == 2
    assert capsys.readouterr().err == (
        "error: --dry-run builds any layout in one process, and 2 were started; start one\n")


def local_models(size):
    models = [ProteinModel(CONFIG, PrecisionConfig(), 128, Stream(Axis(rank, size))) for rank in range(size)]
    for model in models:
        initialise(dict(model.named_parameters()), seed=3)
    return models


@pytest.mark.parametrize("size", [2, 4])
def test_initial_weights_are_slices_of_the_same_wholes(size):
    whole, = local_models(1)
    ranks = local_models(size)
    num_split = 0
    for name, expected in whole.named_parameters():
        locals_ = [model.get_parameter(name) for model in ranks]
        dim = placement_of(locals_[0]).dim
        num_split += dim is not None
        together = locals_[0] if dim is None else torch.cat(locals_, dim).narrow(dim, 0, expected.shape[dim])
        assert torch.equal(together, expected), name
    assert num_split == 8  # two tables of the vocabulary, two weights and a bias of each half of the block


@pytest.mark.parametrize(("size", "rows"), [(1, 128), (2, 128), (4, 128)])
def test_each_rank_holds_a_multiple_of_128_rows_of_the_vocabulary_and_those_without_an_id_are_0(size, rows):
    tables = [model.embedding.word_embeddings.weight for model in local_models(size)]
    assert [len(table) for table in tables] == [rows] * size
    assert all(table.count_nonzero() == 0 for table in tables[1:])
    assert all(placement_of(table).whole_shape(table) == (128, 32) for table in tables)
