"""The text kinds: loose JSON (one object a line), FASTA, and strings (one sequence a line, as `pfam_strings.txt`).

Headers of FASTA are never decoded, so that they may hold anything. Blank lines are no records; they are counted.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from megatron.data.sources.block import BadRecord, Block, Texts
from megatron.data.sources.streams import InputStream, cut, with_unix_line_ends
from megatron.errors import DataError

_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def text_blocks(stream: InputStream, chunks: Iterator[bytes]) -> Iterator[Block]:
    """The blocks of a text; the first byte that is not blank tells its kind. Raises DataError if there is none."""
    chunks = with_unix_line_ends(chunks)
    head, line = _skip_blank(stream.path, chunks)
    kind = {b"{": "json", b">": "fasta"}.get(head[:1], "strings")
    if head[:1] == b"[":
        raise DataError(f"{stream.path}: line {line}: a JSON array; expected loose JSON, one object a line")
    separator = b"\n>" if kind == "fasta" else b"\n"
    for data in cut(_chain(head, chunks), separator, stream.path):
        yield Block(stream.path, kind, data, line, stream.bytes_read)
        line += data.count(b"\n")


def parse_json(block: Block, key: str) -> Texts:
    """The string under `key` of each line's object."""
    loads = json_loads()
    lines = block.records.split(b"\n")
    parsed = Texts([])
    texts = parsed.texts
    for number, line in enumerate(lines, start=block.first):
        try:
            texts.append(loads(line)[key].encode())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if not line.strip():
                parsed.num_blank_lines += 1
                continue
            text = _explain_json(line, key)
            if isinstance(text, BadRecord):
                bad = BadRecord(text.reason, f"{block.source}: line {number}: {text.message}")
                parsed.bad[len(texts)] = bad
                text = b""
            texts.append(text)
    parsed.num_blank_lines -= not lines[-1]
    return parsed


def parse_fasta(block: Block, key: str) -> Texts:
    """The lines under each header, line ends included."""
    return Texts([record.partition(b"\n")[2] for record in block.records[1:].split(b"\n>")])


def parse_strings(block: Block, key: str) -> Texts:
    """Each line that is not blank."""
    lines = block.records.split(b"\n")
    texts = list(filter(bytes.strip, lines))
    return Texts(texts, num_blank_lines=len(lines) - (not lines[-1]) - len(texts))


def json_loads() -> Callable[[bytes], Any]:
    """The fastest strict parser that is installed; it raises ValueError for what is no JSON."""
    try:
        import orjson
        return orjson.loads
    except ImportError:
        return lambda line: json.loads(line.decode())


def place_in_json(block: Block, index: int, offset: int) -> str:
    """Line of the file, and column in the text, of a byte in the text of a record."""
    return f"line {_line_of(block, index)}, column {offset + 1} of the text"


def place_in_strings(block: Block, index: int, offset: int) -> str:
    """Line and column of a byte in the text of a record."""
    return f"line {_line_of(block, index)}, column {offset + 1}"


def place_in_fasta(block: Block, index: int, offset: int) -> str:
    """Line and column of a byte in the text of a record."""
    records = block.records[1:].split(b"\n>")
    lines_before = sum(record.count(b"\n") + 1 for record in records[:index])
    before = records[index].partition(b"\n")[2][:offset]
    column = offset - before.rfind(b"\n")
    return f"line {block.first + lines_before + 1 + before.count(10)}, column {column}"


def _line_of(block: Block, index: int) -> int:
    filled = (number for number, line in enumerate(block.records.split(b"\n"), start=block.first) if line.strip())
    return next(number for place, number in enumerate(filled) if place == index)


def _explain_json(line: bytes, key: str) -> bytes | BadRecord:
    """The text after all, if only its characters are odd; else what is wrong."""
    try:
        value = json.loads(line.decode())
    except json.JSONDecodeError as error:
        return BadRecord("bad JSON", f"not a JSON object ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:
        return BadRecord("bad JSON", f"not a JSON object ({error})")
    if not isinstance(value, dict):
        return BadRecord("bad JSON", f"{type(value).__name__} where a JSON object belongs")
    if key not in value:
        found = ", ".join(repr(other)[:40] for other in list(value)[:5]) or "nothing"
        return BadRecord("missing key", f"no key {key!r}; it has {found}. --json-keys names the keys")
    if not isinstance(value[key], str):
        kind = type(value[key]).__name__
        return BadRecord("not a string", f"{key!r} is of type {kind}; expected a string of residues")
    return value[key].encode(errors="replace")


def _skip_blank(path: str, chunks: Iterator[bytes]) -> tuple[bytes, int]:
    """The first chunk from its first byte that is not blank on, and the number of that byte's line."""
    line = 1
    for number, chunk in enumerate(chunks):
        if number == 0:
            if chunk.startswith(_UTF16_MARKS):
                raise DataError(f"{path}: is UTF-16 text; expected ASCII or UTF-8: convert it first")
            chunk = chunk.removeprefix(_UTF8_MARK)
        rest = chunk.lstrip()
        line += chunk.count(b"\n", 0, len(chunk) - len(rest))
        if rest:
            return rest, line
    raise DataError(f"{path}: is empty; expected proteins as JSON lines, FASTA, one a line, LMDB or Parquet")


def _chain(head: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from chunks
