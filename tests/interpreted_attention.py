"""Checks of the Triton attention kernel, interpreted on CPU tensors.

    TRITON_INTERPRET=1 python -m tests.interpreted_attention FILE CHECK…

Writes to FILE (by torch.save) the result of each check of `CHECKS`. They run in their own process because Triton reads
the variable when a kernel is defined; tests/unit/test_triton_attention.py starts that process and judges the results.
Errors are norms relative to the exact result in fp64, reported next to those of the definition in the kernel's dtype.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megatron.kernels.attention import launches
from megatron.kernels.attention.by_protein import attention_by_protein
from megatron.kernels.attention.fused import by_triton
from megatron.kernels.attention.packed import attention_reference
from megatron.kernels.dropout import Dropout, Use
from megatron.kernels.packed_sequence import PackedSequence
from tests.packed import packed_batch

RATE = 0.3


@dataclass(frozen=True)
class Case:
    """One input of attention: proteins of `lengths` and `filler` tokens, and how they are attended to.

    `groups` and `queries`: the groups of heads, and the queries in each; `width`: of a head. `ranks`: the number of
    ranks that the queries are split over. `is_scattered`: the rows of a group are not contiguous in memory. `blocks`:
    the kernel's block sizes in queries and keys.
    """

    lengths: tuple[int, ...] = (37, 1, 20, 1, 1, 9)
    filler: int = 19
    groups: int = 1
    queries: int = 1
    width: int = 16
    dtype: torch.dtype = torch.float32
    window: tuple[int, int] | None = None
    dropout: float = 0.0
    ranks: int = 1
    is_scattered: bool = False
    blocks: tuple[int, int] | None = (16, 32)  # None: those used on a GPU; small ones make more blocks

    @property
    def sequence(self) -> PackedSequence:
        """The packed proteins, with the boundaries of two empty ones."""
        return packed_batch(*self.lengths, filler=self.filler, empty=2).sequence

    @property
    def num_real(self) -> int:
        """The number of tokens that belong to proteins."""
        return sum(self.lengths)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Random queries, keys and values, and a gradient of the context; both are NaN in the filler."""
        generator, total = torch.Generator().manual_seed(1), self.num_real + self.filler
        qkv = torch.randn(total, self.groups, self.queries + 2, self.width, generator=generator)
        weights = torch.randn(total, self.groups * self.queries, self.width, generator=generator)
        qkv[self.num_real:] = weights[self.num_real:] = torch.nan
        return qkv.to(self.dtype), weights.to(self.dtype)


CASES = {
    "small heads": Case(width=8, groups=3),
    "a width of 20": Case(width=20, queries=2),
    "a width of 40": Case(width=40),
    "a width of 72": Case(width=72),
    "a width of 256": Case((20, 12), width=256),
    "groups of three queries": Case((20, 1, 9), filler=5, groups=2, queries=3),
    "fp16": Case(dtype=torch.float16, width=32),
    "proteins of one token": Case((1,) * 40),
    "no filler": Case(filler=0),
    "filler of many segments": Case((5, 3), filler=60),
    "one protein over many blocks": Case((150,), filler=3),
    "filler alone": Case((), filler=20),
    "a projection that is not contiguous": Case(is_scattered=True),
    "a window": Case((90, 1, 33), window=(11, 5)),
    "a window of one token": Case(window=(0, 0)),
    "a window wider than proteins": Case(window=(300, 2), queries=2),
    "dropout": Case(dropout=RATE, queries=2),
    "dropout in a window": Case((60, 7), dropout=RATE, window=(20, 9), width=20),
    "two ranks": Case((37, 1, 20, 9), filler=13, ranks=2),
    "four ranks, one of them filler": Case((37, 20), filler=19 + 24, ranks=4),
    "four ranks, windows, groups": Case((90, 1, 33), filler=4, ranks=4, window=(11, 40), queries=2),
    "two ranks with dropout": Case((37, 1, 20, 9), filler=13, ranks=2, dropout=RATE),
    "a long protein": Case((2100, 30), filler=40, blocks=(256, 256)),
    "dropout in a GPU's blocks": Case((200, 30), filler=40, width=64, groups=2, blocks=None, dropout=RATE),
}


def attend(case: Case, qkv: Tensor) -> Tensor:
    """The context by the Triton kernel; that of several ranks is concatenated."""
    sequence, contexts = case.sequence, []
    if case.is_scattered:
        qkv = torch.stack([qkv, qkv], -2)[..., 0, :]
    for rank in range(case.ranks):
        if case.ranks == 1:
            contexts.append(by_triton(qkv, sequence, dropout_of(case), case.window))
        else:
            first = rank * len(qkv) // case.ranks
            query = qkv[first:first + len(qkv) // case.ranks, :, :-2]
            contexts.append(by_triton(query, sequence, dropout_of(case), case.window, qkv[:, :, -2:], first))
    return torch.cat(contexts)


def dropout_of(case: Case) -> Dropout | None:
    seed = torch.tensor(0x5DEECE66D1234567)
    return Dropout(case.dropout, seed, Use.PROBABILITIES, first_head=3) if case.dropout else None


def define(case: Case, qkv: Tensor) -> Tensor:
    """The context of the proteins' tokens by the reference, attention_reference."""
    return attention_reference(qkv[:case.num_real], case.sequence, dropout_of(case), case.window)


def errors(case: Case) -> dict[str, Any]:
    """For the context and the gradient: the kernel's error, the definition's error, whether the filler's are all 0.

    Each value is a list of two, in this order.
    """
    qkv, weights = case.tensors()
    real = slice(case.num_real)

    def outcome(function: Any, dtype: torch.dtype, shown: slice) -> tuple[Tensor, Tensor]:
        x = qkv.to(dtype).requires_grad_()
        context = function(case, x)
        return context.detach(), torch.autograd.grad(context, x, weights[shown].to(dtype))[0]

    ours = outcome(attend, case.dtype, slice(None))
    plain, exact = (outcome(define, dtype, real) for dtype in (case.dtype, torch.float64))
    return {"ours": [_error(*pair) for pair in zip(ours, exact, strict=True)],
            "definition": [_error(*pair) for pair in zip(plain, exact, strict=True)],
            "filler": [not tensor[case.num_real:].any().item() for tensor in ours]}


def of_titin() -> dict[str, list[float]]:
    """Errors of the kernel and of attention_by_protein on a protein of 35,213 residues (titin) with a window.

    The exact result is attention_by_protein's in fp64: by the definition the scores would take 5 GB.
    """
    case = Case((35_213,), filler=100, window=(40, 25), dropout=RATE)
    qkv, weights = case.tensors()

    def by_protein(x: Tensor) -> Tensor:
        sequence = case.sequence
        return attention_by_protein(x, sequence, dropout_of(case), case.window)

    def outcome(function: Any, dtype: torch.dtype) -> list[Tensor]:
        x = qkv.to(dtype).requires_grad_()
        context = function(x)[:case.num_real]
        return [context.detach(), torch.autograd.grad(context, x, weights[:case.num_real].to(dtype))[0][:case.num_real]]

    exact = outcome(by_protein, torch.float64)
    return {name: [_error(*pair) for pair in zip(outcome(way, torch.float32), exact, strict=True)]
            for name, way in (("ours", lambda x: attend(case, x)), ("by protein", by_protein))}


def _error(found: Tensor, exact: Tensor) -> float:
    """The relative error in norm over the tokens that both have."""
    size = min(len(found), len(exact))
    return ((found[:size] - exact[:size]).norm() / exact.norm().clamp(min=1e-30)).item()


def checks_of_the_operator() -> None:
    """Raises if the operator or its backward pass breaks torch's rules for custom operators (torch.library.opcheck)."""
    case = Case((5, 1), filler=2, queries=2, dropout=RATE)
    qkv = torch.randn(8, 1, 4, 16, requires_grad=True)
    ends, numbers = case.sequence.cu_seqlens, (case.sequence.num_filler, 0, 3, 1, 50000, 3)
    for own, others in ((qkv, None), (qkv[:, :, :-2], qkv[:, :, -2:])):
        arguments = own, others, ends, torch.tensor(7), *numbers
        torch.library.opcheck(torch.ops.megatron.fused_attention.default, arguments)
        context, logarithm = (result.detach() for result in torch.ops.megatron.fused_attention(*arguments))
        given = [tensor if tensor is None else tensor.detach() for tensor in arguments[:4]]
        torch.library.opcheck(torch.ops.megatron.fused_attention_backward.default,
                              (torch.ones_like(context), *given, context, logarithm, *numbers))


def bits() -> dict[str, list[Tensor]]:
    """Context and gradient with dropout: once, again, and with another first protein beside the same others."""
    case = Case((21, 40, 3), filler=5, dropout=RATE, queries=2)
    qkv, weights = (tensor.nan_to_num() for tensor in case.tensors())

    def outcome() -> list[Tensor]:
        x = qkv.clone().requires_grad_()
        context = attend(case, x)
        return [context.detach(), *torch.autograd.grad(context, x, weights)]

    found = {"once": outcome(), "again": outcome()}
    qkv[:21] += 1
    found["beside another protein"] = outcome()
    return found


# By name: a case in blocks of 16 queries and 32 keys; the tokens that are set to NaN; the tokens whose blocks may read
# those.
UNSEEN = {
    "other proteins": (Case((32, 32, 32), filler=0, queries=2), slice(32, 64), slice(32, 64)),
    "outside the window": (Case((192,), filler=0, window=(11, 5)), slice(100, 101), slice(64, 160)),
    "another rank's proteins": (Case((64, 64, 64, 64), filler=0, ranks=2), slice(128, 192), slice(128, 192)),
}


def of_unseen(case: Case, broken: slice, read: slice) -> list[bool]:
    """For the context and the gradient: whether NaNs in the tokens `broken` reach only the tokens `read`.

    True if all tokens outside `read` keep their bits and `broken` has NaNs. A kernel that visits a block brings its
    NaNs into the sums even where the scores are masked, so this shows which blocks it skips.
    """
    def outcome() -> list[Tensor]:
        x = qkv.clone().requires_grad_()
        context = attend(case, x)
        return [context.detach(), *torch.autograd.grad(context, x, weights)]

    qkv, weights = case.tensors()
    before = outcome()
    qkv[broken] = weights[broken] = torch.nan
    is_unread = torch.ones(len(qkv), dtype=torch.bool)
    is_unread[read] = False
    return [torch.equal(once[is_unread], now[is_unread]) and bool(now[broken].isnan().any())
            for once, now in zip(before, outcome(), strict=True)]


# The checks by name.
CHECKS: dict[str, Callable[[], Any]] = {
    **{name: partial(errors, case) for name, case in CASES.items()},
    **{name: partial(of_unseen, *what) for name, what in UNSEEN.items()},
    "the operator": checks_of_the_operator, "bits": bits, "titin": of_titin}


def main() -> None:
    """Write the results of the checks, by name, to the file."""
    file, *names = sys.argv[1:]
    choose, results = launches._blocks, {}
    for name in names:
        blocks = CASES[name].blocks if name in CASES else (512, 512) if name == "titin" else Case.blocks

        def chosen(kernel: str, qkv: Tensor, blocks: tuple[int, int] | None = blocks) -> dict[str, int]:
            given = choose(kernel, qkv)
            return given if blocks is None else {**given, **dict(zip(given, blocks, strict=False))}

        with patch.object(launches, "_blocks", chosen):
            results[name] = CHECKS[name]()
    torch.save(results, file)


if __name__ == "__main__":
    main()
