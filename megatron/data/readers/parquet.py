"""Parquet with a column of sequences."""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.data.indexed import DataError
from megatron.data.readers.block import BadRecord, Block, Texts

PARQUET_MAGIC = b"PAR1"
_BATCH_RECORDS = 1024
_BUFFER_BYTES = 1 << 20


def parquet_blocks(source: str, path: str, keys: Sequence[str]) -> Iterator[Block]:
    """The blocks of the columns `keys` of the file at `path`; raises DataError, naming `source`, if it is no good."""
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
            _check_columns(source, file.schema_arrow, keys)
            num_records = max(file.metadata.num_rows, 1)
            with open(path, "rb") as whole:
                size = whole.seek(0, 2)
            for batch in file.iter_batches(_BATCH_RECORDS, columns=list(keys), use_threads=False):
                columns = {key: batch.column(key).cast(pa.large_binary()).to_pylist() for key in keys}
                yield Block(source, "parquet", columns, first, size * (first - 1 + len(batch)) // num_records)
                first += len(batch)
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


def _check_columns(source: str, schema: Any, keys: Sequence[str]) -> None:
    import pyarrow as pa

    for key in keys:
        if key not in schema.names:
            raise DataError(f"{source}: no column {key!r}; it has {', '.join(schema.names[:10])}. "
                            "--json-keys names the column")
        kind = schema.field(key).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
        if not any(is_text(kind) for is_text in texts):
            raise DataError(f"{source}: column {key!r} holds {kind}; expected text")
