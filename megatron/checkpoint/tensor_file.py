"""Files of tensors in safetensors' format, written and read one tensor at a time.

The library writes what lies in memory; ours may be larger than that. Reading is the library's.
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

from megatron.checkpoint.stored import Box, StoredTensor, Tensors, one_piece
from megatron.errors import CheckpointError

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_BLOCK_BYTES = 2**20
_REMEDY = "copy it again, or take an older iteration if there is one"


@dataclass(frozen=True)
class FileFacts:
    """What a file is known by: its size, and the CRC-32 of its bytes."""

    num_bytes: int
    crc32: int


def write_tensors(path: Path, tensors: Tensors, notes: Mapping[str, str] | None = None) -> FileFacts:
    """Write a new file and bring it to the disk, with `notes` at its head; raises OSError where the disk refuses.

    Each tensor is read when its turn comes.
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
            assert (tuple(tensor.shape), tensor.dtype) == (stored.shape, stored.dtype), "what was announced is written"
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            crc32 = zlib.crc32(data, crc32)
            file.write(data)
            del tensor, data  # before the next is read
        file.flush()
        os.fsync(file.fileno())
        return FileFacts(file.tell(), crc32)


def stored_in(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, each read when it is asked for; raises CheckpointError for one that is damaged."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        try:
            return {name: one_piece(part.get_shape(), _DTYPES[part.get_dtype()], partial(read_box, path, name))
                    for name, part in slices.items()}
        except KeyError as error:
            raise CheckpointError(f"{path}: holds numbers of the kind {error}, which is not known here") from None


def read_box(path: Path, name: str, box: Box) -> Tensor:
    """A part of a tensor; raises CheckpointError where there is none."""
    # Opened each time: what is mapped counts as memory of the process for as long as it is open.
    with _opened(path) as file:
        try:
            return file.get_slice(name)[box] if box else file.get_tensor(name).clone()
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged ({error}); {_REMEDY}") from error


def facts_of_file(path: Path, advance: Callable[[int], object] = lambda num_bytes: None) -> FileFacts:
    """Size and checksum of a file, read through; `advance` hears of each block's bytes."""
    crc32 = num_bytes = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            crc32, num_bytes = zlib.crc32(block, crc32), num_bytes + len(block)
            advance(len(block))
    return FileFacts(num_bytes, crc32)


def _opened(path: Path) -> safe_open:
    """safe_open, which takes no path that is not UTF-8, of any path: such a file goes by the number that it is open as.
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
