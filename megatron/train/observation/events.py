"""What a user watches: Megatron's log lines, TensorBoard, metrics.jsonl, and one picture at the end.

Everything is written by rank 0; what the disk refuses is said once, kept, and written once there is room again
(metrics.jsonl), or left out (TensorBoard). `SAVE/metrics.jsonl` holds one JSON object a log event: "kind" is train,
valid, test, or valid/NAME and test/NAME of one corpus; valid_ema, test_ema and so on are of the average of the weights.
"consumed_residues", "training_s" and "consumed_flops" are what the run has taken up to there, "written_s" is when that
was written, in seconds since 1970; "memory_gib" is the most that a rank has held.
A number that means nothing (the loss of steps without targets, of a run that diverged) is null there. "measured_on" is
a digest of what an evaluation is of.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.checkpoint.metrics import MEASURED_ON, evaluations_of, forget_after, loss_name, read_records
from megatron.checkpoint.places import BOARD, METRICS_FILE
from megatron.config import CheckpointConfig, LoggingConfig
from megatron.data.rows.baselines import Baselines
from megatron.errors import OutputError
from megatron.log import Log, in_time
from megatron.train.observation.observers import Observer
from megatron.train.step.evaluate import Evaluation, perplexity
from megatron.train.step.meters import Reading, Totals


class Events:
    """Writes the events of one run, going on where a run that was resumed at `iteration` left off.

    `observers`: who else is told of them.
    """

    def __init__(self, checkpoint: CheckpointConfig, logging: LoggingConfig, log: Log, iteration: int,
                 observers: Sequence[Observer] = ()) -> None:
        self._log, self._observers = log, observers
        self._metrics: Path | None = None
        self._unwritten = b""  # lines of metrics.jsonl that the disk has refused so far
        self._board: Any = None
        if not log.is_speaker:
            return
        if checkpoint.save:
            self._metrics = Path(checkpoint.save) / METRICS_FILE
            with _writing(self._metrics, f"--save {checkpoint.save}"):
                self._metrics.parent.mkdir(parents=True, exist_ok=True)
                forget_after(self._metrics, iteration)
        folder = logging.tensorboard_dir or (str(Path(checkpoint.save) / BOARD) if checkpoint.save else None)
        if folder:
            from megatron.train.observation.board import Board  # only this rank needs it

            flag = f"--tensorboard-dir {folder}" if logging.tensorboard_dir else f"--save {checkpoint.save}"
            with _writing(folder, flag):
                self._board = Board(folder, first_step=iteration + 1)

    def train(self, iteration: int, num_iterations: int, consumed_samples: int, totals: Totals | None,
              reading: Reading, *, learning_rate: float, group_rates: Mapping[str, float], global_batch_size: int,
              loss_scale: float, peak_flops: float, weight_decay: float | None = None, num_ranks: int = 1,
              memory_gib: float | None = None, time_left_s: float | None = None,
              of_ranks: Mapping[str, Any] | None = None, is_peak_of_bf16: bool = False) -> None:
        """One log event of training, up to which the run has taken `totals`.

        `weight_decay`: where it has a course; `group_rates`: the learning rates of groups that have their own;
        `peak_flops`: the measured FLOP/s of all ranks together, `is_peak_of_bf16`: in bf16, though the run computes in
        FP8, which may be faster; `memory_gib`, `time_left_s`: where they are known;
        `of_ranks`: the times of each, as Stragglers has them.
        """
        flops = reading.model_flops / reading.elapsed_s
        # Above 1 the peak was measured too low, as the machine was at something else: such a share means nothing.
        share = flops / peak_flops if flops <= peak_flops or is_peak_of_bf16 else None
        peak = "bf16 peak" if is_peak_of_bf16 else "peak"
        values = {
            "loss": reading.loss, "perplexity": None if reading.loss is None else perplexity(reading.loss),
            "masked_accuracy": reading.masked_accuracy,
            "learning_rate": learning_rate,
            **{f"learning_rate_{group}": rate for group, rate in group_rates.items()},
            **({} if weight_decay is None else {"weight_decay": weight_decay}),
            "grad_norm": reading.grad_norm, "loss_scale": loss_scale,
            "global_batch_size": global_batch_size, "tokens_per_s": reading.num_tokens / reading.elapsed_s,
            "residues_per_s": reading.num_residues / reading.elapsed_s, "model_tflops": flops / 1e12,
            "share_of_peak": share, "skipped_iterations": reading.num_skipped,
            "memory_gib": memory_gib, "time_left_s": time_left_s, **(of_ranks or {}),
        }
        self._write("train", iteration, consumed_samples, totals, values, num_iterations=num_iterations,
                    num_ranks=num_ranks)
        self._log.line(
            f" iteration {iteration:8d}/{num_iterations:8d} | consumed samples: {consumed_samples:12d} | "
            f"elapsed time per iteration (ms): {1000 * reading.elapsed_s / reading.num_steps:.1f} | "
            f"learning rate: {learning_rate:.3E}{_of_groups(group_rates)} | "
            f"global batch size: {global_batch_size:5d} | "
            f"lm loss: {_text(reading.loss, '.6E')} | loss scale: {loss_scale:.1f} | "
            f"grad norm: {_text(reading.grad_norm, '.3f')} | "
            f"number of skipped iterations: {reading.num_skipped:3d} | "
            f"masked accuracy: {_text(reading.masked_accuracy, '.4f')} | "
            f"residues per second: {values['residues_per_s']:.0f} | model TFLOP/s: {flops / 1e12:.3f} "
            f"{'' if share is None else f'({100 * share:.0f} % of {peak}) '}|"
            f"{'' if memory_gib is None else f' memory: {memory_gib:.2f} GiB |'}"
            f"{f' time left: {in_time(time_left_s)} |' if time_left_s else ''}")

    def evaluation(self, kind: str, iteration: int, consumed_samples: int, totals: Totals | None,
                   result: Evaluation, measured_on: str | None = None, is_told_alone: bool = False) -> None:
        """The result of evaluating "valid" or "test", or of it a corpus ("valid/NAME"), after `iteration` steps.

        `measured_on`: the digest of what it is of; `is_told_alone`: whether it gets its line, and is written nowhere.
        """
        if not is_told_alone:
            self._write(kind, iteration, consumed_samples, totals, asdict(result), {MEASURED_ON: measured_on})
        self._log.line(f" {loss_name(kind)} at iteration {iteration} | lm loss value: {_text(result.loss, '.6E')} | "
                       f"lm loss PPL: {_text(result.perplexity, '.6E')} | "
                       f"masked accuracy: {_text(result.masked_accuracy, '.4f')}")

    def is_other(self, kind: str, measured_on: str) -> bool:
        """Whether --save holds evaluations of a kind, the last of which was of something else."""
        if self._metrics is None:
            return False
        return any(record.get(MEASURED_ON) != measured_on
                   for record in evaluations_of(read_records(self._metrics), kind)[0])

    def before(self) -> dict[str, float | None]:
        """The losses of each kind of evaluation before the first step, as far as --save holds them.

        They are of what the last ones are of.
        """
        if self._metrics is None:
            return {}
        records = read_records(self._metrics)
        return {kind: record.get("loss") for kind in {record["kind"] for record in records}
                for record in evaluations_of(records, kind)[0] if record["iteration"] == 0}

    def picture(self, baselines: Baselines | None) -> Path | None:
        """Draw the loss curves of metrics.jsonl with the baselines; returns the file, or None where none is written."""
        if self._metrics is None:
            return None
        from megatron.train.observation.picture import draw_losses  # matplotlib: slow to import, needed once

        try:
            return draw_losses(self._metrics, baselines)
        except OSError as error:  # the run is complete without it
            self._log.line(f"note: no picture of the losses could be written ({error})")
            return None

    def close(self) -> None:
        """Close what is open."""
        if self._unwritten:
            self._append(b"")
        if self._board is not None:
            with suppress(OSError):  # the disk had refused before, and that was said
                self._board.close()

    def _write(self, kind: str, iteration: int, consumed_samples: int, totals: Totals | None,
               values: dict[str, Any], marks: Mapping[str, str | None] | None = None, **facts: int) -> None:
        """`facts`: what has no course, and so none on the board; `marks`: what is no number, for the file alone."""
        record = {"kind": kind, "iteration": iteration, "consumed_samples": consumed_samples,
                  "written_s": round(time.time(), 3), **(asdict(totals) if totals else {}), **facts, **values}
        if self._metrics is not None:
            numbers = {name: value if isinstance(value, list | None) or math.isfinite(value) else None
                       for name, value in values.items()}
            self._append(f"{json.dumps(record | numbers | dict(marks or {}))}\n".encode())
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

    def _append(self, line: bytes) -> None:
        assert self._metrics is not None
        was_refused, self._unwritten = bool(self._unwritten), self._unwritten + line
        size = None
        try:
            size = self._metrics.stat().st_size if self._metrics.exists() else 0
            with self._metrics.open("ab") as file:
                file.write(self._unwritten)
            self._unwritten = b""
        except OSError as error:
            with suppress(OSError):
                if size is not None:
                    os.truncate(self._metrics, size)  # no half a line
            if not was_refused:
                self._log.line(f"note: {self._metrics} cannot be written ({error.strerror or error}): its lines are "
                               "kept, and written once there is room again")


def _of_groups(rates: Mapping[str, float]) -> str:
    return f" ({', '.join(f'{group} {rate:.3E}' for group, rate in rates.items())})" if rates else ""


def _text(value: float | None, form: str) -> str:
    """A number as the log shows it, or `none` where there was nothing to measure."""
    return "none" if value is None else format(value, form)


@contextmanager
def _writing(path: str | Path, flag: str) -> Iterator[None]:
    """Raises OutputError where the disk refuses what the block writes."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror or error}); checkpoints are untouched. Make "
                          f"room, or give another folder than {flag}") from error
