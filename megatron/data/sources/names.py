"""Where each record's name stands, and the bytes there: a header of FASTA, or what a key or a column holds.

A name is the first word there. Bytes are taken as they are, so it may hold anything but white space.
"""

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron.data.sources.block import RecordBlock
from megatron.data.sources.text.records import fasta_records, json_records
from megatron.plain_pickle import load_plain_pickle

DEFAULT_NAME_KEY = "id"


def names_in_fasta(block: RecordBlock, key: str) -> Iterator[tuple[str, bytes]]:
    """The line and the header of each record."""
    for line, header, _ in fasta_records(block):
        yield f"line {line}", header


def names_in_json(block: RecordBlock, key: str) -> Iterator[tuple[str, bytes]]:
    """The line and the value under `key` of each object."""
    for line, record in json_records(block):
        yield f"line {line}", _under_key(record, key)


def names_in_json_array(block: RecordBlock, key: str) -> Iterator[tuple[str, bytes]]:
    """The number and the value under `key` of each element."""
    for number, record in enumerate(block.records, start=block.first):
        yield f"record {number}", _under_key(record, key)


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
