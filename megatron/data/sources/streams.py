"""Reads a file or standard input, decompresses it, normalises line ends, and cuts it into blocks of whole records."""

import gzip
import io
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from megatron.errors import DataError

BLOCK_BYTES = 1 << 21
MAX_RECORD_BYTES = 1 << 26
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18")  # a frame; a skippable frame, as pzstd begins with
_CHUNK_BYTES = 1 << 20
# Zstandard decompresses all it is given at once, up to some 30,000 times as much, so small portions limit the memory.
_ZSTD_BITE_BYTES = 1 << 12


class InputStream(io.RawIOBase):
    """A binary file (`-`: standard input) with lookahead, which counts and hashes the bytes that it reads.

    `file`: an open file to read in place of `path`, which then is only for messages; `digest`: a hash to update with
    every byte. Opening and reading raise DataError.
    """

    def __init__(self, path: str, file: Any = None, digest: Any = None) -> None:
        self.path = path
        self._file: Any = None  # `close` is called even if opening fails
        try:
            self._file = file or (sys.stdin.buffer if path == "-" else open(path, "rb"))  # noqa: SIM115
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); give files of proteins") from None
        self._head = b""
        self._digest = digest
        self.bytes_read = 0

    def peek(self, size: int) -> bytes:
        """The next `size` bytes (fewer at the end of the file), without consuming them."""
        while len(self._head) < size and (more := self._take(size - len(self._head))):
            self._head += more
        return self._head[:size]

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; none at the end."""
        if self._head:
            size = len(self._head) if size < 0 else size
            taken, self._head = self._head[:size], self._head[size:]
            return taken
        return self._take(size)

    def readable(self) -> bool:
        """True; decompressors ask."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with one read; returns the number of bytes."""
        data = self.read(len(buffer))
        buffer[:len(data)] = data
        return len(data)

    def drain(self) -> None:
        """Read to the end, so that the digest covers every byte."""
        while self.read(_CHUNK_BYTES):
            pass

    def close(self) -> None:
        """Close the file; standard input stays open."""
        if self.path != "-" and self._file is not None:
            self._file.close()
        super().close()

    def _take(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{self.path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
        if self._digest is not None:
            self._digest.update(data)
        self.bytes_read += len(data)
        return data


class Lookahead:
    """An iterator over chunks of bytes with lookahead."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._held = bytearray()

    def peek(self, size: int) -> bytes:
        """The next `size` bytes (fewer only at the end of the chunks), without consuming them."""
        while len(self._held) < size and self._take():
            pass
        return bytes(self._held[:size])

    def skip(self, size: int) -> None:
        """Drop the next `size` bytes, which `peek` has returned."""
        del self._held[:size]

    def skip_line(self) -> None:
        """Drop everything before the next line."""
        while (end := self._held.find(b"\n")) < 0:
            self._held.clear()
            if not self._take():
                return
        del self._held[:end + 1]

    def __iter__(self) -> Iterator[bytes]:
        if self._held:
            held, self._held = bytes(self._held), bytearray()
            yield held
        yield from self._chunks

    def _take(self) -> bool:
        chunk = next(self._chunks, None)
        self._held += chunk or b""
        return chunk is not None


def unpacked(stream: InputStream) -> Iterator[bytes]:
    """The content of a stream in chunks, decompressed if it is gzip or zstd; raises DataError if it is damaged."""
    head = stream.peek(4)
    if head.startswith(GZIP_MAGIC):
        return _gzip_chunks(stream)
    if head.startswith(ZSTD_MAGICS):
        return _zstd_chunks(stream)
    return iter(lambda: stream.read(_CHUNK_BYTES), b"")


def with_unix_line_ends(chunks: Iterable[bytes], lone: bytes = b"\n") -> Iterator[bytes]:
    """The chunks with each CR LF replaced by LF, and each CR alone by `lone`."""
    held = b""
    for chunk in chunks:
        if held or b"\r" in chunk:
            chunk, held = held + chunk, b""
            if chunk.endswith(b"\r"):
                chunk, held = chunk[:-1], b"\r"
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", lone)
        yield chunk
    if held:
        yield lone


def decoded(data: bytes) -> str:
    """Text that is UTF-8, or else Windows-1252, in which Excel writes CSV; U+FFFD for five bytes that this lacks."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def cut(chunks: Iterable[bytes], separator: bytes, path: str) -> Iterator[bytes]:
    r"""Blocks of about BLOCK_BYTES that end after the first byte of a `separator`: the line end of `\n` and of `\n>`.

    Where they end depends only on the content, not on the chunks, so that a killed run can resume by counting blocks.
    Raises DataError for a record of more than MAX_RECORD_BYTES.
    """
    buffer = bytearray()
    num_searched = 0  # bytes searched in vain, so that a long record in small chunks does not take quadratic time
    for chunk in chunks:
        buffer += chunk
        while len(buffer) >= BLOCK_BYTES:
            end = -1 if num_searched else buffer.rfind(separator, 0, BLOCK_BYTES)
            if end < 0:
                end = buffer.find(separator, max(num_searched, BLOCK_BYTES) - len(separator))
            num_searched = len(buffer) if end < 0 else 0
            if end < 0:
                if len(buffer) > MAX_RECORD_BYTES:
                    raise DataError(f"{path}: a record of more than {MAX_RECORD_BYTES >> 20} MiB; proteins are far "
                                    "shorter: is this file what it should be?")
                break
            yield bytes(buffer[:end + 1])
            del buffer[:end + 1]
    if buffer:
        yield bytes(buffer)


def _gzip_chunks(stream: InputStream) -> Iterator[bytes]:
    file, damages = _open_gzip(stream)
    while True:
        try:
            chunk = file.read(_CHUNK_BYTES)
        except damages as error:
            raise DataError(f"{stream.path}: damaged or truncated gzip ({error}); copy it again") from None
        if not chunk:
            return
        yield chunk


def _open_gzip(stream: InputStream) -> tuple[Any, tuple[type[Exception], ...]]:
    """A decompressing file (of isal if that is installed), and the exceptions that it raises for damage."""
    try:
        from isal import igzip, igzip_lib
    except ImportError:
        return gzip.GzipFile(fileobj=stream, mode="rb"), (EOFError, OSError, zlib.error)
    isal_error: Any = igzip_lib.error
    return igzip.IGzipFile(fileobj=stream, mode="rb"), (EOFError, OSError, isal_error)


def _zstd_chunks(stream: InputStream) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{stream.path}: is packed with zstd, which needs: pip install zstandard") from None
    frame, data = None, b""
    while data or (data := stream.read(_ZSTD_BITE_BYTES)):
        # The largest window, that of `zstd --ultra --long=31`; a frame takes only the memory that it needs.
        frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        try:
            chunk = frame.decompress(data)
        except zstandard.ZstdError as error:
            raise DataError(f"{stream.path}: damaged zstd ({error}); copy it again") from None
        data = b""
        if frame.eof:
            data, frame = frame.unused_data, None
        if chunk:
            yield chunk
    if frame is not None:
        raise DataError(f"{stream.path}: truncated zstd (its last frame does not end); copy it again")
