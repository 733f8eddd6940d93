"""Compiles the Triton kernels without a GPU: `python benchmarks/triton_kernels.py [--presets ...]`.

For each compute capability it prints registers of a thread, bytes that a thread spills, and shared memory of a program
in KB (1,024 bytes). The kernels are those of attention, attention maps and cross entropy of each preset, in its own
precision and in fp32, and of Muon's symmetric products, compiled as in a run. The exit status is 1 if one needs more
shared memory than the smallest GPU of its capability has.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.compiled import Launches, RecordedLaunch, Resources, distinct  # noqa: E402
from benchmarks.launched import launch_of_map, launches_of_loss  # noqa: E402
from megatron.config.command_line import parse  # noqa: E402
from megatron.config.reading.presets import PRESETS  # noqa: E402
from megatron.kernels.attention import triton_kernels as attention_kernels  # noqa: E402
from megatron.kernels.attention.launches import Call, KernelLaunch  # noqa: E402
from megatron.kernels.newton_schulz.orthogonal import orthogonalised  # noqa: E402

# The limit of shared memory of a program, in bytes. Code for 8.0 also runs on 8.6 and 8.9, which have least.
MOST_SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class KernelCase(NamedTuple):
    """A kernel as a run launches it; `blocks`: its tile sizes, for the table."""

    name: str
    launch: RecordedLaunch
    blocks: str


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What compilers make of the Triton kernels.")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--capabilities", nargs="+", type=int, choices=MOST_SHARED, default=list(MOST_SHARED))
    options = parser.parse_args()
    heads = [f"{capability / 10} {item.name}" for capability in options.capabilities for item in fields(Resources)]
    print("| kernel | tile, warps, stages |", *(f"{head} |" for head in heads))
    print("| --- " * (2 + len(heads)) + "|")
    fits = True
    for case in (*cases(options.presets), *newton_schulz_cases()):
        costs = [case.launch.resources(capability) for capability in options.capabilities]
        fits &= all(cost.shared <= MOST_SHARED[each] for cost, each in zip(costs, options.capabilities, strict=True))
        figures = [figure for cost in costs for figure in (cost.registers, cost.spilled, f"{cost.shared / 1024:.0f}")]
        print(f"| {case.name} | {', '.join(map(str, (case.blocks, *case.launch.options.values())))} |",
              *(f"{figure} |" for figure in figures), flush=True)
    return 0 if fits else 1


def cases(presets: Iterable[str]) -> Iterator[KernelCase]:
    """The kernels of attention and cross entropy of each preset, once for presets with the same."""
    alike: dict[tuple[torch.dtype, int, float], list[str]] = {}
    losses: list[RecordedLaunch] = []
    for preset in presets:
        config, _ = parse(["--preset", preset])
        own = torch.bfloat16 if config.precision.bf16 else torch.float32
        for dtype in dict.fromkeys((own, torch.float32)):
            key = dtype, config.model.kv_channels, config.model.attention_dropout
            alike.setdefault(key, []).append(preset)
            precision = replace(config.precision, bf16=dtype == torch.bfloat16)
            for passes in launches_of_loss(replace(config, precision=precision)):
                losses += [launch for launch in passes.triton if launch.name.startswith("cross_entropy")]
    for (dtype, width, dropout), names in sorted(alike.items(), key=lambda item: (item[0][0].itemsize, *item[0][1:])):
        kind = f"{str(dtype).removeprefix('torch.')}, width {width}{', dropout' if dropout else ''}"
        print(f"{kind}: {', '.join(names)}", file=sys.stderr)
        for each in attention_launches(dtype, width, dropout):
            kernel, named = getattr(attention_kernels, each.kernel), {**each.arguments, **each.constants}
            yield KernelCase(f"{kind}: {each.kernel}",
                       RecordedLaunch(kernel, tuple(named[name] for name in kernel.arg_names), each.options),
                       f"{each.constants['BLOCK_QUERIES']} x {each.constants['BLOCK_KEYS']}")
    for dtype, width in dict.fromkeys(sorted((key[:2] for key in alike), key=lambda each: (each[0].itemsize, each[1]))):
        maps = launch_of_map(dtype, width, 8704, 500)
        yield KernelCase(f"{str(dtype).removeprefix('torch.')}, width {width}: {maps.name}", maps,
                   f"{maps.constants['BLOCK']} x {maps.constants['BLOCK']}")
    for launch in distinct(losses):
        dtype, constants = launch.arguments[0].dtype, launch.constants
        kind = f"{str(dtype).removeprefix('torch.')}, {len(launch.arguments[0])} targets"
        yield KernelCase(f"{kind}: {launch.name}", launch,
                   f"{constants['ROWS']} x {constants['BLOCK']}")


def newton_schulz_cases() -> Iterator[KernelCase]:
    """Muon's symmetric products of matrices of a small and a large model; the tile is rows x columns."""
    with torch.device("meta"), Launches() as launches:
        for width in (128, 1280):
            orthogonalised(torch.empty(4, width, 4 * width, dtype=torch.bfloat16), 1)
    for launch in distinct(launches.triton):
        has = launch.constants
        kind = "a A + b A²" if has["HAS_FACTOR"] else "X Xᵀ"
        yield KernelCase(f"bfloat16, {launch.arguments[2]} rows: {kind}", launch, f"{has['TILE']} x {has['DEPTH']}")


def attention_launches(dtype: torch.dtype, width: int, dropout: float = 0.0, queries: int = 1) -> list[KernelLaunch]:
    """The launches of attention's forward and backward pass over 8,704 tokens and 16 groups of heads."""
    with torch.device("meta"):
        qkv = torch.empty(8704, 16, queries + 2, width, dtype=dtype)
        context, statistics = torch.empty_like(qkv[:, :, 2:]), torch.empty(16 * queries, 8704)
        ends = torch.empty(65, dtype=torch.int32)
        seed = torch.empty((), dtype=torch.int64) if dropout else None
        call = Call(qkv, None, ends, seed, 4, 0, -1, -1, round((1 - dropout) * 2**16), 0)
        results = context, context, statistics, statistics
        return [call.forward(context, statistics), *call.backward(*results, (torch.empty_like(qkv), ends))]


if __name__ == "__main__":
    sys.exit(main())
