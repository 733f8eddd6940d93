"""Reads and writes safetensors files one tensor at a time.

Writing does not use the library, which needs all tensors in memory at once. Reading does.
"""

import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.contents import Box, StoredTensor, Tensors, one_piece
from megatron.errors import CheckpointError

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_BLOCK_BYTES = 2**20
_REMEDY = "copy it again, or take an older iteration if there is one"


@dataclass(frozen=True)
class FileFacts:
    """The size of a file and the CRC-32 of its bytes, by which damage is detected."""

    num_bytes: int
    crc32: int


def write_tensors(path: Path, tensors: Tensors, notes: Mapping[str, str] | None = None) -> FileFacts:
    """Write a new file and fsync it; returns its size and checksum. Raises OSError, also if the file exists.

    `notes`: for the header's __metadata__. Only one tensor is in memory at a time.
    """
    header: dict[str, Any] = {"__metadata__": dict(notes)} if notes else {}
    end = 0
    for name, stored in tensors.items():
        begin, end = end, end + stored.dtype.itemsize * torch.Size(stored.shape).numel()
        header[name] = {"dtype": _NAMES[stored.dtype], "shape": list(stored.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        start = len(text).to_bytes(8, "little") + text
        file.write(start)
        crc32 = zlib.crc32(start)
        for stored in tensors.values():
            tensor = stored.read().detach().cpu().contiguous()
            assert (tuple(tensor.shape), tensor.dtype) == (stored.shape, stored.dtype), "as announced"
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            crc32 = zlib.crc32(data, crc32)
            file.write(data)
            del tensor, data  # before the next is read
        file.flush()
        os.fsync(file.fileno())
        return FileFacts(file.tell(), crc32)


def stored_in(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name, each read lazily; raises CheckpointError if the file is damaged."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        try:
            return {name: one_piece(part.get_shape(), _DTYPES[part.get_dtype()], partial(read_box, path, name))
                    for name, part in slices.items()}
        except KeyError as error:
            raise CheckpointError(f"{path}: holds numbers of the kind {error}, which is not known here") from None


def read_box(path: Path, name: str, box: Box) -> Tensor:
    """A box of a tensor in a file, on the CPU; raises CheckpointError if the file is damaged or lacks the tensor."""
    # Opened each time, because a mapped file counts as memory of the process while it is open.
    with _opened(path) as file:
        try:
            return file.get_slice(name)[box] if box else file.get_tensor(name).clone()
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged ({error}); {_REMEDY}") from error


def facts_of_file(path: Path, advance: Callable[[int], object] = lambda num_bytes: None) -> FileFacts:
    """The size and checksum of a file, which is read completely; `advance` gets the number of bytes of each block."""
    crc32 = num_bytes = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            crc32, num_bytes = zlib.crc32(block, crc32), num_bytes + len(block)
            advance(len(block))
    return FileFacts(num_bytes, crc32)


def _opened(path: Path) -> safe_open:
    """`safe_open` for any path; raises CheckpointError.

    safe_open itself rejects paths that are not UTF-8; such a file is opened by its descriptor in /proc.
    """
    try:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            with path.open("rb") as file:
                return safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt")
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged or missing ({error}); {_REMEDY}") from error
