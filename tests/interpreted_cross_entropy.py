"""Checks of the Triton kernels for cross entropy, interpreted on CPU tensors; `tests.interpreted` runs them."""

from collections.abc import Callable, Sequence
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from megatron.kernels import cross_entropy_triton
from megatron.kernels.cross_entropy import cross_entropy_reference, logits_gradient, target_statistics
from megatron.kernels.packed_sequence import NO_TARGET

# Relative errors in norm, by the dtype stored; the interpreter truncates to bf16, where a GPU rounds.
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def approximate() -> float:
    """The factor by which errors may be larger: 10 on GPUs, whose exponentials are approximate, otherwise 1."""
    return 10.0 if torch.get_default_device().type == "cuda" else 1.0


def check_loss(num_targets: int, num_ids: int, dtype: torch.dtype, softcap: float | None, parts: int) -> None:
    """Loss, number of correct predictions and gradient against the definition in fp64.

    The vocabulary of the logits is cut into `parts`, as tensor ranks split it.
    """
    logits = (3 * torch.randn(num_targets, num_ids)).to(dtype)
    ids = torch.randint(num_ids, (num_targets,))
    ids[1::3] = NO_TARGET
    ids[::5] = logits[::5].argmax(1)
    exact = logits.double().requires_grad_()
    loss, count = cross_entropy_reference(exact, ids, softcap)
    true, = torch.autograd.grad(3 * loss, exact)
    pieces = logits.tensor_split(parts, 1)
    firsts = [sum(piece.shape[1] for piece in pieces[:place]) for place in range(parts)]
    found = [target_statistics(piece, ids, first, softcap) for piece, first in zip(pieces, firsts, strict=True)]
    logsumexp, share, likeliest, largest = map(torch.stack, zip(*found, strict=True))
    together = logsumexp.logsumexp(0)
    share = (share + logsumexp - together).amax(0).where(ids != NO_TARGET, 0)
    assert abs(loss + share.double().sum()) <= (1e-6 * loss + 1e-6) * approximate()
    assert likeliest.gather(0, largest.argmax(0)[None]).sum() == count
    ours = [logits_gradient(piece, ids, together, torch.tensor(3.0), first, softcap)
            for piece, first in zip(pieces, firsts, strict=True)]
    assert all(each.dtype == dtype and each.shape == piece.shape for each, piece in zip(ours, pieces, strict=True))
    _compare(torch.cat(ours, 1), true, _TOLERANCE[dtype] * approximate())
    assert not torch.cat(ours, 1)[ids == NO_TARGET].any()


def check_blocks() -> None:
    """A vocabulary wider than a block is processed block by block."""
    with patch.object(cross_entropy_triton, "_WIDEST", 32):
        check_loss(7, 101, torch.float32, None, 1)
        check_loss(7, 101, torch.float16, 5.0, 2)


def check_ties() -> None:
    """Of equal logits the first counts as the prediction, within a block and across blocks."""
    with patch.object(cross_entropy_triton, "_WIDEST", 16):
        logits = torch.zeros(4, 40)
        logits[:2, [3, 9, 20]] = 1
        likeliest = target_statistics(logits, torch.tensor([3, 9, 0, 20]), 0, None)[2]
    assert likeliest.tolist() == [1, 0, 1, 0]


def check_small_caps() -> None:
    """Logits far below the cap give the statistics that they would give without one, to within rounding."""
    logits = torch.randn(9, 33)
    ids = torch.arange(9)
    for ours, plain in zip(target_statistics(logits, ids, 0, 1e4), target_statistics(logits, ids, 0, None),
                           strict=True):
        _compare(ours, plain, 1e-6 * approximate())


def _compare(ours: Tensor, true: Tensor, tolerance: float) -> None:
    error, size = (ours.double() - true.double()).norm(), true.double().norm()
    assert error <= tolerance * size + 1e-7, f"error {error:.2e} of {size:.2e}"


_SHAPES: Sequence[tuple[int, int]] = (0, 33), (1, 33), (1, 1), (37, 30), (21, 128), (5, 300)
CHECKS: dict[str, Callable[[], None]] = {
    **{f"loss of {shape}, {dtype}, cap {softcap}, {parts} parts": partial(check_loss, *shape, dtype, softcap, parts)
       for shape in _SHAPES for dtype, softcap, parts in [
           (torch.float32, None, 1), (torch.float32, 2.0, 3), (torch.bfloat16, None, 2), (torch.float16, 30.0, 1)]},
    "loss over blocks": check_blocks, "loss of equal logits": check_ties, "loss under a high cap": check_small_caps,
}
