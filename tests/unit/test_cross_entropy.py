"""The loss on hidden states: its values, and that only few of the logits exist at a time."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron.kernels.cross_entropy import cross_entropy_reference
from megatron.kernels.packed_sequence import NO_TARGET
from megatron.parallel.mesh import Axis
from megatron.parallel.tensor import vocabulary
from megatron.parallel.tensor.layers import Matrix
from megatron.parallel.tensor.vocabulary import vocabulary_loss
from tests.largest import Largest

WIDTH = 24
# Of hidden states and logits rounded to the dtype; fp32 sums.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def table(num_ids: int) -> Matrix:
    matrix = Matrix()
    matrix.weight = torch.nn.Parameter(torch.randn(num_ids, WIDTH) * 0.5)
    return matrix


def outcome(num_targets: int, num_ids: int, dtype: torch.dtype, softcap: float | None) -> tuple[Any, Any]:
    """Loss, count and gradients of hidden states, weight and bias: ours, and the definition's in fp64."""
    torch.manual_seed(0)
    matrix, bias = table(num_ids), torch.randn(num_ids, requires_grad=True)
    hidden = torch.randn(num_targets, WIDTH).to(dtype).requires_grad_()
    ids = torch.randint(num_ids, (num_targets,))
    ids[2::4] = NO_TARGET
    inputs = hidden, matrix.weight, bias
    loss, count = vocabulary_loss(hidden, matrix, bias, ids, num_ids, Axis(), softcap)
    ours = loss, count, *torch.autograd.grad(2 * loss, inputs)
    exact = [tensor.detach().to(dtype).double().requires_grad_() for tensor in inputs]
    loss, count = cross_entropy_reference(exact[0] @ exact[1].t() + exact[2], ids, softcap)
    return ours, (loss, count, *torch.autograd.grad(2 * loss, exact))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("num_targets", "num_ids"), [(0, 33), (1, 33), (63, 30), (64, 128)])
@pytest.mark.parametrize("chunk", [8192, 16])
def test_loss_and_gradients_are_the_definitions_whatever_the_chunks(num_targets, num_ids, softcap, dtype, chunk):
    with patch.object(vocabulary, "_CHUNK", chunk):
        (loss, count, *gradients), (exact, true_count, *true_gradients) = outcome(num_targets, num_ids, dtype, softcap)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=TOLERANCE[dtype])
    assert abs(count - true_count) <= (0 if dtype == torch.float32 else 1)  # rounded logits may be equal
    assert [gradient.dtype for gradient in gradients] == [dtype, torch.float32, torch.float32]
    for ours, true in zip(gradients, true_gradients, strict=True):
        assert (ours.double() - true).norm() <= TOLERANCE[dtype] * true.norm()


def test_the_loss_of_many_targets_in_fp16_does_not_overflow():
    torch.manual_seed(0)
    matrix, hidden = table(32), torch.randn(4000, WIDTH).mul(20).half().requires_grad_()
    ids = torch.arange(4000) % 32
    loss, _ = vocabulary_loss(hidden, matrix, torch.zeros(32), ids, 32, Axis(), dtype=torch.float16)
    exact, _ = cross_entropy_reference(hidden.detach().double() @ matrix.weight.double().t(), ids, None)
    assert exact > 65_504  # the largest number of fp16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    loss.backward()
    assert hidden.grad.isfinite().all() and matrix.weight.grad.isfinite().all()


def test_each_targets_loss_is_rounded_to_the_dtype_that_is_asked_for():
    torch.manual_seed(0)
    matrix, hidden, ids = table(32), torch.randn(1, WIDTH).half(), torch.tensor([3])
    full, rounded = (vocabulary_loss(hidden, matrix, torch.zeros(32), ids, 32, Axis(), dtype=dtype)[0]
                     for dtype in (torch.float32, torch.float16))
    assert rounded == full.half() != full


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_however_many_targets_there_are_no_tensor_holds_more_than_a_chunk_of_logits(softcap):
    """128 ids are wider than these hidden states, so that logits of all targets would be the largest tensor."""
    num_targets, num_ids, chunk = 300, 128, 64
    matrix, hidden = table(num_ids), torch.randn(num_targets, WIDTH, requires_grad=True)
    with patch.object(vocabulary, "_CHUNK", chunk), Largest() as largest:
        loss, _ = vocabulary_loss(hidden, matrix, torch.zeros(num_ids), torch.zeros(num_targets, dtype=torch.int64),
                                  num_ids, Axis(), softcap)
        loss.backward()
    assert largest.size == max(chunk * num_ids, num_targets * WIDTH)
    with Largest() as whole:
        cross_entropy_reference(hidden @ matrix.weight.t(), torch.zeros(num_targets, dtype=torch.int64), softcap)
    assert whole.size == num_targets * num_ids
