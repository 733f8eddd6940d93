"""One corpus as an infinite sequence of packed, masked rows.

Row contents, order and masks depend on the seed, the epoch and the row's number in it alone: not on workers, ranks,
micro-batches or restarts. t tokens of the row, m chosen ones.
"""

import hashlib
import json
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron.data.corpus.documents import Documents, Pieces, chunks
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.clusters import Clusters
from megatron.data.rows.fixed_masks import FixedMasks, most_fixed_targets
from megatron.data.rows.masking import Masker, Masking
from megatron.data.rows.packing import IS_NATIVE, PackedRows, order_key, pack
from megatron.data.rows.row_cache import RowCache
from megatron.errors import DataError
from megatron.log import number_of

CACHE_VERSION = 1  # raise it when the same settings would give other rows
COUNTED_RESIDUES = 50_000_000
ORDER, ROW, DRAW = 0, 1, 2  # purposes of randomness: an epoch's order; a row's crops and masks; an epoch's members


@dataclass(frozen=True)
class Row:
    """One row of proteins, masked; the arrays are int64."""

    tokens_t: np.ndarray  # masked input, each protein between its ends
    lengths: np.ndarray  # tokens of each protein
    target_positions_m: np.ndarray  # chosen tokens, ascending
    target_ids_m: np.ndarray  # what stood there


@dataclass(frozen=True)
class PackingSettings:
    """All that the rows of a corpus's epochs depend on, besides the corpus."""

    seq_length: int
    packing: str
    long_proteins: str
    seed: int
    num_ends: int  # tokens around each protein: [CLS] before it, or with 2 also [SEP] behind it

    @property
    def max_residues(self) -> int:
        """The most residues of one protein in a row, and of a row."""
        return self.seq_length - self.num_ends


class PackedDataset:
    """The rows of some documents, epoch after epoch; of `clusters`, where given, each epoch has one member.

    Without `masking` the rows are an evaluation's: epoch 0 again and again, with fixed masks. Without `cache_folder` a
    process packs for itself. `id_table` has the id in `vocab` of each id of the documents (None: the same).
    """

    def __init__(self, documents: Documents, settings: PackingSettings, vocab: Vocab,
                 masking: Masking | None, cache_folder: Path | None, name: str, *, clusters: Clusters | None = None,
                 id_table: np.ndarray | None = None) -> None:
        self.documents, self.settings, self.name = documents, settings, name
        self.vocab, self.clusters, self._id_table = vocab, clusters, id_table
        self._masker = FixedMasks(vocab) if masking is None else Masker(masking, vocab)
        self._repeats_one_epoch = masking is None
        self._ends = (vocab.cls_id, vocab.sep_id)[:settings.num_ends]
        self._cache = None if cache_folder is None else RowCache(cache_folder, self._stem(), len(documents))
        # Of epochs 0, 1, …
        self._first_samples = [0] if self._cache is None else self._cache.known_first_samples()
        self._rows: dict[int, PackedRows] = {}  # the epochs in use, two at most
        self._builds_ahead = False

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "pieces"} | {"_rows": {}}

    def __getitem__(self, sample: int) -> Row:
        return self.row(sample, sample)

    def row(self, sample: int, run_sample: int) -> Row:
        """The row of a sample of this corpus, which is number `run_sample` of the run."""
        epoch, row = self.locate(sample)
        pieces = self.rows(epoch).row(row)
        if isinstance(self._masker, FixedMasks):
            return self._row_of_evaluation(pieces, self._masker)
        rng = np.random.default_rng((self.settings.seed, ROW, epoch, row))
        parts = [self._read_ids(*place) for place in self._places(pieces, rng)]
        tokens_t, lengths = between_ends(parts, self._ends), np.array([len(part) for part in parts]) + self.num_ends
        masked_t, positions_m, ids_m = self._masker.mask(tokens_t, lengths, rng, run_sample)
        return Row(masked_t, lengths, positions_m, ids_m)

    @property
    def seq_length(self) -> int:
        """The positions of a row."""
        return self.settings.seq_length

    @property
    def num_ends(self) -> int:
        """The tokens around each protein."""
        return self.settings.num_ends

    @cached_property
    def pieces(self) -> Pieces:
        """The pieces that the rows are made of."""
        return Pieces(self.documents, self.settings.max_residues, self.settings.long_proteins)

    def locate(self, sample: int) -> tuple[int, int]:
        """The epoch of a sample, and its row there."""
        if self._repeats_one_epoch:
            return 0, sample % self.num_epoch_rows(0)
        if sample >= self._first_samples[-1]:
            self._count_epochs(sample)
        epoch = bisect_right(self._first_samples, sample) - 1
        return epoch, sample - self._first_samples[epoch]

    def num_epoch_rows(self, epoch: int) -> int:
        """How many rows an epoch has; epochs differ by a few, as each is packed in an order of its own."""
        if epoch + 1 < len(self._first_samples):
            return self._first_samples[epoch + 1] - self._first_samples[epoch]
        return len(self.rows(epoch))

    def rows(self, epoch: int) -> PackedRows:
        """The rows of an epoch as piece numbers, mapped from the cache where there is one, built if they are not there.
        """
        if epoch not in self._rows:
            while len(self._rows) > 1:
                del self._rows[next(iter(self._rows))]
            self._rows[epoch] = self._pack(epoch) if self._cache is None else self._cache.rows(epoch, self._pack)
            if self._builds_ahead:
                self._start_building(epoch + 1)
        return self._rows[epoch]

    def build_ahead(self) -> None:
        """From now on, builds in a thread the rows of the epoch after the one in use."""
        self._builds_ahead = not self._repeats_one_epoch and self._cache is not None
        if self._builds_ahead and self._rows:
            self._start_building(max(self._rows) + 1)

    def residue_counts(self, limit: int = COUNTED_RESIDUES) -> np.ndarray:
        """How often each id occurs, int64 [vocabulary]; past `limit` residues, in an even sample of documents."""
        step = max(1, round(int(self.documents.lengths.sum(dtype=np.int64)) / limit))
        counts = np.zeros(self.vocab.size, dtype=np.int64)
        chosen = range(0, len(self.documents), step)
        for start in range(0, len(chosen), 4096):
            ids = [self._read_ids(document, 0, int(self.documents.lengths[document]))
                   for document in chosen[start:start + 4096]]
            counts += np.bincount(np.concatenate(ids), minlength=self.vocab.size)
        return counts

    def describe(self) -> str:
        """What the split holds and how it is packed, in one line for the log."""
        pieces, num_rows = self.pieces, self.num_epoch_rows(0)
        clusters = "" if self.clusters is None else f" in {len(self.clusters):,} clusters ({self.clusters.match})"
        fate = {"crop": "cropped", "split": "split", "drop": "dropped"}[self.settings.long_proteins]
        fill = self._num_tokens(0) / max(1, num_rows * self.settings.seq_length)
        notes = "" if self._id_table is None else ("; ids mapped by letter from the vocabulary of its .stats.json, or "
                                                   "iupac without one")
        notes += "" if IS_NATIVE else "; packed in Python, as the C++ helper is missing: pip install -e ."
        num_files = len(self.documents.indexed.parts)
        files = f" of {num_files} files" if num_files > 1 else ""
        return (f"{self.name}: {number_of(len(self.documents), 'protein')}{files}{clusters} ({pieces.num_long:,} "
                f"longer than a row, {fate}; {pieces.num_empty:,} empty, left out), {number_of(num_rows, 'row')} an "
                f"epoch, {100 * fill:.2f} % full{notes}")

    def most_proteins(self, num_rows: int, sample: int = 0) -> int:
        """The most proteins in so many neighbouring rows of the epoch of a sample."""
        ends = self.rows(self.locate(sample)[0]).row_starts
        if len(ends) <= num_rows:
            return int(ends[-1])
        return max(int((part - ends[start:start + len(part)]).max()) for start, part in chunks(ends[num_rows:]))

    def most_targets(self, num_rows: int) -> int:
        """The most targets that so many rows have; those of an evaluation are seldom more."""
        if isinstance(self._masker, FixedMasks):
            return most_fixed_targets(num_rows * self.settings.max_residues)
        return num_rows * self._masker.most_chosen(self.settings.max_residues)

    def longest(self) -> int:
        """The tokens of the longest protein in a row."""
        return int(min(self.pieces.lengths.max(initial=1) + self.num_ends, self.seq_length))

    def _count_epochs(self, sample: int) -> None:
        """Extends the first samples of epochs until they pass `sample`."""
        if self._cache is not None:
            self._cache.count(self._first_samples, sample, self._pack)
        while self._first_samples[-1] <= sample:
            self._first_samples.append(self._first_samples[-1] + self.num_epoch_rows(len(self._first_samples) - 1))

    def _start_building(self, epoch: int) -> None:
        assert self._cache is not None
        threading.Thread(target=self._cache.rows, args=(epoch, self._pack), daemon=True).start()

    def _pack(self, epoch: int) -> PackedRows:
        settings, pieces = self.settings, self._pieces_of(epoch)
        rows = pack(self.pieces.lengths[pieces], settings.seq_length, settings.packing,
                    key=order_key(settings.seed, ORDER, epoch), drop_long=settings.long_proteins == "drop",
                    num_ends=settings.num_ends)
        return rows if isinstance(pieces, slice) else PackedRows(pieces[rows.pieces], rows.row_starts)

    def _pieces_of(self, epoch: int) -> slice | np.ndarray:
        """The pieces that an epoch draws: all, or those of one protein of each cluster."""
        if self.clusters is None:
            return slice(None)
        return self.pieces.of_documents(self.clusters.draw(order_key(self.settings.seed, DRAW, epoch)))

    def _num_tokens(self, epoch: int) -> int:
        """The tokens of all rows of an epoch, their proteins' ends included."""
        pieces, all_lengths, max_residues = self._pieces_of(epoch), self.pieces.lengths, self.pieces.max_residues
        parts = ((part for _, part in chunks(all_lengths)) if isinstance(pieces, slice) else
                 (all_lengths[part] for _, part in chunks(pieces)))
        num_tokens = 0
        for lengths in parts:
            lengths = lengths[(lengths > 0) & ((lengths <= max_residues) | (self.settings.long_proteins != "drop"))]
            num_tokens += int(np.minimum(lengths, max_residues).sum(dtype=np.int64)) + self.num_ends * len(lengths)
        return num_tokens

    def _row_of_evaluation(self, pieces: np.ndarray, masks: FixedMasks) -> Row:
        """A row whose pieces are masked as parts of their whole proteins."""
        original, masked, is_target = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
        for document, offset, length in self._places(pieces, np.random.default_rng(0)):
            ids = self._read_ids(document, 0, int(self.documents.lengths[document]))
            for parts, whole in zip((original, masked, is_target), (ids, *masks.mask(ids)), strict=True):
                parts.append(whole[offset:offset + length])
        positions_m = np.flatnonzero(between_ends(is_target, (0,) * self.num_ends))
        lengths = np.array([len(part) for part in original]) + self.num_ends
        return Row(between_ends(masked, self._ends), lengths, positions_m,
                   between_ends(original, self._ends)[positions_m])

    def _places(self, pieces: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[int, int, int]]:
        """The document of each piece, where the piece starts in it, and its residues."""
        max_residues = self.pieces.max_residues
        for piece, length in zip(pieces.tolist(), self.pieces.lengths[pieces].tolist(), strict=True):
            document, offset = self.pieces.locate(piece)
            if length > max_residues:  # a crop
                offset, length = int(rng.integers(length - max_residues + 1)), max_residues
            yield document, offset, length

    def _read_ids(self, document: int, offset: int, length: int) -> np.ndarray:
        """The ids in `vocab` of a part of a document."""
        ids = self.documents.read(document, offset, length)
        num_ids = self.vocab.size if self._id_table is None else len(self._id_table)
        if length and not 0 <= ids.min() <= ids.max() < num_ids:
            prefix, number = self.documents.place(document)
            raise DataError(f"{prefix}.bin: document {number} holds ids {ids.min()} to {ids.max()}, but the vocabulary "
                            f"of its preprocessing has {num_ids}: it is damaged, or lacks the .stats.json that names "
                            "another; preprocess it again")
        return ids if self._id_table is None else self._id_table[ids]

    def _stem(self) -> str:
        settings = self.settings
        key = json.dumps([CACHE_VERSION, self.documents.indexed.identity, self.documents.range.start,
                          self.documents.range.stop, settings.seq_length, settings.packing, settings.long_proteins,
                          settings.seed, self.clusters.identity if self.clusters else None,
                          *([] if settings.num_ends == 1 else [settings.num_ends])])
        digest = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
        prefix = Path(self.documents.indexed.prefix).name
        return f"{prefix}-{self.name}-{settings.seq_length}-{settings.packing}-{digest}"


def between_ends(proteins: Sequence[np.ndarray], ends: Sequence[int]) -> np.ndarray:
    """Proteins one behind the other, int64, each between its `ends`: a token before it and, of two, one behind it."""
    before, *behind = np.array(ends)[:, None]
    return np.concatenate([array for protein in proteins for array in (before, protein, *behind)], dtype=np.int64)
