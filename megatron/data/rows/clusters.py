"""Clusters of similar proteins: each epoch trains on one member of each, as ESM did with UniRef50 and UniRef90.

A cluster file has two columns separated by a tab, representative and member, as MMseqs2 writes it (`…_cluster.tsv`). A
member is a name in PREFIX.names (one a line in document order, as `preprocess_data.py --names` writes it) or, without
that file, the number of a document from 0. `sp|P12345|ALBU_HUMAN` equals P12345, to which MMseqs2 shortens it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from megatron.data.corpus.joined import Corpus
from megatron.data.rows.cache_files import keeping
from megatron.data.rows.packing import order_hashes
from megatron.errors import DataError
from megatron.files import locked

CHUNK_LINES = 1 << 20
_READING_S = 3e-7  # seconds a byte, a generous estimate
# The index of the field, of those separated by `|`, that MMseqs2 uses as the name (its Util::parseFastaHeader), by the
# first field.
_FIELD_OF_NAME = {b"cl": 1, b"sp": 1, b"tr": 1, b"gb": 1, b"ref": 1, b"pdb": 1, b"bbs": 1, b"lcl": 1, b"pir": 1,
                  b"prf": 1, b"gnl": 2, b"pat": 2, b"gi": 3}


class ClusteredDocuments(NamedTuple):
    """The cluster of each document, and how well the cluster file matches the data."""

    cluster_of_document: np.ndarray  # int64 [documents]; a cluster has the number of its first document
    match: str  # a text for the log


class Clusters:
    """Clusters of documents; a document in no cluster is a cluster by itself."""

    def __init__(self, cluster_of_document: np.ndarray, match: str = "") -> None:
        """`cluster_of_document`: [documents], any distinct integer for each cluster. `match`: a text for the log."""
        self.match = match
        self.identity = hashlib.blake2b(np.ascontiguousarray(cluster_of_document).data, digest_size=12).hexdigest()
        self._members = np.argsort(cluster_of_document, kind="stable")
        by_cluster = cluster_of_document[self._members]
        self._starts = np.flatnonzero(np.concatenate([[True], by_cluster[1:] != by_cluster[:-1]]))
        self._sizes = np.diff(self._starts, append=len(by_cluster))

    def __len__(self) -> int:
        return len(self._starts)

    def draw(self, key: int) -> np.ndarray:
        """One document of each cluster, int64 [clusters], chosen at random with the key of a hash."""
        return self._members[self._starts + (order_hashes(key, len(self)) % self._sizes.astype(np.uint64)).astype(int)]


def cluster_documents(cluster_file: str, indexed: Corpus, cache_folder: Path) -> ClusteredDocuments:
    """The clusters of a corpus's documents; raises DataError.

    The result is cached in `cache_folder`, since reading takes some 2 µs a line.
    """
    names = [path for part in indexed.parts if (path := Path(f"{part.prefix}.names")).is_file()]
    sources = [Path(cluster_file), *names]
    if not sources[0].is_file():
        raise DataError(f"{cluster_file}: no such file; --cluster-file names clusters, one representative and member "
                        "a line")
    state = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in sources]
    digest = hashlib.blake2b(json.dumps([indexed.identity, state]).encode(), digest_size=12).hexdigest()
    kept = cache_folder / f"{Path(indexed.prefix).name}-clusters-{digest}.npz"
    with locked(kept.with_suffix(".lock"), _READING_S * sum(path.stat().st_size for path in sources)):
        clusters = _load(kept, indexed.num_documents)
        if clusters is None:
            try:
                clusters = _read_clusters(sources[0], _name_hashes(indexed, names),
                                          names[0] if names else Path(f"{indexed.prefix}.names"))
            except OSError as error:
                raise DataError(f"{error.filename}: cannot be read ({error.strerror}); is it yours to read?") from error
            with keeping(kept) as file:
                np.savez(file, clusters=clusters.cluster_of_document, match=clusters.match)
    return clusters


def _load(kept: Path, num_documents: int) -> ClusteredDocuments | None:
    """The clusters in a cache file; None if there is none that fits."""
    try:
        with np.load(kept) as arrays:
            clusters = ClusteredDocuments(arrays["clusters"], str(arrays["match"]))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # missing, another user's, or damaged
        return None
    return clusters if len(clusters.cluster_of_document) == num_documents else None


def _name_hashes(indexed: Corpus, names: Sequence[Path]) -> np.ndarray:
    """The hash of each document's name, or of its number if there are no `names`; raises DataError."""
    if not names:
        return _hashes(b"%d" % document for document in range(indexed.num_documents))
    hashes = []
    for part in indexed.parts:
        path = Path(f"{part.prefix}.names")
        with open(path, "rb") as file:
            hashes.append(_hashes(line.rstrip(b"\r\n") for line in file))
        if len(hashes[-1]) != part.num_documents:
            raise DataError(f"{path}: {len(hashes[-1])} names for {part.num_documents} documents; it has one a line, "
                            "in order")
    return np.concatenate(hashes)


def _read_clusters(cluster_file: Path, name_hashes: np.ndarray, names: Path) -> ClusteredDocuments:
    """The clusters in a cluster file; `names`: the file of names, for messages. Raises DataError."""
    known_names, name_of_document = np.unique(name_hashes, return_inverse=True)
    representatives = known_names.copy()  # each represents itself, until the file says otherwise
    is_member = np.zeros(len(known_names), dtype=bool)
    num_found = num_lines = 0
    for first_line, lines in _chunks(cluster_file):
        columns = [line.rstrip(b"\r\n").split(b"\t") for line in lines]
        wrong = next((i for i, parts in enumerate(columns) if len(parts) != 2), None)
        if wrong is not None:
            raise DataError(f"{cluster_file}: line {first_line + wrong} has {len(columns[wrong])} columns by tab where "
                            "a representative and a member are expected")
        members = _hashes(parts[1] for parts in columns)
        place = np.minimum(np.searchsorted(known_names, members), len(known_names) - 1)
        is_known = known_names[place] == members
        place = place[is_known]
        representatives[place] = _hashes(parts[0] for parts in columns)[is_known]
        is_member[place] = True
        num_found += len(place)
        num_lines += len(lines)
    if num_found == 0:
        remedy = ("is it of the same proteins?" if names.is_file() else
                  f"there is no {names}, which tools/preprocess_data.py --names writes, so they must be numbers of "
                  "documents from 0")
        raise DataError(f"{cluster_file}: none of its {num_lines} members is a document; {remedy}")
    num_alone = int(np.count_nonzero(~is_member[name_of_document]))
    _, first_document, cluster = np.unique(representatives[name_of_document], return_index=True, return_inverse=True)
    return ClusteredDocuments(first_document[cluster], f"{cluster_file.name}: {num_lines:,} members, "
                              f"{num_lines - num_found:,} of them not in the data; proteins of the data in none of its "
                              f"clusters: {num_alone:,}, each one by itself")


def _chunks(path: Path) -> Iterator[tuple[int, list[bytes]]]:
    """A file's lines in chunks, each with the number of its first line, counted from 1."""
    with open(path, "rb") as file:
        first_line = 1
        while lines := list(islice(file, CHUNK_LINES)):
            yield first_line, lines
            first_line += len(lines)


def _hashes(names: Iterable[bytes]) -> np.ndarray:
    """Python's 64-bit hash of each name; it differs between processes, but matching happens in one."""
    return np.fromiter((hash(_short(name) if b"|" in name else name) for name in names), np.int64)


def _short(name: bytes) -> bytes:
    """The short name that MMseqs2 writes for a name with `|`."""
    fields = [field for field in name.split(b"|") if field]
    place = _FIELD_OF_NAME.get(fields[0], len(fields)) if fields else 0
    return fields[place] if place < len(fields) else name
