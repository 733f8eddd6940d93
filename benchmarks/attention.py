"""Times attention on packed proteins, forward and backward: `python benchmarks/attention.py [--repeats 9]`.

The input is one packed row of 2,176 positions, with 8 heads of width 64, and 20 of width 16 as in ESM-2's 8M, on the
GPU if there is one. Compared are: what the project uses on this device; its Triton kernels (only on GPUs, where the
former may be PyTorch's varlen_attn); PyTorch's FlexAttention with a mask made beforehand (only on GPUs and without
dropout); the project's attention by protein; and PyTorch's scaled_dot_product_attention for each protein, on proteins
padded to the longest, and on the whole row with a mask. The cases alternate; `--forward` times only the forward pass.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.proteins import LENGTHS, packed_row  # noqa: E402
from benchmarks.train_step import processor  # noqa: E402
from megatron.kernels.attention.by_protein import attention_by_protein  # noqa: E402
from megatron.kernels.attention.flex import with_masks  # noqa: E402
from megatron.kernels.attention.packed import packed_attention  # noqa: E402
from megatron.kernels.dropout import Dropout, Use  # noqa: E402
from megatron.kernels.packed_sequence import PackedSequence  # noqa: E402

Way = Callable[[Tensor, PackedSequence, Dropout | None], Tensor]


def triton_kernels(qkv_tn3d: Tensor, sequence: PackedSequence, dropout: Dropout | None) -> Tensor:
    """The project's Triton kernels, even if it would use PyTorch's operator here."""
    seed, kept = (dropout.seed, dropout.kept) if dropout else (None, 0)
    return torch.ops.megatron.fused_attention(qkv_tn3d, None, sequence.cu_seqlens, seed, sequence.num_filler, 0, -1, -1,
                                              kept, 0)[0].flatten(1, 2)


def flex(qkv_tn3d: Tensor, sequence: PackedSequence, dropout: Dropout | None) -> Tensor:
    """PyTorch's FlexAttention, as with `--attention-backend flex`."""
    return packed_attention(qkv_tn3d, sequence, dropout, None, "flex")


def by_protein(qkv_tn3d: Tensor, sequence: PackedSequence, dropout: Dropout | None) -> Tensor:
    """The project's attention by protein: two products and a softmax for each."""
    return attention_by_protein(qkv_tn3d, sequence, dropout, None)


def rate(dropout: Dropout | None) -> float:
    """The dropout rate as PyTorch's functions take it."""
    return dropout.rate if dropout else 0.0


def a_protein_at_a_time(qkv_tn3d: Tensor, sequence: PackedSequence, dropout: Dropout | None) -> Tensor:
    """scaled_dot_product_attention on each protein."""
    contexts = [F.scaled_dot_product_attention(*protein.permute(2, 1, 0, 3).unbind(0), dropout_p=rate(dropout))
                for protein in qkv_tn3d.split(LENGTHS)]
    return torch.cat(contexts, dim=1).transpose(0, 1)


def padded(qkv_tn3d: Tensor, sequence: PackedSequence, dropout: Dropout | None) -> Tensor:
    """scaled_dot_product_attention on a batch of proteins padded to the longest."""
    proteins = qkv_tn3d.split(LENGTHS)
    batch = torch.nn.utils.rnn.pad_sequence(list(proteins), batch_first=True)
    lengths = sequence.cu_seqlens.diff()[:len(LENGTHS)]
    is_real_bs = torch.arange(batch.shape[1], device=batch.device) < lengths[:, None]
    query, key, value = batch.permute(3, 0, 2, 1, 4).unbind(0)
    context = F.scaled_dot_product_attention(query, key, value, is_real_bs[:, None, None], rate(dropout))
    return context.transpose(1, 2)[is_real_bs]


def masked_row(qkv_tn3d: Tensor, sequence: PackedSequence, dropout: Dropout | None) -> Tensor:
    """scaled_dot_product_attention on the whole row with a mask of row x row."""
    lengths = sequence.cu_seqlens.diff()
    protein_t = torch.repeat_interleave(torch.arange(len(lengths), device=qkv_tn3d.device), lengths)
    query, key, value = qkv_tn3d.permute(2, 1, 0, 3)[:, None].unbind(0)
    mask = protein_t[:, None] == protein_t[None, :]
    return F.scaled_dot_product_attention(query, key, value, mask, rate(dropout))[0].transpose(0, 1)


WAYS: dict[str, Way] = {"this project": packed_attention, "Triton": triton_kernels, "FlexAttention": flex,
                        "by protein": by_protein, "SDPA a protein": a_protein_at_a_time, "SDPA, padded": padded,
                        "SDPA, masked row": masked_row}
CASES = [(shape, dtype, dropout) for shape, dropout in (((8, 64), 0.0), ((20, 16), 0.0), ((8, 64), 0.1))
         for dtype in (torch.float32, torch.bfloat16)]


def milliseconds(way: Way, qkv_tn3d: Tensor, sequence: PackedSequence, rate: float, goes_back: bool) -> float:
    """The time of a forward pass, and a backward pass if `goes_back`, in milliseconds."""
    seed = torch.ones((), dtype=torch.int64, device=qkv_tn3d.device)
    dropout = Dropout(rate, seed, Use.PROBABILITIES) if rate else None
    began_s = time.perf_counter()
    with torch.set_grad_enabled(goes_back):
        context = way(qkv_tn3d, sequence, dropout)
    if goes_back:
        context.backward(torch.ones_like(context))
        qkv_tn3d.grad = None
    if qkv_tn3d.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began_s)


def main() -> None:
    """Time every case `--repeats` times and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--forward", action="store_true", help="the forward pass alone")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sequence = with_masks(packed_row().to(device).sequence, [None])
    ways = {name: way for name, way in WAYS.items() if device.type == "cuda" or way not in (triton_kernels, flex)}
    times: dict[tuple, list[float]] = {(name, *case): [] for name in ways for case in CASES}
    with suppress(KeyboardInterrupt):  # gpu.sh interrupts it after a while; then print what is known
        for (shape, dtype, dropout), repeat in product(CASES, range(arguments.repeats + 2)):
            qkv = torch.randn(sum(LENGTHS), shape[0], 3, shape[1], device=device).to(dtype).requires_grad_()
            for name, way in ways.items():
                if way is flex and dropout:
                    continue
                elapsed_ms = milliseconds(way, qkv, sequence, dropout, not arguments.forward)
                if repeat >= 2:  # the first two warm up
                    times[(name, shape, dtype, dropout)].append(elapsed_ms)
    print(f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    heads = (f"{shape[0]} × {shape[1]}, {str(dtype).split('.')[1]}, dropout {dropout}"
             for shape, dtype, dropout in CASES)
    print("| way | " + " | ".join(heads) + " |\n| --- |" + " --- |" * len(CASES))
    for name in ways:
        columns = [times[(name, *case)] for case in CASES]
        cells = [f"{statistics.median(t):.1f} ({min(t):.1f}–{max(t):.1f})" if t else "none" for t in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
