"""What every reader hands on: blocks of whole records, cut by one process and parsed by any."""

from dataclasses import dataclass, field
from typing import Any

BLOCK_BYTES = 1 << 21
MAX_RECORD_BYTES = 1 << 26


@dataclass(frozen=True)
class Block:
    """Whole records of one file, still unparsed.

    kind: json, fasta, strings, lmdb or parquet. records: bytes of text, or what the kind's reader makes.
    first: the number, from 1, of the first line (text) or record (others). bytes_read: of its file so far.
    """

    source: str
    kind: str
    records: Any
    first: int
    bytes_read: int


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
