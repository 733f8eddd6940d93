"""The types that all readers share: what to read of a file, blocks of whole records, and the texts in them.

One process cuts a file into blocks; any process may parse them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron.data.sources.streams import InputStream, Lookahead

DEFAULT_NAME_KEY = "id"
SEQUENCE_KEY = "sequence"  # for files without keys


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


def collected(block: RecordBlock, found: Iterable[tuple[int, bytes | BadRecord]], unit: str = "record") -> Texts:
    """The texts `found` in a block, each with the number of its `unit`, a record or a line, in the file."""
    parsed = Texts([])
    for number, text in found:
        if isinstance(text, BadRecord):
            parsed.bad[len(parsed.texts)] = BadRecord(text.reason, f"{block.source}: {unit} {number}: {text.message}")
            text = b""
        parsed.texts.append(text)
    return parsed


def text_under(value: Any, key: str) -> bytes | BadRecord:
    """The string or bytes under `key` of a record, which should be a dict, or a BadRecord, as `value` may be one."""
    if isinstance(value, BadRecord):
        return value
    if not isinstance(value, dict):
        return BadRecord("bad JSON", f"{type_name(value)} where a JSON object belongs")
    if key not in value:
        found = ", ".join(repr(other)[:40] for other in list(value)[:5]) or "nothing"
        return BadRecord("missing key", f"no key {key!r}; it has {found}. --json-keys names the keys")
    text = value[key]
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        return BadRecord("not a string", f"{key!r} is of type {type_name(text)}; expected a string of residues")
    return text.encode(errors="replace")


def type_name(value: Any) -> str:
    """The name of a value's type, for messages."""
    return "null" if value is None else type(value).__name__
