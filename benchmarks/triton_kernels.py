"""What compilers make of the Triton kernels, without a GPU: `python benchmarks/triton_kernels.py [--presets ...]`.

For the attention of each preset, in its own precision and in fp32, each kernel and each compute capability: registers
of a thread, bytes that a thread spills, shared memory of a program in KB (1,024 bytes). Kernels are compiled as a run
would compile them, and assembled by the `ptxas` that comes with Triton. Exits with 1 where one needs more shared memory
than the smallest GPU that takes its code has. Further kernels belong into `cases`.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron.config.command_line import parse  # noqa: E402
from megatron.config.presets import PRESETS  # noqa: E402
from megatron.kernels.attention import triton_kernels as attention_kernels  # noqa: E402
from megatron.kernels.attention.launches import Call, Launch  # noqa: E402

# Bytes of shared memory that a program may have: code for 8.0 also runs on 8.6 and 8.9, which have the least.
MOST_SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32",
          torch.int64: "*i64"}
_WHOLE, _ALIGNED = 16, [["tt.divisibility", 16]]


class Case(NamedTuple):
    """A kernel with everything that a run launches it with; tensors need no values."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]


class Cost(NamedTuple):
    """Of one kernel on one architecture."""

    registers: int
    spilled: int
    shared: int


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What compilers make of the Triton kernels.")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--capabilities", nargs="+", type=int, choices=MOST_SHARED, default=list(MOST_SHARED))
    options = parser.parse_args()
    heads = [f"{capability / 10} {what}" for capability in options.capabilities for what in Cost._fields]
    print("| kernel | queries x keys, warps, stages |", *(f"{head} |" for head in heads))
    print("| --- " * (2 + len(heads)) + "|")
    fits = True
    for case in cases(options.presets):
        costs = [cost_of(case, capability) for capability in options.capabilities]
        fits &= all(cost.shared <= MOST_SHARED[each] for cost, each in zip(costs, options.capabilities, strict=True))
        blocks = f"{case.constants['BLOCK_QUERIES']} x {case.constants['BLOCK_KEYS']}"
        figures = [figure for cost in costs for figure in (*cost[:2], f"{cost.shared / 1024:.0f}")]
        print(f"| {case.name} | {', '.join(map(str, (blocks, *case.options.values())))} |",
              *(f"{figure} |" for figure in figures), flush=True)
    return 0 if fits else 1


def cases(presets: Iterable[str]) -> Iterator[Case]:
    """Attention of each preset, once for those that are alike."""
    alike: dict[tuple[torch.dtype, int, float], list[str]] = {}
    for preset in presets:
        config, _ = parse(["--preset", preset])
        own = torch.bfloat16 if config.precision.bf16 else torch.float32
        for dtype in dict.fromkeys((own, torch.float32)):
            key = dtype, config.model.kv_channels, config.model.attention_dropout
            alike.setdefault(key, []).append(preset)
    for (dtype, width, dropout), names in sorted(alike.items(), key=lambda item: (item[0][0].itemsize, *item[0][1:])):
        kind = f"{str(dtype).removeprefix('torch.')}, width {width}{', dropout' if dropout else ''}"
        print(f"{kind}: {', '.join(names)}", file=sys.stderr)
        for launch in attention_launches(dtype, width, dropout):
            yield Case(f"{kind}: {launch.kernel}", getattr(attention_kernels, launch.kernel), launch.arguments,
                       launch.constants, launch.options)


def attention_launches(dtype: torch.dtype, width: int, dropout: float = 0.0, queries: int = 1) -> list[Launch]:
    """Of a forward and a backward pass over 8,704 tokens and 16 groups."""
    with torch.device("meta"):
        qkv = torch.empty(8704, 16, queries + 2, width, dtype=dtype)
        context, statistics = torch.empty_like(qkv[:, :, 2:]), torch.empty(16 * queries, 8704)
        ends = torch.empty(65, dtype=torch.int32)
        seed = torch.empty((), dtype=torch.int64) if dropout else None
        call = Call(qkv, None, ends, seed, 4, 0, -1, -1, dropout)
        results = context, context, statistics, statistics
        return [call.forward(context, statistics), *call.backward(*results, (torch.empty_like(qkv), ends))]


def cost_of(case: Case, capability: int) -> Cost:
    """Compile it."""
    kernel, arguments, options = case.kernel, case.arguments, case.options
    # As Triton does it: what is missing, and an integer that is 1, is compiled in.
    is_compiled_in = {name: value is None or (isinstance(value, int) and value == 1)
                      for name, value in arguments.items()}
    runtime = {name: value for name, value in arguments.items() if not is_compiled_in[name]}
    compiled_in = {**case.constants, **{name: value for name, value in arguments.items() if is_compiled_in[name]}}
    signature = {name: _type_of(runtime[name]) if name in runtime else "constexpr" for name in kernel.arg_names}
    aligned = {(number,): _ALIGNED for number, name in enumerate(kernel.arg_names)
               if name in runtime and _is_aligned(runtime[name])}
    source = ASTSource(kernel, signature, compiled_in, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Cost(*_assembled(compiled.asm["ptx"]), compiled.metadata.shared)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def _is_aligned(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % _WHOLE == 0
    return isinstance(value, int) and value % _WHOLE == 0


def _assembled(ptx: str) -> tuple[int, int]:
    """Registers, and bytes of spills."""
    target = re.search(r"\.target (sm_\w+)", ptx)[1]
    ptxas = triton.knobs.nvidia.ptxas_blackwell if target.startswith("sm_10") else triton.knobs.nvidia.ptxas
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = subprocess.run([ptxas.path, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"],
                              capture_output=True, text=True, check=True).stderr
    return int(re.search(r"Used (\d+) registers", said)[1]), sum(map(int, re.findall(r"(\d+) bytes spill", said)))


if __name__ == "__main__":
    sys.exit(main())
