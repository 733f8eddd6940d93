"""Reads CSVs, TSVs and lists, compressed or not, and writes CSVs."""

import csv
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron.data.sources.looks import HEAD_BYTES, delimiter_of
from megatron.data.sources.streams import InputStream, decoded, unpacked
from megatron.errors import DataError
from megatron.files import replacing

_ANY_BYTES = "surrogateescape"  # how bytes that are not UTF-8 are kept


@dataclass(frozen=True)
class TextTable:
    """The contents of a file as text: columns, rows, and the line number (from 1) at which each row ends.

    Bytes that are not UTF-8, as in files of Excel, are surrogate escapes in `columns` and `rows`, so that `write_csv`
    writes them as they were; `names`, `column` and `needed` give them as readable text.
    `digest`: of the file as stored, which may be compressed. `uneven`: by row index from 0, what is wrong with the
    number of fields.
    """

    path: Path
    columns: list[str]
    rows: list[list[str]]
    lines: list[int] = field(repr=False)
    digest: str
    uneven: dict[int, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return [_readable(name) for name in self.columns]

    def column(self, name: str) -> list[str] | None:
        """The values of a column; None if there is no column of that name."""
        if name not in self.names:
            return None
        at = self.names.index(name)
        return [_readable(row[at]) for row in self.rows]

    def needed(self, name: str, remedy: str = "name one so") -> list[str]:
        """As `column`, but raises DataError, which ends in `remedy`, if there is no column of that name."""
        found = self.column(name)
        if found is None:
            raise DataError(f"{self.path}: line 1: there is no column {name!r} among {', '.join(self.names)}; "
                            f"{remedy}")
        return found


def read_csv(path: Path, takes_uneven: bool = False) -> TextTable:
    """Read a CSV or TSV with a header, ignoring blank lines; raises DataError.

    The delimiter (comma, semicolon or tab) is detected from the first lines, as in preprocessing. `takes_uneven`: cut
    or fill up rows with more or fewer fields than the header, and record them in `uneven`; otherwise they are an error.
    """
    text, digest = _text(path)
    delimiter = (delimiter_of("\n".join(text[:HEAD_BYTES].splitlines()).encode(errors=_ANY_BYTES)) or b",").decode()
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    columns, rows, lines, uneven = list[str](), list[list[str]](), list[int](), dict[int, str]()
    try:
        for row in reader:
            if not row:
                continue
            if not columns:
                columns = [name.strip() for name in row]
                continue
            if len(row) != len(columns):
                finding = f"has {len(row)} fields, and the header {len(columns)}"
                if delimiter == "," and len(row) > len(columns):
                    finding += " (a number with a decimal comma counts as two: write a point)"
                if not takes_uneven:
                    raise DataError(f"{path}: line {reader.line_num}: {finding}")
                uneven[len(rows)] = finding
                row = [*row, *[""] * len(columns)][:len(columns)]
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: is no CSV ({error})") from None
    return TextTable(path, columns, rows, lines, digest, uneven)


def read_list(path: Path, names: Sequence[str]) -> TextTable:
    """Read a file with one word per line as a table with one column, ignoring blank lines; raises DataError.

    The column has the first of `names`, unless the first line is another of them: then that is its header.
    """
    text, digest = _text(path)
    found = [(line.strip(), number) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    name = names[0]
    if found[0][0] in names:
        name, found = found[0][0], found[1:]
    return TextTable(path, [name], [[line] for line, _ in found], [number for _, number in found], digest)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(_as_csv([columns, *rows]).encode(errors=_ANY_BYTES))


def has_header(path: Path, columns: Sequence[str]) -> bool:
    """Whether a file of any kind begins with the header that `write_csv` writes for these columns."""
    header = _as_csv([columns]).encode(errors=_ANY_BYTES)
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _readable(text: str) -> str:
    """Text with its surrogate escapes read as Windows-1252."""
    return decoded(text.encode(errors=_ANY_BYTES))


def _as_csv(rows: Iterable[Sequence[str]]) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def _text(path: Path) -> tuple[str, str]:
    """The decompressed text of a file, and a digest of the file as stored."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    digest = hashlib.sha256()
    stream = InputStream(str(path), digest=digest)
    try:
        content = b"".join(unpacked(stream))
        stream.drain()
    finally:
        stream.close()
    if b"\0" in content:
        raise DataError(f"{path}: is binary or UTF-16; save it as text in UTF-8")
    text = content.decode("utf-8-sig", errors=_ANY_BYTES)
    if not text.strip():
        raise DataError(f"{path}: is empty")
    return text, digest.hexdigest()
