"""A long run that meets faults at random steps and recovers from each of them.

    python -m tests.golden.soak [--steps 2000] [--every 100] [--seed 0]

Two ranks run under the project's launcher. On average one fault comes every `--every` steps: a rank is killed (SIGKILL;
the launcher starts the ranks again); a rank is frozen (SIGSTOP; after six seconds the other stops waiting for it, and
the launcher starts both again); the launcher is asked to stop (it saves, exits with 0 and is started again); a device
computes a wrong gradient (the run goes back and repeats the step); the disk refuses a checkpoint. The exit status is 1
if the run did not reach its end, resumed from less than had been saved, ended with other bits than an undisturbed run,
left an unfinished file, or if its memory or open files grew.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from megatron.checkpoint.store import open_place, place_of
from tests.golden.training import ROOT, TINY, losses, processes_with, write_corpus

KINDS = ("kill", "freeze", "stop", "nan", "full disk")
SENT = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}  # signals to a rank
INJECTED = {"nan": "flip", "full disk": "full-disk"}  # kinds of --inject-fault
TOLD = {"nan": "came out normal this time", "full disk": "note: could not save"}  # printed when it came
LOOK_S, SAMPLE_S = 0.05, 1.0  # time between checks of the step, and of memory and files
SETTLED_STEPS = 30  # after these steps of a process its buffers exist, and its memory should no longer grow
ROOM_MIB, ROOM_FILES = 32, 8  # the most by which a process may then grow, in memory and open files


@dataclass
class Process:
    """Resident memory (MiB) and open files of a process, once settled and last, and the steps that it lived for."""

    settled: tuple[float, int]
    last: tuple[float, int]
    from_step: int
    to_step: int


@dataclass
class Soaked:
    """What happened: faults by kind, iterations that starts resumed from, and each process by its id."""

    faults: Counter[str] = field(default_factory=Counter)
    resumed: list[int] = field(default_factory=list)
    processes: dict[int, Process] = field(default_factory=dict)
    elapsed_s: float = 0.0

    def grown(self) -> tuple[float, int]:
        """The largest growth of any process between settling and its end, in MiB and in open files."""
        pairs = [(one.last[0] - one.settled[0], one.last[1] - one.settled[1]) for one in self.processes.values()]
        return max((mib for mib, _ in pairs), default=0.0), max((files for _, files in pairs), default=0)


def main(argv: list[str]) -> int:
    """Print the results as a table of one row; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100, help="steps between faults, on average")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    chance = random.Random(options.seed)
    num_faults = max(1, options.steps // options.every)
    faults = plan(options.steps, [chance.choice(KINDS) for _ in range(num_faults)], chance)
    with tempfile.TemporaryDirectory() as folder:
        soaked = soak(options.steps, faults, write_corpus(Path(folder)), Path(folder), sys.executable, chance)
    mib, files = soaked.grown()
    kinds = ", ".join(f"{soaked.faults[kind]} {kind}" for kind in KINDS)
    print("| steps | faults | starts from checkpoints | memory grew by at most, MiB | open files grew by at most | s |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(f"| {options.steps} | {kinds} | {len(soaked.resumed)} | {mib:.1f} | {files} | {soaked.elapsed_s:.0f} |")
    return 0


def plan(num_steps: int, kinds: list[str], chance: random.Random) -> list[tuple[int, str]]:
    """The faults as (step, kind), at different random steps, ascending; none in the first step or the last five."""
    return list(zip(sorted(chance.sample(range(2, num_steps - 5), len(kinds))), kinds, strict=True))


def soak(num_steps: int, faults: list[tuple[int, str]], corpus: str, folder: Path, python: str,
         chance: random.Random) -> Soaked:
    """Train through the faults; raises AssertionError if the run does not recover from one.

    Its end is compared with that of an undisturbed run.
    """
    interval = max(3, min(20, num_steps // 10))
    flags = [*TINY, "--micro-batch-size", 1, "--global-batch-size", 2, "--eval-interval", 10**6, "--train-iters",
             num_steps, "--save-interval", interval, "--keep-checkpoints", 3, "--log-interval", 2, "--on-spike",
             "rewind", "--distributed-timeout-minutes", 0.1, "--data-path", corpus]
    whole, place = folder / "whole", folder / "soaked"
    injected = [f"{INJECTED[kind]}@{step}" for step, kind in faults if kind in INJECTED]
    told = [*flags, "--save", place, "--load", place, *(["--inject-fault", *injected] if injected else [])]
    soaked, lines = Soaked(Counter()), folder / "lines.txt"
    with lines.open("w") as output:
        assert _started(python, [*flags, "--save", whole], output).wait() == 0, lines.read_text()
    began_s = time.monotonic()
    outside = iter([fault for fault in faults if fault[1] not in INJECTED])
    with lines.open("w") as output:
        is_at_end = False
        while not is_at_end:
            status, is_at_end = _one_start(python, told, output, place, outside, soaked, chance, num_steps)
            assert status == 0, lines.read_text()
    soaked.elapsed_s = time.monotonic() - began_s
    text = lines.read_text()
    soaked.faults |= {kind: len(re.findall(told, text)) for kind, told in TOLD.items()}
    soaked.resumed = _check_lines(text, place)
    _check_end(soaked, whole, place, num_steps)
    return soaked


def _one_start(python: str, flags: list, output: TextIO, place: Path, faults: Iterator[tuple[int, str]], soaked: Soaked,
               chance: random.Random, num_steps: int) -> tuple[int, bool]:
    """Start the launcher and apply the faults as they come due, until it ends.

    Returns its exit status, and whether the run has reached its last step.
    """
    launcher = _started(python, flags, output)
    step, kind = next(faults, (0, ""))
    was_stopped, sampled_s = False, 0.0
    while launcher.poll() is None:
        time.sleep(LOOK_S)
        at = _step(place)
        is_due = bool(kind) and at >= step
        # At its end a run loads matplotlib, whose memory does not count.
        is_sampled = at < num_steps and time.monotonic() - sampled_s > SAMPLE_S
        if not is_due and not is_sampled:
            continue
        ranks = [processes_with(str(place), f"RANK={rank}") for rank in range(2)]
        if is_sampled:
            sampled_s = time.monotonic()
            for process in [launcher.pid, *(number for numbers in ranks for number in numbers)]:
                _sample(soaked.processes, process, at)
        if is_due and all(ranks):
            soaked.faults[kind] += 1
            if kind == "stop":
                launcher.send_signal(signal.SIGTERM)
                launcher.wait()
                was_stopped = True
                break
            with suppress(ProcessLookupError):
                os.kill(chance.choice(ranks)[0], SENT[kind])
            step, kind = next(faults, (0, ""))
    return launcher.returncode, not was_stopped or _step(place) >= num_steps


def _started(python: str, flags: list, output: TextIO) -> "subprocess.Popen[bytes]":
    """The launcher of two ranks of pretrain_tape.py, started."""
    return subprocess.Popen([python, "-m", "megatron.parallel.launch", "--standalone", "--nproc-per-node", "2",
                             "--max-restarts", "1000", str(ROOT / "pretrain_tape.py"), *map(str, flags)], cwd=ROOT,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output, stderr=subprocess.STDOUT)


def _step(place: Path) -> int:
    """The last step in metrics.jsonl, 0 if there is none."""
    with suppress(OSError), (place / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        told = re.findall(rb'"iteration": (\d+)', file.read())
        return int(told[-1]) if told else 0
    return 0


def _sample(processes: dict[int, Process], number: int, step: int) -> None:
    """Record the memory and open files of process `number` at a step."""
    try:
        resident = int(Path(f"/proc/{number}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        found = resident, len(os.listdir(f"/proc/{number}/fd"))
    except OSError:  # it has ended
        return
    one = processes.setdefault(number, Process(found, found, step, step))
    one.last, one.to_step = found, step
    if step < one.from_step + SETTLED_STEPS:
        one.settled = max(one.settled[0], found[0]), max(one.settled[1], found[1])


def _check_lines(text: str, place: Path) -> list[int]:
    """The iterations that starts resumed from; asserts that none is earlier than the last checkpoint saved."""
    assert "Traceback" not in text, text
    saved, resumed = 0, []
    for line in text.splitlines():
        if match := re.fullmatch(rf"  saved checkpoint {re.escape(str(place))}/iter_(\d+)", line):
            saved = int(match[1])
        elif match := re.match(r"going on from iteration (\d+) in ", line):
            assert int(match[1]) >= saved, f"saved {saved}, and {line}"
            resumed.append(int(match[1]))
    return resumed


def _check_end(soaked: Soaked, whole: Path, place: Path, num_steps: int) -> None:
    """Assert that the run ended bitwise as the undisturbed one, left no unfinished file, and no process grew."""
    assert losses(place) == losses(whole)
    ours, theirs = (open_place(place_of(folder, num_steps)) for folder in (place, whole))
    for our, their in ((ours.model, theirs.model), (ours.optimizer or {}, theirs.optimizer or {})):
        assert our.keys() == their.keys()
        assert all(bool((our[name].read() == their[name].read()).all()) for name in our)
    left = [path.name for path in place.iterdir() if path.name.startswith((".", "abandoned-"))]
    assert left == [], left
    mib, files = soaked.grown()
    assert mib < ROOM_MIB and files < ROOM_FILES, f"a process grew by {mib:.1f} MiB and {files} files: {soaked}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
