"""Reads Arrow with a column of sequences: streams, as HuggingFace's `save_to_disk` writes, and files (Feather)."""

import mmap
from collections.abc import Iterator
from typing import Any

from megatron.data.sources.binary.columns import check_schema, columns_of
from megatron.data.sources.block import RecordBlock, WantedKeys
from megatron.data.sources.streams import BLOCK_BYTES
from megatron.errors import DataError

ARROW_FILE_MAGIC = b"ARROW1\0\0"
ARROW_STREAM_MAGIC = b"\xff\xff\xff\xff"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_MAX_BLOCK_RECORDS = 1024


def arrow_blocks(source: str, path: str, wanted: WantedKeys) -> Iterator[RecordBlock]:
    """The blocks of the wanted columns of the file at `path`; raises DataError, which names `source`."""
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(f"{source}: is Arrow, which needs: pip install pyarrow") from None
    try:
        # Mapped, so that even a batch as large as the file takes no memory. The mapping ends with its last batch.
        with open(path, "rb") as file:
            yield from _blocks(source, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), wanted)
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(f"{source}: damaged Arrow ({' '.join(str(error).split())[:200]}); copy it again") from None


def _blocks(source: str, data: mmap.mmap, wanted: WantedKeys) -> Iterator[RecordBlock]:
    """The record batches, cut into blocks."""
    first = 1
    for batch, bytes_read in _batches(source, data, wanted):
        num_records = max(1, min(_MAX_BLOCK_RECORDS, BLOCK_BYTES * len(batch) // max(batch.nbytes, 1)))
        for start in range(0, len(batch), num_records):
            part = batch.slice(start, num_records)
            yield RecordBlock(source, "arrow", columns_of(source, part, wanted), first, bytes_read)
            first += len(part)


def _batches(source: str, data: mmap.mmap, wanted: WantedKeys) -> Iterator[tuple[Any, int]]:
    """Each record batch, with only the wanted columns, and the number of bytes of the file up to its end."""
    import pyarrow as pa

    is_file = data[:len(ARROW_FILE_MAGIC)] == ARROW_FILE_MAGIC
    if not is_file and data[-len(_END_OF_STREAM):] != _END_OF_STREAM:
        raise DataError(f"{source}: Arrow without the mark that ends a stream: it was cut short, or never closed; copy "
                        "or write it again")
    with pa.BufferReader(pa.py_buffer(data)) as buffer:
        reader = pa.ipc.open_file(buffer) if is_file else pa.ipc.open_stream(buffer)
        check_schema(source, "Arrow", reader.schema, wanted)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            batch = batch.select(list(wanted.columns())) if wanted.keys else batch
            batch.validate(full=True)  # else damaged data could crash the process
            yield batch, buffer.tell()
