"""Measures memory, messages and arithmetic of pieces of the model by running them, so no formulas repeat its layers.

A piece is the embedding, one block (or a group of blocks that are recomputed together), or what follows the blocks: the
final normalisation, head and loss. Each is built as a pipeline stage and run forward and backward on the `meta` device,
where tensors have shapes but no values, in a process group that sends nothing. Results are cached: a piece is measured
once for each setting and kind of block. (A dry run uses fake tensors instead, which FSDP2 needs, and which take three
times as long.)
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.kernels.rotary import Rotation
from megatron.model.protein_model import ProteinModel
from megatron.parallel.mesh import Mesh
from megatron.parallel.tensor.weight_gradients import WeightGradients, defer_weight_gradients
from megatron.parallel.traffic import Traffic, TrafficCounter
from megatron.plan.fake_group import fake_axes
from megatron.plan.memory_watch import MemoryWatch, num_bytes
from megatron.plan.setting import BlockRange, Setting
from megatron.plan.work import WorkCounter


class Moment(NamedTuple):
    """Bytes that are allocated at a moment at which the memory grows."""

    held: int  # without `new`
    new: int  # gradients of parameters that this pass has changed
    hidden: int  # of `held`: the gradient of the hidden states that the piece gives
    skips: int  # of `held`: the gradients of the skips that it gives


@dataclass(frozen=True, eq=False)
class PieceCost:
    """What one micro-batch's forward and backward pass through a piece take, in bytes unless said otherwise.

    Parameters, and gradients that exist before, are not counted.
    """

    num_blocks: int
    input: int  # the hidden states that it receives
    kept_inputs: list[int]  # kept for the backward pass of each input: hidden states, rotation, embeddings, skips taken
    given: list[int]  # for each skip that it gives, whether that is the hidden states that it gives
    kept: int  # everything else that is kept for the backward pass
    in_forward: list[Moment]  # of the forward pass, without the inputs
    in_backward: list[Moment]  # of the backward pass, with `kept`, without the inputs
    end: int  # held at the end of the backward pass, without the inputs
    gradients: int  # of the parameters
    put_off: int  # kept after the backward pass if weight gradients are computed later
    in_late: list[Moment]  # of the later computation of weight gradients
    traffic: Traffic  # messages of both passes
    flops: int
    fp8_flops: int  # of `flops`
    moved: int  # read from and written to memory (`megatron.plan.work`)

    @property
    def num_moments(self) -> tuple[int, ...]:
        """The number of moments of each pass; it is equal if the passes do the same operations."""
        return len(self.in_forward), len(self.in_backward), len(self.in_late)

    @cached_property
    def forward(self) -> int:
        """The peak of the forward pass, in bytes."""
        return max(held for held, *_ in self.in_forward)

    @cached_property
    def late(self) -> int:
        """The peak of the later computation of weight gradients, in bytes."""
        return max(held for held, *_ in self.in_late)


@cache
def backward_of(piece: PieceCost, is_message: bool, is_in_message: bool) -> tuple[int, tuple[int, int]]:
    """The peak bytes of a backward pass that adds to existing gradients, and (held, new) at the peak of one without.

    `is_message`: whether the gradient of the hidden states that the piece gives lies in a received message, and so is
    not counted; `is_in_message`: the same for the skips.
    """
    moments = [(held - is_message * hidden - is_in_message * skips, new)
               for held, new, hidden, skips in piece.in_backward]
    return max(moments)[0], max(moments, key=sum)


@cache  # a search asks for the same pieces thousands of times
def measured(setting: Setting, part: BlockRange, puts_off: bool) -> PieceCost:
    """The cost of a piece; `puts_off`: weight gradients are computed after the backward pass (zero-bubble).

    Cost is linear in the number of rows, so more than two rows are extrapolated from one and two, provided that these
    do the same operations.
    """
    if part.blocks != setting.alike(part.blocks):
        return measured(setting, part._replace(blocks=setting.alike(part.blocks)), puts_off)
    if not part.blocks and setting is not setting.without_recomputation:
        return measured(setting.without_recomputation, part, puts_off)  # recomputation concerns blocks only
    if puts_off and not _can_put_off(setting, part):
        return measured(setting, part, False)
    if setting.num_rows > 2 and setting.has_even_rows:
        one, two = (measured(setting.with_rows(number), part, puts_off) for number in (1, 2))
        if one.num_moments == two.num_moments:
            return PieceCost(*(_on_the_line(getattr(one, item.name), getattr(two, item.name), setting.num_rows)
                                 for item in fields(PieceCost)))
    return _watched(setting, part, puts_off)


def _on_the_line(one: Any, two: Any, num_rows: int) -> Any:
    """The linear extrapolation to `num_rows` rows of a value that is `one` for one row and `two` for two."""
    if isinstance(one, Traffic):
        return one.continued(two, num_rows - 1)
    if isinstance(one, Moment):
        return Moment(*(_on_the_line(*both, num_rows) for both in zip(one, two, strict=True)))
    if isinstance(one, list):
        return [_on_the_line(*both, num_rows) for both in zip(one, two, strict=True)]
    return one + (num_rows - 1) * (two - one)


def _watched(setting: Setting, part: BlockRange, puts_off: bool) -> PieceCost:
    """The cost of a piece, measured by running it."""
    work = WorkCounter()
    sizes = {"context": setting.context.size, "tensor": setting.tensor.size}
    with fake_axes(setting.context.rank * setting.tensor.size + setting.tensor.rank, sizes) as axes:
        mesh = Mesh(context=axes["context"], tensor=axes["tensor"])
        counter = TrafficCounter(mesh)
        with MemoryWatch([counter.count, work.count]) as watch:
            model = setting.build(part, mesh)
            run = _Run(model, setting, watch, puts_off, setting.num_taken(part.blocks))
            work.moved = 0  # creating the inputs does not count
            trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
            return PieceCost(**run.passes(), num_blocks=len(part.blocks), gradients=num_bytes(trained),
                               traffic=counter.traffic, flops=work.flops, fp8_flops=work.fp8_flops,
                               moved=work.moved)


@cache
def _can_put_off(setting: Setting, part: BlockRange) -> bool:
    """Whether the piece has layers whose weight gradients can be deferred."""
    return any(hasattr(module, "deferral") for module in setting.build(part, Mesh()).modules())


class _Run:
    """Runs one micro-batch through a piece, while `watch` follows the memory; `num_taken`: skips that it takes."""

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
        self._moments: list[Moment] = []
        self._given: Sequence[weakref.ref[torch.UntypedStorage]] = []  # of gradients of the outputs
        sequence, self._targets = setting.batch.sequence, setting.batch.targets
        # Tokens and positions on `meta`, as everything computed from them. Boundaries keep their values, which are
        # needed to count attention's work.
        self._sequence = replace(sequence, tokens_t=sequence.tokens_t.to("meta"),
                                 positions_t=sequence.positions_t.to("meta"))
        self._base = self._end = watch.current
        self._inputs = self._made_inputs(num_taken)
        watch.at_growth = self._note

    def passes(self) -> dict[str, Any]:
        """Run a forward and a backward pass that adds to existing gradients; returns most fields of `PieceCost`."""
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
        """The inputs: hidden states, rotation, embeddings and each skip, each as a sequence of tensors."""
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
        """The forward pass: hidden states and skips for the next piece, or the loss."""
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
        """Release the first remaining input, of `size` bytes; returns how much of it is kept for the backward pass."""
        before = self._watch.current
        del self._inputs[0]
        return size - (before - self._watch.current)

    def _received(self) -> Tensor:
        shape = self._num_tokens, self._model.config.hidden_size
        return torch.empty(shape, dtype=self._model.stream_dtype, device="meta")

    def _mark_end(self) -> None:
        self._end = self._watch.current

    def _note(self) -> None:
        """Add a moment. A gradient counts as new once something is added to it, even while that is going on."""
        changing = {id(tensor) for tensor in self._watch.changing}
        new = sum(size for gradient, size, version in self._gradients
                  if gradient._version > version or id(gradient) in changing)
        hidden, *skips = [storage.nbytes() if (storage := given()) is not None else 0 for given in self._given] or [0]
        self._moments.append(Moment(self._watch.current, new, hidden, sum(skips)))

    def _note_given(self, gradients: Sequence[Tensor]) -> None:
        self._given = [weakref.ref(gradient.untyped_storage()) for gradient in gradients]

    def _noted(self, base: int) -> list[Moment]:
        """The moments since the last call, with `base` bytes subtracted from `held`."""
        moments, self._moments = [Moment(held - base, *parts) for held, *parts in self._moments], []
        return moments


class _Begin(torch.autograd.Function):
    """The boundary to the piece before. Forward: makes its outputs. Backward: calls `at_end`, and drops the gradients.
    """

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
    """The boundary to the next piece. Forward: takes the outputs, gives a dummy loss. Backward: makes their gradients.
    """

    @staticmethod
    def forward(ctx: Any, note: Callable[[Sequence[Tensor]], None], *given: Tensor) -> Tensor:
        ctx.kinds, ctx.note = [(tensor.shape, tensor.dtype) for tensor in given], note
        return given[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [gradient.new_empty(shape, dtype=dtype) for shape, dtype in ctx.kinds]
        ctx.note(gradients)
        return None, *gradients
