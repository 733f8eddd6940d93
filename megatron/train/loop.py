"""The training loop: steps, log events, evaluations, checkpoints, and the ways in which a run ends."""

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.claim import Claim
from megatron.checkpoint.metrics import loss_name
from megatron.checkpoint.places import BOARD, METRICS_FILE, place_of
from megatron.data.batches.batch import Batch
from megatron.data.batches.loader import batches
from megatron.data.rows.baselines import Baselines, frequency_baselines
from megatron.data.rows.fixed_masks import FIXED
from megatron.errors import SaveError
from megatron.model.protein_model import compute_dtype
from megatron.parallel.waits import read
from megatron.train.evaluations import Evaluations, num_rows_evaluated
from megatron.train.guards.faults import Faults
from megatron.train.guards.guard import Guard, WrongSteps
from megatron.train.guards.stragglers import Stragglers
from megatron.train.observation.events import Events, TrainingFacts
from megatron.train.observation.memory import count_from_here, peak_memory_gib
from megatron.train.observation.observers import Observer
from megatron.train.observation.pace import Pace
from megatron.train.observation.profiler import StepProfiler
from megatron.train.setup.peak import measured_peak_flops
from megatron.train.setup.run import Run
from megatron.train.state import is_due
from megatron.train.step.evaluate import Evaluation
from megatron.train.step.meters import Meters, StepSums
from megatron.train.step.train_step import TrainStep
from megatron.train.stop import StopRequests
from megatron.train.tolerant_saver import GOES_ON, TolerantSaver


def train(run: Run, requests: StopRequests, claim: Claim | None, faults: Faults, suspect: WrongSteps | None = None,
          observers: Sequence[Observer] = ()) -> None:
    """Train `run` to its end, or until it is asked to stop; then evaluate it and print where everything is.

    `claim`: on rank 0, the right to write into `--save`. `suspect`: the steps because of which the run went back to its
    last checkpoint, if it did. `observers`: on rank 0, what else receives the metrics (wandb, Prometheus, ...).
    Raises RewindError to have the run rebuilt from its last checkpoint, and SaveError if the last save failed.
    """
    config = run.config.checkpoint
    events = Events(config, run.config.logging, run.log, run.state.iteration, observers)
    saver = TolerantSaver(config, run.mesh, claim, run.log, run.state.iteration, faults.meet_disk) if (
        config.save) else None
    with closing(events), closing(saver) if saver else nullcontext():
        baselines, meters = _baselines(run), Meters(run.mesh.world, run.mesh.device, run.mesh.waits)
        meters.load_state(run.meters)
        meters.pause()  # until the first step
        evaluations = Evaluations(run, events, requests, saver, meters)
        if run.config.training.eval_at_start and run.state.iteration == 0:
            evaluations.of_all_splits()
        if not Training(run, events, requests, saver, meters, evaluations, faults, Guard(run, suspect)).finish():
            return
        results = evaluations.of_all_splits()
        if evaluations.was_cut_short:
            run.log.line("stopped before the evaluation was done: the same command does it")
            if saver is not None:
                saver.check()
            return
        if saver is not None:
            saver.finish()
        is_own = not run.is_other_evaluated
        picture = events.picture(baselines) if is_own else None
    _summary(run, results, events.before() if is_own else {}, baselines, picture)
    if saver is not None:
        saver.check()


@dataclass(frozen=True)
class DueAfterStep:
    """What follows one step, decided once from the step's number and from what all ranks have agreed on."""

    end: bool  # it was the last step
    log: bool
    evaluation: bool
    save: bool
    stop: bool  # a rank was asked to stop: no evaluation then
    exit: bool  # by --exit-interval


class Training:
    """The training steps of one run, with the log events, evaluations and checkpoints between them."""

    def __init__(self, run: Run, events: Events, requests: StopRequests, saver: TolerantSaver | None, meters: Meters,
                 evaluations: Evaluations, faults: Faults, guard: Guard) -> None:
        self._run, self._events, self._requests, self._saver = run, events, requests, saver
        self._faults, self._guard = faults, guard
        self._evaluations, self._stragglers = evaluations, Stragglers(run.mesh, run.log)
        self._began_at = run.state.iteration
        self._last_iteration, self._last_sample = run.sizes.end(run.state)
        self._meters = meters
        self._step = TrainStep(run.engine, meters, judge=run.judge if run.config.guards.on_spike == "skip" else None)
        self._saved_at_s = time.monotonic()

    def finish(self) -> bool:
        """Take the remaining steps, stopping early if asked to, and save; returns whether the end was reached."""
        run, config, mesh = self._run, self._run.config, self._run.mesh
        if run.state.iteration >= self._last_iteration:
            run.log.line(f"training is complete at iteration {run.state.iteration}{self._how_far_past()}")
            return True
        self._peak_flops = config.logging.peak_tflops * 1e12 if config.logging.peak_tflops else measured_peak_flops(
            compute_dtype(config.precision), mesh.device, config.training.micro_batch_size * config.data.seq_length,
            config.model)
        count_from_here(mesh)
        loader = batches(run.data.train, run.shape, start_sample=run.state.consumed_samples, stop_sample=None,
                         micro_batch_size=config.training.micro_batch_size, data_rank=mesh.data.rank,
                         data_size=mesh.data.size, num_workers=config.data.num_workers, pin=mesh.device.type == "cuda",
                         seed=config.training.seed, left_out=run.state.left_out)
        bar = run.log.progress(self._last_iteration, run.state.iteration, unit="step", label="training",
                               has_own_lines=True)
        profiler = StepProfiler(config.logging, config.checkpoint.save, mesh, run.log)
        with closing(loader), closing(bar), closing(profiler):
            if run.is_evaluation_due:
                self._evaluations.of_split("valid", self._meters.totals())
            self._meters.resume()
            self._pace = Pace(run.state, self._last_sample)
            is_stopping = self._requests.agreed(mesh)
            while run.state.iteration < self._last_iteration and not is_stopping:
                with profiler.step():
                    is_stopping = self._advance(loader)
                bar.update()
            if self._saver is not None:
                self._saver.finish()
                if self._saver.saved_at != run.state.iteration:
                    self._save(f"No other save follows: the run ends with status {SaveError.exit_status}")
        if run.state.iteration < self._last_iteration:
            if self._saver is not None:
                self._saver.check()
            run.log.line(f"stopped {self._where_stopped()}")
        return run.state.iteration >= self._last_iteration

    def _how_far_past(self) -> str:
        """Words for the log when the run is already past the end that a flag sets; empty when it is exactly there."""
        state, training = self._run.state, self._run.config.training
        flag, end, done = (("--train-iters", training.train_iters, state.iteration) if training.train_iters else
                           ("--train-samples", training.train_samples, state.consumed_samples))
        return f": {done} are done, and {flag} is {end}" if end is not None and done > end else ""

    def _where_stopped(self) -> str:
        iteration, folder = self._run.state.iteration, self._run.config.checkpoint.save
        if iteration == self._began_at:
            return f"at iteration {iteration} before another step: there is nothing new to save" if iteration else (
                "before the first step: there is nothing to save")
        where = f"saved in {folder}: the same command goes on from there" if folder else "not saved (no --save)"
        return f"at iteration {iteration}; {where}"

    def _advance(self, loader: Iterator[Batch]) -> bool:
        """Train on one global batch, then log, evaluate and save where that is due; returns whether to stop."""
        run, state = self._run, self._run.state
        rows = run.sizes.at(state.consumed_samples)
        learning_rate = run.schedule.learning_rate(state.consumed_samples)
        weight_decay = run.schedule.weight_decay(state.consumed_samples)
        num_stopping, num_saving = self._take_step(loader, rows, learning_rate, weight_decay)
        state.iteration += 1
        state.consumed_samples += rows
        due = self._due(num_stopping, num_saving)
        if due.log:
            self._log(learning_rate, weight_decay, rows)
        # Waits for the device, so that the steps' time is complete before the clock is paused.
        totals = self._meters.totals() if due.evaluation or due.save else None
        self._meters.pause()
        if due.evaluation and not due.stop:
            self._evaluations.of_split("valid", totals)
        run.is_evaluation_due = due.evaluation and (due.stop or self._evaluations.was_cut_short)
        if due.save:
            self._save("It is tried once more" if due.end else GOES_ON)
        elif self._saver is not None:
            self._saver.poll()
        is_stopping = due.stop
        if due.evaluation or due.save:  # they take long: ask again
            is_stopping = is_stopping or self._requests.agreed(run.mesh)
        self._meters.resume()
        return is_stopping or due.exit

    def _take_step(self, loader: Iterator[Batch], rows: int, learning_rate: float,
                   weight_decay: float | None) -> Sequence[int]:
        """Train on the next `rows` rows; returns how many ranks want to stop and to save, as `TrainStep` counts them.
        """
        run, state = self._run, self._run.state
        if weight_decay is not None:
            run.engine.optimizer.set_weight_decay(weight_decay)
        micro_batches = list(itertools.islice(loader, rows // run.sizes.rows_a_micro_step))
        wishes = self._requests.wants_stop(), self._is_time_to_save()
        self._guard.note(rows)
        run.mesh.progress.step = state.iteration + 1
        factor = self._faults.factor(state.iteration + 1, state.sample_at(state.consumed_samples))
        return self._step(micro_batches, learning_rate, wishes, factor).read()

    def _due(self, num_stopping: int, num_saving: int) -> DueAfterStep:
        """What is due after the step just taken, the same on all ranks."""
        config, iteration = self._run.config, self._run.state.iteration
        is_end = iteration == self._last_iteration
        return DueAfterStep(
            end=is_end,
            log=is_end or is_due(config.logging.log_interval, iteration),
            evaluation=not is_end and is_due(config.training.eval_interval, iteration),
            save=is_due(config.checkpoint.save_interval, iteration) or num_saving > 0 or (
                self._guard.is_before_suspect()),
            stop=num_stopping > 0,
            exit=is_due(config.training.exit_interval, iteration))

    def _log(self, learning_rate: float, weight_decay: float | None, rows: int) -> None:
        """Log the steps since the last log event; all ranks call this, and those that went wrong raise here."""
        run, reading = self._run, self._meters.read()
        self._guard.look(reading.steps)
        if self._saver is not None:
            self._saver.check_claim()
        self._events.train(reading, TrainingFacts(
            run.state.iteration, self._last_iteration, run.state.consumed_samples, self._meters.totals(),
            learning_rate=learning_rate, group_rates=run.engine.optimizer.learning_rates(learning_rate),
            weight_decay=weight_decay, global_batch_size=rows, loss_scale=float(read(run.engine.loss_scale.value)),
            peak_flops=self._peak_flops * run.mesh.world.size, num_ranks=run.mesh.world.size,
            memory_gib=peak_memory_gib(run.mesh), time_left_s=self._pace.time_left_s(reading, run.state),
            times_of_ranks=self._stragglers.look(reading),
            is_peak_of_bf16=run.config.precision.fp8 is not None and not run.config.logging.peak_tflops))

    def _is_time_to_save(self) -> bool:
        """Whether --save-interval-minutes have passed on rank 0's clock, False on all others.

        True only once for each checkpoint, since the ranks read the answer one step later.
        """
        minutes, now_s = self._run.config.checkpoint.save_interval_minutes, time.monotonic()
        if minutes is None or self._run.mesh.world.rank or now_s - self._saved_at_s < 60 * minutes:
            return False
        self._saved_at_s = now_s
        return True

    def _save(self, outlook: str) -> None:
        """Write a checkpoint of this step, if there is a --save; `outlook`: what happens next if that fails."""
        run = self._run
        if self._saver is None:
            return
        meters = self._meters.state()
        self._guard.look([StepSums(*step) for step in meters["steps"]])  # raises before steps that went wrong are saved
        self._saver.save(run.state.iteration, run.parts(), run.facts() | {"meters": meters}, outlook)
        self._saved_at_s = time.monotonic()


def _baselines(run: Run) -> Baselines | None:
    """The loss of letter frequencies alone on the validation split, which is printed; None on all ranks but the first,
    and where the split holds no residue."""
    if run.data.valid is None or not run.log.is_speaker:
        return None
    baselines = frequency_baselines(run.data.train.residue_counts(), run.data.valid.residue_counts(),
                                    run.vocab.residue_ids, FIXED)
    if baselines is None:
        return None
    run.log.line(f"letter-frequency baseline on {_of_baselines(run)}: {baselines.letters:.4f} nats, or "
                 f"{baselines.visible:.4f} with the letters that masking leaves visible")
    return baselines


def _of_baselines(run: Run) -> str:
    """Which proteins the baselines cover, in words; says so where the losses beside them cover fewer."""
    valid = run.data.valid
    if valid is None or num_rows_evaluated(run, valid) == valid.num_epoch_rows(0):
        return "validation"
    return "all validation proteins, including those that --eval-iters leaves out"


def _summary(run: Run, results: dict[str, Evaluation], before: dict[str, float | None], baselines: Baselines | None,
             picture: Path | None) -> None:
    folder = run.config.checkpoint.save
    rows = [(loss_name(kind), result.in_words(before.get(kind))) for kind, result in results.items()]
    if baselines is not None:
        rows.insert(sum(kind.startswith("valid") for kind in results), (
            "letter frequencies", f"{baselines.letters:.4f} nats: the baseline on {_of_baselines(run)} "
            f"({baselines.visible:.4f} with the letters that masking leaves visible)"))
    if folder:
        checkpoint = place_of(Path(folder), run.state.iteration)
        rows += [("checkpoint", str(checkpoint))] if checkpoint.exists() else []
    if folder and not run.is_other_evaluated:
        rows += [("metrics", str(Path(folder) / METRICS_FILE)),
                 *([("loss curves", str(picture))] if picture else []),
                 ("TensorBoard", run.config.logging.tensorboard_dir or str(Path(folder) / BOARD))]
    width = max(18, *(len(name) for name, _ in rows)) + 2 if rows else 0
    is_last = not folder or run.is_other_evaluated  # else the last line is where the report is
    run.log.line("\n".join(["", *(f"  {name:<{width}}{value}" for name, value in rows), *([""] if is_last else [])]))
