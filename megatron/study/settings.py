"""The space of a sweep: a setting has one value for each varied flag, and a trial is a setting with a seed."""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from megatron.checkpoint.metrics import OF_AVERAGE, loss_name
from megatron.config import Config
from megatron.config.command_line import as_flags, left_open, parse
from megatron.config.declaration import flag_name, is_switch
from megatron.data.corpus.joined import open_corpus
from megatron.data.corpus.split import shares_of, split_documents
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.data_path import CorpusFiles, names_in_short, parse_data_path
from megatron.errors import ConfigError, DataError
from megatron.train.state import BatchSizes, TrainState

Setting = tuple[str, ...]  # a value of each varied flag, as on the command line
_SWITCH = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}
# Flags that the sweep sets itself, or that would end a trial early.
_NOT_THEIRS = ("save", "tensorboard_dir", "exit_interval", "exit_duration_in_mins", "dry_run")


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: a setting with a seed; None: the seed of the other flags."""

    setting: Setting
    seed: str | None


@dataclass(frozen=True)
class Space:
    """All settings of a sweep, as a grid of values, and their seeds."""

    names: tuple[str, ...]  # the varied flags, without dashes
    values: tuple[tuple[str, ...], ...]  # the values of each
    seeds: tuple[str | None, ...]
    base: tuple[str, ...]  # the command line that all trials share
    precision: str | None = None  # what --precision auto means for all trials, fp32 or bf16, once it is settled

    def settings(self) -> list[Setting]:
        """All settings; the value of the last flag changes fastest."""
        return list(itertools.product(*self.values))

    def trials(self, setting: Setting) -> list[Trial]:
        """A setting with each seed."""
        return [Trial(setting, seed) for seed in self.seeds]

    def folder_name(self, trial: Trial) -> str:
        """The name of a trial's folder, such as lr=1e-3_seed=1."""
        pairs = [*zip(self.names, trial.setting, strict=True), *([("seed", trial.seed)] if trial.seed else [])]
        return "_".join(f"{name}={re.sub(r'[^A-Za-z0-9.+-]+', '-', str(value)).strip('-')}" for name, value in pairs)

    def varied_words(self, setting: Setting) -> list[str]:
        """The command-line words of a setting."""
        return [word for name, value in zip(self.names, setting, strict=True) for word in _words(name, value)]

    def words(self, trial: Trial) -> list[str]:
        """The command line of a trial without its folder, and with the file of --config replaced by flags."""
        seed = ["--seed", trial.seed] if trial.seed else []
        words = as_flags(["--keep-checkpoints", "1", *self.base, *self.varied_words(trial.setting), *seed])
        if self.precision is None or _parsed(words).precision.precision != "auto":
            return words
        return [*_without("--precision", words), "--bf16" if self.precision == "bf16" else "--no-bf16"]

    def with_precision_auto(self) -> Config | None:
        """The configuration of the first trial with --precision auto, whose precision is not settled; None if none."""
        configs = (_parsed(self.words(Trial(setting, self.seeds[0]))) for setting in self.settings())
        return next((config for config in configs if config.precision.precision == "auto"), None)

    def last_iteration(self, trial: Trial) -> int:
        """The step at which a trial ends."""
        return BatchSizes(_parsed(self.words(trial)).training, 1).last_iteration(TrainState())

    def check(self, metric: str) -> None:
        """Raises ConfigError for unusable values, flags that pretrain_tape.py would refuse, or an unknown `metric`."""
        for name, values in zip(self.names, self.values, strict=True):
            if not values:
                raise ConfigError(f"--vary {name} has no values; give some behind it: --vary {name} VALUE VALUE")
            if len(set(values)) < len(values):
                raise ConfigError(f"--vary {name} has {max(values, key=values.count)} twice; give it once")
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"--vary {max(self.names, key=self.names.count)} is given twice; put its values together")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds has {max(self.seeds, key=self.seeds.count)} twice; give it once")
        if "seed" in self.names and self.seeds != (None,):
            raise ConfigError("--vary seed beside --seeds says twice what --seed is; leave one of them out")
        trials = [trial for setting in self.settings() for trial in self.trials(setting)]
        found: dict[str, Trial] = {}
        for trial in trials:
            if trial.seed == self.seeds[0] or trial.setting == trials[0].setting:
                self._check_flags(trial, metric)
            other = found.setdefault(self.folder_name(trial), trial)
            if other != trial:
                raise ConfigError(f"the values {' '.join(other.setting)} and {' '.join(trial.setting)} would share the "
                                  f"folder {self.folder_name(trial)}; spell them so that letters or digits differ")

    def check_files(self, settings: Iterable[Setting]) -> None:
        """Raises a UserError for corpora, a vocabulary, clusters or weights of these settings that are not there."""
        found = [_parsed(self.words(Trial(setting, self.seeds[0]))) for setting in settings]
        for data in dict.fromkeys(config.data for config in found):
            Vocab.from_file(data.vocab_file, data.mask_token)
            for one in parse_data_path(data.data_path)[1] if data.data_path else ():
                open_corpus(one.name, one.prefixes, data.data_impl)
        for name, path in dict.fromkeys(pair for config in found for pair in (
                ("--cluster-file", config.data.cluster_file), ("--load", config.checkpoint.load))):
            if path is not None and not Path(path).exists():
                raise ConfigError(f"{name} {path} is not there; name one that is")

    def _check_flags(self, trial: Trial, metric: str) -> None:
        """Raises ConfigError if a trial's flags are invalid, not for sweeps, or do not give the `metric`."""
        config = _parsed(self.words(trial))
        _check_metric(metric, config)
        BatchSizes(config.training, 1)
        for _, section in config.sections():
            for item in fields(section):
                if item.name in _NOT_THEIRS and getattr(section, item.name) != item.default:
                    raise ConfigError(f"{flag_name(item)} is not for a sweep, whose trials have folders of their own "
                                      "and go to their end; leave it out")
        if config.checkpoint.load and not config.checkpoint.finetune:
            raise ConfigError(f"--load {config.checkpoint.load} would have every trial go on with one run; leave it "
                              "out, or give --finetune to begin each with its weights")


def _check_metric(metric: str, config: Config) -> None:
    """Raises ConfigError if a run with these flags does not record this loss (`megatron.train.evaluations`)."""
    split, slash, corpus = metric.partition("/")
    if metric != "train" and split.removesuffix(OF_AVERAGE) not in ("valid", "test"):
        raise ConfigError(f"--metric is {metric}; give valid, test or train, the first two with {OF_AVERAGE} for the "
                          "average of the weights, or with /NAME for one corpus")
    if split.endswith(OF_AVERAGE) and config.optimizer.ema is None:
        raise ConfigError(f"--metric {metric} is of the average of the weights, which needs --ema; give that, or "
                          f"--metric {metric.replace(OF_AVERAGE, '', 1)}")
    if slash and not config.training.eval_each:
        raise ConfigError(f"--metric {metric} is of one corpus, which needs --eval-each; give that, or "
                          f"--metric {split}")
    files = parse_data_path(config.data.data_path)[1] if slash or config.data.data_path else []
    if slash:
        short = names_in_short([one.name for one in files]) if len(files) > 1 else {}
        if corpus not in short.values():
            raise ConfigError(f"--metric {metric}: --data-path has no weighted corpus {corpus}; it has "
                              f"{', '.join(short.values()) or 'none'}; give one of those, or --metric {split}")
        files = [one for one in files if short[one.name] == corpus]
    part = ("train", "valid", "test").index(split.removesuffix(OF_AVERAGE))
    if not _has_proteins(part, config, files):
        raise ConfigError(f"--metric {metric}: --split {config.data.split} leaves no protein that the "
                          f"{loss_name(metric)} is of; give it a share, such as 90,5,5, or another --metric")


def _has_proteins(part: int, config: Config, files: Sequence[CorpusFiles]) -> bool:
    """Whether --split gives `part` (0 training, 1 validation, 2 test) a document of one of the corpora in `files`.

    Without files, whether its share is positive. True if the corpora cannot be read.
    """
    split = config.data.split
    if not files or not shares_of(split)[part]:
        return bool(shares_of(split)[part])
    try:
        corpora = [open_corpus(one.name, one.prefixes, config.data.data_impl) for one in files]
    except DataError:  # a trial reports it; the results of a finished sweep can be shown without the data
        return True
    return any(split_documents(split, corpus.num_documents)[part] for corpus in corpora)


def _parsed(words: Sequence[str]) -> Config:
    """The configuration of a trial at its start; raises ConfigError."""
    if not any(word.split("=")[0] == "--load" for word in words):
        return parse(words)[0]
    from megatron.checkpoint.newest import saved_flags  # here, since it imports torch, which is slow

    return parse(words, left_open(words, saved_flags))[0]


def _words(name: str, value: str) -> list[str]:
    """The command-line words that set the varied flag `name` to a value; raises ConfigError for a bad switch."""
    item = next((item for _, section in Config().sections() for item in fields(section)
                 if flag_name(item) == f"--{name}"), None)
    if item is None:  # the preset, a file, or a mistake that the command line will find
        return [f"--{name}", value]
    if is_switch(item):
        if value.lower() not in _SWITCH:
            raise ConfigError(f"--vary {name} has {value}; --{name} is a switch: give true or false")
        is_on = _SWITCH[value.lower()]
        return [f"--{name}"] if is_on else [] if name.startswith("no-") else [f"--no-{name}"]
    return [f"--{name}", *(value.split() if item.metadata["nargs"] else [value])]


def _without(name: str, words: Sequence[str]) -> list[str]:
    """The words of a command line without the flag `name` and its one value."""
    return [word for before, word in zip(["", *words], words, strict=False)
            if name not in (before, word.split("=")[0])]


def is_number(text: str) -> bool:
    """Whether a value is a number."""
    try:
        return bool(float(text)) or True
    except ValueError:
        return False


def in_order(values: Sequence[str]) -> list[str]:
    """The values in increasing order if all are numbers, else unchanged."""
    return sorted(values, key=float) if all(map(is_number, values)) else list(values)
