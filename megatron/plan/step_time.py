"""Estimates the time of a step: arithmetic, memory traffic, exposed communication and the pipeline's idle time.

The estimate is for comparing layouts. It uses data sheets and assumptions, given in `megatron.plan.gpus` and below.
"""

from dataclasses import dataclass

from megatron.model.flops import model_flops
from megatron.parallel.traffic import ALL_REDUCE, EXCHANGE, Traffic
from megatron.plan.gpus import BANDWIDTH_SHARE, MATRIX_SHARE, Gpu, peak_tflops
from megatron.plan.muon import muon_flops, muon_traffic
from megatron.plan.parameters import share_size
from megatron.plan.rank import Rank

# The latency of a collective inside a node and between nodes.
LATENCY_S, NETWORK_LATENCY_S = 15e-6, 30e-6
# The share of tensor-parallel messages that computation does not hide: 4 of 10 overlap with a product of the backward
# pass.
_TENSOR_EXPOSED = 0.6
# The share of pipeline messages that computation does not hide.
_PIPELINE_EXPOSED = 0.2
# The share of data-parallel messages that is always exposed, at the beginning and the end of a step.
_LEAST_EXPOSED = 0.1
# Bytes that the optimizer reads and writes for each parameter.
_BYTES_A_STEP = 32


@dataclass(frozen=True)
class StepTime:
    """The estimated time of a step."""

    step_s: float  # seconds
    bubble: float  # the share of the passes' time in which a pipeline rank is idle
    mfu: float  # model FLOPs utilisation: the share of the GPUs' peak that the model's arithmetic uses


def step_time(ranks: list[Rank], traffics: list[Traffic], gpu: Gpu, gpus_per_node: int) -> StepTime:
    """The estimate for a layout; `ranks`: those that may be the slowest, `traffics`: what each of them sends."""
    rank = ranks[0]
    pass_s, after_s = (max(values) for values in zip(*(
        _rank_seconds(*each, gpu, gpus_per_node) for each in zip(ranks, traffics, strict=True)), strict=True))
    idle = bubble_micro_batches(rank)
    passes_s = (rank.num_micro_batches + idle) * pass_s
    batch = rank.setting.batch
    flops = model_flops(rank.config.model, rank.setting.padded_vocab_size, batch.num_tokens,
                        batch.num_pairs, batch.num_targets)
    step_s, peak = passes_s + after_s, peak_tflops(gpu, rank.config.precision) * 1e12
    return StepTime(step_s, idle / (rank.num_micro_batches + idle),
                    flops * rank.num_micro_batches * rank.sizes["data"] / (step_s * rank.num_ranks * peak))


def bubble_micro_batches(rank: Rank) -> float:
    """A pipeline rank's idle time in a step, in units of a micro-batch's passes.

    With P pipeline ranks it is P - 1 for 1F1B, (P - 1)/V with V stages on each rank (Narayanan et al., 2021, arXiv
    2104.04473), and about (P - 1)/3 for ZB-H1 (Qi et al., 2023, arXiv 2401.10241).
    """
    waiting = rank.sizes["pipeline"] - 1
    return waiting / 3 if rank.config.parallel.pipeline_schedule == "zero-bubble" else waiting / len(rank.stages)


def _rank_seconds(rank: Rank, traffic: Traffic, gpu: Gpu, gpus_per_node: int) -> tuple[float, float]:
    """Seconds of one micro-batch's passes, and seconds after the last pass: optimizer and exposed reductions."""
    seconds = {axis: _message_seconds(traffic, axis, rank, gpu, gpus_per_node) for axis in rank.sizes}
    compute_s = compute_seconds(rank, gpu)
    waits_s = (_TENSOR_EXPOSED * seconds["tensor"] + seconds["context"] + _PIPELINE_EXPOSED * seconds["pipeline"])
    waits_s /= rank.num_micro_batches
    own = share_size(rank.held.trained, rank.shards, rank.shard)
    optimizer_s = _BYTES_A_STEP * own / (gpu.memory_bandwidth * 1e9 * BANDWIDTH_SHARE)
    optimizer_s += _muon_seconds(rank, gpu, gpus_per_node)
    return compute_s + waits_s, optimizer_s + _exposed_data(rank, seconds["data"], compute_s)


def compute_seconds(rank: Rank, gpu: Gpu) -> float:
    """Seconds of arithmetic and memory traffic of one micro-batch's passes through the rank's stages."""
    in_fp8 = sum(stage.fp8_flops for stage in rank.stages)
    others_s = (sum(stage.flops for stage in rank.stages) - in_fp8) / (
        peak_tflops(gpu, rank.config.precision) * 1e12 * MATRIX_SHARE)
    return (others_s + (in_fp8 / (gpu.fp8_tflops * 1e12 * MATRIX_SHARE) if in_fp8 else 0.0)
            + sum(stage.moved for stage in rank.stages) / (gpu.memory_bandwidth * 1e9 * BANDWIDTH_SHARE))


def _muon_seconds(rank: Rank, gpu: Gpu, gpus_per_node: int) -> float:
    """Seconds of Muon: the larger of computing and messages, as one round's matrices are computed during the next's.
    """
    exchanges_s = _seconds_on_links(muon_traffic(rank), _is_inside(rank.holders.size, rank, gpus_per_node), gpu)
    return max(exchanges_s, muon_flops(rank) / (gpu.half_tflops * 1e12 * MATRIX_SHARE))


def _message_seconds(traffic: Traffic, axis: str, rank: Rank, gpu: Gpu, gpus_per_node: int) -> float:
    """Seconds that a step's messages along an axis take, with the links to themselves; without those of Muon."""
    seconds = 0.0
    for key, sent in traffic.sent.items():
        if key[0] == axis and key[1] != EXCHANGE:
            seconds += _seconds_on_links(Traffic({key: traffic.calls[key]}, {key: sent}),
                                         _is_inside(_span(*key, rank), rank, gpus_per_node), gpu)
    return seconds


def _seconds_on_links(traffic: Traffic, is_inside: bool, gpu: Gpu) -> float:
    """Seconds that messages take, inside a node or between nodes."""
    bandwidth, latency_s = (gpu.link, LATENCY_S) if is_inside else (gpu.network, NETWORK_LATENCY_S)
    return traffic.sent.total() / (bandwidth * 1e9 * BANDWIDTH_SHARE) + traffic.calls.total() * latency_s


def _is_inside(span: int, rank: Rank, gpus_per_node: int) -> bool:
    """Whether every group of `span` consecutive ranks is on one host."""
    return rank.num_ranks <= gpus_per_node or gpus_per_node % span == 0


def _span(axis: str, operation: str, rank: Rank) -> int:
    """The number of consecutive ranks that a group of an axis extends over; tensor neighbours are consecutive."""
    tensor, context = rank.sizes["tensor"], rank.sizes["context"]
    if axis == "data":
        inside = rank.shards if rank.sharding != "none" and operation != ALL_REDUCE else rank.replicas
        return inside * tensor
    return {"tensor": tensor, "context": context * tensor, "pipeline": rank.num_ranks}[axis]


def _exposed_data(rank: Rank, data_s: float, compute_s: float) -> float:
    """Seconds of data-parallel messages that computation does not hide: all, with --DDP-impl local and no sharding."""
    if rank.sharding == "none" and rank.config.parallel.DDP_impl == "local":
        return data_s
    num_hiding = rank.num_micro_batches if rank.sharding in ("gradients", "parameters") else 1
    return max(_LEAST_EXPOSED * data_s, data_s - num_hiding * compute_s)
