"""Which matrices parameters are made of, what of each lies on which rank, and which rank works on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from math import prod

import torch
from torch import Tensor

from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.parameters import declaration_of
from megatron.parallel.placement import Placement, placement_of

MOST_ELEMENTS = 16 * 2**20  # of a rank's matrices in a round: enough to keep a GPU busy, small beside the model
Box = tuple[slice, slice]


@dataclass(frozen=True, eq=False)
class WholeMatrix:
    """One matrix: parameter number `parameter`, or of its rows run number `run` of each turn.

    `shape`: of the whole. `owner`: the rank that works on it; `givers`: those that send the owner theirs, one of each
    that hold the same. `whole`, `runs` and `grid`: the parameter's shape and runs, and how many shards and tensor ranks
    share it.
    """

    parameter: int
    run: int
    shape: tuple[int, int]
    owner: int
    givers: range
    placement: Placement
    whole: tuple[int, ...]
    runs: Sequence[int]
    grid: tuple[int, int]

    def box_on(self, rank: int) -> Box:
        """What of it `rank` holds."""
        num_shards, num_tensor_ranks = self.grid
        shard, tensor_rank = divmod(rank % (num_shards * num_tensor_ranks), num_tensor_ranks)
        rows, columns = self.placement.box_on(self.whole, tensor_rank, shard)
        return slice(*(_rows_of_run(end, self.run, self.runs) for end in (rows.start, rows.stop))), columns

    def shape_on(self, rank: int) -> tuple[int, int]:
        """Of what `rank` holds."""
        rows, columns = self.box_on(rank)
        return rows.stop - rows.start, columns.stop - columns.start


@dataclass(frozen=True)
class Round:
    """What one rank does where `matrices`, ordered by their owners, are worked on at once.

    `owned`: those it works on. `given`: those of which it sends the owner its part, in all so many elements to each
    rank (`to_owners`); `arriving`: what it gets of those that it owns, each part's place in `owned` and box, as many
    elements of each rank (`from_givers`). Of what came of them `leaving`, `to_holders` and `from_owners` say the same,
    and `returned` the elements of each matrix that come back.
    """

    matrices: list[WholeMatrix]
    owned: list[WholeMatrix]
    given: list[WholeMatrix]
    to_owners: list[int]
    arriving: list[tuple[int, Box]]
    from_givers: list[int]
    leaving: list[tuple[int, Box]]
    to_holders: list[int]
    returned: list[int]
    from_owners: list[int]


def shared_out(parameters: Sequence[Tensor], mesh: Mesh) -> list[WholeMatrix]:
    """The matrices of this rank's parts of `parameters`, the largest first: as much work for each of `mesh.holders`."""
    matrices = [(number, run, *_shape(parameter, run)) for number, parameter in enumerate(parameters)
                for run in range(max(1, len(declaration_of(parameter).runs)))]
    work = [(0, rank) for rank in range(mesh.holders.size)]  # a heap
    shared = []
    for number, run, shape, whole in sorted(matrices, key=lambda matrix: (-_work(matrix[2]), matrix[:2])):
        done, owner = work[0]
        heapreplace(work, (done + _work(shape), owner))
        placement = placement_of(parameters[number])
        shared.append(WholeMatrix(number, run, shape, owner, _givers(placement.dim is not None, owner, mesh), placement,
                                  whole, declaration_of(parameters[number]).runs,
                                  (mesh.shards.size, mesh.tensor.size)))
    return shared


def num_beside(dtype: torch.dtype) -> int:
    """As how many numbers of the messages' `dtype` an fp32 one goes back beside a matrix's parts."""
    return torch.float32.itemsize // dtype.itemsize


def rounds_of(matrices: Sequence[WholeMatrix], holders: Axis, beside: int) -> list[Round]:
    """Those that are worked on at once, of one shape but for what is height and width, for this rank of `holders`.

    `beside`: numbers that go back beside a matrix's parts, for each of its rows.
    """
    alike: dict[tuple[int, ...], list[WholeMatrix]] = {}
    for matrix in matrices:
        alike.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
    rounds = []
    for shape, members in alike.items():
        number = holders.size * max(1, MOST_ELEMENTS // prod(shape))
        rounds += [_round(sorted(members[start:start + number], key=lambda matrix: matrix.owner), holders, beside)
                   for start in range(0, len(members), number)]
    return rounds


def _round(matrices: list[WholeMatrix], holders: Axis, beside: int) -> Round:
    here, ranks = holders.rank, range(holders.size)
    owned = [matrix for matrix in matrices if matrix.owner == here]
    given = [matrix for matrix in matrices if here in matrix.givers]
    to_owners, from_givers, to_holders, from_owners = ([0] * holders.size for _ in range(4))
    for matrix in given:
        to_owners[matrix.owner] += prod(matrix.shape_on(here))
    arriving, leaving = list[tuple[int, Box]](), list[tuple[int, Box]]()
    for rank in ranks:
        for place, matrix in enumerate(owned):
            box, size = matrix.box_on(rank), prod(matrix.shape_on(rank))
            leaving.append((place, box))
            to_holders[rank] += size + beside * matrix.shape[0]
            if rank in matrix.givers:
                arriving.append((place, box))
                from_givers[rank] += size
    returned = [prod(matrix.shape_on(here)) + beside * matrix.shape[0] for matrix in matrices]
    for matrix, size in zip(matrices, returned, strict=True):
        from_owners[matrix.owner] += size
    return Round(matrices, owned, given, to_owners, arriving, from_givers, leaving, to_holders, returned, from_owners)


def places_in_part(matrices: Sequence[WholeMatrix], runs: Sequence[int], rank: int) -> Tensor:
    """Where in a parameter's part on `rank` the rows of its matrices are, those of one behind those of another."""
    turn, first = sum(runs), 0
    places = []
    for matrix, length in zip(matrices, runs, strict=True):
        rows, _ = matrix.box_on(rank)
        number = torch.arange(rows.start, rows.stop)
        places.append(number // length * turn + first + number % length)
        first += length
    joined = torch.cat(places)
    return joined - joined.min() if len(joined) else joined


def _shape(parameter: Tensor, run: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Of a matrix, and of the whole parameter that it is of."""
    height, width = whole = placement_of(parameter).whole_shape(parameter)
    return (_rows_of_run(height, run, declaration_of(parameter).runs), width), whole


def _rows_of_run(end: int, run: int, runs: Sequence[int]) -> int:
    """How many of the first `end` rows of a parameter are of run number `run`."""
    if not runs:
        return end
    turns, rest = divmod(end, sum(runs))
    return turns * runs[run] + min(max(rest - sum(runs[:run]), 0), runs[run])


def _givers(is_split: bool, owner: int, mesh: Mesh) -> range:
    """The ranks of the owner's copy; of tensor ranks that each hold the whole, the owner's own number alone."""
    size = mesh.tensor.size
    copy = mesh.shards.size * size
    first = owner // copy * copy
    return range(first, first + copy) if is_split else range(first + owner % size, first + copy, size)


def _work(shape: tuple[int, int]) -> int:
    return min(shape) * prod(shape)
