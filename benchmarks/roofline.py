"""What a block's pointwise kernels move, on paper: `python benchmarks/roofline.py [--registers 90]`.

Nothing is measured. Bytes are those of the tensors that each launch is given; the floor is the time in which an H100
(3.35 TB/s) or an H200 (4.8 TB/s) moves them at the bandwidth of its data sheet. Models of 133M, 650M and 3B parameters
on 16 rows of 1,024 tokens in bf16, as ESM-2; 133M also as TAPE, with dropout, and 650M with RMSNorm, SwiGLU and
normalised queries and keys. `--registers` compiles each kernel for that capability and adds registers and spilled bytes
a thread. Needs Triton, no GPU.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.compiled import Launch, Launches, launches_of_block  # noqa: E402
from megatron.config.command_line import parse  # noqa: E402

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes a second
NUM_TOKENS = 16 * 1024
SHAPES = {
    "133M, TAPE, 24 x 768": "--preset tape --num-layers 24",
    "133M, ESM-2, 24 x 768": "--preset esm2-150m --num-layers 24 --hidden-size 768 --num-attention-heads 12",
    "650M, ESM-2, 33 x 1280": "--preset esm2-650m",
    "650M, recipe, 33 x 1280": "--preset esm2-650m --normalization RMSNorm --swiglu --qk-layernorm "
                               "--disable-bias-linear",
    "3B, ESM-2, 36 x 2560": "--preset esm2-3b",
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--registers", type=int, metavar="CAPABILITY", help="such as 90: compile for it as well")
    capability = parser.parse_args().registers
    for name, flags in SHAPES.items():
        config, _ = parse([*flags.split(), "--seq-length", "1024", "--micro-batch-size", "16"])
        passes = launches_of_block(config, NUM_TOKENS)
        print_block(name, passes, capability)
        plain = launches_of_block(config, NUM_TOKENS, takes_triton=False)
        numbers, sizes = ([sum(getattr(each, what) for each in both) for both in (passes, plain)]
                          for what in ("num_pointwise", "num_bytes"))
        print(f"\nLaunches besides matrix products and attention: {numbers[0]}; in plain PyTorch {numbers[1]}, which "
              f"move {sizes[1] / 1e6:,.0f} MB.")


def print_block(name: str, passes: tuple[Launches, Launches], capability: int | None) -> None:
    """The table of one block."""
    print(f"\n{name}: one block, {NUM_TOKENS:,} tokens, bf16")
    print(f"| kernel | pass | MB | {' | '.join(f'{gpu}, µs' for gpu in BANDWIDTH)} |"
          + (" registers | spilled |" if capability else ""))
    print(f"| --- | --- | {' | '.join('---' for _ in range(1 + len(BANDWIDTH) + 2 * bool(capability)))} |")
    empty = "  |  |" if capability else ""
    rows = [(label(launch), side, launch.num_bytes, launch)
            for side, launches in zip(("forward", "backward"), passes, strict=True) for launch in launches.triton]
    for kernel, side, num_bytes, launch in rows:
        print_row(kernel, side, num_bytes, resources(launch, capability))
    others = [other for launches in passes for other in launches.pointwise]
    for kind in sorted({kind for kind, _ in others}):
        sizes = [num_bytes for other, num_bytes in others if other == kind]
        print_row(f"PyTorch's {kind}, {len(sizes)}", "both", sum(sizes), empty)
    print_row("all", "both", sum(launches.num_bytes for launches in passes), empty)


def label(launch: Launch) -> str:
    """What a kernel does, in words."""
    kernel, has = launch.name.split()[0], launch.constants
    if kernel == "residual_norm":
        joins = has.get("HAS_BRANCH") or has["HAS_SHIFT"] or has["HAS_DROPOUT"]
        return " and ".join(["join"] * bool(joins) + ["norm"] * has["HAS_NORM"])
    return f"{'bias and ' * has['HAS_BIAS']}{has['KIND']}" if kernel == "activation" else "queries and keys"


def resources(launch: Launch, capability: int | None) -> str:
    """The last columns, if there are any."""
    if capability is None:
        return ""
    found = launch.resources(capability)
    return f" {found.registers} | {found.spilled} |"


def print_row(kernel: str, side: str, num_bytes: int, rest: str) -> None:
    """One line."""
    floors = " | ".join(f"{num_bytes / bandwidth * 1e6:.1f}" for bandwidth in BANDWIDTH.values())
    print(f"| {kernel} | {side} | {num_bytes / 1e6:.1f} | {floors} |{rest}")


if __name__ == "__main__":
    main()
