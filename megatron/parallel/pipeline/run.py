"""Runs a pipeline rank's stages in the order of a schedule, with messages between the ranks; none on one rank.

Why not torch.distributed.pipelining: it fixes the number of micro-batches when the schedule is created, whereas our
global batch may grow; its zero-bubble schedules split the backward pass in a way that repeats our layers' collectives;
and wrapping stages, losses and evaluation for it would take as many lines as this file.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron.parallel.collectives import Pending
from megatron.parallel.mesh import Mesh
from megatron.parallel.pipeline.channels import Channel
from megatron.parallel.pipeline.schedules import Action, forward_only, one_forward_one_backward, zero_bubble


class Passes(ABC):
    """The callbacks that the pipeline runs: a forward pass of one micro-batch through one stage of this rank."""

    @abstractmethod
    def forward(self, action: Action, hidden: Tensor | None) -> Tensor:
        """The message to the next stage, or the last stage's loss; `hidden`: the previous stage's, None on the first.
        """


class TrainingPasses(Passes):
    """Callbacks for forward and backward passes."""

    @abstractmethod
    def backward(self, action: Action, output: Tensor, gradient: Tensor | None) -> None:
        """Backpropagate from `output`, a result of `forward`; `gradient`: that of the output, None for a loss."""

    @abstractmethod
    def weights(self) -> None:
        """Compute the weight gradients that the oldest backward pass of kind "input" deferred."""


@dataclass(frozen=True)
class _Ways:
    """The channels of one stage, two to receive from and two to send to; None at an end of the model."""

    input: Channel | None  # received
    output: Channel | None  # sent
    gradient: Channel | None  # received: of the output
    input_gradient: Channel | None  # sent


class Pipeline:
    """Runs passes over the `num_stages` stages of each pipeline rank of `mesh`.

    `message(stage, is_output)`: an empty tensor like the message that a stage of this rank receives, or with
    `is_output` sends; gradients have the same shapes and dtypes.
    """

    def __init__(self, mesh: Mesh, num_stages: int, schedule: str, message: Callable[[int, bool], Tensor]) -> None:
        self._message = message
        self._axis, self._num_stages, self._schedule = mesh.pipeline, num_stages, schedule
        if self._axis.size > 1:
            _open_channels(mesh)
        self._ways = [_ways(mesh, stage, num_stages) for stage in range(num_stages)]

    def train(self, passes: TrainingPasses, num_micro_batches: int) -> None:
        """Run forward and backward passes of all micro-batches, in the order of the schedule."""
        axis = self._axis
        if self._schedule == "zero-bubble":
            actions = zero_bubble(axis.rank, axis.size, num_micro_batches)
        else:
            actions = one_forward_one_backward(axis.rank, axis.size, self._num_stages, num_micro_batches)
        self._run(passes, actions)

    def evaluate(self, passes: Passes, num_micro_batches: int) -> None:
        """Run forward passes of all micro-batches."""
        self._run(passes, forward_only(self._axis.size, self._num_stages, num_micro_batches))

    def _run(self, passes: Passes, actions: Sequence[Action]) -> None:
        keeps_outputs = any(action.kind != "forward" for action in actions)
        under_way: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}  # input and output, until the backward pass
        sends: list[Pending] = []
        coming = self._start_receive(actions[0]) if actions else None
        for action, following in zip(actions, [*actions[1:], None], strict=True):
            message = coming.wait() if coming is not None else None
            # The next message travels while this action computes.
            coming = self._start_receive(following) if following is not None else None
            sends = [send for send in sends if not send.is_done()]
            ways, place = self._ways[action.stage], (action.stage, action.micro_batch)
            if action.kind == "forward":
                if message is not None and keeps_outputs:
                    message.requires_grad_()
                output = passes.forward(action, message)
                if keeps_outputs:
                    under_way[place] = message, output
                if ways.output is not None:
                    sends.append(ways.output.start_send(output.detach()))
                continue
            assert isinstance(passes, TrainingPasses), "evaluation does not go back"
            if action.kind == "weights":
                passes.weights()
                continue
            hidden, output = under_way.pop(place)
            passes.backward(action, output, message)
            if ways.input_gradient is not None:
                assert hidden is not None and hidden.grad is not None, "the loss depends on every stage"
                sends.append(ways.input_gradient.start_send(hidden.grad))
        for send in sends:
            send.wait()

    def _start_receive(self, action: Action) -> Pending | None:
        ways = self._ways[action.stage]
        channel = {"forward": ways.input, "weights": None}.get(action.kind, ways.gradient)
        if channel is None:
            return None
        return channel.start_receive(self._message(action.stage, action.kind != "forward"))


def _ways(mesh: Mesh, stage: int, num_stages: int) -> _Ways:
    rank, last = mesh.pipeline.rank, mesh.pipeline.size - 1
    if not last:
        return _Ways(None, None, None, None)
    forward, backward, *around = mesh.channels
    is_first, is_last = rank == 0 and stage == 0, rank == last and stage == num_stages - 1
    before, after = (rank - 1) % (last + 1), (rank + 1) % (last + 1)
    forward_in, backward_out = (forward, backward) if rank > 0 or is_first else around
    forward_out, backward_in = (forward, backward) if rank < last or is_last else around
    waits = mesh.waits
    return _Ways(input=None if is_first else Channel(forward_in, before, rank, waits),
                 output=None if is_last else Channel(forward_out, rank, after, waits),
                 gradient=None if is_last else Channel(backward_in, after, rank, waits),
                 input_gradient=None if is_first else Channel(backward_out, rank, before, waits))


def _open_channels(mesh: Mesh) -> None:
    """Open every connection now, in the same order on all ranks."""
    last = mesh.pipeline.size - 1
    forward, backward, *around = mesh.channels
    hops = [Channel(forward, rank, rank + 1) for rank in range(last)]
    hops += [Channel(backward, rank + 1, rank) for rank in range(last)]
    if around:
        hops += [Channel(around[0], last, 0), Channel(around[1], 0, last)]
    for channel in hops:
        channel.open(mesh.pipeline.rank, mesh.device)
