"""Small transformers models with random weights as the oracle for their formats, and logits of theirs and ours."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import pad

from megatron.checkpoint.contents import Checkpoint, stored
from megatron.config import ModelConfig, PrecisionConfig
from megatron.data.corpus.vocab import Vocab
from megatron.kernels.packed_sequence import PackedSequence
from megatron.model.protein_model import ProteinModel

PROTEINS = ("MKTAYIAKQRQISFVKSHFSRQ", "GAVLIPFMWXBUZO", "M", "MK#T##AAYLD")  # '#' is a masked residue
_SHAPE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
_ESM = _SHAPE | {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32, "layer_norm_eps": 1e-5,
                 "max_position_embeddings": 42, "token_dropout": True}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "esm2": ("Esm", _ESM | {"position_embedding_type": "rotary"}),
    "esm1b": ("Esm", _ESM | {"emb_layer_norm_before": True}),
    "esm1v": ("Esm", _ESM | {"token_dropout": False}),
    "untied": ("Esm", _ESM | {"position_embedding_type": "rotary", "tie_word_embeddings": False}),
    "protbert": ("Bert", _SHAPE | {"vocab_size": 30, "max_position_embeddings": 40}),
    "untied-bert": ("Bert", _SHAPE | {"vocab_size": 30, "max_position_embeddings": 40, "tie_word_embeddings": False}),
}


def transformers() -> ModuleType:
    """The library, imported on the first call, because that takes seconds."""
    import transformers

    return transformers


def made(kind: str, **changes: int) -> torch.nn.Module:
    """A transformers model of a kind, for evaluation; all its weights are random, biases and norms included."""
    name, config = KINDS[kind]
    torch.manual_seed(0)
    config_class, model_class = (getattr(transformers(), f"{name}{what}") for what in ("Config", "ForMaskedLM"))
    model = model_class(config_class(**(config | changes))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def trained_here(config: ModelConfig, vocab_file: str, ends: str) -> Checkpoint:
    """A checkpoint of one of our models with random weights.

    The output bias makes the padding rows of its vocabulary improbable.
    """
    vocab = Vocab.from_file(vocab_file)
    torch.manual_seed(0)
    model = ProteinModel(config, PrecisionConfig(), vocab.padded_size(config),
                         mask_id=vocab.mask_id)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.constant_(model.lm_head.bias[vocab.size:], -1e4)
    flags = {item.name: getattr(config, item.name) for item in fields(ModelConfig)}
    state = {"config": flags | {"protein_ends": ends, "vocab_file": vocab_file}, "vocabulary": vocab.identity}
    return Checkpoint(Path("run/iter_0000007"), 7, {name: stored(value.data) for name, value in
                                                    model.named_parameters()}, None, state)


def ids_of(protein: str, vocab: Vocab, ends: str = "both") -> list[int]:
    """The ids of a protein with [CLS] and, if `ends` is "both", [SEP], taken straight from the vocabulary."""
    residues = [vocab.mask_id if letter == "#" else vocab.ids[letter] for letter in protein]
    return [vocab.cls_id, *residues, *([vocab.sep_id] if ends == "both" else [])]


@torch.no_grad()
def their_logits(model: torch.nn.Module, vocab: Vocab, proteins: Sequence[str] = PROTEINS) -> list[torch.Tensor]:
    """The logits of each protein by transformers, from one padded batch."""
    rows = [ids_of(protein, vocab) for protein in proteins]
    ids, mask = padded(rows, vocab)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return [logits[number, :len(row)] for number, row in enumerate(rows)]


def padded(rows: Sequence[list[int]], vocab: Vocab) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of the rows, padded to one length, and the attention mask: 1 for tokens, 0 for padding."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [vocab.pad_id] * (length - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])


@torch.no_grad()
def our_logits(checkpoint: Checkpoint, vocab: Vocab, proteins: Sequence[str] = PROTEINS) -> list[torch.Tensor]:
    """The logits of each protein by our model of a checkpoint, from one packed row."""
    model = our_model(checkpoint, vocab)
    sequence = one_row(vocab, proteins, checkpoint.state["config"]["protein_ends"])
    logits, softcap = model.logits(model.hidden(sequence)), model.config.final_logit_softcapping
    never = -1e3 if softcap is None else -softcap + 0.1
    assert (logits[:, vocab.size:] < never).all(), "padding rows of the vocabulary are never predicted"
    return list(logits[:, :vocab.size].split(sequence.cu_seqlens.diff().tolist()))


def our_model(checkpoint: Checkpoint, vocab: Vocab) -> ProteinModel:
    """Our model with the weights of a checkpoint, in fp32, for evaluation."""
    flags = checkpoint.state["config"]
    config = ModelConfig(**{item.name: flags[item.name] for item in fields(ModelConfig) if item.name in flags})
    num_rows = checkpoint.model["embedding.word_embeddings.weight"].shape[0]
    model = ProteinModel(config, PrecisionConfig(), num_rows, mask_id=vocab.mask_id).eval()
    model.load_state_dict({name: tensor.read().float() for name, tensor in checkpoint.model.items()}, strict=True)
    return model


def one_row(vocab: Vocab, proteins: Sequence[str] = PROTEINS, ends: str = "both") -> PackedSequence:
    """The proteins packed into one row, without filler."""
    rows = [torch.tensor(ids_of(protein, vocab, ends)) for protein in proteins]
    lengths = torch.tensor(list(map(len, rows)))
    return PackedSequence(torch.cat(rows), torch.cat([torch.arange(len(row)) for row in rows]),
                          pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max()), num_filler=0)


def difference(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The largest absolute difference between two lists of logits."""
    return max(float((one - other).abs().max()) for one, other in zip(some, others, strict=True))


def same_weights(one: Checkpoint, other: Checkpoint) -> None:
    """Asserts that two checkpoints hold the same weights, bit for bit."""
    assert one.model.keys() == other.model.keys()
    for name, tensor in one.model.items():
        assert torch.equal(tensor.read(), other.model[name].read()), name
