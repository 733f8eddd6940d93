"""Whole records, each with its place in words: a dictionary, or what is wrong with it.

Of JSON lines and tables, `text.records` and `text.delimited` have their own.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from megatron.data.sources.binary.tape_lmdb import unpickled
from megatron.data.sources.block import RecordBlock
from megatron.data.sources.text.records import fasta_records

DEFAULT_NAME_KEY = "id"
SEQUENCE_KEY = "sequence"  # of the proteins of files without keys
Records = Iterator[tuple[str, Any]]


def records_in_json_array(block: RecordBlock) -> Records:
    """The elements, which may be no objects."""
    return _numbered(block, block.records)


def records_in_lmdb(block: RecordBlock) -> Records:
    """The dict of each record."""
    return _numbered(block, map(unpickled, block.records))


def records_in_columns(block: RecordBlock) -> Records:
    """The values of each row of Parquet or Arrow."""
    rows = zip(*block.records.values(), strict=True)
    return _numbered(block, (dict(zip(block.records, row, strict=True)) for row in rows))


def records_in_fasta(block: RecordBlock) -> Records:
    """The name and residues of each record."""
    for line, header, text in fasta_records(block):
        name = b"".join(header.split(None, 1)[:1])
        yield f"line {line}", {DEFAULT_NAME_KEY: name.decode(errors="replace"),
                               SEQUENCE_KEY: text.decode(errors="replace")}


def names_in_fasta(block: RecordBlock, key: str) -> Iterator[tuple[str, bytes]]:
    """The line and the header of each record, as it is."""
    for line, header, _ in fasta_records(block):
        yield f"line {line}", header


def records_in_strings(block: RecordBlock) -> Records:
    """The residues of each line that is not blank."""
    for number, line in enumerate(block.records.split(b"\n"), start=block.first):
        if line.strip():
            yield f"line {number}", {SEQUENCE_KEY: line.decode(errors="replace")}


def _numbered(block: RecordBlock, records: Iterable[Any]) -> Records:
    return ((f"record {number}", record) for number, record in enumerate(records, start=block.first))
