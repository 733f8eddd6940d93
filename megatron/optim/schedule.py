"""The learning rate as a function of the samples behind us: nothing to save, nothing to step."""

import math

from megatron.config import ScheduleConfig


class Schedule:
    """Linear warm-up from 0, then constant, linear or cosine to `min_lr`, as Megatron-LM's AnnealingLR.

    `warmup_samples` and `decay_samples` are counted from the start of training; the warm-up is a part of the decay's
    span.
    """

    def __init__(self, config: ScheduleConfig, *, warmup_samples: float, decay_samples: int) -> None:
        self._config = config
        self.warmup_samples, self.decay_samples = warmup_samples, decay_samples

    def learning_rate(self, consumed_samples: int) -> float:
        """The rate of the step that starts after `consumed_samples`."""
        config = self._config
        lr, min_lr = config.lr, config.min_lr
        if self.warmup_samples and consumed_samples <= self.warmup_samples:
            return lr * consumed_samples / self.warmup_samples
        if config.lr_decay_style == "constant":
            return lr
        if consumed_samples > self.decay_samples:
            return min_lr
        done = (consumed_samples - self.warmup_samples) / (self.decay_samples - self.warmup_samples)
        left = 1 - done if config.lr_decay_style == "linear" else 0.5 * (math.cos(math.pi * done) + 1)
        return min_lr + left * (lr - min_lr)

    def notice(self, num_samples: int) -> str | None:
        """A line for the log of a run of `num_samples` that ends before the warm-up does."""
        if num_samples >= self.warmup_samples:
            return None
        return (f"the warm-up takes {self.warmup_samples:,.0f} samples and the run {num_samples:,}: the learning rate "
                f"gets to {self.learning_rate(num_samples):.3g} of --lr {self._config.lr:.3g}; --lr-warmup-iters, "
                "--lr-warmup-samples or --lr-warmup-fraction gives a shorter one")


def build_schedule(config: ScheduleConfig, *, global_batch_size: int, train_iters: int | None,
                   train_samples: int | None) -> Schedule:
    """The schedule of a run that is counted in iterations of `global_batch_size` rows, or in samples."""
    if train_samples is not None:
        decay = config.lr_decay_samples or train_samples
        warmup: float = config.lr_warmup_samples
    else:
        assert train_iters is not None
        decay = (config.lr_decay_iters or train_iters) * global_batch_size
        warmup = config.lr_warmup_iters * global_batch_size
    if config.lr_warmup_fraction:
        warmup = config.lr_warmup_fraction * decay
    return Schedule(config, warmup_samples=warmup, decay_samples=decay)
