"""Checks the columns of a table, and reads the texts in columns of Parquet and Arrow."""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.data.sources.block import BadRecord, RecordBlock, Texts, WantedKeys, collected
from megatron.data.sources.looks import is_name_of_sequences
from megatron.errors import DataError

_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def check_columns(source: str, kind: str, found: Sequence[str], wanted: WantedKeys) -> None:
    """Raises DataError unless each wanted column occurs once among `found`; `kind`: of the file, for messages."""
    for column, flag in wanted.columns().items():
        if found.count(column) == 1:
            continue
        number = f"{found.count(column)} columns" if column in found else "no column"
        others = ", ".join(map(repr, found[:10]))[:200]
        sequences = [name for name in found if is_name_of_sequences(name)]
        advice = f"{flag} names the column"
        if flag == "--json-keys" and len(sequences) == 1:
            advice += f": --json-keys {sequences[0]}"
        raise DataError(f"{source}: is {kind} with {number} {column!r}; it has {others}. {advice}")


def check_schema(source: str, kind: str, schema: Any, wanted: WantedKeys) -> None:
    """Raises DataError unless each wanted column of an Arrow schema occurs once and holds text.

    The column of names may also hold integers.
    """
    import pyarrow as pa

    check_columns(source, kind, schema.names, wanted)
    for column, flag in wanted.columns().items():
        held = schema.field(column).type
        if flag == "--name-key" and pa.types.is_integer(held):
            continue
        held = held.value_type if pa.types.is_dictionary(held) else held
        if str(held) not in _TEXT_TYPES:
            raise DataError(f"{source}: column {column!r} holds {held}; expected text ({', '.join(_TEXT_TYPES)})")


def as_bytes(column: Any) -> list[bytes | None]:
    """The values of an Arrow array of text or integers."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):  # Arrow cannot decode dictionaries of string views
        values = column.dictionary.cast(pa.large_binary())
        column = pa.DictionaryArray.from_arrays(column.indices, values).dictionary_decode()
    column = column.cast(pa.string()) if pa.types.is_integer(column.type) else column
    return column.cast(pa.large_binary()).to_pylist()


def columns_of(source: str, batch: Any, wanted: WantedKeys) -> dict[str, list]:
    """The columns of a record batch, by name: the wanted texts as bytes, or without keys all columns as Python values.
    """
    if wanted.keys:
        return {column: as_bytes(batch.column(column)) for column in wanted.columns()}
    names = batch.schema.names
    check_distinct(source, names)
    return {name: batch.column(number).to_pylist() for number, name in enumerate(names)}


def check_distinct(source: str, names: Sequence[str]) -> None:
    """Raises DataError if two columns have the same name."""
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise DataError(f"{source}: has two columns {twice[0]!r}; rename one of them")


def parse_columns(block: RecordBlock, key: str) -> Texts:
    """The texts in column `key`; a null is a bad record."""
    column = block.records[key]
    if None not in column:
        return Texts(column)
    null = BadRecord("not a string", f"{key!r} is null")
    return collected(block, ((number, null if text is None else text)
                             for number, text in enumerate(column, start=block.first)))


def records_in_columns(block: RecordBlock) -> Iterator[tuple[int, Any]]:
    """The number of each row, and its values by column."""
    rows = zip(*block.records.values(), strict=True)
    return enumerate((dict(zip(block.records, row, strict=True)) for row in rows), start=block.first)
