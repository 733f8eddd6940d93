"""Reads Parquet with a column of sequences."""

import os
from collections.abc import Iterator
from typing import Any

from megatron.data.sources.binary.columns import check_schema, columns_of
from megatron.data.sources.block import RecordBlock, WantedKeys
from megatron.data.sources.streams import BLOCK_BYTES
from megatron.errors import DataError

PARQUET_MAGIC = b"PAR1"
_MAX_BATCH_RECORDS = 1024
_BUFFER_BYTES = 1 << 20


def parquet_blocks(source: str, path: str, wanted: WantedKeys) -> Iterator[RecordBlock]:
    """The blocks of the wanted columns of the file at `path`; raises DataError, which names `source`."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{source}: is Parquet, which needs: pip install pyarrow") from None
    first = 1
    try:
        # Opened here, since pyarrow cannot open a path that is not UTF-8. With a small buffer, memory does not grow
        # with the size of a row group.
        with open(path, "rb") as opened, pq.ParquetFile(opened, buffer_size=_BUFFER_BYTES, pre_buffer=False,
                                                        page_checksum_verification=True) as file:
            check_schema(source, "Parquet", file.schema_arrow, wanted)
            columns = list(wanted.columns()) or None
            num_records = file.metadata.num_rows
            size = os.path.getsize(path)
            for batch in file.iter_batches(_batch_records(file.metadata), columns=columns, use_threads=False):
                num_read = first - 1 + len(batch)
                yield RecordBlock(source, "parquet", columns_of(source, batch, wanted), first,
                                  size * num_read // max(num_records, 1))
                first += len(batch)
            if first - 1 != num_records:
                raise DataError(f"{source}: damaged Parquet ({first - 1} records where it says {num_records}); copy it "
                                "again")
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(f"{source}: damaged Parquet ({' '.join(str(error).split())[:200]}); copy it again") from None


def _batch_records(metadata: Any) -> int:
    """The number of records to read at once, fewer if they are long, to limit the memory.

    Uses the sizes of row groups, because asking for those of columns can crash the process if they are damaged.
    """
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    longest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    return max(1, min(_MAX_BATCH_RECORDS, BLOCK_BYTES // max(longest, 1)))
