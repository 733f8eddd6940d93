"""Checks that all ranks were given the same flags and the same files: otherwise each would train a run of its own."""

import hashlib
import json
import socket
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from megatron.config.declaration import flag_name, in_words
from megatron.errors import ConfigError
from megatron.parallel.collectives import all_gather_object
from megatron.parallel.mesh import Axis

SAME_FLAGS = "start all ranks with the same flags, and the same content of --config and --load"
SAME_FILES = "copy the files of one host to all others (rsync -a --checksum), or name files that all hosts share"


def check_same_flags(sections: Iterable[tuple[str, Any]], world: Axis) -> None:
    """Raises ConfigError on all ranks where a flag has different values on them; a collective.

    sections: each with its name, as `Config.sections` returns them. Flags that concern a single process or host may
    differ (`may_differ` in their declarations). A path may differ too, since hosts may keep the same file in different
    places, but not whether it is given.
    """
    items = [(item, getattr(section, item.name)) for _, section in sections for item in fields(section)
             if not item.metadata["may_differ"]]
    check_same({flag_name(item): value is None if item.metadata["path"] else value for item, value in items},
               {flag_name(item): in_words(item, value) for item, value in items}, world, SAME_FLAGS)


def check_same(compared: Mapping[str, Any], told: Mapping[str, str], world: Axis, remedy: str) -> None:
    """Raises ConfigError on all ranks where a value in `compared` is not the same on all of them; a collective.

    compared: values as JSON, by the same names on all ranks. told: by the same names, what the error says of a value.
    It names the first that differs, and rank 0 and the first rank that differs from it. The ranks exchange digests, and
    only these two their values.
    """
    values = json.dumps(compared)
    digests = all_gather_object(hashlib.blake2b(values.encode(), digest_size=16).digest(), world)
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    mine = (socket.gethostname(), compared, told) if world.rank in (0, other) else ("", {}, {})
    gathered = all_gather_object(mine, world)
    (host, first, here), (other_host, second, there) = gathered[0], gathered[other]
    name = next(name for name in {**first, **second} if first.get(name) != second.get(name))
    raise ConfigError(f"{name} differs between ranks: rank 0 on {host} has {here.get(name)}, rank {other} on "
                      f"{other_host} has {there.get(name)}; {remedy}")
