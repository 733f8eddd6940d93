"""Reads a file that is one JSON array of objects, such as TAPE's JSON files, element by element."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from megatron.data.sources.block import Contents, RecordBlock, Texts, WantedKeys, collected, text_under
from megatron.data.sources.streams import BLOCK_BYTES, MAX_RECORD_BYTES
from megatron.errors import DataError

_BLANKS = re.compile(r"[ \t\n\r]*")


def json_array_blocks(contents: Contents, wanted: WantedKeys) -> Iterator[RecordBlock]:
    """Blocks of parsed elements; raises DataError if the array is damaged or truncated."""
    elements: list[Any] = []
    first, size = 1, 0
    for element, num_characters in _elements(contents):
        elements.append(element)
        size += num_characters
        if size >= BLOCK_BYTES:
            yield RecordBlock(contents.source, "json array", elements, first, contents.stream.bytes_read)
            first, size, elements = first + len(elements), 0, []
    if elements:
        yield RecordBlock(contents.source, "json array", elements, first, contents.stream.bytes_read)


def parse_json_array(block: RecordBlock, key: str) -> Texts:
    """The string under `key` in each element."""
    return collected(block, ((number, text_under(element, key)) for number, element in records_in_json_array(block)))


def records_in_json_array(block: RecordBlock) -> Iterator[tuple[int, Any]]:
    """The number of each element, and the element, which need not be an object."""
    return enumerate(block.records, start=block.first)


def _elements(contents: Contents) -> Iterator[tuple[Any, int]]:
    """Each element, and the number of characters that it takes; raises DataError."""
    decoder, scan = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder().raw_decode
    text, at, number = "", 0, 0  # `text[at:]` continues the file after `number` elements
    chunks = iter(contents.chunks)
    while True:
        at = _skip_blanks(text, at)
        mark = text[at:at + 1]
        if mark == "]" and number:
            if text[at + 1:].strip() or any(chunk.strip() for chunk in chunks):
                raise DataError(f"{contents.source}: more text behind the JSON array; expected one array alone")
            return
        if mark not in ("", "," if number else "["):
            raise DataError(f"{contents.source}: record {number}: {mark!r} behind it, where a comma or ']' belongs")
        try:
            element, end = scan(text, _skip_blanks(text, at + 1))
        except (json.JSONDecodeError, RecursionError) as error:
            chunk = next(chunks, None)
            if chunk is None or len(text) - at > MAX_RECORD_BYTES:
                raise DataError(f"{contents.source}: record {number + 1}: not JSON, or cut short "
                                f"({getattr(error, 'msg', error)})") from None
            text, at = text[at:] + _decoded(decoder, chunk, contents.source), 0
            continue
        yield element, end - at
        number, at = number + 1, end


def _skip_blanks(text: str, at: int) -> int:
    """The first position from `at` on that is not white space."""
    found = _BLANKS.match(text, at)
    return found.end() if found else at


def _decoded(decoder: codecs.IncrementalDecoder, chunk: bytes, source: str) -> str:
    try:
        return decoder.decode(chunk)
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 text ({error.reason})") from None
