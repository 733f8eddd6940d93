"""Kills runs at random moments and starts them again: `python -m tests.golden.kills [--kills 200] [--seed 0]`.

For one and two ranks, with synchronous and with asynchronous saving, prints how often a run was killed. The exit status
is 1 at the first restart that did not resume from a complete checkpoint, or at a run whose end is not bitwise equal to
that of an undisturbed run.
"""

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from megatron.checkpoint.store import open_place, place_of
from tests.golden.training import TINY, free_port, losses, write_corpus
from tests.ranks.launch import warm_processes

STEPS, INTERVAL = 60, 3
RUN = [*TINY, "--micro-batch-size", "1", "--global-batch-size", "2", "--eval-interval", "100000", "--train-iters",
       str(STEPS), "--save-interval", str(INTERVAL), "--keep-checkpoints", "3", "--log-interval", "2"]
WAYS = {f"{ranks} rank{'s' * (ranks > 1)}{', async' if flags else ''}": (ranks, flags)
        for ranks in (1, 2) for flags in ([], ["--async-save"])}
KILLS_A_RUN = 5


def main(argv: list[str]) -> int:
    """Kill and restart runs in each of WAYS; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        corpus, chance = write_corpus(Path(folder)), random.Random(options.seed)
        for name in WAYS:
            kills = -(-options.kills // len(WAYS))
            resumed = endure(name, kills, corpus, Path(folder) / name, chance)
            print(f"{name}: killed {kills} times; went on from iterations {resumed}; ended bitwise undisturbed")
    return 0


def endure(name: str, num_kills: int, corpus: str, folder: Path, chance: random.Random) -> list[int]:
    """Kill and restart runs in one of WAYS; returns the iterations that they resumed from, 0 for a run's start.

    Asserts that none goes back behind a checkpoint, and that each ends as an undisturbed run.
    """
    whole, resumed = folder / "undisturbed", []
    assert _run(name, corpus, whole, None, chance) == (True, False)
    left = num_kills
    for number in itertools.count():
        place, came_to, until = folder / f"run{number}", 0, max(0, left - KILLS_A_RUN)
        has_ended = False
        while not has_ended:
            has_ended, was_killed = _run(name, corpus, place, chance.random() if left > until else None, chance)
            left -= was_killed
            start = _start(place)
            assert came_to <= start and start % INTERVAL == 0, f"{name}: from {came_to} back to {start}"
            resumed.append(start)
            came_to = start
        assert losses(place) == losses(whole), name
        assert _content(place) == _content(whole), name
        if left == 0:
            return resumed
    raise AssertionError("the numbers have no end")


def _run(name: str, corpus: str, folder: Path, killed_after_s: float | None,
         chance: random.Random) -> tuple[bool, bool]:
    """Start all ranks and, unless the time is None, kill one `killed_after_s` seconds after training has begun.

    Returns whether all ranks ended successfully, and whether one was killed.
    """
    ranks, flags = WAYS[name]
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    output = folder / "lines.txt"
    output.unlink(missing_ok=True)
    arguments = [*RUN, *flags, "--data-path", corpus, "--save", str(folder), "--load", str(folder)]
    start = warm_processes().Process
    processes = [start(target=_one_rank, args=(rank, ranks, port, arguments, str(output)), daemon=True)
                 for rank in range(ranks)]
    for process in processes:
        process.start()
    if killed_after_s is not None:
        while processes[0].is_alive() and not _beginnings(_text(output)):
            time.sleep(0.01)
        time.sleep(killed_after_s)
        chance.choice(processes).kill()
    for process in processes:
        process.join(60)
        assert process.exitcode is not None, f"{name}: a rank hangs"
    statuses = [process.exitcode for process in processes]
    return not any(statuses), -signal.SIGKILL in statuses


def _one_rank(rank: int, ranks: int, port: int, flags: list[str], output: str) -> None:
    """Run pretrain_tape.py as one rank, in this process; rank 0 writes what it prints to the file `output`."""
    import torch

    import pretrain_tape

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    lines = os.open(output if rank == 0 else os.devnull, os.O_WRONLY | os.O_CREAT)
    os.dup2(lines, 1)
    os.dup2(lines, 2)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
    pretrain_tape.leave(pretrain_tape.main(flags))


def _start(folder: Path) -> int:
    """The iteration that the last start resumed from, by the line that it printed; 0 for new weights."""
    text = _text(folder / "lines.txt")
    assert "Traceback" not in text, text
    [line] = _beginnings(text)
    return int(line.split()[4]) if line.startswith("going") else 0


def _beginnings(text: str) -> list[str]:
    """The lines in which starts say what they resume from."""
    return [line for line in text.splitlines() if line.startswith(("going on from iteration", "no checkpoint in"))]


def _content(folder: Path) -> dict[str, list]:
    """The tensors of the last checkpoint, weights and optimizer state.

    The files themselves are not comparable: which rank writes a tensor that both hold varies.
    """
    checkpoint = open_place(place_of(folder, STEPS))
    tables = checkpoint.model, checkpoint.optimizer or {}
    return {name: tensor.read().tolist() for table in tables for name, tensor in table.items()}


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
