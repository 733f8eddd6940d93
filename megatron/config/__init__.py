"""The configuration of a run: a frozen dataclass for each section, with a field for each flag.

A field declares its flag's default, help text and check (`declaration`); `command_line` derives the command line from
all of them. Flags are spelled as in Megatron-LM. A component receives only the section that it needs.

Sections: `model`, `data`, `optimizer`, `schedule`, `precision`, `parallel`, `training` (how long, in which batches),
`guards` (steps that go wrong), `checkpoint`, `logging`; for fine-tuning also `lora`.

Rooms: `presets/` (files of flags by name), `reading/` (flags and files, merged and checked), `telling/` (help, shell
completion, configuration files written).
"""

from dataclasses import dataclass, field, fields
from typing import Any

from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig
from megatron.config.guards import GuardsConfig
from megatron.config.logging import LoggingConfig
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.precision import PrecisionConfig
from megatron.config.schedule import ScheduleConfig
from megatron.config.training import TrainingConfig

__all__ = [
    "CheckpointConfig", "Config", "DataConfig", "GuardsConfig", "LoggingConfig", "ModelConfig", "OptimizerConfig",
    "ParallelConfig", "PrecisionConfig", "ScheduleConfig", "TrainingConfig"]


@dataclass(frozen=True)
class Config:
    """All flags of a run, fixed at its start."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def as_dict(self) -> dict[str, Any]:
        """The values of all flags by field name, in one flat dict that JSON can hold."""
        return {item.name: getattr(section, item.name) for _, section in self.sections()
                for item in fields(section)}

    def sections(self) -> list[tuple[str, Any]]:
        """The name and the dataclass instance of each section."""
        return [(item.name, getattr(self, item.name)) for item in fields(self)]
