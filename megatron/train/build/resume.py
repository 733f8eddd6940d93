"""What a run takes up: the checkpoint of `--load`, what must be as it was, and a line for whatever else differs."""

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron.checkpoint.convert.formats import foreign_name
from megatron.checkpoint.newest import newest
from megatron.checkpoint.places import BOARD, CONFIG_FILE, LATEST, LOSSES, METRICS_FILE, STATE, iterations
from megatron.checkpoint.store import Wanted, in_order, read_state
from megatron.checkpoint.stored import Checkpoint
from megatron.config import CheckpointConfig, Config
from megatron.config.data import VOCABULARIES
from megatron.config.declaration import flag_name, in_words
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.blend import BlendedDataset
from megatron.data.rows.dataset import Splits
from megatron.errors import CheckpointError, ConfigError
from megatron.log import Log
from megatron.parallel.collectives import everyones
from megatron.parallel.mesh import Axis

# What may lie in the folder of a run that has yet to save, besides hidden files; people direct its output there.
_OURS = (CONFIG_FILE, LOSSES, "mlflow", "profile", BOARD, "trackers.json", "wandb")
_OUTPUT_ENDINGS = (".log", ".out", ".err", ".txt", ".prom")
_FACTS = {"progress": dict, "schedule": dict, "loss_scale": list, "config": dict}
_SCHEDULE = {"lr", "min_lr", "lr_decay_style", "warmup_samples", "decay_samples"}


def going_on(config: Config) -> Config:
    """The configuration that goes on with the run in `--save`, whatever that began with."""
    options = config.checkpoint
    return replace(config, checkpoint=replace(options, load=options.save, finetune=False, load_ema=False))


def started_again(config: Config, world: Axis, log: Log) -> Config:
    """What goes on with the run in `--save`, where that took up this very `--load`, and says so; else `config`.

    So whatever starts a command again, once it has saved, need not know how it began. All ranks call this together.
    """
    options = config.checkpoint
    if None in (options.load, options.save) or origin_of(options.load) == origin_of(options.save) or (
            everyones(_taken_from(Path(options.save)), world)[0] != origin_of(options.load)):
        return config
    log.line(f"note: --save {options.save} holds a run that took up --load {options.load}: going on with that run")
    return going_on(config)


def origin_of(folder: str) -> str:
    """How a checkpoint names what its run took up first, if that was another folder than its own.

    As it was given: where RUN/best leads may change.
    """
    return os.path.abspath(folder)


def find_checkpoint(config: CheckpointConfig, optimizer: str, world: Axis, log: Log) -> Checkpoint | None:
    """The checkpoint of `--load`; None where the run starts afresh, which a mistyped path is no reason for.

    Without the state of the optimizer where --no-load-optim leaves it: not again where the run in --save has done so,
    with the same `optimizer`. The same on all ranks of `world`, which call this together. Raises ConfigError or
    CheckpointError.
    """
    folder, target = config.load, config.save
    goes_on = folder is not None and target is not None and Path(folder).resolve() == Path(target).resolve()
    if target is not None and (config.finetune or not goes_on) and iterations(Path(target)):
        raise ConfigError(f"--save {target} already holds a run, which this one would overwrite; to go on with it give "
                          f"--load {target} (without --finetune), else name another folder")
    if target is not None and (other := foreign_name(Path(target))) is not None:
        raise ConfigError(f"--save {target} holds a model of another program ({other}), which a run's checkpoints "
                          "beside it would hide; name a new folder")
    if config.load_ema and not config.finetune:
        raise ConfigError("--load-ema takes the average of a run's weights, from which that run cannot go on; give "
                          "--finetune as well")
    if folder is None:
        if config.finetune:
            raise ConfigError("--finetune takes the weights of --load, which is missing; give the folder of a run")
        return None
    wanted: Wanted = not (config.finetune or config.no_load_optim)
    if config.no_load_optim and goes_on:
        wanted = partial(_is_of_fresh_start, optimizer)
    checkpoint = newest(folder, world, log, wanted)
    if checkpoint is not None:
        _check_state(checkpoint, set(_FACTS) if not config.finetune else {"config"})
        if not config.finetune:
            _name_batch(checkpoint.state)
        log.line(f"{'taking the weights of' if config.finetune else 'going on from'} iteration "
                 f"{checkpoint.iteration} in {folder}")
        if config.no_load_optim and not config.finetune:
            if not (callable(wanted) and wanted(checkpoint.state)):
                checkpoint = replace(checkpoint, optimizer=None)
            log.line("note: --no-load-optim: the optimizer starts afresh" if checkpoint.optimizer is None else
                     "note: --no-load-optim held when this run began: its optimizer goes on")
        return checkpoint.averaged() if config.load_ema else checkpoint
    strangers = _strangers(Path(folder))
    if config.finetune or not goes_on or strangers:
        found = f"{strangers[0]} but no checkpoint" if strangers else "no checkpoint"
        raise CheckpointError(f"--load {folder} holds {found}; give the folder that a run was saved in, or to start "
                              "afresh leave --load out, or give --load and --save the same new folder")
    log.line(f"no checkpoint in {folder} yet: starting from random weights")
    return None


def refuse_changes(config: Config, vocab: Vocab, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where the weights, or the optimizer's state, would mean something else than they did."""
    # Programs and editions that say nothing of proteins' ends have [CLS] alone.
    saved, options = {"protein_ends": "start", **_with_later_flags(checkpoint)}, config.checkpoint
    for item, now, then in _changed(config, config.as_dict(), saved, "arithmetic"):
        raise CheckpointError(f"{flag_name(item)} is {now}, but the checkpoint was trained with {then}; give that "
                              "value")
    if _vocabulary_of(checkpoint, vocab) != vocab.identity:
        now, then = _named(config.as_dict() | {"vocab_file": config.data.absolute_vocab_file}), _named(saved)
        remedy = f"put it back as it was, for {then} has changed" if now == then else (
            f"it was trained with {then}: give that vocabulary")
        raise CheckpointError(f"--vocab-file is {now}, whose tokens are not those, in that order, of the checkpoint in "
                              f"{options.load}; {remedy}")
    keeps_optimizer = not (options.finetune or options.no_load_optim)
    if keeps_optimizer and saved.get("optimizer", config.optimizer.optimizer) != config.optimizer.optimizer:
        raise CheckpointError(f"--optimizer is {config.optimizer.optimizer}, but the checkpoint in {options.load} "
                              f"holds the state of {saved['optimizer']}; give --optimizer {saved['optimizer']}, or "
                              "--no-load-optim to start the optimizer afresh")
    if keeps_optimizer and checkpoint.optimizer is None and config.optimizer.has_state:
        raise CheckpointError(f"the checkpoint in {options.load} holds no optimizer state; give "
                              "--no-load-optim to start the optimizer afresh, or --finetune")


def differences(config: Config, facts: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """A line for each difference between a run and the state of the checkpoint that it goes on from.

    `facts`: what the run's own checkpoints will say of it, as `facts_of` has it.
    """
    lines, now, then, is_known = [], facts["config"], saved["config"], "data" in saved
    is_same_data = facts["data"] == saved["data"] if is_known else _same_places(now["data_path"], then.get("data_path"))
    for item, value, before in _changed(config, now, then, "samples"):
        if not (item.name == "data_path" and is_same_data):  # moved, not changed
            unless = "" if is_known or item.name != "data_path" else ", unless the files are the same"
            lines.append(f"note: {flag_name(item)} is {value}, it was {before} before: the samples to come are others"
                         f"{unless}")
    if now["data_path"] == then.get("data_path") and not is_same_data:
        lines.append("note: the files behind --data-path are not those of before: the samples to come are others")
    if not lines and facts["clusters"] != saved.get("clusters", facts["clusters"]):
        lines.append("note: the clusters of --cluster-file are not those of before: the samples to come are others")
    rows, rows_before = (values.get("micro_batch_size", now["micro_batch_size"]) for values in (now, then))
    if rows != rows_before and (config.model.attention_dropout or config.model.hidden_dropout):
        lines.append(f"note: --micro-batch-size is {rows}, it was {rows_before} before: dropout takes others")
    lines += [f"note: {flag_name(item)} is {value}, it was {before} before: it holds from here on"
              for kind in ("course", "dropout") for item, value, before in _changed(config, now, then, kind)]
    return lines


def facts_of(config: Config, vocab: Vocab, data: Splits, global_batch_size: int) -> dict[str, Any]:
    """What a checkpoint says of its run, to be compared with the one that goes on from it; as JSON has it."""
    parts, weights = ((data.train.datasets, data.train.weights) if isinstance(data.train, BlendedDataset) else
                      ((data.train,), ()))
    own = {"global_batch_size": global_batch_size, "vocab_file": config.data.absolute_vocab_file}
    return {"config": _as_json(config.as_dict() | own),
            "vocabulary": vocab.identity,
            "data": [list(map(str, weights)), [part.documents.indexed.contents() for part in parts]],
            "clusters": [part.clusters.identity for part in parts if part.clusters is not None]}


def _is_of_fresh_start(optimizer: str, state: Mapping[str, Any]) -> bool:
    """Whether what saved this was itself told --no-load-optim, so that its optimizer is the one started afresh."""
    saved = state.get("config")
    return isinstance(saved, dict) and bool(saved.get("no_load_optim")) and saved.get("optimizer") == optimizer


def _taken_from(folder: Path) -> str | None:
    """What the run in a folder says that it took up; None where there is no run, or it does not say."""
    with suppress(CheckpointError, IndexError):
        return read_state(in_order(folder)[1][0] / STATE).get("taken_from")
    return None


def _vocabulary_of(checkpoint: Checkpoint, default: Vocab) -> str:
    """The identity of a checkpoint's vocabulary; that of `default` where neither it nor a family's name is told."""
    family = checkpoint.state["config"].get("vocab_file")
    told = Vocab.from_file(family) if family in VOCABULARIES else default
    return checkpoint.state.get("vocabulary", told.identity)


def _named(flags: Mapping[str, Any]) -> str:
    mask_token = flags.get("mask_token")
    return (flags.get("vocab_file") or "the default") + (f" with --mask-token {mask_token}" if mask_token else "")


def _changed(config: Config, now: Mapping[str, Any], saved: Mapping[str, Any],
             kind: str) -> list[tuple[Field, str, str]]:
    """The flags, of those that change what `kind` says, whose values differ: each with its value now and then, in
    words.
    """
    now = _as_json(now)
    if isinstance(saved.get("mask_prob"), float):  # of a time when a share had no course
        saved = {**saved, "mask_prob": [saved["mask_prob"]]}
    return [(item, in_words(item, now[item.name]), in_words(item, saved[item.name]))
            for _, section in config.sections() for item in fields(section)
            if item.metadata["changes"] == kind and saved.get(item.name, now[item.name]) != now[item.name]]


def _with_later_flags(checkpoint: Checkpoint) -> dict[str, Any]:
    """The flags of a checkpoint, and where it is one of ours, those that came after it: it does without."""
    saved = checkpoint.state["config"]
    if "vocabulary" not in checkpoint.state:
        return saved
    return Config().as_dict() | {"num_query_groups": saved.get("num_attention_heads")} | saved


def _same_places(paths: Sequence[str], before: Sequence[str] | None) -> bool:
    return [os.path.abspath(path) for path in paths] == [os.path.abspath(path) for path in before or ()]


def _name_batch(state: dict[str, Any]) -> None:
    """Put the global batch into a state that does not name it, as where the flag was left to its default.

    It is what the steps so far come to; where they differ, nothing is known of it.
    """
    config, progress = state["config"], state["progress"]
    if config.get("global_batch_size") is None:
        config.pop("global_batch_size", None)
        rows, rest = divmod(progress["consumed_samples"], max(1, progress["iteration"]))
        if rows and not rest and not config.get("rampup_batch_size"):
            config["global_batch_size"] = rows


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _check_state(checkpoint: Checkpoint, facts: Collection[str]) -> None:
    """Raises CheckpointError where a state that is JSON is not that of a run, or lacks one of `facts`."""
    state = checkpoint.state
    if absent := sorted(set(facts) - state.keys()):
        raise CheckpointError(f"{checkpoint.path} does not say its {absent[0].replace('_', ' ')}, without which no run "
                              "goes on; give --finetune to take the weights alone")
    wrong = [name for name in facts if not isinstance(state[name], _FACTS[name])]
    if not wrong and "progress" in facts:
        progress, scale = state["progress"], state["loss_scale"]
        holds = {
            "progress": progress.keys() == {"iteration", "consumed_samples"} and all(
                type(value) is int and 0 <= value < 2**63 for value in progress.values()) and (
                progress["iteration"] == checkpoint.iteration),
            "guards": "guards" not in state or _are_guards(state["guards"]),
            "loss_scale": len(scale) == 3 and all(isinstance(value, int | float) for value in scale),
            "schedule": state["schedule"].keys() >= _SCHEDULE and all(
                isinstance(state["schedule"][name], int | float) for name in _SCHEDULE - {"lr_decay_style"})}
        wrong = [f"{name} {state[name]}" for name, is_whole in holds.items() if not is_whole]
    if wrong:
        raise CheckpointError(f"{checkpoint.path}: its state is damaged, or of another folder ({wrong[0]}); write the "
                              f"number of another iter_ folder into {checkpoint.path.parent / LATEST}")


def _are_guards(guards: Any) -> bool:
    """Whether these are what `Run.facts` says of windows that are left out, and of the steps behind."""
    try:
        pairs, counts = guards["left_out"] + guards["judge"]["steps"], [guards["num_rewinds"],
                                                                        guards["judge"]["num_steps"]]
        return all(isinstance(value, int | float) for pair in pairs for value in pair) and all(
            len(pair) == 2 for pair in pairs) and all(type(count) is int and count >= 0 for count in counts)
    except (TypeError, KeyError, IndexError):
        return False


def _strangers(folder: Path) -> list[str]:
    """What lies in a folder and is not of a run that has yet to save."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if METRICS_FILE in names:  # one has begun here
        return []
    return [name for name in names if name not in _OURS and not name.startswith((".", "abandoned-"))
            and not name.endswith(_OUTPUT_ENDINGS)]
