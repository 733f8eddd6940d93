"""Reads and writes the files of fair-esm: ESM-2, ESM-1b and ESM-1v.

NAME.pt                       ESM-2: {"cfg": {"model": a namespace}, "model": tensors}; else {"args": a namespace, …}
NAME-contact-regression.pt    {"model": tensors}: the contact regression, which fair-esm requires

fair-esm decides by the file's name whether it is ESM-2 (esm2…), so files are written with such a name. (Since torch 2.6
its loader needs torch.serialization.add_safe_globals([argparse.Namespace]), for its own files as well.)
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.contents import Box, Checkpoint, StoredTensor, one_piece, stored
from megatron.checkpoint.convert.families import flags
from megatron.checkpoint.convert.families.names import FAIR_ESM, family_tensors, their_names
from megatron.checkpoint.convert.families.reading import ModelFamily, checkpoint_of, rotary_frequencies
from megatron.checkpoint.convert.families.vocabularies import vocabulary_of
from megatron.checkpoint.convert.torch_files import has_mark, read_torch_file
from megatron.checkpoint.convert.torch_writing import write_torch_file
from megatron.checkpoint.convert.vocabulary import WORDS, with_rows
from megatron.checkpoint.failures import new_checkpoint, readable, refuse_layout
from megatron.config import DataConfig, ModelConfig
from megatron.config.declaration import flag_name
from megatron.data.corpus.vocab import Vocab
from megatron.errors import CheckpointError
from megatron.files import sync

_REGRESSION = "-contact-regression.pt"
_WITHOUT_REGRESSION = ("esm1v", "esm_if", "270K", "500K")  # parts of file names for which fair-esm looks for none
_PREFIX = re.compile(r"^encoder\.(sentence_encoder\.)?")
_FIRST_ROW = 2  # the position of a first token: positions begin after the id of padding, which is 1
_ARCHITECTURE = "roberta_large"  # ESM-1b and ESM-1v; other values are models that are not supported
_EPSILON, _BASE = 1e-5, 10000.0


def recognises(path: Path) -> bool:
    """Whether `path` looks like a file of fair-esm, or a folder with one; opens no pickle."""
    return has_mark(path, _file_in, b"self_attn_layer_norm")


def read(path: Path, iteration: int | None = None) -> Checkpoint:
    """The weights in a file, as a checkpoint of iteration 0, with the contact regression if its file is there.

    Its `state` has the same entries as that of `hf.read`. Raises CheckpointError.
    """
    if iteration is not None:
        raise CheckpointError(f"{path} holds one model and no iterations; leave --iteration out")
    file = _file_in(path)
    with readable(file, "as fair-esm has it"):
        tree = _tables(file)
        regression = file.with_name(file.stem + _REGRESSION)
        tensors = {_PREFIX.sub("", name): tensor for name, tensor in tree["model"].items()}
        notes = [f"there is no {regression.name} beside it: it predicts no contacts"]
        if regression.is_file():
            tensors |= _regression_in(regression)
            notes = []
        config = _flags(tree, tensors, file)
        vocab = Vocab.from_file("esm")
        state = {"vocabulary": vocab.identity, "notes": notes}
        checkpoint = checkpoint_of(ModelFamily(config, FAIR_ESM, vocab.size, _FIRST_ROW), tensors, file, state)
        # The head's matrix is the embedding, which fair-esm fills with both tensors, the head's last.
        is_apart = tensors.get("lm_head.weight") not in (None, tensors["embed_tokens.weight"])
        if is_apart or config["position_embedding_type"] == "rope":
            return checkpoint
        words = _without_row(checkpoint.model[WORDS], vocab.mask_id)
        return replace(checkpoint, model={**checkpoint.model, WORDS: words})


def write(checkpoint: Checkpoint, folder: Path, *, tensor: int = 1, pipeline: int = 1) -> Path:
    """Write the weights and the contact regression into a new folder; returns the file of the weights.

    A model without a contact regression gets one of zeros, which predicts probability 0.5 everywhere. Raises
    ConfigError for a layout other than 1 x 1, CheckpointError if fair-esm has no such model or the disk refuses.
    """
    refuse_layout(tensor, pipeline)
    config, vocab = flags.complete(checkpoint), vocabulary_of(checkpoint)
    is_rotary = config["position_embedding_type"] == "rope"
    _refuse_others(checkpoint.path, config, vocab, is_rotary)
    theirs = family_tensors(with_rows(checkpoint, vocab.size), config, FAIR_ESM, vocab.size, _FIRST_ROW)
    theirs["lm_head.weight"] = replace(theirs["embed_tokens.weight"])  # apart, or fair-esm zeroes the mask's row of it
    if is_rotary:
        theirs |= rotary_frequencies(config, "layers.N.self_attn.rot_emb")
    contacts = {"weight": torch.zeros(1, config["num_layers"] * config["num_attention_heads"]), "bias": torch.zeros(1)}
    regression = {name: theirs.pop(name, stored(contacts[name.rpartition(".")[2]]))
                  for name in ("contact_head.regression.weight", "contact_head.regression.bias")}
    is_named = folder.name.startswith("esm2") == is_rotary
    file = folder / f"{'' if is_named else 'esm2_' if is_rotary else 'esm1b_'}{folder.name}.pt"
    with new_checkpoint(folder) as temporary:
        for name, tree in ((file.name, _tree(theirs, config, is_rotary)),
                           (file.stem + _REGRESSION, {"model": regression})):
            write_torch_file(temporary / name, tree)
            sync(temporary / name)
    return file


def losses_in(checkpoint: Checkpoint, file: Path) -> list[str]:
    """A note on each part of a model that fair-esm does not load from the `file` that it was written to."""
    part = next((part for part in _WITHOUT_REGRESSION if part in file.stem), None)
    if part is None or not flags.complete(checkpoint)["contact_head"]:
        return []
    return [f"fair-esm loads no contact regression for a file with {part} in its name; rename {file.name} and "
            f"{file.stem}{_REGRESSION} to have it"]


def _file_in(path: Path) -> Path:
    """The file of weights: `path` itself, or the only one in a folder; raises CheckpointError."""
    if not path.is_dir():
        return path
    files = [file for file in path.glob("*.pt") if not file.name.endswith(_REGRESSION)]
    if len(files) != 1:
        raise CheckpointError(f"{path} holds {len(files)} files of weights (NAME.pt); name one of fair-esm's")
    return files[0]


def _tables(file: Path) -> dict[str, Any]:
    """The content of a file, whose entry "model" is a dict of tensors; raises CheckpointError otherwise."""
    tree = read_torch_file(file)
    model = tree.get("model") if isinstance(tree, dict) else None
    if not isinstance(model, dict) or not all(isinstance(name, str) and isinstance(tensor, StoredTensor)
                                              for name, tensor in model.items()):
        raise CheckpointError(f"{file}: holds no table of tensors by the name of model; give a file of fair-esm")
    return tree


def _regression_in(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a contact regression's file; raises CheckpointError if there are others."""
    tensors = _tables(file)["model"]
    known = {name for part in ("weight", "bias") for name in their_names(f"contact_head.{part}", FAIR_ESM)}
    if others := sorted(tensors.keys() - known):
        raise CheckpointError(f"{file}: holds {others[0]}, which is none of a regression of contacts; copy it again, "
                              "or leave it out")
    return tensors


def _flags(tree: Mapping[str, Any], tensors: Mapping[str, StoredTensor], file: Path) -> dict[str, Any]:
    """Our flags for a file's configuration and tensors; raises CheckpointError for a model that is not supported."""
    is_rotary = "cfg" in tree
    given = tree["cfg"]["model"] if is_rotary else tree.get("args")
    said = vars(given) if isinstance(given, argparse.Namespace) else given
    if not isinstance(said, dict):
        raise CheckpointError(f"{file}: has no namespace that says what its model is; give a file of fair-esm")
    if not is_rotary and said.get("arch") != _ARCHITECTURE:
        raise CheckpointError(f"{file}: is of the architecture {str(said.get('arch'))[:60]!r}; of fair-esm's models "
                              "ESM-2, ESM-1b and ESM-1v can be read")
    counts: dict[str, Any] = {name: said.get(f"encoder_{name}", said.get(name))
                              for name in ("layers", "embed_dim", "attention_heads")}
    flags.check_counts(counts, file)
    width, heads = counts["embed_dim"], counts["attention_heads"]
    rows = 0 if is_rotary else tensors["embed_positions.weight"].shape[0]
    return flags.arithmetic() | flags.OF_ESM | {
        "num_layers": counts["layers"], "hidden_size": width, "num_attention_heads": heads,
        "kv_channels": width // heads, "num_query_groups": heads,
        "ffn_hidden_size": tensors["layers.0.fc1.weight"].shape[0], "layernorm_epsilon": _EPSILON,
        "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "position_embedding_type": "rope" if is_rotary else "learned_absolute", "rotary_base": _BASE,
        "token_dropout": bool(said.get("token_dropout", False)), "untie_embeddings_and_output_weights": False,
        "embedding_layernorm": "emb_layer_norm_before.weight" in tensors, "vocab_file": "esm", "protein_ends": "both",
        **({} if is_rotary else {"max_position_embeddings": rows - _FIRST_ROW})}


def _without_row(tensor: StoredTensor, row: int) -> StoredTensor:
    """An embedding table with zeros in `row`: fair-esm zeroes the mask's when it loads ESM-1b or ESM-1v."""
    def read(box: Box) -> Tensor:
        values = tensor.read_box(box)
        if box[0].start <= row < box[0].stop:
            values[row - box[0].start] = 0
        return values

    return one_piece(tensor.shape, tensor.dtype, read)


def _refuse_others(place: Path, config: Mapping[str, Any], vocab: Vocab, is_rotary: bool) -> None:
    """Raises CheckpointError if fair-esm cannot compute a model of these flags."""
    expected = {"layernorm_epsilon": _EPSILON, "untie_embeddings_and_output_weights": False, "protein_ends": "both"}
    if is_rotary:
        expected |= {"rotary_base": _BASE, "ffn_hidden_size": 4 * config["hidden_size"], "embedding_layernorm": False}
    spelled = {item.name: flag_name(item) for section in (ModelConfig, DataConfig) for item in fields(section)}
    wrong = next((f"{spelled[name]} {config.get(name)}, where it has {value}" for name, value in expected.items()
                  if config.get(name) != value), None)
    if vocab.identity != Vocab.from_file("esm").identity:
        wrong = "another vocabulary than esm"
    if (name := flags.differing(config, flags.ESM)) is not None:
        wrong = f"{spelled[name]} {config.get(name)}, which changes ESM's arithmetic"
    if wrong is not None:
        raise CheckpointError(f"{place}: has {wrong}; fair-esm has no such model, write it as hf")


def _tree(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], is_rotary: bool) -> dict[str, Any]:
    """The content of the file of weights, with the prefixes that fair-esm's loader strips from the names."""
    model = {f"encoder.{'' if name.startswith('lm_head.') else 'sentence_encoder.'}{name}": tensor
             for name, tensor in tensors.items()}
    said = {"encoder_layers": config["num_layers"], "encoder_embed_dim": config["hidden_size"],
            "encoder_attention_heads": config["num_attention_heads"], "token_dropout": config["token_dropout"],
            "encoder_ffn_embed_dim": config["ffn_hidden_size"]}
    if is_rotary:
        return {"cfg": {"model": argparse.Namespace(**said)}, "model": model}
    return {"args": argparse.Namespace(arch=_ARCHITECTURE, max_positions=config["max_position_embeddings"], **said),
            "model": model}
