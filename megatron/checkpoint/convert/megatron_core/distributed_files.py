"""Reads and writes folders of torch.distributed.checkpoint in megatron-core's variant (`torch_dist`).

PLACE/.metadata         a pickle, the index: each tensor's shape, dtype and chunks, and each chunk's file and offset
PLACE/__R_I.distcp      chunks one after another, each as torch.save writes a tensor
PLACE/common.pt         everything but tensors, written by torch.save
PLACE/metadata.json     marks the folder as torch_dist

Reading executes no pickle: the index's objects are parsed as plain records of their fields.
"""

import io
import json
import os
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from megatron.checkpoint.contents import Box, Piece, StoredTensor, are_a_whole
from megatron.checkpoint.convert.torch_files import LONGEST_PICKLE, check_torch_file, read_torch_file, refuse_stand_in
from megatron.checkpoint.convert.torch_pickle import PickledObject, load_torch_pickle
from megatron.errors import CheckpointError
from megatron.files import sync

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

SAYS = "metadata.json"
_INDEX, _COMMON = ".metadata", "common.pt"
_KIND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
         "common_backend_version": 1}
_FILE = "__0_0.distcp"
_MOST_DIMENSIONS = 8  # more than a parameter has: their corners double with each


@dataclass(frozen=True)
class Chunk:
    """A part of the tensor `name` of shape `whole_shape`, at `offsets`.

    `tensor` holds its values; it may have fewer dimensions than the whole, then leading dimensions of size 1 are added.
    """

    name: str
    whole_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: StoredTensor


def is_distributed(place: Path) -> bool:
    """Whether a folder is a torch_dist checkpoint, judged by its metadata.json."""
    try:
        kind = json.loads((place / SAYS).read_text(encoding="utf-8"))
        return holds_index(place) and kind["sharded_backend"] == _KIND["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def holds_index(place: Path) -> bool:
    """Whether a folder is of torch.distributed.checkpoint, of megatron-core's variant or another."""
    return (place / _INDEX).is_file()


def read_tensors(place: Path) -> dict[str, StoredTensor]:
    """The tensors in a folder by their names there, read lazily; raises CheckpointError."""
    path = place / _INDEX
    refuse_stand_in(path)
    strange = CheckpointError(f"{path}: is no index of torch.distributed.checkpoint as megatron-core writes it, or "
                              "damaged; copy it again")
    try:
        with path.open("rb") as file:
            index = load_torch_pickle(file, LONGEST_PICKLE)
        kinds, where = index.state["state_dict_metadata"], index.state["storage_data"]
        places = {(key.state["fqn"], key.state.get("offset")): value.state for key, value in where.items()}
        tensors = {name: _tensor(place, name, kind.state, places) for name, kind in kinds.items()
                   if isinstance(kind, PickledObject) and kind.name.endswith(".TensorStorageMetadata")}
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {error}; nothing of it was run, get the file from where you trust it") from None
    except Exception:  # a malformed index can make any step fail in any way
        raise strange from None
    return tensors


def read_common(place: Path) -> dict[str, Any]:
    """The content of common.pt, {} if there is none; raises CheckpointError."""
    if not (place / _COMMON).exists():
        return {}
    common = read_torch_file(place / _COMMON)
    if not isinstance(common, dict):
        raise CheckpointError(f"{place / _COMMON}: holds a {type(common).__name__}, not a table; copy it again")
    return common


def write_distributed(place: Path, chunks: Iterable[Chunk], objects: Mapping[str, Any], common: Mapping[str, Any],
                      ) -> None:
    """Write a checkpoint into the empty folder `place` and fsync its files, with one chunk in memory at a time.

    `chunks`: those of one name make up the whole tensor; `objects`: plain data, by name; `common`: plain data, for
    common.pt. Raises OSError.
    """
    with (place / _FILE).open("xb") as file:
        index = _write_chunks(file, chunks, objects)
    torch.save(dict(common), place / _COMMON)
    (place / _INDEX).write_bytes(pickle.dumps(index))
    (place / SAYS).write_text(json.dumps(_KIND), encoding="utf-8")
    for name in os.listdir(place):
        sync(place / name)


def _write_chunks(file: BinaryIO, chunks: Iterable[Chunk], objects: Mapping[str, Any]) -> "Metadata":
    """Write chunks and objects one after another into _FILE, which is open as `file`; returns the index of both."""
    # Imported here: reading does not need it, and it takes as long as importing torch.
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    kinds: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    where: dict[MetadataIndex, _StorageInfo] = {}
    for chunk in chunks:
        shape = torch.Size((1,) * (len(chunk.whole_shape) - len(chunk.tensor.shape)) + chunk.tensor.shape)
        kind = kinds.setdefault(chunk.name, TensorStorageMetadata(
            TensorProperties(chunk.tensor.dtype), torch.Size(chunk.whole_shape), []))
        assert isinstance(kind, TensorStorageMetadata)
        index = MetadataIndex(chunk.name, chunk.offsets, len(kind.chunks))
        kind.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), shape))
        start = file.tell()
        torch.save(chunk.tensor.read().reshape(shape), file)
        where[index] = _StorageInfo(_FILE, start, file.tell() - start)
    for name, value in objects.items():
        kinds[name], data, start = BytesStorageMetadata(), io.BytesIO(), file.tell()
        torch.save([value], data)
        file.write(data.getvalue())
        where[MetadataIndex(name)] = _StorageInfo(_FILE, start, file.tell() - start)
    assert all(sum(prod(chunk.sizes) for chunk in kind.chunks) == prod(kind.size) for kind in kinds.values()
               if isinstance(kind, TensorStorageMetadata)), "the chunks of a name make up the whole"
    return Metadata(kinds, {}, where)


def _tensor(place: Path, name: str, kind: dict[str, Any], places: Mapping[tuple, dict[str, Any]]) -> StoredTensor:
    """The tensor that an entry of the index (`kind`) describes, read lazily.

    `places`: for each name and offsets of a chunk, the record of where it is. Raises CheckpointError if the chunks do
    not make up the whole, or one is missing.
    """
    whole, dtype = tuple(kind["size"]), kind["properties"].state[0]
    if not isinstance(dtype, torch.dtype) or len(whole) > _MOST_DIMENSIONS or any(
            type(size) is not int or size < 0 for size in whole):
        raise CheckpointError(f"{place / _INDEX}: {name} is of no known shape and kind; copy it again")
    chunks = {tuple(chunk.state["offsets"]): tuple(chunk.state["sizes"]) for chunk in kind["chunks"]}
    fits = all(len(offsets) == len(sizes) == len(whole) and all(
        type(at) is type(size) is int and min(at, size) >= 0 and at + size <= end
        for at, size, end in zip(offsets, sizes, whole, strict=True)) for offsets, sizes in chunks.items())
    if not fits or not are_a_whole(chunks.items(), whole):
        raise CheckpointError(f"{place / _INDEX}: the chunks of {name} do not make up {list(whole)}; copy it again")
    return StoredTensor(whole, dtype, tuple(
        _piece(place, name, dtype, offsets, sizes, places[name, offsets]) for offsets, sizes in chunks.items()))


def _piece(place: Path, name: str, dtype: torch.dtype, offsets: tuple[int, ...], sizes: tuple[int, ...],
           facts: dict[str, Any]) -> Piece:
    """A chunk of a tensor, read lazily; `facts`: its file, offset and length. Raises CheckpointError."""
    file, begin, num_bytes = facts["relative_path"], facts["offset"], facts["length"]
    path = place / file
    if path.parent != place or type(begin) is not int or type(num_bytes) is not int or begin < 0:
        raise CheckpointError(f"{place / _INDEX}: has {name} in {str(file)[:60]!r}, which is no file beside it")
    if facts.get("transform_descriptors"):
        raise CheckpointError(f"{path}: {name} is compressed or otherwise changed, as megatron-core writes none; save "
                              "it as it is")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: a part of {name}; copy it as well")
    if begin + num_bytes > path.stat().st_size:
        refuse_stand_in(path)
        raise CheckpointError(f"{path}: ends before its part of {name}; it was cut off, copy it again")

    is_checked = False

    def read(box: Box) -> Tensor:
        nonlocal is_checked
        # Reading only a part of a chunk, such as one layer of a stack, does not verify its checksum.
        if not is_checked and box != tuple(slice(0, size) for size in sizes):
            check_torch_file(path, begin, num_bytes)
            is_checked = True
        chunk = read_torch_file(path, begin, num_bytes)
        if not isinstance(chunk, StoredTensor) or chunk.shape != sizes or chunk.dtype != dtype:
            raise CheckpointError(f"{path}: holds at {begin} something else than its part of {name}; copy it again")
        return chunk.read_box(box)

    return Piece(offsets, sizes, read)
