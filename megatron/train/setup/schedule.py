"""Chooses the schedule of learning rate and weight decay: the flags', or that of the checkpoint being resumed."""

from megatron.checkpoint.contents import Checkpoint
from megatron.checkpoint.places import LATEST
from megatron.config import Config
from megatron.config.schedule import LR_DECAY_STYLES
from megatron.errors import CheckpointError
from megatron.log import Log
from megatron.optim.schedule import Schedule, build_schedule, schedule_of
from megatron.train.state import BatchSizes

_REMEDY = ("give --override-lr-scheduler to take the flags', --use-checkpoint-lr-scheduler to keep the checkpoint's, "
           "or another --save (of the scripts CHECKPOINT_PATH) to begin anew")


def chosen_schedule(config: Config, sizes: BatchSizes, checkpoint: Checkpoint | None, log: Log) -> Schedule:
    """The schedule of the flags, or with --use-checkpoint-lr-scheduler that of `checkpoint`.

    `checkpoint`: the one that the run resumes from, if any. If the two schedules differ only in an end that the run has
    not reached yet, the run is being prolonged, and the flags' is used. Raises CheckpointError if they differ in more.
    """
    training = config.training
    schedule = build_schedule(config.schedule, global_batch_size=sizes.final, train_iters=training.train_iters,
                              train_samples=training.train_samples)
    progress = checkpoint.state["progress"] if checkpoint is not None else {"iteration": 0, "consumed_samples": 0}
    num_samples = training.train_samples or progress["consumed_samples"] + sizes.final * (
        (training.train_iters or 0) - progress["iteration"])
    if checkpoint is not None and config.schedule.use_checkpoint_lr_scheduler:
        return _kept(schedule, checkpoint, num_samples, log)
    if checkpoint is not None and not config.schedule.override_lr_scheduler:
        _check(schedule, checkpoint, config.schedule.lr_warmup_fraction, sizes.final, log)
    for line in schedule.notices(num_samples):
        log.line(line)
    return schedule


def _kept(flags: Schedule, checkpoint: Checkpoint, num_samples: int, log: Log) -> Schedule:
    """The checkpoint's schedule; logs a note if the run is longer than it.

    Raises CheckpointError for an unknown decay style, and where the weight decay varies in one schedule and is constant
    in the other, because the optimizer is built for one of the two.
    """
    schedule = schedule_of(checkpoint.state["schedule"])
    if schedule.lr_decay_style not in LR_DECAY_STYLES:
        raise CheckpointError(f"--use-checkpoint-lr-scheduler: the schedule in {checkpoint.path} is "
                              f"{schedule.lr_decay_style}, which is not known here; give --override-lr-scheduler")
    if (schedule.weight_decay_incr_style is None) != (flags.weight_decay_incr_style is None):
        raise CheckpointError("--use-checkpoint-lr-scheduler: --weight-decay-incr-style is "
                              f"{flags.weight_decay_incr_style or 'constant'}, in {checkpoint.path} "
                              f"{schedule.weight_decay_incr_style or 'constant'}; give that, or "
                              "--override-lr-scheduler")
    if schedule.lr_decay_style != "constant" and num_samples > schedule.decay_samples:
        log.line(f"note: --use-checkpoint-lr-scheduler: {schedule.notice_of_the_rest(num_samples)}; "
                 "--override-lr-scheduler takes the flags' schedule in its place")
    return schedule


def _check(schedule: Schedule, checkpoint: Checkpoint, fraction: float | None, batch_size: int, log: Log) -> None:
    """Raises CheckpointError where the schedule differs from the checkpoint's in steps that were already taken."""
    saved, done = schedule_of(checkpoint.state["schedule"]), checkpoint.state["progress"]["consumed_samples"]
    changed = schedule.differences(saved)
    if not changed:
        return
    if schedule.differs_in_its_end(saved):
        if done <= min(schedule.open_until, saved.open_until):
            if schedule.lr_decay_style != "constant":
                log.line(f"note: the learning rate schedule ends after {schedule.decay_samples:,.0f} samples, before "
                         f"it was {saved.decay_samples:,.0f}: for the {done:,} consumed so far the two are the same")
            return
        if saved.lr_decay_style == "WSD" and done > saved.open_until:
            raise CheckpointError(
                f"{checkpoint.path} is inside the decay of the learning rate, which began after "
                f"{saved.open_until:.0f} samples and is now to begin after {schedule.open_until:.0f}; go on from a "
                f"checkpoint before it, whose number goes into {checkpoint.path.parent / LATEST}, or {_REMEDY}")
    name, (value, before) = next(iter(changed.items()))
    hint, batch_before = "", checkpoint.state["config"].get("global_batch_size", batch_size)
    if name.endswith("_samples") and batch_size != batch_before:
        hint = (f" (--global-batch-size is {batch_size}, it was {batch_before}: as many iterations are then another "
                "schedule)")
    elif name == "weight_decay_incr_samples":
        hint = " (--weight-decay-incr-style is a schedule over the whole run, which so cannot be prolonged)"
    elif name == "warmup_samples" and fraction:
        hint = (f" (--lr-warmup-fraction {fraction:g} is of the decay, and so of --train-iters; "
                "--lr-warmup-iters or --lr-warmup-samples is not)")
    raise CheckpointError(f"{name.replace('_', ' ')} of the learning-rate schedule is {value}, in the checkpoint "
                          f"{before}{hint}; {_REMEDY}")
