"""TAPE's LMDB folders: key `num_examples`, then `0`, `1`, …, each a pickled dict with the residues under `primary`.

A damaged LMDB can crash whoever maps it, so a process of its own reads it. Its pickles build only plain containers,
numbers, strings, bytes and NumPy arrays.
"""

import io
import multiprocessing
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.indexed import DataError
from megatron.data.readers.block import BLOCK_BYTES, BadRecord, Block, Texts

LMDB_MAGIC = b"\xde\xc0\xef\xbe"
LMDB_MAGIC_OFFSET = 16
_BATCH_RECORDS = 2048


def lmdb_blocks(source: str, path: str) -> Iterator[Block]:
    """The blocks of the LMDB at `path`, a folder or a file; raises DataError, naming `source`, if it is no good."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    reader = context.Process(target=_read_lmdb, args=(path, sender), daemon=True)
    reader.start()
    sender.close()
    size = os.path.getsize(_data_file(path))
    first = 1
    try:
        while True:
            batch, num_records = _receive(receiver, source)
            if batch is None:
                return
            yield Block(source, "lmdb", batch, first, size * (first - 1 + len(batch)) // max(num_records, 1))
            first += len(batch)
    finally:
        receiver.close()
        reader.kill()
        reader.join()


def parse_lmdb(block: Block, key: str) -> Texts:
    """The residues of each record: under `key`, or under `primary` where `key` is the default `text`."""
    parsed = Texts([])
    for index, value in enumerate(block.records):
        text = _text_of(value, key)
        if isinstance(text, BadRecord):
            parsed.bad[index] = BadRecord(text.reason, f"{block.source}: record {block.first + index}: {text.message}")
            text = b""
        parsed.texts.append(text)
    return parsed


def load_plain_pickle(data: bytes) -> Any:
    """What a pickle holds, if that is plain data; raises pickle.UnpicklingError for anything else or damage."""
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damage can raise nearly anything here
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None


class _PlainUnpickler(pickle._Unpickler):
    """The unpickler in Python: that in C fills gigabytes of memory on a five-byte pickle (a huge memo index)."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PLAIN[module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins"), name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data") from None


def _empty_array(subtype: str, shape: tuple[int, ...], kind: bytes) -> np.ndarray:
    """The empty array that NumPy's pickles fill afterwards; they never ask for another one."""
    return np.empty(0, dtype=np.int8)


def _no_bytes() -> bytes:
    """How pickles before protocol 3 spell empty bytes; with a number it would allocate them."""
    return b""


def _latin1(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 spell bytes."""
    return text.encode("latin-1")


_PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set, ("builtins", "frozenset"): frozenset, ("builtins", "bytes"): _no_bytes,
    ("_codecs", "encode"): _latin1,
    # Only ever named as the kind of array to make; as a class it could be called.
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy.core.multiarray", "scalar"): lambda dtype, data: np.frombuffer(data, dtype)[0],
}


def _text_of(value: bytes | None, key: str) -> bytes | BadRecord:
    if value is None:
        return BadRecord("missing record", "is missing; the LMDB is not whole")
    try:
        record = load_plain_pickle(value)
    except pickle.UnpicklingError as error:
        return BadRecord("bad pickle", f"cannot be unpickled ({error})")
    if not isinstance(record, dict):
        return BadRecord("bad pickle", f"{type(record).__name__} where a dict belongs")
    name = "primary" if key == "text" and "text" not in record else key
    if name not in record:
        found = ", ".join(map(repr, list(record)[:5])) or "nothing"
        return BadRecord("missing key", f"no key {name!r}; it has {found}. --json-keys names the key")
    text = record[name]
    if isinstance(text, str):
        return text.encode(errors="replace")
    if isinstance(text, bytes):
        return text
    return BadRecord("not a string", f"{name!r} is of type {type(text).__name__}; expected a string of residues")


def _data_file(path: str) -> Path:
    return Path(path) / "data.mdb" if os.path.isdir(path) else Path(path)


def _receive(receiver: Connection, source: str) -> tuple[list[bytes | None] | None, int]:
    """A batch of values, None at the end, and the number of records in all."""
    try:
        message = receiver.recv()
    except (EOFError, OSError):
        raise DataError(f"{source}: the LMDB is damaged or cut short (its reader crashed); copy it again") from None
    if isinstance(message, str):
        raise DataError(f"{source}: {message}")
    return message


def _read_lmdb(path: str, sender: Connection) -> None:
    """Send every record's value in batches; a string says what is wrong. Runs in a process of its own."""
    try:
        import lmdb
    except ImportError:
        sender.send("is an LMDB, which needs: pip install lmdb")
        return
    try:
        with (lmdb.open(path, subdir=os.path.isdir(path), readonly=True, lock=False, readahead=False) as environment,
              environment.begin() as transaction):
            num_records = load_plain_pickle(transaction.get(b"num_examples", b""))
            if not isinstance(num_records, int) or not 0 <= num_records < environment.stat()["entries"]:
                sender.send(f"is not TAPE's LMDB: it says {num_records!r} records and has "
                            f"{environment.stat()['entries']} entries")
                return
            batch: list[bytes | None] = []
            num_bytes = 0
            for index in range(num_records):
                value = transaction.get(str(index).encode())
                batch.append(value)
                num_bytes += len(value or b"")
                if num_bytes > BLOCK_BYTES or len(batch) == _BATCH_RECORDS:
                    sender.send((batch, num_records))
                    batch, num_bytes = [], 0
            if batch:
                sender.send((batch, num_records))
            sender.send((None, num_records))
    except pickle.UnpicklingError:
        sender.send("is not TAPE's LMDB: it has no readable 'num_examples'")
    except lmdb.Error as error:
        sender.send(f"is no readable LMDB ({error}); copy it again")
    except BrokenPipeError:
        pass
