"""Folders of torch.distributed.checkpoint, as megatron-core writes and reads them (`torch_dist`).

PLACE/.metadata         a pickle: what each tensor is, its chunks, and where in which file each chunk lies
PLACE/__R_I.distcp      chunks, one behind another, each as torch.save writes a tensor
PLACE/common.pt         what is no tensor, as torch.save writes it
PLACE/metadata.json     says that it is such a folder

Reading, no pickle runs: of the index, records are taken for what they hold.
"""

import io
import json
import os
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.convert.torch_files import LONGEST_PICKLE, check_torch_file, read_torch_file
from megatron.checkpoint.convert.torch_pickle import PickledObject, load_torch_pickle
from megatron.checkpoint.stored import Box, Piece, StoredTensor
from megatron.errors import CheckpointError
from megatron.files import sync

_INDEX, _COMMON, _SAYS = ".metadata", "common.pt", "metadata.json"
_KIND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
         "common_backend_version": 1}
_FILE = "__0_0.distcp"


@dataclass(frozen=True)
class Chunk:
    """A box of a whole tensor of shape `whole_shape`: `tensor`'s values, with dimensions of size 1 before its own."""

    name: str
    whole_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: StoredTensor


def is_distributed(place: Path) -> bool:
    """Whether a folder is one of these, as far as its small files say."""
    try:
        kind = json.loads((place / _SAYS).read_text(encoding="utf-8"))
        return (place / _INDEX).is_file() and kind["sharded_backend"] == _KIND["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_tensors(place: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder by their names there, each read when it is asked for; raises CheckpointError."""
    path = place / _INDEX
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
    except Exception:  # what it holds may be of any kind, and fail anywhere
        raise strange from None
    return tensors


def read_common(place: Path) -> dict[str, Any]:
    """What is no tensor, where there is any; raises CheckpointError."""
    if not (place / _COMMON).exists():
        return {}
    common = read_torch_file(place / _COMMON)
    if not isinstance(common, dict):
        raise CheckpointError(f"{place / _COMMON}: holds a {type(common).__name__}, not a table; copy it again")
    return common


def write_distributed(place: Path, chunks: Iterable[Chunk], objects: Mapping[str, Any], common: Mapping[str, Any],
                      ) -> None:
    """Fill the empty folder `place` and bring its files to the disk, one chunk in memory at a time.

    The chunks of a name make up the whole tensor; `objects` and `common` hold plain data. Raises OSError.
    """
    # Reading needs none of it, and importing it takes as long as importing torch.
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
    with (place / _FILE).open("xb") as file:
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
            file.write(data.getbuffer())
            where[MetadataIndex(name)] = _StorageInfo(_FILE, start, file.tell() - start)
        assert all(sum(prod(chunk.sizes) for chunk in kind.chunks) == prod(kind.size) for kind in kinds.values()
                   if isinstance(kind, TensorStorageMetadata)), "the chunks of a name make up the whole"
    torch.save(dict(common), place / _COMMON)
    (place / _INDEX).write_bytes(pickle.dumps(Metadata(kinds, {}, where)))
    (place / _SAYS).write_text(json.dumps(_KIND), encoding="utf-8")
    for name in os.listdir(place):
        sync(place / name)


def _tensor(place: Path, name: str, kind: dict[str, Any], places: Mapping[tuple, dict[str, Any]]) -> StoredTensor:
    """What an index says of a tensor; raises CheckpointError where its chunks are not one whole, or not there."""
    whole, dtype = tuple(kind["size"]), kind["properties"].state[0]
    if not isinstance(dtype, torch.dtype) or any(type(size) is not int or size < 0 for size in whole):
        raise CheckpointError(f"{place / _INDEX}: {name} is of no known shape and kind; copy it again")
    chunks = {tuple(chunk.state["offsets"]): tuple(chunk.state["sizes"]) for chunk in kind["chunks"]}
    fits = all(len(offsets) == len(sizes) == len(whole) and all(
        type(at) is type(size) is int and min(at, size) >= 0 and at + size <= end
        for at, size, end in zip(offsets, sizes, whole, strict=True)) for offsets, sizes in chunks.items())
    if not fits or sum(map(prod, chunks.values())) != prod(whole):
        raise CheckpointError(f"{place / _INDEX}: the chunks of {name} do not make up {list(whole)}; copy it again")
    return StoredTensor(whole, dtype, tuple(
        _piece(place, name, dtype, offsets, sizes, places[name, offsets]) for offsets, sizes in chunks.items()))


def _piece(place: Path, name: str, dtype: torch.dtype, offsets: tuple[int, ...], sizes: tuple[int, ...],
           facts: dict[str, Any]) -> Piece:
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
        raise CheckpointError(f"{path}: ends before its part of {name}; it was cut off, copy it again")

    is_checked = False

    def read(box: Box) -> Tensor:
        nonlocal is_checked
        # Where a part is read, as of a stack of layers, its checksum is not compared.
        if not is_checked and box != tuple(slice(0, size) for size in sizes):
            check_torch_file(path, begin, num_bytes)
            is_checked = True
        chunk = read_torch_file(path, begin, num_bytes)
        if not isinstance(chunk, StoredTensor) or chunk.shape != sizes or chunk.dtype != dtype:
            raise CheckpointError(f"{path}: holds at {begin} something else than its part of {name}; copy it again")
        return chunk.read_box(box)

    return Piece(offsets, sizes, read)
