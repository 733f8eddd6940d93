"""Reads files of torch.save, of any version since 0.1.10, without torch.load: no pickle in them runs.

The zip form (torch >= 1.6): NAME/data.pkl, the pickle; NAME/data/KEY, a storage each, none compressed. The one before:
pickles one after another (a magic number, the version, the machine, the tree, the storages' keys), then each storage
behind its number of elements.
"""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron.checkpoint.convert.torch_pickle import load_torch_pickle
from megatron.checkpoint.convert.torch_storage import Storage
from megatron.errors import CheckpointError
from megatron.parallel.mesh import ONE_RANK_AXIS, Axis

LONGEST_PICKLE = 2**28  # bytes; that of a model of a thousand layers has some 10 million
_HEAD_BYTES = 2**22  # of a file, in which its names are
_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")


def read_torch_file(path: Path, begin: int = 0, num_bytes: int | None = None) -> Any:
    """The tree in a file, or in `num_bytes` of one from `begin` on, with a `StoredTensor` for each tensor.

    A tensor is read from the file when it is asked for, and its checksum compared where it is read whole. Objects of
    known classes are `PickledObject`s. Raises CheckpointError for whatever is not of torch.save, is damaged or asks for
    more.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            window = _Window(file, begin, size - begin if num_bytes is None else num_bytes)
            if window.read(4) == b"PK\3\4":
                return _read_zip(path, window)
            if begin == 0:
                refuse_stand_in(path)
            window.seek(0)
            return _read_legacy(path, window)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {error}; nothing of it was run, get the file from where you trust it") from None


def check_torch_files(place: Path, share: Axis = ONE_RANK_AXIS) -> None:
    """Read what torch.save wrote of a checkpoint through, this rank its `share` of the files; as `check_torch_file`."""
    # Beside safetensors, .bin is not what was read.
    files = [place] if place.is_file() else sorted(
        [*place.rglob("*.pt"), *(place.glob("*.bin") if not any(place.glob("*.safetensors")) else ())])
    for file in files[share.rank::share.size]:
        check_torch_file(file)


def check_torch_file(path: Path, begin: int = 0, num_bytes: int | None = None) -> None:
    """Read a file through, or a part of one; raises CheckpointError where a record is not what its checksum says.

    The form before torch 1.6 has no checksums.
    """
    try:
        with path.open("rb") as file:
            window = _Window(file, begin, path.stat().st_size - begin if num_bytes is None else num_bytes)
            if not zipfile.is_zipfile(window):
                return
            with zipfile.ZipFile(window) as archive:
                wrong = archive.testzip()
    except Exception as error:  # damage can raise nearly anything in zipfile
        raise CheckpointError(f"{path}: damaged, or cut off ({' '.join(str(error).split())[:200]}); copy it "
                              "again") from None
    if wrong is not None:
        raise CheckpointError(f"{path}: its record {wrong[:60]!r} is not what its checksum says; copy it again")


def has_mark(path: Path, file_in: Callable[[Path], Path], mark: bytes) -> bool:
    """Whether the file that `file_in` gives for a path has `mark` among its names; opens no pickle."""
    try:
        with file_in(path).open("rb") as file:
            return mark in file.read(_HEAD_BYTES)
    except (CheckpointError, OSError):
        return False


def refuse_stand_in(path: Path) -> None:
    """Raises CheckpointError if a file is what often stands in a weights file's place: nothing, a pointer, a web page.
    """
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); copy it as well") from None
    if not head:
        raise CheckpointError(f"{path} is empty; copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a pointer of Git LFS, and not what it points to; run git lfs pull there")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, and not the file that was to be downloaded; download it again, "
                              "from the link to the file itself")


class _Window(io.RawIOBase):
    """A part of a file, as if it were one."""

    def __init__(self, file: BinaryIO, begin: int, size: int) -> None:
        self.begin, self.size = begin, size
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self.begin + self._at)
        data = self._file.read(max(0, min(len(buffer), self.size - self._at)))
        buffer[:len(data)] = data
        self._at += len(data)
        return len(data)


def _read_zip(path: Path, window: _Window) -> Any:
    try:
        archive = zipfile.ZipFile(window)
        records = _records(path, archive)
        root = next((name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")), None)
        if root is None or root.count("/") != 1:
            raise CheckpointError(f"{path}: a zip file, but not of torch.save; give a model_optim_rng.pt")
        tree = archive.read(_small(path, records[root + "data.pkl"]))
        order = records.get(root + "byteorder")
        if order is not None and archive.read(_small(path, order)) != b"little":
            raise CheckpointError(f"{path}: written on a machine with another order of bytes; save it on one like this")
    except CheckpointError:
        raise
    except Exception as error:  # damage can raise nearly anything in zipfile
        raise CheckpointError(f"{path}: damaged, or cut off ({' '.join(str(error).split())[:200]}); copy it "
                              "again") from None
    storages: dict[str, Storage] = {}

    def storage_of(key: str, dtype: torch.dtype, num_elements: int) -> Storage:
        record = records.get(f"{root}data/{key}")
        if record is None:
            raise pickle.UnpicklingError(f"it names a storage {key[:40]!r} that is not in the file")
        if num_elements * dtype.itemsize > record.file_size:
            raise pickle.UnpicklingError(f"it has {num_elements} numbers for storage {key[:40]!r}, whose record is of "
                                         f"{record.file_size} bytes")
        if key not in storages or storages[key].dtype != dtype:
            is_all = num_elements * dtype.itemsize == record.file_size
            storages[key] = Storage(path, dtype, num_elements, _data_of(path, window, record),
                                    record.CRC if is_all else None)
        return storages[key]

    return load_torch_pickle(io.BytesIO(tree), LONGEST_PICKLE, storage_of)


def _records(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The records by their names; raises CheckpointError for what torch.save does not write."""
    records: dict[str, zipfile.ZipInfo] = {}
    for record in archive.infolist():
        name = record.orig_filename
        wrong = ("is compressed" if record.compress_type != zipfile.ZIP_STORED or record.file_size != (
                     record.compress_size) else
                 "is there twice" if name in records else
                 "has a path for a name" if name.startswith("/") or ".." in name.split("/") or "\0" in name else
                 "is encrypted" if record.flag_bits & 1 else None)
        if wrong is not None:
            raise CheckpointError(f"{path}: its record {name[:60]!r} {wrong}, as torch.save writes none; get the file "
                                  "from where you trust it")
        records[name] = record
    return records


def _small(path: Path, record: zipfile.ZipInfo) -> zipfile.ZipInfo:
    if record.file_size > LONGEST_PICKLE:
        raise CheckpointError(f"{path}: its record {record.filename[:60]!r} has {record.file_size} bytes, more than "
                              "any checkpoint's; get the file from where you trust it")
    return record


def _data_of(path: Path, window: _Window, record: zipfile.ZipInfo) -> int:
    """Where in the file the bytes of a record begin."""
    window.seek(record.header_offset)
    header = window.read(_LOCAL_HEADER.size)
    mark, name_size, extra_size = _LOCAL_HEADER.unpack(header) if len(header) == _LOCAL_HEADER.size else (b"", 0, 0)
    begin = record.header_offset + _LOCAL_HEADER.size + name_size + extra_size
    if mark != b"PK\3\4" or begin + record.file_size > window.size:
        raise CheckpointError(f"{path}: damaged at its record {record.filename[:60]!r}; copy it again")
    return window.begin + begin


def _read_legacy(path: Path, window: _Window) -> Any:
    file: BinaryIO = io.BufferedReader(window)
    strange = CheckpointError(f"{path}: not a file of torch.save, or damaged; give a model_optim_rng.pt")
    try:
        magic = load_torch_pickle(file, 64)
        version = load_torch_pickle(file, 64) if magic == _MAGIC else None
        machine = load_torch_pickle(file, 4096) if version == _LEGACY_VERSION else None
    except pickle.UnpicklingError:
        raise strange from None
    if not isinstance(machine, dict):
        raise strange
    if not machine.get("little_endian", True):
        raise CheckpointError(f"{path}: written on a machine with another order of bytes; save it on one like this")
    storages: dict[str, Storage] = {}

    def storage_of(key: str, dtype: torch.dtype, num_elements: int) -> Storage:
        storage = storages.setdefault(key, Storage(path, dtype, num_elements, -1))
        if (storage.dtype, storage.num_elements) != (dtype, num_elements):
            raise pickle.UnpicklingError(f"it has a storage {key[:40]!r} of two kinds")
        return storage

    tree = load_torch_pickle(file, LONGEST_PICKLE, storage_of)
    keys = load_torch_pickle(file, LONGEST_PICKLE)
    if not isinstance(keys, list) or not {str(key) for key in keys} >= storages.keys():
        raise pickle.UnpicklingError("its list of storages is not that of its tensors")
    _place(path, file, [storages.get(str(key)) for key in keys], window)
    return tree


def _place(path: Path, file: BinaryIO, storages: list[Storage | None], window: _Window) -> None:
    """Tell the storages where they begin."""
    at = file.tell()
    for storage in storages:
        file.seek(at)
        head = file.read(8)
        if storage is None or len(head) != 8 or int.from_bytes(head, "little") != storage.num_elements:
            raise CheckpointError(f"{path}: damaged, or cut off, at a tensor; copy it again")
        storage.begin = window.begin + at + 8
        at += 8 + storage.num_elements * storage.dtype.itemsize
        if at > window.size:
            raise CheckpointError(f"{path}: cut off within a tensor; copy it again")
