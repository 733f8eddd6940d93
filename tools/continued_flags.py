"""Prints the flags of pretrain_tape.py that go on from someone's weights on new proteins, a word a line.

`python tools/continued_flags.py MODEL PROTEINS FOLDER [--old-proteins FILE] [-- FLAGS of pretrain_tape.py]`

examples/continue_esm2.sh runs this twice: with --check, which looks at all that can be seen before the proteins are
preprocessed, and then for the flags. Their reasons stand in docs/continue_pretraining.md.

FOLDER/data/new_text_document, old_text_document    the proteins, preprocessed
FOLDER/run                                          the run
FOLDER/model                                        what comes out
"""

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # else it is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.checkpoint.contents import Checkpoint  # noqa: E402
from megatron.checkpoint.convert.formats import FORMATS, recognised  # noqa: E402
from megatron.checkpoint.newest import saved_flags  # noqa: E402
from megatron.checkpoint.store import iterations  # noqa: E402
from megatron.config import Config, TrainingConfig  # noqa: E402
from megatron.config.command_line import OneLineParser, as_flags, left_open, parse  # noqa: E402
from megatron.data.corpus.vocab import Vocab  # noqa: E402
from megatron.data.rows.dataset import build_datasets  # noqa: E402
from megatron.data.sources.source import expand  # noqa: E402
from megatron.errors import CheckpointError, ConfigError, DataError  # noqa: E402
from megatron.log import exit_status  # noqa: E402
from megatron.parallel.layout import check_layout  # noqa: E402
from megatron.parallel.mesh import grid_sizes  # noqa: E402
from megatron.train.setup.resume import refuse_changes  # noqa: E402
from megatron.train.state import BatchSizes  # noqa: E402

POSITIONS = 1024  # of a row, as ESM was trained
PEAK_LR, PEAK_ROWS = 1e-4, 256  # the peak learning rate of a batch of so many rows
LEAST_ROWS, STEPS = 8, 500  # of a batch; as many steps as that, where the proteins suffice
# Parameters from which on a GPU takes so many rows at once.
ROWS_AT_ONCE = {10e9: 1, 2e9: 2, 4e8: 8, 1e8: 16, 0: 32}
ROWS_AT_ONCE_ON_CPU = 2
RECOMPUTED = 2e9  # parameters from which on activations are
EVALUATED_ROWS, EVALUATED_ROWS_ON_CPU = 512, 128
PEAKS = {"--muon-lr", "--embedding-lr", "--head-lr", "--scalar-lr"}  # of Muon's groups, each without regard to --lr
# What a flag of the user's says in other words.
REPLACES = {"--train-iters": "--train-samples", "--lr-warmup-samples": "--lr-warmup-fraction",
            "--lr-warmup-iters": "--lr-warmup-fraction", "--fp16": "--bf16"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = OneLineParser(description="Print the flags that continue pretraining on new proteins.", allow_abbrev=False)
    flags.add_argument("model", type=Path, metavar="MODEL", help="the weights, in any known format")
    flags.add_argument("proteins", metavar="PROTEINS", help="a file of proteins")
    flags.add_argument("folder", type=Path, metavar="FOLDER", help="folder for all results")
    flags.add_argument("--old-proteins", default="", help="the old corpus: a file, or a prefix of .bin and .idx")
    flags.add_argument("--old-share", default="0.2", help="share of the rows from the old corpus (default: 0.2)")
    flags.add_argument("--epochs", default="3", help="passes over PROTEINS (default: 3)")
    flags.add_argument("--processes", type=int, default=1, help="processes that share a batch (default: 1)")
    flags.add_argument("--gpus", type=int, default=0, help="number of GPUs; 0 trains on the CPU (default)")
    flags.add_argument("--check", action="store_true", help="print no flags; only report mistakes before any work")
    return flags


def main() -> int:
    """The exit status: 0, 2 for a mistake of the user's, 130 after Ctrl-C."""
    def work() -> None:
        argv, theirs = sys.argv[1:], list[str]()
        if "--" in argv:
            at = argv.index("--")
            argv, theirs = argv[:at], argv[at + 1:]
        given = parser().parse_args(argv)
        continued = Continued(given, theirs)
        continued.check()
        if not given.check:
            # As bytes: a path need be no text, and the script takes it as it is.
            sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\n" for word in continued.flags()))

    return exit_status(work)


class Continued:
    """A run that goes on from `given.model`: what its flags are, those of `argv` behind them, and what is wrong."""

    def __init__(self, given: argparse.Namespace, argv: list[str]) -> None:
        self._given, self._argv = given, as_flags(argv)
        self._said = {word.partition("=")[0] for word in self._argv if word.startswith("--")}
        self._run = given.folder / "run"
        self._epochs = _number("EPOCHS", given.epochs, 1e6)
        self._old_share = _number("OLD_SHARE", given.old_share, 1)
        if min(given.processes, given.gpus + 1) < 1:
            raise ConfigError(f"--processes {given.processes} with --gpus {given.gpus}; give at least 1 and 0")
        self._model = _opened(given.model)
        self._num_parameters = _num_parameters(self._model)

    def check(self) -> None:
        """Raises a UserError for what is wrong with the model, the flags, the folder or the files."""
        given, data = self._given, self._given.folder / "data"
        if given.folder.resolve() in (given.model.resolve(), *given.model.resolve().parents):
            raise ConfigError(f"MODEL {given.model} lies in OUT_FOLDER {given.folder}, where its successor goes; give "
                              "another folder")
        if (given.folder / "model").exists() and not iterations(self._run):
            raise ConfigError(f"OUT_FOLDER {given.folder} holds a model/ that is of no run there; give another folder")
        _check_data(given.proteins, data / "new.stats.json", given.folder)
        if given.old_proteins and not _is_prefix(given.old_proteins):
            _check_data(given.old_proteins, data / "old.stats.json", given.folder)
        start = self._start()
        config = self._configured(start | self._course(STEPS * PEAK_ROWS))
        config = self._configured(start | self._course(STEPS * PEAK_ROWS, config))
        check_layout(config, given.processes)
        least = self._configured(start | self._course(1, config))  # how many proteins there are is not known yet
        BatchSizes(least.training, grid_sizes(config.parallel, given.processes)["data"])
        if config.optimizer.uses_muon and not self._said >= PEAKS:
            raise ConfigError(f"--optimizer {config.optimizer.optimizer} has peak learning rates for random weights, "
                              f"which would undo what MODEL has learnt; give {', '.join(sorted(PEAKS))}, or leave "
                              "--optimizer out")
        if config.checkpoint.finetune:
            refuse_changes(config, Vocab.from_file(config.data.vocab_file, config.data.mask_token), self._model)

    def flags(self) -> list[str]:
        """All words of the command line, those of the user last."""
        given, start = self._given, self._start()
        new, old = str(given.folder / "data" / "new_text_document"), given.old_proteins
        if old and not _is_prefix(old):
            old = str(given.folder / "data" / "old_text_document")
        share = self._old_share if old else 0.0
        config = self._configured(start | self._course(STEPS * PEAK_ROWS))
        vocab = Vocab.from_file(config.data.vocab_file, config.data.mask_token)
        rows_new = build_datasets(replace(config.data, data_path=(new,)), vocab, config.training.seed).train
        num_samples = round(self._epochs * rows_new.num_epoch_rows(0) / (1 - share))
        course = self._course(max(LEAST_ROWS, num_samples), config)
        often = self._often(self._configured(start | course).training)
        paths = [f"{1 - share:g}", new, f"{share:g}", old] if old else [new]
        return ["--data-path", *paths, *self._words(start | course | often)]

    def _start(self) -> dict[str, Any]:
        """Where the run begins, or goes on, and whatever depends on no number of proteins."""
        given, is_large = self._given, self._num_parameters >= RECOMPUTED
        start: dict[str, Any] = {"--load": given.model, "--finetune": None}
        if iterations(self._run):
            start = {"--load": self._run}
        taken = left_open(self._words(start), saved_flags)
        is_learned = taken.get("position_embedding_type", "learned_absolute") == "learned_absolute"
        positions = taken.get("max_position_embeddings") if is_learned else None
        return start | {
            "--save": self._run, "--split": "90,10", "--attention-dropout": 0, "--hidden-dropout": 0,
            "--seq-length": min(POSITIONS, positions or POSITIONS),
            "--eval-at-start": None, "--keep-checkpoints": 2, **({"--eval-each": None} if given.old_proteins else {}),
            **({"--bf16": None} if given.gpus else {}), **({"--checkpoint-activations": None} if is_large else {}),
            **({"--data-parallel-sharding": "optimizer"} if given.processes > 1 else {})}

    def _course(self, num_samples: int, config: Config | None = None) -> dict[str, Any]:
        """Batch and learning rate of a run of so many rows; the user's, where `config` has them."""
        processes = self._given.processes
        rows = min(PEAK_ROWS, max(LEAST_ROWS, 2 ** int(math.log2(max(1, num_samples / STEPS)))))
        most = next(most for least, most in ROWS_AT_ONCE.items() if self._num_parameters >= least)
        at_once = min(most if self._given.gpus else ROWS_AT_ONCE_ON_CPU, max(1, rows // processes))
        is_given = config is not None and bool(self._said & {"--micro-batch-size", "--batch-size"})
        if config is not None and is_given:
            at_once = config.training.micro_batch_size
        rows = -(-rows // (at_once * processes)) * at_once * processes
        if config is not None and "--global-batch-size" in self._said:
            rows = config.training.global_batch_size or rows
            at_once = at_once if is_given else math.gcd(at_once, max(1, rows // processes))
        lr = float(f"{PEAK_LR * math.sqrt(rows / PEAK_ROWS):.2g}")  # Adam's noise: with the square root of the batch
        if config is not None and "--lr" in self._said:
            lr = config.schedule.lr
        return {"--micro-batch-size": at_once, "--global-batch-size": rows, "--train-samples": max(rows, num_samples),
                "--lr": lr, "--min-lr": 0 if config is None else float(f"{lr / 10:.6g}"), "--lr-decay-style": "cosine",
                "--lr-warmup-fraction": 0.1, "--adam-beta2": 0.98}

    def _often(self, training: TrainingConfig) -> dict[str, Any]:
        """How often the run says something, evaluates and saves: a hundred times, and ten times."""
        rows = training.global_batch_size or 1
        num_steps = max(1, training.train_iters or (training.train_samples or 0) // rows)
        evaluated = EVALUATED_ROWS if self._given.gpus else EVALUATED_ROWS_ON_CPU
        tenth = -(-num_steps // 10)
        return {"--log-interval": min(100, -(-num_steps // 100)), "--eval-interval": tenth, "--save-interval": tenth,
                "--eval-iters": max(1, evaluated // rows)}

    def _configured(self, flags: Mapping[str, Any]) -> Config:
        """The configuration that these flags and the user's make; raises ConfigError."""
        argv = self._words(flags)
        return parse(argv, left_open(argv, saved_flags))[0]

    def _words(self, flags: Mapping[str, Any]) -> list[str]:
        """Flags as words, with the user's behind them, and without what those say in other words."""
        replaced = {REPLACES[name] for name in self._said if name in REPLACES}
        ours = [(name,) if value is None else (name, value) for name, value in flags.items() if name not in replaced]
        return [*(str(word) for pair in ours for word in pair), *self._argv]


def _opened(model: Path) -> Checkpoint:
    """The weights at a path, of any format; raises CheckpointError where there are none that can be read."""
    if not model.exists():
        raise CheckpointError(f"MODEL {model} does not exist; give a folder of transformers, or a .pt of fair-esm")
    return FORMATS[recognised(model)].read(model)


def _num_parameters(model: Checkpoint) -> int:
    return sum(math.prod(tensor.shape) for tensor in model.model.values())


def _number(name: str, text: str, limit: float) -> float:
    """The number that a text is; raises ConfigError where it is none between 0 and `limit`."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < limit:
        raise ConfigError(f"{name} is {text!r}; set it to a number above 0 and below {limit:g}")
    return number


def _is_prefix(path: str) -> bool:
    return Path(f"{path}.idx").exists()


def _check_data(proteins: str, statistics: Path, folder: Path) -> None:
    """Raises a UserError where there are no such files, or others were preprocessed before."""
    num_bytes = sum(source.size for source in expand([proteins]))
    if not statistics.exists():
        return
    try:
        inputs = json.loads(statistics.read_text(encoding="utf-8"))["inputs"]
        num_before, path = sum(item["bytes"] for item in inputs), inputs[0]["path"]
    except (ValueError, LookupError, TypeError):
        raise DataError(f"{statistics} is damaged; remove it, and the proteins are preprocessed again") from None
    if num_before != num_bytes:
        raise ConfigError(f"OUT_FOLDER {folder} was begun with the {num_before:,} bytes of {path}, and {proteins} has "
                          f"{num_bytes:,}; give another folder")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a script that was asked to stop does not read on
    sys.exit(main())
