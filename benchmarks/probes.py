"""What models know of structure: `python benchmarks/probes.py CHECKPOINT [CHECKPOINT …] --data FOLDER`.

A row a folder that `pretrain_tape.py --save` wrote (or a model of another format), of any architecture:

- precision of contacts told by attention maps (contact_probe.py), mean ± standard deviation over draws of the 20 chains
  on which the heads' weights are fitted; L residues have so many pairs predicted, or L/2, L/5.
- accuracy of secondary structure in three classes told by the last hidden states (structure_probe.py), on CB513.

Beside them a model of the same shape with random weights, letters of a window of ±7 residues, and chance. Proteins are
cropped to the shortest row among the checkpoints, so that all lines of a table are of the same residues. FOLDER has

contacts/{train,test}.jsonl.gz                     an object a line: seq, ca ([x, y, z] in angstrom, null: unresolved)
secondary_structure/{train,test_cb513}.jsonl.gz    seq, ss3 (H, E, C), mask (1: resolved; without it all count)
"""

import argparse
import gzip
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import structure_probe  # noqa: E402
from benchmarks.contact_probe import SHOWN, chance, contact_precision  # noqa: E402
from benchmarks.structure_probe import Labelled, accuracy, hidden_states, labels, windows  # noqa: E402
from megatron.config.command_line import OneLineParser  # noqa: E402
from megatron.errors import ConfigError, DataError  # noqa: E402
from megatron.infer.contacts.chains import Chain  # noqa: E402
from megatron.infer.contacts.regression import NUM_FITTED  # noqa: E402
from megatron.infer.contacts.structures import read_chains  # noqa: E402
from megatron.infer.pretrained import Pretrained, load_pretrained  # noqa: E402
from megatron.log import exit_status  # noqa: E402

HEADINGS = ("model", *(f"P@{size}, {pairs}" for pairs in SHOWN for size in ("L", "L/2", "L/5")),
            "CB513, 3 classes")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Task:
    """What all models of a table are asked."""

    contacts_train: Sequence[Chain]
    contacts_test: Sequence[Chain]
    structure_train: Sequence[Labelled]
    structure_test: Sequence[Labelled]

    def cropped(self, size: int) -> "Task":
        """The same, with the first residues of each protein."""
        return Task([each.cropped(size) for each in self.contacts_train],
                    [each.cropped(size) for each in self.contacts_test],
                    [each.cropped(size) for each in self.structure_train],
                    [each.cropped(size) for each in self.structure_test])


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = OneLineParser(description="Print what models know of structure.", allow_abbrev=False)
    flags.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="a run's folder")
    flags.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="contacts and secondary structure")
    flags.add_argument("--draws", type=int, default=5, help="of the 20 chains that weights are fitted on")
    flags.add_argument("--test-chains", type=int, default=157, help="whose contacts are told")
    flags.add_argument("--train-proteins", type=int, default=1000, help="whose structure the regression learns")
    flags.add_argument("--test-proteins", type=int, default=513, help="whose structure is told")
    return flags


def main() -> int:
    """The exit status: 0, 2 for a mistake of the user's, 130 after Ctrl-C."""
    def work() -> None:
        given = parser().parse_args()
        for name in ("draws", "test_chains", "train_proteins", "test_proteins"):
            if getattr(given, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(given, name)}; it must be 1 or greater")
        models = {folder: load_pretrained(folder, device="cpu") for folder in given.checkpoints}
        task = read_task(given).cropped(min(model.config.data.seq_length - model.num_ends for model in models.values()))
        print(table(list(rows(models, task, given.draws))))

    return exit_status(work)


def read_task(given: argparse.Namespace) -> Task:
    """The proteins of the flags' folder, as many as they say; raises DataError."""
    contacts, structure = given.data / "contacts", given.data / "secondary_structure"
    train = read_chains([str(contacts / "train.jsonl.gz")])
    if len(train) < NUM_FITTED:
        raise DataError(f"{contacts / 'train.jsonl.gz'} has {len(train)} chains, and {NUM_FITTED} are drawn; give more")
    return Task(train, _some(read_chains([str(contacts / "test.jsonl.gz")]), given.test_chains),
                _some(_read(structure / "train.jsonl.gz"), given.train_proteins),
                _some(_read(structure / "test_cb513.jsonl.gz"), given.test_proteins))


def rows(models: dict[str, Pretrained], task: Task, num_draws: int) -> Iterator[list[str]]:
    """The cells of each row: the models, random weights in each of their shapes, and what needs no model."""
    named = {f"{folder}, iteration {model.iteration}": model for folder, model in models.items()}
    shapes: dict[object, str] = {}
    for folder, model in models.items():
        shapes.setdefault((model.config.model, model.vocab), folder)
    named |= {f"random weights, as {folder}": models[folder].untrained(seed=0) for folder in shapes.values()}
    train_labels_t, test_labels_t = labels(task.structure_train), labels(task.structure_test)
    for name, model in named.items():
        start = time.monotonic()
        found = contact_precision(model, task.contacts_train, task.contacts_test, num_draws)
        between = time.monotonic()
        right = accuracy((hidden_states(model, task.structure_train), train_labels_t),
                         (hidden_states(model, task.structure_test), test_labels_t))
        print(f"{name}: contacts {between - start:.0f} s, structure {time.monotonic() - between:.0f} s",
              file=sys.stderr, flush=True)
        yield [name, *map(_with_spread, found.T), f"{right:.3f}"]
    right = accuracy((windows(task.structure_train), train_labels_t), (windows(task.structure_test), test_labels_t))
    yield [f"letters of ±{structure_probe.WINDOW} residues", *["–"] * 6, f"{right:.3f}"]
    counted_t = test_labels_t[test_labels_t != structure_probe.UNCOUNTED]
    yield ["chance", *(f"{share:.3f}" for share in chance(task.contacts_test)),
           f"{float(counted_t.bincount().max() / len(counted_t)):.3f}"]


def table(cells: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (HEADINGS, ["---"] * len(HEADINGS), *cells))


def _with_spread(values_d: np.ndarray) -> str:
    spread = f" ± {values_d.std(ddof=1):.3f}" if len(values_d) > 1 else ""
    return f"{values_d.mean():.3f}{spread}"


def _some(items: Sequence[Item], number: int) -> list[Item]:
    """As many, drawn at random, in their order."""
    return [items[place] for place in np.sort(np.random.default_rng(0).permutation(len(items))[:number])]


def _read(path: Path) -> list[Labelled]:
    """The proteins of a file."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [_labelled(json.loads(line)) for line in file]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); --data names the folder of contacts/ and "
                        "secondary_structure/") from None
    except (EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged, or of another form ({error!r}); see the top of {Path(__file__).name}") from (
            error)


def _labelled(fields: dict[str, Any]) -> Labelled:
    sequence, classes = fields["seq"], fields["ss3"]
    if not re.fullmatch("[A-Z]+", sequence):
        raise ValueError(f"not residues: {sequence}")
    counts = fields.get("mask", "1" * len(sequence))
    if not len(sequence) == len(classes) == len(counts) or set(classes) - set(structure_probe.CLASSES):
        raise ValueError(f"{len(sequence)} residues, and classes {classes}")
    return Labelled(sequence, classes, counts)


if __name__ == "__main__":
    sys.exit(main())
