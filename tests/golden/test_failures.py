"""When ranks die, fail or hang, the job ends in time with one line, or resumes from the last checkpoint."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.parallel.launch.killed import killed_by
from tests.golden.training import ROOT, TINY, free_port, losses, processes_with, run_on_ranks

HOST = socket.gethostname()
RUN = [*TINY, "--micro-batch-size", "1", "--global-batch-size", "4", "--eval-interval", "100000"]
ENDLESS = [*RUN, "--train-iters", "100000", "--save-interval", "4"]
OURS = "megatron.parallel.launch"
IN_TIME_S = 240  # enough on a busy machine; a rank that waits for its timeout's default takes ten minutes
TORCHRUN = "torch.distributed.run"
# The program, but rank 1 fails where the training starts, and rank 0 waits for it.
FAILING = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import pretrain_tape
from megatron.train import rewinding
train = rewinding.train

def train_or_fail(*what):
    if os.environ["RANK"] == "1":
        raise KeyError("name")
    train(*what)

rewinding.train = train_or_fail
pretrain_tape.leave(pretrain_tape.main(sys.argv[1:]))
"""

# The program, but its training takes no notice of requests to stop.
DEAF = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import pretrain_tape
from megatron.train import rewinding

def train(*what):
    print("deaf from here on", flush=True)
    while True:
        time.sleep(0.01)

rewinding.train = train
pretrain_tape.leave(pretrain_tape.main(sys.argv[1:]))
"""


@pytest.fixture
def start():
    """A function that starts a command with flags; what a test leaves running is asked to stop."""
    processes = []

    def one(command, *flags, **environment):
        processes.append(subprocess.Popen(
            [*map(str, command), *map(str, flags)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return processes[-1]

    yield one
    for process in processes:
        process.terminate()
        process.communicate(timeout=120)


@pytest.fixture
def start_ranks(start, python):
    """A function that starts two ranks of the program, or of another, by a launcher."""
    def two(launcher, corpus, folder, *flags, program=ROOT / "pretrain_tape.py", restarts=0, python=python):
        return start([python, "-m", launcher, "--standalone", "--nproc-per-node", 2, "--max-restarts", restarts,
                      program], *flags, "--data-path", corpus, "--save", folder, "--load", folder)

    return two


def wait_for_checkpoint(process: "subprocess.Popen[str]", folder: Path) -> None:
    while not (folder / "latest_checkpointed_iteration.txt").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def send_to_rank_1(number: signal.Signals, launcher: "subprocess.Popen[str]", folder: Path) -> None:
    """Sends the signal once there is a checkpoint."""
    wait_for_checkpoint(launcher, folder)
    [rank_1] = processes_with(str(folder), "RANK=1")
    os.kill(rank_1, number)


def end_of(process: "subprocess.Popen[str]") -> tuple[int, list[str], str]:
    """The exit status, the lines that say an error, and the whole output."""
    output = process.communicate(timeout=IN_TIME_S)[0]
    return process.returncode, [line for line in output.splitlines() if line.startswith("error: ")], output


def test_a_killed_rank_ends_the_job_with_one_line(start_ranks, corpus, tmp_path):
    process = start_ranks(OURS, corpus, tmp_path, *ENDLESS)
    send_to_rank_1(signal.SIGKILL, process, tmp_path)
    status, errors, output = end_of(process)
    assert errors == [f"error: rank 1 on {HOST}: {killed_by(signal.SIGKILL)}"]
    assert "Traceback" not in output
    assert status == 128 + signal.SIGKILL


@pytest.mark.parametrize("launcher", [OURS, None])
def test_a_data_file_that_is_cut_short_while_it_is_read_does_not_end_a_run_without_a_word(
        start, start_ranks, corpus, tmp_path, launcher):
    copy, folder = tmp_path / "copy", tmp_path / "run"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus}{suffix}", f"{copy}{suffix}")
    process = start_ranks(launcher, copy, folder, *ENDLESS, python=sys.executable) if launcher else start(
        [sys.executable, ROOT / "pretrain_tape.py"], *ENDLESS, "--data-path", copy, "--save", folder)
    wait_for_checkpoint(process, folder)
    os.truncate(f"{copy}.bin", 0)
    status, errors, output = end_of(process)
    if launcher:
        [error] = errors
        assert re.fullmatch(rf"error: rank [01] on {HOST}: {re.escape(killed_by(signal.SIGBUS))}", error)
        assert "a file was cut short while it was read" in error and status == 128 + signal.SIGBUS
    else:
        assert "Fatal Python error: Bus error" in output and status == -signal.SIGBUS


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_second_ctrl_c_says_in_one_line_what_is_lost(start, start_ranks, python, corpus, tmp_path, num_ranks):
    program, folder = tmp_path / "deaf_pretrain_tape.py", tmp_path / "run"
    program.write_text(DEAF)
    process = start_ranks(OURS, corpus, folder, *ENDLESS, program=program) if num_ranks > 1 else start(
        [python, program], *ENDLESS, "--data-path", corpus, "--save", folder)
    for _ in range(num_ranks):
        while "deaf" not in (line := process.stdout.readline()):
            assert line
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    status, _, output = end_of(process)
    assert status == 130
    assert output.splitlines()[-1:] == [f"interrupted by a second Ctrl-C before anything was saved in {folder}"]
    assert output.count("interrupted") == 1 and "Traceback" not in output and "error" not in output


@pytest.mark.table
def test_a_rank_that_hangs_ends_the_job_in_time(start_ranks, corpus, tmp_path):
    process = start_ranks(OURS, corpus, tmp_path, *ENDLESS, "--distributed-timeout-minutes", 0.2,
                          python=sys.executable)
    send_to_rank_1(signal.SIGSTOP, process, tmp_path)
    status, errors, output = end_of(process)
    assert re.search(rf"note:   rank 0 on {HOST}, step \d+: waits for others, in parallel/waits.py:", output)
    assert "note:   rank 1: does not answer" in output
    assert errors == [f"error: rank 1 on {HOST}: did not answer, and was killed"]
    assert status != 0


@pytest.mark.table
def test_before_ranks_give_up_they_say_who_holds_them_up(start_ranks, corpus, tmp_path):
    process = start_ranks(OURS, corpus, tmp_path, *ENDLESS, "--distributed-timeout-minutes", 0.1, "--inject-fault",
                          "stuck@3")
    _, _, output = end_of(process)
    notes = [line.removeprefix("note:").strip() for line in output.splitlines() if line.startswith("note: ")]
    # Whichever looks first: the one that is stuck has stood still for as long as the one that waits for it.
    assert re.match(rf"rank [01] on {HOST} has waited [34] s, and will give up 3 s after that", notes[0])
    assert notes[1].startswith(f"rank 0 on {HOST}, step 3: waits for others, in parallel/waits.py:")
    assert notes[2].startswith(f"rank 1 on {HOST}, step 3: is not waiting for others, in train/guards/faults.py:")


def test_a_rank_that_fails_is_reported_with_its_reason_and_the_others_are_not(start_ranks, corpus, tmp_path):
    program = tmp_path / "failing_pretrain_tape.py"
    program.write_text(FAILING)
    status, errors, output = end_of(start_ranks(OURS, corpus, tmp_path / "run", *ENDLESS, program=program))
    assert errors == [f"error: rank 1 on {HOST}: KeyError: 'name'"]
    assert output.count("Traceback") == 1
    assert output.rstrip().endswith(errors[0])
    assert status == 1


def test_a_mistake_that_all_ranks_find_is_said_once_and_not_tried_again(start_ranks, tmp_path):
    status, errors, output = end_of(start_ranks(OURS, "nowhere", tmp_path, *ENDLESS, restarts=3))
    assert len(errors) == 1, output
    assert "Traceback" not in output
    assert status == 2


@pytest.mark.table
def test_torchrun_starts_a_killed_job_again_from_its_last_checkpoint(start_ranks, corpus, tmp_path):
    run = [*RUN, "--train-iters", "40", "--save-interval", "4"]
    process = start_ranks(TORCHRUN, corpus, tmp_path / "killed", *run, restarts=1)
    send_to_rank_1(signal.SIGKILL, process, tmp_path / "killed")
    status, errors, output = end_of(process)
    assert status == 0, output
    # Rank 0 says what it lost, unless torchrun, which has seen rank 1 die, asks it to stop before it has noticed.
    assert [line for line in errors if not line.startswith(f"error: rank 0 on {HOST} lost its peers: ")] == []
    assert "going on from iteration" in output
    assert run_on_ranks(*run, "--data-path", corpus, "--save", tmp_path / "whole", ranks=2) == [0, 0]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_where_no_launcher_tells_the_survivors_do(start, python, corpus, tmp_path):
    port = free_port()
    ranks = [start([python, ROOT / "pretrain_tape.py"], *ENDLESS, "--data-path", corpus, "--save", tmp_path,
                   SLURM_STEP_NODELIST="localhost", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=str(rank),
                   SLURM_LOCALID=str(rank), MASTER_PORT=str(port)) for rank in range(2)]
    wait_for_checkpoint(ranks[0], tmp_path)
    ranks[1].kill()
    status, errors, output = end_of(ranks[0])
    assert status == 1
    assert len(errors) == 1
    assert errors[0].startswith(f"error: rank 0 on {HOST} lost its peers: ")
    assert "Traceback" not in output
