"""Merges indexed datasets into one with the same bytes as if all inputs had been preprocessed at once, in order."""

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.corpus.indexed import open_indexed
from megatron.data.corpus.indexed_writer import IndexedWriter
from megatron.data.corpus.origin import corpus_vocabulary, forget, put_statistics, statistics_of
from megatron.data.corpus.vocab import Vocab
from megatron.data.preprocess.flags import has_name
from megatron.data.preprocess.progress import reading_progress
from megatron.data.preprocess.run import VERSION, facts_of_files
from megatron.data.preprocess.tally import DocumentTally, describe
from megatron.errors import ConfigError, DataError
from megatron.files import making_room, sha256
from megatron.log import number_of

_CHUNK_ITEMS = 1 << 22
_LOG_INTERVAL = 1_000_000  # documents between two progress lines, where there is no terminal
# The options of preprocessing that must be the same for all datasets: what was kept, and how it was written.
_SHARED_OPTIONS = ("dataset_impl", "split_sentences", "append_eod", "min_length", "max_length", "max_unknown_fraction",
                   "dedup")


@dataclass(frozen=True)
class _Part:
    """What is known of an input dataset before it is copied."""

    prefix: str
    format: tuple[str, str]  # layout of the .idx, dtype of the .bin
    num_documents: int
    has_names: bool
    vocab: Vocab
    said: dict[str, Any] | None  # its statistics, if there are any
    tally: DocumentTally | None  # the counts in them, if there are any
    key: str  # of the texts, by its statistics
    merged: tuple[tuple[Path, int], ...] = ()  # if it is a merge itself: each input's .bin and number of documents

    @property
    def options(self) -> dict[str, Any]:
        """The options of its preprocessing; {} if unknown."""
        return self.said["options"] if self.said and self.tally else {}

    @property
    def dedup(self) -> tuple[str | None, int]:
        """The value of --dedup, and in how many datasets separately duplicates were left out (1 unless merged)."""
        how, _, where = (self.options.get("dedup") or "").partition(", in each of ")
        return how or None, int(where.split()[0]) if where else 1

    @property
    def paths(self) -> list[Path]:
        """Its files."""
        return [Path(f"{self.prefix}.{ending}") for ending in ("bin", "idx", *(["names"] if self.has_names else []))]


def merge(inputs: Sequence[str], output_prefix: str, overwrite: bool = False) -> None:
    """Write OUTPUT_PREFIX.bin, .idx, .stats.json and, if the inputs have them, .names; raises a UserError.

    `inputs`: prefixes, and folders, of which all datasets are taken in natural order of their names. Memory does not
    grow with the data; the output appears atomically.
    """
    if not has_name[0](output_prefix):
        raise ConfigError(f"--output-prefix is {output_prefix}; it must be {has_name[1]}")
    parts = [_part(prefix) for prefix in merged_prefixes(inputs, output_prefix)]
    _check_alike(parts)
    _check_apart(parts)
    _check_output(output_prefix, overwrite)
    _check_room(parts, Path(output_prefix))
    try:
        stats = _join(parts, output_prefix)
    except OSError as error:
        raise DataError(f"{error.filename or output_prefix}: cannot be read or written "
                        f"({error.strerror or error}); {making_room(error)}, or give another --output-prefix") from None
    num_proteins = sum(part.num_documents for part in parts)
    print(f"{number_of(len(parts), 'dataset')}, {number_of(num_proteins, 'protein')}: " + ", ".join(
        f"{output_prefix}.{path.suffix[1:]}" for path in parts[0].paths))
    if "options" in stats:
        for line in describe(stats["outputs"][parts[0].key]):
            print(f"  {line}")


def merged_prefixes(inputs: Sequence[str], output_prefix: str) -> list[str]:
    """The prefixes of the datasets to merge, in order; raises DataError if one occurs twice or is the output."""
    prefixes: list[str] = []
    for word in inputs:
        is_folder = Path(word).is_dir()
        prefixes += _prefixes_in(Path(word), Path(output_prefix)) if is_folder else [word.removesuffix(".bin")]
    seen: set[Path] = set()
    for prefix in prefixes:
        place = Path(prefix).resolve()
        if place in seen:
            raise DataError(f"--input names {prefix} twice; name each dataset once")
        if place == Path(output_prefix).resolve():
            raise DataError(f"--output-prefix {output_prefix} is among the inputs; give another, or name the inputs "
                            "one by one without it")
        seen.add(place)
    return prefixes


def natural_order(name: str) -> tuple[list[Any], str]:
    """A key to sort names by, with numbers in them compared by value, so that x_2 comes before x_10."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))], name


def _prefixes_in(folder: Path, output: Path) -> list[str]:
    """The prefixes of all pairs of .bin and .idx in a folder, in natural order; raises DataError if a half is missing.
    """
    names = {ending: {path.name.removesuffix(ending) for path in folder.glob(f"*{ending}")}
             for ending in (".bin", ".idx", ".partial")}
    for name in sorted(names[".partial"]):
        if (folder / name).resolve() != output.resolve():
            raise DataError(f"{folder / name}.partial: preprocessing that is at work or was killed; let it end, or "
                            "remove it to merge what else is there")
    for have, lack in ((".bin", ".idx"), (".idx", ".bin")):
        for name in sorted(names[have] - names[lack]):
            raise DataError(f"{folder / name}{lack}: no such file, and {name}{have} is there; copy or preprocess it "
                            "again, or remove its other half")
    if not names[".bin"]:
        raise DataError(f"{folder}: it holds no .bin and .idx; --input names folders of such pairs, or prefixes")
    return [str(folder / name) for name in sorted(names[".bin"], key=natural_order)]


def _part(prefix: str) -> _Part:
    """What is known of the dataset `prefix`; raises DataError if its files do not agree with its statistics."""
    indexed, found = open_indexed(prefix), statistics_of(prefix)
    vocab, has_names = corpus_vocabulary(indexed), Path(f"{prefix}.names").is_file()
    known = prefix, (indexed.layout, indexed.dtype.str), indexed.num_documents, has_names, vocab
    if found is None:
        return _Part(*known, None, None, "text")
    path, said = found
    key = next(key for key, output in said["outputs"].items() if f"{Path(prefix).name}.bin" in _names(output))
    try:  # a merge of datasets without statistics has no counts
        tally = DocumentTally.from_report(said["outputs"][key], vocab) if "options" in said else None
        merged = tuple((Path(one["path"]), int(one["documents"])) for one in said.get("merged", ()))
        part = _Part(*known, said, tally, key, merged)
        sizes = [(file, file.stat().st_size, recorded["bytes"]) for file, recorded in _recorded(part)]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: it is damaged ({error!r}); preprocess the data again") from None
    for file, size, expected in sizes:
        if size != expected:
            raise DataError(f"{file}: {size} bytes, where {path.name} says {expected}; copy or preprocess it again")
    return part


def _names(output: dict[str, Any]) -> list[str]:
    """The names of the files of an output in the statistics."""
    return [Path(file["path"]).name for file in output["files"]]


def _recorded(part: _Part) -> list[tuple[Path, dict[str, Any]]]:
    """The files of a dataset that its statistics describe, with their entries there."""
    output = part.said["outputs"][part.key] if part.said else {"files": []}
    files = dict(zip(_names(output), output["files"], strict=True))
    return [(path, files[path.name]) for path in part.paths if path.name in files]


def _check_alike(parts: Sequence[_Part]) -> None:
    """Raises DataError if the datasets differ in format, vocabulary, names or options."""
    first = parts[0]
    for part in parts[1:]:
        pair = f"{first.prefix} and {part.prefix} cannot be joined: "
        if part.format != first.format:
            raise DataError(f"{pair}{' of '.join(first.format)} and {' of '.join(part.format)} (layout of the .idx, "
                            "dtype); preprocess one of them again with the --dataset-impl of the other")
        if part.vocab.tokens != first.vocab.tokens:
            raise DataError(f"{pair}their vocabularies differ ({first.vocab.identity} and {part.vocab.identity}); "
                            "preprocess one of them again with the --vocab-file of the other, or give both to "
                            "--data-path, which maps ids")
        if part.has_names != first.has_names:
            with_names, without = (first, part) if first.has_names else (part, first)
            raise DataError(f"{pair}{with_names.prefix}.names is there and {without.prefix}.names is not; copy it too, "
                            "preprocess again with --names, or take the .names away from all")
        if first.tally and part.tally:  # of a dataset without statistics nothing can be compared
            _check_statistics(first, part, pair)


def _check_statistics(first: _Part, part: _Part, pair: str) -> None:
    """Raises DataError if two datasets have different keys or options; `pair`: how the message begins."""
    if part.key != first.key:
        raise DataError(f"{pair}one is of the key {first.key!r}, the other of {part.key!r}; name the datasets of one "
                        "key one by one")
    options, others = ({**one.options, "dedup": one.dedup[0]} for one in (first, part))
    for name in _SHARED_OPTIONS:
        if options.get(name) != others.get(name):
            flag = f"--{name.replace('_', '-')}"
            raise DataError(f"{pair}one was preprocessed with {flag} {options.get(name)}, the other with "
                            f"{others.get(name)}; preprocess one of them again as the other")


def _check_apart(parts: Sequence[_Part]) -> None:
    """Raises DataError if one of the datasets is a merge that contains another one."""
    places = {Path(f"{part.prefix}.bin").resolve(): part for part in parts}
    for part in parts:
        for path, num_documents in part.merged:
            for place in (path, Path(part.prefix).with_name(path.name)):  # the folder may have been moved
                other = places.get(place.resolve(), part)
                if other is not part and other.num_documents == num_documents:
                    raise DataError(f"{part.prefix} is a merge that holds {other.prefix}, whose proteins would count "
                                    "twice; move one of them away, or name the inputs one by one")


def _check_output(output_prefix: str, overwrite: bool) -> None:
    """Raises DataError if the output exists and must not be overwritten."""
    for ending in ("bin", "idx", "names", "stats.json"):
        if not overwrite and Path(f"{output_prefix}.{ending}").exists():
            raise DataError(f"{output_prefix}.{ending} is there already; give another --output-prefix, or --overwrite")


def _check_room(parts: Sequence[_Part], output: Path) -> None:
    """Raises DataError if there is not enough room on the disk."""
    needed = sum(path.stat().st_size * (2 if path.suffix == ".idx" else 1) for part in parts for path in part.paths)
    folder = next(folder for folder in output.resolve().parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(f"{folder}: {free / 1e9:.2f} GB are free, and {output} needs {needed / 1e9:.2f} GB until it is "
                        "whole; make room, or give another --output-prefix")


def _join(parts: Sequence[_Part], output_prefix: str) -> dict[str, Any]:
    """Write the output; returns its statistics."""
    total = sum(Path(f"{part.prefix}.bin").stat().st_size for part in parts)
    first, done, num_documents = parts[0], 0, 0
    with IndexedWriter(output_prefix, "mmap" if first.format[0] == "mmap" else "cached", None, first.has_names,
                       np.dtype(first.format[1])) as writer, reading_progress(total, _LOG_INTERVAL) as show:
        for part in parts:
            for size in _copied(part, writer):
                done += size
                show(done, num_documents)
            num_documents += part.num_documents
        forget(output_prefix)
    stats = _statistics(parts, output_prefix)
    put_statistics(Path(f"{output_prefix}.stats.json"), stats)
    return stats


def _copied(part: _Part, writer: IndexedWriter) -> Iterator[int]:
    """Append a dataset to the output; yields the number of bytes of the .bin in each chunk. Raises DataError."""
    for path, file in _recorded(part):
        if sha256(path) != file["sha256"]:
            raise DataError(f"{path}: its contents are not those that its statistics describe; copy or preprocess it "
                            "again")
    indexed, num_tokens = open_indexed(part.prefix), 0
    for start in range(0, len(indexed.sizes), _CHUNK_ITEMS):
        sizes = indexed.sizes[start:start + _CHUNK_ITEMS]
        num_tokens += int(sizes.sum(dtype=np.int64))
        writer.add(sizes=sizes)
    if num_tokens != len(indexed.tokens):
        raise DataError(f"{part.prefix}.idx: its sequences have {num_tokens} ids, its .bin holds "
                        f"{len(indexed.tokens)}; preprocess it again")
    for start in range(0, indexed.num_documents, _CHUNK_ITEMS):
        writer.add(num_sequences=np.diff(indexed.doc_idx[start:start + _CHUNK_ITEMS + 1]))
    _copy_names(part, writer)
    for start in range(0, len(indexed.tokens), _CHUNK_ITEMS):
        ids = indexed.tokens[start:start + _CHUNK_ITEMS]
        writer.add(ids)
        yield ids.nbytes


def _copy_names(part: _Part, writer: IndexedWriter) -> None:
    """Append a dataset's names, if it has them; raises DataError if their number is wrong."""
    if not part.has_names:
        return
    num_names = 0
    with open(f"{part.prefix}.names", "rb") as file:
        while names := file.read(_CHUNK_ITEMS):
            num_names += names.count(b"\n")
            writer.add(names=names)
    if num_names != part.num_documents:
        raise DataError(f"{part.prefix}.names: {num_names} names for {part.num_documents} documents; it has one a "
                        "line, in order. Copy or preprocess it again")


def _statistics(parts: Sequence[_Part], output_prefix: str) -> dict[str, Any]:
    """The statistics of the output, as preprocessing would write them.

    Only the vocabulary and the files if an input has no statistics; a note says so.
    """
    first, files = parts[0], facts_of_files(output_prefix, parts[0].has_names)
    stats: dict[str, Any] = {
        "version": VERSION, "vocabulary": {"identity": first.vocab.identity, "tokens": first.vocab.tokens},
        "merged": [{"path": f"{part.prefix}.bin", "documents": part.num_documents} for part in parts]}
    told = [(part.said, part.tally) for part in parts if part.said and part.tally]
    if len(told) < len(parts):
        unknown = next(part.prefix for part in parts if part.tally is None)
        print(f"note: {unknown} has no statistics, so those of the output name its vocabulary and its files alone")
        return {**stats, "outputs": {first.key: {"files": files}}}
    tally = DocumentTally()
    for _, one in told:
        tally.add(one)
    options = {**first.options, "json_keys": [first.key]}
    if first.dedup[0]:
        options["dedup"] = f"{first.dedup[0]}, in each of {sum(part.dedup[1] for part in parts)} datasets by itself"
    return {**stats, "options": options, "inputs": [source for said, _ in told for source in said["inputs"]],
            "outputs": {first.key: {**tally.report(first.vocab), "files": files}}}
