"""The flags that name sources of the other flags' values: a preset and a file."""

from dataclasses import dataclass

from megatron.config.declaration import flag
from megatron.config.reading.presets import PRESETS


@dataclass(frozen=True)
class Sources:
    """Where values come from: defaults, then the preset, then the file, then the flags; the later wins."""

    preset: str = flag(None, "a published model with its hyperparameters, or a small one", choices=PRESETS, common=True)
    config: str = flag(None, "TOML or YAML file of flags without their dashes; hidden-size = 256, flat or in a table "
                       "for each section", common=True, path="file")
    write_config: str = flag(None, "write the configuration of the other flags to this file, in the format of "
                             "--config, and exit; - prints it", common=True, path="file")
