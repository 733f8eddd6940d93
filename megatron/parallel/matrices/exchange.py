"""Gathers each matrix on the rank that owns it, works on it there as a whole, and sends the result's parts back.

Matrices of one shape are handled together, in rounds: the messages of one round travel during the work of another.
Shapes: k matrices of m rows and n columns, m <= n: matrices with more rows than columns are transposed for the work.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.parallel.collectives import Pending, start_exchange
from megatron.parallel.matrices.sharing import (
    Round,
    WholeMatrix,
    num_beside,
    places_in_part,
    rounds_of,
    shared_out,
)
from megatron.parallel.mesh import Mesh
from megatron.parallel.parameters import declaration_of

Work = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MatrixResult:
    """The result of the work on one matrix, as far as this rank holds it."""

    matrix: WholeMatrix
    rows: slice  # of the whole, which `part` covers
    part: Tensor
    squares: Tensor  # mean square of each row of the whole, fp32, the same on every rank; empty if not asked for


class WholeMatrices:
    """The matrices that some parameters consist of.

    A collective: all ranks of `mesh.holders` create it from their parts of the same parameters, in the same order.
    `dtype`: of messages and work. `with_squares`: whether results come with their rows' mean squares.
    """

    def __init__(self, parameters: Sequence[Tensor], mesh: Mesh, dtype: torch.dtype, with_squares: bool) -> None:
        self._axis, self._dtype, self._with_squares = mesh.holders, dtype, with_squares
        matrices = shared_out(parameters, mesh)
        self._rounds = rounds_of(matrices, self._axis, num_beside(dtype) if with_squares else 0)
        self._of_parameter: list[list[WholeMatrix]] = [[] for _ in parameters]
        for matrix in sorted(matrices, key=lambda matrix: matrix.run):
            self._of_parameter[matrix.parameter].append(matrix)
        # For parameters of several interleaved matrices: the row indices that bring each matrix together, and back.
        self._places = [places_in_part(ours, runs, self._axis.rank).to(parameter.device) if (
            runs := declaration_of(parameter).runs) else None
            for ours, parameter in zip(self._of_parameter, parameters, strict=True)]
        self._back = [None if places is None else places.argsort() for places in self._places]

    def worked_on(self, parts: Sequence[Tensor], work: Work) -> Iterator[list[MatrixResult]]:
        """Apply `work`, from [k, m, n] to the same shape, to the matrices that have these `parts`, one per parameter.

        Yields the results of one parameter together, in the order of its runs, as soon as they are there. A collective.
        """
        cut, done = self._cut(parts), dict[int, list[MatrixResult]]()
        gathering = self._gather(self._rounds[0], cut)
        returning: Iterator[MatrixResult] = iter(())
        for number, one in enumerate(self._rounds):
            gathered = gathering
            if number + 1 < len(self._rounds):
                gathering = self._gather(self._rounds[number + 1], cut)
            before, returning = returning, self._work_on(one, gathered, cut, work)
            yield from self._complete(before, done)
        yield from self._complete(returning, done)

    def joined(self, parameter: int, parts: Sequence[Tensor]) -> Tensor:
        """This rank's part of parameter number `parameter`, put together from the parts of its matrices."""
        back = self._back[parameter]
        return parts[0] if back is None else torch.cat(list(parts)).index_select(0, back)

    def _cut(self, parts: Sequence[Tensor]) -> dict[WholeMatrix, Tensor]:
        """This rank's part of each matrix, from its parts of the parameters."""
        cut: dict[WholeMatrix, Tensor] = {}
        for part, places, matrices in zip(parts, self._places, self._of_parameter, strict=True):
            rows = part if places is None else part.index_select(0, places)
            heights = [matrix.shape_on(self._axis.rank)[0] for matrix in matrices]
            cut.update(zip(matrices, rows.split(heights), strict=True))
        return cut

    def _gather(self, one: Round, cut: dict[WholeMatrix, Tensor]) -> Pending | None:
        """Begin to send this rank's parts to the owners; None with one rank, which owns all."""
        if self._axis.size == 1:
            return None
        parts = [cut[matrix] for matrix in one.given]
        return start_exchange(self._flat(parts, cut[one.matrices[0]]), one.to_owners, one.from_givers, self._axis)

    def _work_on(self, one: Round, gathered: Pending | None, cut: dict[WholeMatrix, Tensor],
                 work: Work) -> Iterator[MatrixResult]:
        """Work on this rank's own matrices and begin to send the results' parts; an iterator that waits for them."""
        wholes = [cut[matrix] for matrix in one.owned] if gathered is None else self._wholes(one, gathered.wait())
        if one.owned:
            stack = work(self._stacked(wholes))
            wholes = [out if len(whole) <= whole.shape[1] else out.mT for whole, out in zip(wholes, stack, strict=True)]
        squares = [whole.float().square().mean(1) if self._with_squares else
                   whole.new_empty(0, dtype=torch.float32) for whole in wholes]
        if gathered is None:
            return map(MatrixResult, one.owned, (matrix.box_on(0)[0] for matrix in one.owned), wholes, squares)
        # The squares' fp32 bytes are sent as numbers of the messages' dtype.
        sent = [piece for place, box in one.leaving for piece in (wholes[place][box], squares[place].view(self._dtype))]
        returning = start_exchange(self._flat(sent, cut[one.matrices[0]]), one.to_holders, one.from_owners, self._axis)
        return self._returned(one, returning)

    def _stacked(self, wholes: Sequence[Tensor]) -> Tensor:
        """Matrices of one shape, lying down, [k, m, n] in the work's dtype: converted and copied in one pass."""
        stack = wholes[0].new_empty(len(wholes), *sorted(wholes[0].shape), dtype=self._dtype)
        for place, whole in zip(stack, wholes, strict=True):
            place.copy_(whole if len(whole) <= whole.shape[1] else whole.mT)
        return stack

    def _wholes(self, one: Round, flat: Tensor) -> list[Tensor]:
        """This rank's own matrices, assembled from the parts received, which are in the order of the senders."""
        wholes = [flat.new_empty(matrix.shape) for matrix in one.owned]
        views = [wholes[place][box] for place, box in one.arriving]
        for view, piece in zip(views, flat.split([view.numel() for view in views]), strict=True):
            view.copy_(piece.view(view.shape))
        return wholes

    def _returned(self, one: Round, returning: Pending) -> Iterator[MatrixResult]:
        """The results for this rank's parts; in the message each is followed by its squares."""
        for matrix, piece in zip(one.matrices, returning.wait().split(one.returned), strict=True):
            shape = matrix.shape_on(self._axis.rank)
            part, squares = piece.split([shape[0] * shape[1], len(piece) - shape[0] * shape[1]])
            squares = squares.clone().view(torch.float32)  # a copy, as they may not be aligned for fp32
            yield MatrixResult(matrix, matrix.box_on(self._axis.rank)[0], part.view(shape), squares)

    def _complete(self, results: Iterator[MatrixResult], done: dict[int, list[MatrixResult]],
                  ) -> Iterator[list[MatrixResult]]:
        """Collect `results`, and yield those of a parameter when all are there."""
        for result in results:
            number = result.matrix.parameter
            done.setdefault(number, []).append(result)
            if len(done[number]) == len(self._of_parameter[number]):
                yield sorted(done.pop(number), key=lambda one: one.matrix.run)

    def _flat(self, pieces: Sequence[Tensor], like: Tensor) -> Tensor:
        """The pieces flattened and concatenated, in the messages' dtype; `like`: gives the device if there are none."""
        return torch.cat([piece.to(self._dtype).flatten() for piece in pieces]) if pieces else (
            like.new_empty(0, dtype=self._dtype))
