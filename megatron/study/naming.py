"""Names runs by the flags in which they differ, if their checkpoints tell, else by their folders."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron.checkpoint.newest import saved_flags
from megatron.config import Config
from megatron.config.declaration import flag_name

# Flags on where a run is saved, what it logs and when it ends, which are no difference between models.
_IGNORED_SECTIONS = ("checkpoint", "logging")
_IGNORED = ("exit_interval", "exit_duration_in_mins", "num_workers")
# Flags whose default is derived from another flag.
_FOLLOWS = {"--ffn-hidden-size": "--hidden-size", "--kv-channels": "--hidden-size",
            "--num-query-groups": "--num-attention-heads", "--max-position-embeddings": "--seq-length"}
LONGEST_NAME = 60


def differing_flags(groups: Sequence[Sequence[Path]]) -> list[dict[str, Any]]:
    """For each group of runs, the values of the flags in which the groups differ, by flag.

    Flags that differ within a group are left out, and derived defaults. All are {} if a run has no checkpoint, which
    stores the flags.
    """
    known = [[saved_flags(str(folder)) for folder in folders] for folders in groups]
    differing: list[dict[str, Any]] = [{} for _ in groups]
    if not all(flags for group in known for flags in group):
        return differing
    for section, values in Config().sections():
        for item in fields(values):
            if section in _IGNORED_SECTIONS or item.name in _IGNORED:
                continue
            found = [[flags.get(item.name, item.default) for flags in group] for group in known]
            is_one_a_group = all(value == group[0] for group in found for value in group)
            if is_one_a_group and any(group[0] != found[0][0] for group in found):
                for flags, group in zip(differing, found, strict=True):
                    flags[flag_name(item)] = group[0]
    for name, other in _FOLLOWS.items():
        pairs = {(str(flags.get(other)), str(flags.get(name))) for flags in differing}
        if len(pairs) == len({value for value, _ in pairs}):
            for flags in differing:
                flags.pop(name, None)
    return differing


def names_of(groups: Sequence[Sequence[Path]], differing: Sequence[dict[str, Any]]) -> list[str]:
    """A unique name for each group: the flags that differ if that is short, else the end of its first run's path."""
    by_flags = [" ".join(in_words(name, value) for name, value in flags.items()) for flags in differing]
    if _are_different(by_flags) and all(0 < len(name) <= LONGEST_NAME for name in by_flags):
        return by_flags
    paths = [folders[0].resolve().parts for folders in groups]
    for length in range(1, max(map(len, paths), default=1)):
        if _are_different(names := ["/".join(path[-length:]) for path in paths]):
            return names
    return [str(folders[0]) for folders in groups]


def in_words(name: str, value: Any) -> str:
    """A flag (`name`, with its dashes) and its value, as on the command line."""
    if isinstance(value, bool) or value is None:
        return name if value else f"--no-{name[2:]}"
    return f"{name} {' '.join(map(_shown, value)) if isinstance(value, list) else _shown(value)}"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _are_different(names: Sequence[str]) -> bool:
    return len(set(names)) == len(names)
