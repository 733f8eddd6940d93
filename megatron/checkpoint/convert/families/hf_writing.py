"""Writes a folder that transformers loads, for its own class of the family if that computes what our model does."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.contents import Checkpoint, StoredTensor, stored
from megatron.checkpoint.convert.families import flags
from megatron.checkpoint.convert.families.card import CARD, card_of
from megatron.checkpoint.convert.families.names import HF_BERT, HF_ESM, OURS, POSITIONS, Table, family_tensors
from megatron.checkpoint.convert.families.reading import TYPES, rotary_frequencies
from megatron.checkpoint.convert.families.tokenizer import tokenizer_files
from megatron.checkpoint.convert.families.vocabularies import vocabulary_of
from megatron.checkpoint.convert.vocabulary import BIAS, OUTPUT, with_rows
from megatron.checkpoint.tensor_file import write_tensors
from megatron.data.corpus.tokenizer_folder import LINES
from megatron.data.corpus.vocab import Vocab
from megatron.files import write_json, write_text

TABLES: Mapping[str, Table] = {flags.ESM: HF_ESM, flags.BERT: HF_BERT, flags.OWN: OURS}
CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", ".index.json"
_CODE = ("configuration_protein.py", "attention_protein.py", "modeling_protein.py")
_LONGEST_FILE = 5 * 10**9  # bytes, transformers' limit for a file


def write_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write all files into an empty folder; raises CheckpointError, and OSError if the disk refuses."""
    vocab = vocabulary_of(checkpoint)
    config = flags.complete(checkpoint)
    checkpoint = with_rows(checkpoint, vocab.size)
    kind = flags.family_of(config)
    tensors = _of_family(checkpoint, config, kind, vocab)
    write_json(folder / CONFIG, {**flags.configuration(config, kind, vocab), "torch_dtype": _dtype(tensors)})
    _write_weights(folder, tensors)
    write_text(folder / LINES, "".join(f"{token}\n" for token in vocab.tokens))
    longest = config["max_position_embeddings"] if config["position_embedding_type"] == "learned_absolute" else None
    for name, content in tokenizer_files(vocab, config.get("protein_ends", "start"), longest).items():
        write_json(folder / name, content)
    if kind == flags.OWN:
        for name in _CODE:
            write_text(folder / name, (Path(__file__).parent / "remote" / name).read_text(encoding="utf-8"))
    num_parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.model.values())
    write_text(folder / CARD, card_of(checkpoint, config, num_parameters, kind == flags.OWN))


def _of_family(checkpoint: Checkpoint, config: Mapping[str, Any], kind: str, vocab: Vocab) -> dict[str, StoredTensor]:
    """The tensors under the names of the family's class, including those that only that class has."""
    tensors = family_tensors(checkpoint, config, TABLES[kind], vocab.size, vocab.pad_id + 1 if kind == flags.ESM else 0)
    if kind == flags.BERT:
        tensors[TYPES] = stored(torch.zeros(2, config["hidden_size"], dtype=checkpoint.model[POSITIONS].dtype))
        if OUTPUT in checkpoint.model:
            tensors["cls.predictions.decoder.bias"] = checkpoint.model[BIAS]
    if config["position_embedding_type"] == "rope" and kind == flags.ESM:
        tensors |= rotary_frequencies(config, "esm.encoder.layer.N.attention.self.rotary_embeddings")
    return tensors


def _dtype(tensors: Mapping[str, StoredTensor]) -> str:
    return str(next(iter(tensors.values())).dtype).removeprefix("torch.")


def _write_weights(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write the weights into one file, or several of at most _LONGEST_FILE bytes with an index."""
    parts: list[dict[str, StoredTensor]] = [{}]
    room = _LONGEST_FILE
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        if size > room and parts[-1]:
            parts.append({})
            room = _LONGEST_FILE
        parts[-1][name] = tensor
        room -= size
    names = [WHOLE] if len(parts) == 1 else [
        WHOLE.replace(".", f"-{number:05d}-of-{len(parts):05d}.") for number in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        write_tensors(folder / name, part, {"format": "pt"})
    if len(parts) > 1:
        total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
        write_json(folder / f"{WHOLE}{INDEX}", {
            "metadata": {"total_size": total},
            "weight_map": {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}})
