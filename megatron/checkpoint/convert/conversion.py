"""Converts a checkpoint from one format and layout into another, with lines in the log on what it does."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.contact_head import BIAS, WEIGHT, contact_head_file, with_contact_head
from megatron.checkpoint.contents import Box, Checkpoint, StoredTensor, one_piece
from megatron.checkpoint.convert.families import esm, flags
from megatron.checkpoint.convert.families.vocabularies import known_vocabulary, num_tokens_of
from megatron.checkpoint.convert.formats import FORMATS, OURS, WEIGHTS_ALONE, read_as
from megatron.checkpoint.convert.megatron_v2.places import RELEASE
from megatron.checkpoint.convert.torch_files import check_torch_files
from megatron.checkpoint.convert.vocabulary import WORDS, trimmed
from megatron.checkpoint.loading import refuse_task
from megatron.checkpoint.manifest import check_files
from megatron.config.reading.checks import check_heads
from megatron.errors import ConfigError
from megatron.files import leaving_no_empty, left_over, replacing
from megatron.log import Log


@dataclass(frozen=True)
class FlagNames:
    """The names of a tool's flags, for messages."""

    save: str = "--save-dir"
    vocab_size: str = "--true-vocab-size"


def convert(source: Path, target: Path, loader: str, saver: str, *, tensor: int, pipeline: int, iteration: int | None,
            vocab_size: int | None, log: Log, takes_average: bool = False, names: FlagNames = FlagNames()) -> Path:
    """Read `source` and write it below `target`, a folder that is new or empty; returns the path of what was written.

    `loader` and `saver`: names of formats; `tensor` x `pipeline`: the layout to write for; `vocab_size`: the number of
    tokens, to which (padded for one rank) the vocabulary is cut; `takes_average`: write the average of the weights in
    place of the weights. Raises ConfigError or CheckpointError.
    """
    _refuse_occupied(target, names)
    name, checkpoint = read_as(loader, source, iteration)
    log.line(f"reading {checkpoint.path} ({name}): {describe(checkpoint)}")
    check_heads(checkpoint.state.get("config", {}), checkpoint.path)
    if saver not in OURS:
        refuse_task(checkpoint)
    check_files(checkpoint.path, log, with_optimizer=not takes_average and saver not in WEIGHTS_ALONE)
    check_torch_files(checkpoint.path)
    checkpoint, fitted = _with_fitted_contacts(checkpoint, saver, takes_average, log)
    checkpoint = checkpoint.averaged() if takes_average else checkpoint
    checkpoint = _with_true_rows(_without_what_is_unknown(checkpoint, saver, log), vocab_size, names, log)
    bar, not_finite = log.progress(_num_bytes(checkpoint), 0, unit="byte", label=f"writing {saver}"), set[str]()

    def see(name: str, values: Tensor) -> None:
        bar.update(values.nbytes)
        # If any value is NaN or infinite, so is the minimum or the maximum; unlike isfinite(), these take no memory.
        if values.is_floating_point() and values.numel() and not torch.stack(values.aminmax()).isfinite().all():
            not_finite.add(name)

    try:
        with leaving_no_empty(target):
            place = FORMATS[saver].write(_watched(checkpoint, see), target, tensor=tensor, pipeline=pipeline)
    finally:
        bar.close()
    if fitted is not None:
        with replacing(contact_head_file(place)) as temporary:
            shutil.copyfile(fitted, temporary)
    if not_finite:
        log.line(f"note: {', '.join(sorted(not_finite))} held numbers that are not finite, and still does")
    for note in esm.losses_in(checkpoint, place) if saver == "esm" else ():
        log.line(f"note: {note}")
    log.line(f"wrote {place} ({saver}, tensor {tensor} x pipeline {pipeline})")
    return place


def _refuse_occupied(target: Path, names: FlagNames) -> None:
    """Raises ConfigError if the folder holds anything but what a killed conversion left unfinished."""
    rests = {*left_over(target / "iter_", begins=True), *left_over(target / RELEASE)}
    if target.is_file() or (target.is_dir() and {*target.iterdir()} - rests):
        raise ConfigError(f"{names.save} {target} holds something already; give a new folder")


def _without_what_is_unknown(checkpoint: Checkpoint, saver: str, log: Log) -> Checkpoint:
    """The checkpoint without the average, the contact head and the optimizer's state if `saver` cannot hold them.

    Says so in the log, along with what else a run that resumes misses, and the notes that the reader left in the state.
    """
    if saver not in OURS and checkpoint.average is not None:
        log.line(f"note: {saver} knows no average of the weights beside them, and it is left out; --load-ema writes it "
                 "in their place")
        checkpoint = replace(checkpoint, average=None)
    for note in checkpoint.state.get("notes", ()):
        log.line(f"note: {note}")
    if saver.startswith("megatron-") and WEIGHT in checkpoint.model:
        log.line(f"note: {saver} knows no contact head; it is left out")
        config = {**checkpoint.state.get("config", {}), "contact_head": False}
        model = {name: tensor for name, tensor in checkpoint.model.items() if name not in (WEIGHT, BIAS)}
        checkpoint = replace(checkpoint, model=model, state={**checkpoint.state, "config": config})
    if saver == "megatron-v2" and "meters" in checkpoint.state:
        log.line(f"note: {saver} knows no counts of residues, seconds and FLOPs: the metrics of a run that resumes "
                 "from it lack them")
    of_muon = saver == "megatron-v2" and checkpoint.state.get("config", {}).get("optimizer") in ("muon", "normuon")
    if (saver in WEIGHTS_ALONE or of_muon) and checkpoint.optimizer is not None:
        log.line(f"note: {saver} {'knows no Muon' if of_muon else 'takes the weights alone'}; the optimizer's state is "
                 "left out")
        checkpoint = replace(checkpoint, optimizer=None)
    return checkpoint


def _with_true_rows(checkpoint: Checkpoint, vocab_size: int | None, names: FlagNames, log: Log) -> Checkpoint:
    """The checkpoint with its vocabulary cut to the padding of a single rank; writers pad further for more ranks.

    Unchanged if the number of tokens is neither given nor known. Raises ConfigError for an impossible `vocab_size`.
    """
    if WORDS not in checkpoint.model:
        return checkpoint
    rows, known = checkpoint.model[WORDS].shape[0], known_vocabulary(checkpoint)
    least = 1 if known is None else known.size
    if vocab_size is not None and not least <= vocab_size <= rows:
        raise ConfigError(f"{names.vocab_size} is {vocab_size}, but {checkpoint.path} has {rows} rows of the vocabulary"
                          f"{f' for {least} tokens' if known else ''}; give from {least} to {rows}, or leave it out")
    size = vocab_size or num_tokens_of(checkpoint)
    if size is None:
        return checkpoint
    true = trimmed(checkpoint, size)
    if (kept := true.model[WORDS].shape[0]) < rows:
        log.line(f"note: of {rows} rows of the vocabulary {kept} are kept: those of its {size} tokens, and padding")
    return true


def describe(checkpoint: Checkpoint) -> str:
    """A line for the log on what a checkpoint holds."""
    count = sum(math.prod(tensor.shape) for tensor in checkpoint.model.values())
    moments = "no optimizer state" if checkpoint.optimizer is None else "with the optimizer's state"
    average = "" if checkpoint.average is None else " and the average of the weights"
    return (f"iteration {checkpoint.iteration}, {count:,} parameters in {len(checkpoint.model)} tensors, {moments}"
            f"{average}")


def _with_fitted_contacts(checkpoint: Checkpoint, saver: str, takes_average: bool, log: Log) -> tuple[Checkpoint,
                                                                                                   Path | None]:
    """The checkpoint with its fitted contact regression as contact head, if the format `saver` can hold one.

    Otherwise the checkpoint as it is, and the regression's file, to be copied beside what is written. Raises
    CheckpointError if the file is damaged.
    """
    file = contact_head_file(checkpoint.path)
    if not file.is_file():
        return checkpoint, None
    if takes_average:
        log.line(f"note: {file} is left out: it was fitted on the weights, not on their average")
        return checkpoint, None
    fitted = with_contact_head(checkpoint)
    if saver == "esm" or (saver == "hf" and flags.family_of(flags.complete(checkpoint)) != flags.BERT):
        log.line(f"note: {file} goes along as the contact head")
        return fitted, None
    log.line(f"note: {file} goes along, beside the checkpoint's own files")
    return checkpoint, file


def _num_bytes(checkpoint: Checkpoint) -> int:
    """The size of all tensors, in bytes."""
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize
               for tensors in (checkpoint.model, checkpoint.optimizer or {}, checkpoint.average or {})
               for tensor in tensors.values())


def _watched(checkpoint: Checkpoint, see: Callable[[str, Tensor], object]) -> Checkpoint:
    """The checkpoint with `see(name, values)` called on all values that are read from it."""
    def watched(name: str, tensor: StoredTensor) -> StoredTensor:
        def read(box: Box) -> Tensor:
            values = tensor.read_box(box)
            see(name, values)
            return values

        return one_piece(tensor.shape, tensor.dtype, read)

    return checkpoint.mapped(watched)
