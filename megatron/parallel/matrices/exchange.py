"""Parts of matrices sent to the ranks that own these, worked on there as wholes, and the parts of what came of it back.

Matrices of a like shape go together, in rounds: the messages of one are under way while another is worked on. Shapes:
k matrices of m rows and n columns, m at most n: a higher one lies on its side.
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
    """What came of a matrix: `part`, what this rank holds of it, of the whole's rows `rows`.

    `squares`: where asked for the mean square of each of the whole's rows, fp32, on every rank alike.
    """

    matrix: WholeMatrix
    rows: slice
    part: Tensor
    squares: Tensor


class WholeMatrices:
    """The matrices that parameters are made of; `dtype`: of what is sent and worked on.

    All ranks of `mesh.holders` make it of their parts of the same parameters, in the same order.
    """

    def __init__(self, parameters: Sequence[Tensor], mesh: Mesh, dtype: torch.dtype, with_squares: bool) -> None:
        self._axis, self._dtype, self._with_squares = mesh.holders, dtype, with_squares
        matrices = shared_out(parameters, mesh)
        self._rounds = rounds_of(matrices, self._axis, num_beside(dtype) if with_squares else 0)
        self._of_parameter: list[list[WholeMatrix]] = [[] for _ in parameters]
        for matrix in sorted(matrices, key=lambda matrix: matrix.run):
            self._of_parameter[matrix.parameter].append(matrix)
        # Of parameters with several matrices: from the order of rows to that of matrices, and back.
        self._places = [places_in_part(ours, runs, self._axis.rank).to(parameter.device) if (
            runs := declaration_of(parameter).runs) else None
            for ours, parameter in zip(self._of_parameter, parameters, strict=True)]
        self._back = [None if places is None else places.argsort() for places in self._places]

    def worked_on(self, parts: Sequence[Tensor], work: Work) -> Iterator[list[MatrixResult]]:
        """What `work`, from [k, m, n] to the same, makes of the matrices of which `parts`, one a parameter, are parts.

        All results of a parameter together, in the order of its runs; parameters as they are done. All ranks call this.
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
        """This rank's part of a parameter from those of its matrices."""
        back = self._back[parameter]
        return parts[0] if back is None else torch.cat(list(parts)).index_select(0, back)

    def _cut(self, parts: Sequence[Tensor]) -> dict[WholeMatrix, Tensor]:
        """This rank's parts of the matrices."""
        cut: dict[WholeMatrix, Tensor] = {}
        for part, places, matrices in zip(parts, self._places, self._of_parameter, strict=True):
            rows = part if places is None else part.index_select(0, places)
            heights = [matrix.shape_on(self._axis.rank)[0] for matrix in matrices]
            cut.update(zip(matrices, rows.split(heights), strict=True))
        return cut

    def _gather(self, one: Round, cut: dict[WholeMatrix, Tensor]) -> Pending | None:
        """Send the owners this rank's parts; nothing is sent where it owns all."""
        if self._axis.size == 1:
            return None
        parts = [cut[matrix] for matrix in one.given]
        return start_exchange(self._flat(parts, cut[one.matrices[0]]), one.to_owners, one.from_givers, self._axis)

    def _work_on(self, one: Round, gathered: Pending | None, cut: dict[WholeMatrix, Tensor],
                 work: Work) -> Iterator[MatrixResult]:
        """Work on those that are this rank's own and begin to send the parts; the results, each waiting for its own."""
        wholes = [cut[matrix].to(self._dtype) for matrix in one.owned] if gathered is None else (
            self._wholes(one, gathered.wait()))
        if one.owned:
            stack = work(torch.stack([whole if len(whole) <= whole.shape[1] else whole.mT for whole in wholes]))
            wholes = [out if len(whole) <= whole.shape[1] else out.mT for whole, out in zip(wholes, stack, strict=True)]
        squares = [whole.float().square().mean(1) if self._with_squares else
                   whole.new_empty(0, dtype=torch.float32) for whole in wholes]
        if gathered is None:
            return map(MatrixResult, one.owned, (matrix.box_on(0)[0] for matrix in one.owned), wholes, squares)
        # The squares as they are, in so many numbers of the messages' dtype.
        sent = [piece for place, box in one.leaving for piece in (wholes[place][box], squares[place].view(self._dtype))]
        returning = start_exchange(self._flat(sent, cut[one.matrices[0]]), one.to_holders, one.from_owners, self._axis)
        return self._returned(one, returning)

    def _wholes(self, one: Round, flat: Tensor) -> list[Tensor]:
        """The matrices of this rank from all parts, which lie by the ranks that gave them."""
        wholes = [flat.new_empty(matrix.shape) for matrix in one.owned]
        views = [wholes[place][box] for place, box in one.arriving]
        for view, piece in zip(views, flat.split([view.numel() for view in views]), strict=True):
            view.copy_(piece.view(view.shape))
        return wholes

    def _returned(self, one: Round, returning: Pending) -> Iterator[MatrixResult]:
        """What came of this rank's parts, each with the squares behind it."""
        for matrix, piece in zip(one.matrices, returning.wait().split(one.returned), strict=True):
            shape = matrix.shape_on(self._axis.rank)
            part, squares = piece.split([shape[0] * shape[1], len(piece) - shape[0] * shape[1]])
            squares = squares.clone().view(torch.float32)  # a copy, since they may begin where no fp32 number can
            yield MatrixResult(matrix, matrix.box_on(self._axis.rank)[0], part.view(shape), squares)

    def _complete(self, results: Iterator[MatrixResult], done: dict[int, list[MatrixResult]],
                  ) -> Iterator[list[MatrixResult]]:
        """Keep `results` until all of a parameter are there."""
        for result in results:
            number = result.matrix.parameter
            done.setdefault(number, []).append(result)
            if len(done[number]) == len(self._of_parameter[number]):
                yield sorted(done.pop(number), key=lambda one: one.matrix.run)

    def _flat(self, pieces: Sequence[Tensor], like: Tensor) -> Tensor:
        """All in one, in the dtype of messages; `like`: where nothing is sent, something on the same device."""
        return torch.cat([piece.to(self._dtype).flatten() for piece in pieces]) if pieces else (
            like.new_empty(0, dtype=self._dtype))
