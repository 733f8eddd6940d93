"""Parses blocks into whole records: each with its place, such as "line 3", and a dict or a BadRecord.

For JSON lines and for tables, `text.records` and `text.delimited` do this.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from megatron.data.sources.binary.tape_lmdb import unpickled
from megatron.data.sources.block import RecordBlock
from megatron.data.sources.text.records import fasta_records

DEFAULT_NAME_KEY = "id"
SEQUENCE_KEY = "sequence"  # for files without keys
Records = Iterator[tuple[str, Any]]


def records_in_json_array(block: RecordBlock) -> Records:
    """The elements of a JSON array, which need not be objects."""
    return _numbered(block, block.records)


def records_in_lmdb(block: RecordBlock) -> Records:
    """The dict in each record of an LMDB."""
    return _numbered(block, map(unpickled, block.records))


def records_in_columns(block: RecordBlock) -> Records:
    """The values of each row of Parquet or Arrow, by column."""
    rows = zip(*block.records.values(), strict=True)
    return _numbered(block, (dict(zip(block.records, row, strict=True)) for row in rows))


def records_in_fasta(block: RecordBlock) -> Records:
    """The name and residues of each record of FASTA, as `id` and `sequence`."""
    for line, header, text in fasta_records(block):
        name = b"".join(header.split(None, 1)[:1])
        yield f"line {line}", {DEFAULT_NAME_KEY: name.decode(errors="replace"),
                               SEQUENCE_KEY: text.decode(errors="replace")}


def names_in_fasta(block: RecordBlock, key: str) -> Iterator[tuple[str, bytes]]:
    """The place and the whole header, undecoded, of each record of FASTA; `key` is not used."""
    for line, header, _ in fasta_records(block):
        yield f"line {line}", header


def records_in_strings(block: RecordBlock) -> Records:
    """The residues in each line that is not blank, as `sequence`."""
    for number, line in enumerate(block.records.split(b"\n"), start=block.first):
        if line.strip():
            yield f"line {number}", {SEQUENCE_KEY: line.decode(errors="replace")}


def _numbered(block: RecordBlock, records: Iterable[Any]) -> Records:
    return ((f"record {number}", record) for number, record in enumerate(records, start=block.first))
