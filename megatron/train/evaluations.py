"""All evaluations of a run, logged as they finish: of splits, of corpora, and by the average of the weights."""

from megatron.checkpoint.metrics import OF_AVERAGE, loss_name
from megatron.checkpoint.saving import Saver
from megatron.data.rows.blend import BlendedDataset
from megatron.data.rows.dataset import Dataset, corpora_of, measured_on
from megatron.train.observation.events import Events
from megatron.train.setup.run import Run
from megatron.train.step.evaluate import Evaluation, evaluate
from megatron.train.step.meters import Meters, Totals
from megatron.train.stop import StopRequests


class Evaluations:
    """Runs the evaluations of one run; each ends early, without a result, as soon as a rank wants to stop."""

    def __init__(self, run: Run, events: Events, requests: StopRequests, saver: Saver | None, meters: Meters) -> None:
        self._run, self._events, self._requests, self._saver, self._meters = run, events, requests, saver, meters
        self._was_complete = run.state.iteration >= run.sizes.last_iteration(run.state)
        self.was_cut_short = False  # whether an evaluation has ended early

    def of_all_splits(self) -> dict[str, Evaluation]:
        """Evaluates validation and test; returns the results by kind, as `of_split` does."""
        totals = self._meters.totals()
        return {kind: result for split in ("valid", "test") for kind, result in self.of_split(split, totals).items()}

    def of_split(self, split: str, totals: Totals | None) -> dict[str, Evaluation]:
        """Evaluates "valid" or "test"; returns results by kind: "valid", "valid/NAME" with --eval-each, "valid_ema".

        With --ema everything is evaluated again by the average of the weights, except before the first step, where the
        two are the same. `totals`: the run's, to be logged with the results.
        """
        results = self._by_weights(split, split, totals)
        if self._run.engine.average is not None and self._run.state.iteration:
            with self._run.engine.averaged():
                results |= self._by_weights(split, f"{split}{OF_AVERAGE}", totals)
        return results

    def _by_weights(self, split: str, whole_kind: str, totals: Totals | None) -> dict[str, Evaluation]:
        run, results = self._run, dict[str, Evaluation]()
        whole, training, state = getattr(run.data, split), run.config.training, run.state
        datasets: dict[str, Dataset] = {} if whole is None else {whole_kind: whole}
        if training.eval_each and whole is not None and isinstance(run.data.train, BlendedDataset):
            datasets |= {f"{whole_kind}/{name}": corpus for name, corpus in corpora_of(whole).items()}
        for kind, dataset in datasets.items():
            if self.was_cut_short or self._requests.agreed(run.mesh):
                self.was_cut_short = True
                break
            num_rows = num_rows_evaluated(run, dataset)
            digest = measured_on(dataset, num_rows)
            if kind == split:
                self._look_at(split, digest)
            result = evaluate(run.engine, dataset, run.shape, run.log, num_rows=num_rows,
                              label="validation" if split == "valid" else split,
                              wants_stop=lambda: self._requests.agreed(run.mesh))
            if result is None:
                self.was_cut_short = True
                break
            results[kind] = result
            self._events.evaluation(kind, state.iteration, state.consumed_samples, totals, result, digest,
                                    is_only_logged=run.is_other_evaluated)
            if self._saver is not None and kind == "valid" and result.loss is not None and not run.is_other_evaluated:
                self._saver.note_validation(state.iteration, result.loss, digest)
        return results

    def _look_at(self, split: str, digest: str) -> None:
        """Notes, and logs, that a run which was already complete is now evaluated on other data than before."""
        run = self._run
        if self._was_complete and not run.is_other_evaluated and self._events.is_other(split, digest):
            run.is_other_evaluated = True
            run.log.line(f"note: the run is complete, and its {loss_name(split)} was measured on other data "
                         "(--data-path, --split, --seq-length or --eval-iters differed), or does not say on which: the "
                         "results below are only printed, and its own metrics, best and report stay as they are")


def num_rows_evaluated(run: Run, dataset: Dataset) -> int:
    """How many rows of a split an evaluation is of: all, or what --eval-iters leaves of them."""
    num_rows = dataset.num_epoch_rows(0)
    return min(num_rows, run.config.training.eval_iters * run.sizes.final or num_rows)
