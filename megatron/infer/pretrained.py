"""A checkpoint of any format as a model to ask: whole, on the host, in fp32, in evaluation.

No flag need be given, the checkpoint tells its own. `megatron.train.build` makes what is trained, in any layout.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from megatron.checkpoint.loading import load_model
from megatron.checkpoint.newest import newest
from megatron.checkpoint.stored import Checkpoint
from megatron.config import Config
from megatron.config.command_line import left_open, parse
from megatron.data.corpus.tokenizer import ResidueTokenizer
from megatron.data.corpus.vocab import Vocab
from megatron.errors import CheckpointError
from megatron.kernels.packed_sequence import PackedSequence
from megatron.log import Log
from megatron.model.initialisation import initialise
from megatron.model.protein_model import ProteinModel
from megatron.parallel.mesh import Axis

POSITIONS = 1024  # of a row, where a checkpoint does not say


@dataclass(frozen=True)
class Pretrained:
    """A model, and what is to be known to feed it; of `config` the model, the data's ends and the row length hold."""

    model: ProteinModel
    config: Config
    vocab: Vocab
    iteration: int

    @property
    def max_residues(self) -> int:
        """The most residues of a protein in a row."""
        return self.config.data.seq_length - self.config.data.num_ends

    def rows(self, proteins: Iterable[str]) -> Iterator[PackedSequence]:
        """The proteins in their order, as many in each row as it holds; a longer one begins only. There is no filler.

        Raises ResidueError for a text that is no protein.
        """
        parts: list[np.ndarray] = []
        for protein in proteins:
            part = self._between_ends(self._tokenizer.encode(protein)[:self.max_residues])
            if sum(map(len, parts)) + len(part) > self.config.data.seq_length:
                yield _packed(parts)
                parts = []
            parts.append(part)
        if parts:
            yield _packed(parts)

    def is_residue(self, sequence: PackedSequence) -> Tensor:
        """Of each token of a row whether it is none of a protein's ends, bool [t]."""
        return (sequence.tokens_t != self.vocab.cls_id) & (sequence.tokens_t != self.vocab.sep_id)

    def untrained(self, seed: int) -> "Pretrained":
        """One of the same shape with the random weights that training begins with by default."""
        model = _without_values(self.config, self.vocab)
        initialise(dict(model.named_parameters()), seed)
        return replace(self, model=model, iteration=0)

    @cached_property
    def _tokenizer(self) -> ResidueTokenizer:
        return ResidueTokenizer(self.vocab)

    def _between_ends(self, ids: np.ndarray) -> np.ndarray:
        behind = [self.vocab.sep_id] * (self.config.data.num_ends - 1)
        return np.array([self.vocab.cls_id, *ids, *behind], dtype=np.int64)


def load(folder: str, log: Log) -> Pretrained:
    """What the newest whole checkpoint in a run's folder holds, or a model of another program; raises CheckpointError.

    `log` is told what is to be said of it, as where a broken one is passed over.
    """
    checkpoint = newest(folder, Axis(), log, with_optimizer=False)
    if checkpoint is None:
        raise CheckpointError(f"{folder} holds no checkpoint; give the folder that a run was saved in")
    config = _config_of(checkpoint)
    vocab = Vocab.from_file(config.data.vocab_file, config.data.mask_token)
    if checkpoint.state.get("vocabulary", vocab.identity) != vocab.identity:
        name = _flags_of(checkpoint).get("vocab_file") or "iupac"
        raise CheckpointError(f"{checkpoint.path}: its vocabulary, {name}, is not there, or has changed; put it back "
                              "as it was")
    model = _without_values(config, vocab)
    parameters = dict(model.named_parameters())
    load_model(parameters, checkpoint, parameters.keys())
    return Pretrained(model, config, vocab, checkpoint.iteration)


def _config_of(checkpoint: Checkpoint) -> Config:
    """Its model's flags, its row length and vocabulary; everything else by default."""
    flags = _flags_of(checkpoint)
    positions = flags.get("seq_length") or flags.get("max_position_embeddings") or POSITIONS
    needed = {"--seq-length": positions, "--micro-batch-size": 1, "--train-iters": 1, "--lr": 1}
    argv = [str(word) for pair in needed.items() for word in pair]
    return parse(argv, left_open(["--load", str(checkpoint.path)], lambda _: flags))[0]


def _flags_of(checkpoint: Checkpoint) -> dict:
    flags = checkpoint.state.get("config")
    if not isinstance(flags, dict):
        raise CheckpointError(f"{checkpoint.path} does not say its flags, without which no model can be made")
    return flags


def _without_values(config: Config, vocab: Vocab) -> ProteinModel:
    """The model in evaluation, its parameters yet to be filled."""
    with torch.device("meta"):
        model = ProteinModel(config.model, config.precision,
                             vocab.padded_size(config.model.make_vocab_size_divisible_by), mask_id=vocab.mask_id)
    return model.to_empty(device="cpu").eval().requires_grad_(False)


def _packed(parts: Sequence[np.ndarray]) -> PackedSequence:
    lengths = [len(part) for part in parts]
    positions_t = torch.cat([torch.arange(length) for length in lengths])
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return PackedSequence(torch.from_numpy(np.concatenate(parts)), positions_t, ends, max(lengths), num_filler=0)
