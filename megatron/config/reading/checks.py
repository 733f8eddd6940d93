"""Builds a `Config` of values: checks each value, fills in derived ones, and refuses impossible combinations."""

import math
from collections.abc import Collection, Mapping
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

from megatron.config import Config, DataConfig, LoggingConfig, ModelConfig, ParallelConfig, PrecisionConfig
from megatron.config.declaration import flag_name, shown, with_tuples
from megatron.config.precision import DELAYED
from megatron.config.schedule import Faults, schedule_faults
from megatron.errors import CheckpointError, ConfigError

# Fields that only have an effect with a dynamic loss scale, with any loss scale, and with Muon.
_OF_DYNAMIC_SCALE = ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
_OF_LOSS_SCALE = ("loss_scale", *_OF_DYNAMIC_SCALE, "fp16_lm_cross_entropy")
_OF_MUON = ("muon_momentum", "muon_momentum_warmup_iters", "muon_num_ns_steps")


def plain(values: Mapping[str, Any]) -> Config:
    """The configuration with these values, by field name, and defaults, each checked by itself; raises ConfigError."""
    config = Config()
    for name, section in config.sections():
        mine = with_tuples({item.name: values[item.name] for item in fields(section) if item.name in values})
        config = replace(config, **{name: replace(section, **mine)})
    for _, section in config.sections():
        check_section(section)
    return config


def filled(config: Config) -> Config:
    """`config` with derived values filled in; raises ConfigError for impossible combinations."""
    config = _with_derived(config)
    _check_combinations(config)
    return config


def check_heads(saved: Mapping[str, Any], place: Path | str) -> None:
    """Raises CheckpointError if a checkpoint's flags, `saved`, lack the number of attention heads.

    No shape of a weight tells it: with another number the model computes something else, and nobody would notice.
    """
    if saved.get("num_attention_heads") is None:
        raise CheckpointError(f"{place} does not say how many attention heads its model has; give pretrain_tape.py "
                              '--num-attention-heads, and for other tools put "args": {"num_attention_heads": …} into '
                              "its model_optim_rng.pt (or common.pt) with torch.load and torch.save")


def check_section(section: Any) -> None:
    """Raises ConfigError if a value in the section fails its flag's check."""
    for item in fields(section):
        check_value(item, getattr(section, item.name), flag_name(item))


def check_value(item: Field, value: Any, name: str) -> None:
    """Raises ConfigError if a value fails its flag's check; `name`: what the message calls the flag."""
    check, values = item.metadata["check"], value if isinstance(value, tuple) else (value,)
    if any(one in ("", "~") or str(one).startswith("~/") for one in values):
        raise ConfigError(f"{name} is {' '.join(map(repr, values))}, where the shell should have put "
                          "something in; write it out, or leave the flag out")
    if any(isinstance(one, float) and not math.isfinite(one) for one in values):
        raise ConfigError(f"{name} is {shown(value)}; it must be a finite number")
    if check is None or value is None:
        return
    holds, expected = check
    for one in values:
        if not holds(one):
            raise ConfigError(f"{name} is {one}; it must be {expected}")


def _with_derived(config: Config) -> Config:
    """`config` with those defaults filled in that depend on other flags; raises ConfigError if they are impossible."""
    model, data = config.model, config.data
    for value, flag in ((data.seq_length, "--seq-length"), (config.training.micro_batch_size, "--micro-batch-size"),
                        (config.schedule.lr, "--lr")):
        if value is None:
            raise ConfigError(f"{flag} is missing; give it, or a --preset")
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        raise ConfigError(f"--hidden-size {model.hidden_size} is not divisible by --num-attention-heads "
                          f"{model.num_attention_heads}; choose a multiple, or give --kv-channels")
    if model.group_query_attention and model.num_query_groups is None:
        raise ConfigError("--group-query-attention needs --num-query-groups: how many keys and values the heads share")
    # Megatron-LM's rule for a gated layer: as many parameters as the other, in multiples of 64.
    width = 4 * model.hidden_size if not model.swiglu else max(64, int(model.hidden_size * 8 / 3) // 64 * 64)
    has_positions = model.position_embedding_type == "learned_absolute"
    positions: Any = model.max_position_embeddings or data.seq_length if has_positions else None
    model = replace(model, ffn_hidden_size=model.ffn_hidden_size or width, num_query_groups=model.num_groups,
                    kv_channels=model.kv_channels or model.hidden_size // model.num_attention_heads,
                    max_position_embeddings=positions,
                    checkpoint_activations=model.checkpoint_activations or model.recompute_granularity == "full")
    parallel = config.parallel
    if parallel.use_distributed_optimizer and parallel.data_parallel_sharding == "none":
        parallel = replace(parallel, data_parallel_sharding="optimizer")
    return replace(config, model=model, optimizer=config.optimizer.filled(), parallel=parallel)


def _check_combinations(config: Config) -> None:
    """Raises ConfigError for the first combination of flags that is impossible."""
    faults = [*_model_faults(config.model), *_row_faults(config.model, config.data),
              *_precision_faults(config.precision), *_idle_faults(config), *_training_faults(config),
              *_guards_faults(config), *_logging_faults(config.logging, config.checkpoint.save),
              *_sharding_faults(config.parallel)]
    for is_wrong, message in faults:
        if is_wrong:
            raise ConfigError(message)


# Each of the following gives the possible mistakes of a kind: whether it was made (true or false), and the message.


def _row_faults(model: ModelConfig, data: DataConfig) -> Faults:
    return [
        (model.position_embedding_type == "learned_absolute" and model.max_position_embeddings < (data.seq_length or 0),
         f"--seq-length {data.seq_length} needs as many positions, for a protein may fill a row; "
         f"--max-position-embeddings is {model.max_position_embeddings}: give --seq-length "
         f"{model.max_position_embeddings}, or a model with more"),
        ((data.seq_length or math.inf) <= data.num_ends,
         f"--seq-length {data.seq_length} holds no residue between the ends of --protein-ends {data.protein_ends}; it "
         f"must be {data.num_ends + 1} or greater"),
    ]


def _idle_faults(config: Config) -> Faults:
    return [
        *_idle(config.precision, _OF_LOSS_SCALE, config.precision.fp16, "--fp16, which is missing"),
        *_idle(config.precision, _OF_DYNAMIC_SCALE, config.precision.loss_scale is None,
               f"a dynamic loss scale, and --loss-scale {config.precision.loss_scale} is fixed"),
        *_idle(config.optimizer, _OF_MUON, config.optimizer.uses_muon,
               f"--optimizer muon and normuon, which is {config.optimizer.optimizer}"),
        *_idle(config.optimizer, ("sgd_momentum",), config.optimizer.optimizer == "sgd",
               f"--optimizer sgd, which is {config.optimizer.optimizer}"),
        *_idle(config.optimizer, ("normuon_beta2",), config.optimizer.optimizer == "normuon",
               f"--optimizer normuon, which is {config.optimizer.optimizer}"),
        *_idle(config.model, ("checkpoint_num_layers",), config.model.checkpoint_activations,
               "--checkpoint-activations, which is missing"),
    ]


def _training_faults(config: Config) -> Faults:
    model, data, training = config.model, config.data, config.training
    by_samples = training.train_samples is not None
    return [
        ((training.train_iters is None) != by_samples, "give one of --train-iters and --train-samples"),
        *schedule_faults(config.schedule, training, config.optimizer),
        (not by_samples and training.rampup_batch_size is not None,
         "--rampup-batch-size goes with --train-samples, since iterations then differ in size"),
        (data.mask_token_prob + data.mask_random_prob > 1,
         f"--mask-token-prob {data.mask_token_prob} and --mask-random-prob {data.mask_random_prob} sum to more than 1"),
        (model.checkpoint_activations and model.recompute_granularity == "selective",
         "--recompute-granularity selective and --checkpoint-activations exclude each other; give one"),
        (model.recompute_granularity == "selective" and training.compile,
         "--recompute-granularity selective recomputes what --compile cannot, as it has another size in each "
         "micro-batch; give --checkpoint-activations in its place, or --no-compile"),
    ]


def _guards_faults(config: Config) -> Faults:
    return [
        (config.guards.on_spike == "rewind" and config.checkpoint.save is None,
         "--on-spike rewind goes back to the last checkpoint in --save, which is missing; give both"),
        (config.guards.on_spike == "rewind" and config.checkpoint.no_save_optim,
         "--on-spike rewind goes back to the optimizer's state, which --no-save-optim leaves out; give one of the two"),
        (config.guards.on_spike == "skip" and config.training.cuda_graph,
         "--on-spike skip looks at each step before its update, which --cuda-graph has captured; give another"),
    ]


def _sharding_faults(parallel: ParallelConfig) -> Faults:
    return [
        (parallel.use_distributed_optimizer and parallel.data_parallel_sharding in ("gradients", "parameters"),
         f"--use-distributed-optimizer is --data-parallel-sharding optimizer, which is given as "
         f"{parallel.data_parallel_sharding}; give one"),
    ]


def _precision_faults(precision: PrecisionConfig) -> Faults:
    return [
        (precision.fp16 and precision.bf16, "--fp16 and --bf16 exclude each other; give one"),
        (precision.min_loss_scale > precision.initial_loss_scale,
         f"--min-loss-scale {precision.min_loss_scale} is above --initial-loss-scale {precision.initial_loss_scale}"),
        (precision.precision and (precision.fp16 or precision.bf16),
         "--precision auto chooses by itself; give it, or one of --fp16 and --bf16"),
        (precision.fp8 and not precision.bf16,
         f"--fp8 {precision.fp8} is for products whose tensors are in bf16; give --bf16 as well"),
        (precision.fp8 is None and precision.fp8_recipe != "tensorwise",
         f"--fp8-recipe {precision.fp8_recipe} says how to scale in FP8, and --fp8 is missing; give both, or "
         "neither"),
        *_idle(precision, DELAYED, precision.fp8_recipe == "delayed",
               f"--fp8-recipe delayed, which is {precision.fp8_recipe}"),
    ]


def _idle(section: Any, names: Collection[str], is_used: bool, owner: str) -> Faults:
    """The mistakes of giving a flag in `names`, which has no effect without another, `owner`, if not `is_used`."""
    return [(not is_used, f"{flag_name(item)} {getattr(section, item.name)} is about {owner}; leave one of the two out")
            for item in fields(section) if item.name in names and getattr(section, item.name) != item.default]


def _logging_faults(logging: LoggingConfig, save: str | None) -> Faults:
    return [
        (logging.profile and save is None,
         "--profile writes into SAVE/profile; give --save as well"),
        (logging.profile_step_end <= logging.profile_step_start,
         f"--profile-step-end {logging.profile_step_end} is not behind --profile-step-start "
         f"{logging.profile_step_start}"),
        (logging.logger_project and not logging.logger,
         f"--logger-project {logging.logger_project} is of --logger, which is missing; give both, or neither"),
        (logging.metrics_host != "127.0.0.1" and logging.metrics_port is None,
         f"--metrics-host {logging.metrics_host} is of --metrics-port, which is missing; give both, or neither"),
    ]


def _model_faults(model: ModelConfig) -> Faults:
    heads, groups = model.num_attention_heads, model.num_groups
    return [
        (heads % groups, f"--num-query-groups {groups} does not divide --num-attention-heads {heads}; give a divisor"),
        (model.position_embedding_type == "rope" and int(model.kv_channels * model.rotary_percent) < 2,
         f"--rotary-percent {model.rotary_percent} of a head's width {model.kv_channels} leaves no two columns to "
         "turn; give more, or --position-embedding-type none"),
        (model.window_attn_skip_freq is not None and model.window_size is None,
         "--window-attn-skip-freq says which blocks go without the window of --window-size, which is missing; give "
         "both, or neither"),
        (model.swiglu and model.squared_relu, "--swiglu and --squared-relu exclude each other; give one"),
        (model.swiglu and model.openai_gelu, "--swiglu and --openai-gelu exclude each other; give one"),
        (model.squared_relu and model.openai_gelu, "--squared-relu and --openai-gelu exclude each other; give one"),
        (model.apply_residual_connection_post_layernorm and model.norm_placement != "pre",
         f"--apply-residual-connection-post-layernorm is about --norm-placement pre, which is {model.norm_placement}; "
         "leave one of the two out"),
        (model.unet_skips and model.num_layers < 2, "--unet-skips joins blocks, and --num-layers is 1; give more"),
    ]
