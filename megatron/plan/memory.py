"""Estimates the peak memory of a rank in a step, by following its pipeline schedule with the costs of its pieces."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from megatron.parallel.pipeline.schedules import Action, one_forward_one_backward, zero_bubble
from megatron.plan.messages import buckets
from megatron.plan.muon import muon_memory
from megatron.plan.parameters import Held, matrices_of, sharded_units, share_size
from megatron.plan.passing import passing_of
from megatron.plan.pieces import backward_of
from megatron.plan.rank import PlannedStage, Rank


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak."""

    parameters: int
    gradients: int
    optimizer: int  # its state, and the average of the weights
    activations: int  # and everything else

    @property
    def peak(self) -> int:
        """The total, in bytes."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def peak_memory(rank: Rank) -> Memory:
    """The peak memory of `rank`, without CUDA's context and libraries."""
    parameters = rank.held
    own = share_size(parameters, rank.shards, rank.shard)
    gradients, activations = max(_moments(rank), key=sum)
    activations += parameters.copies if rank.sharding == "none" else 0
    state = _optimizer_state(rank, parameters.trained)
    if rank.config.optimizer.ema is not None:
        state += share_size(parameters.trained, rank.shards, rank.shard)
    return Memory(4 * own, gradients, 4 * state, activations)


def _optimizer_state(rank: Rank, trained: Held) -> int:
    """Elements of the optimizer's state: moments and, except for sgd, a step count for each parameter."""
    config, size = rank.config.optimizer, share_size(trained, rank.shards, rank.shard)
    if config.optimizer == "sgd":
        return size * (config.sgd_momentum > 0)
    matrices = matrices_of(trained)
    spared = share_size(matrices, rank.shards, rank.shard) if config.uses_muon else 0  # matrices have only one moment
    rows = sum(parameter.whole_rows for parameter in matrices) if config.optimizer == "normuon" else 0
    return 2 * size - spared + rows + len(trained.parameters)


def _moments(rank: Rank) -> Iterator[tuple[int, int]]:
    """(Bytes of gradients, bytes of activations and temporaries) at each moment of a step that may be the peak."""
    stages = [_stage_memory(stage, rank.sharding, rank.shards, rank.shard, rank.width, rank.num_micro_batches == 1)
              for stage in rank.stages]
    gathered = sum(stage.gathered for stage in stages)
    gradients, waiting_for_gradients, to_gather = 0, set(range(len(stages))), set(range(len(stages)))
    in_flight = last = 0  # kept for backward passes to come; messages of the last backward pass
    size = rank.sizes["pipeline"]
    num_micro_batches = min(rank.num_micro_batches, 3 * size)  # as many as are needed to reach the peak
    for action, following in _schedule(rank.place["pipeline"], size, len(stages), num_micro_batches, rank.puts_off):
        stage = stages[action.stage]
        # The message for the next action is received during this one.
        coming = stages[following.stage].receives[following.kind] if following is not None else 0
        if action.kind == "forward":
            first = stage.in_first_forward if action.stage in to_gather else 0
            to_gather.discard(action.stage)
            yield gradients, in_flight + coming + last + gathered + first + stage.of_forward
            in_flight += stage.kept
            continue
        is_first = action.stage in waiting_for_gradients
        if action.kind != "weights":
            yield gradients, in_flight + coming + last + gathered
            in_flight, last = in_flight - stage.kept, stage.sent + 2 * stage.receives["forward"]
            for new, inside in stage.of_backward[is_first]:
                yield gradients + new, in_flight + coming + gathered + inside
            in_flight += stage.put_off
        if action.kind != "input":
            gradients += stage.gradients if is_first else 0
            waiting_for_gradients.discard(action.stage)
        if action.kind == "weights":
            yield gradients, in_flight + coming + last + stage.of_weights
            in_flight -= stage.put_off
    yield gradients, _of_sums(rank)
    yield 4 * share_size(rank.held.trained, rank.shards, rank.shard), muon_memory(rank)


@cache
def _schedule(place: int, size: int, num_stages: int, number: int,
              puts_off: bool) -> Sequence[tuple[Action, Action | None]]:
    """Each action of the schedule with the following one, or None."""
    actions = (zero_bubble(place, size, number) if puts_off else
               one_forward_one_backward(place, size, num_stages, number))
    return list(zip(actions, [*actions[1:], None], strict=True))


class _StageMemory:
    """The memory of one stage, in bytes.

    `kept`: from a forward pass to its backward pass. `of_forward`: the peak of a forward pass. `of_backward`: (new
    gradients, everything else) at the moments of a backward pass that may be its peak, by whether it is the first of
    the step, which allocates the gradients. `gradients`: once allocated. `gathered`: other ranks' parameters that stay
    between passes; `in_first_forward`: what gathering them takes in the first forward pass. `put_off`: kept for
    deferred weight gradients; `of_weights`: the peak of computing them. `sent`, `receives`: messages.
    """

    def __init__(self, planned: PlannedStage, sharding: str, shards: int, shard: int, width: int,
                 has_one_pass: bool) -> None:
        units = dict(sharded_units(planned.held, shards))
        # Gathered in the dtype of products, summed in fp32.
        whole, rest = width * sum(units.values()), units.pop(None, 0)
        self._rest, self._block = width * rest, width * max(units.values(), default=0)
        self._scattered = 4 * max(units.values(), default=0)
        self._whole = 4 * planned.held.trained.size
        # Sharding "optimizer" reduces gradients in the last pass of a step, as "gradients" does in every pass.
        self._sharding = "gradients" if sharding == "optimizer" and has_one_pass else sharding
        # Gradients that stay: of this rank's shares, or all of them if they are reduced at the end of the step.
        share = 4 * share_size(planned.held.trained, shards, shard)
        self.gradients = self._whole if self._sharding == "optimizer" else share
        is_gathered = self._sharding in ("optimizer", "gradients")
        self.gathered = whole if is_gathered else 0
        self.in_first_forward = self._block if is_gathered else 0  # the message that brought a block's
        self._dropped_a_block = self._block if is_gathered and has_one_pass else 0
        self._pieces = planned.pieces
        self.sent, self._passing = planned.sent, passing_of(planned)
        self.receives = {"forward": planned.received, "backward": self.sent, "input": self.sent, "weights": 0}
        *self._below, below_all = accumulate((piece.kept for piece in self._pieces), initial=0)
        self.kept = below_all + self._passing.kept
        self.put_off = sum(piece.put_off for piece in self._pieces)
        self.of_weights = max(piece.late for piece in self._pieces)
        self.of_forward = max(below_all + self._passing.in_packing, *(
            below + passing.in_forward + piece.forward + self._in_gathering(number)
            for number, (below, passing, piece) in enumerate(
                zip(self._below, self._passing.pieces, self._pieces, strict=True))))
        self.of_backward = {True: list(self._going_back(True)), False: [max(self._going_back(False), key=sum)]}

    def _going_back(self, is_first: bool) -> Iterator[tuple[int, int]]:
        """(New gradients, everything else) in a backward pass: at the peak of each piece, in reverse, and at its end.

        `is_first`: whether it is the first backward pass of the step.
        """
        new, waiting, dropped = 0, 0, 0
        makes_new = is_first and self._sharding == "none"
        is_scattered, outside = self._sharding in ("gradients", "parameters"), 0
        for number in reversed(range(len(self._pieces))):
            piece, passing = self._pieces[number], self._passing.pieces[number]
            below = self._below[number] + passing.kept + waiting + outside - dropped
            inside = below + passing.in_backward + self._in_messages(number)
            most, (held, made) = backward_of(piece, *passing.in_message)
            if makes_new:
                yield min(new + made, self._whole), inside + held
                new = min(new + piece.gradients, self._whole)
            elif self._sharding != "none":
                yield 0, inside + held + made
            else:
                yield 0, inside + most
            if not piece.num_blocks and is_scattered:  # its gradients are reduced at the end of the stage
                outside = piece.gradients
            waiting += piece.put_off
            if piece.num_blocks:
                dropped += self._dropped_a_block
                yield new, below + passing.in_backward + piece.end + self._in_sums(number)
        yield new, below + passing.in_backward + piece.end + self._passing.in_unpacking

    def _in_gathering(self, number: int) -> int:
        """Gathered parameters during the forward pass of a piece: its own, and the buffer of the last all-gather."""
        if self._sharding != "parameters":
            return 0
        own, any_yet = self._pieces[number].num_blocks, sum(piece.num_blocks for piece in self._pieces[:number + 1])
        return self._rest + self._block * (bool(own) + bool(any_yet))

    def _next_block(self, number: int) -> int:
        """The buffer that gathers the parameters of the block whose backward pass is next, if there is one."""
        return self._block * any(piece.num_blocks for piece in self._pieces[:number])

    def _in_messages(self, number: int) -> int:
        """Gathered parameters, and gradients in reduce-scatter, during the backward pass of a piece."""
        own = self._pieces[number].num_blocks
        scattered = self._scattered * any(piece.num_blocks for piece in self._pieces[number + 1:])
        if self._sharding == "parameters":
            return self._rest + self._block * own + self._next_block(number) + scattered
        return scattered if self._sharding == "gradients" else 0

    def _in_sums(self, number: int) -> int:
        """Gathered parameters and buffers while a block's gradients are reduced to their owners."""
        if self._sharding == "parameters":
            return self._rest + self._next_block(number) + self._block + self._scattered
        return self._block + self._scattered if self._sharding == "gradients" else 0


_stage_memory = cache(_StageMemory)  # a search asks for the same stages thousands of times


def _of_sums(rank: Rank) -> int:
    """The buckets that gradients are copied to for all-reduce at the end of a step: at most two at a time."""
    if rank.sharding != "none" or rank.replicas == 1:
        return 0
    sizes = [4 * bucket for bucket in buckets(rank.held)]
    return max(before + size for before, size in zip([0, *sizes], sizes, strict=False))
