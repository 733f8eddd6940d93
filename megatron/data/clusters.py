"""Clusters of similar proteins, of which each epoch trains on one member, as ESM trained on UniRef50 and UniRef90.

A cluster file has two columns by tab, representative and member, as MMseqs2 writes it (`…_cluster.tsv`). A member is a
name of PREFIX.names (one a line, in the order of the documents) or, without that file, the number of a document from 0.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from megatron.data.cache_files import locked, replacing
from megatron.data.indexed import DataError, IndexedDataset
from megatron.data.packing import order_hashes

CHUNK_LINES = 1 << 20


class Clusters:
    """Clusters of documents; a document of no cluster is one by itself."""

    def __init__(self, cluster_of_document: np.ndarray) -> None:
        """`cluster_of_document`: any whole number a cluster, [documents]."""
        self.identity = hashlib.blake2b(np.ascontiguousarray(cluster_of_document).data, digest_size=12).hexdigest()
        self._members = np.argsort(cluster_of_document, kind="stable")
        by_cluster = cluster_of_document[self._members]
        self._starts = np.flatnonzero(np.concatenate([[True], by_cluster[1:] != by_cluster[:-1]]))
        self._sizes = np.diff(self._starts, append=len(by_cluster))

    def __len__(self) -> int:
        return len(self._starts)

    def draw(self, key: int) -> np.ndarray:
        """One document of each cluster, int64 [clusters], drawn by `key`."""
        return self._members[self._starts + (order_hashes(key, len(self)) % self._sizes.astype(np.uint64)).astype(int)]


def cluster_documents(cluster_file: str, indexed: IndexedDataset, cache_folder: Path) -> np.ndarray:
    """The cluster of each document of a dataset, int64 [documents], by its first document; raises DataError.

    Read once and then kept in `cache_folder`, as reading takes some 2 µs a line.
    """
    names = Path(f"{indexed.prefix}.names")
    sources = [Path(cluster_file), *([names] if names.is_file() else [])]
    if not sources[0].is_file():
        raise DataError(f"{cluster_file}: no such file; --cluster-file names clusters, one representative and member "
                        "a line")
    state = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in sources]
    digest = hashlib.blake2b(json.dumps([indexed.identity, state]).encode(), digest_size=12).hexdigest()
    kept = cache_folder / f"{Path(indexed.prefix).name}-clusters-{digest}.npy"
    with locked(kept.with_suffix(".lock")):
        if not kept.is_file():
            clusters = _read_clusters(sources[0], _name_hashes(names, indexed.num_documents))
            with replacing(kept) as path, open(path, "xb") as file:
                np.save(file, clusters)
    return np.load(kept)


def _name_hashes(names: Path, num_documents: int) -> np.ndarray:
    if not names.is_file():
        return _hashes(b"%d" % document for document in range(num_documents))
    with open(names, "rb") as file:
        hashes = _hashes(line.rstrip(b"\r\n") for line in file)
    if len(hashes) != num_documents:
        raise DataError(f"{names}: {len(hashes)} names for {num_documents} documents; it has one a line, in order")
    return hashes


def _read_clusters(cluster_file: Path, name_hashes: np.ndarray) -> np.ndarray:
    """The cluster of each document: the number of its first document."""
    by_hash = np.argsort(name_hashes, kind="stable")
    sorted_hashes = name_hashes[by_hash]
    representatives = name_hashes.copy()  # of its own, until the file says otherwise
    num_found = num_lines = 0
    for first_line, lines in _chunks(cluster_file):
        columns = [line.rstrip(b"\r\n").split(b"\t") for line in lines]
        wrong = next((i for i, parts in enumerate(columns) if len(parts) != 2), None)
        if wrong is not None:
            raise DataError(f"{cluster_file}: line {first_line + wrong} has {len(columns[wrong])} columns by tab where "
                            "a representative and a member are expected")
        members = _hashes(parts[1] for parts in columns)
        place = np.minimum(np.searchsorted(sorted_hashes, members), len(sorted_hashes) - 1)
        known = sorted_hashes[place] == members
        representatives[by_hash[place[known]]] = _hashes(parts[0] for parts in columns)[known]
        num_found += np.count_nonzero(known)
        num_lines += len(lines)
    if num_found == 0:
        raise DataError(f"{cluster_file}: none of its {num_lines} members is a document; its second column holds names "
                        "of PREFIX.names, or numbers of documents from 0 where there is no such file")
    _, first_document, cluster = np.unique(representatives, return_index=True, return_inverse=True)
    return first_document[cluster]


def _chunks(path: Path) -> Iterator[tuple[int, list[bytes]]]:
    """Runs of a file's lines, each with the number of its first line, from 1."""
    with open(path, "rb") as file:
        first_line = 1
        while lines := list(islice(file, CHUNK_LINES)):
            yield first_line, lines
            first_line += len(lines)


def _hashes(names: Iterable[bytes]) -> np.ndarray:
    """Python's 64-bit hash of each name: equal within a process, which is all that matching needs."""
    return np.fromiter((hash(name) for name in names), np.int64)
