"""Parquet with a column of sequences."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.data.sources.block import BLOCK_BYTES, BadRecord, Block, Texts
from megatron.errors import DataError

PARQUET_MAGIC = b"PAR1"
_MAX_BATCH_RECORDS = 1024
_BUFFER_BYTES = 1 << 20


def parquet_blocks(source: str, path: str, keys: Sequence[str], name_key: str | None) -> Iterator[Block]:
    """The blocks of the columns `keys` and, if given, `name_key`; raises DataError, naming `source`, if it is no good.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{source}: is Parquet, which needs: pip install pyarrow") from None
    first = 1
    try:
        # Reading through a small buffer keeps the memory independent of the size of a row group.
        with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False,
                            page_checksum_verification=True) as file:
            names = [name_key] if name_key and name_key not in keys else []
            _check_columns(source, file.schema_arrow, keys, names)
            columns = [*keys, *names]
            num_records = file.metadata.num_rows
            size = os.path.getsize(path)
            for batch in file.iter_batches(_batch_records(file.metadata), columns=columns, use_threads=False):
                records = {column: _as_bytes(batch.column(column)) for column in columns}
                num_read = first - 1 + len(batch)
                yield Block(source, "parquet", records, first, size * num_read // max(num_records, 1))
                first += len(batch)
            if first - 1 != num_records:
                raise DataError(f"{source}: damaged Parquet ({first - 1} records where it says {num_records}); copy it "
                                "again")
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(f"{source}: damaged Parquet ({' '.join(str(error).split())[:200]}); copy it again") from None


def parse_parquet(block: Block, key: str) -> Texts:
    """The column `key`; a null is a bad record."""
    column = block.records[key]
    if None not in column:
        return Texts(column)
    bad = {index: BadRecord("not a string", f"{block.source}: record {block.first + index}: {key!r} is null")
           for index, text in enumerate(column) if text is None}
    return Texts([text or b"" for text in column], bad)


def _batch_records(metadata: Any) -> int:
    """Records a batch, so that one of long texts takes no more memory than one of short ones.

    Asking for the columns' own sizes would end the process where these are damaged.
    """
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    longest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    return max(1, min(_MAX_BATCH_RECORDS, BLOCK_BYTES // max(longest, 1)))


def _as_bytes(column: Any) -> list[bytes | None]:
    import pyarrow as pa

    column = column.cast(pa.string()) if pa.types.is_integer(column.type) else column
    return column.cast(pa.large_binary()).to_pylist()


def _check_columns(source: str, schema: Any, keys: Sequence[str], names: Sequence[str]) -> None:
    """`names` are columns that may hold whole numbers instead of text."""
    import pyarrow as pa

    for key in (*keys, *names):
        flag = "--name-key" if key in names else "--json-keys"
        if schema.names.count(key) != 1:
            found = f"{schema.names.count(key)} columns" if key in schema.names else "no column"
            others = ", ".join(map(repr, schema.names[:10]))[:200]
            raise DataError(f"{source}: {found} {key!r}; it has {others}. {flag} names the column")
        kind = schema.field(key).type
        if key in names and pa.types.is_integer(kind):
            continue
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
        if not any(is_text(kind) for is_text in texts):
            raise DataError(f"{source}: column {key!r} holds {kind}; expected text")
