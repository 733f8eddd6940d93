"""Which matrices parameters are made of, what of each lies on which rank, and which rank works on it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megatron.parallel.mesh import Mesh
from megatron.parallel.parameters import declaration_of
from megatron.parallel.placement import placement_of

MOST_ELEMENTS = 16 * 2**20  # of a rank's matrices in a round: enough to keep a GPU busy, small beside the model


@dataclass(frozen=True, eq=False)
class WholeMatrix:
    """One matrix: parameter number `parameter`, or of its rows run number `run` of each turn.

    `shape`: of the whole. `boxes`: what of it each rank holds. `owner`: the rank that works on it; `givers`: those that
    send the owner theirs, one of each that hold the same.
    """

    parameter: int
    run: int
    shape: tuple[int, int]
    boxes: tuple[tuple[slice, slice], ...]
    owner: int
    givers: frozenset[int]

    def shape_on(self, rank: int) -> tuple[int, int]:
        """Of what `rank` holds."""
        rows, columns = self.boxes[rank]
        return rows.stop - rows.start, columns.stop - columns.start

    def size_on(self, rank: int) -> int:
        """Elements that `rank` holds."""
        return prod(self.shape_on(rank))


def shared_out(parameters: Sequence[Tensor], mesh: Mesh) -> list[WholeMatrix]:
    """The matrices of this rank's parts of `parameters`, the largest first: as much work for each of `mesh.holders`."""
    matrices = [(number, run, *_shape_and_boxes(parameter, run, mesh)) for number, parameter in enumerate(parameters)
                for run in range(max(1, len(declaration_of(parameter).runs)))]
    work = [0] * mesh.holders.size
    shared = []
    for number, run, shape, boxes in sorted(matrices, key=lambda matrix: (-_work(matrix[2]), matrix[:2])):
        owner = work.index(min(work))
        work[owner] += _work(shape)
        givers = frozenset(_givers(placement_of(parameters[number]).dim is not None, owner, mesh))
        shared.append(WholeMatrix(number, run, shape, boxes, owner, givers))
    return shared


def rounds_of(matrices: Sequence[WholeMatrix], num_ranks: int) -> list[list[WholeMatrix]]:
    """Those that are worked on at once, ordered by their owners: of one shape but for what is height and width."""
    alike: dict[tuple[int, ...], list[WholeMatrix]] = {}
    for matrix in matrices:
        alike.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
    rounds = []
    for shape, members in alike.items():
        number = num_ranks * max(1, MOST_ELEMENTS // prod(shape))
        rounds += [sorted(members[start:start + number], key=lambda matrix: matrix.owner)
                   for start in range(0, len(members), number)]
    return rounds


def places_in_part(matrices: Sequence[WholeMatrix], runs: Sequence[int], rank: int) -> Tensor:
    """Where in a parameter's part on `rank` the rows of its matrices are, those of one behind those of another."""
    turn, first = sum(runs), 0
    places = []
    for matrix, length in zip(matrices, runs, strict=True):
        rows = matrix.boxes[rank][0]
        number = torch.arange(rows.start, rows.stop)
        places.append(number // length * turn + first + number % length)
        first += length
    joined = torch.cat(places)
    return joined - joined.min() if len(joined) else joined


def _shape_and_boxes(parameter: Tensor, run: int,
                     mesh: Mesh) -> tuple[tuple[int, int], tuple[tuple[slice, slice], ...]]:
    placement, runs = placement_of(parameter), declaration_of(parameter).runs
    height, width = placement.whole_shape(parameter)
    boxes = []
    for rank in range(mesh.holders.size):
        shard, tensor_rank = divmod(rank % (mesh.shards.size * mesh.tensor.size), mesh.tensor.size)
        rows, columns = placement.box_on((height, width), tensor_rank, shard)
        boxes.append((slice(*(_rows_of_run(end, run, runs) for end in (rows.start, rows.stop))), columns))
    return (_rows_of_run(height, run, runs), width), tuple(boxes)


def _rows_of_run(end: int, run: int, runs: Sequence[int]) -> int:
    """How many of the first `end` rows of a parameter are of run number `run`."""
    if not runs:
        return end
    turns, rest = divmod(end, sum(runs))
    return turns * runs[run] + min(max(rest - sum(runs[:run]), 0), runs[run])


def _givers(is_split: bool, owner: int, mesh: Mesh) -> Iterator[int]:
    """The ranks of the owner's copy; of tensor ranks that each hold the whole, the owner's own number alone."""
    size = mesh.tensor.size
    copy = mesh.shards.size * size
    first = owner // copy * copy
    for rank in range(first, first + copy):
        if is_split or rank % size == owner % size:
            yield rank


def _work(shape: tuple[int, int]) -> int:
    return min(shape) * prod(shape)
