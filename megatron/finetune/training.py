"""Training a model on a task by pretraining's steps: epochs, validation, the best weights, and how good they are."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.lora import peft_files
from megatron.checkpoint.saving import Saver, parts_of
from megatron.checkpoint.store import open_place, place_of
from megatron.checkpoint.stored import Checkpoint
from megatron.config import Config
from megatron.data.corpus.vocab import Vocab
from megatron.errors import ConfigError, DivergedError
from megatron.files import write_json
from megatron.finetune.data.batches import PackedExamples
from megatron.finetune.data.examples import TaskData
from megatron.finetune.data.tasks import METRICS
from megatron.finetune.flags import Flags
from megatron.finetune.model import Described
from megatron.finetune.predictions.collected import measured, predictions, settings_of
from megatron.finetune.predictions.metrics import Measured
from megatron.log import Log
from megatron.model.lora import adapters_in
from megatron.optim.schedule import build_schedule
from megatron.parallel.mesh import Mesh
from megatron.train.meters import Meters
from megatron.train.step import TrainStep

REPORT = "report.json"
METRICS_FILE = "metrics.jsonl"
_LEAST_OF_A_TRY = 20  # steps
ADAPTERS = "adapters"  # in the files of peft
Measures = dict[str, Measured]


@dataclass(frozen=True)
class Job:
    """Everything of a run but its seed."""

    flags: Flags
    identity: Mapping[str, Any]  # that of the flags as they were given
    data: TaskData
    described: Described
    vocab: Vocab
    checkpoint: Checkpoint
    saved: Mapping[str, Any]  # the flags of the checkpoint
    mesh: Mesh
    log: Log


def fine_tune(job: Job, seed: int, folder: Path) -> dict[str, Any]:
    """Train with one seed, write the model and its report into a folder, and give the report; all ranks together."""
    training = Training(job, seed, folder)
    training.run()
    report = training.report()
    training.save(report)
    return report


def with_best_rate(job: Job, folder: Path) -> Job:
    """The job with that of --calibrate-lr of which a try with the first seed has the best validation; all together.

    What is seen of each goes into a folder. Raises ConfigError where there is no validation file to choose by.
    """
    if "valid" not in job.data.parts:
        raise ConfigError("--calibrate-lr chooses by validation, and there is no such file; give --valid-data, or "
                          "leave it out")
    values, tries = dict[float, float](), {rate: _with_rate(job, rate) for rate in job.flags.finetune.calibrate_lr}
    for rate, one in tries.items():
        training = Training(one, job.flags.finetune.seeds[0], folder / "calibration" / f"lr-{rate:g}", is_try=True)
        training.run()
        values[rate] = training.best_value
    best = max(values, key=lambda rate: values[rate])
    shown = ", ".join(f"{value:.4f} with {rate:g}" for rate, value in values.items())
    job.log.line(f"learning rate {best:g}, by {METRICS[job.data.space.kind][0]} on validation: {shown}")
    return tries[best]


class Training:
    """One run of `num_steps` at most; `best_value`: of the first measure, at the best validation so far.

    `is_try`: it ends after a quarter of an epoch, or 20 steps, and has the whole course of the learning rate in these.
    """

    def __init__(self, job: Job, seed: int, folder: Path, is_try: bool = False) -> None:
        self._job, self._seed, self._folder, self._mesh, self._log = job, seed, folder, job.mesh, job.log
        config, finetune = job.flags.config(job.saved, job.mesh.data.size), job.flags.finetune
        self._engine = job.described.begin(config, job.mesh, job.vocab, job.checkpoint, seed, finetune.head_only)
        self._train = self._packed("train", is_training=True)
        self.num_steps = job.flags.others.get("train_iters") or sum(
            self._train.num_steps(epoch) for epoch in range(finetune.epochs))
        if is_try:
            self.num_steps = min(self.num_steps, max(_LEAST_OF_A_TRY, self._train.num_steps(0) // 4))
        self._config = job.flags.config(job.saved, job.mesh.data.size, self.num_steps)
        self._rows = _rows_a_step(self._config)
        self._schedule = build_schedule(self._config.schedule, global_batch_size=self._rows,
                                        train_iters=self.num_steps, train_samples=None)
        self._parts = {part: self._packed(part, is_training=False) for part in job.data.parts if part != "train"}
        self._meters = Meters(job.mesh.world, job.mesh.device)
        self._step = TrainStep(self._engine, self._meters)
        self._iteration, self._best_at, self._best_epoch = 0, 0, 0
        self.best_value = -math.inf
        self._best: dict[str, torch.Tensor] | None = None
        if self._log.is_speaker:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / METRICS_FILE).unlink(missing_ok=True)

    def run(self) -> None:
        """Take the steps, epoch after epoch, until all are taken or nothing gets better; then put the best in place."""
        epoch, patience = 0, self._job.flags.finetune.patience
        bar = self._log.progress(total=self.num_steps, done=0, unit="step", label=f"training, seed {self._seed}")
        while self._iteration < self.num_steps and not (
                self._best is not None and 0 < patience <= epoch - self._best_epoch):
            epoch += 1
            for batches in self._train.steps(epoch - 1):
                learning_rate = self._schedule.learning_rate(self._iteration * self._rows)
                self._step(batches, learning_rate)
                self._iteration += 1
                bar.update()
                if self._iteration % self._config.logging.log_interval == 0 or self._iteration == self.num_steps:
                    self._note_training(epoch, learning_rate)
                if self._iteration == self.num_steps:
                    break
            if "valid" in self._parts:
                self._validate(epoch)
        bar.close()
        if self._best is None:
            self._best_at, self._best_epoch = self._iteration, epoch
            return
        if self._iteration < self.num_steps:
            self._log.line(f"no better validation for {patience} epochs: stopped after {epoch}")
        with torch.no_grad():
            for name, weight in self._best.items():
                self._engine.model.parameters[name].copy_(weight)
        self._engine.take_up_weights()

    def report(self) -> dict[str, Any]:
        """What is told of the run: the measures of each part by the best weights, with their intervals."""
        found = {part: self._measured(part, self._job.flags.finetune.bootstrap) for part in self._parts}
        return {"flags": self._job.identity, "seed": self._seed, "lr": self._config.schedule.lr,
                "iteration": self._best_at, "epoch": self._best_epoch, "iterations": self._iteration,
                "proteins": {part: len(examples) for part, examples in self._job.data.parts.items()},
                "measures": {part: {name: [_finite(end) for end in (one.value, one.low, one.high)]
                                    for name, one in measures.items()} for part, measures in found.items()}}

    def save(self, report: dict[str, Any]) -> None:
        """Write the model, what it predicts, and last the report."""
        config = replace(self._config.checkpoint, save=str(self._folder))
        saver = Saver(config, self._mesh, None, self._log, loaded=0)
        values = {name: list(value) if isinstance(value, tuple) else value
                  for name, value in self._config.as_dict().items()}
        saver.save(self._best_at, parts_of(self._engine.model.parameters, {}), {
            "iteration": self._best_at, "config": values, "vocabulary": self._job.vocab.identity,
            "progress": {"iteration": self._best_at, "consumed_samples": self._best_at * self._rows},
            "began_from": self._job.flags.others["load"]})
        saver.close()
        if self._log.is_speaker:
            self._job.described.write(self._folder)
            if (lora := self._job.described.lora) is not None:
                tensors = adapters_in(open_place(place_of(self._folder, self._best_at)).model)
                peft_files.write(self._folder / ADAPTERS, tensors, lora, self._config.model)
            write_json(self._folder / REPORT, report)

    def _packed(self, part: str, is_training: bool) -> PackedExamples:
        packed = PackedExamples(self._job.data.parts[part], self._job.data.space, self._job.vocab,
                                settings_of(self._engine, self._seed), is_training)
        self._log.line(packed.describe(part))
        return packed

    def _validate(self, epoch: int) -> None:
        """Measure, and keep the weights where they are better than before."""
        self._meters.pause()
        measures, name = self._measured("valid"), METRICS[self._job.data.space.kind][0]
        value = measures[name].value
        is_better = self._best is None or value > self.best_value
        if is_better:
            self._best_at, self._best_epoch = self._iteration, epoch
            self.best_value = -math.inf if math.isnan(value) else value
            self._best = {name: parameter.detach().clone() for name, parameter in self._engine.model.parameters.items()
                          if parameter.requires_grad}
        self._write("valid", epoch, {name: one.value for name, one in measures.items()})
        shown = " | ".join(f"{name}: {one.value:.4f}" for name, one in list(measures.items())[:4])
        self._log.line(f" epoch {epoch:4d} | validation {shown}{' | best so far' if is_better else ''}")
        self._meters.resume()

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
        self._log.line(f" iteration {self._iteration:7d}/{self.num_steps:7d} | epoch {epoch:4d} | learning rate: "
                       f"{learning_rate:.3E} | loss: {shown} | residues per second: {values['residues_per_s']:.0f}")
        if 0 < reading.num_steps_with_targets == reading.num_skipped and not self._engine.loss_scale.is_dynamic:
            raise DivergedError(f"the gradients of the last {reading.num_skipped} steps up to iteration "
                                f"{self._iteration} were not finite; lower --lr, or lengthen the warm-up")

    def _write(self, kind: str, epoch: int, values: Mapping[str, float | None]) -> None:
        """One line of metrics.jsonl."""
        if self._log.is_speaker:
            record = {"kind": kind, "iteration": self._iteration, "epoch": epoch,
                      **{name: None if value is None else _finite(value) for name, value in values.items()}}
            with (self._folder / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _with_rate(job: Job, rate: float) -> Job:
    return replace(job, flags=replace(job.flags, others={**job.flags.others, "lr": rate}))


def _rows_a_step(config: Config) -> int:
    assert config.training.global_batch_size is not None, "the flags' default fills it in"
    return config.training.global_batch_size


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
