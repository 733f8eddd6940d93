"""Notes on flags that have no effect in a configuration, because the flag that they depend on is not given."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron.config import Config
from megatron.config.declaration import flag_name, is_switch, shown


def notes(config: Config, said: Mapping[str, Any], of_preset: Mapping[str, Any]) -> list[str]:
    """A line for each flag that has no effect, and one if the checkpoints in --save cannot be resumed from.

    `said`: the values of file and flags, `of_preset`: those of the preset, by field name. These are notes, not errors,
    so that one script serves runs with and without the other flag. Of a preset's values only an unused warm-up is
    reported.
    """
    checkpoint, optimizer = config.checkpoint, config.optimizer
    owners = {
        "--save": (checkpoint.save, ("save_interval", "save_interval_minutes", "async_save", "keep_checkpoints",
                                     "keep_every", "save_retain_optimizer", "no_save_optim")),
        "--load": (checkpoint.load, ("no_load_optim",)),
        "--profile": (config.logging.profile, ("profile_step_start", "profile_step_end", "profile_ranks")),
        "--dry-run": (config.parallel.dry_run, ("dry_run_ranks", "dry_run_rank")),
        "another --optimizer than sgd": (optimizer.optimizer != "sgd", ("adam_beta1", "adam_beta2", "adam_eps")),
    }
    items = {item.name: item for _, section in Config().sections() for item in fields(section)}
    idle = [(items[name], owner) for owner, (is_there, names) in owners.items() if not is_there
            for name in names if said.get(name, items[name].default) != items[name].default]
    lines = [f"note: {flag_name(item)}{'' if is_switch(item) else f' {shown(said[item.name])}'} changes nothing "
             f"without {owner}" for item, owner in idle]
    if checkpoint.save and checkpoint.no_save_optim and optimizer.has_state and not checkpoint.no_load_optim:
        lines.append("note: with --no-save-optim the same command does not go on from its checkpoints; beside "
                     "--no-load-optim it does, with an optimizer that starts afresh each time")
    warmup, schedule = of_preset.get("lr_warmup_iters"), config.schedule
    if warmup and config.training.train_samples and not (schedule.lr_warmup_samples or schedule.lr_warmup_fraction):
        lines.append(f"note: the preset's --lr-warmup-iters {warmup} does not count for --train-samples: there is no "
                     "warm-up unless you give --lr-warmup-samples or --lr-warmup-fraction")
    return lines
