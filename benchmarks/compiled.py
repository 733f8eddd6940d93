"""Records the kernels that operators would launch on a GPU, without a GPU, and compiles Triton's kernels.

Operators run on tensors without values. Their launches are recorded with the bytes that they move and their FLOPs;
Triton's kernels can be compiled for any GPU. `benchmarks/launched.py` records the parts of a training step. Needs
Triton, and TRITON_INTERPRET unset.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.tile_flops import code_of, flops_of_tiles
from megatron.kernels.device import is_fake
from megatron.plan.work import WorkCounter

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
          torch.int32: "*i32"}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
ATTENTION = ("fused_attention", "fused_attention_backward", "_varlen_attn", "_varlen_attn_backward")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_scaled_mm_v2")
_NOT_POINTWISE = (*PRODUCTS, *ATTENTION)
_PICK = ("embedding", "index_select", "index", "gather")  # read only as many elements as they return
_ONLY_WRITES = ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_")


@dataclass(frozen=True)
class Resources:
    """The resources of a compiled kernel."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread that do not fit into registers
    shared: int  # bytes of shared memory of a program (thread block)


@dataclass(frozen=True)
class RecordedLaunch:
    """A launch of a Triton kernel, with its arguments; tensors need no values."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, int]

    @property
    def name(self) -> str:
        """The operation and the name of its kernel, which tells the direction."""
        return f"{self.kernel.__module__.rpartition('.')[2].removesuffix('_triton')} {self.kernel.__name__}"

    @cached_property
    def key(self) -> tuple[object, ...]:
        """A key that is equal for launches that share a compiled kernel."""
        return self.name, *(pair for known in (self.options, self._signature, self.constants)
                            for pair in known.items()), *self._divisible

    @property
    def module(self) -> str:
        """The kernel's module, below `megatron.kernels`."""
        return self.kernel.__module__.removeprefix("megatron.kernels.")

    @cached_property
    def flops(self) -> int:
        """The FLOPs: half a product for symmetric products, the products of a map, else as the kernel's code has them.
        """
        tensors = self._named
        if self.kernel.__name__ == "symmetric_kernel":
            number, size, width = tensors["x"].shape
            return number * size * (size + 1) * width
        if self.kernel.__name__ == "map_kernel":
            return 2 * tensors["map"].numel() * tensors["qkv"].shape[-1]
        return flops_of_tiles(code_of(self._source, self.options), tensors)

    @property
    def units(self) -> str:
        """The units that compute most of it: "fp8" or "half" for matrix units in that precision, else "fp32"."""
        is_product = self.kernel.__name__ in ("symmetric_kernel", "map_kernel")
        return units_of([self.arguments[0]]) if is_product else "fp32"

    @property
    def num_bytes(self) -> int:
        """The least bytes through memory: each tensor once; queries and keys that are changed in place twice."""
        tensors = [value for value in self.arguments if isinstance(value, Tensor)]
        distinct = {id(tensor): tensor for tensor in tensors}.values()
        num_bytes = sum(map(_num_bytes, distinct))
        qkv_tgcd = tensors[0]
        if self.kernel.__name__ == "map_kernel":  # it does not read the values of attention
            num_bytes -= _num_bytes(qkv_tgcd) // qkv_tgcd.shape[2]
        elif self.name.startswith("heads") and qkv_tgcd is tensors[-1]:
            num_bytes += _num_bytes(qkv_tgcd) - 2 * _num_bytes(qkv_tgcd) // qkv_tgcd.shape[2]
        return num_bytes

    def resources(self, capability: int) -> Resources:
        """The resources of the kernel when compiled for a compute capability, such as 90."""
        compiled = self.compiled(capability)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            said = subprocess.run([_TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True,
                                  text=True, check=True).stdout
        found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
        return Resources(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared)

    def compiled(self, capability: int) -> Any:
        """The kernel as Triton compiles it for a capability, with products and sums fused as in a run."""
        options = {"enable_fp_fusion": True, **self.options}
        return triton.compile(self._source, target=GPUTarget("cuda", capability, 32), options=options)

    @property
    def _named(self) -> dict[str, Any]:
        return {parameter.name: value for parameter, value in zip(self.kernel.params, self.arguments, strict=True)}

    @property
    def _source(self) -> ASTSource:
        return ASTSource(self.kernel, self._signature, self.constants, {
            (place,): [["tt.divisibility", 16]] for place in self._divisible})

    def _is_constant(self, place: int) -> bool:
        value = self.arguments[place]
        parameter = self.kernel.params[place]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        return parameter.is_constexpr or value is None or is_one

    @cached_property
    def _signature(self) -> dict[str, str]:
        return {parameter.name: "constexpr" if self._is_constant(place) else _type_of(value) for place, (
            parameter, value) in enumerate(zip(self.kernel.params, self.arguments, strict=True))}

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The arguments that are compile-time constants."""
        return {parameter.name: value for place, (parameter, value) in enumerate(
            zip(self.kernel.params, self.arguments, strict=True)) if self._is_constant(place)}

    @cached_property
    def _divisible(self) -> list[int]:
        """The indices of arguments that Triton specialises as divisible by 16, as the addresses of torch's tensors are.
        """
        return [place for place, value in enumerate(self.arguments)
                if not self._is_constant(place) and not self.kernel.params[place].do_not_specialize
                and _is_divisible(value)]


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _is_divisible(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class Other:
    """A launch of a PyTorch operator, or of a function that torch.compile turns into a kernel.

    Each input and output counts as moved once, and twice if it is read and changed in place.
    """

    name: str
    num_bytes: int
    flops: int  # of products and attention; for others, one for each element of the output, or of a reduction's input
    units: str  # as of `RecordedLaunch`


class Launches(TorchDispatchMode):
    """A context that records what operators on tensors without values would launch, instead of running it.

    Recorded are Triton kernels (`triton`) and PyTorch operators (`others`). An operator of ours that launches none of
    Triton's is one kernel, which torch.compile makes of it. Operators on tensors with values run: those on the
    proteins' boundaries, which are needed to count attention's work.
    """

    def __init__(self) -> None:
        super().__init__()
        self.triton: list[RecordedLaunch] = []
        self.others: list[Other] = []

    @property
    def num_pointwise(self) -> int:
        """The number of launches besides matrix products and attention."""
        return len(self.triton) + len(self.pointwise)

    @property
    def pointwise(self) -> list[Other]:
        """PyTorch's launches besides matrix products and attention."""
        return [other for other in self.others if other.name not in _NOT_POINTWISE]

    @property
    def num_bytes(self) -> int:
        """The bytes through memory besides those of matrix products and attention."""
        return sum(launch.num_bytes for launch in self.triton) + sum(other.num_bytes for other in self.pointwise)

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        """Record an operator: of our own, the launches in its implementation; any other as one launch."""
        name, kwargs = func._overloadpacket.__name__, kwargs or {}
        given = _tensors((args, kwargs))
        if given and not any(map(is_fake, given)):
            return func(*args, **kwargs)
        if func.namespace == "megatron" and name not in ATTENTION:
            num_triton, num_others = len(self.triton), len(self.others)
            with patch.object(JITFunction, "__getitem__", lambda kernel, grid: self._recorder(kernel)), self:
                results = OPDEFS[func.name()]._init_fn(*args, **kwargs)
            if len(self.triton) == num_triton:  # torch.compile makes one kernel of it
                inside, self.others = self.others[num_others:], self.others[:num_others]
                self.others.append(Other(name, sum(map(_num_bytes, _moved(func, args, given, _tensors(results)))),
                                         sum(each.flops for each in inside), "fp32"))
            return results
        # PyTorch takes these apart before they come here, but not inside operators of ours.
        if func.namespace == "aten" and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        inputs = args, kwargs
        if any(tensor.is_meta for tensor in given):  # all on one device
            inputs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs)
        results = func(*inputs[0], **inputs[1])
        if name in ATTENTION or (func.namespace == "aten" and not func.is_view
                                 and not re.search("empty|detach|unsafe_view", func.__name__)):
            self._note(name, func, args, kwargs, given, results)
        return results

    def _note(self, name: str, func: Any, args: Any, kwargs: Any, given: list[Tensor], results: Any) -> None:
        new = _tensors(results)
        moved = _moved(func, args, given, new)
        work = WorkCounter()
        work.count(func, args, kwargs, given, new)
        if name in _NOT_POINTWISE:
            flops, units = work.flops, units_of(given)
        else:
            counted = given if torch.Tag.reduction in func.tags else new if torch.Tag.pointwise in func.tags else []
            flops, units = max((tensor.numel() for tensor in counted), default=0), "fp32"
        self.others.append(Other(name, sum(map(_num_bytes, moved)), flops, units))

    def _recorder(self, kernel: Any) -> Any:
        def launch(*arguments: Any, **options: int) -> None:
            self.triton.append(RecordedLaunch(kernel, arguments, options))
        return launch


def _moved(func: Any, args: Sequence[Any], given: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """What a launch moves through memory: its inputs and outputs, and once more those that it reads and changes."""
    name = func._overloadpacket.__name__
    moved = [*new, *new] if name in _PICK else [*{id(tensor): tensor for tensor in (*given, *new)}.values()]
    return moved if name in _ONLY_WRITES else moved + _tensors([
        value for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info and argument.alias_info.is_write])


def units_of(tensors: Sequence[Tensor]) -> str:
    """The units that multiply such tensors: "fp8" or "half" for matrix units in that precision, else "fp32"."""
    sizes = {tensor.element_size() for tensor in tensors if tensor.is_floating_point()}
    return {1: "fp8", 2: "half"}.get(min(sizes), "fp32")


def distinct(launches: Iterable[RecordedLaunch]) -> Iterator[RecordedLaunch]:
    """One launch for each compiled kernel."""
    yield from {launch.key: launch for launch in launches}.values()
