"""Tensors of which each rank has its part, written by all of them, by torch.distributed.checkpoint.

Its planner shares the work out: what several ranks hold alike is written by one of them, in turns. Its own storage
keeps its index as a pickle; ours is a manifest and files of safetensors, one of each kind ("model", "optimizer",
"ema") a rank, of which each rank of any layout reads what it holds (`megatron.checkpoint.loading`).
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from megatron.checkpoint.manifest import Manifest, PieceFacts, TensorFacts
from megatron.checkpoint.tensor_file import FileFacts, TensorEntry, write_tensors
from megatron.files import begin_folder, finish_folder
from megatron.parallel.placement import Part

Parts = Mapping[str, Part]
# Writes what else belongs into the folder, on the coordinating rank; returns the files' facts.
Finish = Callable[[Path], dict[str, FileFacts]]


def write_parts(place: Path, iteration: int, parts: Parts, group: dist.ProcessGroup | None, finish: Finish) -> None:
    """Write the folder `place`: all ranks of `group` (None: this process alone) call this with their parts.

    Keys are "model/NAME", "optimizer/KIND/NAME" and "ema/NAME". The folder appears once it is whole and on the disk.
    Raises what torch.distributed.checkpoint makes of the ranks' errors, CheckpointException, on each.
    """
    with _told_of_one_process():
        dcp.save(dict(parts), storage_writer=_Writer(place, iteration, finish), planner=_SavePlanner(),
                 process_group=group, no_dist=group is None)


@contextmanager
def _told_of_one_process() -> Iterator[None]:
    """Without the warning that what was asked for, `no_dist`, is what is done."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _SavePlanner(DefaultSavePlanner):
    """Says what each rank has: its boxes."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """The boxes that are not empty."""
        items = [_write_item(key, part) for key, part in self.state_dict.items() if part.tensor.numel()]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The tensor of a box."""
        return self.state_dict[index.fqn].tensor


class _Writer(StorageWriter):
    """A file of each kind a rank, then the manifest, then the folder's name."""

    def __init__(self, place: Path, iteration: int, finish: Finish) -> None:
        self._place, self._iteration, self._finish = place, iteration, finish

    def reset(self, checkpoint_id: Any = None) -> None:
        """Each is used once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is due before the ranks' plans are known."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinating rank, before any other goes on: the folder, and each rank's number in it."""
        self._temporary = begin_folder(self._place)
        return [replace(plan, storage_data=(self._temporary, rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's files."""
        temporary, rank = plan.storage_data
        by_kind: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            by_kind.setdefault(item.index.fqn.partition("/")[0], []).append(item)
        results = []
        for kind, items in by_kind.items():
            file = f"{kind}-{rank:05d}.safetensors"
            facts = write_tensors(temporary / file, {item.index.fqn.partition("/")[2]: _entry(item, planner)
                                                     for item in items})
            results += [WriteResult(item.index, _num_bytes(item), (file, facts)) for item in items]
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinating rank, when all have written: the manifest, and the folder's name."""
        files: dict[str, FileFacts] = {}
        where: dict[MetadataIndex, str] = {}
        for result in (one for of_rank in results for one in of_rank):
            file, facts = result.storage_data
            files[file], where[result.index] = facts, file
        tensors = {key: _facts(key, stored, where) for key, stored in metadata.state_dict_metadata.items()
                   if isinstance(stored, TensorStorageMetadata)}
        Manifest(self._iteration, files | self._finish(self._temporary), tensors).write(self._temporary)
        finish_folder(self._place)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """There is none."""
        return False


def _chunk(part: Part) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(part.offsets), part.tensor.shape)


def _write_item(key: str, part: Part) -> WriteItem:
    properties = TensorProperties.create_from_tensor(part.tensor)
    return WriteItem(MetadataIndex(key, part.offsets), WriteItemType.SHARD,
                     tensor_data=TensorWriteData(_chunk(part), properties, torch.Size(part.whole_shape)))


def _entry(item: WriteItem, planner: SavePlanner) -> TensorEntry:
    assert item.tensor_data is not None

    def read() -> Tensor:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor)
        return tensor

    return TensorEntry(tuple(item.tensor_data.chunk.sizes), item.tensor_data.properties.dtype, read)


def _num_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _facts(key: str, stored: TensorStorageMetadata, where: Mapping[MetadataIndex, str]) -> TensorFacts:
    pieces: list[PieceFacts] = [(tuple(chunk.offsets), tuple(chunk.sizes), where[MetadataIndex(key, chunk.offsets)])
                                for chunk in stored.chunks]
    return TensorFacts(tuple(stored.size), stored.properties.dtype, tuple(pieces))
