"""The plan of the work on whole matrices: which matrices parameters consist of, who holds what, and who owns which."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from math import prod

import torch
from torch import Tensor

from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.parameters import declaration_of
from megatron.parallel.placement import Placement, placement_of

MOST_ELEMENTS = 16 * 2**20  # of one rank's matrices in a round: enough to keep a GPU busy, small next to the model
Box = tuple[slice, slice]


@dataclass(frozen=True, eq=False)
class WholeMatrix:
    """One matrix: a whole parameter, or one of several matrices whose rows are interleaved in a parameter.

    Ranks are those of `Mesh.holders`.
    """

    parameter: int  # its number in the list of parameters
    run: int  # which of the parameter's interleaved matrices it is (`Declaration.runs`)
    shape: tuple[int, int]  # of the whole matrix
    owner: int  # the rank that works on it
    givers: range  # the ranks that send the owner their parts: one of those that hold the same part
    placement: Placement  # of the parameter
    whole: tuple[int, ...]  # the parameter's whole shape
    runs: Sequence[int]  # of the parameter
    grid: tuple[int, int]  # the numbers of shards and of tensor ranks

    def box_on(self, rank: int) -> Box:
        """The rows and columns of the matrix that `rank` holds."""
        num_shards, num_tensor_ranks = self.grid
        shard, tensor_rank = divmod(rank % (num_shards * num_tensor_ranks), num_tensor_ranks)
        rows, columns = self.placement.box_on(self.whole, tensor_rank, shard)
        return slice(*(_rows_of_run(end, self.run, self.runs) for end in (rows.start, rows.stop))), columns

    def shape_on(self, rank: int) -> tuple[int, int]:
        """The shape of the part that `rank` holds."""
        rows, columns = self.box_on(rank)
        return rows.stop - rows.start, columns.stop - columns.start


@dataclass(frozen=True)
class Round:
    """What one rank sends and receives in a round, where some matrices are worked on together.

    Two exchanges (all-to-all): parts go to the owners, and parts of the results back to all ranks that hold them.
    Counts are in elements of the messages, one for each rank.
    """

    matrices: list[WholeMatrix]  # all of the round, ordered by owner
    owned: list[WholeMatrix]  # those that this rank works on
    given: list[WholeMatrix]  # those of which this rank sends its part to the owner
    to_owners: list[int]  # elements that it sends to each rank for that
    arriving: list[tuple[int, Box]]  # parts that it receives, by sender: index in `owned`, and box in the matrix
    from_givers: list[int]  # elements that it receives from each rank for that
    leaving: list[tuple[int, Box]]  # parts of its results, by receiver: index in `owned`, and box in the matrix
    to_holders: list[int]  # elements that it sends to each rank for that
    returned: list[int]  # elements that it receives back for each of `matrices`
    from_owners: list[int]  # elements that it receives back from each rank


def shared_out(parameters: Sequence[Tensor], mesh: Mesh) -> list[WholeMatrix]:
    """The matrices of `parameters`, largest first, each with an owner: every rank gets about the same amount of work.

    `parameters`: this rank's parts.
    """
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
    """How many numbers of the messages' `dtype` have the bytes of one fp32 number."""
    return torch.float32.itemsize // dtype.itemsize


def rounds_of(matrices: Sequence[WholeMatrix], holders: Axis, beside: int) -> list[Round]:
    """The rounds of this rank of `holders`; in each, all matrices have the same shape up to transposition.

    `beside`: how many numbers per row of a matrix are sent back with each part of the result.
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
    """The row indices of a parameter's part on `rank`, sorted by matrix: those of the first, then the second, ..."""
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
    """The shape of a matrix, and that of the whole parameter that it belongs to."""
    height, width = whole = placement_of(parameter).whole_shape(parameter)
    return (_rows_of_run(height, run, declaration_of(parameter).runs), width), whole


def _rows_of_run(end: int, run: int, runs: Sequence[int]) -> int:
    """How many of the first `end` rows of a parameter belong to its matrix number `run`."""
    if not runs:
        return end
    turns, rest = divmod(end, sum(runs))
    return turns * runs[run] + min(max(rest - sum(runs[:run]), 0), runs[run])


def _givers(is_split: bool, owner: int, mesh: Mesh) -> range:
    """The ranks that send the owner their parts: all that hold the same copy of the parameters as the owner.

    If tensor ranks each hold the whole, only those with the owner's tensor rank.
    """
    size = mesh.tensor.size
    copy = mesh.shards.size * size
    first = owner // copy * copy
    return range(first, first + copy) if is_split else range(first + owner % size, first + copy, size)


def _work(shape: tuple[int, int]) -> int:
    """The cost of orthogonalising a matrix of this shape, up to a factor."""
    return min(shape) * prod(shape)
