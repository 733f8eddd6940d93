"""What the pipeline runs in training and in evaluation: one micro-batch through one stage of this rank."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from megatron.data.batches.batch import Batch
from megatron.kernels.attention import Boundaries
from megatron.model.inputs import Inputs
from megatron.parallel.pipeline.deferral import WeightGradients
from megatron.parallel.pipeline.run import Passes, TrainingPasses
from megatron.parallel.pipeline.schedules import Action
from megatron.parallel.randomness import seed_dropout
from megatron.train.engine import Engine
from megatron.train.meters import Meters


class _Passes(Passes):
    """Micro-batches by number, as the model takes them: made when a pass first asks for one, in their order."""

    def __init__(self, engine: Engine, batches: Iterable[Batch]) -> None:
        self._engine, self._mesh, self._batches = engine, engine.mesh, iter(batches)
        self._stream = engine.stages[0].stream
        self._inputs: dict[int, Inputs] = {}
        self._num_made = 0

    def received(self, action: Action) -> Tensor:
        """A tensor like the one that the action's stage takes from the stage before it."""
        return self._engine.stages[action.stage].received(self._inputs_of(action))

    def _inputs_of(self, action: Action) -> Inputs:
        while action.micro_batch >= self._num_made:
            inputs = model_inputs(next(self._batches)).shared(self._stream, self._mesh.device)
            self._inputs[self._num_made] = inputs
            self._num_made += 1
        return self._inputs[action.micro_batch]


class TrainPasses(_Passes, TrainingPasses):
    """Forward and backward passes of one step.

    The losses are divided by `num_targets` (a scalar), those of the whole global batch. Dropout is seeded by the run's
    seed and the first sample of each micro-batch.
    """

    def __init__(self, engine: Engine, batches: Iterable[Batch], first_samples: Sequence[int], num_targets: Tensor,
                 meters: Meters, waiting: WeightGradients) -> None:
        super().__init__(engine, batches)
        self._first_samples, self._num_targets = first_samples, num_targets
        self._meters, self._waiting = meters, waiting
        self._seed, self._scale = engine.config.training.seed, engine.loss_scale.value

    def forward(self, action: Action, hidden_uh: Tensor | None) -> Tensor:
        """What the next stage takes, or of the last one the scaled share of the global batch's mean loss."""
        stage = self._engine.stages[action.stage].stage
        seed_dropout(self._seed, self._first_samples[action.micro_batch], stage.number, self._mesh.context.rank)
        output = self._engine.model.forward(action.stage, self._inputs_of(action), hidden_uh)
        if not stage.is_last:
            return output
        loss_sum, num_correct = output
        loss_share = loss_sum / self._num_targets
        if self._mesh.tensor.rank == 0:  # all tensor ranks have the same loss
            self._meters.add_loss(loss_share, num_correct)
        return loss_share * self._scale

    def backward(self, action: Action, output: Tensor, gradient_uh: Tensor | None) -> None:
        """Go back from `output`; of an "input" pass the weights' gradients wait."""
        is_last = action.micro_batch == len(self._first_samples) - 1
        self._engine.model.before_backward(action.stage, is_last)
        with self._waiting.collecting() if action.kind == "input" else nullcontext():
            if output.requires_grad:  # not so where all parameters up to here are frozen
                output.backward(gradient_uh)

    def weights(self, action: Action) -> None:
        """Compute the gradients that the oldest "input" pass put off."""
        self._waiting.compute_oldest()


class EvaluationPasses(_Passes):
    """Forward passes; `sums` (fp64 [3]): loss, correct predictions and targets, where this rank is the one to count."""

    def __init__(self, engine: Engine, batches: Iterable[Batch]) -> None:
        super().__init__(engine, batches)
        self.sums = torch.zeros(3, dtype=torch.float64, device=engine.mesh.device)

    def forward(self, action: Action, hidden_uh: Tensor | None) -> Tensor:
        """What the next stage takes, or of the last one the summed loss."""
        inputs = self._inputs_of(action)
        output = self._engine.model.forward(action.stage, inputs, hidden_uh)
        if action.stage == len(self._engine.stages) - 1:
            del self._inputs[action.micro_batch]  # nobody asks for it again
        if not self._engine.stages[action.stage].stage.is_last:
            return output
        loss_sum, num_correct = output
        if self._mesh.tensor.rank == 0:  # all tensor ranks have the same loss
            num_targets = self.sums.new_tensor(len(inputs.target_ids_m))
            self.sums += torch.stack([loss_sum.double(), num_correct.double(), num_targets])
        return loss_sum


def model_inputs(batch: Batch) -> Inputs:
    """What the model takes of a batch."""
    boundaries = Boundaries(batch.cu_seqlens, batch.lengths)
    return Inputs(batch.tokens_t, batch.positions_t, boundaries, batch.target_positions_m, batch.target_ids_m)
