"""A model with a task head: starts from a checkpoint's weights, is saved with a description, and can be opened again.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron.checkpoint.contents import Checkpoint
from megatron.checkpoint.loading import load_model
from megatron.checkpoint.lora.merging import STATE, merged
from megatron.config import Config, ModelConfig, PrecisionConfig
from megatron.config.declaration import with_tuples
from megatron.config.lora import LoraConfig
from megatron.data.corpus.vocab import Vocab
from megatron.errors import CheckpointError
from megatron.files import write_json
from megatron.finetune.data.labels import LabelSpace
from megatron.finetune.data.tasks import Task
from megatron.finetune.heads import HeadSpec, TaskHead
from megatron.model.initialisation import initialise
from megatron.model.lora import adapt, adapters_in
from megatron.model.protein_model import TASK_HEAD, ProteinModel
from megatron.parallel.mesh import ONE_RANK_AXIS, Axis, Mesh
from megatron.parallel.pipeline.partition import Stage
from megatron.parallel.tensor.stream import ONE_RANK_STREAM, Stream
from megatron.train.step.engine import Engine, build_engine

TASK_FILE = "task.json"


@dataclass(frozen=True)
class Described:
    """What a model predicts, and with which head: all that its folder stores besides the checkpoint."""

    task: Task
    space: LabelSpace
    head: HeadSpec
    lora: LoraConfig | None = None

    def write(self, folder: Path) -> None:
        """Write this description to a model's folder."""
        write_json(folder / TASK_FILE, {name: asdict(value) for name, value in vars(self).items() if value is not None})

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores of this description, so that its adapters can be merged later."""
        return {} if self.lora is None else {STATE: asdict(self.lora)}

    @classmethod
    def read(cls, folder: Path) -> "Described":
        """The description in a model's folder; raises CheckpointError if there is none."""
        path = folder / TASK_FILE
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            lora = LoraConfig(**with_tuples(fields["lora"])) if "lora" in fields else None
            return cls(Task(**with_tuples(fields["task"])), LabelSpace(**with_tuples(fields["space"])),
                       HeadSpec(**with_tuples(fields["head"])), lora)
        except FileNotFoundError:
            raise CheckpointError(f"{folder} holds no fine-tuned model ({TASK_FILE} is not there); give what --save of "
                                  "tools/finetune.py named, with several seeds a folder in it") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); it is damaged, or of another program") from None

    def begin(self, config: Config, mesh: Mesh, vocab: Vocab, checkpoint: Checkpoint, seed: int,
              is_head_only: bool) -> Engine:
        """The engine for training: head and adapters are initialised from the seed, all other weights come from a
        checkpoint.

        A task head in the checkpoint is dropped, and adapters there are merged. Raises CheckpointError if weights do
        not fit.
        """
        checkpoint = merged(checkpoint, config.model)
        born = [name for name in self._names(config, vocab) if not name.startswith(TASK_HEAD)]
        names = {*born} - {*adapters_in(dict.fromkeys(born))}
        trunk = replace(checkpoint, model={name: stored for name, stored in checkpoint.model.items() if name in names})

        def fill(parameters: Mapping[str, nn.Parameter]) -> None:
            load_model({name: parameter for name, parameter in parameters.items() if name in names}, trunk, names)
            initialise({name: parameter for name, parameter in parameters.items() if name not in names}, seed)

        return self._engine(config, mesh, vocab, fill, lambda name: is_head_only and name in names)

    def open(self, config: Config, mesh: Mesh, vocab: Vocab, checkpoint: Checkpoint) -> Engine:
        """The engine of a saved model."""
        names = self._names(config, vocab)
        return self._engine(config, mesh, vocab, lambda parameters: load_model(parameters, checkpoint, names),
                            lambda name: False)

    def _engine(self, config: Config, mesh: Mesh, vocab: Vocab, fill: Callable[[Mapping[str, nn.Parameter]], None],
                is_frozen: Callable[[str], bool]) -> Engine:
        return build_engine(config, mesh, vocab.padded_size(config.model), fill, is_frozen, vocab.mask_id, self._stage)

    def _stage(self, config: ModelConfig, precision: PrecisionConfig, num_ids: int, stream: Stream = ONE_RANK_STREAM,
               stage: Stage | None = None, ends: Axis = ONE_RANK_AXIS, mask_id: int | None = None) -> ProteinModel:
        """What ProteinModel's arguments make, with the head and adapters."""
        model = ProteinModel(config, precision, num_ids, stream, stage, ends, mask_id,
                             partial(TaskHead, config, self.head, stream))
        if self.lora is not None:
            adapt(model, self.lora)
            if model.task_head is not None:
                model.task_head.requires_grad_(True)
        return model

    def _names(self, config: Config, vocab: Vocab) -> set[str]:
        """Those of the whole model's parameters."""
        with torch.device("meta"):
            whole = self._stage(config.model, config.precision, vocab.padded_size(config.model), mask_id=vocab.mask_id)
        return {name for name, _ in whole.named_parameters()}
