"""What the pieces of the model keep, take, send and compute, measured on the model itself: no formula knows its layers.

A piece is what comes before the blocks, one block (or a group of blocks that are recomputed together), or what follows
them. Each is built as a pipeline stage of its own and goes forward and backward on `meta`, where tensors have sizes and
no values, in a process group that sends nothing, once for each setting that a search asks for. (Fake tensors, which a
dry run takes since FSDP2 needs them, cost three times as much.)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import cache, cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.data.batches.batch import Batch
from megatron.model.protein_model import ProteinModel
from megatron.parallel.mesh import Mesh, build_axis
from megatron.parallel.pipeline.deferral import WeightGradients, put_off_weight_gradients
from megatron.parallel.traffic import Traffic, TrafficCounter
from megatron.plan.memory_watch import MemoryWatch, num_bytes
from megatron.plan.setting import Part, Setting
from megatron.plan.work import WorkCounter

# What is held at a moment at which more is held than before, and the new gradients beside it.
Moments = list[list[int]]


@dataclass(frozen=True, eq=False)
class Piece:
    """Bytes of one micro-batch's passes through a piece; parameters, and gradients that are there before, not counted.

    `input`: hidden states that come, and `kept_input` if its backward pass needs them. `kept`: everything else that is
    kept for it. `in_forward`, `in_backward`: what a pass holds, with what is kept but without a kept input; `end`: the
    same when a backward pass is done. `gradients`: what it makes where there are none yet. `put_off`: what is kept
    where weights' gradients wait, `in_late` what computing them takes. `traffic`, `flops` and `moved`
    (`megatron.plan.work`): of both passes.
    """

    num_blocks: int
    input: int
    kept_input: int
    kept: int
    in_forward: Moments
    in_backward: Moments
    end: int
    gradients: int
    put_off: int
    in_late: Moments
    traffic: Traffic
    flops: int
    moved: int

    @property
    def num_moments(self) -> tuple[int, ...]:
        """How often more is held than before: as often, where the same operations are done."""
        return len(self.in_forward), len(self.in_backward), len(self.in_late)

    @cached_property
    def forward(self) -> int:
        """The most that a forward pass holds."""
        return max(held for held, _ in self.in_forward)

    @cached_property
    def backward(self) -> int:
        """The most that a backward pass holds that adds to gradients."""
        return max(held for held, _ in self.in_backward)

    @cached_property
    def first(self) -> Sequence[int]:
        """When a backward pass holds most that makes the gradients: what it holds beside them, and what of them."""
        return max(self.in_backward, key=sum)

    @cached_property
    def late(self) -> int:
        """The most that it takes to compute weights' gradients that waited."""
        return max(held for held, _ in self.in_late)


@cache  # a search asks for the same pieces thousands of times
def measured(setting: Setting, part: Part, puts_off: bool) -> Piece:
    """The piece of this setting; with `puts_off` its weights' gradients are computed after its backward pass.

    Rows are alike: where the same is done for one and for two, what more rows take lies on the line through both.
    """
    if part.num_blocks == 0 and setting is not setting.without_recomputation:
        return measured(setting.without_recomputation, part, puts_off)  # it is about blocks
    if puts_off and not _can_put_off(setting, part):
        return measured(setting, part, False)
    if setting.num_rows > 2 and setting.has_even_rows:
        one, two = (measured(setting.with_rows(number), part, puts_off) for number in (1, 2))
        if one.num_moments == two.num_moments:
            return Piece(*(_on_the_line(getattr(one, item.name), getattr(two, item.name), setting.num_rows)
                           for item in fields(Piece)))
    return _watched(setting, part, puts_off)


def _on_the_line(one: Any, two: Any, num_rows: int) -> Any:
    """What something is for `num_rows` rows that is `one` for one row and `two` for two."""
    if isinstance(one, Traffic):
        return one.continued(two, num_rows - 1)
    if isinstance(one, list):
        return [_on_the_line(*both, num_rows) for both in zip(one, two, strict=True)]
    return one + (num_rows - 1) * (two - one)


def _watched(setting: Setting, part: Part, puts_off: bool) -> Piece:
    work = WorkCounter()
    with _fake_mesh(setting) as mesh:
        counter = TrafficCounter(mesh)
        with MemoryWatch([counter.count, work.count]) as watch:
            model = setting.build(part, mesh)
            run = _Run(model, setting, watch, puts_off)
            return Piece(**run.passes(setting.batch), num_blocks=part.num_blocks,
                         gradients=num_bytes(model.parameters()), traffic=counter.traffic, flops=work.flops,
                         moved=work.moved)


@cache
def _can_put_off(setting: Setting, part: Part) -> bool:
    return any(hasattr(module, "deferral") for module in setting.build(part, Mesh()).modules())


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

    def __init__(self, model: ProteinModel, setting: Setting, watch: MemoryWatch, puts_off: bool) -> None:
        self._model, self._watch, self._waiting = model, watch, WeightGradients()
        self._num_tokens = model.stream.num_tokens_here(setting.num_rows * setting.data.seq_length)
        if puts_off:
            put_off_weight_gradients(model, self._waiting)
        self._gate = torch.zeros((), device="meta", requires_grad=True)
        self._gradients = []
        for parameter in model.parameters():
            gradient = parameter.grad = torch.empty_like(parameter)
            self._gradients.append((gradient, num_bytes([gradient]), gradient._version))
        self._moments: Moments = []
        self._end = 0
        watch.at_growth = self._note

    def passes(self, batch: Batch) -> dict[str, Any]:
        """What a pass forward and back shows, which adds to gradients that are there."""
        watch, hidden = self._watch, None
        base = self._end = watch.current
        if not self._model.stage.is_first:
            hidden = _Begin.apply(self._gate, self._received, self._mark_end)
        input_size = watch.current - base
        output = self._model(batch.sequence, batch.targets, hidden)
        found = {"input": input_size, "in_forward": self._noted(base + input_size)}
        loss = output[0] if self._model.stage.is_last else _End.apply(output)
        del output
        before = watch.current
        del hidden
        kept_input = input_size if watch.current == before else 0
        kept = watch.current - base - kept_input
        self._note()
        with self._waiting.collecting():
            loss.backward()
        del loss
        self._note()
        in_backward, put_off = self._noted(base + kept_input), watch.current - base
        self._note()
        self._waiting.compute_oldest()
        return {**found, "kept_input": kept_input, "kept": kept, "in_backward": in_backward, "put_off": put_off,
                "end": self._end - base - kept_input, "in_late": self._noted(base + put_off)}

    def _received(self) -> Tensor:
        return self._model.message(self._num_tokens, "meta", is_output=False)

    def _mark_end(self) -> None:
        self._end = self._watch.current

    def _note(self) -> None:
        """Gradients count as new from when one is added to."""
        new = sum(size for gradient, size, version in self._gradients if gradient._version > version)
        self._moments.append([self._watch.current, new])

    def _noted(self, base: int) -> Moments:
        """The moments since the last time; what is held beyond `base`."""
        moments, self._moments = [[held - base, new] for held, new in self._moments], []
        return moments


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
