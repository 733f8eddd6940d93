"""Times the operations between matrix products: `python benchmarks/pointwise.py [--presets NAME …] [--rehearse]`.

Prints milliseconds of a forward and backward pass of a preset's normalisation, activation and rotation, and of a whole
block, in bf16 with 16,384 tokens, on the GPU if there is one. Compared are this project's kernels (Triton on GPUs,
the C++ helper on CPUs), PyTorch's functions, and these under torch.compile. The cases alternate; times are medians with
their range. The floor is the time to read and write an operation's tensors at the rate at which this device copies
memory; that of a block is in benchmarks/roofline.py.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_step import processor  # noqa: E402
from megatron.config import Config  # noqa: E402
from megatron.config.command_line import parse  # noqa: E402
from megatron.data.batches.typical import typical_batch  # noqa: E402
from megatron.kernels import device as choice  # noqa: E402
from megatron.kernels.pointwise import native  # noqa: E402
from megatron.kernels.pointwise.activation import activated  # noqa: E402
from megatron.kernels.pointwise.heads import prepared_heads  # noqa: E402
from megatron.kernels.pointwise.residual_norm import Scaling, normalised  # noqa: E402
from megatron.kernels.rotary import rotation_of  # noqa: E402
from megatron.model.initialisation import initialise  # noqa: E402
from megatron.model.transformer import Transformer  # noqa: E402
from megatron.parallel.pipeline.partition import Stage  # noqa: E402
from megatron.parallel.tensor.stream import ONE_RANK_STREAM  # noqa: E402

NUM_TOKENS, WARM_UP = 16 * 1024, 3
SMALL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4".split()
Operation = Callable[[Tensor], Tensor]


def operations(config: Config, num_tokens: int, device: torch.device) -> Iterator[
        tuple[str, Operation, Tensor, float]]:
    """A preset's operations: name, function, input, and the bytes moved in both passes as a multiple of the input's."""
    model, dtype = config.model, torch.bfloat16
    vector = partial(torch.randn, device=device, requires_grad=True)
    scaling = Scaling(vector(model.hidden_size), vector(model.hidden_size), 1e-5)
    yield "norm", lambda x: normalised(x, scaling, dtype)[1], _random(num_tokens, model.hidden_size, device=device), 5
    bias = vector(model.ffn_hidden_size)
    yield "bias and gelu", lambda x: activated("gelu", (x, bias)), _random(num_tokens, model.ffn_hidden_size,
                                                                            device=device), 5
    rotation = rotation_of(torch.arange(num_tokens, device=device) % 1024, model.kv_channels, 1e4)
    shape = num_tokens, model.num_attention_heads, 3, model.kv_channels
    # A view, since only non-leaf tensors are rotated in place, as a projection's output is; values stay unchanged.
    yield "rotation", lambda x: prepared_heads(x.view_as(x), None, rotation)[0], _random(*shape, device=device), 10 / 3
    sequence = typical_batch(config.data, num_tokens // config.data.seq_length).sequence.map(lambda x: x.to(device))
    with device:
        transformer = Transformer(model, 128, dtype, ONE_RANK_STREAM, Stage(0, 2, range(1)))
    initialise(dict(transformer.named_parameters()), 1)
    block, turned = transformer.layers["0"], transformer.rotation(sequence)
    yield "block", lambda x: block(x, sequence, turned), _random(num_tokens, model.hidden_size, device=device), 0


def _random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).bfloat16().requires_grad_()


def by_pytorch(operation: Operation, x: Tensor) -> Tensor:
    """The operation computed by PyTorch's own functions."""
    with patch.object(choice, "_DTYPES", ()), patch.object(native, "_helper", None):
        return operation(x)


def milliseconds(operation: Operation, x: Tensor) -> float:
    """The time of one forward and backward pass in milliseconds, with no gradient to accumulate into."""
    x.grad, gradient = None, torch.ones_like(operation(x))
    if x.is_cuda:
        torch.cuda.synchronize()
    began_s = time.perf_counter()
    operation(x).backward(gradient)
    if x.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began_s)


def copied_bytes_per_s(device: torch.device, num_bytes: int) -> float:
    """The bytes read and written in a second by a copy of `num_bytes`; the best of several."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target, least_s = torch.empty_like(source), float("inf")
    for _ in range(WARM_UP + 5):
        began_s = time.perf_counter()
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize()
        least_s = min(least_s, time.perf_counter() - began_s)
    return 2 * num_bytes / least_s


def main() -> None:
    """Print the table, each line as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["tape", "esm2-150m", "esm2-650m"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rehearse", action="store_true", help="two presets of tiny shapes, to see that all runs")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{processor()}, torch {torch.__version__}\n")
    rate = copied_bytes_per_s(device, 2**22 if arguments.rehearse else 2**29)
    print("| preset | operation | this project | PyTorch | torch.compile | floor |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for preset in arguments.presets[:2] if arguments.rehearse else arguments.presets:
        config, _ = parse(["--preset", preset, "--seq-length", "1024", *(SMALL if arguments.rehearse else [])])
        for name, operation, x, times_moved in operations(config, 1024 if arguments.rehearse else NUM_TOKENS, device):
            ways = [operation, partial(by_pytorch, operation), torch.compile(operation)]
            times: list[list[float]] = [[] for _ in ways]
            for _ in range(WARM_UP + (1 if arguments.rehearse else arguments.repeats)):
                for each, way in zip(times, ways, strict=True):
                    each.append(milliseconds(way, x))
            cells = [f"{statistics.median(each[WARM_UP:]):.3f} ({min(each[WARM_UP:]):.3f}–{max(each[WARM_UP:]):.3f})"
                     for each in times]
            floor_ms = 1000 * times_moved * x.numel() * x.element_size() / rate
            print(f"| {preset} | {name} | {' | '.join(cells)} | {f'{floor_ms:.3f}' if times_moved else ''} |",
                  flush=True)
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
