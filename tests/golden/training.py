"""Shared by the golden tests: a tiny model, a small corpus, and functions that run the program on them."""

import gzip
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.store import open_place, read_state
from megatron.checkpoint.tensor_file import facts_of_file
from megatron.data.corpus.vocab import Vocab
from pretrain_tape import main
from tests.indexed_files import write_indexed
from tests.ranks.launch import on_processes
from tests.warm_python import begin_png

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 256 --micro-batch-size 2 "
        "--attention-dropout 0 --hidden-dropout 0 --lr 2e-3 --min-lr 1e-4 --lr-decay-style cosine "
        "--lr-warmup-fraction 0.1 --adam-beta2 0.98 --split 90,7,3 --eval-interval 6 --eval-iters 2 "
        "--save-interval 100 --log-interval 1 --num-workers 0 --peak-tflops 1").split()
DROPOUT = "--attention-dropout 0.1 --hidden-dropout 0.1".split()
SHORT = [*TINY, "--num-layers", "1", "--eval-interval", "100", "--log-interval", "2"]


def write_corpus(folder: Path, num_proteins: int = 300) -> str:
    """Write an indexed dataset of the first `num_proteins` shipped proteins; returns its prefix."""
    with gzip.open(ROOT / "examples" / "proteins" / "small.fasta.gz", "rt") as file:
        records = file.read().split(">", num_proteins + 1)[1:-1]
    ids = Vocab.from_file().ids
    documents = ([ids[letter] for letter in "".join(record.split("\n")[1:])] for record in records)
    write_indexed(folder / "corpus", (np.array(document, dtype=np.uint16) for document in documents))
    return str(folder / "corpus")


def start_program(python: str, *flags: object, ranks: int = 1, launcher: str = "run") -> subprocess.Popen:
    """Start `PYTHON pretrain_tape.py FLAGS`, with several ranks under torch.distributed's launcher.

    stdout and stderr share one pipe. Each rank has one thread, like the tests' own process, because the order of sums,
    and so their last bits, depends on the number of threads.
    """
    start = ["-m", f"torch.distributed.{launcher}", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [python, *start, str(ROOT / "pretrain_tape.py"), *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run_program(python: str, *flags: object, ranks: int = 1, launcher: str = "run") -> tuple[int, str]:
    """Run `start_program` to its end; returns its exit status and its output."""
    process = start_program(python, *flags, ranks=ranks, launcher=launcher)
    output = process.communicate()[0]
    return process.returncode, output


def processes_with(argument: str, variable: str) -> list[int]:
    """The ids of processes with this argument and this NAME=VALUE in their environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile, or not ours
            has_both = [text.encode() in (place / name).read_bytes().split(b"\0")
                        for name, text in (("cmdline", argument), ("environ", variable))]
            found += [int(place.name)] * all(has_both)
    return found


def run_on_ranks(*flags: object, ranks: int) -> list[int | None]:
    """Run pretrain_tape.py without a launcher, in processes that have loaded torch; returns each rank's exit status."""
    answers = on_processes(_one_rank, ranks, free_port(), [str(flag) for flag in flags])
    return [0 if isinstance(answer, bytes) else answer for answer in answers]


def free_port() -> int:
    """A free port below those that Linux assigns to outgoing connections.

    One of those could be assigned to another connection before the caller takes it.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def _one_rank(rank: int, ranks: int, port: int, flags: list[str]) -> bytes:
    environment = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    with (patch.dict(os.environ, environment), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), undrawn()):
        status = main(flags)
    if status:
        sys.exit(status)  # as the program does: its peers notice once the process is gone
    return b""


class Runs:
    """The program in this process, on one folder; `lines` has what it said last."""

    def __init__(self, corpus, folder, capsys):
        self.corpus, self.folder, self.capsys = corpus, folder, capsys

    def __call__(self, *flags, status=0):
        places = ["--data-path", self.corpus, "--save", self.folder, "--load", self.folder]
        assert main([*map(str, [*SHORT, *places, *flags])]) == status
        output = self.capsys.readouterr()
        self.lines = (output.out + output.err).splitlines()
        return self

    def notes(self):
        return [line for line in self.lines if line.startswith("note: ")]

    def error(self, *flags, status=2):
        [line] = [line for line in self(*flags, status=status).lines if line.startswith("error: ")]
        return line


def weights(folder, iteration):
    return open_place(folder / f"iter_{iteration:07d}").model


@contextmanager
def undrawn() -> Iterator[Any]:
    """Within this context `begin_png` stands for the method of matplotlib that draws; gives that method."""
    from matplotlib.figure import Figure

    draw = Figure.savefig
    with patch.object(Figure, "savefig", begin_png):
        yield draw


def edit_state(place: Path, **values: object) -> None:
    """Change values in a checkpoint's state.json, and its checksum in the manifest, as if saved like this."""
    (place / "state.json").write_text(json.dumps(read_state(place / "state.json") | values))
    manifest = read_manifest(place)
    manifest.files["state.json"] = facts_of_file(place / "state.json")
    manifest.write(place)


def losses(folder: Path, kind: str = "train", name: str = "loss") -> dict[int, float]:
    """The loss, or the number `name`, at each iteration, from the records of one kind in metrics.jsonl."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {record["iteration"]: record[name] for record in records if record["kind"] == kind}
