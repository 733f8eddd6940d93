"""How far the training of a seed has come, and its checkpoints while it is under way: the same command goes on there.

FOLDER/unfinished/iter_…    as pretraining saves them, with the optimizer's state; gone once the seed is done

Of the weights they hold those that are trained, the others are those of --load. The best so far lie where pretraining
has the average of the weights, unless they are the weights of that very step.
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.claim import Claim
from megatron.checkpoint.loading import load_average, load_model, load_optimizer
from megatron.checkpoint.newest import newest
from megatron.checkpoint.saving import Saver, parts_of
from megatron.config import Config
from megatron.errors import ConfigError
from megatron.log import Log
from megatron.train.step.engine import Engine
from megatron.train.step.meters import Meters

UNFINISHED = "unfinished"


@dataclass
class Progress:
    """Where a training stands, and which step was the best by validation; what a checkpoint keeps besides tensors.

    `epoch`: how many are whole, their validation as well; `step`: how many of the next are taken. `best_at` is 0, and
    `best_value` -inf, until there was a validation.
    """

    iteration: int = 0
    epoch: int = 0
    step: int = 0
    best_at: int = 0
    best_epoch: int = 0
    best_value: float = -math.inf

    def state(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return asdict(self) | {"best_value": self.best_value if math.isfinite(self.best_value) else None}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Progress":
        """What `state` gave."""
        return cls(**{**state, "best_value": -math.inf if state["best_value"] is None else state["best_value"]})


class Unfinished:
    """The checkpoints of a training that is under way, of which the newest is kept; all ranks call all of it together.

    `work`: what must be as it was for a training to go on: flags, data, steps; as JSON has it. Raises ConfigError where
    the folder holds the beginning of another.
    """

    def __init__(self, folder: Path, config: Config, engine: Engine, log: Log, claim: Claim | None,
                 work: Mapping[str, Any]) -> None:
        self._folder, self._config, self._engine, self._log = folder / UNFINISHED, config, engine, log
        self._claim, self._work = claim, json.loads(json.dumps(work))
        self._saver: Saver | None = None
        self._found = newest(str(self._folder), engine.mesh.world, log)
        if self._found is not None and self._found.state.get("work") != self._work:
            raise ConfigError(f"--save {folder} holds the beginning of a run with other flags, data or global batch; "
                              f"to go on with it give these, else name a new folder, or remove {self._folder}")

    def go_on(self, meters: Meters) -> tuple[Progress, dict[str, Tensor]]:
        """Where the training was left, and the best weights until then, with all else put in place; from 0 if nowhere.
        """
        if self._found is None:
            return Progress(), {}
        checkpoint, engine, trained = self._found, self._engine, self._trained()
        progress = Progress.from_state(checkpoint.state["progress"])
        load_model(trained, checkpoint, checkpoint.model.keys())
        engine.optimizer.load_state(load_optimizer(trained, checkpoint))
        engine.loss_scale.load_state(checkpoint.state["loss_scale"])
        engine.amaxes.load_state(checkpoint.state["fp8_amaxes"])
        engine.take_up_weights()
        meters.load_state(checkpoint.state["meters"])
        best = self.copied() if progress.best_at else {}
        if progress.best_at != progress.iteration:
            load_average(best, trained, checkpoint)
        self._log.line(f"going on from iteration {progress.iteration} in {self._folder}")
        return progress, best

    def copied(self) -> dict[str, Tensor]:
        """This rank's parts of the weights that are trained, as they are."""
        return {name: parameter.detach().clone() for name, parameter in self._trained().items()}

    @torch.no_grad()
    def put_in_place(self, weights: Mapping[str, Tensor]) -> None:
        """Compute with weights that `copied` gave."""
        for name, weight in weights.items():
            self._engine.model.parameters[name].copy_(weight)
        self._engine.take_up_weights()

    def save(self, progress: Progress, best: Mapping[str, Tensor], meters: Meters) -> None:
        """Write a checkpoint; raises CheckpointError where the disk refuses."""
        if self._saver is None:
            config = replace(self._config.checkpoint, save=str(self._folder), keep_checkpoints=1)
            loaded = 0 if self._found is None else self._found.iteration
            self._saver = Saver(config, self._engine.mesh, self._claim, self._log, loaded)
        engine = self._engine
        self._saver.save(
            progress.iteration,
            parts_of(self._trained(), engine.optimizer.state(),
                     None if progress.best_at == progress.iteration else best),
            {"iteration": progress.iteration, "progress": progress.state(), "work": self._work,
             "loss_scale": engine.loss_scale.state(), "fp8_amaxes": engine.amaxes.state(), "meters": meters.state()})

    def remove(self) -> None:
        """Take all of it away: the training is done."""
        if self._saver is not None:
            self._saver.close()
        if self._log.is_speaker:
            remove_unfinished(self._folder.parent)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self._engine.model.parameters.items() if parameter.requires_grad}


def remove_unfinished(folder: Path) -> None:
    """Take away what a training left that has come to its end."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)

