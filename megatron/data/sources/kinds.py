"""Every known kind of file: how its first bytes identify it, and how to read it or what to do instead.

A readable kind gives blocks in one of the FORMATS, which say how to parse them.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from tempfile import NamedTemporaryFile
from typing import Any

from megatron.data.sources import looks, tar
from megatron.data.sources.binary.arrow import ARROW_FILE_MAGIC, ARROW_STREAM_MAGIC, arrow_blocks
from megatron.data.sources.binary.columns import parse_columns, records_in_columns
from megatron.data.sources.binary.parquet import PARQUET_MAGIC, parquet_blocks
from megatron.data.sources.binary.tape_lmdb import (
    LMDB_MAGIC,
    LMDB_MAGIC_OFFSET,
    lmdb_blocks,
    parse_lmdb,
    records_in_lmdb,
)
from megatron.data.sources.block import BadRecord, Contents, RecordBlock, Texts, WantedKeys
from megatron.data.sources.streams import GZIP_MAGIC, ZSTD_MAGICS, InputStream, Lookahead, unpacked, with_unix_line_ends
from megatron.data.sources.text import delimited, json_array, records
from megatron.errors import DataError

EXPECTED = "proteins as JSON lines, FASTA, CSV or TSV, one a line, LMDB, Parquet or Arrow"
_UTF8_MARK = b"\xef\xbb\xbf"
_FASTA_WITH_LF = re.compile(rb"\s*[>;#][^\r\n]*\r?\n")  # then a CR alone does not end a line


@dataclass(frozen=True)
class RecordFormat:
    """The functions that parse blocks of one kind into texts or whole records, with numbers by which to find them."""

    texts: Callable[[RecordBlock, str], Texts]  # the texts under a key
    records: Callable[[RecordBlock], Iterator[tuple[int, Any]]]  # the number of each record, and it or a BadRecord
    names: Callable[[RecordBlock, str], Iterator[tuple[int, bytes | BadRecord]]] | None = None  # None: by `records`
    place: Callable[[RecordBlock, int, int], str] | None = None  # of a byte in a record's text; None: record and column
    unit: str = "line"  # what the numbers count
    has_keys: bool = True  # whether a record's texts have keys or columns


FORMATS = {
    "json": RecordFormat(records.parse_json, records.records_in_json, None, records.place_in_json),
    "json array": RecordFormat(json_array.parse_json_array, json_array.records_in_json_array, unit="record"),
    "fasta": RecordFormat(records.parse_fasta, records.records_in_fasta, records.headers_in_fasta,
                          records.place_in_fasta, has_keys=False),
    "strings": RecordFormat(records.parse_strings, records.records_in_strings, None, records.place_in_strings,
                            has_keys=False),
    "csv": RecordFormat(delimited.parse_delimited, delimited.records_in_delimited, delimited.fields_in_delimited,
                        delimited.place_in_delimited),
    "lmdb": RecordFormat(parse_lmdb, records_in_lmdb, unit="record"),
    "parquet": RecordFormat(parse_columns, records_in_columns, unit="record"),
    "arrow": RecordFormat(parse_columns, records_in_columns, unit="record"),
}


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name, a test of its first bytes, and either its reader or advice what to do instead."""

    name: str
    begins: Callable[[bytes], Any]
    read: Callable[[Contents, WantedKeys], Iterator[RecordBlock]] | None = None
    instead: str = ""


def blocks_of(stream: InputStream, path: str | None, wanted: WantedKeys) -> Iterator[RecordBlock]:
    """The blocks of an open file, in order; raises DataError if its kind cannot be read or it is damaged.

    path: of the file on the disk, None for standard input or a file in an archive.
    """
    is_packed = stream.peek(4).startswith((GZIP_MAGIC, *ZSTD_MAGICS))
    contents = Contents(stream, Lookahead(unpacked(stream)), None if is_packed else path)
    kind = _kind_of(contents)
    if kind.read is None:
        raise DataError(f"{contents.source}: is {kind.name}{_beginning(contents.chunks.peek(40))}; {kind.instead}")
    for number, block in enumerate(kind.read(contents, wanted)):
        if number == 0:
            _check_format(block, wanted)
        yield replace(block, begins_file=number == 0 or block.begins_file)  # in a tar, of a member


def _beginning(head: bytes) -> str:
    """How a file begins, in words; empty where that is no text."""
    found = head.splitlines()[0].decode(errors="replace")
    is_text = "\ufffd" not in found and found.replace("\t", " ").isprintable()
    return f" (it begins {found!r})" if is_text else ""


def _kind_of(contents: Contents) -> Kind:
    """The first kind whose test the file passes; raises DataError if it is empty.

    For text, `contents` then begin at the first line that is not blank, and have Unix line ends.
    """
    head = contents.chunks.peek(looks.HEAD_BYTES)
    kind = next((kind for kind in BINARY_KINDS if kind.begins(head)), None)
    if kind is None:
        if head.startswith(_UTF8_MARK):
            contents.chunks.skip(len(_UTF8_MARK))
        lone = b"\r" if _FASTA_WITH_LF.match(head.removeprefix(_UTF8_MARK)) else b"\n"
        contents.chunks = Lookahead(with_unix_line_ends(contents.chunks, lone))
        records.skip_blank_lines(contents)
        head = contents.chunks.peek(looks.HEAD_BYTES)
        if not head:
            raise DataError(f"{contents.source}: is empty; expected {EXPECTED}")
        kind = next(kind for kind in TEXT_KINDS if kind.begins(head))
    return kind


def _check_format(block: RecordBlock, wanted: WantedKeys) -> None:
    """Raises DataError if the kind of the block cannot give several texts, or names, that are wanted."""
    form = FORMATS[block.kind]
    if len(wanted.keys) > 1 and not form.has_keys:
        raise DataError(f"{block.source}: is {block.kind} with one text a record, but --json-keys names "
                        f"{len(wanted.keys)}")
    if wanted.name_key and not form.has_keys and form.names is None:
        raise DataError(f"{block.source}: is {block.kind}, one protein a line without a name; --names needs FASTA, "
                        "JSON, CSV, LMDB, Parquet or Arrow")


def _tar_blocks(contents: Contents, wanted: WantedKeys) -> Iterator[RecordBlock]:
    """The blocks of all files in a tar archive; raises DataError."""
    for name, file in tar.members(contents):
        for block in blocks_of(InputStream(name, file), None, wanted):
            yield replace(block, bytes_read=contents.stream.bytes_read)


def _on_disk(read: Callable[[str, str, WantedKeys], Iterator[RecordBlock]]
             ) -> Callable[[Contents, WantedKeys], Iterator[RecordBlock]]:
    """A reader for a kind that needs random access: a compressed file or a pipe is written to a temporary file first.
    """
    def blocks(contents: Contents, wanted: WantedKeys) -> Iterator[RecordBlock]:
        if contents.path is not None:
            yield from read(contents.source, contents.path, wanted)
            return
        try:
            with NamedTemporaryFile() as file:
                file.writelines(contents.chunks)
                file.flush()
                yield from read(contents.source, file.name, wanted)
        except OSError as error:
            raise DataError(f"{contents.source}: no room to unpack it ({error.strerror}); unpack it yourself, or let "
                            "TMPDIR name a folder with room") from None
    return blocks


def _lines(kind: str) -> Callable[[Contents, WantedKeys], Iterator[RecordBlock]]:
    return lambda contents, wanted: records.line_blocks(contents, kind)


def _magic(*starts: bytes, offset: int = 0) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(starts, offset)


def _text(pattern: bytes) -> Callable[[bytes], Any]:
    return re.compile(pattern).match


_UNPACK = "plain, gzip and zstd can be read: unpack it first"
_TO_FASTA = "download it as FASTA, or convert it to FASTA, for example with Biopython's SeqIO.convert"
_SEQUENCES = "give the file of its sequences, as FASTA"

# Tested from top to bottom: BINARY_KINDS on the first bytes after decompression, then TEXT_KINDS on the first bytes
# without leading blank lines and with \n as line end.
BINARY_KINDS = (
    Kind("Parquet", _magic(PARQUET_MAGIC), _on_disk(parquet_blocks)),
    Kind("Arrow", _magic(ARROW_FILE_MAGIC, ARROW_STREAM_MAGIC), _on_disk(arrow_blocks)),
    Kind("TAPE's LMDB", _magic(LMDB_MAGIC, offset=LMDB_MAGIC_OFFSET), _on_disk(lmdb_blocks)),
    Kind("tar", tar.is_tar, _tar_blocks),
    Kind("packed twice", _magic(GZIP_MAGIC, *ZSTD_MAGICS), instead="unpack it once"),
    Kind("packed with xz", _magic(b"\xfd7zXZ\0"), instead=_UNPACK),
    Kind("packed with bzip2", _magic(b"BZh"), instead=_UNPACK),
    Kind("packed with zip (or an office document)", _magic(b"PK\x03\x04"), instead=_UNPACK),
    Kind("packed with 7z", _magic(b"7z\xbc\xaf"), instead=_UNPACK),
    Kind("PDF", _magic(b"%PDF-"), instead=_SEQUENCES),
    Kind("HDF5", _magic(b"\x89HDF"), instead="write its sequences as FASTA or Parquet"),
    Kind("SQLite", _magic(b"SQLite format 3\0"), instead="write its sequences as FASTA or CSV"),
    Kind("a NumPy array", _magic(b"\x93NUMPY"), instead="write its sequences as FASTA"),
    Kind("an indexed dataset already", _magic(b"MMIDIDX\0", b"TNTIDX\0"), instead="--data-path of training takes it"),
    Kind("UTF-16 text", _magic(b"\xff\xfe", b"\xfe\xff"), instead="expected ASCII or UTF-8: convert it first"),
)
TEXT_KINDS = (
    Kind("a JSON array", _text(rb"\[\s*\{"), json_array.json_array_blocks),
    Kind("a JSON array of no objects", _text(rb"\[\s*[\[\"]"), instead="expected objects, one a line or in one array"),
    Kind("JSON over several lines", _text(rb"\{[ \t]*\n"), instead="expected one object a line, as jq -c . makes it"),
    Kind("loose JSON", _text(rb"\{(?!\\rtf)"), _lines("json")),
    Kind("PIR", _text(rb">(P1|F1|DL|DC|RL|RC|N1|N3|XX);"), instead=_TO_FASTA),
    Kind("a Stockholm alignment", _text(rb"# *STOCKHOLM"), instead=_TO_FASTA),
    Kind("a NEXUS alignment", _text(rb"(?i)#NEXUS"), instead=_TO_FASTA),
    Kind("GFF or VCF", _text(rb"##(gff-version|fileformat)"), instead=_SEQUENCES),
    Kind("FASTA", _text(rb"[>;#]"), records.fasta_blocks),  # lines with ; or # are comments
    Kind("UniProt or EMBL text", _text(rb"ID   "), instead=_TO_FASTA),
    Kind("GenBank", _text(rb"LOCUS {2}"), instead=_TO_FASTA),
    Kind("a Clustal alignment", _text(rb"(CLUSTAL|MUSCLE|PROBCONS)[ \t]"), instead=_TO_FASTA),
    Kind("a PHYLIP alignment", _text(rb"\d+[ \t]+\d+[ \t]*\n"), instead=_TO_FASTA),
    Kind("an MSF alignment", _text(rb"!![AN]A_MULTIPLE|PileUp"), instead=_TO_FASTA),
    Kind("a HMMER profile", _text(rb"HMMER\d"), instead=_SEQUENCES),
    Kind("PDB", _text(rb"(HEADER|TITLE |COMPND|REMARK|CRYST1|MODEL |ATOM  |HETATM)[ \d].*\n"
                      rb"(OBSLTE|TITLE |SPLIT |CAVEAT|COMPND|SOURCE|EXPDTA|AUTHOR|REMARK|SEQRES|MODEL |ATOM  |HETATM)"),
         instead=_SEQUENCES),
    Kind("mmCIF", _text(rb"data_\S*\n"), instead=_SEQUENCES),
    Kind("FASTQ", _text(rb"@.*\n[A-Za-z.*-]+\n\+"), instead="its nucleotides are no proteins: translate them to FASTA"),
    Kind("SAM", _text(rb"@(HD|SQ|RG|PG|CO)\t"), instead=_SEQUENCES),
    Kind("an HTML page", _text(rb"(?i)<(!doctype html|html|head|body)"),
         instead="perhaps an error page in place of the file: download it again"),
    Kind("UniProt XML", _text(rb"(?s)<.*<uniprot\b"), instead=_TO_FASTA),
    Kind("XML", _text(rb"<[?!\w]"), instead=_TO_FASTA),
    Kind("a pointer of Git LFS", _text(rb"version https://git-lfs"), instead="git lfs pull fetches the file itself"),
    Kind("CSV or TSV", looks.delimiter_of, delimited.delimited_blocks),
    Kind("one protein a line", looks.is_one_a_line, _lines("strings")),
    Kind("binary data of a kind not known here", re.compile(rb"[\x00-\x08\x0e-\x1f]").search,
         instead=f"expected {EXPECTED}"),
    Kind("text of another kind", _text(b""), instead=f"expected {EXPECTED}"),
)
