"""Reads JSON lines (one object a line), FASTA, and strings (one sequence a line, as in `pfam_strings.txt`).

FASTA headers are never decoded, so they may hold any bytes. Blank lines are not records, but are counted.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

from megatron.data.sources.block import (
    DEFAULT_NAME_KEY,
    SEQUENCE_KEY,
    BadRecord,
    Contents,
    RecordBlock,
    Texts,
    WantedKeys,
    collected,
    text_under,
)
from megatron.data.sources.streams import cut, decoded
from megatron.errors import DataError

_BLANK_BYTES = 1 << 16
_HEADER = re.compile(rb"^[ \t]*>", re.MULTILINE)


def fasta_blocks(contents: Contents, wanted: WantedKeys) -> Iterator[RecordBlock]:
    """Blocks of FASTA records; comment lines (`;` or `#`) before the first header are skipped.

    Raises DataError if no header follows them.
    """
    while contents.chunks.peek(1) in (b";", b"#"):
        contents.chunks.skip_line()
        contents.line += 1
        skip_blank_lines(contents)
    head = contents.chunks.peek(40)
    if not head.startswith(b">"):
        found = f"{decoded(head.splitlines()[0])!r}" if head else "nothing"
        raise DataError(f"{contents.source}: line {contents.line}: comments, and behind them {found}; expected the "
                        "header of a FASTA record, which begins with '>'")
    return line_blocks(contents, "fasta", b"\n>")


def line_blocks(contents: Contents, kind: str, separator: bytes = b"\n",
                pack: Callable[[bytes], Any] = bytes) -> Iterator[RecordBlock]:
    """Blocks of whole records; `separator`: where to cut them, `pack`: makes a block's `records` of its bytes."""
    line = contents.line
    for data in cut(contents.chunks, separator, contents.source):
        yield RecordBlock(contents.source, kind, pack(data), line, contents.stream.bytes_read)
        line += data.count(b"\n")


def skip_blank_lines(contents: Contents) -> None:
    """Skip blank lines, and white space before the first record, so that `contents` begin there.

    Tabs before it are kept if it may be a table, where they separate empty columns.
    """
    while head := contents.chunks.peek(_BLANK_BYTES):
        size = len(head) - len(head.lstrip())
        if size < len(head) and head[size] not in b">{[;#":
            size = len(head[:size].rstrip(b"\t"))
        contents.line += head.count(b"\n", 0, size)
        contents.chunks.skip(size)
        if size < len(head):
            return


def records_in_json(block: RecordBlock) -> Iterator[tuple[int, Any]]:
    """The number and the JSON value of each line that is not blank; a BadRecord for a line that is not JSON."""
    loads = json_loads()
    for number, line in filled_lines(block.records, block.first):
        try:
            yield number, loads(line)
        except (ValueError, RecursionError):
            yield number, _odd_json(line)


def records_in_fasta(block: RecordBlock) -> Iterator[tuple[int, dict[str, str]]]:
    """The line of each FASTA record, and its name and residues as `id` and `sequence`."""
    for line, header, text in _fasta_records(block):
        name = b"".join(header.split(None, 1)[:1])
        yield line, {DEFAULT_NAME_KEY: decoded(name), SEQUENCE_KEY: decoded(text)}


def headers_in_fasta(block: RecordBlock, key: str) -> Iterator[tuple[int, bytes]]:
    """The line of each FASTA record, and its whole header, undecoded; `key` is not used."""
    return ((line, header) for line, header, _ in _fasta_records(block))


def records_in_strings(block: RecordBlock) -> Iterator[tuple[int, dict[str, str]]]:
    """The number of each line that is not blank, and its residues as `sequence`."""
    return ((number, {SEQUENCE_KEY: decoded(line)})
            for number, line in filled_lines(block.records, block.first))


def parse_json(block: RecordBlock, key: str) -> Texts:
    """The string under `key` in each line's object."""
    loads, parsed = json_loads(), None
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        parsed = Texts([loads(line)[key].encode() for line in block.records.split(b"\n") if line])
    if parsed is None:  # a bad record, or one that needs a closer look
        found = ((number, text_under(value, key)) for number, value in records_in_json(block))
        parsed = collected(block, found, "line")
    parsed.num_blank_lines = num_blank_lines(block.records, len(parsed.texts))
    return parsed


def parse_fasta(block: RecordBlock, key: str) -> Texts:
    """The lines under each FASTA header, including line ends.

    Raises DataError for a `>` among them, which would hide the record that it begins, and for a header that seems to
    end in CR alone in a file whose lines end in LF.
    """
    if b"\r" in block.records:
        _check_headers(block)
    texts = [record.partition(b"\n")[2] for record in block.records[1:].split(b"\n>")]
    for index, text in enumerate(texts):
        if b">" in text:
            place = place_in_fasta(block, index, text.index(b">"))
            raise DataError(f"{block.source}: {place}: '>' within a record; a header must begin its line: mend it")
    return Texts(texts)


def parse_strings(block: RecordBlock, key: str) -> Texts:
    """Each line that is not blank; raises DataError for a FASTA header, since lines of FASTA are no whole proteins."""
    header = b">" in block.records and _HEADER.search(block.records)
    if header:
        line = block.first + block.records.count(b"\n", 0, header.end())
        raise DataError(f"{block.source}: line {line}: a FASTA header, though the file began as one protein a line; "
                        "give the two kinds in files of their own")
    texts = list(filter(bytes.strip, block.records.split(b"\n")))
    return Texts(texts, num_blank_lines=num_blank_lines(block.records, len(texts)))


def json_loads() -> Callable[[bytes], Any]:
    """The JSON parser to use, orjson if it is installed; it raises ValueError for text that is not JSON."""
    try:
        import orjson
        return orjson.loads
    except ImportError:
        return lambda line: json.loads(line.decode())


def place_in_json(block: RecordBlock, index: int, offset: int) -> str:
    """The place of a byte in a record's text: the line in the file, and the column in the text."""
    return f"line {line_of(block.records, block.first, index)}, column {offset + 1} of the text"


def place_in_strings(block: RecordBlock, index: int, offset: int) -> str:
    """The place of a byte in a record's text: line and column."""
    return f"line {line_of(block.records, block.first, index)}, column {offset + 1}"


def place_in_fasta(block: RecordBlock, index: int, offset: int) -> str:
    """The place of a byte in a record's text: line and column."""
    records = block.records[1:].split(b"\n>")
    lines_before = sum(record.count(b"\n") + 1 for record in records[:index])
    before = records[index].partition(b"\n")[2][:offset]
    column = offset - before.rfind(b"\n")
    return f"line {block.first + lines_before + 1 + before.count(10)}, column {column}"


def filled_lines(lines: bytes, first: int) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, with its number; `first`: that of the first line."""
    return ((number, line) for number, line in enumerate(lines.split(b"\n"), start=first) if line.strip())


def line_of(lines: bytes, first: int, index: int) -> int:
    """The line number of record `index`, if each line that is not blank is a record; `first`: of the first line."""
    return next(islice(filled_lines(lines, first), index, None))[0]


def num_blank_lines(lines: bytes, num_filled: int) -> int:
    """The number of blank lines, where `num_filled` are not blank."""
    return lines.count(b"\n") + (not lines.endswith(b"\n")) - num_filled


def _fasta_records(block: RecordBlock) -> Iterator[tuple[int, bytes, bytes]]:
    """The line number, the header and the lines under it, of each FASTA record."""
    line = block.first
    for record in block.records[1:].split(b"\n>"):
        header, _, text = record.partition(b"\n")
        yield line, header, text
        line += record.count(b"\n") + 1


def _check_headers(block: RecordBlock) -> None:
    """Raises DataError for a header that seems to end in CR alone."""
    for line, header, text in _fasta_records(block):
        if b"\r>" in header or (b"\r" in header and not text.strip()):
            raise DataError(f"{block.source}: line {line}: a header that seems to end in CR, where the first line ends "
                            "in LF; give all lines the same end")


def _odd_json(line: bytes) -> Any:
    """The value of a line by the standard library's parser, which accepts NaN, or a BadRecord."""
    try:
        return json.loads(line.decode())
    except json.JSONDecodeError as error:
        return BadRecord("bad JSON", f"not a JSON object ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:
        return BadRecord("bad JSON", f"not a JSON object ({error})")
