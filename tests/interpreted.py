"""Checks of the Triton kernels, interpreted on CPU tensors, against plain PyTorch in fp64.

    TRITON_INTERPRET=1 python -m tests.interpreted [CHECK…]

Prints as JSON the traceback of each check of `CHECKS`, "" for those that passed. A check takes tenths of a second. They
run in their own process because Triton reads the variable when it is loaded; tests/unit/test_triton_pointwise.py starts
that process.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import varlen

from megatron.config import PrecisionConfig
from megatron.kernels.attention.by_protein import attention_by_protein
from megatron.kernels.dropout import Dropout, Use
from megatron.kernels.packed_sequence import PackedSequence
from megatron.kernels.pointwise.activation import activated, activated_reference
from megatron.kernels.pointwise.convolution import convolved, convolved_reference
from megatron.kernels.pointwise.heads import HeadScaling, normed_queries_and_keys, prepared_heads
from megatron.kernels.pointwise.residual_norm import (
    Scaling,
    add_branch,
    normalised,
    normalised_reference,
)
from megatron.kernels.rotary import Rotation, rotate_reference, rotation_of
from megatron.model.initialisation import initialise
from megatron.model.protein_model import ProteinModel
from megatron.parallel import context
from tests import interpreted_cross_entropy, interpreted_maps
from tests.families import FAMILIES, MASK_ID
from tests.packed import packed_batch
from tests.philox import kept

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Relative errors in norm. The interpreter truncates to bf16 where a GPU rounds, which doubles the error.
TOLERANCE = {FP32: 1e-6, BF16: 6e-3, FP16: 6e-4}
SEED, FIRST_ROW = 0x5DEECE66D1234567, 1000


def dropout(rate: float, seed: int = SEED) -> Dropout | None:
    """Dropout for rows that are numbered from FIRST_ROW; None for a rate of 0."""
    return Dropout(rate, torch.tensor(seed), Use.ATTENTION_OUTPUT, FIRST_ROW) if rate else None


def expected_mask(num_rows: int, width: int, rate: float) -> Tensor:
    """The elements that dropout keeps, bool [num_rows, width], by the independent Philox of tests/philox.py."""
    rows = range(FIRST_ROW, FIRST_ROW + num_rows)
    mask = torch.from_numpy(kept(SEED, rate, rows, range(width), [0], Use.ATTENTION_OUTPUT)[0])
    return mask.to(torch.get_default_device())


def random(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def compare(outputs: Sequence[Tensor], inputs: Sequence[Tensor], exact: Callable[..., Sequence[Tensor]]) -> None:
    """Asserts that outputs and input gradients agree with those of `exact`, a function of the inputs in fp64.

    The gradients are taken for random gradients of the outputs.
    """
    weights = [torch.randn_like(output) for output in outputs]
    gradients = torch.autograd.grad(outputs, inputs, weights)
    twins = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = exact(*twins)
    exact_gradients = torch.autograd.grad(expected, twins, [weight.double() for weight in weights])
    tolerance = max(TOLERANCE[tensor.dtype] for tensor in (*outputs, *inputs))
    for ours, true in zip((*outputs, *gradients), (*expected, *exact_gradients), strict=True):
        assert ours.shape == true.shape
        error, size = (ours.double() - true).norm(), true.norm()
        assert error <= tolerance * size + 1e-7, f"error {error:.2e} of {size:.2e} in {ours.dtype}"
    for ours, its in zip(gradients, inputs, strict=True):
        assert ours.dtype == its.dtype


def scaling_of(scale: Sequence[Tensor]) -> Scaling:
    """The Scaling of a norm that has a weight, or a weight and a bias."""
    return Scaling(scale[0], scale[1] if len(scale) > 1 else None, 1e-5)


def check_join(num_rows: int, width: int, stream: torch.dtype, branch: torch.dtype, rate: float, kind: str,
               has_bias: bool) -> None:
    """The sum of residual and branch, its norm, and all gradients; `kind`: the norm, or "" for the sum alone."""
    inputs = [random(num_rows, width, dtype=stream), random(num_rows, width, dtype=branch)]
    inputs += [random(width) for _ in range(has_bias + ["", "RMSNorm", "LayerNorm"].index(kind))]
    scale = inputs[2 + has_bias:]
    mask = expected_mask(num_rows, width, rate) * 65536 / round((1 - rate) * 65536)

    def exact(residual: Tensor, branch: Tensor, *rest: Tensor) -> list[Tensor]:
        total, scale = residual + mask * (branch + rest[0] if has_bias else branch), rest[has_bias:]
        return [total, normalised_reference(total, scaling_of(scale))] if scale else [total]

    scaling = scaling_of(scale) if kind else None
    outputs = add_branch(inputs[0], (inputs[1], inputs[2] if has_bias else None), dropout(rate), scaling, branch)
    assert outputs[0].dtype == torch.promote_types(stream, branch) and (not kind or outputs[1].dtype == branch)
    compare(outputs[:1 + (kind != "")], inputs, exact)


def check_norm(num_rows: int, width: int, stream: torch.dtype, dtype: torch.dtype, kind: str) -> None:
    """A norm alone. Its input is used twice, also as the residual, and the gradient is the sum of both uses."""
    x = random(num_rows, width, dtype=stream)
    scale = [random(width) for _ in range(1 + (kind == "LayerNorm"))]
    outputs = normalised(x, scaling_of(scale), dtype)
    assert outputs[0].data_ptr() == x.data_ptr() and outputs[1].dtype == dtype
    compare(outputs, [x, *scale], lambda x, *scale: [x * 1, normalised_reference(x, scaling_of(scale))])


def check_strided() -> None:
    """Tensors whose rows are not contiguous are accepted, forward and backward."""
    x, scale = random(40, 6), [random(40), random(40)]
    compare([normalised(x.t(), scaling_of(scale), FP32)[1].t()], [x, *scale],
            lambda x, *scale: [normalised_reference(x.t(), scaling_of(scale)).t()])
    wide = random(7, 40)
    compare([activated("gelu", (wide.t(), None)).t()], [wide], lambda wide: [activated_reference("gelu", wide)])
    qkv, rotation = random(3, 2, 8, 5), rotation_of(torch.arange(5), 8, 1e4)
    exact = Rotation(rotation.cos.double(), rotation.sin.double())
    compare(prepared_heads(qkv.permute(3, 1, 0, 2), None, rotation), [qkv],
            lambda qkv: [rotate_reference(qkv.permute(3, 1, 0, 2), exact)])


def check_no_rows() -> None:
    """Inputs without rows pass, forward and backward."""
    inputs = [random(0, 20), random(0, 20), random(20), random(20), random(20)]
    for scale in ([], inputs[3:]):
        outputs = add_branch(inputs[0], (inputs[1], inputs[2]), dropout(0.3), scaling_of(scale) if scale else None,
                             FP32)
        torch.autograd.grad([outputs[-1].sum()], inputs[:3 + len(scale)])
    without_bias = add_branch(inputs[0], (inputs[1], None), dropout(0.3), None, FP32)
    torch.autograd.grad([without_bias[0].sum()], inputs[:2])


def check_activation(kind: str, num_rows: int, width: int, dtype: torch.dtype, has_bias: bool) -> None:
    """An activation of `products + biases`, and the gradients of both."""
    parts = [(random(num_rows, width, dtype=dtype), random(width) if has_bias else None)
             for _ in range(1 + (kind == "swiglu"))]
    inputs = [tensor for part in parts for tensor in part if tensor is not None]

    def exact(*inputs: Tensor) -> list[Tensor]:
        products = [inputs[place] + inputs[place + 1] for place in range(0, len(inputs), 2)] if has_bias else inputs
        return [activated_reference(kind, *products)]

    compare([activated(kind, *parts)], inputs, exact)


def check_heads(shape: Sequence[int], half: int, dtype: torch.dtype, kind: str, is_apart: bool = False) -> None:
    """Queries and keys are normalised, or get a bias, and are rotated.

    `shape`: tokens, groups, rows of a group (its queries, key and value), width. `half`: half of the rotated width, 0
    for no rotation. `is_apart`: queries, keys and values are returned as three tensors.
    """
    tokens, groups, rows, width = shape
    inputs = [random(*shape, dtype=dtype)]
    inputs += ([random(groups * (rows - 2) * width), random(groups * width)] if kind else
               [random(groups * rows * width)])
    rotation = rotation_of(torch.arange(tokens) * 100, 2 * half, 1e4) if half else None

    def exact(qkv: Tensor, *rest: Tensor) -> Sequence[Tensor]:
        if kind:
            qkv = normed_queries_and_keys(qkv, HeadScaling(rest[0], rest[1], 1e-5, kind == "RMSNorm"))
        else:
            qkv = qkv + rest[0].view(shape[1:])
        wide = rotation and Rotation(rotation.cos.double(), rotation.sin.double())
        whole = rotate_reference(qkv, wide) if wide else qkv
        return whole.unbind(2) if is_apart else [whole]

    def prepared(qkv: Tensor) -> Sequence[Tensor]:
        scaling = HeadScaling(inputs[1], inputs[2], 1e-5, kind == "RMSNorm") if kind else None
        return prepared_heads(qkv, scaling, rotation, None if kind else inputs[1], is_apart)

    # Not a leaf, so that a rotation without a norm happens in place. The bias has been added already.
    qkv = inputs[0] * 1 if kind else inputs[0] + inputs[1].detach().to(dtype).view(shape[1:])
    before = qkv.detach().clone()
    out = prepared(qkv)
    assert (out[0].data_ptr() == qkv.data_ptr()) == (not kind)
    assert torch.equal(out[2] if is_apart else out[0][:, :, -1], before[:, :, -1])
    compare(out, inputs, exact)
    if not kind:
        leaf = before.clone().requires_grad_()
        assert all(torch.equal(*pair) for pair in zip(prepared(leaf), out, strict=True))
        assert torch.equal(leaf, before), "a leaf stays as it is"


def check_convolution(lengths: Sequence[int], width: int, taps: int, dtype: torch.dtype) -> None:
    """The convolution of some proteins, with the gradients of input and weight.

    Also with the gradient of a bias that was added to the input beforehand.
    """
    positions = torch.cat([torch.arange(length) for length in lengths])
    inputs = [random(len(positions), width, dtype=dtype), random(width, taps)]
    compare([convolved(inputs[0], positions, inputs[1])], inputs,
            lambda x, weight: [convolved_reference(x, positions, weight)])
    bias = random(width)
    with_bias = inputs[0] + bias.detach().to(dtype)
    compare([convolved(with_bias, positions, inputs[1], bias)], [*inputs, bias],
            lambda x, weight, bias: [convolved_reference(x + bias, positions, weight)])


def check_convolution_of_two_ranks() -> None:
    """Two ranks' gradients of the bias add up to that of one rank.

    Each rank also sees the other's tokens next to the cut (the halo).
    """
    positions, halo, cut = torch.cat([torch.arange(9), torch.arange(14)]), 2, 12
    x, weight, bias, outer = random(23, 20), random(20, 5), random(20), random(23, 20).detach()
    grads = []
    for first, last in ((0, 23), (0, cut), (cut, 23)):
        begin, end = max(first - halo, 0), min(last + halo, 23)
        out = convolved((x + bias.detach())[begin:end], positions[begin:end], weight, bias)
        own = slice(first - begin, last - begin)
        grads.append(torch.autograd.grad(out[own], bias, outer[first:last])[0])
    assert torch.allclose(grads[0], grads[1] + grads[2], rtol=1e-6, atol=1e-6)
    assert torch.allclose(grads[0], torch.autograd.grad(convolved_reference(x + bias, positions, weight), bias,
                                                        outer)[0], rtol=1e-6, atol=1e-6)


def check_overwriting() -> None:
    """A backward pass that needs a projection that was rotated in place raises, rather than use the wrong values."""
    x = random(3, 2, 3, 8)
    kept = x * 1
    product = kept.square()  # saves `kept` for its backward pass
    [turned] = prepared_heads(kept, None, rotation_of(torch.arange(3), 8, 1e4))
    try:
        torch.autograd.grad((product.sum(), turned.sum()), x)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        raise AssertionError("the gradient is wrong")


def check_mask(num_rows: int, width: int, rate: float) -> None:
    """Dropout's mask is the independent Philox's, forward and backward; it has its rate and depends on the seed."""
    branch, expected = torch.ones(num_rows, width, requires_grad=True), expected_mask(num_rows, width, rate)
    out = add_branch(torch.zeros(num_rows, width), (branch, None), dropout(rate), None, FP32)[0]
    gradient, = torch.autograd.grad(out, branch, torch.ones_like(out))
    assert torch.equal(out > 0, expected) and torch.equal(gradient, out)
    share = 1 - expected.float().mean().item()
    assert abs(share - rate) < 5 * (rate * (1 - rate) / expected.numel())**0.5
    other = add_branch(torch.zeros(num_rows, width), (branch, None), dropout(rate, SEED + 1), None, FP32)[0]
    assert not torch.equal(out, other)


def check_strips() -> None:
    """Gradients of scales and biases are complete when each program of a kernel goes over several strips of rows.

    Such a gradient is the sum of the programs' own sums.
    """
    from megatron.kernels.pointwise import activation_triton, convolution_triton, heads_triton, residual_norm_triton

    with (patch.object(residual_norm_triton, "MOST_WARPS", 12), patch.object(heads_triton, "MOST_WARPS", 2),
          patch.object(activation_triton, "MOST_PROGRAMS", 3), patch.object(convolution_triton, "MOST_PROGRAMS", 3)):
        check_convolution((30, 17), 140, 5, FP32)
        check_join(17, 300, FP32, FP32, 0.3, "LayerNorm", True)
        check_heads((5, 2, 3, 8), 4, FP32, "LayerNorm")
        with patch.object(heads_triton, "_ELEMENTS", 64):  # tiles of 8 rows, which begin inside a group
            for is_apart, most_warps in ((False, 2), (True, 2), (True, 4)):
                with patch.object(heads_triton, "MOST_WARPS", most_warps):
                    check_heads((5, 3, 3, 8), 4, FP32, "", is_apart)
            check_heads((5, 3, 3, 8), 4, FP32, "RMSNorm", is_apart=True)
        check_activation("gelu", 19, 40, FP32, True)


@contextmanager
def plainly() -> Iterator[None]:
    """Within this context plain PyTorch runs in place of the Triton kernels."""
    with patch.dict(os.environ, {"TRITON_INTERPRET": "0"}):
        yield


def step(model: ProteinModel, seed: int) -> dict[str, Tensor]:
    """The loss and all gradients of one micro-batch, by name."""
    batch = packed_batch(9, 1, 6, filler=3, seed=seed)
    model.zero_grad()
    loss, _ = model(batch.sequence, batch.targets)
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()
                                      if parameter.grad is not None}}


def made(family: str, precision: PrecisionConfig, **options: object) -> ProteinModel:
    """A model of two layers whose parameters are moved away from their initial values, so that none is 0 or 1."""
    config = replace(FAMILIES[family], num_layers=2, **options)  # type: ignore[arg-type]
    model = ProteinModel(config, precision, 128, mask_id=MASK_ID)
    initialise(dict(model.named_parameters()), 1)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def check_model(family: str, precision: PrecisionConfig, tolerance: float, **options: object) -> None:
    """The loss and every gradient of a whole model without dropout agree with those of plain PyTorch."""
    model = made(family, precision, **options)
    ours = step(model, 3)
    with plainly():
        theirs = step(model, 3)
    compare_steps(ours, theirs, tolerance)


def compare_steps(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Asserts that the loss and each gradient agree within a relative tolerance."""
    assert ours.keys() == theirs.keys()
    assert abs(ours["loss"] / theirs["loss"] - 1) < tolerance
    of_all = torch.cat([tensor.flatten() for tensor in theirs.values()]).norm()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() < tolerance * gradient.norm() + 1e-2 * tolerance * of_all, name


def check_parts(frozen: str = "none", **options: object) -> None:
    """A whole ESM-2 whose attention takes queries, keys and values separately, as PyTorch's operator on GPUs does.

    `frozen`: the suffix of the names of parameters that are not trained.
    """
    calls = []

    def attends(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, *_: object,
                window_size: tuple[int, int]) -> Tensor:
        calls.append(window_size)
        window = window_size if max(window_size) >= 0 else None
        sequence = PackedSequence(ends, ends, ends, 0, 0)
        return attention_by_protein(torch.stack([query, key, value], 2), sequence, None, window)

    model = made("esm2", PrecisionConfig(), **options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    with (patch.object(context, "choose", lambda qkv, *_, **__: "varlen" if qkv.shape[2] == 3 else "triton"),
          patch.object(varlen, "varlen_attn", attends)):
        ours = step(model, 3)
    assert calls
    with plainly():
        theirs = step(model, 3)
    compare_steps(ours, theirs, 1e-4)


def check_recomputation(family: str) -> None:
    """Recomputed blocks draw the same masks: loss and gradients are bitwise equal. Another seed draws others."""
    kept, again = (step(made(family, PrecisionConfig(), hidden_dropout=0.2, checkpoint_activations=recomputes), 3)
                   for recomputes in (False, True))
    for name, tensor in kept.items():
        assert torch.equal(tensor, again[name]), name
    model, batch = made(family, PrecisionConfig(), hidden_dropout=0.2), packed_batch(9, 1, 6, filler=3, seed=3)
    with torch.no_grad():
        assert kept["loss"] == model(batch.sequence, batch.targets)[0]
        assert kept["loss"] != model(replace(batch.sequence, seed=torch.tensor(4)), batch.targets)[0]


# The checks by name; each raises if it fails.
CHECKS: dict[str, Callable[[], None]] = {
    **{f"join {kind or 'alone'}, dropout {rate}, {num_rows} x {width}, {stream} and {branch}, bias {has_bias}":
       partial(check_join, num_rows, width, stream, branch, rate, kind, has_bias)
       for num_rows, width, stream, branch in [(1, 20, FP32, FP32), (9, 77, FP32, BF16), (5, 130, FP16, FP16),
                                               (3, 2100, BF16, BF16)]
       for rate in (0.0, 0.3) for kind, has_bias in [("", False), ("", True), ("LayerNorm", False),
                                                     ("LayerNorm", True), ("RMSNorm", rate > 0)]},
    **{f"{kind} alone, {num_rows} x {width}, {stream} to {dtype}": partial(check_norm, num_rows, width, stream, dtype,
                                                                          kind)
       for num_rows, width, stream, dtype in [(1, 33, FP32, FP32), (5, 77, FP32, BF16), (6, 64, FP16, FP16)]
       for kind in ("LayerNorm", "RMSNorm")},
    **{f"{kind}, {num_rows} x {width}, {dtype}, bias {has_bias}": partial(check_activation, kind, num_rows, width,
                                                                          dtype, has_bias)
       for num_rows, width, dtype in [(1, 20, FP32), (5, 520, BF16), (3, 24, FP16)]
       for kind in ("gelu", "gelu_tanh", "squared_relu", "swiglu") for has_bias in (True, False)},
    **{f"heads {shape}, {kind or 'no norm'}, {half} turned, {dtype}": partial(check_heads, shape, half, dtype, kind)
       for shape, half, dtype in [((1, 2, 3, 8), 4, FP32), ((3, 3, 3, 24), 12, BF16), ((2, 2, 5, 10), 3, FP32),
                                  ((2, 1, 3, 16), 0, FP16), ((2, 9, 3, 64), 32, FP32)]
       for kind in ("", "LayerNorm", "RMSNorm") if half or kind},
    **{f"heads apart, {shape}, {kind or 'no norm'}, {half} turned, {dtype}":
       partial(check_heads, shape, half, dtype, kind, is_apart=True)
       for shape, half, dtype in [((3, 5, 3, 24), 12, FP32), ((4, 2, 3, 10), 3, BF16), ((2, 1, 3, 16), 0, FP16)]
       for kind in ("", "LayerNorm", "RMSNorm") if half or kind},
    **{f"convolution of {lengths}, width {width}, {taps} taps, {dtype}":
       partial(check_convolution, lengths, width, taps, dtype)
       for lengths, width, taps, dtype in [((1,), 20, 3, FP32), ((2, 1, 3, 1, 14), 140, 5, FP32),
                                           ((4, 30), 33, 7, BF16), ((20,), 16, 5, FP16)]},
    "convolution of two ranks": check_convolution_of_two_ranks, "no rows": check_no_rows,
    "what was kept cannot be overwritten unnoticed": check_overwriting,
    "mask 64 x 320": partial(check_mask, 64, 320, 0.1), "mask 33 x 77": partial(check_mask, 33, 77, 0.5),
    "what is strided": check_strided, "many strips": check_strips,
    **{f"model {family} in fp32": partial(check_model, family, PrecisionConfig(), 1e-4) for family in FAMILIES},
    "model esm2 in bf16": partial(check_model, "esm2", PrecisionConfig(bf16=True), 0.1),
    "model proteinlm in bf16 with an fp32 stream": partial(check_model, "proteinlm", PrecisionConfig(bf16=True), 0.1,
                                                           fp32_residual_connection=True),
    "model proteinlm with the norm in the stream": partial(check_model, "proteinlm", PrecisionConfig(), 1e-4,
                                                           apply_residual_connection_post_layernorm=True),
    "model esm2, heads apart": check_parts,
    "model esm2, heads apart, only biases trained": partial(check_parts, "weight"),
    "model esm2, heads apart, biases frozen, attention recomputed": partial(check_parts, "bias",
                                                                            recompute_granularity="selective"),
    "model esm2, heads normed and apart, in windows": partial(check_parts, qk_layernorm=True, window_size=(5, 3)),
    **{f"model esm2 with a convolution, frozen {frozen}": partial(check_parts, frozen, qk_layernorm=True,
                                                                  qkv_conv_kernel=5)
       for frozen in ("none", "weight", "query_key_value.bias")},
    **{f"recomputation of {family}": partial(check_recomputation, family) for family in FAMILIES},
    **interpreted_cross_entropy.CHECKS, **interpreted_maps.CHECKS,
}


def main() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    found = {}
    for name in sys.argv[1:] or CHECKS:
        torch.manual_seed(0)
        try:
            CHECKS[name]()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc(limit=-4)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
