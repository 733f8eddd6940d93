"""A dry run: measures the memory and messages of one rank of a layout, in one process and without allocating anything.

The real stages, pipeline and optimizer of that rank take some steps on fake tensors (torch's FakeTensorMode), in a
process group that sends nothing (torch's "fake" backend), with artificial batches (`megatron.data.batches.typical`).
--DDP-impl torch is replaced by local, which sends the same bytes, because torch's C++ reducer reads values.
"""

from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.config import Config
from megatron.data.batches.typical import typical_batch
from megatron.errors import ConfigError
from megatron.model.protein_model import ProteinModel, compute_dtype
from megatron.parallel.data.data_parallel import data_parallel
from megatron.parallel.mesh import Mesh, build_mesh
from megatron.parallel.traffic import Traffic, TrafficCounter
from megatron.plan.fake_group import fake_group
from megatron.plan.memory import Memory
from megatron.plan.memory_watch import MemoryWatch, num_bytes
from megatron.plan.rank import padded_vocab_size
from megatron.plan.work import WeightBytes
from megatron.train.state import BatchSizes
from megatron.train.step.engine import build_stages, stream_of, with_optimizer
from megatron.train.step.meters import Meters
from megatron.train.step.train_step import TrainStep

_GIB = 2**30


@dataclass(frozen=True)
class Measurement:
    """A rank's memory at the peak, and what it sends in a step.

    `weight_bytes`: the bytes of weights and their gradients that one more micro-batch reads and writes
    (`megatron.plan.work.WeightBytes`), for each of their elements. Only parameters of two or more dimensions count,
    none of which is as long as the micro-batch, because they are recognised by shape. None if there are no such
    parameters, or the step has too few micro-batches to measure it.
    """

    memory: Memory
    traffic: Traffic
    weight_bytes: float | None


def dry_run(config: Config) -> str:
    """The text that reports on rank `--dry-run-rank` of `--dry-run-ranks`; raises ConfigError for an impossible rank.
    """
    found = measure(config)
    parallel = config.parallel
    lines = [f"dry run of rank {parallel.dry_run_rank} of {parallel.dry_run_ranks}: memory at the peak, GiB"]
    held = found.memory
    parts = {"parameters": held.parameters, "gradients": held.gradients, "optimizer": held.optimizer,
             "activations and temporary": held.activations, "peak": held.peak}
    lines += [f"  {name:<28}{size / _GIB:>12.3f}" for name, size in parts.items()]
    if found.weight_bytes is not None:
        lines.append(f"weights read and written by a micro-batch, bytes a parameter {found.weight_bytes:.1f}")
    lines += ["sent a step by this rank", f"  {'axis':<14}{'operation':<14}{'calls':>12}{'bytes':>20}{'GiB':>12}"]
    for (axis, operation), sent in sorted(found.traffic.sent.items()):
        calls = found.traffic.calls[axis, operation]
        lines.append(f"  {axis:<14}{operation:<14}{calls:>12,}{sent:>20,}{sent / _GIB:>12.3f}")
    total = found.traffic.sent.total()
    return "\n".join([*lines, f"  {'in all':<28}{found.traffic.calls.total():>12,}{total:>20,}{total / _GIB:>12.3f}"])


def measure(config: Config) -> Measurement:
    """The measurement of rank `--dry-run-rank` of `--dry-run-ranks`, in a layout that passed `check_layout`.

    Raises ConfigError if there is no such rank.
    """
    rank, num_ranks = config.parallel.dry_run_rank, config.parallel.dry_run_ranks
    if rank >= num_ranks:
        raise ConfigError(f"--dry-run-rank is {rank}, and --dry-run-ranks {num_ranks}: ranks count from 0")
    with fake_group(rank, num_ranks):
        mesh = build_mesh(config.parallel, torch.device("cpu"), timedelta(minutes=1)) if num_ranks > 1 else Mesh()
        sizes = BatchSizes(config.training, mesh.data.size)
        num_micro_batches = sizes.final // sizes.rows_a_micro_step
        weights = WeightBytes()
        with TrafficCounter(mesh) as counter, MemoryWatch([weights.count]) as watch:
            return _Steps(config, mesh, counter, watch, weights).measured(num_micro_batches)


class _Steps:
    """Takes training steps of the rank, while counters follow memory and messages."""

    def __init__(self, config: Config, mesh: Mesh, counter: TrafficCounter, watch: MemoryWatch,
                 weights: WeightBytes) -> None:
        self._mesh, self._counter, self._watch, self._weights = mesh, counter, watch, weights
        stream = stream_of(config, mesh)
        self._batch = typical_batch(config.data, config.training.micro_batch_size, stream.token_multiple,
                                    mesh.context.rank, mesh.context.size)
        self._peak = self._gradients = 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        padded = padded_vocab_size(config)
        with self._fake:
            self._stages = build_stages(config, mesh, padded, mask_id=0)
        num_tokens = config.training.micro_batch_size * config.data.seq_length
        lengths = {-(-num_tokens // size) for size in (1, mesh.context.size, mesh.context.size * mesh.tensor.size)}
        counted = [parameter for stage in self._stages for parameter in stage.parameters()
                   if parameter.ndim > 1 and not lengths & set(parameter.shape)]
        weights.shapes = {tuple(sorted(parameter.shape)) for parameter in counted}
        self._num_counted = sum(parameter.numel() for parameter in counted)
        # Outside the fake mode, because FSDP2 reads values of its mesh; the parameters are fake already.
        model = data_parallel(self._stages, ProteinModel.blocks, mesh, replace(config.parallel, DDP_impl="local"),
                              compute_dtype(config.precision))
        self._shares = [parameter for stage in self._stages for parameter in stage.parameters()]
        with self._fake:
            self._engine = with_optimizer(config, mesh, padded, self._stages, model)
            self._step = TrainStep(self._engine, Meters(mesh.world, mesh.device))

    def measured(self, num_micro_batches: int) -> Measurement:
        """The measurement of a step of `num_micro_batches`.

        It runs two or three steps with only as many micro-batches as are needed to reach the peak; traffic is
        extrapolated linearly.
        """
        pipeline = self._mesh.pipeline.size
        first = min(num_micro_batches, pipeline)
        second = min(num_micro_batches, 3 * pipeline)
        if second > first:
            self._traffic_of(first)  # the first step also allocates the optimizer's state
            weights_at_start = self._weights.num_bytes
        before = self._traffic_of(first)
        weights_before = self._weights.num_bytes
        self._watch.at_growth = self._note_peak
        traffic = self._traffic_of(second)
        weight_bytes = None
        if second > first and self._num_counted:
            more = self._weights.num_bytes - 2 * weights_before + weights_at_start
            weight_bytes = more / (second - first) / self._num_counted
        if num_micro_batches > second:
            traffic = before.continued(traffic, (num_micro_batches - first) / (second - first))
        parameters = num_bytes(self._engine.model.parameters.values())
        average = self._engine.average
        optimizer = num_bytes(self._engine.optimizer.state().values()) + (
            0 if average is None else num_bytes(average.tensors.values()))
        memory = Memory(parameters, self._gradients, optimizer, self._peak - parameters - optimizer - self._gradients)
        return Measurement(memory, traffic, weight_bytes)

    def _traffic_of(self, num_micro_batches: int) -> Traffic:
        """Run one step; returns what it sends."""
        self._counter.traffic = Traffic()
        with self._fake:
            self._step([self._batch] * num_micro_batches, learning_rate=1e-4, wishes=(False, False))
        return self._counter.traffic

    def _note_peak(self) -> None:
        """Update the peak and the gradients at it."""
        if self._watch.current > self._peak:
            # FSDP2 replaces the shares by gathered parameters during a pass; either may have gradients.
            now = [parameter for stage in self._stages for parameter in stage.parameters()]
            self._peak = self._watch.current
            self._gradients = num_bytes(parameter.grad for parameter in {*self._shares, *now})
