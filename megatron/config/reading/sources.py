"""The flags that say where the others' values come from."""

from dataclasses import dataclass

from megatron.config.declaration import flag
from megatron.config.presets import PRESETS


@dataclass(frozen=True)
class Sources:
    """Where values come from: defaults, then the preset, then the file, then the flags beside them, which win."""

    preset: str = flag(None, "a published model with its hyperparameters, or a small one", choices=PRESETS, common=True)
    config: str = flag(None, "file of flags without their dashes, in TOML, or YAML if it ends so: hidden-size = 256, "
                       "flat or in a table a section", common=True, path="file")
    write_config: str = flag(None, "write the configuration that the other flags make to this file, as --config "
                             "takes it, and end; - prints it", common=True, path="file")
