"""The passes that the pipeline calls in training and in evaluation: one micro-batch through one stage of this rank."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron.data.batches.batch import Batch
from megatron.kernels.packed_sequence import NO_TARGET
from megatron.parallel.pipeline.run import Passes, TrainingPasses
from megatron.parallel.pipeline.schedules import Action
from megatron.parallel.tensor.weight_gradients import WeightGradients
from megatron.train.step.engine import Engine
from megatron.train.step.meters import Meters


class _Passes(Passes):
    """Moves each micro-batch to the device when a pass first needs it, and keeps it for the other stages' passes."""

    def __init__(self, engine: Engine, batches: Iterable[Batch]) -> None:
        self._engine, self._mesh, self._source = engine, engine.mesh, iter(batches)
        self._batches: dict[int, Batch] = {}
        self._num_made = 0

    def _run(self, action: Action, hidden_uh: Tensor | None) -> Any:
        batch = self._batch(action)
        return self._engine.model.forward(action.stage, batch.sequence, batch.targets, hidden_uh)

    def _batch(self, action: Action) -> Batch:
        while action.micro_batch >= self._num_made:
            batch = next(self._source)
            if self._engine.skips_filler:
                batch = batch.without_filler(self._engine.stages[0].stream.token_multiple)
            self._batches[self._num_made] = batch.to(self._mesh.device)
            self._num_made += 1
        return self._batches[action.micro_batch]


class TrainPasses(_Passes, TrainingPasses):
    """Forward and backward passes of one step.

    `num_targets`: of the whole global batch; every micro-batch's summed loss is divided by it.
    """

    def __init__(self, engine: Engine, batches: Sequence[Batch], num_targets: Tensor | float, meters: Meters,
                 waiting: WeightGradients) -> None:
        super().__init__(engine, batches)
        self._num_batches, self._num_targets = len(batches), num_targets
        self._meters, self._waiting, self._scale = meters, waiting, engine.loss_scale.value

    def forward(self, action: Action, hidden_uh: Tensor | None) -> Tensor:
        """The message to the next stage [u, h]; from the last stage the scaled share of the global batch's mean loss.
        """
        stage = self._engine.stages[action.stage].stage
        output = self._run(action, hidden_uh)
        if not stage.is_last:
            return output
        loss_sum, num_correct = output
        loss_share = loss_sum / self._num_targets
        if self._mesh.tensor.rank == 0:  # all tensor ranks have the same loss
            self._meters.add_loss(loss_share, num_correct)
        return loss_share * self._scale

    def backward(self, action: Action, output: Tensor, gradient_uh: Tensor | None) -> None:
        """Backpropagate from `output`; a pass of kind "input" leaves the weights' gradients for `weights`."""
        is_last = action.micro_batch == self._num_batches - 1
        self._engine.model.before_backward(action.stage, is_last)
        with self._waiting.collecting() if action.kind == "input" else nullcontext():
            if output.requires_grad:  # False where all parameters of this and earlier stages are frozen
                output.backward(gradient_uh)

    def weights(self) -> None:
        """Compute the weights' gradients that the oldest "input" pass left."""
        self._waiting.compute_oldest()


class ForwardPasses(_Passes):
    """Forward passes alone; the last stage's output for each micro-batch goes to `take`.

    Autograd is off, except in blocks under torch.compile: it compiles a graph for either mode, so that training's
    graphs serve here too only if autograd is on. No backward pass follows.
    """

    def forward(self, action: Action, hidden_uh: Tensor | None) -> Tensor:
        """The message to the next stage [u, h]; from the last stage the model's output."""
        batch = self._batch(action)
        with torch.set_grad_enabled(self._engine.is_compiled):
            output = self._run(action, hidden_uh)
        if action.stage == len(self._engine.stages) - 1:
            del self._batches[action.micro_batch]  # this rank's last stage: no pass needs it again
        if self._engine.stages[action.stage].stage.is_last:
            self.take(batch, output)
        return output

    @abstractmethod
    def take(self, batch: Any, output: Any) -> None:
        """Use the last stage's output for a micro-batch."""


class EvaluationPasses(ForwardPasses):
    """Forward passes that add summed loss, correct predictions and number of targets to `sums` (fp64 [3]).

    Only one of the ranks that compute the same loss adds them, so that a sum over all ranks counts each target once.
    """

    def __init__(self, engine: Engine, batches: Iterable[Batch], sums: Tensor) -> None:
        super().__init__(engine, batches)
        self.sums = sums

    def take(self, batch: Batch, output: tuple[Tensor, Tensor]) -> None:
        """Add a micro-batch to the sums."""
        loss_sum, num_correct = output
        if self._mesh.tensor.rank == 0:  # all tensor ranks have the same loss
            self.sums += torch.stack([loss_sum.detach().double(), num_correct.double(),
                                      (batch.targets.ids_m != NO_TARGET).sum().double()])
