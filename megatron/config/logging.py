"""The flags of logging, metrics and profiling."""

from dataclasses import dataclass

from megatron.config.declaration import Check, flag, not_negative, positive

_port: Check = (lambda value: 0 <= value < 2**16, "a port, 1 to 65535, or 0 for one that is free")


@dataclass(frozen=True)
class LoggingConfig:
    """Log lines, metrics and profiles."""

    log_interval: int = flag(100, "steps between log lines", kind=int, check=positive, common=True)
    tensorboard_dir: str = flag(None, "folder of TensorBoard files (default: SAVE/tensorboard)", path="folder",
                                may_differ=True)
    logger: tuple[str, ...] = flag(None, "libraries that also receive the metrics and flags of the run; set servers "
                                   "and keys with their own environment variables", nargs="+",
                                   choices=("wandb", "trackio", "mlflow"), may_differ=True)
    logger_project: str = flag(None, "project of wandb and trackio, experiment of mlflow (default: from their "
                               "environment variables, else proteinlm)", aliases=("--wandb-project",), may_differ=True)
    metrics_port: int = flag(None, "port at which the first rank serves its metrics to Prometheus; 0 for any free one",
                             kind=int, check=_port, may_differ=True)
    metrics_host: str = flag("127.0.0.1", "address at which --metrics-port listens; 0.0.0.0 for all addresses of the "
                             "machine", may_differ=True)
    metrics_file: str = flag(None, "file with the same metrics, for node_exporter's textfile collector (.prom)",
                             path="file", may_differ=True)
    peak_tflops: float = flag(None, "the device's matrix peak in TFLOP/s (default: measured at start)", kind=float,
                              check=positive, may_differ=True)
    profile: bool = flag(False, "write a trace of some steps, and a table of where their time goes, to SAVE/profile",
                         may_differ=True)
    profile_step_start: int = flag(10, "first step to profile, counted from 0 where this run begins", kind=int,
                                   check=not_negative, may_differ=True)
    profile_step_end: int = flag(12, "step before which the profile ends", kind=int, check=positive,
                                 may_differ=True)
    profile_ranks: tuple[int, ...] = flag((0,), "ranks to profile", kind=int, nargs="+", check=not_negative,
                                         may_differ=True)
