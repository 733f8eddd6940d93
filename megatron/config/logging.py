"""The flags of what a user watches."""

from dataclasses import dataclass

from megatron.config.declaration import flag, positive


@dataclass(frozen=True)
class LoggingConfig:
    """What a user watches."""

    log_interval: int = flag(100, "steps between log lines", kind=int, check=positive)
    tensorboard_dir: str = flag(None, "folder of TensorBoard files (default: SAVE/tensorboard)")
    peak_tflops: float = flag(None, "the device's matrix peak in TFLOP/s (default: measured at start)", kind=float,
                              check=positive)
