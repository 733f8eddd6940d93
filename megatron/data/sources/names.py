"""The name of each record: the first word of its FASTA header, or of what stands under a key of JSON, LMDB or Parquet.

Bytes are taken as they are, so a name may hold anything but white space.
"""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from megatron.data.sources.block import BadRecord, Block, Texts
from megatron.data.sources.plain_pickle import load_plain_pickle
from megatron.data.sources.text import json_loads

DEFAULT_NAME_KEY = "id"


def names_of(block: Block, key: str) -> Texts:
    """The name of each of a block's records; a record without one is bad. Strings, one a line, have no names."""
    finding = "a header without a name" if block.kind == "fasta" else f"no name under {key!r}; --name-key names the key"
    parsed = Texts([])
    for index, (place, name) in enumerate(_FINDERS[block.kind](block, key)):
        if not name:
            parsed.bad[index] = BadRecord("no name", f"{block.source}: {place}: {finding}")
        parsed.texts.append(name)
    return parsed


def _in_fasta(block: Block, key: str) -> Iterator[tuple[str, bytes]]:
    line = block.first
    for record in block.records[1:].split(b"\n>"):
        yield f"line {line}", _first_word(record.partition(b"\n")[0])
        line += record.count(b"\n") + 1


def _in_json(block: Block, key: str) -> Iterator[tuple[str, bytes]]:
    loads = json_loads()
    for number, line in enumerate(block.records.split(b"\n"), start=block.first):
        if line.strip():
            try:
                record = loads(line)
            except ValueError:
                record = _odd_json(line)
            yield f"line {number}", _under_key(record, key)


def _odd_json(line: bytes) -> Any:
    """What the more lenient parser makes of a line; None where that is damaged too, as its text will say."""
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None


def _in_lmdb(block: Block, key: str) -> Iterator[tuple[str, bytes]]:
    for number, value in enumerate(block.records, start=block.first):
        try:
            record = load_plain_pickle(value or b"")
        except pickle.UnpicklingError:  # as its text will say
            record = None
        yield f"record {number}", _under_key(record, key)


def _in_parquet(block: Block, key: str) -> Iterable[tuple[str, bytes]]:
    for number, value in enumerate(block.records[key], start=block.first):
        yield f"record {number}", _first_word(value or b"")


def _under_key(record: Any, key: str) -> bytes:
    value = record.get(key) if isinstance(record, dict) else None
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        value = value.encode(errors="surrogatepass")
    return _first_word(value) if isinstance(value, bytes) else b""


def _first_word(text: bytes) -> bytes:
    return b"".join(text.split(None, 1)[:1])


_FINDERS: dict[str, Callable[[Block, str], Iterable[tuple[str, bytes]]]] = {
    "fasta": _in_fasta, "json": _in_json, "lmdb": _in_lmdb, "parquet": _in_parquet}
