"""Chooses the trials of a sweep and their order: the whole grid, a random part of it, or suggestions by optuna.

Past trials are read from the sweep's record, so that a sweep that is started again continues as if never stopped.
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
_SEED = 1  # for random and optuna
_SUGGESTIONS = 20  # how often to ask optuna, which may suggest settings that were tried already


@dataclass(frozen=True)
class TrialPlan:
    """The trials that are left to run; of all `num_trials`, `num_done` have ended."""

    upcoming: Iterator[Trial]
    num_done: int
    num_trials: int


def plan(sampler: str, space: Space, record: SweepRecord, num_settings: int | None) -> TrialPlan:
    """The trials that one of SAMPLERS chooses from a space: at most `num_settings` settings, each with all seeds.

    "grid" and "random" run all settings with the first seed, then all with the next. Raises ConfigError if optuna is
    needed and missing.
    """
    grid = space.settings()
    if sampler == "optuna":
        count = min(num_settings or 0, len(grid))
        done = [trial for setting in grid for trial in space.trials(setting) if record.has_ended(trial)]
        return TrialPlan(_suggested(optuna_module(), space, record, count), len(done), count * len(space.seeds))
    if sampler == "random":
        random.Random(_SEED).shuffle(grid)
    trials = [Trial(setting, seed) for seed in space.seeds for setting in grid[:num_settings]]
    left = [trial for trial in trials if not record.has_ended(trial)]
    return TrialPlan(iter(left), len(trials) - len(left), len(trials))


def optuna_module() -> Any:
    """The module optuna; raises ConfigError if it is not installed."""
    try:
        optuna: Any = importlib.import_module("optuna")
    except ImportError:
        raise ConfigError("--sampler optuna needs optuna, which is not installed; pip install optuna, or take "
                          "--sampler random") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _suggested(optuna: Any, space: Space, record: SweepRecord, count: int) -> Iterator[Trial]:
    """The trials of settings that were begun before, then of one suggested setting after the other, up to `count`."""
    grid = space.settings()
    for setting in grid:
        if any(record[trial] is not None for trial in space.trials(setting)):
            yield from (trial for trial in space.trials(setting) if not record.has_ended(trial))
    while True:
        new = [setting for setting in grid if all(record[trial] is None for trial in space.trials(setting))]
        num_known = len(grid) - len(new)
        if num_known >= count:
            return
        yield from space.trials(_suggestion(optuna, space, record, new, _SEED + num_known))


def _suggestion(optuna: Any, space: Space, record: SweepRecord, new: list[Setting], seed: int) -> Setting:
    """A setting out of `new`, suggested by optuna's TPE; numeric values count by their rank, others have no order."""
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
