"""Finds the best of the learning rates of --calibrate-lr by short trials, and stores it for the next run."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError, DivergedError
from megatron.files import write_json
from megatron.finetune.flags import first_change
from megatron.finetune.training import FineTuning, Job
from megatron.parallel.collectives import all_gather_object

CHOSEN = "chosen.json"


def with_best_rate(job: Job, folder: Path) -> Job | None:
    """The job with the learning rate whose trial, with the first seed, has the best validation; all ranks call this.

    The results of the trials and the chosen rate are stored in a folder and reused in the next run. A rate that
    diverges is not chosen. Returns None if the run was asked to stop before all trials were done. Raises ConfigError if
    there is no validation file, and DivergedError if all rates diverge.
    """
    if "valid" not in job.data.parts:
        raise ConfigError("--calibrate-lr chooses by validation, and there is no such file; give --valid-data, or "
                          "leave it out")
    place = folder / "calibration"
    known = all_gather_object(_chosen(place / CHOSEN, job.identity), job.mesh.world)[0]
    if known is not None:
        return _with_rate(job, known)
    values, chooser = dict[float, tuple[float, ...]](), ""
    for rate in job.flags.finetune.calibrate_lr:
        training = FineTuning(_with_rate(job, rate), job.flags.finetune.seeds[0], place / f"lr-{rate:g}", is_try=True)
        try:
            is_done = training.run()
        except DivergedError as error:
            job.log.line(f"learning rate {rate:g}: {str(error).partition(';')[0]}")
            continue
        if not is_done:
            job.log.line("stopped before a learning rate was chosen: the same command begins with that")
            return None
        chooser, values[rate] = training.best
        del training  # its memory is the next one's
    if not values:
        raise DivergedError("no learning rate of --calibrate-lr had gradients that were finite; give lower ones")
    best = max(values, key=lambda rate: values[rate])
    shown = ", ".join(f"{best_values[0]:.4f} with {rate:g}" for rate, best_values in values.items())
    job.log.line(f"learning rate {best:g}, by {chooser} on validation: {shown}")
    if job.log.is_speaker:
        write_json(place / CHOSEN, {"flags": job.identity, "lr": best})
    return _with_rate(job, best)


def _chosen(path: Path, identity: Mapping[str, Any]) -> float | None:
    """The learning rate that an earlier run with the same flags has chosen."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return float(fields["lr"]) if first_change(fields["flags"], identity) is None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _with_rate(job: Job, rate: float) -> Job:
    return replace(job, flags=replace(job.flags, others={**job.flags.others, "lr": rate}))
