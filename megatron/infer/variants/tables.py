"""Tables as files: CSVs, TSVs and lists that are read, plain or packed, and CSVs that are written whole."""

import csv
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron.data.sources.streams import InputStream, unpacked
from megatron.data.sources.text.looks import HEAD_BYTES, delimiter_of
from megatron.errors import DataError
from megatron.files import write_text


@dataclass(frozen=True)
class TextTable:
    """What a file holds, as text: rows under their columns, and of each row the line where it ends, from 1.

    `digest` is that of the file, as it lies on the disk. `uneven`: what is wrong with the fields of rows, by their
    numbers from 0.
    """

    path: Path
    columns: list[str]
    rows: list[list[str]]
    lines: list[int] = field(repr=False)
    digest: str
    uneven: dict[int, str] = field(default_factory=dict)

    def column(self, name: str) -> list[str] | None:
        """What stands in a column; None where there is none of that name."""
        if name not in self.columns:
            return None
        at = self.columns.index(name)
        return [row[at] for row in self.rows]

    def needed(self, name: str) -> list[str]:
        """The same; raises DataError where there is none."""
        found = self.column(name)
        if found is None:
            raise DataError(f"{self.path}: line 1: there is no column {name!r} among {', '.join(self.columns)}; name "
                            "one so")
        return found


def read_csv(path: Path, takes_uneven: bool = False) -> TextTable:
    """A CSV or TSV with a header; blank lines are left out. Raises DataError.

    What parts its fields (a comma, a semicolon, a tab) is told from its first lines, as preprocessing tells it.
    `takes_uneven`: whether rows of more or fewer fields than the header has are cut or filled up, and told of.
    """
    text, digest = _text(path)
    delimiter = (delimiter_of("\n".join(text[:HEAD_BYTES].splitlines()).encode()) or b",").decode()
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


def read_list(path: Path, name: str) -> TextTable:
    """A file with one word a line as a table of one column; blank lines are left out. Raises DataError."""
    text, digest = _text(path)
    found = [(line.strip(), number) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    return TextTable(path, [name], [[line] for line, _ in found], [number for _, number in found], digest)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A CSV, whole or not at all."""
    write_text(path, _as_csv([columns, *rows]))


def has_header(path: Path, columns: Sequence[str]) -> bool:
    """Whether a file, which may be anything, begins as `write_csv` begins one of these columns."""
    header = _as_csv([columns])
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return file.read(len(header)) == header


def _as_csv(rows: Iterable[Sequence[str]]) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def _text(path: Path) -> tuple[str, str]:
    """What a file holds, unpacked, and the digest of the file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    digest = hashlib.sha256()
    stream = InputStream(str(path), digest=digest)
    try:
        content = b"".join(unpacked(stream))
        stream.drain()
    finally:
        stream.close()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line}: is not UTF-8 text") from None
    if not text.strip():
        raise DataError(f"{path}: is empty")
    return text, digest.hexdigest()
