"""A small model with random weights, as a publisher's folder for transformers has it."""

from dataclasses import asdict
from pathlib import Path

import torch

from megatron.checkpoint.convert.families import hf
from megatron.checkpoint.stored import Checkpoint, stored
from megatron.config import ModelConfig, PrecisionConfig
from megatron.data.corpus.vocab import Vocab
from megatron.model.protein_model import ProteinModel


def write_published(folder: Path, config: ModelConfig, vocabulary: str) -> Path:
    """Writes it; returns the folder."""
    vocab = Vocab.from_file(vocabulary)
    torch.manual_seed(0)
    model = ProteinModel(config, PrecisionConfig(), vocab.size, mask_id=vocab.mask_id)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = {"config": asdict(config) | {"vocab_file": vocabulary, "protein_ends": "both"}}
    tensors = {name: stored(parameter) for name, parameter in model.named_parameters()}
    return hf.write(Checkpoint(folder, 0, tensors, None, state), folder)
