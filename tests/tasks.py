"""Small fine-tuning tasks whose labels follow from a protein's letters, and small models to learn them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatron.checkpoint.contents import Checkpoint, stored
from megatron.config import Config, DataConfig, ModelConfig, ParallelConfig, PrecisionConfig, TrainingConfig
from megatron.data.corpus.vocab import Vocab
from megatron.finetune.data.contacts import table_of_atoms
from megatron.finetune.data.examples import Example
from megatron.finetune.data.labels import LabelSpace
from megatron.finetune.data.tasks import LABEL_KINDS, task_of
from megatron.finetune.heads import HeadSpec
from megatron.finetune.model import Described
from megatron.kernels.packed_sequence import NO_TARGET
from megatron.model.initialisation import initialise
from megatron.model.protein_model import ProteinModel

VOCAB = Vocab.from_file()
NAMES = ("a", "b", "c")
SPACES = {kind: LabelSpace(kind, NAMES if kind in ("class", "classes", "residues") else ()) for kind in LABEL_KINDS}
SEQ_LENGTH = 40


def label_of(kind, ids, rng):
    """The label, of kind `kind`, of a protein with the residues `ids`."""
    if kind == "number":
        return 3.0 + 2.0 * float(np.mean(ids == VOCAB.ids["A"]))
    if kind == "residues":
        return np.where(ids == VOCAB.ids["G"], NO_TARGET, ids.astype(np.int16) % 3)
    if kind == "numbers":
        return np.where(ids == VOCAB.ids["G"], np.nan, 5.0 + ids % 3).astype(np.float32)
    if kind == "contacts":
        places = rng.normal(scale=6.0, size=(len(ids), 3)).astype(np.float32)
        places[ids == VOCAB.ids["G"]] = np.nan
        return table_of_atoms(places)
    counts = np.bincount(ids % 3, minlength=3)
    return int(counts.argmax()) if kind == "class" else counts > len(ids) / 3


def examples_of(kind, number, seed=0, longest=SEQ_LENGTH - 1):
    """`number` random proteins with labels of kind `kind`."""
    rng = np.random.default_rng(seed)
    letters = np.array([VOCAB.ids[letter] for letter in "ACDEFGHIKL"], dtype=np.uint8)
    proteins = [rng.choice(letters, size=rng.integers(8, longest + 1)) for _ in range(number)]
    return [Example(str(place), ids, label_of(kind, ids, rng)) for place, ids in enumerate(proteins)]


def described(kind, **head):
    """The description of a task with labels of kind `kind`; `head`: further fields of its HeadSpec."""
    return Described(task_of("own", label_kind=kind), SPACES[kind],
                     HeadSpec(kind, max(1, len(SPACES[kind].class_names)), num_ends=1, **head))


def config_of(model: ModelConfig, parallel: ParallelConfig = ParallelConfig(), **sections) -> Config:  # noqa: B008
    """The configuration of a run with rows of SEQ_LENGTH tokens, four rows per step."""
    training = TrainingConfig(micro_batch_size=1, global_batch_size=4)
    return replace(Config(model=model, data=DataConfig(seq_length=SEQ_LENGTH), parallel=parallel, training=training),
                   **sections)


def checkpoint_of(model: ModelConfig, seed: int = 1) -> Checkpoint:
    """A checkpoint in memory: a model with its initial weights."""
    whole = ProteinModel(model, PrecisionConfig(), VOCAB.padded_size(model),
                         mask_id=VOCAB.mask_id)
    initialise(dict(whole.named_parameters()), seed)
    tensors = {name: stored(parameter) for name, parameter in whole.named_parameters()}
    return Checkpoint(Path("in memory"), 0, tensors, None, {})


def as_tensors(values):
    """All predictions as one flat tensor, for comparisons."""
    return torch.cat([torch.as_tensor(np.asarray(value, dtype=np.float32)).flatten() for value in values])
