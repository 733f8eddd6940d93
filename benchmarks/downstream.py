"""Measures what pretraining is worth: `python benchmarks/downstream.py FOLDER --models NAME=CHECKPOINT …`.

FOLDER holds the seven tasks below, each in a folder with `train.jsonl.gz` and so on. Each task is solved in several
ways, on the same test proteins:

- letters      scikit-learn on letters only (downstream_probes.py)
- frozen       scikit-learn on the hidden states of all layers of a model, or on its attention maps
- fine-tuned   tools/finetune.py, training all weights, with the same number of steps for each model

The last two are done for each named model, and for a model of the same shape with random weights. Each seed draws other
training proteins (for contacts, all are taken), with at least one of each class, other random weights and other initial
weights of the head. Proteins are cropped to their first 1,022 residues. Runs are recorded in downstream.jsonl, a line
each, and not repeated.

    python benchmarks/downstream.py --table        prints the results so far
"""

import argparse
import csv
import gzip
import json
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.downstream_probes import Features, Letters, States, told  # noqa: E402
from benchmarks.train_step import processor  # noqa: E402
from megatron.checkpoint.newest import open_newest  # noqa: E402
from megatron.checkpoint.saving import Saver, parts_of  # noqa: E402
from megatron.config import CheckpointConfig  # noqa: E402
from megatron.data.corpus.tokenizer import ResidueTokenizer  # noqa: E402
from megatron.data.corpus.vocab import Vocab  # noqa: E402
from megatron.errors import DataError  # noqa: E402
from megatron.finetune.data.examples import load_task  # noqa: E402
from megatron.finetune.data.tasks import CONTACTS, task_of  # noqa: E402
from megatron.finetune.predictions.metrics import measure, with_spread  # noqa: E402
from megatron.infer.contacts.structures import read_chains  # noqa: E402
from megatron.infer.pretrained import flags_of, load_pretrained  # noqa: E402
from megatron.log import Log, exit_status  # noqa: E402

RESULTS = ROOT / "benchmarks" / "downstream.jsonl"
MOST_RESIDUES, NUM_VALID, NUM_TEST = 1022, 200, 500
LETTERS, FROZEN, FINE_TUNED = WAYS = ("letters", "frozen", "fine-tuned")
TUNING = ("--patience 0 --seq-length 1024 --micro-batch-size 2 --global-batch-size 4 --bootstrap 0 --lr 3e-3 "
          "--precision auto")
SHOWN = {"accuracy": "accuracy", "spearman": "Spearman", "medium_long_p_at_l5": "P@L/5 from 12 apart"}


@dataclass(frozen=True)
class DownstreamTask:
    """A downstream task and how it is measured."""

    folder: str
    test: str  # the name of the file to test on
    task: str  # the task's name for tools/finetune.py
    measure: str
    num_train: int  # how many training proteins are drawn
    steps: int  # of 4 rows, in fine-tuning
    class_key: str | None = None  # the key of the class, if the label is one

    def finetune_flags(self) -> list[str]:
        """The task on the command line of tools/finetune.py."""
        return [self.task, *(["--label-key", self.class_key] if self.class_key else [])]


TASKS = (
    DownstreamTask("secondary_structure", "test_cb513", "secondary_structure", "accuracy", 600, 80),
    DownstreamTask("contacts", "test", "contacts", "medium_long_p_at_l5", 782, 40),
    DownstreamTask("remote_homology", "test_fold_holdout", "remote_homology", "accuracy", 8000, 320, "fold_label"),
    DownstreamTask("fluorescence", "test", "fluorescence", "spearman", 2000, 50),
    DownstreamTask("stability", "test", "stability", "spearman", 8000, 40),
    DownstreamTask("localisation_deeploc", "test_hard", "own", "accuracy", 2000, 60, "location"),
    DownstreamTask("go_localisation", "valid", "own", "accuracy", 3000, 60, "label"),
)


def draw(data: Path, asked: DownstreamTask, seed: int, into: Path) -> None:
    """Write train, valid and test.jsonl with randomly chosen proteins; those for testing are the same for every seed.

    If the task is tested on its validation file, validation uses further training proteins, so the two are disjoint.
    """
    train = shuffled(read(data / asked.folder, "train"), seed, asked.class_key)
    valid = train[asked.num_train:] if asked.test == "valid" else shuffled(read(data / asked.folder, "valid"), seed)
    test = shuffled(read(data / asked.folder, asked.test), 0)
    for part, records in (("train", train[:asked.num_train]), ("valid", valid[:NUM_VALID]), ("test", test[:NUM_TEST])):
        with (into / f"{part}.jsonl").open("w") as file:
            file.writelines(f"{json.dumps(cropped(record))}\n" for record in records)


def read(folder: Path, part: str) -> list[dict[str, Any]]:
    """The records of PART.csv.gz or PART.jsonl.gz; raises DataError."""
    as_csv, path = folder / f"{part}.csv.gz", folder / f"{part}.jsonl.gz"
    path = as_csv if as_csv.exists() else path
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            records = list(csv.DictReader(file)) if path == as_csv else [json.loads(line) for line in file]
        if not records or not all(isinstance(record["seq"], str) for record in records):
            raise ValueError("no proteins under seq")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); name the folder that holds the tasks' "
                        "folders") from None
    except (EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged, or of another form ({error!r}); expected a record a line, its sequence "
                        "under seq") from None
    return records


def shuffled(records: list[dict[str, Any]], seed: int, class_key: str | None = None) -> list[dict[str, Any]]:
    """The records in random order, but with one of each class first."""
    random.Random(seed).shuffle(records)
    if class_key is None:
        return records
    firsts = {record[class_key]: place for place, record in reversed(list(enumerate(records)))}
    return sorted(records, key=lambda record: records[firsts[record[class_key]]] is not record)


def cropped(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its sequence, and every label for each residue, cropped to MOST_RESIDUES."""
    size = len(record["seq"])
    return {key: value[:MOST_RESIDUES] if isinstance(value, (str, list)) and len(value) == size else value
            for key, value in record.items()}


def probed(features: Features, vocab: Vocab, asked: DownstreamTask, data: Path, seed: int) -> float:
    """The task's measure for predictions that scikit-learn learns from `features`."""
    with tempfile.TemporaryDirectory() as folder:
        draw(data, asked, seed, Path(folder))
        task = task_of(asked.task, label_key=asked.class_key)
        files = {part: f"{folder}/{part}.jsonl" for part in ("train", "test")}
        examples = load_task(task, files, ResidueTokenizer(vocab))
        if task.kind == CONTACTS:
            tell = features.contacts(read_chains([files["train"]]), seed)
            answers = [tell(chain) for chain in read_chains([files["test"]])]
        else:
            answers = told(features, examples)
    test = [example.label for example in examples.parts["test"]]
    return measure(examples.space, test, answers)[asked.measure].value


def fine_tuned(checkpoint: str, asked: DownstreamTask, data: Path, seed: int) -> float:
    """The task's measure after fine-tuning a checkpoint with tools/finetune.py."""
    with tempfile.TemporaryDirectory() as folder:
        draw(data, asked, seed, Path(folder))
        command = [sys.executable, str(ROOT / "tools" / "finetune.py"), *asked.finetune_flags(), "--load", checkpoint,
                   "--data", folder, "--save", f"{folder}/model", "--train-iters", str(asked.steps),
                   "--seeds", str(seed), *shlex.split(TUNING)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{asked.folder}: {done.stderr.strip().splitlines()[-1]}")
        return json.loads(Path(folder, "model", "report.json").read_text())["measures"]["test"][asked.measure][0]


def with_random_weights(path: str, seed: int, folder: str) -> str:
    """Write a checkpoint like the one at `path` with random normal weights into `folder`; returns `folder`.

    Weights that training would initialise with zeros are random too.
    """
    pretrained = load_pretrained(path, device="cpu")
    checkpoint = open_newest(path, pretrained.mesh.world, Log(), with_optimizer=False)
    assert checkpoint is not None
    config = replace(pretrained.config, model=replace(pretrained.config.model, zero_init_output=False))
    model = replace(pretrained, config=config).untrained(seed).model
    saver = Saver(CheckpointConfig(save=folder), pretrained.mesh, None, Log(is_speaker=False), loaded=0)
    saver.save(1, parts_of(dict(model.named_parameters()), {}), {
        "iteration": 1, "config": {**flags_of(checkpoint), "zero_init_output": False},
        "vocabulary": pretrained.vocab.identity, "progress": {"iteration": 1, "consumed_samples": 0}})
    saver.close()
    return folder


Key = tuple[str, str, str, int]  # identifies a run: model, way, task, seed
Run = tuple[Key, Callable[[], float]]  # a run, and the function that makes it and returns its measure


def runs(models: dict[str, str], tasks: Sequence[DownstreamTask], given: argparse.Namespace) -> Iterator[Run]:
    """All runs that the command line asks for."""
    if LETTERS in given.ways:
        vocab = Vocab.from_file("iupac")
        for seed, asked in product(given.seeds, tasks):
            yield (LETTERS, LETTERS, asked.folder, seed), partial(probed, Letters(), vocab, asked, given.data, seed)
    for name, path in models.items():
        yield from runs_of(name, path, given.seeds, tasks, given)
        for seed in () if given.no_random_weights else given.seeds:
            with tempfile.TemporaryDirectory() as folder:
                yield from runs_of(f"random weights, {name}", with_random_weights(path, seed, folder), [seed], tasks,
                                   given)


def runs_of(name: str, path: str, seeds: Sequence[int], tasks: Sequence[DownstreamTask], given: argparse.Namespace
            ) -> Iterator[Run]:
    """The runs of one checkpoint."""
    pretrained = load_pretrained(path, device="cpu", precision=given.precision)
    states = States(pretrained)
    for seed, asked in product(seeds, tasks):
        if FROZEN in given.ways:
            yield (name, FROZEN, asked.folder, seed), partial(probed, states, pretrained.vocab, asked, given.data, seed)
        if FINE_TUNED in given.ways:
            yield (name, FINE_TUNED, asked.folder, seed), partial(fine_tuned, path, asked, given.data, seed)


def known() -> list[dict[str, Any]]:
    """The records of all runs made so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(records: Sequence[dict[str, Any]]) -> str:
    """The table, with a row for each way and model and a column for each task: mean and standard deviation over seeds.
    """
    cells = defaultdict[tuple[str, str], dict[str, list[float]]](lambda: defaultdict(list))
    for record in records:
        cells[record["way"], record["model"]][record["task"]].append(record["value"])
    shown = [asked for asked in TASKS if any(asked.folder in row for row in cells.values())]
    lines = ["| | model | " + " | ".join(f"{asked.folder.replace('_', ' ')}, {SHOWN[asked.measure]}" for asked in shown)
             + " |", "| --- " * (len(shown) + 2) + "|"]
    for (way, model), row in sorted(cells.items(), key=lambda item: (WAYS.index(item[0][0]), item[0][1])):
        values = (with_spread(row[asked.folder]) if row[asked.folder] else "–" for asked in shown)
        lines.append(f"| {way} | {'–' if way == LETTERS else model} | {' | '.join(values)} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("data", nargs="?", type=Path, help="the folder of the tasks' folders")
    flags.add_argument("--models", nargs="+", default=[], metavar="NAME=CHECKPOINT")
    flags.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    flags.add_argument("--tasks", nargs="+", choices=[asked.folder for asked in TASKS],
                       default=[asked.folder for asked in TASKS])
    flags.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    flags.add_argument("--no-random-weights", action="store_true", help="ask the named models alone")
    flags.add_argument("--precision", choices=("fp32", "bf16"), default="bf16",
                       help="of frozen models: bf16 is the faster where a processor multiplies it")
    flags.add_argument("--table", action="store_true", help="train nothing")
    return flags


def main() -> int:
    """Run the program; returns the exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    given = parser().parse_args()
    if given.data is None and not given.table:
        parser().error("give the folder of the tasks, or --table")
    for word in given.models:
        if "=" not in word:
            parser().error(f"--models has {word!r}; expected NAME=CHECKPOINT")
    return exit_status(partial(work, given))


def work(given: argparse.Namespace) -> None:
    """Make the missing runs, then print the table; raises a UserError."""
    models = dict(word.split("=", 1) for word in given.models)
    done = {(record["model"], record["way"], record["task"], record["seed"]) for record in known()}
    tasks = [asked for asked in TASKS if asked.folder in given.tasks]
    for key, run in () if given.table else runs(models, tasks, given):
        if key in done:
            continue
        began_s = time.monotonic()
        record = dict(zip(("model", "way", "task", "seed"), key, strict=True)) | {"value": round(run(), 5)}
        with RESULTS.open("a") as file:
            file.write(f"{json.dumps({**record, 'processor': processor()})}\n")
        print(f"{', '.join(map(str, key))}: {record['value']:.3f} ({time.monotonic() - began_s:.0f} s)", flush=True)
    print(table(known()))


if __name__ == "__main__":
    sys.exit(main())
