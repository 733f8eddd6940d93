"""Reads the files in a tar archive in order, as a stream, without unpacking it to the disk."""

import tarfile
from collections.abc import Iterator
from typing import Any

from megatron.data.sources.block import Contents
from megatron.data.sources.streams import Lookahead
from megatron.errors import DataError

_APPLE_DOUBLE = "._"  # prefix of the metadata files that macOS adds
_BUFFER_BYTES = 1 << 18


def is_tar(head: bytes) -> bool:
    """Whether `head` begins with the header of a tar archive's first member."""
    try:
        tarfile.TarInfo.frombuf(head[:tarfile.BLOCKSIZE], tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def members(contents: Contents) -> Iterator[tuple[str, Any]]:
    """The name and the open file of each member; read it before asking for the next one.

    Raises DataError for links and devices, for damage, and for data after the end of the archive.
    """
    data = _CountedBytes(contents.chunks)
    try:
        with tarfile.open(fileobj=data, mode="r|", bufsize=_BUFFER_BYTES) as archive:  # type: ignore
            while member := archive.next():
                name = f"{contents.source}/{' '.join(member.name.split())}"
                if member.isdir() or name.rpartition("/")[2].startswith(_APPLE_DOUBLE):
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(f"{name}: is a link, a device or sparse; unpack the archive and name the files")
                yield name, archive.extractfile(member)
                archive.members.clear()  # tarfile collects all members, and there may be millions
            end = archive.offset
    except tarfile.TarError as error:
        raise DataError(f"{contents.source}: damaged or truncated tar ({error}); copy it again") from None
    # tarfile takes a damaged header, and a truncated archive, for a regular end.
    data.drain()
    if data.end > end or data.position < end + tarfile.BLOCKSIZE:
        raise DataError(f"{contents.source}: damaged or truncated tar, or several in a row (it does not end at byte "
                        f"{end}); copy it again, or unpack it and name the files")


class _CountedBytes:
    """A file-like view of chunks. `position`: bytes read so far; `end`: the position after the last nonzero byte."""

    def __init__(self, chunks: Lookahead) -> None:
        self._chunks, self._held = iter(chunks), memoryview(b"")
        self.position = self.end = 0

    def read(self, size: int) -> bytes:
        """At most `size` bytes; b"" at the end."""
        while not self._held and (chunk := next(self._chunks, None)) is not None:
            self._held = memoryview(chunk)
        data, self._held = bytes(self._held[:size]), self._held[size:]
        filled = len(data.rstrip(b"\0"))
        self.end = self.position + filled if filled else self.end
        self.position += len(data)
        return data

    def drain(self) -> None:
        """Read to the end."""
        while self.read(_BUFFER_BYTES):
            pass
