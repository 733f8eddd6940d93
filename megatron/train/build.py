"""From a configuration to a run that is ready to train: data, model, optimizer, and what a checkpoint brings back."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from megatron.checkpoint.store import LATEST, Checkpoint, load, load_model
from megatron.config import Config, DataConfig, ModelConfig, ScheduleConfig
from megatron.config.command_line import flag_name
from megatron.data.batches.batch import BatchShape, batch_shape
from megatron.data.corpus.vocab import DEFAULT_VOCAB, Vocab
from megatron.data.rows.dataset import Splits, build_datasets
from megatron.errors import CheckpointError, ConfigError
from megatron.log import Log
from megatron.model.protein_model import ProteinModel
from megatron.optim.schedule import Schedule, build_schedule
from megatron.parallel.mesh import Mesh
from megatron.parallel.placement import parts, wholes
from megatron.train.engine import Engine, build_engine, stream_of
from megatron.train.state import BatchSizes, TrainState

# Flags that change the arithmetic of a model without changing a parameter's shape.
_SAME_ARITHMETIC = ("num_attention_heads", "kv_channels", "layernorm_epsilon", "bias_gelu_fusion", "openai_gelu",
                    "apply_residual_connection_post_layernorm")
# Flags that change which rows a sample number means.
_SAME_SAMPLES = ("data_path", "split", "seq_length", "packing", "long_proteins", "mask_prob", "seed")


@dataclass
class Run:
    """Everything that training works on."""

    config: Config
    mesh: Mesh
    log: Log
    data: Splits
    shape: BatchShape
    vocab: Vocab
    engine: Engine
    schedule: Schedule
    sizes: BatchSizes
    state: TrainState

    def checkpoint(self) -> Checkpoint:
        """What `build` needs to go on, as of now; with tensors on rank 0 alone, to which the others give their parts.

        The ranks whose mesh says that they write call this together.
        """
        mesh, parameters = self.mesh, self.engine.model.parameters
        keep = mesh.tensor.rank == mesh.shards.rank == 0
        state = {"progress": asdict(self.state), "loss_scale": self.engine.loss_scale.state(),
                 "schedule": _schedule_facts(self.schedule, self.config.schedule), "config": self.config.as_dict()}
        moments = None if self.config.checkpoint.no_save_optim else self.engine.optimizer.state()
        optimizer = None if moments is None else wholes(moments, parameters, keep=keep, pipeline=mesh.pipeline)
        model = wholes(parameters, parameters, keep=keep, pipeline=mesh.pipeline)
        return Checkpoint(self.state.iteration, model, optimizer, state)


def build(config: Config, mesh: Mesh, log: Log) -> Run:
    """A run, resumed from `--load` where there is a checkpoint; raises a UserError for whatever does not fit."""
    if config.data.data_path is None:
        raise ConfigError("--data-path is missing; give the prefix of the .bin and .idx that tools/preprocess_data.py "
                          "wrote")
    sizes = BatchSizes(config.training, mesh.data.size)
    vocab = Vocab.from_file(config.data.vocab_file or DEFAULT_VOCAB)
    checkpoint = _find_checkpoint(config, log)
    if checkpoint is not None:
        _check_arithmetic(config, checkpoint)
    schedule = _schedule(config, sizes, checkpoint)
    notice = schedule.notice(config.training.train_samples or (config.training.train_iters or 0) * sizes.final)
    if notice is not None:
        log.line(notice)
    data = build_datasets(config.data, vocab, config.training.seed)
    for part in (data.train, data.valid, data.test):
        if part is not None:
            log.line(part.describe())
    stream = stream_of(config, mesh)
    shape = batch_shape([part for part in (data.train, data.valid, data.test) if part is not None],
                        config.training.micro_batch_size, stream.token_multiple, mesh.context.rank, mesh.context.size)
    engine = _build_engine(config, mesh, vocab.padded_size(config.model.make_vocab_size_divisible_by), checkpoint)
    state = TrainState()
    if checkpoint is not None and not config.checkpoint.finetune:
        state = TrainState(**checkpoint.state["progress"])
        engine.loss_scale.load_state(checkpoint.state["loss_scale"])
        if checkpoint.optimizer is not None:
            engine.optimizer.load_state(parts(checkpoint.optimizer, engine.model.parameters))
        elif not config.checkpoint.no_load_optim:
            raise CheckpointError(f"the checkpoint in {config.checkpoint.load} holds no optimizer state; give "
                                  "--no-load-optim to start the optimizer afresh, or --finetune")
        _tell_changed_samples(config, checkpoint, log)
    return Run(config, mesh, log, data, shape, vocab, engine, schedule, sizes, state)


def _build_engine(config: Config, mesh: Mesh, padded_vocab_size: int, checkpoint: Checkpoint | None) -> Engine:
    if checkpoint is None:
        return build_engine(config, mesh, padded_vocab_size)
    source, names = f"the checkpoint in {config.checkpoint.load}", _all_names(config, padded_vocab_size)
    return build_engine(config, mesh, padded_vocab_size,
                        load=lambda stages: load_model(stages, checkpoint.model, source, names))


def _all_names(config: Config, padded_vocab_size: int) -> set[str]:
    """The names of the parameters of all stages."""
    with torch.device("meta"):
        return {name for name, _ in ProteinModel(config.model, config.precision, padded_vocab_size).named_parameters()}


def _find_checkpoint(config: Config, log: Log) -> Checkpoint | None:
    folder, target = config.checkpoint.load, config.checkpoint.save
    goes_on = folder is not None and target is not None and Path(folder).resolve() == Path(target).resolve()
    if target is not None and (Path(target) / LATEST).exists() and (config.checkpoint.finetune or not goes_on):
        raise ConfigError(f"--save {target} already holds a run, which this one would overwrite; to go on with it give "
                          f"--load {target} (without --finetune), else name another folder")
    if folder is None:
        return None
    wants_optimizer = not (config.checkpoint.finetune or config.checkpoint.no_load_optim)
    checkpoint = load(folder, wants_optimizer)
    if checkpoint is None:
        log.line(f"no checkpoint in {folder} yet: starting from random weights")
    else:
        log.line(f"{'taking the weights of' if config.checkpoint.finetune else 'going on from'} iteration "
                 f"{checkpoint.iteration} in {folder}")
    return checkpoint


def _schedule(config: Config, sizes: BatchSizes, checkpoint: Checkpoint | None) -> Schedule:
    """The schedule of the flags, or the checkpoint's with --use-checkpoint-lr-scheduler; raises where they differ."""
    training = config.training
    schedule = build_schedule(config.schedule, global_batch_size=sizes.final, train_iters=training.train_iters,
                              train_samples=training.train_samples)
    if checkpoint is None or config.checkpoint.finetune or config.schedule.override_lr_scheduler:
        return schedule
    saved = checkpoint.state["schedule"]
    if config.schedule.use_checkpoint_lr_scheduler:
        section = replace(config.schedule, **{name: saved[name] for name in ("lr", "min_lr", "lr_decay_style")})
        return Schedule(section, warmup_samples=saved["warmup_samples"], decay_samples=saved["decay_samples"])
    for name, value in _schedule_facts(schedule, config.schedule).items():
        if saved[name] != value:
            raise CheckpointError(f"{name.replace('_', ' ')} of the learning-rate schedule is {value}, in the "
                                  f"checkpoint {saved[name]}; give --override-lr-scheduler to take the flags', "
                                  "or --use-checkpoint-lr-scheduler to keep the checkpoint's")
    return schedule


def _schedule_facts(schedule: Schedule, config: ScheduleConfig) -> dict[str, float | str]:
    return {"lr": config.lr, "min_lr": config.min_lr, "lr_decay_style": config.lr_decay_style,
            "warmup_samples": schedule.warmup_samples, "decay_samples": schedule.decay_samples}


def _check_arithmetic(config: Config, checkpoint: Checkpoint) -> None:
    names = {item.name: flag_name(item) for item in fields(ModelConfig)}
    for name, now, then in _changed(config, checkpoint.state["config"], _SAME_ARITHMETIC):
        raise CheckpointError(f"{names[name]} is {now}, but the checkpoint was trained with {then}; give that value")


def _tell_changed_samples(config: Config, checkpoint: Checkpoint, log: Log) -> None:
    names = {item.name: flag_name(item) for item in fields(DataConfig)}
    for name, now, then in _changed(config, checkpoint.state["config"], _SAME_SAMPLES):
        log.line(f"note: {names.get(name, '--' + name)} is {now}, it was {then} before: the samples to come are others")


def _changed(config: Config, saved: Mapping, names: tuple[str, ...]) -> list[tuple[str, object, object]]:
    values = config.as_dict()
    plain = {name: list(v) if isinstance(v := values[name], tuple) else v for name in names}
    return [(name, plain[name], saved[name]) for name in names if saved.get(name, plain[name]) != plain[name]]
