"""Resuming: finds the checkpoint of `--load`, refuses flags that do not fit it, and logs other flags that changed."""

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron.checkpoint.contents import Checkpoint
from megatron.checkpoint.convert.formats import foreign_name
from megatron.checkpoint.newest import open_newest
from megatron.checkpoint.places import LATEST, STATE, iterations
from megatron.checkpoint.store import WithOptimizer, in_order, read_state
from megatron.config import CheckpointConfig, Config
from megatron.config.data import VOCABULARIES
from megatron.config.declaration import as_given, flag_name, in_words
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.blend import BlendedDataset
from megatron.data.rows.dataset import Splits
from megatron.errors import CheckpointError, ConfigError
from megatron.log import Log
from megatron.parallel.collectives import all_gather_object
from megatron.parallel.mesh import Axis
from megatron.train.setup.fresh_start import check_fresh_start, refuse_lost_run

_FACTS = {"progress": dict, "schedule": dict, "loss_scale": list, "config": dict}  # a state's fields and their types
_SCHEDULE = {"lr", "min_lr", "lr_decay_style", "warmup_samples", "decay_samples"}


def going_on(config: Config) -> Config:
    """`config` changed to resume the run in `--save`, whatever that run first loaded."""
    options = config.checkpoint
    return replace(config, checkpoint=replace(options, load=options.save, finetune=False, load_ema=False))


def started_again(config: Config, world: Axis, log: Log) -> Config:
    """`going_on(config)`, with a log line, if `--save` holds a run that began from this very `--load`; else `config`.

    So a scheduler can repeat the command that began a run, and it resumes. A collective: all ranks call this together.
    """
    options = config.checkpoint
    if None in (options.load, options.save) or origin_of(options.load) == origin_of(options.save) or (
            all_gather_object(_taken_from(Path(options.save)), world)[0] != origin_of(options.load)):
        return config
    log.line(f"note: --save {options.save} holds a run that took up --load {options.load}: going on with that run")
    return going_on(config)


def origin_of(folder: str) -> str:
    """The name under which a checkpoint records the folder that its run first loaded: its absolute path.

    Symbolic links stay, because the target of RUN/best may change.
    """
    return os.path.abspath(folder)


def find_checkpoint(config: CheckpointConfig, optimizer: str, world: Axis, log: Log) -> Checkpoint | None:
    """The checkpoint of `--load` to start from; None where the run starts from random weights.

    A `--load` without a checkpoint is an error, since the path may be mistyped, unless --save is the same folder. With
    --no-load-optim the checkpoint comes without optimizer state, except that a run in --save which itself began so, and
    with the same `optimizer`, keeps its own. The same on all ranks of `world`, which call this together. Raises
    ConfigError or CheckpointError.
    """
    is_same_run = None not in (config.load, config.save) and (
        Path(config.load).resolve() == Path(config.save).resolve())
    _check_flags(config, is_same_run)
    if config.load is None:
        return None
    wants_optimizer: WithOptimizer = not (config.finetune or config.no_load_optim)
    if config.no_load_optim and is_same_run:
        wants_optimizer = partial(_is_of_fresh_start, optimizer)
    checkpoint = open_newest(config.load, world, log, wants_optimizer)
    if checkpoint is None:
        check_fresh_start(config, is_same_run)
        log.line(f"no checkpoint in {config.load} yet: starting from random weights")
        return None
    if config.finetune:
        return _weights_of(checkpoint, config, log)
    return _progress_of(checkpoint, config, wants_optimizer, log)


def refuse_changes(config: Config, vocab: Vocab, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where flags would give the checkpoint's weights or optimizer state another meaning."""
    # Checkpoints that do not mention proteins' ends were trained with [CLS] alone.
    saved, options = {"protein_ends": "start", **_with_later_flags(checkpoint)}, config.checkpoint
    for item, now, then in _changed(config, config.as_dict(), saved, "arithmetic"):
        raise CheckpointError(f"{flag_name(item)} is {now}, but the checkpoint was trained with {then}; give "
                              f"{as_given(item, then)}")
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
    """A log line for each way in which a run differs from the checkpoint that it resumes from.

    `facts`: `facts_of` the run. `saved`: the state of the checkpoint.
    """
    lines, now, then, is_known = [], facts["config"], saved["config"], "data" in saved
    is_same_data = facts["data"] == saved["data"] if is_known else _same_places(now["data_path"], then.get("data_path"))
    for item, value, before in _changed(config, now, then, "samples"):
        if not (item.name == "data_path" and is_same_data):  # the same files in another place
            unless = "" if is_known or item.name != "data_path" else ", unless the files are the same"
            lines.append(f"note: {flag_name(item)} is {value}, it was {before} before: later samples differ"
                         f"{unless}")
    if now["data_path"] == then.get("data_path") and not is_same_data:
        lines.append("note: the files behind --data-path are not those of before: later samples differ")
    if not lines and facts["clusters"] != saved.get("clusters", facts["clusters"]):
        lines.append("note: the clusters of --cluster-file are not those of before: later samples differ")
    rows, rows_before = (values.get("micro_batch_size", now["micro_batch_size"]) for values in (now, then))
    if rows != rows_before and (config.model.attention_dropout or config.model.hidden_dropout):
        lines.append(f"note: --micro-batch-size is {rows}, it was {rows_before} before: dropout masks differ")
    lines += [f"note: {flag_name(item)} is {value}, it was {before} before: it applies from here on"
              for kind in ("course", "dropout") for item, value, before in _changed(config, now, then, kind)]
    return lines


def facts_of(config: Config, vocab: Vocab, data: Splits, global_batch_size: int) -> dict[str, Any]:
    """What a checkpoint records of its run's configuration and data, for a comparison on resuming; JSON values."""
    parts, weights = ((data.train.datasets, data.train.weights) if isinstance(data.train, BlendedDataset) else
                      ((data.train,), ()))
    own = {"global_batch_size": global_batch_size, "vocab_file": config.data.absolute_vocab_file}
    return {"config": _as_json(config.as_dict() | own),
            **vocab.state(),
            "data": [list(map(str, weights)), [part.documents.indexed.contents for part in parts]],
            "clusters": [part.clusters.identity for part in parts if part.clusters is not None]}


def _check_flags(config: CheckpointConfig, is_same_run: bool) -> None:
    """Raises ConfigError or CheckpointError where --save, --load and --finetune do not go together, or --save holds
    what is no run; nothing has been loaded by then.
    """
    target = config.save
    if target is not None and (config.finetune or not is_same_run) and iterations(Path(target)):
        raise ConfigError(f"--save {target} already holds a run, which this one would overwrite; to go on with it give "
                          f"--load {target} (without --finetune), else name another folder")
    if target is not None and (other := foreign_name(Path(target))) is not None:
        raise ConfigError(f"--save {target} holds a model of another program ({other}), which a run's checkpoints "
                          "beside it would hide; name a new folder")
    if target is not None:
        refuse_lost_run(Path(target))
    if config.load_ema and not config.finetune:
        raise ConfigError("--load-ema takes the average of a run's weights, from which that run cannot go on; give "
                          "--finetune as well")
    if config.finetune and config.load is None:
        raise ConfigError("--finetune takes the weights of --load, which is missing; give the folder of a run")


def _weights_of(checkpoint: Checkpoint, config: CheckpointConfig, log: Log) -> Checkpoint:
    """The checkpoint as --finetune takes it: the weights, with --load-ema their average; says so."""
    _check_state(checkpoint, {"config"})
    log.line(f"taking the weights of iteration {checkpoint.iteration} in {config.load}")
    return checkpoint.averaged() if config.load_ema else checkpoint


def _progress_of(checkpoint: Checkpoint, config: CheckpointConfig, wants_optimizer: WithOptimizer,
                 log: Log) -> Checkpoint:
    """The checkpoint as a run goes on from it, under --no-load-optim perhaps without optimizer state; says so."""
    _check_state(checkpoint, _FACTS)
    _name_batch(checkpoint.state)
    log.line(f"going on from iteration {checkpoint.iteration} in {config.load}")
    if not config.no_load_optim:
        return checkpoint
    if not (callable(wants_optimizer) and wants_optimizer(checkpoint.state)):
        checkpoint = replace(checkpoint, optimizer=None)
    log.line("note: --no-load-optim: the optimizer starts afresh" if checkpoint.optimizer is None else
             "note: --no-load-optim held when this run began: its optimizer goes on")
    return checkpoint


def _is_of_fresh_start(optimizer: str, state: Mapping[str, Any]) -> bool:
    """Whether the run that saved this state began with --no-load-optim, so that its optimizer had started afresh."""
    saved = state.get("config")
    return isinstance(saved, dict) and bool(saved.get("no_load_optim")) and saved.get("optimizer") == optimizer


def _taken_from(folder: Path) -> str | None:
    """The folder that the run in `folder` first loaded; None if there is no run, or it does not say."""
    with suppress(CheckpointError, IndexError):
        return read_state(in_order(folder)[1][0] / STATE).get("taken_from")
    return None


def _vocabulary_of(checkpoint: Checkpoint, default: Vocab) -> str:
    """The identity of a checkpoint's vocabulary; that of `default` if it records neither that nor a family's name."""
    family = checkpoint.state["config"].get("vocab_file")
    told = Vocab.from_file(family) if family in VOCABULARIES else default
    return checkpoint.state.get("vocabulary", told.identity)


def _named(flags: Mapping[str, Any]) -> str:
    mask_token = flags.get("mask_token")
    return (flags.get("vocab_file") or "the default") + (f" with --mask-token {mask_token}" if mask_token else "")


def _changed(config: Config, now: Mapping[str, Any], saved: Mapping[str, Any],
             kind: str) -> list[tuple[Field, str, str]]:
    """The flags that change `kind` ("arithmetic", "samples", ...) and differ, with their values now and then as text.
    """
    now = _as_json(now)
    return [(item, in_words(item, now[item.name]), in_words(item, saved[item.name]))
            for _, section in config.sections() for item in fields(section)
            if item.metadata["changes"] == kind and saved.get(item.name, now[item.name]) != now[item.name]]


def _with_later_flags(checkpoint: Checkpoint) -> dict[str, Any]:
    """The flags of a checkpoint; for one of ours, flags that did not exist when it was saved have their defaults."""
    saved = checkpoint.state["config"]
    if "vocabulary" not in checkpoint.state:
        return saved
    return Config().as_dict() | {"num_query_groups": saved.get("num_attention_heads")} | saved


def _same_places(paths: Sequence[str], before: Sequence[str] | None) -> bool:
    return [os.path.abspath(path) for path in paths] == [os.path.abspath(path) for path in before or ()]


def _name_batch(state: dict[str, Any]) -> None:
    """Add the global batch size to a state that lacks it, as when the flag had its default.

    It is the samples per step so far; unless that is a whole number without a ramp-up, it stays unknown.
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
    """Raises CheckpointError if the checkpoint's state lacks one of `facts`, or is not the state of a run.

    Other programs' files lack some, and no checksum protects the state of what --to whole wrote.
    """
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
    """Whether a state's "guards" have the form that `Run.facts` gives them."""
    try:
        pairs, counts = guards["left_out"] + guards["judge"]["steps"], [guards["num_rewinds"],
                                                                        guards["judge"]["num_steps"]]
        return all(isinstance(value, int | float) for pair in pairs for value in pair) and all(
            len(pair) == 2 for pair in pairs) and all(type(count) is int and count >= 0 for count in counts)
    except (TypeError, KeyError, IndexError):
        return False
