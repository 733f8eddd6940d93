"""Reads and writes folders of transformers: ESM-2, ESM-1b, ProtBERT, and our own models for its users.

FOLDER/config.json            the model's configuration
FOLDER/model.safetensors      its tensors; or several files, listed in model.safetensors.index.json
FOLDER/pytorch_model.bin      the same, written by torch.save; this is only read
FOLDER/vocab.txt              one token a line; or other files of a tokenizer (`data.corpus.tokenizer_folder`)
"""

import json
import re
from pathlib import Path
from typing import Any

from megatron.checkpoint.contents import Checkpoint, StoredTensor
from megatron.checkpoint.convert.families import flags
from megatron.checkpoint.convert.families.hf_writing import CONFIG, INDEX, TABLES, WHOLE, write_files
from megatron.checkpoint.convert.families.names import their_names
from megatron.checkpoint.convert.families.reading import ModelFamily, checkpoint_of
from megatron.checkpoint.convert.families.vocabularies import known_vocabulary, vocabulary_in
from megatron.checkpoint.convert.torch_files import read_torch_file, refuse_stand_in
from megatron.checkpoint.convert.vocabulary import trimmed, with_rows
from megatron.checkpoint.failures import new_checkpoint, readable, refuse_layout
from megatron.checkpoint.tensor_file import stored_in
from megatron.errors import CheckpointError

BIN = "pytorch_model.bin"
_VOCABULARIES = {flags.ESM: "esm", flags.BERT: "protbert", flags.OWN: "iupac"}
# Names from old versions of transformers.
_OLD = {re.compile(r"LayerNorm\.gamma$"): "LayerNorm.weight", re.compile(r"LayerNorm\.beta$"): "LayerNorm.bias"}


def recognises(path: Path) -> bool:
    """Whether `path` looks like a folder of transformers; opens no pickle."""
    return (path / CONFIG).is_file() and _has_weights(path)


def half_of_one(path: Path) -> str | None:
    """What an incomplete folder of transformers holds, for a message, if its configuration or its weights are missing.

    None if both or neither are there.
    """
    if (path / CONFIG).is_file():
        return None if _has_weights(path) else f"a {CONFIG} without {WHOLE} or {BIN}"
    return f"weights without the {CONFIG} that says what model they are of" if _has_weights(path) else None


def _has_weights(path: Path) -> bool:
    return any((path / f"{name}{end}").is_file() for name in (WHOLE, BIN) for end in ("", INDEX))


def read(path: Path, iteration: int | None = None) -> Checkpoint:
    """The weights in a folder, as a checkpoint of iteration 0.

    Its `state` has "config", "notes" (a line for whatever was left out or changed) and, if it is known, "vocabulary"
    (its identity). Raises CheckpointError.
    """
    if iteration is not None:
        raise CheckpointError(f"{path} holds one model and no iterations; leave --iteration out")
    with readable(path, "as transformers writes it"):
        theirs = read_object(path / CONFIG)
        kind = flags.kind_of(theirs, path)
        config = flags.flags_of(theirs, path)
        num_tokens, first_row = flags.tokens_of(theirs, kind)
        # ESM counts positions over the tokens that are not padding, beginning after the id of padding.
        counts_from_pad = first_row > 0 and config["position_embedding_type"] == "learned_absolute"
        ids = {"mask": theirs.get("mask_token_id"), "pad": first_row - 1 if counts_from_pad else None}
        state = vocabulary_in(path, _VOCABULARIES[kind], num_tokens, ids)
        family = ModelFamily(config | state["config"], TABLES[kind], num_tokens, first_row)
        tensors = tensors_in_folder(path)
        if kind != flags.OWN and (head := their_names("lm_head.dense.weight", TABLES[kind])[0]) not in tensors:
            flags.refuse_headless(path, f"holds no {head}", kind)
        checkpoint = checkpoint_of(family, tensors, path, state)
        vocab = known_vocabulary(checkpoint)
        if vocab is None or vocab.size == num_tokens:
            return checkpoint
        return trimmed(with_rows(checkpoint, vocab.size), vocab.size)


def write(checkpoint: Checkpoint, folder: Path, *, tensor: int = 1, pipeline: int = 1) -> Path:
    """Write the weights, a tokenizer and a model card into a new folder; returns the folder.

    Raises ConfigError for a layout other than 1 x 1, CheckpointError if something is missing or the disk refuses.
    """
    refuse_layout(tensor, pipeline)
    with new_checkpoint(folder) as temporary:
        write_files(checkpoint, temporary)
    return folder


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of transformers; raises CheckpointError if it is missing or not an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); copy it as well") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged, or no configuration of transformers; copy it again")
    return found


def tensors_in_folder(place: Path) -> dict[str, StoredTensor]:
    """All tensors in a folder's weight files, by their names there, read lazily; raises CheckpointError."""
    name = next(name for name in (WHOLE, BIN) if (place / name).is_file() or (place / f"{name}{INDEX}").is_file())
    files = [name]
    parts = {}
    if not (place / name).is_file():
        parts = read_object(place / f"{name}{INDEX}").get("weight_map", {})
        files = sorted(set(parts.values()))
        if wrong := [file for file in files if not isinstance(file, str) or Path(file).name != file]:
            raise CheckpointError(f"{place / f'{name}{INDEX}'} names {str(wrong[0])[:60]!r}, which is no file beside "
                                  "it; copy it again")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= _tensors_in(place / file)
    if missing := sorted(parts.keys() - tensors.keys()):
        raise CheckpointError(f"{place / parts[missing[0]]} has no {missing[0]}, which {name}{INDEX} says it has; copy "
                              "all of it again")
    for old, new in _OLD.items():
        tensors = {old.sub(new, name): tensor for name, tensor in tensors.items()}
    return tensors


def _tensors_in(file: Path) -> dict[str, StoredTensor]:
    """The tensors in one file, by name; raises CheckpointError."""
    refuse_stand_in(file)
    if file.suffix == ".safetensors":
        return stored_in(file)
    tree = read_torch_file(file)
    if not isinstance(tree, dict) or not all(isinstance(name, str) and isinstance(tensor, StoredTensor)
                                             for name, tensor in tree.items()):
        raise CheckpointError(f"{file}: holds more than a table of tensors; give a pytorch_model.bin of transformers")
    return tree
