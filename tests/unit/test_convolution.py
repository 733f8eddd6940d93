"""The convolution over each protein, native and plain, agrees with torch's own on each protein alone in fp64."""

import pytest
import torch
from torch.nn import functional as F

from megatron.kernels.pointwise import native
from megatron.kernels.pointwise.convolution import convolved

LENGTHS = [(1,), (2, 1, 3, 1), (4, 9, 1, 37, 2), (150, 1, 290)]  # shorter than the taps, and beyond a piece of 256
FEATURES = [1, 7, 300]


@pytest.fixture(params=["native", "plain"], autouse=True)
def way(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(native, "_helper", None)
    elif not native.is_built():
        pytest.skip("megatron.kernels.pointwise._pointwise is not built")


def positions_of(lengths, filler=0):
    return torch.cat([*map(torch.arange, lengths), torch.zeros(filler, dtype=torch.int64)])


def made(lengths, features, taps, dtype=torch.float32):
    """What is convolved, the weight, and the gradient of what is made."""
    torch.manual_seed(0)
    x, outer = torch.randn(2, sum(lengths), features).to(dtype)
    return x.requires_grad_(), torch.randn(features, taps).requires_grad_(), outer


def by_protein(x, weight, lengths):
    """By torch's own convolution."""
    features, taps = weight.shape
    pieces = [F.conv1d(piece.T[None], weight[:, None], padding=taps // 2, groups=features)[0].T
              for piece in x.split(lengths)]
    return x + torch.cat(pieces)


def with_gradients(out, inputs, outer):
    return out, *torch.autograd.grad(out, inputs, outer)


def exactly(x, weight, outer, lengths):
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    return with_gradients(by_protein(*wide, lengths), wide, outer.double())


@pytest.mark.parametrize("taps", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_each_protein_and_both_gradients_are_those_of_torchs_convolution(lengths, features, taps):
    x, weight, outer = made(lengths, features, taps)
    ours = with_gradients(convolved(x, positions_of(lengths), weight), (x, weight), outer)
    for mine, exact in zip(ours, exactly(x, weight, outer, lengths), strict=True):
        assert mine.dtype == torch.float32 and mine.is_contiguous()
        torch.testing.assert_close(mine.double(), exact, atol=2e-6 * exact.abs().max().item(), rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_fp32s_and_rounded_once(dtype):
    x, weight, outer = made((40, 3, 60), 70, 5, dtype)
    out, grad_x, grad_weight = with_gradients(convolved(x, positions_of((40, 3, 60)), weight), (x, weight), outer)
    exact_out, exact_x, exact_weight = exactly(x, weight, outer, (40, 3, 60))
    for mine, exact in ((out, exact_out), (grad_x, exact_x)):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), exact, atol=1e-5, rtol=torch.finfo(dtype).eps / 2)
    assert grad_weight.dtype == torch.float32
    torch.testing.assert_close(grad_weight.double(), exact_weight, atol=1e-4, rtol=1e-5)


def test_no_protein_sees_the_filler_or_its_neighbours():
    x, weight, _ = made((5, 6, 3), 9, 7)
    with torch.no_grad():
        x[:5], x[11:] = torch.nan, torch.inf
    out = convolved(x, positions_of((5, 6), filler=3), weight)
    torch.testing.assert_close(out[5:11], by_protein(x[5:11], weight, (6,)))


def test_gradients_are_taken_of_what_does_not_lie_in_rows():
    x, weight, outer = made((5, 6), 9, 3)
    gathered = with_gradients(convolved(x.t().contiguous().t(), positions_of((5, 6)), weight), (x, weight),
                              outer.t().contiguous().t())
    torch.testing.assert_close(gathered, exactly(x, weight, outer, (5, 6)), check_dtype=False)


def test_a_part_with_its_neighbours_is_that_part_of_the_whole():
    """So that ranks may share out the tokens of a protein."""
    lengths = (9, 20, 4)
    x, weight, _ = made(lengths, 6, 5)
    whole, positions = convolved(x, positions_of(lengths), weight), positions_of(lengths)
    part = convolved(x[10:22], positions[10:22], weight)[2:-2]
    assert torch.equal(part, whole[12:20])


def test_the_bits_do_not_depend_on_the_threads():
    lengths = (150, 400, 150)
    x, weight, outer = made(lengths, 300, 5)
    results, threads = [], torch.get_num_threads()
    for number in (1, 3):
        torch.set_num_threads(number)
        try:
            results.append(with_gradients(convolved(x, positions_of(lengths), weight), (x, weight), outer))
        finally:
            torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_fp64_stays_fp64():
    x, weight, _ = made((4, 5), 3, 3, torch.float64)
    out = convolved(x, positions_of((4, 5)), weight.double())
    torch.testing.assert_close(out, by_protein(x, weight.double(), (4, 5)), atol=1e-14, rtol=1e-14)
