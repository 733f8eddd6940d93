"""The C++ helper for operations between matrix products on CPUs agrees with PyTorch in fp64."""

import pytest
import torch

from megatron.kernels.pointwise import native
from megatron.kernels.pointwise.activation import activated, activated_reference
from megatron.kernels.pointwise.heads import HeadScaling, normed_queries_and_keys, prepared_heads
from megatron.kernels.rotary import Rotation, rotate_reference, rotation_of

pytestmark = pytest.mark.skipif(not native.is_built(), reason="megatron.kernels.pointwise._pointwise is not built")
KINDS = ["gelu_tanh", "gelu", "squared_relu", "swiglu"]
SHAPES = [(1, 1), (3, 7), (257, 300), (600, 515)]  # within a piece of 256 x 256, and beyond


def tensors_of(kind, shape, dtype, has_bias):
    """Product, its bias, gate and its bias; None where there is none."""
    made = [torch.randn(shape).mul(3).to(dtype), torch.randn(shape[1]) if has_bias else None]
    made += [torch.randn(shape).to(dtype), torch.randn(shape[1]) if has_bias else None] if kind == "swiglu" else []
    return [tensor if tensor is None else tensor.requires_grad_() for tensor in made]


def gradients(out, tensors, weights):
    return torch.autograd.grad(out, [tensor for tensor in tensors if tensor is not None], weights)


def in_fp64(kind, tensors, weights):
    wide = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in tensors]
    sums = [product if bias is None else product + bias for product, bias in zip(wide[::2], wide[1::2], strict=True)]
    out = activated_reference(kind, *sums)
    return out, *gradients(out, wide, weights.double())


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_and_all_their_gradients_are_those_of_fp64(kind, shape, has_bias):
    torch.manual_seed(0)
    tensors, weights = tensors_of(kind, shape, torch.float32, has_bias), torch.randn(shape)
    out = activated(kind, tuple(tensors[:2]), tuple(tensors[2:]) or None)
    for mine, exact in zip((out, *gradients(out, tensors, weights)), in_fp64(kind, tensors, weights), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, atol=4e-6 * exact.abs().max().item(), rtol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_in_bf16_are_at_most_twice_pytorchs(kind):
    torch.manual_seed(0)
    shape = (300, 130)
    tensors, weights = tensors_of(kind, shape, torch.bfloat16, True), torch.randn(shape).bfloat16()
    out = activated(kind, tuple(tensors[:2]), tuple(tensors[2:]) or None)
    sums = [product + bias.bfloat16() for product, bias in zip(tensors[::2], tensors[1::2], strict=True)]
    plain = activated_reference(kind, *sums)
    ours, plains = ((each, *gradients(each, tensors, weights)) for each in (out, plain))
    for mine, theirs, exact in zip(ours, plains, in_fp64(kind, tensors, weights), strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_large_or_not_a_number_is_as_in_pytorch(kind):
    wide = torch.tensor([[0.0, -0.0, 80.0, -80.0, 1e4, -1e4, torch.inf, torch.nan]]).repeat(3, 1)
    gates = [torch.ones_like(wide)] if kind == "swiglu" else []
    mine = activated(kind, (wide, None), (gates[0], None) if gates else None)
    exact = activated_reference(kind, wide.double(), *gates)  # in fp32 it makes NaN of infinity
    torch.testing.assert_close(mine, exact.float(), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "turned"), [(16, 16), (64, 32), (20, 10), (9, 4)])
def test_heads_are_turned_as_by_definition_and_back(width, turned, dtype):
    torch.manual_seed(width)
    qkv = torch.randn(300, 3, 4, width).to(dtype).requires_grad_()
    rotation, weights = rotation_of(torch.arange(300) % 100, turned, 10000.0), torch.randn(300, 3, 4, width).to(dtype)
    [mine], exact = prepared_heads(qkv, None, rotation), rotate_reference(qkv.detach().float(), rotation)
    assert mine.dtype == dtype
    torch.testing.assert_close(mine.float(), exact, atol=1e-6 if dtype == torch.float32 else 0, rtol=4e-3)
    wide = qkv.detach().float().requires_grad_()
    expected, = torch.autograd.grad(rotate_reference(wide, rotation), wide, weights.float())
    gradient, = torch.autograd.grad(mine, qkv, weights)
    torch.testing.assert_close(gradient.float(), expected, atol=1e-6 if dtype == torch.float32 else 0, rtol=4e-3)


def test_a_rotation_without_a_norm_keeps_its_cosines_and_sines_alone_for_the_backward_pass():
    kept, rotation = [], rotation_of(torch.arange(30), 8, 10000.0)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda _: None):
        prepared_heads(torch.randn(30, 3, 4, 8, requires_grad=True), None, rotation)
    assert kept == [rotation.cos.shape, rotation.sin.shape]


# Tokens, groups, rows of a group, width, columns turned: widths that have code of their own, and others.
HEADS = [(1, 1, 3, 8, 8), (5, 2, 3, 9, 4), (300, 3, 4, 32, 32), (257, 2, 3, 64, 32), (300, 1, 5, 20, 0)]


def heads_of(shape, dtype):
    """Projection, scales of queries and keys, rotation, and the gradient of what is made."""
    torch.manual_seed(0)
    tokens, groups, rows, width, turned = shape
    inputs = [torch.randn(*shape[:-1]).to(dtype), torch.randn(groups * (rows - 2) * width), torch.randn(groups * width)]
    rotation = rotation_of(torch.arange(tokens) % 100, turned, 1e4) if turned else None
    return [each.requires_grad_() for each in inputs], rotation, torch.randn(shape[:-1]).to(dtype)


def plain_heads(inputs, is_rms, rotation, outer):
    """By PyTorch's functions, with the gradients."""
    normed = normed_queries_and_keys(inputs[0], HeadScaling(*inputs[1:], 1e-5, is_rms))
    out = normed if rotation is None else rotate_reference(normed, rotation)
    return out, *gradients(out, inputs, outer)


def prepared_and_gradients(inputs, is_rms, rotation, outer):
    [out] = prepared_heads(inputs[0], HeadScaling(*inputs[1:], 1e-5, is_rms), rotation)
    return out, *gradients(out, inputs, outer)


def heads_in_fp64(inputs, is_rms, rotation, outer):
    exact = rotation and Rotation(rotation.cos.double(), rotation.sin.double())
    return plain_heads([each.detach().double().requires_grad_() for each in inputs], is_rms, exact, outer.double())


@pytest.mark.parametrize("is_rms", [True, False])
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_heads_are_normalised_and_turned_as_in_fp64_with_all_gradients(shape, is_rms):
    inputs, rotation, outer = heads_of(shape, torch.float32)
    ours = prepared_and_gradients(inputs, is_rms, rotation, outer)
    for mine, exact in zip(ours, heads_in_fp64(inputs, is_rms, rotation, outer), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, atol=2e-6 * exact.abs().max().item(), rtol=2e-6)
    assert torch.equal(ours[0][:, :, -1], inputs[0][:, :, -1]) and torch.equal(ours[1][:, :, -1], outer[:, :, -1])


@pytest.mark.parametrize("is_rms", [True, False])
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_errors_of_heads_in_bf16_are_at_most_twice_pytorchs(shape, is_rms):
    inputs, rotation, outer = heads_of(shape, torch.bfloat16)
    ours, plains = (made(inputs, is_rms, rotation, outer) for made in (prepared_and_gradients, plain_heads))
    for mine, plain, exact in zip(ours, plains, heads_in_fp64(inputs, is_rms, rotation, outer), strict=True):
        assert mine.dtype == plain.dtype
        assert (mine - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_tokens_are_fp32s(dtype):
    torch.manual_seed(0)
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        torch.testing.assert_close(native.sum_tokens(x), x.double().sum(0).float(), atol=1e-5, rtol=1e-5)


def test_the_bits_do_not_depend_on_the_threads():
    torch.manual_seed(0)
    tensors, weights = tensors_of("swiglu", (700, 300), torch.float32, True), torch.randn(700, 300)
    heads = heads_of((700, 2, 3, 32, 32), torch.float32)
    results, threads = [], torch.get_num_threads()
    for number in (1, 3):
        torch.set_num_threads(number)
        try:
            out = activated("swiglu", tuple(tensors[:2]), tuple(tensors[2:]))
            results.append((out, *gradients(out, tensors, weights), native.sum_tokens(weights),
                            *prepared_and_gradients(heads[0], True, *heads[1:])))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("tensor", [torch.empty(4, device="meta"), torch.empty(4).half(), torch.empty(4).double()])
def test_what_is_not_on_the_host_or_of_another_dtype_is_left_to_pytorch(tensor):
    assert not native.takes_native(tensor)
    assert native.takes_native(torch.empty(4, 8))
