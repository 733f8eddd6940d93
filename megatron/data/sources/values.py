"""Whole records as dictionaries, each with its place in words; the first bad one raises DataError.

Of tables, `text.delimited` has its own.
"""

from collections.abc import Iterator
from typing import Any

from megatron.data.sources.binary.tape_lmdb import unpickled
from megatron.data.sources.block import BadRecord, RecordBlock, type_name
from megatron.data.sources.names import DEFAULT_NAME_KEY
from megatron.data.sources.text.records import fasta_records, json_records, parse_fasta, parse_strings
from megatron.errors import DataError

SEQUENCE_KEY = "sequence"  # of the proteins of files without keys
Values = Iterator[tuple[str, dict[str, Any]]]


def values_in_json(block: RecordBlock) -> Values:
    """The line and the object of each line that is not blank."""
    for line, record in json_records(block):
        yield f"line {line}", _object(record, f"{block.source}: line {line}")


def values_in_json_array(block: RecordBlock) -> Values:
    """The number and the object of each element."""
    for number, record in enumerate(block.records, start=block.first):
        yield f"record {number}", _object(record, f"{block.source}: record {number}")


def values_in_lmdb(block: RecordBlock) -> Values:
    """The number and the dict of each record."""
    for number, value in enumerate(block.records, start=block.first):
        record = unpickled(value)
        if isinstance(record, BadRecord):
            raise DataError(f"{block.source}: record {number}: {record.message}")
        yield f"record {number}", record


def values_in_columns(block: RecordBlock) -> Values:
    """The number and the values of each row of Parquet or Arrow."""
    for number, row in enumerate(zip(*block.records.values(), strict=True), start=block.first):
        yield f"record {number}", dict(zip(block.records, row, strict=True))


def values_in_fasta(block: RecordBlock) -> Values:
    """The line, name and residues of each record."""
    parse_fasta(block, "")  # raises for what is none
    for line, header, text in fasta_records(block):
        name = b"".join(header.split(None, 1)[:1])
        yield f"line {line}", {DEFAULT_NAME_KEY: name.decode(errors="replace"),
                               SEQUENCE_KEY: text.decode(errors="replace")}


def values_in_strings(block: RecordBlock) -> Values:
    """The line and the residues of each line that is not blank."""
    parse_strings(block, "")  # raises for what is none
    for number, line in enumerate(block.records.split(b"\n"), start=block.first):
        if line.strip():
            yield f"line {number}", {SEQUENCE_KEY: line.decode(errors="replace")}


def _object(record: Any, place: str) -> dict[str, Any]:
    if isinstance(record, BadRecord):
        raise DataError(f"{place}: {record.message}")
    if not isinstance(record, dict):
        raise DataError(f"{place}: {type_name(record)} where a JSON object belongs")
    return record
