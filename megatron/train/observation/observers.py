"""Those who are told of each record of metrics.jsonl, besides it and TensorBoard (`--logger`, `--metrics-…`)."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from megatron.config import Config
from megatron.config.logging import LoggingConfig
from megatron.errors import ConfigError
from megatron.log import Log
from megatron.parallel.mesh import Mesh

Record = Mapping[str, Any]  # as metrics.jsonl has it, without digests; numbers that are not finite are as they are


class Observer(Protocol):
    """Is told of records, and never raises once it is there."""

    def record(self, record: Record) -> None:
        """One log event."""

    def close(self, has_failed: bool) -> None:
        """No more come; `has_failed`: the run ended by an error."""


def check_installed(logging: LoggingConfig) -> None:
    """Raises ConfigError where a library of --logger is not there; asked on rank 0 before a run is built."""
    for name in logging.logger or ():
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--logger {name} needs the package {name}, which is not installed: pip install {name}")


@contextmanager
def observed(config: Config, mesh: Mesh, log: Log) -> Iterator[Sequence[Observer]]:
    """The observers that the flags ask for, on rank 0, closed at the end; raises ConfigError where one cannot be had.

    The run has been built by then, so that the folder of --save is its own.
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
    if logging.metrics_port is not None or logging.metrics_file is not None:
        from megatron.train.observation.prometheus import Prometheus  # what few runs need is imported for them alone

        yield Prometheus(logging, config.checkpoint.save, log.line)
    for name in dict.fromkeys(logging.logger or ()):
        from megatron.train.observation.trackers import tracker

        parameters = config.as_dict() | {"num_ranks": mesh.world.size}
        yield tracker(name, config.checkpoint.save, logging.logger_project, parameters, log.line)
