"""Learning rate and weight decay as functions of the samples consumed so far, so that there is no state to keep."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron.config import ScheduleConfig

# The fields that say where and how the schedule ends: they do not affect the learning rate before its end begins.
_OF_THE_END = {"decay_samples", "wsd_decay_samples", "lr_wsd_decay_style"}
# (rate - min_lr) / (lr - min_lr) when the fraction `done` of the decay is over, as in Megatron-LM.
_LEFT = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (math.cos(math.pi * done) + 1),
    "exponential": lambda done: 2 * 0.5**done - 1,
    "minus_sqrt": lambda done: 1 - math.sqrt(done),
}


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0 to `lr`, then a decay to `min_lr`, as Megatron-LM's OptimizerParamScheduler.

    WSD (warm-up, stable, decay: Hu et al., 2024, arXiv 2404.06395) stays at `lr` until the last `wsd_decay_samples`.
    """

    lr: float
    min_lr: float
    lr_decay_style: str
    warmup_samples: float
    decay_samples: float  # from the start of training to the end of the decay, so the warm-up is a part of them
    wsd_decay_samples: float | None = None  # None: not WSD
    lr_wsd_decay_style: str | None = None
    start_weight_decay: float | None = None  # this and the following: None where the weight decay is constant
    end_weight_decay: float | None = None
    weight_decay_incr_style: str | None = None
    weight_decay_incr_samples: float | None = None

    def learning_rate(self, consumed_samples: int) -> float:
        """The learning rate of the step that starts after `consumed_samples`."""
        if self.warmup_samples and consumed_samples <= self.warmup_samples:
            return self.lr * consumed_samples / self.warmup_samples
        if self.lr_decay_style == "constant":
            return self.lr
        if consumed_samples > self.decay_samples:
            return self.min_lr
        if self.lr_decay_style == "inverse-square-root":
            return max(self.min_lr, self.lr * math.sqrt(max(self.warmup_samples, 1) / max(consumed_samples, 1)))
        return self.min_lr + self._left(consumed_samples) * (self.lr - self.min_lr)

    def weight_decay(self, consumed_samples: int) -> float | None:
        """The weight decay of the step that starts after `consumed_samples`; None where it is constant."""
        if self.weight_decay_incr_samples is None:
            return None
        assert self.start_weight_decay is not None and self.end_weight_decay is not None
        done = min(1.0, consumed_samples / self.weight_decay_incr_samples)
        share = done if self.weight_decay_incr_style == "linear" else 0.5 * (math.cos(math.pi * (1 - done)) + 1)
        return self.start_weight_decay + share * (self.end_weight_decay - self.start_weight_decay)

    @property
    def open_until(self) -> float:
        """The samples up to which the learning rate does not depend on where the schedule ends."""
        if self.lr_decay_style == "constant":
            return math.inf
        if self.lr_decay_style == "inverse-square-root":
            return self.decay_samples
        return self.warmup_samples if self.wsd_decay_samples is None else self.decay_samples - self.wsd_decay_samples

    def differences(self, other: "Schedule") -> dict[str, tuple[Any, Any]]:
        """The fields that differ, by name: the value here, and that of `other`."""
        theirs = asdict(other)
        return {name: (value, theirs[name]) for name, value in asdict(self).items() if value != theirs[name]}

    def differs_in_its_end(self, other: "Schedule") -> bool:
        """Whether the two schedules differ at most in where and how they end."""
        return self.differences(other).keys() <= _OF_THE_END

    def notices(self, num_samples: int) -> Iterator[str]:
        """Log lines for a run of `num_samples` whose warm-up or decay does not fit into it as the flags ask."""
        if num_samples < self.warmup_samples:
            yield (f"the warm-up takes {self.warmup_samples:,.0f} samples and the run {num_samples:,}: the learning "
                   f"rate gets to {self.learning_rate(num_samples):.3g} of --lr {self.lr:.3g}; --lr-warmup-iters, "
                   "--lr-warmup-samples or --lr-warmup-fraction gives a shorter one")
        if self.lr_decay_style == "WSD" and num_samples <= self.open_until:
            yield (f"the decay of --lr-decay-style WSD begins after {self.open_until:,.0f} samples and the run ends "
                   f"after {num_samples:,}: its learning rate does not decay; --lr-decay-iters or --lr-decay-samples "
                   "moves it")
        if self.lr_decay_style == "WSD" and num_samples > self.decay_samples:
            yield self.notice_of_the_rest(num_samples)

    def notice_of_the_rest(self, num_samples: int) -> str:
        """A log line for a run of `num_samples`, which is longer than the schedule."""
        return (f"the learning rate is to have decayed after {self.decay_samples:,.0f} samples, and the run ends after "
                f"{num_samples:,}: all between are trained at --min-lr {self.min_lr:.3g}")

    def _left(self, consumed_samples: int) -> float:
        if self.lr_decay_style != "WSD":
            done = (consumed_samples - self.warmup_samples) / (self.decay_samples - self.warmup_samples)
            return _LEFT[self.lr_decay_style](done)
        assert self.wsd_decay_samples is not None and self.lr_wsd_decay_style is not None
        if consumed_samples <= self.open_until:
            return 1.0
        return _LEFT[self.lr_wsd_decay_style]((consumed_samples - self.open_until) / self.wsd_decay_samples)


def schedule_of(facts: Mapping[str, Any]) -> Schedule:
    """The schedule whose `asdict` a checkpoint holds; unknown fields are ignored."""
    return Schedule(**{item.name: facts[item.name] for item in fields(Schedule) if item.name in facts})


def build_schedule(config: ScheduleConfig, *, global_batch_size: int, train_iters: int | None,
                   train_samples: int | None) -> Schedule:
    """The schedule of a run whose length is given in iterations of `global_batch_size` rows, or in samples."""
    if train_samples is not None:
        num_samples, decay = train_samples, config.lr_decay_samples or train_samples
        warmup: float = config.lr_warmup_samples
        at_end = config.lr_wsd_decay_samples
    else:
        assert train_iters is not None
        num_samples = train_iters * global_batch_size
        decay = (config.lr_decay_iters or train_iters) * global_batch_size
        warmup = config.lr_warmup_iters * global_batch_size
        at_end = (config.lr_wsd_decay_iters or 0) * global_batch_size
    if config.lr_warmup_fraction:
        warmup = config.lr_warmup_fraction * decay
    of_style: dict[str, Any] = {}
    if config.lr_decay_style == "WSD":
        of_style |= {"wsd_decay_samples": at_end, "lr_wsd_decay_style": config.lr_wsd_decay_style}
    if config.weight_decay_incr_style != "constant":
        of_style |= {name: getattr(config, name) for name in (
            "start_weight_decay", "end_weight_decay", "weight_decay_incr_style")}
        of_style |= {"weight_decay_incr_samples": num_samples}
    return Schedule(config.lr, config.min_lr, config.lr_decay_style, warmup, decay, **of_style)
