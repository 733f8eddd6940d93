"""What the pipeline runs in training and in evaluation: one micro-batch through one stage of this rank."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from megatron.data.batch import Batch
from megatron.kernels.attention import Boundaries
from megatron.model.inputs import Inputs
from megatron.model.protein_model import ProteinModel
from megatron.parallel.data_parallel import DataParallel
from megatron.parallel.deferral import WeightGradients
from megatron.parallel.mesh import Mesh
from megatron.parallel.pipeline import Passes
from megatron.parallel.randomness import seed_dropout
from megatron.parallel.schedules import Action
from megatron.train.meters import Meters


class Feed:
    """Micro-batches as the model takes them, by number: made when a pass first asks for one, in their order."""

    def __init__(self, batches: Iterable[Batch], model: ProteinModel, device: torch.device) -> None:
        self._batches, self._stream, self._device = iter(batches), model.stream, device
        self._inputs: dict[int, Inputs] = {}
        self._num_made = 0

    def __getitem__(self, micro_batch: int) -> Inputs:
        while micro_batch >= self._num_made:
            self._inputs[self._num_made] = model_inputs(next(self._batches)).shared(self._stream, self._device)
            self._num_made += 1
        return self._inputs[micro_batch]

    def drop(self, micro_batch: int) -> None:
        """Forget a micro-batch that no pass will ask for again."""
        del self._inputs[micro_batch]


class _OfStages(Passes):
    def __init__(self, stages: Sequence[ProteinModel], model: DataParallel, feed: Feed, mesh: Mesh) -> None:
        self._stages, self._model, self._feed, self._mesh = stages, model, feed, mesh

    def received(self, action: Action) -> Tensor:
        """A tensor like the one that the action's stage takes from the stage before it."""
        return self._stages[action.stage].received(self._feed[action.micro_batch])


class TrainPasses(_OfStages):
    """Forward and backward passes of one step.

    `num_targets` (a scalar) of the whole global batch divide the loss, `scale` multiplies it for the backward pass;
    dropout is seeded by `seed` and the first sample of each micro-batch.
    """

    def __init__(self, stages: Sequence[ProteinModel], model: DataParallel, feed: Feed, mesh: Mesh, *, seed: int,
                 first_samples: Sequence[int], num_targets: Tensor, scale: Tensor, meters: Meters,
                 waiting: WeightGradients) -> None:
        super().__init__(stages, model, feed, mesh)
        self._seed, self._first_samples = seed, first_samples
        self._num_targets, self._scale, self._meters, self._waiting = num_targets, scale, meters, waiting

    def forward(self, action: Action, hidden_uh: Tensor | None) -> Tensor:
        """What the next stage takes, or of the last one the scaled share of the global batch's mean loss."""
        stage = self._stages[action.stage].stage
        seed_dropout(self._seed, self._first_samples[action.micro_batch], stage.number, self._mesh.context.rank)
        output = self._model.forward(action.stage, self._feed[action.micro_batch], hidden_uh)
        if not stage.is_last:
            return output
        loss_sum, num_correct = output
        loss_share = loss_sum / self._num_targets
        if self._mesh.tensor.rank == 0:  # all tensor ranks have the same loss
            self._meters.add_loss(loss_share, num_correct)
        return loss_share * self._scale

    def backward(self, action: Action, output: Tensor, gradient_uh: Tensor | None) -> None:
        """Go back from `output`; of an "input" pass the weights' gradients wait."""
        self._model.before_backward(action.stage, is_last=action.micro_batch == len(self._first_samples) - 1)
        with self._waiting.collecting() if action.kind == "input" else nullcontext():
            output.backward(gradient_uh)

    def weights(self, action: Action) -> None:
        """Compute the gradients that the oldest "input" pass put off."""
        self._waiting.compute_oldest()


class EvaluationPasses(_OfStages):
    """Forward passes; `sums` (fp64 [3]): loss, correct predictions and targets, where this rank is the one to count."""

    def __init__(self, stages: Sequence[ProteinModel], model: DataParallel, feed: Feed, mesh: Mesh) -> None:
        super().__init__(stages, model, feed, mesh)
        self.sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)

    def forward(self, action: Action, hidden_uh: Tensor | None) -> Tensor:
        """What the next stage takes, or of the last one the summed loss."""
        inputs = self._feed[action.micro_batch]
        output = self._model.forward(action.stage, inputs, hidden_uh)
        if action.stage == len(self._stages) - 1:
            self._feed.drop(action.micro_batch)
        if not self._stages[action.stage].stage.is_last:
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
