"""Collects a fine-tuned model's prediction for each protein, in any layout, on every rank's host, and measures them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.data.batches.batch import Batch
from megatron.finetune.data.batches import NO_EXAMPLE, BatchSettings, PackedExamples
from megatron.finetune.data.examples import Example
from megatron.finetune.data.labels import LabelSpace
from megatron.finetune.data.tasks import CLASS, CLASSES, CONTACTS, NUMBER, RESIDUES
from megatron.finetune.heads import HeadSpec
from megatron.finetune.predictions.metrics import Measured, measure
from megatron.log import Log
from megatron.parallel.collectives import all_gather_object
from megatron.parallel.pipeline.schedules import Action
from megatron.parallel.waits import read
from megatron.train.step.engine import Engine, stream_of
from megatron.train.step.passes import ForwardPasses


def settings_of(engine: Engine, seed: int) -> BatchSettings:
    """How to pack labelled proteins into rows and divide them among ranks in an engine's layout."""
    config, mesh = engine.config, engine.mesh
    return BatchSettings(
        config.data.seq_length, config.data.num_ends, config.training.micro_batch_size,
        config.training.global_batch_size, seed, mesh.data.rank, mesh.data.size,
        stream_of(config, mesh).token_multiple, mesh.context.rank, mesh.context.size)


@torch.no_grad()
def predictions(engine: Engine, head: HeadSpec, packed: PackedExamples, log: Log, label: str,
                of_contacts: Callable[[np.ndarray], Any] = lambda map_rr: map_rr) -> list[Any]:
    """The model's prediction for each example, in order, on every rank; all ranks must call this together.

    number: a float. class: probabilities, fp32 [c]. classes: an independent probability of each, fp32 [c]. residues:
    probabilities of each residue's class [r, c]. numbers: one for each residue [r]. contacts: the probability that two
    residues are in contact [r, r], or what `of_contacts` makes of it. For a protein longer than a row, r covers only
    its first residues.
    """
    found: dict[int, Any] = {}
    bar = log.progress(total=packed.num_steps(0), done=0, unit="step", label=label)
    with engine.evaluating():
        for batches in packed.steps(0):
            engine.pipeline.evaluate(_Predicting(engine, batches, head, found, of_contacts), len(batches))
            bar.update()
    bar.close()
    for theirs in all_gather_object(found, engine.mesh.world):
        found |= theirs
    return [found[number] for number in range(len(packed.examples))]


def measured(space: LabelSpace, examples: Sequence[Example], predicted: Sequence[Any], num_draws: int = 0
             ) -> dict[str, Measured]:
    """The metrics of these `predictions`, by name; `num_draws` as in `metrics.measure`."""
    chosen = [value.argmax(-1) for value in predicted] if space.kind in (CLASS, RESIDUES) else predicted
    return measure(space, [example.label for example in examples], chosen, num_draws=num_draws,
                   probabilities=predicted if space.kind == CLASS else None)


class _Predicting(ForwardPasses):
    """Forward passes whose predictions come to the host on one of the ranks that have them."""

    def __init__(self, engine: Engine, batches: Sequence[Batch], head: HeadSpec, found: dict[int, Any],
                 of_contacts: Callable[[np.ndarray], Any]) -> None:
        super().__init__(engine, batches)
        self._head, self._found, self._of_contacts = head, found, of_contacts

    def _run(self, action: Action, hidden_uh: Tensor | None) -> Any:
        return self._engine.model.forward(action.stage, self._batch(action).sequence, None, hidden_uh)

    def take(self, batch: Batch, output: Tensor) -> None:
        """Keep those of each protein by its example's number."""
        if self._mesh.tensor.rank or self._mesh.context.rank:
            return
        kind, ends = self._head.kind, read(batch.sequence.cu_seqlens).tolist()
        values: Any = output.float() if kind == CONTACTS else read(output.float()).numpy()
        for place, number in enumerate(batch.targets.examples_g.tolist()):
            if number == NO_EXAMPLE:
                continue
            if kind in (NUMBER, CLASS, CLASSES):
                self._found[number] = float(values[place]) if kind == NUMBER else values[place]
                continue
            of_protein = values[ends[place] + 1:ends[place + 1] - self._head.num_ends + 1]
            if kind == CONTACTS:
                first_rw, second_rw = of_protein.unbind(1)
                of_protein = self._of_contacts(read((first_rw @ second_rw.mT).sigmoid()).numpy())
            self._found[number] = of_protein
