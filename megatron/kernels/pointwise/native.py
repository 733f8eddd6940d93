"""What a block does between its matrix products on CPUs, by a C++ helper: each in one pass over memory.

PyTorch's own functions take several passes, and its GeLU some ten times as long per element (benchmarks/RESULTS.md).
The helper takes fp32 and bf16, and computes in fp32. Where it is not built, for lack of a C++ compiler or pybind11, the
plain functions do the same work. Its convolution and its `join` are called as those of `convolution_triton` and
`residual_norm_triton`. Shapes: t tokens, f features, k taps, g groups of c = q + 2 rows of width d, r columns of a row
that are turned; u tokens of the residual stream, h hidden.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from megatron.kernels.device import takes_gpu_way, takes_triton

try:
    _helper: Any = import_module("megatron.kernels.pointwise._pointwise")
except ImportError:
    _helper = None

DTYPES = torch.float32, torch.bfloat16  # that it takes
TAPS = 3, 5, 7  # of convolutions that it takes


def is_built() -> bool:
    """Whether the helper is built."""
    return _helper is not None


def takes_native(tensor: Tensor, if_compiled: bool = False) -> bool:
    """Whether the helper computes such tensors: it is built, and they are on a CPU, in fp32 or bf16.

    Under torch.compile, which fuses the plain functions by itself, only with `if_compiled`.
    """
    if not is_built() or torch.compiler.is_compiling() and not if_compiled or takes_gpu_way(tensor):
        return False
    return tensor.dtype in DTYPES


def runs_native(tensor: Tensor, if_compiled: bool = False) -> bool:
    """Whether the helper computes such tensors, and not Triton's kernels, which tests interpret on CPUs."""
    return takes_native(tensor, if_compiled) and not takes_triton(tensor, if_compiled)


def activate(wide_tf: Tensor, bias_f: Tensor | None, gate_tf: Tensor | None, gate_bias_f: Tensor | None,
             kind: str) -> Tensor:
    """The activation `kind` [t, f] of `wide_tf` with its bias; "swiglu" also takes a gate and its bias."""
    inputs = _contiguous(wide_tf, gate_tf, bias_f, gate_bias_f)
    out_tf = torch.empty_like(wide_tf, memory_format=torch.contiguous_format)
    _activate(kind, wide_tf, [*inputs, out_tf])
    return out_tf


def activate_backward(grad_tf: Tensor, wide_tf: Tensor, bias_f: Tensor | None, gate_tf: Tensor | None,
                      gate_bias_f: Tensor | None, kind: str) -> tuple[Tensor | None, ...]:
    """The gradients of the product, its bias, the gate and its bias, those of biases in fp32; None of what is None."""
    inputs = _contiguous(wide_tf, gate_tf, bias_f, gate_bias_f)
    made = [None if tensor is None else torch.empty_like(tensor) for tensor in inputs]
    _activate(kind, wide_tf, [*inputs, grad_tf.contiguous(), *made])
    grad_wide_tf, grad_gate_tf, grad_bias_f, grad_gate_bias_f = made
    return grad_wide_tf, grad_bias_f, grad_gate_tf, grad_gate_bias_f


def prepare_heads(qkv_tgcd: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, cos: Tensor | None,
                  sin: Tensor | None, epsilon: float, has_mean: bool, sign: int) -> Tensor:
    """Queries and keys normalised where there are scales, then turned by `sign` times the angles of these cosines and
    sines, fp32 [t, 1, 1, r/2] each, where there are any."""
    qkv_tgcd = qkv_tgcd.contiguous()
    out_tgcd = torch.empty_like(qkv_tgcd)
    _prepare_heads([qkv_tgcd, query_weight, key_weight, cos, sin, out_tgcd], epsilon, has_mean, sign)
    return out_tgcd


def prepare_heads_backward(grad_tgcd: Tensor, qkv_tgcd: Tensor, query_weight: Tensor, key_weight: Tensor,
                           cos: Tensor | None, sin: Tensor | None, epsilon: float,
                           has_mean: bool) -> tuple[Tensor, Tensor]:
    """The gradients of the projection, and of the queries' scales and behind them the keys', in fp32."""
    grad_tgcd, qkv_tgcd = grad_tgcd.contiguous(), qkv_tgcd.contiguous()
    grad_qkv_tgcd, sums_gcd = torch.empty_like(qkv_tgcd), qkv_tgcd.new_empty(qkv_tgcd.shape[1:], dtype=torch.float32)
    _prepare_heads([qkv_tgcd, query_weight, key_weight, cos, sin, grad_qkv_tgcd, grad_tgcd, sums_gcd], epsilon,
                   has_mean, 1)
    return grad_qkv_tgcd, torch.cat([sums_gcd[:, :-2].flatten(), sums_gcd[:, -2].flatten()])


def sum_tokens(x_tf: Tensor) -> Tensor:
    """The sum over the tokens of each feature, fp32 [f]."""
    x_tf, sums_f = x_tf.contiguous(), x_tf.new_empty(x_tf.shape[1], dtype=torch.float32)
    _helper.add_columns(_is_bf16(x_tf), x_tf.data_ptr(), sums_f.data_ptr(), tuple(x_tf.shape), torch.get_num_threads())
    return sums_f


def convolve(x_tf: Tensor, positions_t: Tensor, weight_fk: Tensor) -> Tensor:
    """x plus its depthwise convolution within each protein, [t, f]; `positions_t`: each token's in its protein."""
    assert len(x_tf) == len(positions_t), "the helper reads each token's position"
    inputs, out_tf = [x_tf.contiguous(), positions_t.contiguous(), _taps(weight_fk)], x_tf.new_empty(x_tf.shape)
    _helper.convolve(_is_bf16(x_tf), _addresses(*inputs, out_tf), tuple(x_tf.shape), weight_fk.shape[1],
                     torch.get_num_threads())
    return out_tf


def convolve_backward(grad_tf: Tensor, x_tf: Tensor, positions_t: Tensor, weight_fk: Tensor,
                      has_bias: bool) -> tuple[Tensor, Tensor]:
    """The gradients of `x_tf`, and of the weight [f·k] in fp32; of a bias none: `has_bias` is False."""
    assert not has_bias, "the product gives the gradient of its bias"
    inputs, x_tf = [grad_tf.contiguous(), positions_t.contiguous(), _taps(weight_fk)], x_tf.contiguous()
    grad_x_tf, grad_kf = torch.empty_like(x_tf), torch.empty_like(inputs[2])
    _helper.convolve(_is_bf16(x_tf), _addresses(*inputs, grad_x_tf, x_tf, grad_kf), tuple(x_tf.shape),
                     len(grad_kf), torch.get_num_threads())
    return grad_x_tf, grad_kf.t().flatten()


def _taps(weight_fk: Tensor) -> Tensor:
    return weight_fk.float().t().contiguous()


def join(residual_uh: Tensor, branch_uh: Tensor | None, shift_h: Tensor | None, seed: Tensor | None,
         drawn: Sequence[int], weight_h: Tensor | None, bias_h: Tensor | None, epsilon: float, sum_uh: Tensor,
         normed_uh: Tensor, statistics_u2: Tensor) -> None:
    """Fill `sum_uh` (unless there is no branch), and `normed_uh` and `statistics_u2` (unless there is no weight)."""
    vectors = [_single(tensor) for tensor in (shift_h, weight_h, bias_h)]
    _helper.join(_are_bf16(residual_uh, branch_uh, normed_uh),
                 _addresses(residual_uh, branch_uh, *vectors, sum_uh, normed_uh, statistics_u2),
                 tuple(residual_uh.shape), _dropout(seed, drawn), epsilon, torch.get_num_threads())


def join_backward(grad_sum_uh: Tensor | None, grad_normed_uh: Tensor | None, x_uh: Tensor,
                  statistics_u2: Tensor | None, weight_h: Tensor | None, seed: Tensor | None, drawn: Sequence[int],
                  has_mean: bool, has_shift: bool, grad_residual_uh: Tensor | None,
                  grad_branch_uh: Tensor | None) -> Tensor:
    """Fill `grad_residual_uh` and `grad_branch_uh`, unless None; return the parameters' gradients, [k, h] in fp32.

    The rows of the result are the gradients of weight, bias and shift, in this order, without those that are absent.
    """
    sums_kh = x_uh.new_empty((weight_h is not None) + has_mean + has_shift, x_uh.shape[1], dtype=torch.float32)
    weight_h = _single(weight_h)
    _helper.join_backward(_are_bf16(x_uh, grad_branch_uh, grad_normed_uh),
                          _addresses(grad_sum_uh, grad_normed_uh, x_uh, statistics_u2, weight_h, grad_residual_uh,
                                     grad_branch_uh, sums_kh),
                          tuple(x_uh.shape), _dropout(seed, drawn), has_mean, has_shift, torch.get_num_threads())
    return sums_kh


def _prepare_heads(tensors: list[Tensor | None], epsilon: float, has_mean: bool, sign: int) -> None:
    qkv_tgcd, *vectors = tensors[:5]
    assert qkv_tgcd is not None
    vectors = [_single(vector) for vector in vectors]
    half = 0 if vectors[2] is None else vectors[2].shape[-1]
    _helper.prepare_heads(_is_bf16(qkv_tgcd), _addresses(qkv_tgcd, *vectors, *tensors[5:]), (*qkv_tgcd.shape, half),
                          epsilon, has_mean, sign, torch.get_num_threads())


def _single(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float().contiguous()


def _dropout(seed: Tensor | None, drawn: Sequence[int]) -> tuple[int, ...]:
    return (0, 2**16, 0, 0) if seed is None else (int(seed) % 2**64, *drawn)


def _are_bf16(*tensors: Tensor | None) -> tuple[bool, ...]:
    return tuple(tensor is not None and _is_bf16(tensor) for tensor in tensors)


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _contiguous(wide_tf: Tensor, gate_tf: Tensor | None, *biases: Tensor | None) -> list[Tensor | None]:
    return [wide_tf.contiguous(), None if gate_tf is None else gate_tf.contiguous(),
            *map(_single, biases)]


def _activate(kind: str, like_tf: Tensor, tensors: list[Tensor | None]) -> None:
    _helper.activate(kind, _is_bf16(like_tf), _addresses(*tensors), tuple(like_tf.shape), torch.get_num_threads())


def _is_bf16(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16
