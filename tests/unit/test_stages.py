"""Which blocks and parameters each pipeline stage holds."""

from dataclasses import replace

import pytest
import torch

from megatron.config import ModelConfig, ParallelConfig, PrecisionConfig
from megatron.model.initialisation import initialise
from megatron.model.protein_model import ProteinModel
from megatron.parallel.pipeline.partition import layers_a_stage, stages_of_rank

CONFIG = ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, kv_channels=8,
                     max_position_embeddings=64, attention_dropout=0.0, hidden_dropout=0.0)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)


@pytest.mark.parametrize(("layers", "size", "first", "last", "counts"), [
    (8, 4, None, None, [2, 2, 2, 2]), (9, 4, None, None, [2, 2, 3, 2]), (10, 4, None, None, [2, 3, 3, 2]),
    (11, 4, None, None, [2, 3, 3, 3]), (5, 2, None, None, [2, 3]), (8, 4, 1, None, [1, 2, 3, 2]),
    (8, 4, 0, 1, [0, 3, 4, 1]), (4, 2, 1, 3, [1, 3])])
def test_blocks_are_balanced_and_ends_get_fewer(layers, size, first, last, counts):
    config = ParallelConfig(pipeline_model_parallel_size=size, decoder_first_pipeline_num_layers=first,
                            decoder_last_pipeline_num_layers=last)
    assert layers_a_stage(layers, config) == counts


def test_interleaved_stages_go_round_the_ranks():
    config = replace(PP2, num_layers_per_virtual_pipeline_stage=2)
    assert [[list(stage.layers) for stage in stages_of_rank(8, config, rank)] for rank in (0, 1)] == [
        [[0, 1], [4, 5]], [[2, 3], [6, 7]]]


@pytest.mark.parametrize("config", [PP2, replace(PP2, num_layers_per_virtual_pipeline_stage=1),
                                    replace(PP2, decoder_first_pipeline_num_layers=0)])
def test_stages_have_the_whole_models_parameters_each_once_but_the_tied_embedding(config):
    whole = ProteinModel(CONFIG, PrecisionConfig(), 128)
    initialise(dict(whole.named_parameters()), seed=1)
    seen = []
    for rank in range(2):
        for stage in stages_of_rank(CONFIG.num_layers, config, rank):
            part = ProteinModel(CONFIG, PrecisionConfig(), 128, stage=stage)
            initialise(dict(part.named_parameters()), seed=1)
            for name, parameter in part.named_parameters():
                assert torch.equal(parameter, whole.get_parameter(name)), name
                seen.append(name)
    assert sorted(seen) == sorted([*dict(whole.named_parameters()), "embedding.word_embeddings.weight"])
