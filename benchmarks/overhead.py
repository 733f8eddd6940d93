"""Measures the overhead of the parallel engine on a single rank: `python benchmarks/overhead.py [--repeats 30]`.

Compares the program's step (parallel layers, pipeline of one stage, data parallelism of one rank, optimizer) with plain
PyTorch: the same model with plain linear layers in place of the parallel ones, a loop of forward and backward passes,
clip_grad_norm_ and AdamW. Both train on the same micro-batches of packed proteins with dropout 0.1, alternating.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.proteins import packed_row  # noqa: E402
from megatron.config import Config  # noqa: E402
from megatron.config.command_line import parse  # noqa: E402
from megatron.data.batches.batch import Batch  # noqa: E402
from megatron.model.initialisation import initialise  # noqa: E402
from megatron.model.protein_model import ProteinModel  # noqa: E402
from megatron.parallel.mesh import Mesh  # noqa: E402
from megatron.parallel.tensor.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.train.step.engine import build_engine  # noqa: E402
from megatron.train.step.meters import Meters  # noqa: E402
from megatron.train.step.train_step import TrainStep  # noqa: E402

VOCABULARY, MICRO_BATCHES, LEARNING_RATE = 128, 2, 1e-4


class PlainLinear(nn.Module):
    """A linear layer, `x Wᵀ + b`, with the parameters of another layer, computed in x's dtype."""

    def __init__(self, layer: ColumnParallelLinear | RowParallelLinear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """The output [..., out_features]."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def our_step(config: Config, batches: list[Batch], device: torch.device) -> Callable[[], object]:
    """A function that takes a training step as the program does."""
    mesh = Mesh(device=device)
    step = TrainStep(build_engine(config, mesh, VOCABULARY), Meters(mesh.world, device))
    return lambda: step(batches, LEARNING_RATE)


def plain_step(config: Config, batches: list[Batch], device: torch.device) -> Callable[[], object]:
    """A function that takes the same training step in plain PyTorch."""
    model = ProteinModel(config.model, config.precision, VOCABULARY)
    initialise(dict(model.named_parameters()), 1)
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
                setattr(parent, name, PlainLinear(layer))
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)

    def step() -> None:
        num_targets = sum(batch.num_targets for batch in batches)
        for number, batch in enumerate(batches):
            torch.manual_seed(number)
            here = batch.to(device)
            loss, _ = model(here.sequence, here.targets)
            (loss / num_targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def elapsed_ms(step: Callable[[], object], device: torch.device) -> float:
    """The time of one step in milliseconds."""
    began_s = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - began_s)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = [packed_row(seed) for seed in range(MICRO_BATCHES)]
    print("| layers x hidden | precision | program, ms a step | plain PyTorch | program / plain, step by step |\n"
          "| --- | --- | --- | --- | --- |")
    shapes = [(4, 128, ""), (4, 512, "")] if device.type == "cpu" else [(4, 512, ""), (16, 1024, "--bf16")]
    for layers, hidden, precision in shapes:
        flags = (f"--preset tape --no-bf16 --micro-batch-size 1 --num-layers {layers} --hidden-size {hidden} "
                 f"--num-attention-heads {hidden // 64} {precision}")
        config, _ = parse(flags.split())
        steps = our_step(config, batches, device), plain_step(config, batches, device)
        for step in steps * 2:
            step()
        times: list[list[float]] = [[], []]
        for number in range(repeats):
            for which in (0, 1) if number % 2 else (1, 0):
                times[which].append(elapsed_ms(steps[which], device))
        ratios = [ours / plain for ours, plain in zip(*times, strict=True)]
        cells = [*(spread(each, ".1f") for each in times), spread(ratios, ".3f")]
        print(f"| {layers} x {hidden} | {'bf16' if precision else 'fp32'} | {' | '.join(cells)} |", flush=True)


def spread(values: list[float], form: str) -> str:
    """Median and quartiles as text."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}} ({low:{form}}–{high:{form}})"


if __name__ == "__main__":
    main()
