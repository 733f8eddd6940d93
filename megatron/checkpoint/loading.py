"""Loads this rank's parameters, optimizer state and weight average from a checkpoint of any format and layout."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from megatron.checkpoint.contents import Checkpoint, StoredTensor, Tensors
from megatron.checkpoint.convert.vocabulary import WORDS, with_rows
from megatron.data.corpus.vocab import Vocab
from megatron.errors import CheckpointError
from megatron.log import Log
from megatron.model.protein_model import TASK_HEAD
from megatron.parallel.placement import Part, part_of_state, placement_of


def load_model(parameters: Mapping[str, Tensor], checkpoint: Checkpoint, names: Collection[str]) -> None:
    """Fill this rank's `parameters` (by name) in place.

    `names`: of all parameters of the whole model; the checkpoint must have exactly these. Raises CheckpointError that
    names the parameter that is missing, unexpected or of another shape.
    """
    if not any(name.startswith(TASK_HEAD) for name in names):
        refuse_task(checkpoint)
    for name in sorted(set(names) ^ checkpoint.model.keys()):
        where = "the model" if name in checkpoint.model else checkpoint.path
        raise CheckpointError(f"{checkpoint.path}: parameter {name} is not in {where}; the model's flags have to be "
                              "those of that checkpoint")
    with torch.no_grad():
        parts = {name: placement_of(parameter).part(parameter) for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            if parts[name].tensor.shape != parameter.shape:
                parameter.zero_()  # padding
        _fill(parts, checkpoint.model, checkpoint)


def with_padding_of(checkpoint: Checkpoint, vocab: Vocab, num_rows: int, log: Log) -> Checkpoint:
    """The checkpoint with its vocabulary padded or cut to `num_rows` rows; says so in the log if that changes anything.

    Megatron pads the vocabulary for the number of tensor-parallel ranks, so its checkpoints may have other padding. A
    checkpoint with fewer rows than `vocab` has tokens is returned unchanged.
    """
    there = checkpoint.model[WORDS].shape[0] if WORDS in checkpoint.model else 0
    if there < vocab.size or there == num_rows:
        return checkpoint
    log.line(f"note: {checkpoint.path} has {there} rows of the vocabulary, a model here {num_rows}: those behind the "
             f"{vocab.size} tokens are taken to be padding")
    return with_rows(checkpoint, num_rows)


def refuse_task(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if the model was fine-tuned on a task, and so has no masked-LM head."""
    if any(name.startswith(TASK_HEAD) for name in checkpoint.model):
        origin = checkpoint.state.get("began_from")
        raise CheckpointError(f"{checkpoint.path} was taught a task, and has a head for that in place of the masked-LM "
                              f"head; give what it was begun from{f', {origin}' if origin else ''}")


def load_optimizer(parameters: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """This rank's part of the optimizer's state, by KIND/PARAMETER; {} if the checkpoint has none.

    `parameters`: this rank's; the state of others is not read. Raises CheckpointError if the state does not fit them.
    """
    tensors = checkpoint.optimizer or {}
    _check_kinds(tensors, checkpoint)
    state = {key: _memory(tensors[key], parameters[name]) for key in tensors
             if (name := key.partition("/")[2]) in parameters}
    _fill({key: part_of_state(parameters[key.partition("/")[2]], tensor) for key, tensor in state.items()}, tensors,
          checkpoint)
    return state


def load_average(average: Mapping[str, Tensor], parameters: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Fill this rank's `average` of `parameters` in place, for those names whose average the checkpoint has.

    Raises CheckpointError if a shape differs.
    """
    stored = checkpoint.average or {}
    _fill({name: part_of_state(parameters[name], tensor) for name, tensor in average.items() if name in stored}, stored,
          checkpoint)


def _fill(parts: Mapping[str, Part], tensors: Tensors, checkpoint: Checkpoint) -> None:
    """Fill the tensor of each part in place from the stored one; raises CheckpointError where shapes differ."""
    for name, part in parts.items():
        if (shape := tensors[name].shape) != part.whole_shape:
            raise CheckpointError(f"{checkpoint.path}: {name} is {list(shape)} there and {list(part.whole_shape)} "
                                  "here; the model's flags have to be those of that checkpoint")
        if part.tensor.numel():
            part.tensor.copy_(tensors[name].read_box(part.box))


def _check_kinds(tensors: Tensors, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if a parameter lacks a kind of state that similar parameters have."""
    kinds_of: dict[str, set[str]] = {}
    for key in tensors:
        kind, _, name = key.partition("/")
        kinds_of.setdefault(name, set()).add(kind)
    for name, kinds in sorted(kinds_of.items()):
        # Compare with parameters of the same optimizer only: Muon updates matrices, and Adam the rest.
        alike = [other for other in kinds_of.values() if (other & kinds) - {"step"}]
        if missing := set().union(*(alike if alike and name else kinds_of.values())) - kinds:
            raise CheckpointError(f"{checkpoint.path}: the optimizer's state lacks {min(missing)}/{name}; load an "
                                  "older iteration, or give --no-load-optim to start the optimizer afresh")


def _memory(tensor: StoredTensor, parameter: Tensor) -> Tensor:
    """A zero tensor that receives this rank's part of a state tensor.

    It has the shape of this rank's parameter, but a state tensor of fewer dimensions (such as the step count) is held
    whole by every rank.
    """
    shape = parameter.shape if len(tensor.shape) == parameter.ndim else tensor.shape
    return torch.zeros(shape, dtype=tensor.dtype, device=parameter.device if tensor.shape else "cpu")
