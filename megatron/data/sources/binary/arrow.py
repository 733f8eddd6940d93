"""Arrow with a column of sequences: streams, as HuggingFace's `save_to_disk` writes them, and files (Feather)."""

import mmap
from collections.abc import Iterator
from typing import Any

from megatron.data.sources.binary.columns import check_schema, columns_of
from megatron.data.sources.block import RecordBlock, Wanted
from megatron.data.sources.streams import BLOCK_BYTES
from megatron.errors import DataError

ARROW_FILE_MAGIC = b"ARROW1\0\0"
ARROW_STREAM_MAGIC = b"\xff\xff\xff\xff"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_MAX_BLOCK_RECORDS = 1024


def arrow_blocks(source: str, path: str, wanted: Wanted) -> Iterator[RecordBlock]:
    """The blocks of the wanted columns; raises DataError, naming `source`, if the file at `path` is no good."""
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(f"{source}: is Arrow, which needs: pip install pyarrow") from None
    try:
        # Mapped, a batch as large as the file costs no memory of its own. The map ends with its last batch.
        with open(path, "rb") as file:
            yield from _blocks(source, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), wanted)
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(f"{source}: damaged Arrow ({' '.join(str(error).split())[:200]}); copy it again") from None


def _blocks(source: str, data: mmap.mmap, wanted: Wanted) -> Iterator[RecordBlock]:
    first = 1
    for batch, bytes_read in _batches(source, data, wanted):
        num_records = max(1, min(_MAX_BLOCK_RECORDS, BLOCK_BYTES * len(batch) // max(batch.nbytes, 1)))
        for start in range(0, len(batch), num_records):
            part = batch.slice(start, num_records)
            yield RecordBlock(source, "arrow", columns_of(source, part, wanted), first, bytes_read)
            first += len(part)


def _batches(source: str, data: mmap.mmap, wanted: Wanted) -> Iterator[tuple[Any, int]]:
    """Each record batch with the wanted columns alone, and the bytes of the file up to its end."""
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
            batch.validate(full=True)  # what is damaged could otherwise end the process
            yield batch, buffer.tell()
