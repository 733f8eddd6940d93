"""The most bytes that a rank holds in a step: what stays, and what comes and goes in the order of its schedule."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.parallel.pipeline.partition import Stage
from megatron.parallel.pipeline.schedules import Action, one_forward_one_backward, zero_bubble
from megatron.plan.activations import Activations
from megatron.plan.messages import buckets
from megatron.plan.parameters import rank_parameters, sharded_units, share_size, stage_parameters
from megatron.plan.rank import Rank


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak. `activations`: everything but this rank's parameters, their gradients and optimizer state."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def peak_memory(rank: Rank) -> Memory:
    """The most that `rank` holds at once; CUDA's context and libraries come on top."""
    parameters = rank_parameters(rank)
    own = sum(share_size(rank, stage) for stage in rank.stages)
    optimizer = rank.config.optimizer
    is_adam = optimizer.optimizer == "adam"
    moments = 2 if is_adam else int(optimizer.sgd_momentum > 0)
    steps = len(parameters) if is_adam else 0  # a count for each
    gradients, activations = max(_moments(rank), key=sum)
    return Memory(4 * own, gradients, 4 * (moments * own + steps), activations)


def _moments(rank: Rank) -> Iterator[tuple[int, int]]:
    """Bytes of gradients, and of everything that comes and goes, at each moment that may be the peak."""
    activations = Activations(rank)
    stages = [_StageMemory(rank, stage, activations) for stage in rank.stages]
    gathered = sum(stage.gathered for stage in stages)
    # The next message is received while an action computes.
    in_flight = activations.of_stream if rank.sizes["pipeline"] > 1 else 0
    gradients, waiting_for_gradients = 0, set(range(len(stages)))
    for action in _actions(rank):
        stage = stages[action.stage]
        if action.kind == "forward":
            yield gradients, in_flight + gathered + stage.of_embedding
            in_flight += stage.kept
            continue
        is_first = action.stage in waiting_for_gradients
        if action.kind != "weights":
            in_flight -= stage.kept
            for new, inside in stage.going_back(is_first):
                yield gradients + new, in_flight + gathered + inside
            in_flight += stage.put_off
        if action.kind != "input":
            gradients += stage.gradients if is_first else 0
            waiting_for_gradients.discard(action.stage)
        if action.kind == "weights":
            yield gradients, in_flight + stage.of_weights
            in_flight -= stage.put_off
    yield gradients, _of_sums(rank)


def _actions(rank: Rank) -> list[Action]:
    """The rank's schedule, of no more micro-batches than it takes to see the most that it holds."""
    size, place = rank.sizes["pipeline"], rank.place["pipeline"]
    num_micro_batches = min(rank.num_micro_batches, 3 * size)
    if rank.config.parallel.pipeline_schedule == "zero-bubble":
        return zero_bubble(place, size, num_micro_batches)
    return one_forward_one_backward(place, size, len(rank.stages), num_micro_batches)


class _StageMemory:
    """What one stage holds as its passes come."""

    def __init__(self, rank: Rank, stage: Stage, activations: Activations) -> None:
        self._rank, self._activations, self._stage = rank, activations, stage
        parameters = stage_parameters(rank, stage)
        num_blocks = len(stage.layers)
        units = {unit.block: unit.padded_size for unit in sharded_units(rank, stage)}
        self._rest = 4 * units.pop(None, 0)
        self._block = 4 * max(units.values(), default=0)
        # In its last pass alone, "optimizer" does what "gradients" does in each.
        has_one_pass = rank.num_micro_batches == 1
        self._sharding = "gradients" if rank.sharding == "optimizer" and has_one_pass else rank.sharding
        # Of gradients, once there are any: those of this rank's shares, or all where they are shared out at the end.
        is_whole = self._sharding == "optimizer"
        self.gradients = 4 * (sum(p.size for p in parameters) if is_whole else share_size(rank, stage))
        is_gathered = self._sharding in ("optimizer", "gradients")
        self.gathered = self._block * num_blocks + self._rest if is_gathered else 0  # and stays so between passes
        self._dropped_a_block = self._block if is_gathered and has_one_pass else 0
        self.kept = activations.kept(stage)
        is_zero_bubble = rank.config.parallel.pipeline_schedule == "zero-bubble"
        self._put_off_a_block = activations.put_off if is_zero_bubble else 0
        self.put_off = self._put_off_a_block * num_blocks
        self._backward = {is_first: list(self._going_back(is_first)) for is_first in (True, False)}

    @property
    def of_embedding(self) -> int:
        """What the embedding takes: rows of both tables and their sum, in fp32, and the sum in the stream's dtype."""
        rank = self._rank
        return 4 * rank.h * (rank.t + 2 * rank.u) + self._activations.of_stream if self._stage.is_first else 0

    @property
    def of_weights(self) -> int:
        """What the largest weight's gradient takes while it is computed, where that was put off."""
        return self._activations.weight_gradient

    def going_back(self, is_first: bool) -> list[tuple[int, int]]:
        """New gradients, and what a backward pass holds, at its most; the `is_first` of a step makes the gradients."""
        moments = self._backward[is_first]
        return moments if is_first else [max(moments, key=sum)]

    def _going_back(self, is_first: bool) -> Iterator[tuple[int, int]]:
        """At the head, and for each block from the last to the first: when it begins, and when it is done."""
        activations, model, rank = self._activations, self._rank.config.model, self._rank
        kept, waiting, new = self.kept, 0, 0
        yield new, kept + (activations.of_head_backward if self._stage.is_last else 0)
        kept -= activations.head if self._stage.is_last else 0
        blocks_left = len(self._stage.layers)
        in_messages = self._in_messages(is_first=True)
        # A weight that is put off keeps its layer's input, beside which the GeLU's gradients then stand.
        weight = rank.t * rank.f * rank.e if self.put_off else activations.weight_gradient
        for number, group in reversed(list(enumerate(activations.groups(self._stage)))):
            size, again = 1, 0
            if model.checkpoint_activations:
                size = blocks_left - number * model.checkpoint_num_layers
                again = size * activations.block - (activations.of_stream if group >= activations.of_stream else 0)
            yield new, kept + again + waiting + activations.of_backward + weight + in_messages
            kept -= group + self._dropped_a_block * size
            waiting += self._put_off_a_block * size
            blocks_left -= size
            in_messages = self._in_messages(is_first=False)
            if is_first and self._sharding == "none" and not self.put_off:
                new += self._block * size
            yield new, kept + waiting + activations.of_block_end + self._in_sums

    def _in_messages(self, is_first: bool) -> int:
        """Parameters gathered, and gradients to be scattered, beside the passes of a block."""
        if self._sharding == "parameters":  # this block's, the next one's on their way, gradients of the one before
            return self._rest + self._block * (2 if is_first else 3)
        return self._block if self._sharding == "gradients" and not is_first else 0

    @property
    def _in_sums(self) -> int:
        """What a block's gradients take where they are on their way to their owners."""
        if self._sharding == "parameters":
            return self._rest + 4 * self._block
        return 2 * self._block if self._sharding == "gradients" else 0


def _of_sums(rank: Rank) -> int:
    """Buckets that gradients are copied to while they are summed: the one under way and the one before."""
    if rank.sharding != "none" or rank.replicas == 1:
        return 0
    sizes = [4 * sum(bucket) for bucket in buckets([parameter.size for parameter in rank_parameters(rank)])]
    return max(before + size for before, size in zip([0, *sizes], sizes, strict=False))
