"""One step of training: micro-batches forward and backward, gradients summed over ranks, one update."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from megatron.data.batches.batch import Batch
from megatron.model.flops import model_flops
from megatron.optim.optimizer import StepOutcome
from megatron.parallel.tensor.weight_gradients import WeightGradients, defer_weight_gradients
from megatron.train.step.agreement import Arriving, summed
from megatron.train.step.engine import Engine
from megatron.train.step.graph import CudaRecorder, StepGraph
from megatron.train.step.meters import Meters
from megatron.train.step.passes import TrainPasses
from megatron.train.step.spikes import SpikeJudge


class TrainStep:
    """A callable that trains on one global batch.

    The loss is the mean over the targets of the *global* batch: each micro-batch's summed loss is divided by the number
    of targets of all micro-batches on all ranks, so the gradient does not depend on how the batch was cut. With a
    `judge`, steps that it finds abnormal change no weight. `recorder`: runs the step as graphs, in tests.
    """

    def __init__(self, engine: Engine, meters: Meters, recorder: CudaRecorder | None = None,
                 judge: SpikeJudge | None = None) -> None:
        self._engine, self._meters, self._judge = engine, meters, judge
        if engine.config.training.cuda_graph:
            recorder = CudaRecorder()
        self._graph = None if recorder is None else StepGraph(engine, recorder)
        self._agreed: Arriving | None = None  # how many ranks had each wish in the last step
        self._waiting = WeightGradients()
        for stage in engine.stages:
            defer_weight_gradients(stage, self._waiting)

    def __call__(self, batches: Sequence[Batch], learning_rate: float, wishes: Sequence[bool] = (),
                 factor: float = 1.0) -> Arriving:
        """Train on this rank's micro-batches; returns, for each of `wishes`, how many ranks have it.

        Ranks agree in the step's own all-reduce. Several ranks get the numbers of the step before (in the first, 0),
        which have long arrived, so that no step waits for the device. `factor`: multiplies the loss, for faults made on
        purpose.
        """
        mesh = self._engine.mesh
        here = sum(batch.num_targets for batch in batches) if mesh.is_first_reader else 0
        # At least 1: a step without targets has no loss and no gradient.
        num_targets: Tensor | float = max(1, here)
        num_wishes = torch.tensor(wishes, dtype=torch.int64)
        if mesh.world.size > 1:
            sums = summed([here, *wishes], mesh.world, mesh.device)
            num_targets, num_wishes = sums[0].clamp(min=1), sums[1:]
        if factor != 1:
            num_targets = num_targets / factor
        with self._engine.amaxes.of_step():
            outcome = (self._stepped if self._graph is None else self._launched)(batches, num_targets, learning_rate)
        self._count(batches)
        self._meters.add_step(outcome.grad_norm, outcome.is_taken)
        before = self._agreed or Arriving(torch.zeros(len(wishes), dtype=torch.int64))
        self._agreed = Arriving(num_wishes)
        return self._agreed if mesh.world.size == 1 else before

    def _stepped(self, batches: Sequence[Batch], num_targets: Tensor | float, learning_rate: float) -> StepOutcome:
        engine = self._engine
        passes = TrainPasses(engine, batches, num_targets, self._meters, self._waiting)
        engine.pipeline.train(passes, len(batches))
        engine.model.reduce_gradients()
        if self._judge is None:
            return engine.update(learning_rate)
        return engine.update(learning_rate, partial(self._judge.is_normal, self._meters.loss_of_step()))

    def _launched(self, batches: Sequence[Batch], num_targets: Tensor | float,
                  learning_rate: float) -> StepOutcome:
        assert self._graph is not None
        self._graph.set_targets(num_targets)
        for batch in batches:
            loss_share, num_correct = self._graph.micro_batch(batch)
            if self._engine.mesh.tensor.rank == 0:  # all tensor ranks have the same loss
                self._meters.add_loss(loss_share, num_correct)
        self._engine.model.reduce_gradients()
        return self._graph.update(learning_rate)

    def _count(self, batches: Sequence[Batch]) -> None:
        if not self._engine.mesh.is_first_reader:
            return
        for batch in batches:
            flops = model_flops(self._engine.config.model, self._engine.padded_vocab_size, batch.num_tokens,
                                batch.num_pairs, batch.num_targets)
            self._meters.add_batch(batch.num_targets, batch.num_residues, batch.num_tokens, flops)
