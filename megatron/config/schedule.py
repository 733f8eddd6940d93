"""The flags of the learning rate's course."""

from dataclasses import dataclass

from megatron.config.declaration import flag, fraction, not_negative, positive


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate's course, counted in iterations or in samples as training is."""

    lr: float = flag(None, "peak learning rate", kind=float, check=positive)
    min_lr: float = flag(0.0, "learning rate at the end of the decay", kind=float, check=not_negative)
    lr_decay_style: str = flag("linear", "course after the warm-up", choices=("constant", "linear", "cosine"))
    lr_decay_iters: int = flag(None, "iterations until min-lr (default: all)", kind=int, check=positive)
    lr_decay_samples: int = flag(None, "samples until min-lr (default: all)", kind=int, check=positive)
    lr_warmup_fraction: float = flag(None, "share of the decay spent in linear warm-up", kind=float, check=fraction)
    lr_warmup_iters: int = flag(0, "iterations of linear warm-up", kind=int, check=not_negative)
    lr_warmup_samples: int = flag(0, "samples of linear warm-up", kind=int, check=not_negative)
    override_lr_scheduler: bool = flag(False, "on resuming, take the schedule from the flags if the two differ")
    use_checkpoint_lr_scheduler: bool = flag(False, "on resuming, take the schedule from the checkpoint")
