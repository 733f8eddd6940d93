"""Loads a checkpoint of any format for inference: `load_pretrained(path)`. All settings come from the checkpoint.

Models for training, in any layout, are made by `megatron.train.setup`. Shapes: r residues of a protein, h hidden, v
tokens of the vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.checkpoint.contact_head import WEIGHT, with_contact_head
from megatron.checkpoint.contents import Checkpoint
from megatron.checkpoint.loading import load_model, with_padding_of
from megatron.checkpoint.lora.merging import merged
from megatron.checkpoint.newest import open_newest
from megatron.checkpoint.places import digest_of_weights
from megatron.config import Config
from megatron.config.command_line import left_open, parse
from megatron.data.corpus.tokenizer import ResidueTokenizer
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.packed import between_ends
from megatron.errors import CheckpointError, ConfigError, ResidueError
from megatron.infer.answers import Answer, Asked, answers
from megatron.infer.rows import MOST_TOKENS, packed
from megatron.kernels.packed_sequence import PackedSequence
from megatron.log import Log
from megatron.model.initialisation import initialise
from megatron.model.protein_model import TASK_HEAD, ProteinModel, compute_dtype
from megatron.parallel.layout import check_layout
from megatron.parallel.mesh import Mesh
from megatron.parallel.tensor.copies import ComputeCopies
from megatron.parallel.tensor.stream import Stream

PRECISIONS = ("fp32", "bf16", "fp16")
POSITIONS = 1024  # of a row, where a checkpoint does not say


@dataclass(frozen=True)
class Pretrained:
    """A model for inference, with its configuration, vocabulary and the path of its checkpoint.

    Only these parts of `config` are meaningful: the model, the precision, the tokens at a protein's ends and the row
    length. Each tensor rank of `mesh` holds a shard of the model; all must call a method together, and get the same
    result. Proteins are strings of residues, in upper or lower case; a string that is not a protein, or is empty,
    raises ResidueError.
    """

    model: ProteinModel
    config: Config
    vocab: Vocab
    iteration: int
    mesh: Mesh
    path: Path

    def embed(self, proteins: Sequence[str], layer: int = -1) -> np.ndarray:
        """For each protein, the hidden states averaged over its residues, fp32 [proteins, h].

        `layer`: 0 for the embeddings, n for the output of block n, -1 for the last layer, after the final norm.
        """
        return np.stack([answer["mean"][0] for answer in self.ask(proteins, Asked(("mean",), (layer,)))])

    def embed_residues(self, proteins: Sequence[str], layer: int = -1) -> list[np.ndarray]:
        """For each protein, the hidden states of its residues, fp32 [r, h]; `layer` as in `embed`."""
        return [answer["per_tok"][0] for answer in self.ask(proteins, Asked(("per_tok",), (layer,)))]

    def logits(self, proteins: Sequence[str]) -> list[np.ndarray]:
        """For each protein, the logits of the masked-LM head at its residues, none of them masked, fp32 [r, v].

        Column i belongs to `vocab.tokens[i]`.
        """
        return [answer["logits"] for answer in self.ask(proteins, Asked(("logits",), ()))]

    def contacts(self, proteins: Sequence[str]) -> list[np.ndarray]:
        """For each protein, the probability that two of its residues are in contact, fp32 [r, r].

        Uses the contact head of the checkpoint, as ESM's have, or the one that `tools/predict_contacts.py --fit` has
        saved beside it. Raises ConfigError if there is neither.
        """
        return [answer["contacts"] for answer in self.ask(proteins, Asked(("contacts",), ()))]

    def ask(self, proteins: Sequence[str], asked: Asked, budget: int | None = None) -> list[Answer]:
        """All outputs in `asked`, for each protein in order. `budget`: tokens in a row; None for as many as memory
        allows.
        """
        return self.ask_ids([self.encode(protein, f"protein {number}") for number, protein in enumerate(proteins, 1)],
                            asked, budget)

    def ask_ids(self, proteins: Sequence[np.ndarray], asked: Asked, budget: int | None = None) -> list[Answer]:
        """As `ask`, for proteins that `encode` made; some of their residues may be replaced by the id of the mask
        token.
        """
        asked = asked.resolved(self.config.model.num_layers, self.config.model.contact_head)
        return answers(self.model, self.mesh, proteins, self.num_ends, self.vocab.size, asked, budget)

    def encode(self, protein: str, name: str) -> np.ndarray:
        """The ids of a protein with the tokens at its ends, int64; errors call it `name`.

        Raises ResidueError if it is not a protein, ConfigError if it is longer than the model's positions allow.
        """
        try:
            return self.between_ends(self._tokenizer.encode(protein), name)
        except ResidueError as error:
            raise ResidueError(f"{name}: {error}") from None

    def between_ends(self, residues: np.ndarray, name: str) -> np.ndarray:
        """Ids of residues with the tokens at the protein's ends added, int64; raises the errors of `encode`."""
        if not len(residues):
            raise ResidueError(f"{name}: it has no residue")
        if self.max_residues is not None and len(residues) > self.max_residues:
            raise ConfigError(f"{name}: it has {len(residues)} residues, and the model knows the positions of "
                              f"{self.max_residues}; crop it, or ask in windows")
        return between_ends([residues], (self.vocab.cls_id, self.vocab.sep_id)[:self.num_ends])

    def row(self, proteins: Sequence[str]) -> PackedSequence:
        """The proteins packed into one row, on the model's device."""
        return packed([self.encode(protein, f"protein {number}") for number, protein in enumerate(proteins, 1)],
                      self.mesh.device)

    @property
    def num_ends(self) -> int:
        """The number of tokens around a protein: 1 (before it) or 2."""
        return self.config.data.num_ends

    @property
    def max_residues(self) -> int | None:
        """The most residues of a protein that the model can read at once; None: any number."""
        model = self.config.model
        if model.position_embedding_type != "learned_absolute":
            return None
        return model.max_position_embeddings - self.num_ends

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Facts that change if the model does: its path, its iteration and a digest of its weights."""
        return {"checkpoint": str(self.path.absolute()), "iteration": self.iteration,
                "weights": digest_of_weights(self.path)}

    def untrained(self, seed: int) -> "Pretrained":
        """A model of the same shape with random weights, initialised as training does by default."""
        model = _without_values(self.config, self.vocab, self.mesh)
        initialise(dict(model.named_parameters()), seed)
        _make_copies(model, self.config)
        return replace(self, model=model, iteration=0)

    @cached_property
    def _tokenizer(self) -> ResidueTokenizer:
        return ResidueTokenizer(self.vocab)


def load_pretrained(path: str, device: str | None = None, precision: str = "fp32") -> Pretrained:
    """Load a model for inference from anything that `--load` takes: a run's folder (its newest checkpoint), or a
    checkpoint of another program.

    A fine-tuned model is loaded without its task head and with its adapters merged: it gives embeddings, but no logits.
    `device`: a PyTorch device, by default a GPU if there is one. `precision` of the computation: fp32, bf16 or fp16;
    results are fp32. Raises CheckpointError if there is no readable checkpoint, ConfigError for a bad device or
    precision.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type not in MOST_TOKENS:
        raise ConfigError(f"device is {device!r}; it must be one of {', '.join(MOST_TOKENS)}, with a number or without")
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # where Triton starts kernels, wherever their tensors are
    return load(path, Mesh(device=chosen), Log(), precision)


def load(path: str, mesh: Mesh, log: Log, precision: str = "fp32") -> Pretrained:
    """As `load_pretrained`, on the ranks of a mesh, which must call this together; notes go to `log`."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    checkpoint = open_newest(path, mesh.world, log, with_optimizer=False)
    if checkpoint is None:
        raise CheckpointError(f"{path} holds no checkpoint; give the folder that a run was saved in")
    checkpoint = with_contact_head(checkpoint)
    config = config_of(checkpoint, precision, mesh.tensor.size)
    vocab = vocab_of(checkpoint, config)
    checkpoint = with_padding_of(checkpoint, vocab, vocab.padded_size(config.model), log)
    checkpoint = merged(checkpoint, config.model)
    is_taught = any(name.startswith(TASK_HEAD) for name in checkpoint.model)
    if is_taught:
        checkpoint, config = _without_task(checkpoint, config)
    model = _without_values(config, vocab, mesh)
    if is_taught:
        del model.lm_head
    parameters = dict(model.named_parameters())
    load_model(parameters, checkpoint, parameters)  # each tensor rank has a part of every parameter
    _make_copies(model, config)
    return Pretrained(model, config, vocab, checkpoint.iteration, mesh, checkpoint.path)


def config_of(checkpoint: Checkpoint, precision: str, tensor_size: int = 1) -> Config:
    """A configuration with the checkpoint's model, row length and vocabulary, and defaults for everything else.

    `tensor_size`: ranks that split each layer; raises ConfigError if the model cannot be split so.
    """
    flags = flags_of(checkpoint)
    needed = {"--seq-length": positions_of(flags), "--micro-batch-size": 1, "--train-iters": 1, "--lr": 1,
              "--tensor-model-parallel-size": tensor_size}
    argv = [str(word) for pair in needed.items() for word in pair]
    argv += [] if precision == "fp32" else [f"--{precision}"]
    config = parse(argv, left_open(["--load", str(checkpoint.path)], lambda _: flags))[0]
    check_layout(config, tensor_size)
    return config


def positions_of(flags: Mapping[str, Any]) -> int:
    """The row length of a model with these flags."""
    return flags.get("seq_length") or flags.get("max_position_embeddings") or POSITIONS


def vocab_of(checkpoint: Checkpoint, config: Config) -> Vocab:
    """The vocabulary of a checkpoint; raises CheckpointError if it only names a file, which is missing or has changed.
    """
    if (kept := Vocab.of_state(checkpoint.state)) is not None:
        return kept
    if checkpoint.state.get("lacks_vocabulary"):
        raise CheckpointError(f"{checkpoint.path}: nothing there says what its tokens are; copy vocab.txt or "
                              "tokenizer.json from where the weights are")
    vocab = Vocab.from_file(config.data.vocab_file, config.data.mask_token)
    if checkpoint.state.get("vocabulary", vocab.identity) != vocab.identity:
        name = flags_of(checkpoint).get("vocab_file") or "iupac"
        raise CheckpointError(f"{checkpoint.path}: its vocabulary, {name}, is not there, or has changed; put it back "
                              "as it was")
    return vocab


def flags_of(checkpoint: Checkpoint) -> dict:
    """The flags saved in a checkpoint, by field name; raises CheckpointError if it has none."""
    flags = checkpoint.state.get("config")
    if not isinstance(flags, dict):
        raise CheckpointError(f"{checkpoint.path} does not say its flags, without which no model can be made")
    return flags


def _without_task(checkpoint: Checkpoint, config: Config) -> tuple[Checkpoint, Config]:
    """A fine-tuned checkpoint without its task head, and its configuration, with the contact head if one was fitted."""
    tensors = {name: tensor for name, tensor in checkpoint.model.items() if not name.startswith(TASK_HEAD)}
    model = replace(config.model, contact_head=WEIGHT in tensors)
    return replace(checkpoint, model=tensors), replace(config, model=model)


def _without_values(config: Config, vocab: Vocab, mesh: Mesh) -> ProteinModel:
    """This rank's shard of the model in evaluation mode, with uninitialised parameters."""
    with torch.device("meta"):
        model = ProteinModel(config.model, config.precision, vocab.padded_size(config.model), Stream(mesh.tensor),
                             mask_id=vocab.mask_id)
    # As to_empty, whose empty_like of what lies on `meta` imports SymPy, which takes as long as all of this.
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=mesh.device))
    return model.eval().requires_grad_(False)


def _make_copies(model: ProteinModel, config: Config) -> None:
    """Cast the weights to the precision of the computation, once."""
    ComputeCopies(model.matrices(), compute_dtype(config.precision))
