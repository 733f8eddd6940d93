"""Converts files of proteins to JSON lines, one `{"text": "MKV…"}` a line."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.config.command_line import OneLineParser
from megatron.data.sources.source import expand, texts_of
from megatron.errors import DataError
from megatron.files import replacing
from megatron.log import exit_status, number_of

_WHITE_SPACE = b" \t\n\r\v\f"


def convert(patterns: Sequence[str], output: str, kind: str) -> int:
    """Write the proteins of files of one `kind` to `output` (`-`: standard output); returns their number.

    Raises DataError for a file of another kind and for the first bad record, and leaves `output` unchanged then. Raises
    it also if `output` exists and is not JSON: most likely the user forgot the output, and it is an input.
    """
    lines = _lines(patterns, kind)
    if output == "-":
        return _write(lines, sys.stdout.fileno())
    try:
        if os.path.isfile(output) and (found := _first_byte(output)) not in (b"", b"{"):
            raise DataError(f"{output}: is there already and holds no JSON lines (it begins {found!r}); the output is "
                            "the last file named: name a new one, or remove this")
        with replacing(Path(output)) as temporary, open(temporary, "wb") as file:
            return _write(lines, file.fileno())
    except OSError as error:  # of the output: readers raise DataError
        raise DataError(f"{output}: cannot be written ({error.strerror or error}); name another output") from None


def main(kind: str, description: str) -> int:
    """The command line of a conversion tool for files of one `kind`; returns the exit status."""
    parser = OneLineParser(description=description)
    parser.add_argument("input", nargs="+", help="files, plain, gzip or zstd; - is standard input")
    parser.add_argument("output", help="file of JSON lines; - is standard output")

    def work() -> None:
        given = parser.parse_args()
        print(number_of(convert(given.input, given.output, kind), "protein"), file=sys.stderr)

    return exit_status(work)


def _lines(patterns: Sequence[str], kind: str) -> Iterator[list[bytes]]:
    """The JSON lines of each block of the files; raises DataError."""
    for source in expand(patterns):
        for block in source.blocks(("text",)):
            if block.kind != kind:
                raise DataError(f"{source.path}: is {block.kind}, not {kind}; preprocess_data.py reads it directly")
            parsed = texts_of(block, "text")
            for bad in parsed.bad.values():
                raise DataError(bad.message)
            texts = (text.translate(None, _WHITE_SPACE).decode("utf-8", errors="replace") for text in parsed.texts)
            yield [json.dumps({"text": text}).encode() + b"\n" for text in texts]


def _first_byte(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(1)


def _write(batches: Iterator[list[bytes]], descriptor: int) -> int:
    """Write lines to an open file; returns their number."""
    count = 0
    with open(descriptor, "wb", closefd=False) as file:
        for lines in batches:
            file.writelines(lines)
            count += len(lines)
    return count
