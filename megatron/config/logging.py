"""The flags of what a user watches."""

from dataclasses import dataclass

from megatron.config.declaration import flag, not_negative, positive


@dataclass(frozen=True)
class LoggingConfig:
    """What a user watches."""

    log_interval: int = flag(100, "steps between log lines", kind=int, check=positive, common=True)
    tensorboard_dir: str = flag(None, "folder of TensorBoard files (default: SAVE/tensorboard)", path="folder")
    peak_tflops: float = flag(None, "the device's matrix peak in TFLOP/s (default: measured at start)", kind=float,
                              check=positive)
    profile: bool = flag(False, "write a trace of some steps, and a table of where their time goes, to SAVE/profile")
    profile_step_start: int = flag(10, "the first step to profile, counted from 0 where this run begins", kind=int,
                                   check=not_negative)
    profile_step_end: int = flag(12, "the step before which the profile ends", kind=int, check=positive)
    profile_ranks: tuple[int, ...] = flag((0,), "the ranks that are profiled", kind=int, nargs="+", check=not_negative)
