"""The flags of fine-tuning: files, keys of sequence and label, and training. All other flags are those of pretraining
that apply here.
"""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from megatron.config import Config, OptimizerConfig
from megatron.config.command_line import OneLineParser, add_section_flags, check_section, left_open, parse
from megatron.config.declaration import flag, fraction, not_negative, positive, shown, with_tuples
from megatron.config.lora import LoraConfig
from megatron.errors import ConfigError
from megatron.finetune.data.tasks import LABEL_KEYS, LABEL_KINDS, SEQUENCE_KEYS, TASK_NAMES, Task, split_files, task_of
from megatron.finetune.heads import POOLINGS
from megatron.infer.pretrained import positions_of

T = TypeVar("T")


@dataclass(frozen=True)
class TaskConfig:
    """The files of a task and its labels."""

    data: str = flag(None, "folder of the task's files, as TAPE names them (TASK_train.lmdb) or train.csv.gz, "
                     "valid.jsonl, …, each in any readable format", path="folder")
    train_data: str = flag(None, "file to train on, instead of --data: LMDB, JSON, CSV, TSV, Parquet or Arrow",
                           path="file")
    valid_data: str = flag(None, "validation file, which selects the best checkpoint", path="file")
    test_data: tuple[str, ...] = flag((), "files to evaluate at the end, each reported under its name", nargs="+",
                                      path="file")
    sequence_key: str = flag(None, f"key or column of the sequence (default: the first of {', '.join(SEQUENCE_KEYS)})")
    label_key: str = flag(None, "key or column of the label (default: the task's, or the first of "
                          f"{', '.join(LABEL_KEYS)})")
    mask_key: str = flag(None, "key or column with 1 for each residue that counts and 0 for the others (default: mask "
                         "or valid_mask, if there is one)")
    label_kind: str = flag(None, "kind of the labels: a number, a class, several classes (a list, or separated by ;), "
                           "a class or a number for each residue, contacts as coordinates or pairs (default: inferred "
                           "from the labels; numbers are taken for numbers)", choices=LABEL_KINDS)
    pairs_from: int = flag(None, "number of a protein's first residue, if contacts are lists of pairs", kind=int,
                           choices=(0, 1))
    skip_bad_records: bool = flag(False, "leave out, count and report records without a label or sequence that can be "
                                  "read, instead of stopping at the first")
    class_weights: str = flag("none", "balanced: give rare classes more weight, so that all classes count alike, and "
                              "select the best epoch by MCC (of several classes a protein: macro F1)",
                              choices=("none", "balanced"))


@dataclass(frozen=True)
class FinetuneConfig:
    """How a task is trained."""

    head_only: bool = flag(False, "train only the head and freeze the model")
    pooling: str = flag("mean", "input of the head for a whole protein: the mean over its residues, or the token "
                        "before the first", choices=POOLINGS)
    head_dropout: float = flag(0.1, "dropout before the head's outputs", kind=float, check=fraction)
    epochs: int = flag(10, "passes over the proteins, unless --train-iters sets the length", kind=int, check=positive)
    patience: int = flag(3, "stop after this many epochs without a better validation; 0 never does", kind=int,
                         check=not_negative)
    calibrate_lr: tuple[float, ...] = flag((), "learning rates to try for a quarter of an epoch each; the best by "
                                           "validation is used", kind=float, nargs="+", check=positive)
    seeds: tuple[int, ...] = flag((1234,), "seeds of the head's initial weights, the order and dropout; one run for "
                                  "each", kind=int, nargs="+", check=not_negative)
    bootstrap: int = flag(1000, "bootstrap resamples of proteins for the intervals in the report; 0 for none", kind=int,
                          check=not_negative)


# Of pretraining's flags those that are taken, by their sections; the model's others are those of --load.
_TAKEN: Mapping[str, frozenset[str]] = {
    "model": frozenset(("hidden_dropout", "attention_dropout", "attention_backend", "fp32_residual_connection",
                        "checkpoint_activations", "checkpoint_num_layers", "distribute_checkpointed_activations",
                        "recompute_granularity")),
    "data": frozenset(("seq_length",)),
    "optimizer": frozenset(item.name for item in fields(Config().optimizer)) - {"ema"},
    "schedule": frozenset(("lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_warmup_fraction",
                           "lr_warmup_iters")),
    "precision": frozenset(item.name for item in fields(Config().precision)) - {"fp16_lm_cross_entropy"},
    "parallel": frozenset(name for item in fields(Config().parallel) if not (name := item.name).startswith("dry_run")),
    "training": frozenset(("micro_batch_size", "global_batch_size", "train_iters", "compile", "flash_attention",
                           "deterministic_mode", "exit_interval", "exit_duration_in_mins")),
    "checkpoint": frozenset(("save", "load", "save_interval")),
    "logging": frozenset(("log_interval",)),
}
# In these a run may differ from the one that it goes on with: they change no result, or only roundings and dropout's
# masks; and files are compared by what is in them.
_FREE = {item.name for item in fields(Config().parallel)} | set(
    "load save save_interval exit_interval exit_duration_in_mins log_interval seeds train_data valid_data "
    "test_data attention_backend checkpoint_activations checkpoint_num_layers distribute_checkpointed_activations "
    "recompute_granularity micro_batch_size compile flash_attention skip_bad_records".split())
_IN_WORDS = {"task": "the task", "data": "the content of the task's files", "weights": "the content of --load",
             "seed": "the seed", "steps": "the number of steps", "began_from": "the iteration of --load",
             "proteins": "the number of proteins"}
_MICRO_BATCH, _GLOBAL_BATCH, _WARMUP, _LOG_INTERVAL = 2, 8, 0.1, 10
_LR, _LR_OF_LITTLE = 1e-4, 1e-3  # of a whole model, and of a head or adapters beside one that stays
# Under Muon --lr is of the head alone: the model's groups have rates of their own. AdamW steps its matrices, whose best
# rate falls with their width (Yang et al., 2022, arXiv 2203.03466).
_LR_WITH_MUON, _WIDTH = 0.02, 128  # up to this hidden size; as much less as a model is wider
_TEXTS = {  # what those of pretraining's flags are that are something else here
    "load": "the checkpoint to begin with, of any format that pretraining's --load takes; must be given",
    "save": "a new folder for the model, or that of a run to go on with; must be given",
    "save_interval": "steps between two savings for going on, besides those behind each epoch",
    "seq_length": "tokens of a row (default: as many as the model was trained with)",
    "attention_dropout": "dropout of attention probabilities (default: the model's; 0 with --head-only)",
    "hidden_dropout": "dropout of embeddings and of each block's two outputs (default: the model's; 0 with "
                      "--head-only)",
    "micro_batch_size": f"rows a rank computes at once (default: {_MICRO_BATCH})",
    "global_batch_size": f"rows a step, over all ranks (default: {_GLOBAL_BATCH}, or the next multiple of what all "
                         "ranks compute at once)",
    "train_iters": "steps in all (default: what --epochs takes)",
    "lr": f"peak learning rate (default: {_LR:g}; {_LR_OF_LITTLE:g} with --head-only or --lora-rank); under muon that "
          f"of the head (default: {_LR_WITH_MUON:g}, or as much less as the model is wider than {_WIDTH})",
    "head_lr": "peak learning rate of the head, if it should differ (default: --lr)",
    "lr_warmup_fraction": f"share of the decay spent in linear warm-up (default: {_WARMUP:g}, if --lr-warmup-iters is "
                          "not given)",
    "log_interval": f"steps between log lines (default: {_LOG_INTERVAL})",
}


@dataclass(frozen=True)
class Flags:
    """A parsed command line. `others`: the values of pretraining's flags that were given, by field name."""

    task_name: str
    task: TaskConfig
    finetune: FinetuneConfig
    lora: LoraConfig | None
    others: Mapping[str, Any]

    def config(self, saved: Mapping[str, Any], data_size: int, num_iterations: int | None = None) -> Config:
        """Pretraining's configuration with the model of a checkpoint whose flags are `saved`; raises ConfigError.

        `num_iterations`: the number of iterations, once known, if the flags do not give it.
        """
        micro_batch = self.others.get("micro_batch_size", _MICRO_BATCH)
        rows = micro_batch * data_size
        lr = self.others.get("lr") or self._default_lr(saved.get("hidden_size") or _WIDTH)
        defaults = {"seq_length": positions_of(saved), "micro_batch_size": micro_batch,
                    "global_batch_size": max(1, -(-_GLOBAL_BATCH // rows)) * rows,
                    "lr": lr, **({"head_lr": lr} if self._uses_muon else {}),
                    "train_iters": num_iterations or 10**9, "log_interval": _LOG_INTERVAL,
                    **({} if "lr_warmup_iters" in self.others else {"lr_warmup_fraction": _WARMUP})}
        if self.finetune.head_only:  # its input is to be the same in every epoch
            defaults |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
        of_model = left_open(["--load", self.others["load"]], lambda _: saved)
        return parse([], {**of_model, **defaults, **self.others})[0]

    def _default_lr(self, hidden_size: int) -> float:
        if self._uses_muon:
            return _LR_WITH_MUON * min(1.0, _WIDTH / hidden_size)
        return _LR_OF_LITTLE if self.finetune.head_only or self.lora else _LR

    @property
    def _uses_muon(self) -> bool:
        return OptimizerConfig(optimizer=self.others.get("optimizer", "adam")).uses_muon

    def identity(self) -> dict[str, Any]:
        """What two runs must have in common to give the same results, up to rounding and but for their seeds, as JSON.
        """
        values = {**vars(self.task), **vars(self.finetune), **(vars(self.lora) if self.lora else {}), **self.others,
                  "task": self.task_name}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
                if name not in _FREE}


def first_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first thing in which a run differs from an earlier one, in words, by what `identity` gave; None if nothing.

    Besides flags, both may have the keys of `_IN_WORDS`.
    """
    for name in [*before, *(name for name in now if name not in before)]:
        is_other = name not in _FREE and before.get(name) != now.get(name)
        if is_other and name in _IN_WORDS:
            return f"{_IN_WORDS[name]} is not what it was"
        if is_other:
            words = ("not given" if value is None else shown(value) for value in (now.get(name), before.get(name)))
            return "--{} is {}, it was {} before".format(name.replace("_", "-"), *words)
    return None


def parse_flags(argv: Sequence[str], description: str) -> Flags:
    """Parse `argv`; raises ConfigError."""
    parser = OneLineParser(description=description, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("task", metavar="TASK", choices=TASK_NAMES, help=f"{', '.join(TASK_NAMES)}; or predict "
                        "instead (see `predict --help`)")
    for kind in (TaskConfig, FinetuneConfig, LoraConfig):
        add_section_flags(parser, kind)
    for name, names in _TAKEN.items():
        add_section_flags(parser, type(getattr(Config(), name)), names, _TEXTS)
    given = with_tuples(vars(parser.parse_args(argv)))
    task_name, task, finetune = given.pop("task"), _taken(TaskConfig, given), _taken(FinetuneConfig, given)
    lora = _taken(LoraConfig, given)
    for section in (task, finetune, lora):
        check_section(section)
    if lora.lora_rank is None and lora != LoraConfig():
        raise ConfigError("--lora-rank is missing, without which there are no adapters; give it, or leave the other "
                          "flags of adapters out")
    if finetune.calibrate_lr and "lr" in given:
        raise ConfigError(f"--lr {given['lr']:g} says the learning rate, and --calibrate-lr is to find it; give one")
    if lora.lora_rank is not None and finetune.head_only:
        raise ConfigError(f"--head-only trains nothing of the model, and --lora-rank {lora.lora_rank} asks for "
                          "adapters; leave one out")
    for name, what in (("load", "the folder of a checkpoint to begin with"), ("save", "a new folder for the model")):
        if not given.get(name):
            raise ConfigError(f"--{name} is missing; give {what}")
    if len(set(finetune.seeds)) < len(finetune.seeds):
        raise ConfigError(f"--seeds are {' '.join(map(str, finetune.seeds))}; give each once")
    return Flags(task_name, task, finetune, None if lora.lora_rank is None else lora, given)


def _taken(section: type[T], given: dict[str, Any]) -> T:
    """The section of the values that are its own, which are taken out."""
    return section(**{item.name: given.pop(item.name) for item in fields(section) if item.name in given})  # type: ignore


def task_and_files(name: str, config: TaskConfig) -> tuple[Task, dict[str, str]]:
    """The task of this name, and its files by part with `train` first; raises ConfigError or DataError."""
    task = task_of(name, sequence_key=config.sequence_key, label_key=config.label_key, mask_key=config.mask_key,
                   label_kind=config.label_kind, pairs_from=config.pairs_from)
    named = {"--train-data": config.train_data, "--valid-data": config.valid_data, "--test-data": config.test_data}
    given = " and ".join(flag_name for flag_name, value in named.items() if value)
    if config.data is not None:
        if given:
            raise ConfigError(f"--data {config.data} and {given} exclude each other; give the folder or the files")
        return task, split_files(task, config.data)
    if config.train_data is None:
        raise ConfigError("--data is missing; give the folder of the task's files, or --train-data FILE")
    files = {"train": config.train_data} | ({"valid": config.valid_data} if config.valid_data else {})
    for path in config.test_data:
        part = "test" if len(config.test_data) == 1 else Path(path).name.split(".")[0]
        if part in files:
            raise ConfigError(f"--test-data names two files {part}, or one like another part; rename one of them")
        files[part] = path
    return task, files
