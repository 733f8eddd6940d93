"""The types that all readers share: what to read of a file, blocks of whole records, and the texts in them.

One process cuts a file into blocks; any process may parse them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron.data.sources.streams import InputStream, Lookahead


@dataclass(frozen=True)
class WantedKeys:
    """The keys (or columns) to read: those of each record's texts and, if given, of its name.

    Kinds without keys, such as FASTA, have one text a record. Empty `keys` means whole records, for
    `source.records_of`.
    """

    keys: tuple[str, ...]
    name_key: str | None = None

    def columns(self) -> dict[str, str]:
        """Every key that is read, with the flag that names it."""
        flags = dict.fromkeys(self.keys, "--json-keys")
        return flags if self.name_key is None else {self.name_key: "--name-key", **flags}


@dataclass
class Contents:
    """An open file, with its decompressed content."""

    stream: InputStream  # the file as it is on the disk
    chunks: Lookahead  # its decompressed content
    path: str | None  # the path of the decompressed file, if it is on the disk
    line: int = 1  # for text: the number, from 1, of the line at which `chunks` begin

    @property
    def source(self) -> str:
        """The file's name, for messages."""
        return self.stream.path


@dataclass(frozen=True)
class RecordBlock:
    """Whole records of one file, not parsed yet."""

    source: str  # the file, for messages
    kind: str  # a key of `kinds.FORMATS`
    records: Any  # bytes of text, or what the kind's reader makes
    first: int  # the number, from 1, of the first line (text) or record (other kinds)
    bytes_read: int  # of the file, up to the end of this block
    begins_file: bool = False  # whether it is the first block of its file, or of a file in a tar archive


@dataclass(frozen=True)
class BadRecord:
    """A record that is not a protein.

    `reason`: the category that it is counted under; `message`: one line with file, place and finding.
    """

    reason: str
    message: str


@dataclass
class Texts:
    """The texts of a block's records, in order; `bad`: by index, those that are bad, whose text is empty."""

    texts: list[bytes]
    bad: dict[int, BadRecord] = field(default_factory=dict)
    num_blank_lines: int = 0


def texts_of(block: RecordBlock, text_of: Callable[[Any], bytes | BadRecord]) -> Texts:
    """The texts that `text_of` finds in the records of a block that is a sequence of records."""
    found = Texts([])
    for index, record in enumerate(block.records):
        text = text_of(record)
        if isinstance(text, BadRecord):
            found.bad[index] = BadRecord(text.reason, f"{block.source}: record {block.first + index}: {text.message}")
            text = b""
        found.texts.append(text)
    return found


def type_name(value: Any) -> str:
    """The name of a value's type, for messages."""
    return "null" if value is None else type(value).__name__
