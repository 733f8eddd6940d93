"""Triton's kernels of a block and of the loss, without a GPU: what a step launches, and what a compiler makes of it.

Both go forward and backward on `meta`, where tensors have sizes and no values; the kernels that it launches are
written down instead, and can be compiled for any GPU. Used by `benchmarks/roofline.py`, `benchmarks/triton_kernels.py`
and the tests; needs Triton, and TRITON_INTERPRET unset.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from megatron.config import Config
from megatron.data.batches.typical import typical_batch
from megatron.kernels import device
from megatron.kernels.rotary import Rotation
from megatron.model.protein_model import ProteinModel, compute_dtype
from megatron.model.transformer import Transformer
from megatron.parallel.pipeline.partition import Stage
from megatron.parallel.tensor.copies import ComputeCopies
from megatron.parallel.tensor.layers import Matrix
from megatron.parallel.tensor.stream import ONE_RANK

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
          torch.int32: "*i32"}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_ATTENTION = ("fused_attention", "fused_attention_backward", "_varlen_attn", "_varlen_attn_backward")
_NOT_POINTWISE = ("mm", "addmm", *_ATTENTION)


@dataclass(frozen=True)
class Resources:
    """Of a thread registers, and bytes of memory that it takes where they do not suffice; of a program shared bytes."""

    registers: int
    spilled: int
    shared: int


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of a launch, of which tensors need no values."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, int]

    @property
    def name(self) -> str:
        """The operation, and the direction."""
        return f"{self.kernel.__module__.rpartition('.')[2].removesuffix('_triton')} {self.kernel.__name__}"

    @cached_property
    def key(self) -> tuple[object, ...]:
        """What tells two launches apart that are compiled apart."""
        return self.name, *(pair for known in (self.options, self._signature, self.constants)
                            for pair in known.items()), *self._divisible

    @property
    def num_bytes(self) -> int:
        """What goes through memory at least: each tensor once; what is changed where it lies, but for values, twice."""
        tensors = [value for value in self.arguments if isinstance(value, Tensor)]
        distinct = {id(tensor): tensor for tensor in tensors}.values()
        num_bytes = sum(map(_num_bytes, distinct))
        qkv_tgcd = tensors[0]
        if self.name.startswith("heads") and qkv_tgcd is tensors[-1]:
            num_bytes += _num_bytes(qkv_tgcd) - 2 * _num_bytes(qkv_tgcd) // qkv_tgcd.shape[2]
        return num_bytes

    def resources(self, capability: int) -> Resources:
        """Of the kernel compiled for a capability, such as 90."""
        source = ASTSource(self.kernel, self._signature, self.constants, {
            (place,): [["tt.divisibility", 16]] for place in self._divisible})
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(self.options))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            said = subprocess.run([_TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True,
                                  text=True, check=True).stdout
        found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
        return Resources(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared)

    def _is_constant(self, place: int) -> bool:
        value = self.arguments[place]
        return self.kernel.params[place].is_constexpr or value is None or (isinstance(value, int) and value == 1)

    @cached_property
    def _signature(self) -> dict[str, str]:
        return {parameter.name: "constexpr" if self._is_constant(place) else _type_of(value) for place, (
            parameter, value) in enumerate(zip(self.kernel.params, self.arguments, strict=True))}

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The arguments that are known when it is compiled."""
        return {parameter.name: value for place, (parameter, value) in enumerate(
            zip(self.kernel.params, self.arguments, strict=True)) if self._is_constant(place)}

    @cached_property
    def _divisible(self) -> list[int]:
        """Arguments that Triton finds divisible by 16 when it launches: torch's memory begins at such places."""
        return [place for place, value in enumerate(self.arguments)
                if not self._is_constant(place) and _is_divisible(value)]


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _is_divisible(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Launches(TorchDispatchMode):
    """Within this context what operators on `meta` launch is written down: Triton's kernels, and PyTorch's names."""

    def __init__(self) -> None:
        super().__init__()
        self.triton: list[Launch] = []
        self.others: list[tuple[str, int]] = []  # and the bytes of what they take and give

    @property
    def num_pointwise(self) -> int:
        """Launches besides matrix products and attention."""
        return len(self.triton) + len(self.pointwise)

    @property
    def pointwise(self) -> list[tuple[str, int]]:
        """What PyTorch launches besides matrix products and attention."""
        return [other for other in self.others if other[0] not in _NOT_POINTWISE]

    @property
    def num_bytes(self) -> int:
        """What goes through memory besides matrix products and attention."""
        return sum(launch.num_bytes for launch in self.triton) + sum(num_bytes for _, num_bytes in self.pointwise)

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator of ours up to its launches, and any other on `meta`."""
        name = func._overloadpacket.__name__
        if func.namespace == "megatron" and name not in _ATTENTION:
            with patch.object(JITFunction, "__getitem__", lambda kernel, grid: self._recorder(kernel)), self:
                return OPDEFS[func.name()]._init_fn(*args, **(kwargs or {}))
        results = func(*args, **(kwargs or {}))
        if name in _ATTENTION or (func.namespace == "aten" and not func.is_view
                                  and not re.search("empty|detach", func.__name__)):
            tensors = [value for value in tree_leaves((args, kwargs, results)) if isinstance(value, Tensor)]
            num_bytes = sum(map(_num_bytes, {id(tensor): tensor for tensor in tensors}.values()))
            self.others.append((name, num_bytes))
        return results

    def _recorder(self, kernel: Any) -> Any:
        def launch(*arguments: Any, **options: int) -> None:
            self.triton.append(Launch(kernel, arguments, options))
        return launch


def launches_of_block(config: Config, num_tokens: int | None = None,
                      takes_triton: bool = True) -> tuple[Launches, Launches]:
    """Those of the first block of the model, forward and backward; weights' copies are there, gradients are not."""
    with patch.object(device, "_DTYPES", device._DTYPES if takes_triton else ()):
        return _launches_of_block(config, num_tokens)


def _launches_of_block(config: Config, num_tokens: int | None) -> tuple[Launches, Launches]:
    model, dtype = config.model, compute_dtype(config.precision)
    stream_dtype = torch.float32 if model.fp32_residual_connection else dtype
    batch = typical_batch(config.data, config.training.micro_batch_size)
    num_tokens = num_tokens or len(batch.sequence.tokens_t)
    with torch.device("meta"):
        transformer = Transformer(model, 128, dtype, ONE_RANK, Stage(0, 2, range(1)))
        hidden_uh = torch.empty(num_tokens, model.hidden_size, dtype=stream_dtype, requires_grad=True)
        half = transformer.rotary_width // 2
        rotation = Rotation(*torch.empty(2, num_tokens, 1, 1, half).unbind()) if half else None
        sequence = batch.sequence.map(lambda tensor: torch.empty_like(tensor, device="meta"))
        block = transformer.layers["0"]
        ComputeCopies((layer for layer in block.modules() if isinstance(layer, Matrix)), dtype)
        with Launches() as forward:
            out_uh = block(hidden_uh.view_as(hidden_uh), sequence, rotation)
        with Launches() as backward:
            out_uh.backward(torch.empty_like(out_uh))
    return forward, backward


def launches_of_loss(config: Config, softcap: float | None = None) -> tuple[Launches, Launches]:
    """Those of the head and the loss for a micro-batch's targets, forward and backward, as `launches_of_block`."""
    dtype, batch = compute_dtype(config.precision), typical_batch(config.data, config.training.micro_batch_size)
    with torch.device("meta"):
        model = replace(config.model, num_layers=1)
        if softcap is not None:
            model = replace(model, final_logit_softcapping=softcap)
        stage = ProteinModel(model, config.precision, 128, stage=Stage(1, 2, range(1)), mask_id=4)
        ComputeCopies(stage.matrices(), dtype)
        hidden_uh = torch.empty(len(batch.sequence.tokens_t), model.hidden_size, dtype=dtype, requires_grad=True)
        targets = batch.targets.map(lambda tensor: torch.empty_like(tensor, device="meta"))
        with Launches() as forward:
            loss, _ = stage.loss(hidden_uh, targets)
        with Launches() as backward:
            loss.backward()
    return forward, backward


def distinct(launches: Sequence[Launch]) -> Iterator[Launch]:
    """One of each that is compiled apart."""
    yield from {launch.key: launch for launch in launches}.values()
