"""From a checkpoint of any format and layout into this rank's parameters and optimizer state."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from megatron.checkpoint.convert.vocabulary import WORDS, with_rows
from megatron.checkpoint.stored import Checkpoint, StoredTensor, Tensors
from megatron.data.corpus.vocab import Vocab
from megatron.errors import CheckpointError
from megatron.log import Log
from megatron.model.protein_model import TASK_HEAD
from megatron.parallel.placement import Part, part_of_state, placement_of


def load_model(parameters: Mapping[str, Tensor], checkpoint: Checkpoint, names: Collection[str]) -> None:
    """Fill this rank's `parameters` in place.

    `names`: those of the whole model's parameters, of which this rank has some. Raises CheckpointError naming what does
    not fit.
    """
    if not any(name.startswith(TASK_HEAD) for name in names):
        refuse_task(checkpoint)
    for name in sorted(set(names) ^ checkpoint.model.keys()):
        where = "the model" if name in checkpoint.model else checkpoint.path
        raise CheckpointError(f"{checkpoint.path}: parameter {name} is not in {where}; the model's flags have to be "
                              "those of that checkpoint")
    with torch.no_grad():
        for parameter in parameters.values():
            if placement_of(parameter).part(parameter).tensor.shape != parameter.shape:
                parameter.zero_()  # padding
        _read({name: _fitting(name, placement_of(parameter).part(parameter), checkpoint.model[name], checkpoint)
                    for name, parameter in parameters.items()}, checkpoint.model)


def with_padding_of(checkpoint: Checkpoint, vocab: Vocab, num_rows: int, log: Log) -> Checkpoint:
    """The checkpoint with `num_rows` rows of the vocabulary, where it has those of all tokens of `vocab`.

    Megatron's have more padding the more tensor-parallel ranks they were written for.
    """
    there = checkpoint.model[WORDS].shape[0] if WORDS in checkpoint.model else 0
    if there < vocab.size or there == num_rows:
        return checkpoint
    log.line(f"note: {checkpoint.path} has {there} rows of the vocabulary, a model here {num_rows}: those behind the "
             f"{vocab.size} tokens are taken to be padding")
    return with_rows(checkpoint, num_rows)


def refuse_task(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where the model was fine-tuned, and so has no masked-LM head."""
    if any(name.startswith(TASK_HEAD) for name in checkpoint.model):
        origin = checkpoint.state.get("began_from")
        raise CheckpointError(f"{checkpoint.path} was taught a task, and has a head for that in place of the masked-LM "
                              f"head; give what it was begun from{f', {origin}' if origin else ''}")


def load_optimizer(parameters: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """This rank's parts of the optimizer's state, KIND/PARAMETER; that of other ranks' parameters stays unread.

    Raises CheckpointError where it does not fit `parameters`, those of this rank.
    """
    tensors = checkpoint.optimizer or {}
    _check_kinds(tensors, checkpoint)
    state = {key: _memory(tensors[key], parameters[name]) for key in tensors
             if (name := key.partition("/")[2]) in parameters}
    _read({key: _fitting(key, part_of_state(parameters[key.partition("/")[2]], tensor), tensors[key], checkpoint)
                for key, tensor in state.items()}, tensors)
    return state


def load_average(average: Mapping[str, Tensor], parameters: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Fill this rank's `average` of `parameters` in place, as far as the checkpoint has it; raises CheckpointError."""
    stored = checkpoint.average or {}
    _read({name: _fitting(name, part_of_state(parameters[name], tensor), stored[name], checkpoint)
                for name, tensor in average.items() if name in stored}, stored)


def _read(parts: Mapping[str, Part], tensors: Tensors) -> None:
    """Fill the tensors of `parts` in place with their boxes of the stored ones of the same names."""
    for name, part in parts.items():
        if part.tensor.numel():
            part.tensor.copy_(tensors[name].read_box(part.box))


def _check_kinds(tensors: Tensors, checkpoint: Checkpoint) -> None:
    kinds_of: dict[str, set[str]] = {}
    for key in tensors:
        kind, _, name = key.partition("/")
        kinds_of.setdefault(name, set()).add(kind)
    for name, kinds in sorted(kinds_of.items()):
        # Others that are stepped as this one is: some optimizers step but the matrices, and leave the rest to another.
        alike = [other for other in kinds_of.values() if (other & kinds) - {"step"}]
        if missing := set().union(*(alike if alike and name else kinds_of.values())) - kinds:
            raise CheckpointError(f"{checkpoint.path}: the optimizer's state lacks {min(missing)}/{name}; load an "
                                  "older iteration, or give --no-load-optim to start the optimizer afresh")


def _memory(tensor: StoredTensor, parameter: Tensor) -> Tensor:
    """Zeros for a state tensor: one of fewer dimensions than its parameter is the same everywhere."""
    shape = parameter.shape if len(tensor.shape) == parameter.ndim else tensor.shape
    return torch.zeros(shape, dtype=tensor.dtype, device=parameter.device if tensor.shape else "cpu")


def _fitting(name: str, part: Part, tensor: StoredTensor, checkpoint: Checkpoint) -> Part:
    if tensor.shape != part.whole_shape:
        raise CheckpointError(f"{checkpoint.path}: {name} is {list(tensor.shape)} there and {list(part.whole_shape)} "
                              "here; the model's flags have to be those of that checkpoint")
    return part
