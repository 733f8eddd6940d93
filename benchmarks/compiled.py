"""What Triton's kernels become for a GPU that is not there: registers a thread, spilled bytes, shared memory.

Used by `benchmarks/roofline.py` and the tests; needs Triton, and TRITON_INTERPRET unset.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
          torch.int32: "*i32"}


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of a launch, of which tensors need no values."""

    kernel: Any
    arguments: tuple[Any, ...]
    num_warps: int

    @property
    def key(self) -> tuple[object, ...]:
        """What tells two launches apart that are compiled apart."""
        return self.kernel.__name__, self._signature(), tuple(self._constants().items()), self.num_warps

    def compile(self, capability: int) -> Any:
        """The kernel compiled for a capability, such as 90."""
        source = ASTSource(self.kernel, self._signature(), self._constants(), self._divisible())
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": self.num_warps})

    def _pairs(self) -> Iterator[tuple[int, Any, Any]]:
        for place, (parameter, value) in enumerate(zip(self.kernel.params, self.arguments, strict=True)):
            yield place, parameter, value

    def _is_constant(self, parameter: Any, value: Any) -> bool:
        return parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1)

    def _signature(self) -> dict[str, str]:
        return {parameter.name: "constexpr" if self._is_constant(parameter, value) else _type_of(value)
                for _, parameter, value in self._pairs()}

    def _constants(self) -> dict[str, Any]:
        return {parameter.name: value for _, parameter, value in self._pairs() if self._is_constant(parameter, value)}

    def _divisible(self) -> dict[tuple[int, ...], list[list[object]]]:
        """As Triton finds when it launches: memory of torch begins at multiples of 16 bytes."""
        return {(place,): [["tt.divisibility", 16]] for place, parameter, value in self._pairs()
                if not self._is_constant(parameter, value)
                and (isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0))}


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


@contextmanager
def recorded(*modules: ModuleType) -> Iterator[list[Launch]]:
    """The launches of the modules' kernels within this context, which do not happen."""
    launches: list[Launch] = []

    def recorder(kernel: Any) -> Any:
        def launch(*arguments: Any, num_warps: int = 4) -> None:
            launches.append(Launch(kernel, arguments, num_warps))
        return launch

    with patch.object(triton.runtime.jit.JITFunction, "__getitem__", lambda kernel, grid: recorder(kernel)):
        yield launches


@dataclass(frozen=True)
class Resources:
    """Of one thread: registers and the bytes that do not fit them; of a program: shared memory."""

    registers: int
    spilled: int
    shared: int


def resources_of(compiled: Any, capability: int) -> Resources:
    """What ptxas, which comes with Triton, says of the compiled kernel."""
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    program = folder / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        suffix = "a" if capability >= 90 else ""
        said = subprocess.run([program, "-v", f"--gpu-name=sm_{capability}{suffix}", source, "-o", f"{scratch}/out"],
                              capture_output=True, text=True, check=True).stderr
    registers, = re.findall(r"Used (\d+) registers", said)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    return Resources(int(registers), spilled, compiled.metadata.shared)
