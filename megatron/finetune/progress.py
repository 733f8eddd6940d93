"""The progress of training with one seed, and its intermediate checkpoints, from which the same command continues.

FOLDER/unfinished/iter_…    in pretraining's format, with the optimizer's state; removed once the seed is done

Only trained weights are stored; the others come from --load. The best weights so far are stored where pretraining has
the average of the weights, unless they are those of the same step.
"""

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
from megatron.checkpoint.newest import open_newest
from megatron.checkpoint.places import STATE
from megatron.checkpoint.saving import parts_of
from megatron.checkpoint.store import read_state
from megatron.config import Config
from megatron.errors import CheckpointError, ConfigError, SaveError
from megatron.finetune.data.tasks import BALANCED, METRICS
from megatron.finetune.flags import first_change
from megatron.log import Log
from megatron.train.step.engine import Engine
from megatron.train.step.meters import Meters
from megatron.train.tolerant_saver import TolerantSaver

UNFINISHED = "unfinished"


@dataclass
class Progress:
    """The state of a training besides tensors, and which step was the best by validation.

    `epoch`: the number of complete epochs, including validation; `step`: steps taken in the next one. `best_at` is 0
    and `best_values` are empty before the first validation. `best_values`: what it was compared by, of which `best_by`
    names the first; "" in a training that was begun by a version which took the kind's first metric and wrote no name.
    """

    iteration: int = 0
    epoch: int = 0
    step: int = 0
    best_at: int = 0
    best_epoch: int = 0
    best_by: str = ""
    best_values: tuple[float, ...] = ()

    def chooser(self, kind: str, is_balanced: bool) -> str:
        """The metric that chooses the best of a kind: with balanced classes, one in which rare classes count."""
        if is_balanced and not self.best_at:
            return BALANCED[kind]
        return self.best_by or METRICS[kind][0]

    def state(self) -> dict[str, Any]:
        """All fields, as JSON."""
        return asdict(self) | {"best_values": [value if math.isfinite(value) else None for value in self.best_values]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Progress":
        """The progress from what `state` returned."""
        fields = dict(state)
        values = [fields.pop("best_value")] if "best_value" in fields else fields["best_values"]  # one if older
        return cls(**fields | {"best_values": tuple(-math.inf if value is None else value for value in values)})


class Unfinished:
    """The checkpoints of a training in progress, of which the newest is kept; all ranks must call its methods together.

    `work`: what must be unchanged for a training to continue, in whatever layout: "flags" (`Flags.identity`), data,
    steps; as JSON. Raises ConfigError if the folder holds another training.
    """

    def __init__(self, folder: Path, config: Config, engine: Engine, log: Log, claim: Claim | None,
                 work: Mapping[str, Any]) -> None:
        self._folder, self._config, self._engine, self._log = folder / UNFINISHED, config, engine, log
        self._claim, self._work = claim, work
        self._saver: TolerantSaver | None = None
        self._found = open_newest(str(self._folder), engine.mesh.world, log)
        change = None if self._found is None else first_change(_flat(self._found.state["work"]), _flat(work))
        if change is not None:
            raise ConfigError(f"--save {folder} holds the beginning of another run: {change}; to go on with that give "
                              f"what it had, else name a new folder, or remove {self._folder}")

    def go_on(self, meters: Meters) -> tuple[Progress, dict[str, Tensor]]:
        """Restore the newest checkpoint, and return the progress and the best weights so far; starts at 0 if there is
        none.
        """
        if self._found is None:
            return Progress(), {}
        checkpoint, engine, trained = self._found, self._engine, self._trained()
        progress = Progress.from_state(checkpoint.state["progress"])
        load_model(trained, checkpoint, checkpoint.model.keys())
        engine.optimizer.load_state(load_optimizer(trained, checkpoint))
        engine.loss_scale.load_state(checkpoint.state["loss_scale"])
        engine.amaxes.load_state(checkpoint.state["fp8_amaxes"])
        engine.refresh_compute_weights()
        meters.load_state(checkpoint.state["meters"])
        best = self.copied() if progress.best_at else {}
        if progress.best_at != progress.iteration:
            load_average(best, trained, checkpoint)
        self._log.line(f"going on from iteration {progress.iteration} in {self._folder}")
        rows = self._config.training.micro_batch_size
        rows_before = checkpoint.state.get("settings", {}).get("micro_batch_size")
        if rows_before not in (None, rows):
            self._log.line(f"note: --micro-batch-size is {rows}, it was {rows_before} before: dropout masks differ")
        return progress, best

    def copied(self) -> dict[str, Tensor]:
        """A copy of this rank's shards of the trained weights."""
        return {name: parameter.detach().clone() for name, parameter in self._trained().items()}

    @torch.no_grad()
    def put_in_place(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights that `copied` returned."""
        for name, weight in weights.items():
            self._engine.model.parameters[name].copy_(weight)
        self._engine.refresh_compute_weights()

    def save(self, progress: Progress, best: Mapping[str, Tensor], meters: Meters) -> None:
        """Write a checkpoint; what the disk refuses is said, and `check` raises it, unless the next save succeeds."""
        if self._saver is None:
            config = replace(self._config.checkpoint, save=str(self._folder), keep_checkpoints=1)
            loaded = 0 if self._found is None else self._found.iteration
            self._saver = TolerantSaver(config, self._engine.mesh, self._claim, self._log, loaded)
        engine = self._engine
        self._saver.save(
            progress.iteration,
            parts_of(self._trained(), engine.optimizer.state(),
                     None if progress.best_at == progress.iteration else best),
            {"iteration": progress.iteration, "progress": progress.state(), "work": self._work,
             "settings": self._config.as_dict(),  # not "config": this is no model to be asked
             "loss_scale": engine.loss_scale.state(), "fp8_amaxes": engine.amaxes.state(), "meters": meters.state()})

    def check(self) -> None:
        """Raises SaveError where the last save has failed."""
        if self._saver is not None:
            try:
                self._saver.check()
            except SaveError as error:
                raise self.refused(error) from error

    def refused(self, error: SaveError) -> SaveError:
        """The error at the end of a run for what the disk refused: it also says what the next start repeats."""
        kept = self._saver.saved_at if self._saver is not None else self._found.iteration if self._found else 0
        begins = f"goes on from iteration {kept}" if kept else "begins the training again, of which nothing was kept"
        return SaveError(f"{error}. Once there is room, the same command {begins}")

    def has_saved(self, model: Path) -> bool:
        """Whether this training has saved the model in that `iter_` folder; False if it does not say."""
        try:
            return first_change(_flat(read_state(model / STATE)["work"]), _flat(self._work)) is None
        except (CheckpointError, KeyError):
            return False

    def remove(self) -> None:
        """Remove all of them: the training is done."""
        if self._saver is not None:
            self._saver.close()
        if self._log.is_speaker:
            remove_unfinished(self._folder.parent)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self._engine.model.parameters.items() if parameter.requires_grad}


def _flat(work: Mapping[str, Any]) -> dict[str, Any]:
    others = {name: value for name, value in work.items() if name not in ("flags", "rows")}
    return {"global_batch_size": work["rows"], **work["flags"], **others}


def remove_unfinished(folder: Path) -> None:
    """Remove the intermediate checkpoints of a training that is done."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)

