"""Writes files that torch.load reads, of any version since 1.6, with one tensor in memory at a time."""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from megatron.checkpoint.contents import StoredTensor, stored
from megatron.checkpoint.convert.torch_pickle import STORAGES
from megatron.errors import CheckpointError

_STORAGES = {dtype: getattr(torch, name) for name, dtype in STORAGES.items() if name != "UntypedStorage"}
_ALIGNMENT = 64  # of a storage in the file, so that torch can map it
_LOCAL_HEADER_BYTES, _ZIP64_BYTES = 30, 20
_ROOM = 2**31 - 2**20  # a record from here on needs the wide form of sizes


def write_torch_file(path: Path, tree: Any) -> None:
    """Write a new file: plain containers, numbers, Namespaces and arrays, with `StoredTensor`s or tensors among them.

    Raises CheckpointError where a tensor cannot be read, and OSError where the
    disk refuses; `path` has its name from the start, so give one that is not final.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(tree)
    root = path.stem
    with path.open("xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(_entry(f"{root}/data.pkl"), buffer.getvalue())
        archive.writestr(_entry(f"{root}/byteorder"), b"little")
        for key, tensor in enumerate(pickler.tensors):
            _write_storage(archive, f"{root}/data/{key}", tensor)
        archive.writestr(_entry(f"{root}/version"), b"3\n")


@dataclass(frozen=True)
class _Storage:
    key: str
    tensor: StoredTensor


class _Pickler(pickle._Pickler):  # the one in Python, whose names can be told
    """Pickles as torch.save does, with the names that old versions of torch and NumPy know; keeps the tensors."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[StoredTensor] = []

    def reducer_override(self, value: Any) -> Any:
        """How a tensor is made again from its storage."""
        if isinstance(value, Tensor):
            value = stored(value)
        if not isinstance(value, StoredTensor):
            return NotImplemented
        storage = _Storage(str(len(self.tensors)), value)
        self.tensors.append(value)
        strides = torch.empty(value.shape, device="meta").stride()
        return _rebuild_tensor_v2, (storage, 0, value.shape, strides, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        """The name of a storage."""
        if not isinstance(value, _Storage):
            return None
        tensor = value.tensor
        return "storage", _STORAGES[tensor.dtype], value.key, "cpu", torch.Size(tensor.shape).numel()

    write: Callable[[bytes], object]
    memoize: Callable[[Any], None]

    def save_global(self, value: Any, name: str | None = None) -> None:
        """A name: NumPy's as they were before its version 2."""
        module = getattr(value, "__module__", None) or ""
        if not module.startswith("numpy._core"):
            super().save_global(value, name)  # type: ignore[misc]
            return
        old = module.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{old}\n{name or value.__qualname__}\n".encode())
        self.memoize(value)


def _write_storage(archive: zipfile.ZipFile, name: str, tensor: StoredTensor) -> None:
    num_bytes = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
    is_large = num_bytes >= _ROOM
    entry = _entry(name)
    assert archive.fp is not None
    begin = archive.fp.tell() + _LOCAL_HEADER_BYTES + len(name.encode()) + 4 + is_large * _ZIP64_BYTES
    padding = -begin % _ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
    entry.file_size = num_bytes
    with archive.open(entry, "w", force_zip64=is_large) as record:
        values = tensor.read()
        if (tuple(values.shape), values.dtype) != (tuple(tensor.shape), tensor.dtype):
            raise CheckpointError(f"{archive.filename}: a tensor is {list(values.shape)} of {values.dtype}, where "
                                  f"{list(tensor.shape)} of {tensor.dtype} was announced")
        record.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
