"""Packs labelled proteins into rows and rows into micro-batches of fixed shape, alike for any data-parallel size.

Which proteins lie in which row depends only on the seed and the epoch. A step takes `global_batch_size` rows in
Megatron's order, as in `data.batches.loader`; the last micro-batches of an epoch have fewer rows, or none.

Shapes: t tokens of a micro-batch (of this rank's share, with context parallelism), g proteins, padded with empty ones
as in `PackedSequence`, c classes, r residues.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from megatron.data.batches.batch import Batch, BatchShape, collate
from megatron.data.batches.loader import micro_batch_samples
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.packed import Row, between_ends
from megatron.data.rows.packing import PackedRows, order_key, pack
from megatron.finetune.data.examples import Example
from megatron.finetune.data.labels import LabelSpace
from megatron.finetune.data.tasks import CLASS, CLASSES, CONTACTS, NUMBER, NUMBERS, RESIDUES
from megatron.infer.contacts.chains import LEAST_SEPARATION
from megatron.kernels.packed_sequence import NO_TARGET, Targets
from megatron.log import number_of
from megatron.parallel.randomness import dropout_seed

_ORDER, _CROP = 0, 1  # purposes of randomness
_SPARE_PROTEINS = 8
NO_EXAMPLE = -1


@dataclass(frozen=True)
class BatchSettings:
    """How a run packs examples into rows and distributes the rows over ranks.

    num_ends: end tokens of a protein, as in `DataConfig`. token_multiple, share, num_shares: as in `BatchShape`, for
    tensor and context parallelism.
    """

    seq_length: int
    num_ends: int
    micro_batch_size: int
    global_batch_size: int
    seed: int = 0
    data_rank: int = 0
    data_size: int = 1
    token_multiple: int = 1
    share: int = 0
    num_shares: int = 1

    def __post_init__(self) -> None:
        assert self.global_batch_size % (self.micro_batch_size * self.data_size) == 0, "as check_layout sees to"

    @property
    def max_residues(self) -> int:
        """The most residues of one protein that fit into a row."""
        return self.seq_length - self.num_ends


@dataclass(frozen=True)
class TaskTargets:
    """The labels of a micro-batch, which stand in its field `targets`; all shapes are constant throughout a run.

    `residues`: for the kind residues, the classes and their indices among this rank's tokens, NO_TARGET in unused
    entries; no targets for the other kinds. `labels`, by kind:
    - number: float32 [g], 0 for empty proteins
    - class: int64 [g], NO_TARGET for empty proteins
    - classes: float32 [g, c] of 0 and 1, all 0 for empty proteins
    - residues: empty
    - numbers: float32 [t], of each token's residue, NaN for ends, filler and residues that do not count
    - contacts: int32 [t, 1 + k], the rows of the tables that the module `contacts` describes, 0 for ends and filler;
      the pairs are formed on the device

    The batch's `num_targets` counts the labels of the whole micro-batch: for residues and numbers, those that count;
    for contacts, the pairs of resolved residues at least LEAST_SEPARATION apart; else one per protein. It is 0 if the
    examples have no labels.
    """

    residues: Targets
    labels: Tensor
    examples_g: Tensor  # int64, the index of each protein's example, NO_EXAMPLE for empty proteins

    def map(self, function: Callable[[Tensor], Tensor]) -> "TaskTargets":
        """A copy with `function` applied to each tensor."""
        return TaskTargets(self.residues.map(function), function(self.labels), function(self.examples_g))


class PackedExamples:
    """The micro-batches of a set of examples, epoch by epoch.

    In training each epoch has its own order, and takes a random window of each protein that is longer than a row. In
    evaluation every epoch is the same: examples in the file's order, and long proteins cropped to their beginning.
    """

    def __init__(self, examples: Sequence[Example], space: LabelSpace, vocab: Vocab, settings: BatchSettings,
                 is_training: bool) -> None:
        self.examples, self._space, self._vocab, self._settings = examples, space, vocab, settings
        self._is_training = is_training
        self._lengths = np.array([len(example.ids) for example in examples], dtype=np.int64)
        self._packed = lru_cache(maxsize=2)(self._pack)
        self._width = max((example.label.shape[1] for example in examples if example.label is not None), default=1
                          ) if space.kind == CONTACTS else 1  # of the contact tables
        self._shape = self._batch_shape()

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """This rank's micro-batches, a list for each global batch of the epoch from `first_step` on."""
        size = self._settings.global_batch_size
        for first in range(first_step * size, self.num_rows(epoch), size):
            yield self._step(self._epoch(epoch), first)

    def num_rows(self, epoch: int) -> int:
        """The number of rows of an epoch; it varies slightly from epoch to epoch."""
        return len(self._packed(self._epoch(epoch)))

    def num_steps(self, epoch: int) -> int:
        """The number of global batches of an epoch, the last of which may be smaller."""
        return -(-self.num_rows(epoch) // self._settings.global_batch_size)

    def describe(self, name: str) -> str:
        """The number of examples and rows and how full the rows are, as one line for the log."""
        settings, num_long = self._settings, int((self._lengths > self._settings.max_residues).sum())
        tokens = int(np.minimum(self._lengths, settings.max_residues).sum()) + settings.num_ends * len(self._lengths)
        what = "a random window" if self._is_training else "the beginning"
        crops = (f" ({num_long:,} longer than a row of {settings.seq_length:,}, of which {what} is taken with its "
                 "labels)" if num_long else "")
        return (f"{name}: {number_of(len(self.examples), 'protein')}{crops}, "
                f"{number_of(self.num_rows(0), 'row')} an epoch, "
                f"{100 * tokens / (self.num_rows(0) * settings.seq_length):.1f} % full")

    def _epoch(self, epoch: int) -> int:
        return epoch if self._is_training else 0

    def _pack(self, epoch: int) -> PackedRows:
        key = order_key(self._settings.seed, _ORDER, epoch) if self._is_training else None
        return pack(self._lengths, self._settings.seq_length, "best-fit", key=key, num_ends=self._settings.num_ends)

    def _batch_shape(self) -> BatchShape:
        settings = self._settings
        num_tokens = settings.micro_batch_size * settings.seq_length
        counts = np.diff(self._packed(0).row_starts)
        most = int(np.sort(counts)[-settings.micro_batch_size:].sum()) if len(counts) else 0
        num_targets = settings.micro_batch_size * settings.max_residues if self._space.kind == RESIDUES else 0
        return BatchShape(
            num_tokens=num_tokens + -num_tokens % settings.token_multiple,
            num_proteins=most + most // 4 * self._is_training + _SPARE_PROTEINS, num_targets=num_targets,
            max_length=int(min(self._lengths.max(initial=1), settings.max_residues)) + settings.num_ends,
            share=settings.share, num_shares=settings.num_shares, num_ends=settings.num_ends)

    def _step(self, epoch: int, first: int) -> list[Batch]:
        settings, packed = self._settings, self._packed(epoch)
        size, num_ranks = settings.micro_batch_size, settings.data_size
        of_rank = micro_batch_samples(first, None, size, settings.data_rank, num_ranks)
        return [self._batch(epoch, rows[:max(0, len(packed) - rows.start)])
                for rows in islice(of_rank, settings.global_batch_size // (size * num_ranks))]

    def _num_labels(self, number: int, window: slice) -> int:
        """How many labels a window of an example adds to the batch's `num_targets`."""
        label = self.examples[number].label
        if label is None:
            return 0
        if self._space.kind == RESIDUES:
            return int((label[window] != NO_TARGET).sum())
        if self._space.kind == NUMBERS:
            return int((~np.isnan(label[window])).sum())
        if self._space.kind == CONTACTS:
            is_resolved_r = label[window, 0] > 0
            return int(is_resolved_r[LEAST_SEPARATION:] @ np.cumsum(is_resolved_r)[:-LEAST_SEPARATION])
        return 1

    def _parts(self, epoch: int, row: int) -> list[tuple[int, slice]]:
        """The examples of a row: their indices, and the windows of their residues that are in it."""
        return [(number, self._window(epoch, number)) for number in self._packed(epoch).row(row).tolist()]

    def _window(self, epoch: int, number: int) -> slice:
        length, size = int(self._lengths[number]), self._settings.max_residues
        if length <= size:
            return slice(0, length)
        start = 0
        if self._is_training:
            rng = np.random.default_rng((self._settings.seed, _CROP, epoch, number))
            start = int(rng.integers(length - size + 1))
        return slice(start, start + size)

    def _batch(self, epoch: int, rows: range) -> Batch:
        parts = [self._parts(epoch, row) for row in rows]
        seed = dropout_seed(self._settings.seed, (epoch << 32) + rows.start)
        batch = collate([self._row(part) for part in parts], self._shape, seed)
        joined = [pair for part in parts for pair in part]
        size = len(batch.sequence.cu_seqlens) - 1 - batch.sequence.num_filler
        examples_g = np.full(size, NO_EXAMPLE)
        examples_g[:len(joined)] = [number for number, _ in joined]
        targets = TaskTargets(batch.targets, torch.from_numpy(self._labels(joined, size)), torch.from_numpy(examples_g))
        return replace(batch, targets=targets, num_targets=sum(self._num_labels(*part) for part in joined))

    def _row(self, parts: Sequence[tuple[int, slice]]) -> Row:
        """The tokens of a row and, for the kind residues with labels, its targets."""
        tokens_t = between_ends([self.examples[number].ids[window] for number, window in parts],
                                (self._vocab.cls_id, self._vocab.sep_id)[:self._settings.num_ends])
        lengths = np.array([window.stop - window.start for _, window in parts]) + self._settings.num_ends
        nothing = np.empty(0, dtype=np.int64)
        if self._space.kind != RESIDUES or any(self.examples[number].label is None for number, _ in parts):
            return Row(tokens_t, lengths, nothing, nothing)
        labels_t = np.full(len(tokens_t), NO_TARGET)
        for start, (number, window) in zip(np.cumsum(lengths) - lengths, parts, strict=True):
            labels_t[start + 1:start + 1 + window.stop - window.start] = self.examples[number].label[window]
        positions_m = np.flatnonzero(labels_t != NO_TARGET)
        return Row(tokens_t, lengths, positions_m, labels_t[positions_m])

    def _labels(self, parts: Sequence[tuple[int, slice]], num_proteins: int) -> np.ndarray:
        """`TaskTargets.labels` for these proteins, in order; placeholders if any of them has no label."""
        kind, found = self._space.kind, [self.examples[number].label for number, _ in parts]
        is_labelled = all(label is not None for label in found)
        if kind in (NUMBERS, CONTACTS) and is_labelled:
            return self._of_tokens(parts)
        empty = {NUMBER: np.zeros(num_proteins, np.float32), CLASS: np.full(num_proteins, NO_TARGET),
                 CLASSES: np.zeros((num_proteins, len(self._space.class_names)), np.float32),
                 RESIDUES: np.empty(0, np.float32), NUMBERS: np.empty(0, np.float32),
                 CONTACTS: np.empty(0, np.int32)}[kind]
        if kind in (NUMBER, CLASS, CLASSES) and found and is_labelled:
            empty[:len(found)] = found
        return empty

    def _of_tokens(self, parts: Sequence[tuple[int, slice]]) -> np.ndarray:
        """The labels of this rank's share of the tokens, [t] for numbers or [t, 1 + k] for contacts."""
        num_tokens, start = self._shape.num_tokens, 0
        labels_tx = (np.full((num_tokens, 1), np.nan, np.float32) if self._space.kind == NUMBERS else
                     np.zeros((num_tokens, self._width), np.int32))
        for number, window in parts:
            label_rx = self.examples[number].label[window].reshape(window.stop - window.start, -1)
            labels_tx[start + 1:start + 1 + len(label_rx), :label_rx.shape[1]] = label_rx
            start += len(label_rx) + self._settings.num_ends
        here = num_tokens // self._shape.num_shares
        labels_tx = labels_tx[self._shape.share * here:(self._shape.share + 1) * here]
        return labels_tx[:, 0] if self._space.kind == NUMBERS else labels_tx

