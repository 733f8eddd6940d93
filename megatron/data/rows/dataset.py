"""Builds the training, validation and test datasets of a run from its flags."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron.config import DataConfig
from megatron.data.corpus.documents import Documents
from megatron.data.corpus.joined import Corpus, open_corpus
from megatron.data.corpus.origin import corpus_vocabulary, id_table
from megatron.data.corpus.split import split_documents
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.blend import BlendedDataset
from megatron.data.rows.cache_files import choose_cache_folder
from megatron.data.rows.clusters import Clusters, cluster_documents
from megatron.data.rows.data_path import CorpusFiles, names_in_short, parse_data_path
from megatron.data.rows.masking import Masking
from megatron.data.rows.packed import PackedDataset, PackingSettings
from megatron.errors import ConfigError, DataError

Dataset = PackedDataset | BlendedDataset
EVALUATION_SEED = 1234  # fixed, so that evaluation sees the same rows whatever the training seed
IN_MEMORY_DOCUMENTS = 1 << 14  # up to here packing an epoch (1 ms) takes less time than writing a file (10 ms)


@dataclass(frozen=True)
class Splits:
    """The datasets for training, validation and test; None if a split is empty."""

    train: Dataset
    valid: Dataset | None
    test: Dataset | None


def corpora_of(dataset: Dataset) -> dict[str, PackedDataset]:
    """The corpora of a dataset, by their short names (`names_in_short`)."""
    parts = dataset.datasets if isinstance(dataset, BlendedDataset) else (dataset,)
    prefixes = {part.documents.indexed.prefix: part for part in parts}
    return {name: prefixes[prefix] for prefix, name in names_in_short(list(prefixes)).items()}


def measured_on(dataset: Dataset, num_rows: int) -> str:
    """A short digest of the data that an evaluation of the first `num_rows` rows measures.

    Only evaluations with the same digest are comparable. It covers the contents of each corpus and the range of its
    documents (their masks are fixed), and how they are packed if these rows are not the whole split.
    """
    parts = dataset.datasets if isinstance(dataset, BlendedDataset) else (dataset,)
    key: list = [(part.documents.indexed.contents, part.documents.range.start, part.documents.range.stop)
                 for part in parts]
    if num_rows < dataset.num_epoch_rows(0):
        key += [num_rows, parts[0].settings.packing, dataset.seq_length, dataset.num_ends]
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()


def build_datasets(data: DataConfig, vocab: Vocab, seed: int) -> Splits:
    """The datasets of `--data-path` and `--split`; raises ConfigError or DataError.

    `seed`: from it training draws order, crops and masks. Validation and test repeat one epoch, in which long proteins
    are split into pieces, with masks that depend only on a protein's letters.
    """
    if data.seq_length is None:
        raise ConfigError("--seq-length is missing; give the positions of a row, such as 2176")
    weights, named = parse_data_path(data.data_path)
    if (data.blend_by == "cluster") != (data.cluster_file is not None):
        raise ConfigError(f"--blend-by {data.blend_by} with --cluster-file {data.cluster_file}; --blend-by cluster and "
                          "--cluster-file FILE go together")
    if data.cluster_file is not None and len(named) > 1:
        raise ConfigError(f"--blend-by cluster with {len(named)} data paths; give the one of the clusters")
    corpora = [_build_corpus(corpus, data, vocab, seed) for corpus in named]
    parts: list[Dataset | None] = []
    for part in range(3):
        present = [(dataset, weight) for corpus, weight in zip(corpora, weights, strict=True)
                   if (dataset := corpus[part]) is not None]
        parts.append(_blend(present, is_training=part == 0))
    train, valid, test = parts
    assert train is not None  # `_build_corpus` raises otherwise
    return Splits(train, valid, test)


def _blend(present: Sequence[tuple[PackedDataset, Fraction]], is_training: bool) -> Dataset | None:
    """One dataset of several corpora with weights; None for none.

    For evaluation the weights are the numbers of rows, so that a pass has each row once.
    """
    if len(present) < 2:
        return present[0][0] if present else None
    datasets = [dataset for dataset, _ in present]
    if is_training:
        return BlendedDataset(datasets, [weight for _, weight in present])
    return BlendedDataset(datasets, [dataset.num_epoch_rows(0) for dataset in datasets])


def _build_corpus(named: CorpusFiles, data: DataConfig, vocab: Vocab, seed: int) -> list[PackedDataset | None]:
    """A corpus's datasets for training, validation and test, None for one without rows; raises DataError."""
    indexed = open_corpus(named.name, named.prefixes, data.data_impl)
    prefix, corpus_vocab = indexed.prefix, _vocabulary_of(indexed)
    for part in indexed.parts:
        if data.protein_ends == "both" and len(part.tokens) and part.tokens[-1] == corpus_vocab.sep_id:
            raise DataError(f"{part.prefix}: its proteins end with [SEP] already, and --protein-ends both puts one "
                            "behind each; preprocess it again without --append-eod, or give --protein-ends start")
        if data.mmap_warmup:
            _read_through(f"{part.prefix}.bin")
    parts: list[PackedDataset | None] = []
    for name, documents in zip(("train", "valid", "test"), split_documents(data.split, indexed.num_documents),
                               strict=True):
        training = name == "train"
        settings = PackingSettings(data.seq_length, data.packing, data.long_proteins if training else "split",
                                   seed if training else EVALUATION_SEED, data.num_ends)
        clusters = folder = None
        if len(documents) > IN_MEMORY_DOCUMENTS:
            folder = choose_cache_folder(prefix, data.data_cache_path)
        if training and data.cluster_file is not None:
            of_document, match = cluster_documents(data.cluster_file, indexed,
                                                   choose_cache_folder(prefix, data.data_cache_path))
            clusters = Clusters(of_document[documents.start:documents.stop], match)
        dataset = PackedDataset(Documents(indexed, documents), settings, vocab,
                                Masking.from_config(data) if training else None, folder, name,
                                clusters=clusters, id_table=id_table(corpus_vocab, vocab))
        parts.append(dataset if dataset.num_epoch_rows(0) else None)
    if parts[0] is None:
        raise DataError(f"{prefix}: its training documents hold no protein for a row of {data.seq_length} positions "
                        f"with --long-proteins {data.long_proteins}; preprocess the data again, or lengthen the rows")
    return parts


def _vocabulary_of(corpus: Corpus) -> Vocab:
    """The vocabulary of a corpus; raises DataError if its parts have different ones."""
    first, *others = (corpus_vocabulary(part) for part in corpus.parts)
    for part, vocab in zip(corpus.parts[1:], others, strict=True):
        if vocab.tokens != first.tokens:
            raise DataError(f"{corpus.parts[0].prefix} and {part.prefix} are of different vocabularies, which one "
                            "corpus cannot be; preprocess one again, or give weights: WEIGHT PREFIX WEIGHT PREFIX …")
    return first


def _read_through(path: str) -> None:
    """Read a file once, so that it is in the page cache."""
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass
