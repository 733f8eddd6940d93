"""The flags of the learning rate schedule and the weight decay schedule, and checks of their combinations."""

import math
from dataclasses import dataclass
from typing import Any

from megatron.config.declaration import flag, fraction, not_negative, positive
from megatron.config.optimizer import OptimizerConfig
from megatron.config.training import TrainingConfig

LR_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")


@dataclass(frozen=True)
class ScheduleConfig:
    """The schedules of learning rate and weight decay, counted in iterations or in samples, as training is."""

    lr: float = flag(None, "peak learning rate (under muon each group has its own peak, and --lr and --min-lr only set "
                     "the share of it to which the rate falls)", kind=float, check=positive, common=True)
    min_lr: float = flag(0.0, "learning rate at the end of the decay", kind=float, check=not_negative, common=True)
    lr_decay_style: str = flag("linear", "schedule after the warm-up; WSD (warm-up, stable, decay) stays at the peak "
                               "until its decay, so a run can be extended from before that", choices=LR_DECAY_STYLES,
                               common=True)
    lr_decay_iters: int = flag(None, "iterations until --min-lr (default: all)", kind=int, check=positive)
    lr_decay_samples: int = flag(None, "samples until --min-lr (default: all)", kind=int, check=positive)
    lr_wsd_decay_style: str = flag("exponential", "shape of the decay of WSD",
                                   choices=("exponential", "linear", "cosine", "minus_sqrt"))
    lr_wsd_decay_iters: int = flag(None, "iterations of the decay of WSD, the last before --min-lr", kind=int,
                                   check=positive)
    lr_wsd_decay_samples: int = flag(None, "samples of the decay of WSD, the last before --min-lr", kind=int,
                                     check=positive)
    lr_warmup_fraction: float = flag(None, "share of the decay spent in linear warm-up", kind=float, check=fraction,
                                     common=True)
    lr_warmup_iters: int = flag(0, "iterations of linear warm-up", kind=int, check=not_negative, common=True)
    lr_warmup_samples: int = flag(0, "samples of linear warm-up", kind=int, check=not_negative)
    weight_decay_incr_style: str = flag("constant", "schedule of the weight decay over the whole run",
                                        choices=("constant", "linear", "cosine"))
    start_weight_decay: float = flag(None, "weight decay of the first step, if it has a schedule", kind=float,
                                     check=not_negative)
    end_weight_decay: float = flag(None, "weight decay at the end of the run, if it has a schedule", kind=float,
                                   check=not_negative)
    override_lr_scheduler: bool = flag(False, "on resuming, take the schedule from the flags if the two differ")
    use_checkpoint_lr_scheduler: bool = flag(False, "on resuming, take the schedule from the checkpoint")


Faults = list[tuple[Any, str]]  # possible mistakes: whether it was made (true or false), and the message


def schedule_faults(schedule: ScheduleConfig, training: TrainingConfig, optimizer: OptimizerConfig) -> Faults:
    """The possible mistakes in the schedules' flags: whether each was made, and its message."""
    by_samples = training.train_samples is not None
    unit = "samples" if by_samples else "iters"
    warmup = getattr(schedule, f"lr_warmup_{unit}")
    decay = getattr(schedule, f"lr_decay_{unit}") or getattr(training, f"train_{unit}") or math.inf
    return [
        (by_samples and schedule.lr_decay_iters is not None,
         "--train-samples goes with --lr-decay-samples, not with --lr-decay-iters"),
        (not by_samples and schedule.lr_decay_samples is not None,
         "--lr-decay-samples goes with --train-samples; with --train-iters give --lr-decay-iters"),
        (by_samples and schedule.lr_warmup_iters > 0,
         "--train-samples goes with --lr-warmup-samples, not with --lr-warmup-iters"),
        (not by_samples and schedule.lr_warmup_samples > 0,
         "--lr-warmup-samples goes with --train-samples; with --train-iters give --lr-warmup-iters"),
        (schedule.lr_warmup_fraction and (schedule.lr_warmup_iters or schedule.lr_warmup_samples),
         "--lr-warmup-fraction excludes --lr-warmup-iters and --lr-warmup-samples; give one"),
        # Megatron-LM's rule: the warm-up is a part of the decay's span.
        (warmup >= decay, f"--lr-warmup-{unit} is {warmup}, and the learning rate is to have decayed after {decay} "
         f"{unit}; give a shorter warm-up, or more --lr-decay-{unit} (default: all of --train-{unit})"),
        (schedule.min_lr > (schedule.lr or 0), f"--min-lr {schedule.min_lr} is above --lr {schedule.lr}"),
        (schedule.override_lr_scheduler and schedule.use_checkpoint_lr_scheduler,
         "--override-lr-scheduler and --use-checkpoint-lr-scheduler exclude each other; give one"),
        (schedule.lr_decay_style == "inverse-square-root" and not (warmup or schedule.lr_warmup_fraction),
         "--lr-decay-style inverse-square-root falls with the square root of the samples since the start over those of "
         f"the warm-up, and there is none; give --lr-warmup-{unit}"),
        *_wsd_faults(schedule, unit, warmup or (schedule.lr_warmup_fraction or 0) * decay, decay),
        *_weight_decay_faults(schedule, optimizer),
    ]


def _wsd_faults(schedule: ScheduleConfig, unit: str, warmup: float, decay: float) -> Faults:
    """Those of --lr-decay-style WSD; `warmup` and `decay`: lengths in `unit`, "iters" or "samples"."""
    lengths = {name: getattr(schedule, f"lr_wsd_decay_{name}") for name in ("iters", "samples")}
    mine, other = lengths.pop(unit), next(name for name in lengths if name != unit)
    style = schedule.lr_decay_style
    if style != "WSD":
        given = {"style": schedule.lr_wsd_decay_style if schedule.lr_wsd_decay_style != "exponential" else None,
                 unit: mine, **lengths}
        return [(value is not None, f"--lr-wsd-decay-{name} {value} is about --lr-decay-style WSD, which is {style}; "
                 "leave one of the two out") for name, value in given.items()]
    return [
        (lengths[other] is not None, f"--lr-wsd-decay-{other} goes with --train-{other}; with --train-{unit} give "
         f"--lr-wsd-decay-{unit}"),
        (mine is None, f"--lr-decay-style WSD decays over --lr-wsd-decay-{unit}, which is missing; give it"),
        ((mine or 0) + warmup > decay, f"--lr-wsd-decay-{unit} is {mine}, which is more than the {decay - warmup:g} "
         f"{unit} between the warm-up and the end of the decay; give fewer, or more --lr-decay-{unit} (default: all of "
         f"--train-{unit})"),
    ]


def _weight_decay_faults(schedule: ScheduleConfig, optimizer: OptimizerConfig) -> Faults:
    """Those of the weight decay schedule."""
    start, end, style = schedule.start_weight_decay, schedule.end_weight_decay, schedule.weight_decay_incr_style
    if style == "constant":
        return [(value is not None, f"--{name}-weight-decay {value} is of a schedule, and --weight-decay-incr-style is "
                 "constant; give linear or cosine there, or --weight-decay alone")
                for name, value in (("start", start), ("end", end))]
    return [
        (start is None or end is None, f"--weight-decay-incr-style {style} goes from --start-weight-decay to "
         "--end-weight-decay; give both"),
        ((start or 0) > (end or 0), f"--start-weight-decay {start} is above --end-weight-decay {end}; the weight decay "
         "rises, as Megatron's does"),
        (optimizer.weight_decay != OptimizerConfig().weight_decay, f"--weight-decay {optimizer.weight_decay} is "
         f"constant, and --weight-decay-incr-style is {style}; leave it out, or give constant there"),
    ]
