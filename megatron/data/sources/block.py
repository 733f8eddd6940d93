"""What every reader gets and gives: the beginning of a file, what is wanted of it, and blocks of whole records.

One process cuts the blocks; any may parse them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron.data.sources.streams import InputStream, Lookahead


@dataclass(frozen=True)
class Wanted:
    """The keys, or columns, of each record's texts and, if given, of its name; kinds without keys have one text.

    Without keys whole records are wanted, for `source.records_of`.
    """

    keys: tuple[str, ...]
    name_key: str | None = None

    def columns(self) -> dict[str, str]:
        """Every column that is read, each with the flag that names it."""
        flags = dict.fromkeys(self.keys, "--json-keys")
        return flags if self.name_key is None else {self.name_key: "--name-key", **flags}


@dataclass
class Contents:
    """A file that is open and unpacked. `path`: where it lies unpacked on the disk, if it does.

    line: the number of the line, from 1, with which `chunks` begin, where these are text.
    """

    stream: InputStream
    chunks: Lookahead
    path: str | None
    line: int = 1

    @property
    def source(self) -> str:
        """The file, as messages name it."""
        return self.stream.path


@dataclass(frozen=True)
class RecordBlock:
    """Whole records of one file, still unparsed.

    kind: a key of `kinds.FORMATS`. records: bytes of text, or what the kind's reader makes. first: the number, from 1,
    of the first line (text) or record (others). bytes_read: of its file so far. begins_file: is it the first of its
    file, or of one in a tar?
    """

    source: str
    kind: str
    records: Any
    first: int
    bytes_read: int
    begins_file: bool = False


@dataclass(frozen=True)
class BadRecord:
    """A record that holds no protein: why, for the counts, and one line that names file, place and finding."""

    reason: str
    message: str


@dataclass
class Texts:
    """The text of each record of a block, in order; that of a bad one is empty."""

    texts: list[bytes]
    bad: dict[int, BadRecord] = field(default_factory=dict)
    num_blank_lines: int = 0


def texts_of(block: RecordBlock, text_of: Callable[[Any], bytes | BadRecord]) -> Texts:
    """What `text_of` finds in each record of a block, where these are counted one by one."""
    found = Texts([])
    for index, record in enumerate(block.records):
        text = text_of(record)
        if isinstance(text, BadRecord):
            found.bad[index] = BadRecord(text.reason, f"{block.source}: record {block.first + index}: {text.message}")
            text = b""
        found.texts.append(text)
    return found


def type_name(value: Any) -> str:
    """What messages call the type of a record's value."""
    return "null" if value is None else type(value).__name__
