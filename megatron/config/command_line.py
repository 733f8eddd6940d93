"""The command line: derived from `megatron.config`, parsed once into a frozen `Config`.

Values come from, in rising order: a field's default, the preset, the flags. Whatever cannot be honoured raises
`ConfigError` with the flag, its value and the remedy.
"""

import argparse
import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from megatron.config import Config, ModelConfig
from megatron.config.data import VOCABULARIES
from megatron.config.precision import DELAYED
from megatron.config.presets import PRESETS
from megatron.config.schedule import schedule_faults
from megatron.errors import ConfigError

# Flags of Megatron-LM whose effect is always there: accepted, so that old scripts run, and named in the listing.
ALWAYS_SO = {
    "--accumulate-allreduce-grads-in-fp32": "gradients are accumulated and reduced in fp32",
    "--fp32-allreduce": "gradients are accumulated and reduced in fp32",
    "--attention-softmax-in-fp32": "the softmax of attention is computed in fp32",
    "--no-query-key-layer-scaling": "the scaling cancels, and with an fp32 softmax it has nothing to protect",
    "--use-cpu-initialization": "initial weights depend on the seed and the parameter's name alone",
    "--bert-no-binary-head": "there is no next-sentence head",
    "--scaled-masked-softmax-fusion": "how the softmax is fused changes no number",
    "--no-masked-softmax-fusion": "how the softmax is fused changes no number",
    "--no-bias-dropout-fusion": "how dropout is fused changes no number",
    "--no-save-rng": "randomness derives from the seed and the sample: there is no state to save",
    "--no-load-rng": "randomness derives from the seed and the sample: there is no state to load",
}

_GPT = "it belongs to GPT, and this project pretrains masked protein models"
_RETRIEVAL = "it belongs to ICT and REALM retrieval, which this project does not do"
_AUTORESUME = "autoresume is not part of this project; run the same command again to go on from the last checkpoint"
REFUSED = {
    "--merge-file": _GPT, "--reset-position-ids": _GPT, "--reset-attention-mask": _GPT, "--eod-mask-loss": _GPT,
    "--decoder-seq-length": _GPT, "--scaled-upper-triang-masked-softmax-fusion": _GPT,
    "--ict-head-size": _RETRIEVAL, "--ict-load": _RETRIEVAL, "--bert-load": _RETRIEVAL,
    "--titles-data-path": _RETRIEVAL, "--query-in-block-prob": _RETRIEVAL, "--use-one-sent-docs": _RETRIEVAL,
    "--report-topk-accuracies": _RETRIEVAL,
    "--retriever-score-scaling": _RETRIEVAL, "--block-data-path": _RETRIEVAL, "--embedding-path": _RETRIEVAL,
    "--indexer-batch-size": _RETRIEVAL, "--indexer-log-interval": _RETRIEVAL, "--faiss-use-gpu": _RETRIEVAL,
    "--adlr-autoresume": _AUTORESUME, "--adlr-autoresume-interval": _AUTORESUME,
    "--short-seq-prob": "proteins are packed whole, so there are no shortened sequences",
    "--onnx-safe": "there is no ONNX export",
    "--lazy-mpu-init": "the program joins the process group itself",
    "--warmup": "use --lr-warmup-fraction",
}

# Flags that say in other words what a preset says, and what of the preset they replace.
_REPLACES = {
    "fp16": ("bf16", "precision"), "bf16": ("precision",), "precision": ("fp16", "bf16"),
    "recompute_granularity": ("checkpoint_activations",),
    "train_samples": ("train_iters", "lr_decay_iters"),
    "lr_warmup_iters": ("lr_warmup_fraction",), "lr_warmup_samples": ("lr_warmup_fraction",),
    "start_weight_decay": ("weight_decay",),
}


def parse(argv: Sequence[str], taken: Mapping[str, Any] | None = None) -> tuple[Config, tuple[str, ...]]:
    """The configuration that `argv` describes, and the flags in it that are always so; raises ConfigError.

    `taken`: values by their fields' names that hold where neither a flag nor the preset says otherwise.
    """
    values = _given(argv)
    preset = values.pop("preset", None)
    always_so = tuple(flag for flag in ALWAYS_SO if values.pop(flag, False))
    defaults = dict(PRESETS[preset]) if preset else {}
    for name in values:
        for other in _REPLACES.get(name, ()):
            defaults.pop(other, None)
    return _build({**(taken or {}), **defaults, **values}), always_so


def left_open(argv: Sequence[str], saved: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
    """What the checkpoint of `--load` says of the flags of its model (see `Changes`) that `argv` does not give.

    Nothing of a vocabulary whose file is not here, as that of another machine may not be. `saved`: the flags of the
    checkpoint in a folder. Raises ConfigError.
    """
    values = _given(argv)
    known = saved(values["load"]) if "load" in values else {}
    given = values.keys() | PRESETS[values["preset"]].keys() if "preset" in values else values.keys()
    file = values.get("vocab_file", known.get("vocab_file"))
    is_here = file is None or file in VOCABULARIES or Path(str(file)).is_file()
    kinds = {"arithmetic", "dropout", *(["vocabulary"] if is_here else [])}
    return {item.name: known[item.name] for _, section in Config().sections() for item in fields(section)
            if item.metadata["changes"] in kinds and item.name in known and item.name not in given}


def notice(taken: Mapping[str, Any]) -> str | None:
    """A line that says which flags are taken from a checkpoint, of those that are not the program's own defaults."""
    defaults = Config().as_dict()
    names = {item.name: flag_name(item) for _, section in Config().sections() for item in fields(section)}
    flags = [f"{names[name]} {value}" for name, value in taken.items() if value != defaults[name]]
    return f"taken from the checkpoint, as no flag says otherwise: {', '.join(flags)}" if flags else None


def listing(config: Config, always_so: Sequence[str]) -> str:
    """The argument listing that a run prints at its start: every flag with its value, in alphabetical order."""
    values = sorted(config.as_dict().items())
    rows = [f"  {name} {'.' * max(2, 46 - len(name))} {_shown(value)}" for name, value in values]
    rows += [f"  {name}: always so; {ALWAYS_SO[name]}" for name in always_so]
    rule = "-" * 24
    return "\n".join([f"{rule} arguments {rule}", *rows, f"{rule}- end of arguments {rule}"])


def add_section_flags(parser: argparse.ArgumentParser, section: type, names: Collection[str] | None = None) -> None:
    """Add a flag for each field of the dataclass `section`, or of `names`; one that is not given leaves no value."""
    group = parser.add_argument_group(section.__name__.removesuffix("Config").lower(), section.__doc__)
    for item in (item for item in fields(section) if names is None or item.name in names):
        spellings = [flag_name(item), *item.metadata["aliases"]]
        text = argparse.SUPPRESS if item.metadata["is_hidden"] else item.metadata["help"].replace("%", "%%")
        options: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": text}
        if item.metadata["type"] is bool or isinstance(item.default, bool):
            negatable = not item.name.startswith("no_")
            options["action"] = argparse.BooleanOptionalAction if negatable else "store_true"
        else:
            options |= {"type": item.metadata["type"], "choices": item.metadata["choices"],
                        "nargs": item.metadata["nargs"]}
            if item.default not in (None, ()) and not item.metadata["is_hidden"]:
                options["help"] += f" (default: {_shown(item.default)})"
        group.add_argument(*spellings, **options)


def flag_name(item: Field) -> str:
    """How the field is spelled on the command line."""
    return "--" + (item.metadata["name"] or item.name.replace("_", "-"))


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake raises a ConfigError of one line instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser() -> OneLineParser:
    parser = OneLineParser(description="Pretrain a protein language model on packed proteins.", allow_abbrev=False)
    parser.add_argument("--preset", choices=tuple(PRESETS), default=argparse.SUPPRESS,
                        help="a published model with its hyperparameters, or a small one; any other flag overrides it")
    for item in fields(Config):
        add_section_flags(parser, type(getattr(Config(), item.name)))
    for name, reason in ALWAYS_SO.items():
        parser.add_argument(name, dest=name, action="store_true", default=argparse.SUPPRESS,
                            help=f"always so: {reason}")
    return parser


def _given(argv: Sequence[str]) -> dict[str, Any]:
    parser = _parser()
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(unknown[0], parser)
    return vars(given)


def _refuse(text: str, parser: argparse.ArgumentParser) -> NoReturn:
    name = text.split("=")[0]
    if name in REFUSED:
        raise ConfigError(f"{name} cannot be used: {REFUSED[name]}")
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; --help lists the flags"
    raise ConfigError(f"unknown argument {name}{hint}")


def _build(values: dict[str, Any]) -> Config:
    config = Config()
    for name, section in config.sections():
        mine = {item.name: values[item.name] for item in fields(section) if item.name in values}
        mine = {key: tuple(value) if isinstance(value, list) else value for key, value in mine.items()}
        config = replace(config, **{name: replace(section, **mine)})
    for _, section in config.sections():
        check_section(section)
    config = _with_derived(config)
    _check_combinations(config)
    return config


def check_section(section: Any) -> None:
    """Raises ConfigError for a value that its flag's check does not take."""
    for item in fields(section):
        value = getattr(section, item.name)
        _check_values(item, value, value if isinstance(value, tuple) else (value,))


def _check_values(item: Field, value: Any, values: tuple[Any, ...]) -> None:
    check = item.metadata["check"]
    if any(one in ("", "~") or str(one).startswith("~/") for one in values):
        raise ConfigError(f"{flag_name(item)} is {' '.join(map(repr, values))}, where the shell should have put "
                          "something in; write it out, or leave the flag out")
    if any(isinstance(one, float) and not math.isfinite(one) for one in values):
        raise ConfigError(f"{flag_name(item)} is {value}; it must be a finite number")
    if check is None or value is None:
        return
    holds, expected = check
    for one in values:
        if not holds(one):
            raise ConfigError(f"{flag_name(item)} is {one}; it must be {expected}")


def _with_derived(config: Config) -> Config:
    """`config` with the defaults that follow from other flags filled in."""
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
    model, data, training = config.model, config.data, config.training
    parallel = config.parallel
    by_samples = training.train_samples is not None
    wrong = [
        *_model_faults(model),
        (model.position_embedding_type == "learned_absolute" and model.max_position_embeddings < (data.seq_length or 0),
         f"--seq-length {data.seq_length} needs as many positions, for a protein may fill a row; "
         f"--max-position-embeddings is {model.max_position_embeddings}: give --seq-length "
         f"{model.max_position_embeddings}, or a model with more"),
        ((data.seq_length or math.inf) <= data.num_ends,
         f"--seq-length {data.seq_length} holds no residue between the ends of --protein-ends {data.protein_ends}; it "
         f"must be {data.num_ends + 1} or greater"),
        (config.precision.fp16 and config.precision.bf16, "--fp16 and --bf16 exclude each other; give one"),
        (config.precision.precision and (config.precision.fp16 or config.precision.bf16),
         "--precision auto chooses by itself; give it, or one of --fp16 and --bf16"),
        (config.precision.fp8 and not config.precision.bf16,
         f"--fp8 {config.precision.fp8} is for products whose tensors are in bf16; give --bf16 as well"),
        (config.precision.fp8 is None and config.precision.fp8_recipe != "tensorwise",
         f"--fp8-recipe {config.precision.fp8_recipe} says how to scale in FP8, and --fp8 is missing; give both, or "
         "neither"),
        *[(config.precision.fp8_recipe != "delayed",
           f"{flag_name(item)} {getattr(config.precision, item.name)} is about --fp8-recipe delayed, which is "
           f"{config.precision.fp8_recipe}; leave one of the two out") for item in fields(config.precision)
          if item.name in DELAYED and getattr(config.precision, item.name) != item.default],
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
        (config.guards.on_spike == "rewind" and config.checkpoint.save is None,
         "--on-spike rewind goes back to the last checkpoint in --save, which is missing; give both"),
        (config.guards.on_spike == "skip" and training.cuda_graph,
         "--on-spike skip looks at each step before its update, which --cuda-graph has captured; give another"),
        (config.logging.profile and config.checkpoint.save is None,
         "--profile writes into SAVE/profile; give --save as well"),
        (config.logging.profile_step_end <= config.logging.profile_step_start,
         f"--profile-step-end {config.logging.profile_step_end} is not behind --profile-step-start "
         f"{config.logging.profile_step_start}"),
        (parallel.use_distributed_optimizer and parallel.data_parallel_sharding in ("gradients", "parameters"),
         f"--use-distributed-optimizer is --data-parallel-sharding optimizer, which is given as "
         f"{parallel.data_parallel_sharding}; give one"),
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            raise ConfigError(message)


def _model_faults(model: ModelConfig) -> list[tuple[Any, str]]:
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
        (model.apply_residual_connection_post_layernorm and model.norm_placement != "pre",
         f"--apply-residual-connection-post-layernorm is about --norm-placement pre, which is {model.norm_placement}; "
         "leave one of the two out"),
        (model.unet_skips and model.num_layers < 2, "--unet-skips joins blocks, and --num-layers is 1; give more"),
    ]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
