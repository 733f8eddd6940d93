"""Trains a model on a task with pretraining's training step: epochs, validation, choice of the best weights, and
metrics.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from megatron.checkpoint.claim import Claim
from megatron.checkpoint.contents import Checkpoint
from megatron.checkpoint.convert.families import hf
from megatron.checkpoint.lora import peft_files
from megatron.checkpoint.metrics import MetricsWriter, forget_after
from megatron.checkpoint.places import METRICS_FILE, iterations, place_of
from megatron.checkpoint.saving import parts_of
from megatron.checkpoint.store import open_place
from megatron.config import Config
from megatron.data.batches.batch import Batch
from megatron.data.corpus.vocab import Vocab
from megatron.errors import DivergedError, SaveError
from megatron.files import write_json
from megatron.finetune.data.batches import PackedExamples
from megatron.finetune.data.examples import TaskData
from megatron.finetune.flags import Flags
from megatron.finetune.model import Described
from megatron.finetune.predictions.collected import measured, predictions, settings_of
from megatron.finetune.predictions.metrics import Measured, form_of, standing
from megatron.finetune.progress import Unfinished
from megatron.infer.pretrained import flags_of
from megatron.log import Log
from megatron.model.lora import adapters_in
from megatron.optim.schedule import build_schedule
from megatron.parallel.mesh import Mesh
from megatron.train.state import is_due
from megatron.train.step.meters import Meters
from megatron.train.step.train_step import TrainStep
from megatron.train.stop import StopRequests
from megatron.train.tolerant_saver import TolerantSaver

REPORT = "report.json"
_LEAST_OF_A_TRY = 20  # steps
ADAPTERS = "adapters"  # in the files of peft
Measures = dict[str, Measured]


@dataclass(frozen=True)
class Job:
    """Everything that defines a run except its seed. `claim`: on rank 0, the right to write to --save."""

    flags: Flags
    identity: Mapping[str, Any]  # that of the flags as they were given
    data: TaskData
    described: Described
    vocab: Vocab
    checkpoint: Checkpoint
    mesh: Mesh
    log: Log
    requests: StopRequests
    claim: Claim | None = None

    def config(self, num_iterations: int | None = None) -> Config:
        """Pretraining's configuration, as `Flags.config` has it."""
        return self.flags.config(flags_of(self.checkpoint), self.mesh.data.size, num_iterations)


def fine_tune(job: Job, seed: int, folder: Path) -> dict[str, Any] | None:
    """Train with one seed, write the model and its report to a folder, and return the report; all ranks call this
    together.

    Continues an earlier run. Returns None if it was asked to stop before the end.
    """
    training = FineTuning(job, seed, folder)
    if not training.run():
        return None
    report = training.report()
    training.save(report)
    return report


class FineTuning:
    """A training of at most `num_steps` steps, which continues an earlier one.

    `is_try`: stop after a quarter of an epoch, or 20 steps, with the whole learning rate schedule in these, and save
    nothing.
    """

    def __init__(self, job: Job, seed: int, folder: Path, is_try: bool = False) -> None:
        self._job, self._seed, self._folder, self._mesh, self._log = job, seed, folder, job.mesh, job.log
        config, finetune = job.config(), job.flags.finetune
        self._engine = job.described.begin(config, job.mesh, job.vocab, job.checkpoint, seed, finetune.head_only)
        self._train = self._packed("train", is_training=True)
        self.num_steps = job.flags.others.get("train_iters") or sum(
            self._train.num_steps(epoch) for epoch in range(finetune.epochs))
        if is_try:
            self.num_steps = min(self.num_steps, max(_LEAST_OF_A_TRY, self._train.num_steps(0) // 4))
        self._config = job.config(self.num_steps)
        self._rows = self._config.training.global_batch_size
        self._schedule = build_schedule(self._config.schedule, global_batch_size=self._rows,
                                        train_iters=self.num_steps, train_samples=None)
        self._parts = {part: self._packed(part, is_training=False) for part in job.data.parts if part != "train"}
        self._meters = Meters(job.mesh.world, job.mesh.device)
        self._metrics = MetricsWriter(folder / METRICS_FILE, job.log)
        self._step = TrainStep(self._engine, self._meters)
        self._unfinished = Unfinished(folder, self._config, self._engine, job.log, job.claim, self._work())
        self._saves = not is_try
        self._progress, self._best = self._unfinished.go_on(self._meters)
        if self._log.is_speaker:
            folder.mkdir(parents=True, exist_ok=True)
            if not is_try:
                job.described.write(folder)  # whose run this is
            forget_after(self._metrics.path, self._progress.iteration)

    @property
    def best(self) -> tuple[str, tuple[float, ...]]:
        """The metric that chooses the best validation, and what the best so far was compared by, that metric first."""
        is_balanced = self._job.flags.task.class_weights == "balanced"
        return self._progress.chooser(self._job.data.space.kind, is_balanced), self._progress.best_values

    def run(self) -> bool:
        """Take the remaining steps until all are taken or validation stops improving, then load the best weights.

        Returns False if it was asked to stop before that; it has saved then. Raises SaveError if the disk refused.
        """
        progress, is_stopping = self._progress, self._job.requests.agreed(self._mesh)
        bar = self._log.progress(total=self.num_steps, done=progress.iteration, unit="step",
                                 label=f"training, seed {self._seed}", has_own_lines=True)
        while not is_stopping and not self._is_complete():
            for batches in islice(self._train.steps(progress.epoch, progress.step),
                                  self.num_steps - progress.iteration):
                is_stopping = self._advance(batches)
                bar.update()
                if is_stopping:
                    self._save()
                    break
            else:
                self._end_epoch()
                is_stopping = self._job.requests.agreed(self._mesh)
        bar.close()
        self._metrics.close()
        if not self._is_complete():
            self._unfinished.check()
            where = (f"saved in {self._folder}: the same command goes on from there"
                     if self._saves and progress.iteration else "there is nothing to save")
            self._log.line(f"stopped at iteration {progress.iteration}; {where}")
            return False
        if progress.iteration < self.num_steps:
            self._log.line(f"no better validation for {self._job.flags.finetune.patience} epochs: stopped after "
                           f"{progress.epoch}")
        self._unfinished.put_in_place(self._best)
        return True

    def report(self) -> dict[str, Any]:
        """The report of the run: the metrics of each part with the best weights, and their intervals."""
        found = {part: self._measured(part, self._job.flags.finetune.bootstrap) for part in self._parts}
        return {"flags": self._job.identity, "seed": self._seed, "lr": self._config.schedule.lr,
                "iteration": self._kept, "epoch": self._progress.best_epoch or self._progress.epoch,
                "iterations": self._progress.iteration, "chosen_by": self.best[0] if self._progress.best_at else None,
                "proteins": {part: len(examples) for part, examples in self._job.data.parts.items()},
                "measures": {part: {name: [_finite(end) for end in (one.value, one.low, one.high)]
                                    for name, one in measures.items()} for part, measures in found.items()}}

    def save(self, report: dict[str, Any]) -> None:
        """Write the model, its description and, last, the report; raises SaveError where the disk refuses twice.

        A model that this training had saved before it died ahead of its report is replaced.
        """
        places = iterations(self._folder) if self._log.is_speaker else {}
        earlier = {number: place for number, place in places.items() if self._unfinished.has_saved(place)}
        self._save_model(max(earlier, default=0))
        if self._log.is_speaker:
            for number in earlier.keys() - {self._kept}:  # another layout may have found another best step
                shutil.rmtree(earlier[number], ignore_errors=True)
            self._job.described.write(self._folder)
            if (lora := self._job.described.lora) is not None:
                tensors = adapters_in(open_place(place_of(self._folder, self._kept)).model)
                source = self._job.flags.others["load"]  # peft can load it if it is a folder of transformers
                peft_files.write(self._folder / ADAPTERS, tensors, lora, self._config.model,
                                 source if hf.recognises(Path(source)) else None)
            write_json(self._folder / REPORT, report)
        self._unfinished.remove()

    def _save_model(self, loaded: int) -> None:
        """Write the model; `loaded`: as for `Saver`."""
        config = replace(self._config.checkpoint, save=str(self._folder))
        saver = TolerantSaver(config, self._mesh, self._job.claim, self._log, loaded)
        flags = self._config.as_dict() | {"vocab_file": self._config.data.absolute_vocab_file}
        parts, state = parts_of(self._engine.model.parameters, {}), {
            "iteration": self._kept, "config": flags, **self._job.vocab.state(), "work": self._work(),
            "progress": {"iteration": self._kept, "consumed_samples": self._kept * self._rows},
            "began_from": self._job.flags.others["load"], **self._job.described.state()}
        saver.save(self._kept, parts, state, "It is tried once more")
        saver.finish()
        if saver.has_failed:
            saver.save(self._kept, parts, state, f"The run ends with status {SaveError.exit_status}")
        saver.close()
        try:
            saver.check()
        except SaveError as error:
            raise self._unfinished.refused(error) from error

    @property
    def _kept(self) -> int:
        """The step whose weights are kept: the best, or the last where nothing was validated."""
        return self._progress.best_at or self._progress.iteration

    def _packed(self, part: str, is_training: bool) -> PackedExamples:
        packed = PackedExamples(self._job.data.parts[part], self._job.data.space, self._job.vocab,
                                settings_of(self._engine, self._seed), is_training)
        self._log.line(packed.describe(part))
        return packed

    def _work(self) -> dict[str, Any]:
        """What must be as it was where a training goes on."""
        return {"flags": self._job.identity, "seed": self._seed, "lr": self._config.schedule.lr,
                "steps": self.num_steps, "rows": self._rows, "began_from": self._job.checkpoint.iteration,
                "proteins": {part: len(examples) for part, examples in self._job.data.parts.items()}}

    def _is_complete(self) -> bool:
        """Whether all steps are taken, and validated, or nothing has got better for long enough."""
        progress, patience = self._progress, self._job.flags.finetune.patience
        is_at_end = progress.iteration == self.num_steps and progress.step == 0
        return is_at_end or (progress.best_at > 0 and 0 < patience <= progress.epoch - progress.best_epoch)

    def _advance(self, batches: list[Batch]) -> bool:
        """One step and what is due after it; returns whether to stop."""
        progress, config = self._progress, self._config
        learning_rate = self._schedule.learning_rate(progress.iteration * self._rows)
        (num_stopping,) = self._step(batches, learning_rate, [self._job.requests.wants_stop()]).read()
        progress.iteration, progress.step = progress.iteration + 1, progress.step + 1
        is_end = progress.iteration == self.num_steps
        if progress.iteration % config.logging.log_interval == 0 or is_end:
            self._note_training(progress.epoch + 1, learning_rate)
        is_epochs_end = is_end or progress.step == self._train.num_steps(progress.epoch)
        is_stopping = num_stopping > 0 or (self._saves and is_due(config.training.exit_interval, progress.iteration))
        if not is_stopping and not is_epochs_end and is_due(config.checkpoint.save_interval, progress.iteration):
            self._save()
        return is_stopping

    def _save(self) -> None:
        if self._saves:
            self._meters.pause()
            self._unfinished.save(self._progress, self._best, self._meters)
            self._meters.resume()

    def _end_epoch(self) -> None:
        """Measure, keep the weights where they are better than before, and save."""
        progress = self._progress
        progress.epoch, progress.step = progress.epoch + 1, 0
        if "valid" in self._parts:
            self._meters.pause()
            self._validate()
            self._meters.resume()
        self._save()

    def _validate(self) -> None:
        progress, measures, chooser = self._progress, self._measured("valid"), self.best[0]
        values = standing(measures, chooser)
        is_better = values > progress.best_values
        if is_better:
            progress.best_at, progress.best_epoch = progress.iteration, progress.epoch
            progress.best_by, progress.best_values = chooser, values
            self._best = self._unfinished.copied()
        self._write("valid", progress.epoch, {name: one.value for name, one in measures.items()})
        shown = " | ".join(f"{name}: {one.value:{form_of(name, 4)}}" for name, one in list(measures.items())[:4])
        self._log.line(f" epoch {progress.epoch:4d} | validation {shown}"
                       f"{f' | best so far by {chooser}' if is_better else ''}")

    def _measured(self, part: str, num_draws: int = 0) -> Measures:
        packed = self._parts[part]
        predicted = predictions(self._engine, self._job.described.head, packed, self._log, f"evaluating {part}")
        return measured(self._job.data.space, packed.examples, predicted, num_draws)

    def _note_training(self, epoch: int, learning_rate: float) -> None:
        reading = self._meters.read()
        values = {"loss": reading.loss, "learning_rate": learning_rate, "grad_norm": reading.grad_norm,
                  "residues_per_s": reading.num_residues / reading.elapsed_s}
        self._write("train", epoch, values)
        shown = "none" if reading.loss is None or reading.grad_norm is None else (
            f"{reading.loss:.4E} | grad norm: {reading.grad_norm:.3f}")
        self._log.line(f" iteration {self._progress.iteration:7d}/{self.num_steps:7d} | epoch {epoch:4d} | "
                       f"learning rate: {learning_rate:.3E} | loss: {shown} | "
                       f"residues per second: {values['residues_per_s']:.0f}")
        if 0 < reading.num_steps_with_targets == reading.num_skipped and not self._engine.loss_scale.is_dynamic:
            raise DivergedError(f"the gradients of the last {reading.num_skipped} steps up to iteration "
                                f"{self._progress.iteration} were not finite; lower --lr, or lengthen the warm-up")

    def _write(self, kind: str, epoch: int, values: Mapping[str, float | None]) -> None:
        """One line of metrics.jsonl."""
        if self._log.is_speaker:
            self._metrics.add({"kind": kind, "iteration": self._progress.iteration, "epoch": epoch, **values})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
