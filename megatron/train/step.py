"""One step of training: micro-batches forward and backward, gradients summed over ranks, one update."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.config import Config
from megatron.data.batch import Batch
from megatron.kernels.attention import Boundaries
from megatron.model.flops import model_flops
from megatron.optim.optimizer import Optimizer
from megatron.optim.scaling import LossScale
from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.data_parallel import DataParallel
from megatron.parallel.mesh import Mesh
from megatron.parallel.randomness import seed_dropout
from megatron.train.meters import Meters


class TrainStep:
    """Callable that trains on one global batch.

    The loss is the mean over the targets of the *global* batch: each micro-batch's summed loss is divided by the number
    of targets of all micro-batches on all ranks, so the gradient does not depend on how the batch was cut.
    """

    def __init__(self, model: DataParallel, optimizer: Optimizer, loss_scale: LossScale, meters: Meters, mesh: Mesh,
                 config: Config, padded_vocab_size: int) -> None:
        self._model, self._optimizer, self._loss_scale, self._meters = model, optimizer, loss_scale, meters
        self._mesh, self._config, self._padded_vocab_size = mesh, config, padded_vocab_size

    def __call__(self, batches: Sequence[Batch], learning_rate: float, consumed_samples: int,
                 wants_stop: bool) -> Tensor:
        """Train on this rank's micro-batches; returns how many ranks want to stop (an integer scalar)."""
        mesh, rows = self._mesh, self._config.training.micro_batch_size
        targets = [len(batch.target_ids_m) for batch in batches]
        # Tensor ranks have the same rows: the first of them counts.
        totals = torch.tensor([sum(targets) if mesh.tensor.rank == 0 else 0, wants_stop], dtype=torch.int64)
        if mesh.world.size > 1:  # one rank knows the sums already, and need not ask the device for them
            totals = all_reduce_sum(totals.to(mesh.device, non_blocking=True), mesh.world)
        num_targets, num_stops = totals.unbind()
        scale = self._loss_scale.value
        for index, batch in enumerate(batches):
            first_sample = consumed_samples + (index * mesh.data.size + mesh.data.rank) * rows
            seed_dropout(self._config.training.seed, first_sample)
            with self._model.accumulating(is_last=index == len(batches) - 1):
                loss_sum, num_correct = self._model(*model_inputs(batch.to(mesh.device, non_blocking=True)))
                loss_share = loss_sum / num_targets
                (loss_share * scale).backward()
            flops = model_flops(self._config.model, self._padded_vocab_size, batch.lengths, targets[index])
            self._meters.add_micro_batch(loss_share, num_correct, targets[index], batch.num_residues,
                                         len(batch.tokens_t), flops)
        self._model.finish()
        outcome = self._optimizer.step(learning_rate, self._loss_scale)
        self._meters.add_step(outcome.grad_norm, outcome.is_taken)
        return num_stops


def model_inputs(batch: Batch) -> tuple[Tensor, Tensor, Boundaries, Tensor, Tensor]:
    """What the model takes of a batch, in its order."""
    boundaries = Boundaries(batch.cu_seqlens, batch.lengths)
    return batch.tokens_t, batch.positions_t, boundaries, batch.target_positions_m, batch.target_ids_m
