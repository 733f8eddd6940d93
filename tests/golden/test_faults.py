"""Faults injected on purpose, on one rank and on two: each is reported in its line and ends as docs/runs.md says."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron.checkpoint.metrics import read_records
from megatron.checkpoint.store import iterations
from megatron.config.command_line import parse
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.dataset import IN_MEMORY_DOCUMENTS, build_datasets
from megatron.files import left_over
from megatron.parallel.launch.killed import killed_by
from pretrain_tape import main
from tests.golden.training import ROOT, TINY, losses, start_program
from tests.indexed_files import write_indexed

HOST = socket.gethostname()
FLAGS = [*TINY, "--num-layers", "1", "--eval-interval", "100", "--log-interval", "2", "--train-iters", "8",
         "--save-interval", "4"]


@pytest.fixture
def run(tmp_path, capfd):
    """A function that runs the program here; its lines."""
    def one(corpus, *flags, status=0):
        places = ["--data-path", corpus, "--save", tmp_path, "--load", tmp_path]
        assert main([*map(str, [*FLAGS, *places, *flags])]) == status
        output = capfd.readouterr()
        return (output.out + output.err).splitlines()

    return one


@pytest.fixture
def run_two(tmp_path, python):
    """A function that runs two ranks by our launcher; its lines."""
    def two(corpus, *flags, status=0):
        places = ["--data-path", corpus, "--save", tmp_path, "--load", tmp_path, "--micro-batch-size", 1]
        result = subprocess.run(
            [python, "-m", "megatron.parallel.launch", "--standalone", "--nproc-per-node", "2", "--max-restarts", "0",
             str(ROOT / "pretrain_tape.py"), *map(str, [*FLAGS, *places, *flags])], cwd=ROOT, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert result.returncode == status, result.stdout
        return result.stdout.splitlines()

    return two


@pytest.fixture(scope="module")
def indexed_corpus(tmp_path_factory):
    """The prefix of one whose row index is kept on disk, and the files of that with what they hold."""
    folder = tmp_path_factory.mktemp("large")
    letters = np.arange(6, 26, dtype=np.uint16)
    write_indexed(folder / "corpus", (letters[:2 + number % 18] for number in range(IN_MEMORY_DOCUMENTS * 10 // 9 + 9)))
    config, _ = parse([*FLAGS, "--data-path", str(folder / "corpus")])
    build_datasets(config.data, Vocab.from_file(), config.training.seed)
    files = {path: path.read_bytes() for path in sorted((folder / "row_index").glob("*.rows"))}
    assert files
    return folder / "corpus", files


def assert_made_again(files: dict[Path, bytes], lines: list[str]) -> None:
    assert [line for line in lines if "is damaged" in line] == [
        f"note: {path} is damaged, so its rows are packed again" for path in files]
    assert {path: path.read_bytes() for path in files} == files


def saved(folder: Path) -> list[int]:
    """The iterations of the checkpoints there, beside which there is nothing of one that is not whole."""
    assert not list(left_over(folder / "iter_"))
    return list(iterations(folder))


def errors_in(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("error: ")]


def about_saving(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(("note: could not save ", "note: the disk has refused"))]


def test_a_run_goes_on_after_a_full_disk_and_its_next_save_is_whole(run, corpus, tmp_path):
    lines = run(corpus, "--inject-fault", "full-disk@3", "slow@1")
    [line] = about_saving(lines)
    assert line.startswith(f"note: could not save {tmp_path}/iter_0000004: No space left on device; it takes 0.3 MB, ")
    assert f"MB are free in {tmp_path}. No checkpoint exists yet; make room, or give another --save. The run" in line
    assert line.endswith("The run goes on, and the next save tries again")
    assert saved(tmp_path) == [8]
    assert not any("slower than the others" in line for line in lines)  # there are none


@pytest.mark.parametrize("flags", [[], ["--async-save"]])
@pytest.mark.parametrize(("step", "expected"), [(4, [8]), (8, [4, 8])])
def test_a_refused_last_save_is_tried_again_and_no_other_is_repeated(run, corpus, tmp_path, flags, step, expected):
    lines = run(corpus, "--inject-fault", f"full-disk@{step}", *flags)
    assert len(about_saving(lines)) == 1 and saved(tmp_path) == expected
    assert [line for line in lines if line.startswith("  saved")] == [
        f"  saved checkpoint {tmp_path}/iter_{iteration:07d}" for iteration in expected]


@pytest.mark.parametrize("flags", [[], ["--async-save"]])
def test_a_run_whose_last_save_failed_ends_with_a_status_of_its_own(run, corpus, tmp_path, flags):
    lines = run(corpus, "--inject-fault", "full-disk@8", "full-disk@7", *flags, status=4)
    assert [line.rpartition(". ")[2] for line in about_saving(lines)] == [
        "It is tried once more", "No other save follows: the run ends with status 4"]
    [error] = errors_in(lines)
    assert error.startswith(f"error: could not save {tmp_path}/iter_0000008: No space left on device; ")
    assert "The last good checkpoint is untouched; make room, as by moving older iter_ folders away, or give" in error
    assert sum("No space left on device" in line for line in lines) == 2
    assert list(losses(tmp_path)) == [2, 4, 6, 8]
    assert saved(tmp_path) == [4]
    assert any(line.startswith("going on from iteration 4") for line in run(corpus))
    assert saved(tmp_path) == [4, 8]


def test_two_ranks_end_alike_after_a_full_disk_and_a_slow_one_is_named(run_two, corpus, tmp_path):
    steps = ["--train-iters", 24, "--save-interval", 12, "--log-interval", 12]
    lines = run_two(corpus, *steps, "--inject-fault", "slow@1", "full-disk@24", "full-disk@23", status=4)
    [line] = [line for line in lines if "slower than the others" in line]
    assert line.startswith(f"note: rank 1 on {HOST} is slower than the others: in the last 12 steps it computed for ")
    [_, record, *_] = read_records(tmp_path / "metrics.jsonl")
    assert record["slowest_rank"] == 1 and record["slowest_rank_factor"] > 1.2
    assert record["compute_ms"][1] > record["compute_ms"][0]
    assert 0 < record["exposed_communication"] < 1
    assert len(about_saving(lines)) == 2
    assert len(errors_in(lines)) == 1
    assert errors_in(lines)[0].startswith(f"error: could not save {tmp_path}/iter_0000024: No space left on device; ")
    assert saved(tmp_path) == [12]


def test_a_rank_that_dies_alone_is_gone_as_by_kill_9(corpus, tmp_path, python):
    program = start_program(python, *FLAGS, "--data-path", corpus, "--save", tmp_path, "--load", tmp_path,
                            "--inject-fault", "dead@6")
    output = program.communicate()[0]
    assert program.returncode == 128 + signal.SIGKILL, output
    assert saved(tmp_path) == [4]


def test_a_damaged_row_index_is_made_again_with_one_note(run, indexed_corpus):
    corpus, files = indexed_corpus
    assert_made_again(files, run(corpus, "--exit-interval", "2", "--inject-fault", "truncated-cache"))


def test_two_ranks_make_one_row_index_again_and_one_that_dies_is_named(run_two, indexed_corpus, tmp_path):
    corpus, files = indexed_corpus
    lines = run_two(corpus, "--inject-fault", "truncated-cache", "dead@6", status=128 + signal.SIGKILL)
    assert_made_again(files, lines)
    # The second is what the stand-in for Python ends with, of which the rank is a child.
    assert errors_in(lines) in ([f"error: rank 1 on {HOST}: {killed_by(signal.SIGKILL)}"],
                                [f"error: rank 1 on {HOST}: ended with exit status 137"])
    assert saved(tmp_path) == [4]
