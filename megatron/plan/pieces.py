"""What the pieces of the model keep, take, send and compute, measured on the model itself: no formula knows its layers.

A piece is what comes before the blocks, one block (or a group of blocks that are recomputed together), or what follows
them. Each is built as a pipeline stage of its own and goes forward and backward on fake tensors, in a process group
that sends nothing, once for each setting that a search asks for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.config import DataConfig, ModelConfig, PrecisionConfig
from megatron.data.batches.batch import Batch
from megatron.data.batches.typical import typical_batch
from megatron.model.protein_model import ProteinModel
from megatron.parallel.mesh import Axis, Mesh, build_axis
from megatron.parallel.pipeline.deferral import WeightGradients, put_off_weight_gradients
from megatron.parallel.pipeline.partition import Stage
from megatron.parallel.tensor.stream import Stream
from megatron.parallel.traffic import Traffic, TrafficCounter
from megatron.plan.memory_watch import MemoryWatch, num_bytes
from megatron.plan.work import WorkCounter
from megatron.train.passes import model_inputs


class Setting(NamedTuple):
    """What a piece depends on. The axes are this rank's places on them, without groups."""

    model: ModelConfig
    precision: PrecisionConfig
    data: DataConfig
    num_rows: int
    padded_vocab_size: int
    tensor: Axis
    is_sequence_parallel: bool
    context: Axis

    @property
    def blocks_a_piece(self) -> int:
        """Blocks of which one input is kept, or 1."""
        return self.model.checkpoint_num_layers if self.model.checkpoint_activations else 1

    @property
    def batch(self) -> Batch:
        """The micro-batch, as it is before ranks share its tokens out."""
        return _batch(self.data, self.num_rows)

    def build(self, part: "Part", mesh: Mesh, ends: Axis | None = None) -> ProteinModel:
        """The part of the model, without values, as the pipeline stage that it can be."""
        stream = Stream(mesh.tensor, self.is_sequence_parallel, mesh.context)
        return ProteinModel(self.model, self.precision, self.padded_vocab_size, stream, part.stage, ends)


class Part(NamedTuple):
    """Some blocks in a row, with what comes before the first and behind the last one or without."""

    is_first: bool
    num_blocks: int
    is_last: bool

    @property
    def stage(self) -> Stage:
        """A stage that is this part, in a model that has no more than it takes."""
        return Stage(0 if self.is_first else 1, 3 - self.is_first - self.is_last, range(self.num_blocks))


@dataclass(frozen=True, eq=False)
class Piece:
    """Bytes of one micro-batch's passes through a piece; parameters, and gradients that are there before, not counted.

    `input`, `output`: hidden states that come and go; `keeps_input`, `keeps_output`: whether its backward pass needs
    them. `kept`: everything else that is kept for it. `forward`, `backward`: the most that is held in a pass, with
    what is kept but without a kept input; `end`: the same when a backward pass is done. `first`: as `backward` where
    there are no gradients yet, and `first_gradients` of that are the piece's own, of which it makes `gradients`.
    `put_off`: what is kept where weights' gradients wait, `late` what it takes to compute them. `traffic`, `flops` and
    `moved` (`megatron.plan.work`): of both passes.
    """

    input: int
    output: int
    keeps_input: bool
    keeps_output: bool
    kept: int
    forward: int
    backward: int
    end: int
    first: int
    first_gradients: int
    gradients: int
    put_off: int
    late: int
    traffic: Traffic
    flops: int
    moved: int


@cache  # a search asks for the same pieces thousands of times
def measured(setting: Setting, part: Part, puts_off: bool) -> Piece:
    """The piece of this setting; with `puts_off` its weights' gradients are computed after its backward pass."""
    inputs = model_inputs(setting.batch)
    with _fake_mesh(setting) as mesh, TrafficCounter(mesh) as counter, MemoryWatch() as watch, \
            FakeTensorMode(allow_non_fake_inputs=True):
        model = setting.build(part, mesh)
        return _Run(model, inputs.shared(model.stream, mesh.device), watch, puts_off).piece(counter)


@cache
def _batch(data: DataConfig, num_rows: int) -> Batch:
    return typical_batch(data, num_rows)


@contextmanager
def _fake_mesh(setting: Setting) -> Iterator[Mesh]:
    sizes = {"context": setting.context.size, "tensor": setting.tensor.size}
    number = setting.context.rank * setting.tensor.size + setting.tensor.rank
    with fake_group(number, setting.context.size * setting.tensor.size):
        if dist.is_initialized():
            yield Mesh(**{name: build_axis(sizes, [name], timedelta(minutes=1)) for name in sizes})
        else:
            yield Mesh()


@contextmanager
def fake_group(rank: int, num_ranks: int) -> Iterator[None]:
    """A process group that answers at once and sends nothing; of one rank there is none."""
    if num_ranks == 1:
        yield
        return
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend)
    from torch._C._distributed_c10d import FakeWork

    # Its messages arrive at once but do not say so, and finished ones would be kept.
    FakeWork.is_completed = lambda self: True  # type: ignore[method-assign]
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Run:
    """Passes of one micro-batch through a piece, under the modes that watch them."""

    def __init__(self, model: ProteinModel, inputs: Any, watch: MemoryWatch, puts_off: bool) -> None:
        self._model, self._inputs, self._watch, self._puts_off = model, inputs, watch, puts_off
        self._waiting = WeightGradients()
        if puts_off:
            put_off_weight_gradients(model, self._waiting)
        self._gate = torch.zeros((), requires_grad=True)

    def piece(self, counter: TrafficCounter) -> Piece:
        """What the passes show: the first, which makes the gradients, and a second."""
        first = self._passes()
        gradients = self._gradient_bytes()
        counter.traffic = Traffic()
        with WorkCounter() as work:
            later = self._passes()
        return Piece(**{**later, "first": first["backward"], "first_gradients": first["first_gradients"],
                        "gradients": gradients}, traffic=counter.traffic, flops=work.flops, moved=work.moved)

    def _passes(self) -> dict[str, Any]:
        watch = self._watch
        hidden, base = None, watch.current
        watch.restart()
        if not self._model.stage.is_first:
            hidden = _Begin.apply(self._gate, lambda: self._model.received(self._inputs), self._mark_end)
        input_size = watch.current - base
        output = self._model(self._inputs, hidden)
        output_size, keeps_input, keeps_output = 0, False, False
        forward = watch.peak - base
        if self._model.stage.is_last:
            loss, _ = output
        else:
            output_size, loss = num_bytes([output]), _End.apply(output)
            before = watch.current
            del output
            keeps_output = watch.current > before - output_size
        if hidden is not None:
            before = watch.current
            del hidden
            keeps_input = watch.current > before - input_size
        kept = watch.current - base - (input_size if keeps_input else 0)
        found = {"input": input_size, "output": output_size, "keeps_input": keeps_input, "keeps_output": keeps_output,
                 "kept": kept, "forward": forward - input_size}
        return {**found, **self._back(loss, base, input_size if keeps_input else 0)}

    def _back(self, loss: Tensor, base: int, kept_input: int) -> dict[str, int]:
        watch, before = self._watch, self._gradient_bytes()
        watch.at_peak = self._gradient_bytes
        watch.restart()
        self._at_end = base
        with self._waiting.collecting() if self._puts_off else nullcontext():
            loss.backward()
        del loss
        backward, gradients = watch.peak - base - kept_input, watch.found_at_peak - before
        made = self._gradient_bytes() - before
        put_off = watch.current - base - made
        watch.restart()
        if self._puts_off:
            self._waiting.compute_oldest()
        return {"backward": backward, "end": self._at_end - base - kept_input - made, "first_gradients": gradients,
                "put_off": put_off, "late": watch.peak - base - made - put_off}

    def _mark_end(self) -> None:
        self._at_end = self._watch.current

    def _gradient_bytes(self) -> int:
        return num_bytes(parameter.grad for parameter in self._model.parameters())


class _Begin(torch.autograd.Function):
    """Forward: hidden states of a stage before. Backward: their gradient goes no further."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, received: Callable[[], Tensor], at_end: Callable[[], None]) -> Tensor:
        ctx.at_end = at_end
        return received()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.at_end()
        return None, None, None


class _End(torch.autograd.Function):
    """Forward: hidden states go to the next stage. Backward: their gradient comes from there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.new_empty(ctx.shape, dtype=ctx.dtype)
