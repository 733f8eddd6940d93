"""Writes a checkpoint from all ranks at once: each its own safetensors files, and rank 0 the manifest.

Every rank writes one file for each kind of tensor ("model", "optimizer", "ema"). A part that several ranks hold is
written by one of them. Any layout can load the result (`megatron.checkpoint.loading`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TypeVar, cast

from megatron.checkpoint.contents import StoredTensor, one_piece
from megatron.checkpoint.manifest import Manifest, TensorFacts
from megatron.checkpoint.tensor_file import FileFacts, write_tensors
from megatron.errors import CheckpointError
from megatron.files import begin_folder, finish_folder
from megatron.parallel.collectives import all_gather_object, gather_object
from megatron.parallel.mesh import Axis
from megatron.parallel.placement import Part

T = TypeVar("T")
Parts = Mapping[str, Part]
Place = tuple[str, tuple[int, ...]]  # the key of a part, and its offsets in the whole
# Called on the first rank with the folder: writes its other files, and returns their sizes and checksums by name.
Finish = Callable[[Path], dict[str, FileFacts]]


class Shares:
    """Divides the parts of a checkpoint among `ranks` for writing; all of them call `share_of` together.

    The division is kept as long as the parts stay the same, because computing it takes an all-gather of everyone's
    list of parts: a million entries for a thousand ranks with a thousand parts each.
    """

    def __init__(self, ranks: Axis) -> None:
        self._ranks, self._held, self._mine = ranks, dict[Place, int](), list[str]()

    def share_of(self, parts: Parts) -> dict[str, Part]:
        """The subset of `parts` that this rank writes; empty tensors are left out."""
        held = {(key, part.offsets): part.tensor.nbytes for key, part in parts.items() if part.tensor.numel()}
        if any(all_gather_object(held != self._held, self._ranks)):
            self._held, writers = held, writers_of(all_gather_object(held, self._ranks))
            self._mine = [key for key, offsets in held if writers[key, offsets] == self._ranks.rank]
        return {key: parts[key] for key in self._mine}


def writers_of(held: Sequence[Mapping[Place, int]]) -> dict[Place, int]:
    """The rank that writes each part, such that all write about as many bytes.

    `held`: for each rank, the parts that it holds and their sizes in bytes.
    """
    sizes = {place: size for of_rank in held for place, size in of_rank.items()}
    holders: dict[Place, list[int]] = {place: [] for place in sizes}
    for rank, of_rank in enumerate(held):
        for place in of_rank:
            holders[place].append(rank)
    writers, taken = dict[Place, int](), [0] * len(held)
    for place in sorted(sizes, key=lambda place: (-sizes[place], place)):
        writers[place] = min(holders[place], key=taken.__getitem__)
        taken[writers[place]] += sizes[place]
    return writers


def write_parts(place: Path, iteration: int, parts: Parts, ranks: Axis, finish: Finish) -> None:
    """Write a checkpoint into the new folder `place`; all of `ranks` call this together, each with its share of parts.

    The keys of `parts` are "model/NAME", "optimizer/KIND/NAME" and "ema/NAME". The folder appears only when everything
    in it is on the disk. If a rank fails, every rank raises its OSError, or a CheckpointError for any other exception.
    """
    made = _together(ranks, lambda: begin_folder(place) if ranks.rank == 0 else place)
    temporary = all_gather_object(made, ranks)[0]
    written = gather_object(_together(ranks, lambda: _write_files(temporary, parts, ranks.rank)), ranks)

    def complete() -> None:
        files, tensors = dict[str, FileFacts](), dict[str, TensorFacts]()
        for files_of_rank, tensors_of_rank in written:
            files |= files_of_rank
            for key, facts in tensors_of_rank.items():
                before = tensors[key].pieces if key in tensors else ()
                tensors[key] = replace(facts, pieces=before + facts.pieces)
        assert all(prod(facts.shape) == sum(prod(sizes) for _, sizes, _ in facts.pieces)
                   for facts in tensors.values()), "the parts make up the wholes"
        Manifest(iteration, files | finish(temporary), tensors).write(temporary)
        finish_folder(place)

    _together(ranks, lambda: complete() if ranks.rank == 0 else None)


def _together(ranks: Axis, work: Callable[[], T]) -> T:
    """The result of `work` on this rank, after all ranks have run theirs; if it fails on one, every rank raises."""
    result, wrong = None, list[Exception]()
    try:
        result = work()
    except OSError as error:
        wrong.append(error)
    except Exception as error:
        wrong.append(CheckpointError(str(error)))
    for found in sorted(sum(all_gather_object(wrong, ranks), []), key=lambda one: not isinstance(one, OSError)):
        raise found
    return cast(T, result)


def _write_files(folder: Path, parts: Parts, rank: int) -> tuple[dict[str, FileFacts], dict[str, TensorFacts]]:
    """Write this rank's files; returns their sizes and checksums by name, and the facts of each tensor by key."""
    held: dict[str, dict[str, StoredTensor]] = {}
    tensors: dict[str, TensorFacts] = {}
    for key, part in parts.items():
        kind, _, name = key.partition("/")
        file, shape, dtype = f"{kind}-{rank:05d}.safetensors", tuple(part.tensor.shape), part.tensor.dtype
        held.setdefault(file, {})[name] = one_piece(shape, dtype, part.tensor.__getitem__)
        tensors[key] = TensorFacts(part.whole_shape, dtype, ((part.offsets, shape, file),))
    return {file: write_tensors(folder / file, of_file) for file, of_file in held.items()}, tensors
