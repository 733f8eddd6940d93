"""What a user watches: Megatron's log lines, TensorBoard, metrics.jsonl, and one picture at the end.

Rank 0 writes everything. When the disk is full that is said once; lines of metrics.jsonl are kept in memory and written
when there is room again, TensorBoard's are lost. `SAVE/metrics.jsonl` holds one JSON object per log event. "kind" is
train, valid or test, valid/NAME or test/NAME for one corpus, and valid_ema, test_ema, ... for the average of the
weights. "consumed_residues", "training_s" and "consumed_flops" are the run's totals so far, "written_s" the time of
writing in seconds since 1970, "memory_gib" the peak memory of the rank that used most, "measured_on" a digest of the
data that an evaluation used. A number that does not exist (the loss of steps without targets, or of a run that
diverged) is null.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.checkpoint.metrics import (
    MEASURED_ON,
    MetricsWriter,
    evaluations_of,
    forget_after,
    loss_name,
    read_records,
)
from megatron.checkpoint.places import BOARD, METRICS_FILE
from megatron.config import CheckpointConfig, LoggingConfig
from megatron.data.rows.baselines import Baselines
from megatron.errors import OutputError
from megatron.log import Log, in_time
from megatron.train.observation.observers import Observer
from megatron.train.step.evaluate import Evaluation, perplexity
from megatron.train.step.meters import Reading, Totals


@dataclass(frozen=True)
class TrainingFacts:
    """What one log event of training says besides what was measured: how far the run is, and its settings there."""

    iteration: int
    num_iterations: int  # at the end of the run
    consumed_samples: int
    totals: Totals | None
    learning_rate: float
    group_rates: Mapping[str, float]  # learning rates of the groups of parameters that have their own
    global_batch_size: int
    loss_scale: float
    peak_flops: float  # measured FLOP/s of all ranks together
    is_peak_of_bf16: bool = False  # the peak is bf16's though the run computes in FP8, which may exceed it
    weight_decay: float | None = None  # None: it stays the same over the run
    num_ranks: int = 1
    memory_gib: float | None = None
    time_left_s: float | None = None
    times_of_ranks: Mapping[str, Any] = field(default_factory=dict)  # fields for the metrics, from `Stragglers.look`


class Events:
    """Writes the events of one run; one resumed at `iteration` continues the files it left, without later records.

    `observers`: what else receives each record (wandb, Prometheus, ...).
    """

    def __init__(self, checkpoint: CheckpointConfig, logging: LoggingConfig, log: Log, iteration: int,
                 observers: Sequence[Observer] = ()) -> None:
        self._log, self._observers = log, observers
        self._metrics: MetricsWriter | None = None
        self._board: Any = None
        if not log.is_speaker:
            return
        if checkpoint.save:
            metrics = Path(checkpoint.save) / METRICS_FILE
            with _writing(metrics, f"--save {checkpoint.save}"):
                metrics.parent.mkdir(parents=True, exist_ok=True)
                forget_after(metrics, iteration)
            self._metrics = MetricsWriter(metrics, log)
        folder = logging.tensorboard_dir or (str(Path(checkpoint.save) / BOARD) if checkpoint.save else None)
        if folder:
            from megatron.train.observation.board import Board  # only this rank needs it

            flag = f"--tensorboard-dir {folder}" if logging.tensorboard_dir else f"--save {checkpoint.save}"
            with _writing(folder, flag):
                self._board = Board(folder, first_step=iteration + 1)

    def train(self, reading: Reading, facts: TrainingFacts) -> None:
        """Write one log event of training, on the steps of `reading`."""
        values = _values_of(reading, facts)
        self._write("train", facts.iteration, facts.consumed_samples, facts.totals, values,
                    num_iterations=facts.num_iterations, num_ranks=facts.num_ranks)
        self._log.line(_line_of(reading, facts))

    def evaluation(self, kind: str, iteration: int, consumed_samples: int, totals: Totals | None,
                   result: Evaluation, measured_on: str | None = None, is_only_logged: bool = False) -> None:
        """Write the result of evaluating `kind` ("valid", "test", or one corpus, "valid/NAME") after `iteration` steps.

        `measured_on`: a digest of the data that it used. `is_only_logged`: only log it, without writing it to any file.
        """
        if not is_only_logged:
            self._write(kind, iteration, consumed_samples, totals, asdict(result), {MEASURED_ON: measured_on})
        self._log.line(f" {loss_name(kind)} at iteration {iteration} | lm loss value: {_text(result.loss, '.6E')} | "
                       f"lm loss PPL: {_text(result.perplexity, '.6E')} | "
                       f"masked accuracy: {_text(result.masked_accuracy, '.4f')}")

    def is_other(self, kind: str, measured_on: str) -> bool:
        """Whether --save holds evaluations of this kind, the last of which were on other data than `measured_on`."""
        if self._metrics is None:
            return False
        return any(record.get(MEASURED_ON) != measured_on
                   for record in evaluations_of(read_records(self._metrics.path), kind)[0])

    def before(self) -> dict[str, float | None]:
        """The loss of each kind of evaluation before the first step, as far as --save holds it.

        Only where it used the same data as the last evaluation of that kind.
        """
        if self._metrics is None:
            return {}
        records = read_records(self._metrics.path)
        return {kind: record.get("loss") for kind in {record["kind"] for record in records}
                for record in evaluations_of(records, kind)[0] if record["iteration"] == 0}

    def picture(self, baselines: Baselines | None) -> Path | None:
        """Draw the loss curves of metrics.jsonl with the baselines; returns the file, or None if none was written."""
        if self._metrics is None:
            return None
        from megatron.train.observation.picture import draw_losses  # matplotlib: slow to import, needed once

        try:
            return draw_losses(self._metrics.path, baselines)
        except OSError as error:  # the run is complete without it
            self._log.line(f"note: no picture of the losses could be written ({error})")
            return None

    def close(self) -> None:
        """Write what is left, and close the files."""
        if self._metrics is not None:
            self._metrics.close()
        if self._board is not None:
            with suppress(OSError):  # the disk had refused before, and that was said
                self._board.close()

    def _write(self, kind: str, iteration: int, consumed_samples: int, totals: Totals | None,
               values: dict[str, Any], marks: Mapping[str, str | None] | None = None, **facts: int) -> None:
        """Write one record to the file, to TensorBoard and to the observers.

        `values` become curves. `facts` are numbers that stay the same over a run, so TensorBoard does not get them;
        `marks` are no numbers, so only the file gets them.
        """
        record = {"kind": kind, "iteration": iteration, "consumed_samples": consumed_samples,
                  "written_s": round(time.time(), 3), **(asdict(totals) if totals else {}), **facts, **values}
        if self._metrics is not None:
            self._metrics.add(record | dict(marks or {}))
        if self._board is not None:
            try:
                self._board.scalars(iteration, {f"{kind}/{name}": value for name, value in values.items()
                                                if not isinstance(value, list | None)})
            except OSError as error:
                self._log.line(f"note: {self._board.folder} cannot be written ({error.strerror or error}): nothing "
                               "more of this run goes to TensorBoard until it is started again")
                self.close()
                self._board = None
        for observer in self._observers:
            observer.record(record)


def _values_of(reading: Reading, facts: TrainingFacts) -> dict[str, Any]:
    """The numbers of a log event of training, by their names in metrics.jsonl."""
    return {
        "loss": reading.loss, "perplexity": None if reading.loss is None else perplexity(reading.loss),
        "masked_accuracy": reading.masked_accuracy,
        "learning_rate": facts.learning_rate,
        **{f"learning_rate_{group}": rate for group, rate in facts.group_rates.items()},
        **({} if facts.weight_decay is None else {"weight_decay": facts.weight_decay}),
        "grad_norm": reading.grad_norm, "loss_scale": facts.loss_scale,
        "global_batch_size": facts.global_batch_size, "tokens_per_s": reading.num_tokens / reading.elapsed_s,
        "residues_per_s": reading.num_residues / reading.elapsed_s,
        "model_tflops": reading.model_flops / reading.elapsed_s / 1e12,
        "share_of_peak": _share_of_peak(reading, facts), "skipped_iterations": reading.num_skipped,
        "memory_gib": facts.memory_gib, "time_left_s": facts.time_left_s, **facts.times_of_ranks,
    }


def _line_of(reading: Reading, facts: TrainingFacts) -> str:
    """Megatron's log line, with what it lacks at its end."""
    share, peak = _share_of_peak(reading, facts), "bf16 peak" if facts.is_peak_of_bf16 else "peak"
    return (
        f" iteration {facts.iteration:8d}/{facts.num_iterations:8d} | "
        f"consumed samples: {facts.consumed_samples:12d} | "
        f"elapsed time per iteration (ms): {1000 * reading.elapsed_s / reading.num_steps:.1f} | "
        f"learning rate: {facts.learning_rate:.3E}{_of_groups(facts.group_rates)} | "
        f"global batch size: {facts.global_batch_size:5d} | "
        f"lm loss: {_text(reading.loss, '.6E')} | loss scale: {facts.loss_scale:.1f} | "
        f"grad norm: {_text(reading.grad_norm, '.3f')} | "
        f"number of skipped iterations: {reading.num_skipped:3d} | "
        f"masked accuracy: {_text(reading.masked_accuracy, '.4f')} | "
        f"residues per second: {reading.num_residues / reading.elapsed_s:.0f} | "
        f"model TFLOP/s: {reading.model_flops / reading.elapsed_s / 1e12:.3f} "
        f"{'' if share is None else f'({100 * share:.0f} % of {peak}) '}|"
        f"{'' if facts.memory_gib is None else f' memory: {facts.memory_gib:.2f} GiB |'}"
        f"{f' time left: {in_time(facts.time_left_s)} |' if facts.time_left_s else ''}")


def _share_of_peak(reading: Reading, facts: TrainingFacts) -> float | None:
    """The model's FLOP/s as a share of the peak; None above 1, which means the peak was measured on a busy machine."""
    share = reading.model_flops / reading.elapsed_s / facts.peak_flops
    return share if share <= 1 or facts.is_peak_of_bf16 else None


def _of_groups(rates: Mapping[str, float]) -> str:
    return f" ({', '.join(f'{group} {rate:.3E}' for group, rate in rates.items())})" if rates else ""


def _text(value: float | None, form: str) -> str:
    """A number as the log shows it; "none" where there was nothing to measure."""
    return "none" if value is None else format(value, form)


@contextmanager
def _writing(path: str | Path, flag: str) -> Iterator[None]:
    """Turns an OSError of the block into an OutputError that names `path` and `flag`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror or error}); checkpoints are untouched. Make "
                          f"room, or give another folder than {flag}") from error
