"""The lines about the configuration that a run prints at its start."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from megatron.config import Config
from megatron.config.declaration import flag_name, in_words, shown
from megatron.config.reading.megatron_flags import ALWAYS_SO


def listing(config: Config, always_so: Sequence[str]) -> str:
    """The argument listing: every flag with its value, in alphabetical order; `always_so`: given flags without effect.
    """
    values = sorted(config.as_dict().items())
    rows = [f"  {name} {'.' * max(2, 46 - len(name))} {shown(value)}" for name, value in values]
    rows += [f"  {name}: always so; {ALWAYS_SO[name]}" for name in always_so]
    rule = "-" * 24
    return "\n".join([f"{rule} arguments {rule}", *rows, f"{rule}- end of arguments {rule}"])


def notice(taken: Mapping[str, Any]) -> str | None:
    """A line that says which flags were taken from a checkpoint, without those equal to the defaults; None for none."""
    defaults = Config().as_dict()
    items = {item.name: item for _, section in Config().sections() for item in fields(section)}
    flags = [f"{flag_name(items[name])} {in_words(items[name], value)}" for name, value in taken.items()
             if value != defaults[name]]
    return f"taken from the checkpoint, as no flag says otherwise: {', '.join(flags)}" if flags else None
