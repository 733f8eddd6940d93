"""Reads TAPE's LMDB: `num_examples`, and keys `0`, `1`, …, each a pickled dict with the residues under `primary`.

A damaged LMDB can crash the process that maps it, so a separate process reads it.
"""

import multiprocessing
import os
import pickle
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, BinaryIO

from megatron.data.sources.block import BadRecord, RecordBlock, Texts, WantedKeys, collected, text_under
from megatron.data.sources.streams import BLOCK_BYTES, MAX_RECORD_BYTES
from megatron.errors import DataError
from megatron.plain_pickle import load_plain_pickle

LMDB_MAGIC = b"\xde\xc0\xef\xbe"
LMDB_MAGIC_OFFSET = 16
_BATCH_RECORDS = 2048


def lmdb_blocks(source: str, path: str, wanted: WantedKeys) -> Iterator[RecordBlock]:
    """The blocks of the LMDB file at `path`; raises DataError, which names `source`."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    reader = context.Process(target=_read_lmdb, args=(path, sender), daemon=True)
    reader.start()
    sender.close()
    size = os.path.getsize(path)
    first = 1
    try:
        while True:
            batch, num_records = _receive(receiver, source)
            if batch is None:
                return
            yield RecordBlock(source, "lmdb", batch, first, size * (first - 1 + len(batch)) // max(num_records, 1))
            first += len(batch)
    finally:
        receiver.close()
        reader.kill()
        reader.join()


def parse_lmdb(block: RecordBlock, key: str) -> Texts:
    """The residues of each record: those under `key`, or under `primary` if `key` is the default `text` and absent."""
    return collected(block, (
        (number, text_under(record, "primary" if key == "text" and isinstance(record, dict) and key not in record
                            else key)) for number, record in records_in_lmdb(block)))


def records_in_lmdb(block: RecordBlock) -> Iterator[tuple[int, Any]]:
    """The number of each record, and its dict or a BadRecord."""
    return enumerate(map(_unpickled, block.records), start=block.first)


def _unpickled(value: bytes | None) -> dict[Any, Any] | BadRecord:
    """The dict in a record's pickle, or a BadRecord; no code in the pickle is run. `value`: None if it is missing."""
    if value is None:
        return BadRecord("missing record", "is missing; the LMDB is not whole")
    try:
        record = load_plain_pickle(value)
    except pickle.UnpicklingError as error:
        return BadRecord("bad pickle", f"cannot be unpickled ({error})")
    return record if isinstance(record, dict) else BadRecord("bad pickle",
                                                             f"{type(record).__name__} where a dict belongs")


def _receive(receiver: Connection, source: str) -> tuple[list[bytes | None] | None, int]:
    """A batch of values, or None at the end, and the total number of records; raises DataError."""
    try:
        message = receiver.recv()
    except (EOFError, OSError):
        raise DataError(f"{source}: the LMDB is damaged or cut short (its reader crashed); copy it again") from None
    if isinstance(message, str):
        raise DataError(f"{source}: {message}")
    return message


def _name_of(file: BinaryIO, path: str) -> str:
    """A path by which lmdb can open an open file: its own if that is UTF-8, else that of its descriptor."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return f"/dev/fd/{file.fileno()}"
    return path


def _read_lmdb(path: str, sender: Connection) -> None:
    """Send every record's value in batches, or a string that says what is wrong; runs in a process of its own."""
    try:
        import lmdb
    except ImportError:
        sender.send("is an LMDB, which needs: pip install lmdb")
        return
    try:
        with (open(path, "rb") as file,
              lmdb.open(_name_of(file, path), subdir=False, readonly=True, lock=False, readahead=False) as environment,
              environment.begin() as transaction):
            num_records = load_plain_pickle(transaction.get(b"num_examples", b""))
            num_entries = environment.stat()["entries"]
            if not isinstance(num_records, int) or not 0 <= num_records < num_entries:
                sender.send(f"is not TAPE's LMDB: it says {repr(num_records)[:40]} records and has {num_entries} "
                            "entries")
            elif transaction.get(str(num_records).encode()) is not None:
                sender.send(f"its 'num_examples' says {num_records} records, but there are more; write it anew")
            else:
                _send_records(transaction, num_records, sender)
    except pickle.UnpicklingError:
        sender.send("is not TAPE's LMDB: it has no readable 'num_examples'")
    except lmdb.Error as error:
        sender.send(f"is no readable LMDB ({error}); copy it again")
    except BrokenPipeError:
        pass


def _send_records(transaction: Any, num_records: int, sender: Connection) -> None:
    """Send (batch of values, num_records) for all records, then (None, num_records); a string for one too long."""
    batch: list[bytes | None] = []
    num_bytes = 0
    for index in range(num_records):
        value = transaction.get(str(index).encode())
        if len(value or b"") > MAX_RECORD_BYTES:
            sender.send(f"record {index + 1} is of more than {MAX_RECORD_BYTES >> 20} MiB; proteins are far "
                        "shorter: is this file what it should be?")
            return
        batch.append(value)
        num_bytes += len(value or b"")
        if num_bytes > BLOCK_BYTES or len(batch) == _BATCH_RECORDS:
            sender.send((batch, num_records))
            batch, num_bytes = [], 0
    if batch:
        sender.send((batch, num_records))
    sender.send((None, num_records))
