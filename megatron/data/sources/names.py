"""Where each record's name stands, and the bytes there: a header of FASTA, or what a key or a column holds.

A name is the first word there. Bytes are taken as they are, so it may hold anything but white space.
"""

import json
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron.data.sources.block import RecordBlock
from megatron.data.sources.text.records import json_loads
from megatron.plain_pickle import load_plain_pickle

DEFAULT_NAME_KEY = "id"


def names_in_fasta(block: RecordBlock, key: str) -> Iterator[tuple[str, bytes]]:
    """The line and the header of each record."""
    line = block.first
    for record in block.records[1:].split(b"\n>"):
        yield f"line {line}", record.partition(b"\n")[0]
        line += record.count(b"\n") + 1


def names_in_json(block: RecordBlock, key: str) -> Iterator[tuple[str, bytes]]:
    """The line and the value under `key` of each object."""
    loads = json_loads()
    for number, line in enumerate(block.records.split(b"\n"), start=block.first):
        if line.strip():
            try:
                record = loads(line)
            except ValueError:
                record = _odd_json(line)
            yield f"line {number}", _under_key(record, key)


def names_in_json_array(block: RecordBlock, key: str) -> Iterator[tuple[str, bytes]]:
    """The number and the value under `key` of each element."""
    for number, record in enumerate(block.records, start=block.first):
        yield f"record {number}", _under_key(record, key)


def _odd_json(line: bytes) -> Any:
    """What the more lenient parser makes of a line; None where that is damaged too, as its text will say."""
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None


def names_in_lmdb(block: RecordBlock, key: str) -> Iterator[tuple[str, bytes]]:
    """The number and the value under `key` of each record."""
    for number, value in enumerate(block.records, start=block.first):
        try:
            record = load_plain_pickle(value or b"")
        except pickle.UnpicklingError:  # as its text will say
            record = None
        yield f"record {number}", _under_key(record, key)


def names_in_columns(block: RecordBlock, key: str) -> Iterator[tuple[str, bytes]]:
    """The number and the value in the column `key` of each record."""
    for number, value in enumerate(block.records[key], start=block.first):
        yield f"record {number}", value or b""


def _under_key(record: Any, key: str) -> bytes:
    value = record.get(key) if isinstance(record, dict) else None
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        value = value.encode(errors="surrogatepass")
    return value if isinstance(value, bytes) else b""
