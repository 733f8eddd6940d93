"""Parts of matrices sent to the ranks that own these, worked on there as wholes, and the parts of what came of it back.

Matrices of a like shape go together, in rounds: the messages of one are under way while another is worked on. Shapes:
k matrices of m rows and n columns, m at most n: a higher one lies on its side.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.parallel.collectives import Pending, start_exchange
from megatron.parallel.matrices.sharing import WholeMatrix, places_in_part, rounds_of, shared_out
from megatron.parallel.mesh import Mesh
from megatron.parallel.parameters import declaration_of

Work = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Result:
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
        self._rounds = rounds_of(matrices, self._axis.size)
        self._of_parameter: list[list[WholeMatrix]] = [[] for _ in parameters]
        for matrix in sorted(matrices, key=lambda matrix: matrix.run):
            self._of_parameter[matrix.parameter].append(matrix)
        # Of parameters with several matrices: from the order of rows to that of matrices, and back.
        self._places = [places_in_part(ours, runs, self._axis.rank).to(parameter.device) if (
            runs := declaration_of(parameter).runs) else None
            for ours, parameter in zip(self._of_parameter, parameters, strict=True)]
        self._back = [None if places is None else places.argsort() for places in self._places]

    def worked_on(self, parts: Sequence[Tensor], work: Work) -> Iterator[list[Result]]:
        """What `work`, from [k, m, n] to the same, makes of the matrices of which `parts`, one a parameter, are parts.

        All results of a parameter together, in the order of its runs; parameters as they are done. All ranks call this.
        """
        cut, done = self._cut(parts), dict[int, list[Result]]()
        gathering = self._gather(self._rounds[0], cut)
        returning: Iterator[Result] = iter(())
        for number, matrices in enumerate(self._rounds):
            gathered = gathering
            if number + 1 < len(self._rounds):
                gathering = self._gather(self._rounds[number + 1], cut)
            before, returning = returning, self._work_on(matrices, gathered, cut, work)
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

    def _gather(self, matrices: list[WholeMatrix], cut: dict[WholeMatrix, Tensor]) -> Pending | None:
        """Send the owners this rank's parts; nothing is sent where it owns all."""
        here, ranks = self._axis.rank, range(self._axis.size)
        if len(ranks) == 1:
            return None
        given = [matrix for matrix in matrices if here in matrix.givers]
        to_each = [sum(matrix.size_on(here) for matrix in given if matrix.owner == rank) for rank in ranks]
        from_each = [sum(matrix.size_on(rank) for matrix in _of(matrices, here) if rank in matrix.givers)
                     for rank in ranks]
        return start_exchange(self._flat([cut[matrix] for matrix in given], cut[matrices[0]]), to_each, from_each,
                              self._axis)

    def _work_on(self, matrices: list[WholeMatrix], gathered: Pending | None, cut: dict[WholeMatrix, Tensor],
                 work: Work) -> Iterator[Result]:
        """Work on those that are this rank's own and begin to send the parts; the results, each waiting for its own."""
        owned = _of(matrices, self._axis.rank)
        wholes = [cut[matrix].to(self._dtype) for matrix in owned] if gathered is None else (
            self._wholes(owned, gathered.wait()))
        if owned:
            stack = work(torch.stack([whole if len(whole) <= whole.shape[1] else whole.mT for whole in wholes]))
            wholes = [out if len(whole) <= whole.shape[1] else out.mT for whole, out in zip(wholes, stack, strict=True)]
        squares = [whole.float().square().mean(1) if self._with_squares else whole.new_empty(0) for whole in wholes]
        if gathered is None:
            return map(Result, owned, (matrix.boxes[0][0] for matrix in owned), wholes, squares)
        return self._returned(matrices, self._return(matrices, owned, wholes, squares, cut[matrices[0]]))

    def _wholes(self, owned: list[WholeMatrix], flat: Tensor) -> list[Tensor]:
        """The matrices of this rank from all parts, which lie by the ranks that gave them."""
        wholes = [flat.new_empty(matrix.shape) for matrix in owned]
        boxes = [(rank, matrix, whole) for rank in range(self._axis.size)
                 for matrix, whole in zip(owned, wholes, strict=True) if rank in matrix.givers]
        pieces = flat.split([matrix.size_on(rank) for rank, matrix, _ in boxes])
        for (rank, matrix, whole), piece in zip(boxes, pieces, strict=True):
            whole[matrix.boxes[rank]] = piece.view(matrix.shape_on(rank))
        return wholes

    def _return(self, matrices: list[WholeMatrix], owned: list[WholeMatrix], wholes: list[Tensor],
                squares: list[Tensor], like: Tensor) -> Pending:
        """Send every rank its parts, each with its squares behind it."""
        here, ranks = self._axis.rank, range(self._axis.size)
        sent = [piece for rank in ranks for matrix, whole, square in zip(owned, wholes, squares, strict=True)
                for piece in (whole[matrix.boxes[rank]], square)]
        to_each = [sum(self._returned_size(matrix, rank) for matrix in owned) for rank in ranks]
        from_each = [sum(self._returned_size(matrix, here) for matrix in _of(matrices, rank)) for rank in ranks]
        return start_exchange(self._flat(sent, like), to_each, from_each, self._axis)

    def _returned(self, matrices: list[WholeMatrix], returning: Pending) -> Iterator[Result]:
        here = self._axis.rank
        pieces = returning.wait().split([self._returned_size(matrix, here) for matrix in matrices])
        for matrix, piece in zip(matrices, pieces, strict=True):
            size = matrix.size_on(here)
            yield Result(matrix, matrix.boxes[here][0], piece[:size].view(matrix.shape_on(here)), piece[size:].float())

    def _returned_size(self, matrix: WholeMatrix, rank: int) -> int:
        return matrix.size_on(rank) + self._with_squares * matrix.shape[0]

    def _complete(self, results: Iterator[Result], done: dict[int, list[Result]]) -> Iterator[list[Result]]:
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


def _of(matrices: list[WholeMatrix], rank: int) -> list[WholeMatrix]:
    """Those that `rank` owns."""
    return [matrix for matrix in matrices if matrix.owner == rank]
