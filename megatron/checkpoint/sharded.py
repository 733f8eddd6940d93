"""Tensors of which each rank has its part, written by all of them: a manifest, and files of safetensors.

There is a file of each kind ("model", "optimizer", "ema") a rank, of which each rank of any layout reads what it holds
(`megatron.checkpoint.loading`). What several ranks hold alike is written by one of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TypeVar, cast

from megatron.checkpoint.manifest import Manifest, TensorFacts
from megatron.checkpoint.stored import StoredTensor, one_piece
from megatron.checkpoint.tensor_file import FileFacts, write_tensors
from megatron.errors import CheckpointError
from megatron.files import begin_folder, finish_folder
from megatron.parallel.collectives import all_gather_object, gather_object
from megatron.parallel.mesh import Axis
from megatron.parallel.placement import Part

T = TypeVar("T")
Parts = Mapping[str, Part]
Place = tuple[str, tuple[int, ...]]  # the key of a part, and its offsets in the whole
# Writes what else belongs into the folder, on the first rank; returns the files' facts.
Finish = Callable[[Path], dict[str, FileFacts]]


class Shares:
    """Which of its parts each of `ranks` writes; all of them call `share_of` together.

    Found when they have other parts than the last time: a thousand ranks with a thousand parts each tell a million.
    """

    def __init__(self, ranks: Axis) -> None:
        self._ranks, self._held, self._mine = ranks, dict[Place, int](), list[str]()

    def share_of(self, parts: Parts) -> dict[str, Part]:
        """Those of `parts` that this rank writes, none of them empty."""
        held = {(key, part.offsets): part.tensor.nbytes for key, part in parts.items() if part.tensor.numel()}
        if any(all_gather_object(held != self._held, self._ranks)):
            self._held, writers = held, writers_of(all_gather_object(held, self._ranks))
            self._mine = [key for key, offsets in held if writers[key, offsets] == self._ranks.rank]
        return {key: parts[key] for key in self._mine}


def writers_of(held: Sequence[Mapping[Place, int]]) -> dict[Place, int]:
    """Which rank writes what, as many bytes as the others; `held`: of each rank the bytes of what it has."""
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
    """Write the folder `place`: all of `ranks` call this together, each with its share of the parts.

    Keys are "model/NAME", "optimizer/KIND/NAME" and "ema/NAME". The folder appears once it is whole and on the disk.
    Raises on each rank the OSError of one, or a CheckpointError of whatever else went wrong there.
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
    """What `work` gives here, once it is done on all ranks; where it fails on one, all raise what went wrong."""
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
    """What this rank's files are, and where in them each of its parts lies."""
    held: dict[str, dict[str, StoredTensor]] = {}
    tensors: dict[str, TensorFacts] = {}
    for key, part in parts.items():
        kind, _, name = key.partition("/")
        file, shape, dtype = f"{kind}-{rank:05d}.safetensors", tuple(part.tensor.shape), part.tensor.dtype
        held.setdefault(file, {})[name] = one_piece(shape, dtype, part.tensor.__getitem__)
        tensors[key] = TensorFacts(part.whole_shape, dtype, ((part.offsets, shape, file),))
    return {file: write_tensors(folder / file, of_file) for file, of_file in held.items()}, tensors
