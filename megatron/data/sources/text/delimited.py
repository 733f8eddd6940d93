"""Reads CSV and TSV: a header that names the columns, then one record a line.

CSV fields may be quoted, as in the standard library's `csv`. TSV has no quoting, since a `"` may be part of a
description, but quotes around a whole field are removed. Fields are bytes; for `csv` they are decoded as Latin-1, which
preserves every byte.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from megatron.data.sources.binary.columns import check_columns, check_distinct
from megatron.data.sources.block import BadRecord, Contents, RecordBlock, Texts, WantedKeys, collected
from megatron.data.sources.looks import HEAD_BYTES, delimiter_of
from megatron.data.sources.streams import MAX_RECORD_BYTES, decoded
from megatron.data.sources.text.records import line_blocks, line_of, num_blank_lines
from megatron.errors import DataError

_KIND_NAMES = {"\t": "TSV", ",": "CSV", ";": "CSV"}


@dataclass(frozen=True)
class Rows:
    """Lines of a table, with its column names and delimiter."""

    header: tuple[str, ...]
    delimiter: str
    lines: bytes


def delimited_blocks(contents: Contents, wanted: WantedKeys) -> Iterator[RecordBlock]:
    """Blocks of the lines below the header; raises DataError if a wanted column is missing."""
    head = contents.chunks.peek(HEAD_BYTES)
    delimiter = (delimiter_of(head) or b",").decode()
    fields = _fields(head.partition(b"\n")[0], delimiter)
    if isinstance(fields, BadRecord):
        raise DataError(f"{contents.source}: line {contents.line}: {fields.message}; expected the columns' names")
    header = tuple(decoded(field).strip() for field in fields)
    check_columns(contents.source, _KIND_NAMES[delimiter], header, wanted)
    contents.chunks.skip_line()
    contents.line += 1
    return line_blocks(contents, "csv", pack=partial(Rows, header, delimiter))


def parse_delimited(block: RecordBlock, key: str) -> Texts:
    """The texts in column `key`; a row with more or fewer fields than the header is a bad record."""
    parsed = collected(block, fields_in_delimited(block, key), "line")
    parsed.num_blank_lines = num_blank_lines(block.records.lines, len(parsed.texts))
    return parsed


def fields_in_delimited(block: RecordBlock, key: str) -> Iterator[tuple[int, bytes | BadRecord]]:
    """The line of each row, and its field in column `key`."""
    column = block.records.header.index(key)
    return ((line, row if isinstance(row, BadRecord) else row[column]) for line, row in _rows(block))


def records_in_delimited(block: RecordBlock) -> Iterator[tuple[int, dict[str, str] | BadRecord]]:
    """The line of each row, and its fields by column; raises DataError if two columns have the same name."""
    check_distinct(block.source, block.records.header)
    for line, row in _rows(block):
        yield line, row if isinstance(row, BadRecord) else {
            name: decoded(field).strip()
            for name, field in zip(block.records.header, row, strict=True)}


def place_in_delimited(block: RecordBlock, index: int, offset: int) -> str:
    """The place of a byte in a record's text: the line in the file, and the column in the text."""
    return f"line {line_of(block.records.lines, block.first, index)}, column {offset + 1} of the text"


def _rows(block: RecordBlock) -> Iterator[tuple[int, list[bytes] | BadRecord]]:
    """The number of each line that is not blank, and its fields or what is wrong with it.

    Raises DataError for a quoted field that spans lines.
    """
    rows = block.records
    for number, line in enumerate(rows.lines.split(b"\n"), start=block.first):
        if not line.strip():
            continue
        if b'"' not in line:
            fields: list[bytes] | BadRecord = line.split(rows.delimiter.encode())
        elif rows.delimiter != "\t" and line.count(b'"') % 2:
            # The lines after it would be part of the field, so it is not just one bad record.
            raise DataError(f"{block.source}: line {number}: a quoted field that does not end on its line; write the "
                            "table with one record a line")
        else:
            fields = _fields(line, rows.delimiter)
        if not isinstance(fields, BadRecord) and len(fields) != len(rows.header):
            fields = BadRecord("bad row", f"{len(fields)} fields where the header has {len(rows.header)}")
        yield number, fields


def _fields(line: bytes, delimiter: str) -> list[bytes] | BadRecord:
    """The fields of one line, without quotes."""
    if delimiter == "\t":
        return [field[1:-1] if len(field) > 1 and field[:1] == field[-1:] == b'"' else field
                for field in line.split(b"\t")]
    csv.field_size_limit(MAX_RECORD_BYTES)
    try:
        fields = next(csv.reader([line.decode("latin-1")], delimiter=delimiter, strict=True))
    except csv.Error as error:
        return BadRecord("bad row", f"not a row of CSV ({error})")
    return [field.encode("latin-1") for field in fields]
