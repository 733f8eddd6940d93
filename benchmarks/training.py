"""Measures how fast presets train on this machine: `python benchmarks/training.py [--presets NAME …] [--seconds 5]`.

Takes whole steps as the program does (forward, backward, clipping, AdamW; compiled on GPUs), of one micro-batch each,
on full rows of random residues in proteins of the shipped ones' lengths, on the GPU if there is one. Further flags
measure each preset a second time and print the speed-up: --fp8 with the blocks' products in FP8, --cuda-graph with CUDA
graphs, --no-compile with this project's kernels in place of torch.compile's. --rehearse only checks that everything
runs, with tiny presets on a few tokens.
"""

import argparse
import gc
import gzip
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_step import processor  # noqa: E402
from megatron.config import Config, ModelConfig  # noqa: E402
from megatron.config.command_line import parse  # noqa: E402
from megatron.data.batches.batch import Batch, BatchShape, collate  # noqa: E402
from megatron.data.rows.packed import Row  # noqa: E402
from megatron.model.protein_model import compute_dtype  # noqa: E402
from megatron.parallel.mesh import Mesh  # noqa: E402
from megatron.plan.rank import padded_vocab_size  # noqa: E402
from megatron.train.setup.peak import measured_peak_flops  # noqa: E402
from megatron.train.step.engine import build_engine  # noqa: E402
from megatron.train.step.meters import Meters, Reading  # noqa: E402
from megatron.train.step.train_step import TrainStep  # noqa: E402

# The rows of a micro-batch, enough to use a GPU of 80 GB or more well.
ROWS = {"esm2-8m": 64, "esm2-35m": 64, "tape": 16, "133M": 32, "esm2-150m": 32, "proteinlm-200m": 8, "esm2-650m": 16,
        "esm2-3b": 4, "proteinlm-3b": 2}
# Shapes that are not presets: SpeedrunningPLMs' 133M has 24 x 768 with a feed-forward layer of 8/3 of that width.
SHAPES = {"133M": "--preset esm2-150m --num-layers 24 --hidden-size 768 --num-attention-heads 6 --ffn-hidden-size 2048"}
SMALL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256".split()
WARM_UP = 3


def shape_of(name: str) -> list[str]:
    """The flags of a preset, or of a name in SHAPES."""
    return SHAPES.get(name, f"--preset {name}").split()


def shipped_lengths() -> list[int]:
    """The number of residues of each shipped protein."""
    with gzip.open(ROOT / "examples" / "proteins" / "small.fasta.gz", "rt") as file:
        return [sum(map(len, record.splitlines()[1:])) for record in file.read().split(">")[1:]]


def full_rows(config: Config, num_rows: int) -> Batch:
    """A batch of full rows of proteins; the last protein of a row is cut at its end."""
    size, ends, rng = config.data.seq_length, config.data.num_ends, np.random.default_rng(0)
    lengths = iter(shipped_lengths() * num_rows)
    rows = []
    for _ in range(num_rows):
        row: list[int] = []
        while sum(row) < size - ends:
            row.append(min(next(lengths) + ends, size - sum(row)))
        tokens = rng.integers(6, 26, sum(row))
        targets = np.arange(1, len(tokens) - ends, 7)
        rows.append(Row(tokens, np.array(row), targets, tokens[targets]))
    shape = BatchShape(num_rows * size, sum(len(row.lengths) for row in rows),
                       sum(len(row.target_ids_m) for row in rows), max(int(row.lengths.max()) for row in rows),
                       num_ends=ends)
    return collate(rows, shape)


def measured(config: Config, seconds: float, device: torch.device) -> Reading:
    """The meters' reading of steps over about `seconds`, after some steps of warm-up."""
    mesh = Mesh(device=device)
    meters = Meters(mesh.world, device)
    step = TrainStep(build_engine(config, mesh, padded_vocab_size(config), _drawn_there, mask_id=5), meters)
    batch = full_rows(config, config.training.micro_batch_size)
    if device.type == "cuda":
        batch = batch.pin_memory()
    for _ in range(WARM_UP):
        step([batch], 1e-5, (False, False))
    reading, num_steps = meters.read(), 1
    while True:
        for _ in range(num_steps):
            step([batch], 1e-5, (False, False))
        reading = meters.read()
        if reading.elapsed_s >= seconds or num_steps > 1:
            return reading
        num_steps = max(2, int(seconds / reading.elapsed_s))


@torch.no_grad()
def _drawn_there(parameters: Mapping[str, nn.Parameter]) -> None:
    """Initialise parameters on the device, since on the host 3B parameters take half a minute."""
    for parameter in parameters.values():
        if parameter.ndim > 1:
            parameter.normal_(0.0, 0.02)
        else:
            parameter.fill_(1.0)


def main() -> None:
    """Print the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--fp32", action="store_true", help="in place of bf16")
    parser.add_argument("--fp8", choices=("e4m3", "hybrid"), help="each preset in that too")
    parser.add_argument("--cuda-graph", action="store_true", help="each preset with that too")
    parser.add_argument("--no-compile", action="store_true", help="each preset with that too")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{processor()}, torch {torch.__version__}, {'fp32' if arguments.fp32 else 'bf16'}\n")
    columns = ["preset", "rows x tokens", "tokens/s", "residues/s", "model TFLOP/s", "of the measured peak", "GiB held"]
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|", flush=True)
    common = [*(["--no-bf16"] if arguments.fp32 else []), *(SMALL if arguments.rehearse else [])]
    more = [["--fp8", arguments.fp8]] if arguments.fp8 else []
    more += [["--cuda-graph"]] if arguments.cuda_graph else []
    more += [["--no-compile"]] if arguments.no_compile else []
    seconds, gains = 0.2 if arguments.rehearse else arguments.seconds, []
    for preset in arguments.presets:
        rows = str(2 if arguments.rehearse else ROWS[preset])
        speeds = []
        for flags in ([], *more):
            config, _ = parse([*shape_of(preset), "--micro-batch-size", rows, "--global-batch-size", rows, *common,
                               *flags])
            speeds.append(print_row(" ".join([preset, *flags]), config, seconds, device))
        gains += [f"{preset}: {speed / speeds[0]:.2f} times as many tokens/s with {' '.join(flags)}"
                  for speed, flags in zip(speeds[1:], more, strict=True)]
    if gains:
        print("", *gains, sep="\n")


@cache
def peak_flops(dtype: torch.dtype, device: torch.device, num_tokens: int, hidden: int, inner: int) -> float:
    """`measured_peak_flops` for matrix products of these shapes, cached."""
    return measured_peak_flops(dtype, device, num_tokens, ModelConfig(hidden_size=hidden, ffn_hidden_size=inner))


def print_row(name: str, config: Config, seconds: float, device: torch.device) -> float:
    """Measure a configuration and print its row of the table; returns tokens a second."""
    gc.collect()  # frees the engine of the row before, whose compiled blocks are in reference cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    reading = measured(config, seconds, device)
    held = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    rows, tokens = config.training.micro_batch_size, config.data.seq_length
    peak = peak_flops(compute_dtype(config.precision), device, rows * tokens, config.model.hidden_size,
                      config.model.ffn_hidden_size)
    flops, speed = reading.model_flops / reading.elapsed_s, reading.num_tokens / reading.elapsed_s
    print(f"| {name} | {rows} x {tokens} | {speed:.0f} | {reading.num_residues / reading.elapsed_s:.0f} | "
          f"{flops / 1e12:.3f} | {100 * flops / peak:.0f} % | {held:.1f} |", flush=True)
    torch._dynamo.reset()
    return speed


if __name__ == "__main__":
    main()
