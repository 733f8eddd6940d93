"""What the pieces of the model keep, take, send and compute, measured on the model itself: no formula knows its layers.

A piece is what comes before the blocks, one block (or a group of blocks that are recomputed together), or what follows
them. Each is built as a pipeline stage of its own and goes forward and backward on `meta`, where tensors have sizes and
no values, in a process group that sends nothing, once for each setting that a search asks for, and for blocks that are
alike. (Fake tensors, which a dry run takes since FSDP2 needs them, cost three times as much.)
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import cache, cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.kernels.rotary import Rotation
from megatron.model.protein_model import ProteinModel
from megatron.parallel.mesh import Mesh, build_axis
from megatron.parallel.pipeline.deferral import WeightGradients, defer_weight_gradients
from megatron.parallel.traffic import Traffic, TrafficCounter
from megatron.plan.memory_watch import MemoryWatch, num_bytes
from megatron.plan.setting import BlockRange, Setting
from megatron.plan.work import WorkCounter

# What is held at a moment at which more is held than before, and the new gradients beside it; of what is held, how much
# are gradients of the hidden states and of the skips that the piece gives.
Moments = list[list[int]]


@dataclass(frozen=True, eq=False)
class PieceMemory:
    """Bytes of one micro-batch's passes through a piece; parameters, and gradients that are there before, not counted.

    `input`: hidden states that come. `kept_inputs`: of what comes, that may be others' as well, what the backward pass
    needs: of hidden states, the rotation, the embeddings, and the skips that are taken. `given`: for each skip that
    goes on, whether that is the piece's hidden states. `kept`: everything else that is kept for the backward pass.
    `in_forward`, `in_backward`: what a pass holds, with what is kept but without what comes; `end`: the same when a
    backward pass is done. `gradients`: what it makes where there are none yet. `put_off`: what is kept where weights'
    gradients wait, `in_late` what computing them takes. `traffic`, and `flops`, `fp8_flops` and `moved`
    (`megatron.plan.work`): of both passes.
    """

    num_blocks: int
    input: int
    kept_inputs: list[int]
    given: list[int]
    kept: int
    in_forward: Moments
    in_backward: Moments
    end: int
    gradients: int
    put_off: int
    in_late: Moments
    traffic: Traffic
    flops: int
    fp8_flops: int
    moved: int

    @property
    def num_moments(self) -> tuple[int, ...]:
        """How often more is held than before: as often, where the same operations are done."""
        return len(self.in_forward), len(self.in_backward), len(self.in_late)

    @cached_property
    def forward(self) -> int:
        """The most that a forward pass holds."""
        return max(held for held, *_ in self.in_forward)

    @cached_property
    def late(self) -> int:
        """The most that it takes to compute weights' gradients that waited."""
        return max(held for held, *_ in self.in_late)


@cache
def backward_of(piece: PieceMemory, is_message: bool, is_in_message: bool) -> tuple[int, tuple[int, int]]:
    """The most that a backward pass holds that adds to gradients; when it makes them, what beside, and what of them.

    `is_message`: without the gradient of the hidden states that the piece gives; `is_in_message`: of the skips.
    """
    moments = [(held - is_message * hidden - is_in_message * skips, new)
               for held, new, hidden, skips in piece.in_backward]
    return max(moments)[0], max(moments, key=sum)


@cache  # a search asks for the same pieces thousands of times
def measured(setting: Setting, part: BlockRange, puts_off: bool) -> PieceMemory:
    """The piece of this setting; with `puts_off` its weights' gradients are computed after its backward pass.

    Rows are alike: where the same is done for one and for two, what more rows take lies on the line through both.
    """
    if part.blocks != setting.alike(part.blocks):
        return measured(setting, part._replace(blocks=setting.alike(part.blocks)), puts_off)
    if not part.blocks and setting is not setting.without_recomputation:
        return measured(setting.without_recomputation, part, puts_off)  # it is about blocks
    if puts_off and not _can_put_off(setting, part):
        return measured(setting, part, False)
    if setting.num_rows > 2 and setting.has_even_rows:
        one, two = (measured(setting.with_rows(number), part, puts_off) for number in (1, 2))
        if one.num_moments == two.num_moments:
            return PieceMemory(*(_on_the_line(getattr(one, item.name), getattr(two, item.name), setting.num_rows)
                                 for item in fields(PieceMemory)))
    return _watched(setting, part, puts_off)


def _on_the_line(one: Any, two: Any, num_rows: int) -> Any:
    """What something is for `num_rows` rows that is `one` for one row and `two` for two."""
    if isinstance(one, Traffic):
        return one.continued(two, num_rows - 1)
    if isinstance(one, list):
        return [_on_the_line(*both, num_rows) for both in zip(one, two, strict=True)]
    return one + (num_rows - 1) * (two - one)


def _watched(setting: Setting, part: BlockRange, puts_off: bool) -> PieceMemory:
    work = WorkCounter()
    with _fake_mesh(setting) as mesh:
        counter = TrafficCounter(mesh)
        with MemoryWatch([counter.count, work.count]) as watch:
            model = setting.build(part, mesh)
            run = _Run(model, setting, watch, puts_off, setting.num_taken(part.blocks))
            work.moved = 0  # what comes is made elsewhere, once
            trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
            return PieceMemory(**run.passes(), num_blocks=len(part.blocks), gradients=num_bytes(trained),
                               traffic=counter.traffic, flops=work.flops, fp8_flops=work.fp8_flops,
                               moved=work.moved)


@cache
def _can_put_off(setting: Setting, part: BlockRange) -> bool:
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
    """Passes of one micro-batch through a piece that takes some skips, under the modes that watch them."""

    def __init__(self, model: ProteinModel, setting: Setting, watch: MemoryWatch, puts_off: bool,
                 num_taken: int) -> None:
        self._model, self._watch, self._waiting = model, watch, WeightGradients()
        self._num_tokens = model.stream.num_tokens_here(setting.num_rows * setting.data.seq_length)
        if puts_off:
            defer_weight_gradients(model, self._waiting)
        self._gate = torch.zeros((), device="meta", requires_grad=True)
        self._gradients = []
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue
            gradient = parameter.grad = torch.empty_like(parameter)
            self._gradients.append((gradient, num_bytes([gradient]), gradient._version))
        self._moments: Moments = []
        self._given: Sequence[weakref.ref[torch.UntypedStorage]] = []  # gradients of the outputs
        sequence, self._targets = setting.batch.sequence, setting.batch.targets
        # On the device, as what is made of them; boundaries have values, by which attention's work is counted.
        self._sequence = replace(sequence, tokens_t=sequence.tokens_t.to("meta"),
                                 positions_t=sequence.positions_t.to("meta"))
        self._base = self._end = watch.current
        self._inputs = self._made_inputs(num_taken)
        watch.at_growth = self._note

    def passes(self) -> dict[str, Any]:
        """What a pass forward and back shows, which adds to gradients that are there."""
        watch, base, inputs = self._watch, self._base, self._inputs
        sizes = [num_bytes(input) for input in inputs]
        hidden, *skips = self._outputs()
        found = {"input": sizes[0] if sizes else 0, "given": [int(skip is hidden) for skip in skips],
                 "in_forward": self._noted(base + sum(sizes))}
        loss = hidden if self._model.stage.is_last else _End.apply(self._note_given, hidden, *skips)
        del hidden, skips
        kept_inputs = [self._kept_of_next(size) for size in sizes]
        beside = base + sum(kept_inputs)
        kept = watch.current - beside
        self._note()
        with self._waiting.collecting():
            loss.backward()
        del loss
        self._note()
        in_backward, put_off = self._noted(beside), watch.current - base
        self._note()
        self._waiting.compute_oldest()
        return {**found, "kept_inputs": kept_inputs, "kept": kept, "in_backward": in_backward, "put_off": put_off,
                "end": self._end - beside, "in_late": self._noted(base + put_off)}

    def _made_inputs(self, num_taken: int) -> list[Sequence[Tensor]]:
        """Hidden states, rotation, embeddings and skips that the piece takes, each of these some tensors."""
        model, transformer = self._model, self._model.transformer
        if model.stage.is_first:
            return []
        has_x0 = transformer.has_x0 and not model.stage.is_last
        hidden, *others = _Begin.apply(self._gate, self._received, 1 + has_x0 + num_taken, self._mark_end)
        if model.stage.is_last:
            return [[hidden]]
        rotation = transformer.rotation(self._sequence)
        return [[hidden], [rotation.cos, rotation.sin] if rotation else [], others[:has_x0],
                *([skip] for skip in others[has_x0:])]

    def _outputs(self) -> Sequence[Tensor]:
        """Hidden states and skips that the next piece takes, or the loss."""
        model = self._model
        if model.stage.is_first:
            return [model.embedding(self._sequence)]
        (hidden,), *others = self._inputs
        if model.stage.is_last:
            return model.loss(model.transformer.normed(hidden), self._targets)[:1]
        rotation, x0, *skips = others
        return model.transformer.through_blocks(hidden, self._sequence, Rotation(*rotation) if rotation else None,
                                                x0[0] if x0 else None, [skip for skip, in skips])

    def _kept_of_next(self, size: int) -> int:
        """How much of the first input that there still is stays when it is let go."""
        before = self._watch.current
        del self._inputs[0]
        return size - (before - self._watch.current)

    def _received(self) -> Tensor:
        shape = self._num_tokens, self._model.config.hidden_size
        return torch.empty(shape, dtype=self._model.stream_dtype, device="meta")

    def _mark_end(self) -> None:
        self._end = self._watch.current

    def _note(self) -> None:
        """Gradients count as new from when one is added to, which it counts itself when that is over."""
        changing = {id(tensor) for tensor in self._watch.changing}
        new = sum(size for gradient, size, version in self._gradients
                  if gradient._version > version or id(gradient) in changing)
        hidden, *skips = [storage.nbytes() if (storage := given()) is not None else 0 for given in self._given] or [0]
        self._moments.append([self._watch.current, new, hidden, sum(skips)])

    def _note_given(self, gradients: Sequence[Tensor]) -> None:
        self._given = [weakref.ref(gradient.untyped_storage()) for gradient in gradients]

    def _noted(self, base: int) -> Moments:
        """The moments since the last time; what is held beyond `base`."""
        moments, self._moments = [[held - base, *parts] for held, *parts in self._moments], []
        return moments


class _Begin(torch.autograd.Function):
    """Forward: what comes from the piece before. Backward: its gradients go no further."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, received: Callable[[], Tensor], number: int,
                at_end: Callable[[], None]) -> tuple[Tensor, ...]:
        ctx.at_end = at_end
        return tuple(received() for _ in range(number))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None]:
        ctx.at_end()
        return None, None, None, None


class _End(torch.autograd.Function):
    """Forward: all goes to the next piece. Backward: its gradients come from there."""

    @staticmethod
    def forward(ctx: Any, note: Callable[[Sequence[Tensor]], None], *given: Tensor) -> Tensor:
        ctx.kinds, ctx.note = [(tensor.shape, tensor.dtype) for tensor in given], note
        return given[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [gradient.new_empty(shape, dtype=dtype) for shape, dtype in ctx.kinds]
        ctx.note(gradients)
        return None, *gradients
