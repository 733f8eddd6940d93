"""What the pieces of the model keep, take, send and compute, measured on the model itself: no formula knows its layers.

A piece is what comes before the blocks, one block (or a group of blocks that are recomputed together), or what follows
them. Each is built as a pipeline stage of its own and goes forward and backward on fake tensors, in a process group
that sends nothing, once for each setting that a search asks for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.config import DataConfig, ModelConfig, PrecisionConfig
from megatron.data.batches.batch import Batch
from megatron.data.batches.typical import typical_batch
from megatron.model.protein_model import ProteinModel, compute_dtype
from megatron.parallel.mesh import Axis, Mesh, build_axis
from megatron.parallel.pipeline.deferral import WeightGradients, put_off_weight_gradients
from megatron.parallel.pipeline.partition import Stage
from megatron.parallel.tensor.copies import ComputeCopies
from megatron.parallel.tensor.stream import Stream
from megatron.parallel.traffic import Traffic, TrafficCounter
from megatron.plan.memory_watch import MemoryWatch, num_bytes
from megatron.plan.work import WorkCounter

_ONE_END = Axis()


@dataclass(frozen=True, eq=False)
class Setting:
    """What a piece depends on, made by `setting_of` alone: there are no two alike, and comparing them costs nothing.

    The axes are this rank's places on them, without groups.
    """

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

    @cached_property
    def of_parameters(self) -> "Setting":
        """One for all numbers of rows and all recomputation, on which parameters do not depend."""
        return self._with(num_rows=1).without_recomputation

    @cached_property
    def without_recomputation(self) -> "Setting":
        """The same, but that everything is kept."""
        none: Any = None
        return self._with(model=replace(self.model, checkpoint_activations=False, recompute_granularity=none,
                                        distribute_checkpointed_activations=False))

    def _with(self, **changed: Any) -> "Setting":
        return setting_of(*(changed.get(item.name, getattr(self, item.name)) for item in fields(self)))

    @property
    def batch(self) -> Batch:
        """The micro-batch, of its tokens those of this context rank."""
        return _batch(self.data, self.num_rows, self.stream(Mesh(tensor=self.tensor, context=self.context)))

    def build(self, part: "Part", mesh: Mesh, ends: Axis = _ONE_END) -> ProteinModel:
        """The part of the model, without values, as the pipeline stage that it can be."""
        return ProteinModel(self.model, self.precision, self.padded_vocab_size, self.stream(mesh), part.stage, ends)

    def stream(self, mesh: Mesh) -> Stream:
        """Where the tokens of the residual stream lie."""
        return Stream(mesh.tensor, self.is_sequence_parallel, mesh.context)


@cache
def setting_of(*values: Any) -> Setting:
    """The setting with these values."""
    return Setting(*values)


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
    if part.num_blocks == 0 and setting is not setting.without_recomputation:
        return measured(setting.without_recomputation, part, puts_off)  # it is about blocks
    if puts_off and not _can_put_off(setting, part):
        return measured(setting, part, False)
    work = WorkCounter()
    with _fake_mesh(setting) as mesh:
        counter = TrafficCounter(mesh)
        with MemoryWatch([counter.count, work.count]) as watch, FakeTensorMode(allow_non_fake_inputs=True):
            model = setting.build(part, mesh)
            copies = ComputeCopies([model], compute_dtype(setting.precision))  # noqa: F841  (as training keeps them)
            message = model.stream.num_tokens_here(setting.num_rows * setting.data.seq_length), model.hidden_size
            run = _Run(model, setting.batch.to(mesh.device), message, watch, puts_off)
            return Piece(**run.piece(), gradients=num_bytes(model.parameters()), traffic=counter.traffic,
                         flops=work.flops, moved=work.moved)


@cache
def _can_put_off(setting: Setting, part: Part) -> bool:
    with torch.device("meta"):
        return any(hasattr(module, "deferral") for module in setting.build(part, Mesh()).modules())


@cache
def _batch(data: DataConfig, num_rows: int, stream: Stream) -> Batch:
    return typical_batch(data, num_rows, stream.token_multiple, stream.context.rank, stream.context.size)


@contextmanager
def _fake_mesh(setting: Setting) -> Iterator[Mesh]:
    sizes = {"context": setting.context.size, "tensor": setting.tensor.size}
    number = setting.context.rank * setting.tensor.size + setting.tensor.rank
    with fake_group(number, setting.context.size * setting.tensor.size):
        if dist.is_initialized():
            context, tensor = (build_axis(sizes, [name], timedelta(minutes=1)) for name in sizes)
            yield Mesh(context=context, tensor=tensor)
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

    def __init__(self, model: ProteinModel, batch: Batch, message: tuple[int, int], watch: MemoryWatch,
                 puts_off: bool) -> None:
        self._model, self._batch, self._message = model, batch, message
        self._watch, self._puts_off = watch, puts_off
        self._waiting = WeightGradients()
        if puts_off:
            put_off_weight_gradients(model, self._waiting)
        self._gate = torch.zeros((), requires_grad=True)
        self._gradients = []
        for parameter in model.parameters():
            gradient = parameter.grad = torch.empty_like(parameter)
            self._gradients.append((gradient, gradient._version))

    def piece(self) -> dict[str, Any]:
        """What a pass forward and back shows, which adds to gradients that are there."""
        watch = self._watch
        hidden, base = None, watch.current
        watch.restart()
        if not self._model.stage.is_first:
            hidden = _Begin.apply(self._gate, self._received, self._mark_end)
        input_size = watch.current - base
        output = self._model(self._batch.sequence, self._batch.targets, hidden)
        output_size, keeps_input, keeps_output = 0, False, False
        forward = watch.peak - base - input_size
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
        base += input_size if keeps_input else 0
        found = {"input": input_size, "output": output_size, "keeps_input": keeps_input, "keeps_output": keeps_output,
                 "kept": watch.current - base, "forward": forward}
        return {**found, **self._back(loss, base, input_size if keeps_input else 0)}

    def _back(self, loss: Tensor, base: int, kept_input: int) -> dict[str, int]:
        watch = self._watch
        watch.restart()
        watch.at_growth = self._mark_first
        self._at_end, self._first, self._first_gradients = base, 0, 0
        with self._waiting.collecting() if self._puts_off else nullcontext():
            loss.backward()
        del loss
        self._mark_first()
        backward, put_off = watch.peak - base, watch.current - (base - kept_input)
        watch.restart()
        if self._puts_off:
            self._waiting.compute_oldest()
        return {"backward": backward, "end": self._at_end - base, "first": self._first - base,
                "first_gradients": self._first_gradients, "put_off": put_off,
                "late": watch.peak + kept_input - base - put_off}

    def _received(self) -> Tensor:
        return torch.empty(self._message, dtype=self._model.stream_dtype)

    def _mark_end(self) -> None:
        self._at_end = self._watch.current

    def _mark_first(self) -> None:
        """Note the most that is held where the gradients were not there before, but begin when one is added to."""
        new = num_bytes(gradient for gradient, version in self._gradients if gradient._version > version)
        if self._watch.current + new > self._first:
            self._first, self._first_gradients = self._watch.current + new, new


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
