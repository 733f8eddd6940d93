"""Evaluation on fixed rows with fixed masks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from megatron.data.batches.batch import Batch, BatchShape
from megatron.data.batches.loader import batches
from megatron.data.rows.dataset import Dataset
from megatron.log import Log, ProgressBar, number_of
from megatron.parallel.collectives import all_reduce_sum
from megatron.parallel.waits import read
from megatron.train.step.engine import Engine
from megatron.train.step.passes import EvaluationPasses

MICRO_BATCHES_A_GO = 32  # after so many, all ranks ask whether to stop


@dataclass(frozen=True)
class Evaluation:
    """Means over all targets; None if there were none."""

    loss: float | None  # nats
    perplexity: float | None
    masked_accuracy: float | None  # the share of targets predicted right
    num_targets: int

    def in_words(self, before: float | None) -> str:
        """The same for people; `before`: the loss before the first step, if it is known."""
        if self.loss is None:
            return "none: there is no residue to predict"
        return (f"{self.loss:.4f} nats (perplexity {self.perplexity:.2f}, "
                f"{number_of(self.num_targets, 'masked residue')})"
                f"{'' if before is None else f', before the first step {before:.4f}'}")


def evaluate(engine: Engine, dataset: Dataset, shape: BatchShape, log: Log, *, num_rows: int,
             label: str, wants_stop: Callable[[], bool]) -> Evaluation | None:
    """Evaluate the first `num_rows` rows of `dataset`, split over the data-parallel ranks; every rank gets the result.

    None if `wants_stop`, a collective that is called every few micro-batches, ended it early.
    """
    mesh, micro_batch_size = engine.mesh, engine.config.training.micro_batch_size
    shape = replace(shape, num_targets=dataset.most_targets(micro_batch_size))
    rows_a_micro_step = micro_batch_size * mesh.data.size
    bar = log.progress(total=num_rows, done=0, unit="row", label=label, has_own_lines=True)
    # No worker processes: starting them takes longer than preparing so few rows.
    loader = batches(dataset, shape, start_sample=0, stop_sample=num_rows, micro_batch_size=micro_batch_size,
                     data_rank=mesh.data.rank, data_size=mesh.data.size, num_workers=0, pin=False)
    counted, sums = _counted(loader, bar, rows_a_micro_step), torch.zeros(3, dtype=torch.float64, device=mesh.device)
    num_left, is_stopping = -(-num_rows // rows_a_micro_step), False
    with closing(loader), engine.evaluating():
        while num_left and not is_stopping:
            num_now = min(num_left, MICRO_BATCHES_A_GO)
            engine.pipeline.evaluate(EvaluationPasses(engine, islice(counted, num_now), sums), num_now)
            num_left -= num_now
            is_stopping = num_left > 0 and wants_stop()
    bar.close()
    if is_stopping:
        return None
    loss, correct, targets = read(all_reduce_sum(sums, mesh.world)).tolist()
    if targets == 0:
        return Evaluation(None, None, None, 0)
    return Evaluation(loss / targets, perplexity(loss / targets), correct / targets, int(targets))


def _counted(loader: Iterable[Batch], bar: ProgressBar, num_rows: int) -> Iterator[Batch]:
    for batch in loader:
        yield batch
        bar.update(num_rows)


def perplexity(loss: float) -> float:
    """exp(loss), at most exp(20), so that a diverged run still prints a number."""
    return float(np.exp(min(loss, 20.0)))
