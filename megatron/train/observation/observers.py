"""Observers: what receives each record of metrics.jsonl besides that file and TensorBoard (`--logger`, `--metrics-…`).
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from megatron.config import Config
from megatron.config.logging import LoggingConfig
from megatron.errors import ConfigError
from megatron.log import Log
from megatron.parallel.mesh import Mesh

Record = Mapping[str, Any]  # a line of metrics.jsonl, without digests, and with nan and infinities instead of null


class Observer(Protocol):
    """Receives records; once created it never raises."""

    def record(self, record: Record) -> None:
        """Take the record of one log event or evaluation."""

    def close(self, has_failed: bool) -> None:
        """The run has ended, `has_failed`: by an error."""


def check_observers(logging: LoggingConfig) -> None:
    """Raises ConfigError if a library of --logger is not installed, or nothing can be shown to Prometheus as asked.

    Rank 0 calls this before a run is built, which may take hours.
    """
    for name in logging.logger or ():
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--logger {name} needs the package {name}, which is not installed: pip install {name}")
    if _is_exposed(logging):
        from megatron.train.observation.prometheus import check_exposition

        check_exposition(logging)


@contextmanager
def observed(config: Config, mesh: Mesh, log: Log) -> Iterator[Sequence[Observer]]:
    """A context with the observers that the flags ask for, on rank 0, which closes them; none on other ranks.

    Enter it once the run is built, and so has the folder of --save to itself. Raises ConfigError where an observer
    cannot start.
    """
    observers: list[Observer] = []
    has_failed = True
    try:
        if log.is_speaker:
            observers += _opened(config, mesh, log)
        yield observers
        has_failed = False
    finally:
        for observer in observers:
            observer.close(has_failed)


def _opened(config: Config, mesh: Mesh, log: Log) -> Iterator[Observer]:
    logging = config.logging
    if _is_exposed(logging):
        from megatron.train.observation.prometheus import Prometheus  # imported only by the few runs that need it

        yield Prometheus(logging, config.checkpoint.save, log.line)
    for name in dict.fromkeys(logging.logger or ()):
        from megatron.train.observation.trackers import tracker

        parameters = config.as_dict() | {"num_ranks": mesh.world.size}
        yield tracker(name, config.checkpoint.save, logging.logger_project, parameters, log.line)


def _is_exposed(logging: LoggingConfig) -> bool:
    return logging.metrics_port is not None or logging.metrics_file is not None
