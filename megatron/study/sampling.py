"""Which trials a sweep runs, in which order: a whole grid, some of it by chance, or what optuna suggests.

What was tried is read from the sweep's record, so that one that is started again goes on as it would have.
"""

import importlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.errors import ConfigError
from megatron.study.record import ENDED, FINISHED, SweepRecord
from megatron.study.settings import Setting, Space, Trial, in_order, is_number

SAMPLERS = ("grid", "random", "optuna")
_SEED = 1  # of random and optuna
_SUGGESTIONS = 20  # optuna may suggest what was tried


@dataclass(frozen=True)
class TrialPlan:
    """The trials that are left, of `num_trials`, of which `num_done` have ended."""

    upcoming: Iterator[Trial]
    num_done: int
    num_trials: int


def plan(sampler: str, space: Space, record: SweepRecord, num_settings: int | None) -> TrialPlan:
    """What one of SAMPLERS makes of a space, `num_settings` at most, each with all seeds; raises ConfigError.

    A grid and what is drawn from it take all settings with the first seed, then with the next.
    """
    grid = space.settings()
    if sampler == "optuna":
        count = min(num_settings or 0, len(grid))
        done = [trial for setting in grid for trial in space.trials(setting) if _has_ended(trial, record)]
        return TrialPlan(_suggested(optuna_module(), space, record, count), len(done), count * len(space.seeds))
    if sampler == "random":
        random.Random(_SEED).shuffle(grid)
    trials = [Trial(setting, seed) for seed in space.seeds for setting in grid[:num_settings]]
    left = [trial for trial in trials if not _has_ended(trial, record)]
    return TrialPlan(iter(left), len(trials) - len(left), len(trials))


def _has_ended(trial: Trial, record: SweepRecord) -> bool:
    result = record[trial]
    return result is not None and result.outcome in ENDED


def optuna_module() -> Any:
    """optuna, where it is installed; raises ConfigError."""
    try:
        optuna: Any = importlib.import_module("optuna")
    except ImportError:
        raise ConfigError("--sampler optuna needs optuna, which is not installed; pip install optuna, or take "
                          "--sampler random") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _suggested(optuna: Any, space: Space, record: SweepRecord, count: int) -> Iterator[Trial]:
    """First the settings that were begun, then one suggestion after the other, until `count` are there."""
    grid = space.settings()
    for setting in grid:
        if any(record[trial] is not None for trial in space.trials(setting)):
            yield from (trial for trial in space.trials(setting) if not _has_ended(trial, record))
    while True:
        new = [setting for setting in grid if all(record[trial] is None for trial in space.trials(setting))]
        num_known = len(grid) - len(new)
        if num_known >= count:
            return
        yield from space.trials(_suggestion(optuna, space, record, new, _SEED + num_known))


def _suggestion(optuna: Any, space: Space, record: SweepRecord, new: list[Setting], seed: int) -> Setting:
    """One of `new`, by optuna's TPE: values that are numbers lie on a scale of steps, others have no order."""
    scales = [in_order(values) for values in space.values]
    distributions = {
        name: optuna.distributions.IntDistribution(0, len(scale) - 1) if all(map(is_number, scale)) else
        optuna.distributions.CategoricalDistribution(list(range(len(scale))))
        for name, scale in zip(space.names, scales, strict=True)}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=5))
    for setting in space.settings():
        results = [result for trial in space.trials(setting) if (result := record[trial]) and result.outcome in ENDED]
        losses = [result.loss for result in results if result.loss is not None]
        if not results:
            continue
        is_whole = len(losses) == len(space.seeds) and all(result.outcome == FINISHED for result in results)
        step, loss = min(result.steps or 0 for result in results), float(np.mean(losses)) if losses else None
        study.add_trial(optuna.trial.create_trial(
            params={name: scale.index(value) for name, scale, value in zip(space.names, scales, setting, strict=True)},
            distributions=distributions, value=loss if is_whole else None,
            state=optuna.trial.TrialState.COMPLETE if is_whole else optuna.trial.TrialState.PRUNED,
            intermediate_values={} if is_whole or loss is None else {step: loss}))
    for _ in range(_SUGGESTIONS):
        indices = study.ask(distributions).params
        setting = tuple(scale[indices[name]] for name, scale in zip(space.names, scales, strict=True))
        if setting in new:
            return setting
    return random.Random(seed).choice(new)
