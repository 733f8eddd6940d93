"""Ranks that were started with srun's variables and different commands, as by hand on a second host."""

import os
import re
import socket
import subprocess

import pytest

from megatron.checkpoint.convert import sharded
from megatron.checkpoint.convert.families import hf
from pretrain_tape import main
from tests.golden.training import ROOT, TINY, free_port, write_corpus

HOST = socket.gethostname()


@pytest.fixture
def run_each(corpus, python):
    """A function that runs one rank for each list of flags; gives their exit statuses and the lines that say an error.
    """
    def ranks(*of_ranks, program="pretrain_tape.py", flags=(*TINY, "--train-iters", "2")):
        environment = os.environ | {"SLURM_STEP_NUM_TASKS": str(len(of_ranks)), "SLURM_STEP_NODELIST": "localhost",
                                    "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        processes = [subprocess.Popen(
            [python, str(ROOT / program), *map(str, [*flags, *own])], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=environment | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
            for rank, own in enumerate(of_ranks)]
        outputs = [process.communicate()[0] for process in processes]
        return [process.returncode for process in processes], re.findall("^error: .*", "".join(outputs), re.MULTILINE)

    return ranks


def test_ranks_with_different_flags_do_not_train(run_each, corpus):
    statuses, errors = run_each(["--data-path", corpus], ["--data-path", corpus, "--lr", "1e-3"])
    assert statuses == [2, 2] and len(errors) == 1
    assert f"--lr differs between ranks: rank 0 on {HOST} has 0.002, rank 1 on {HOST} has 0.001; start" in errors[0]


def test_a_mistake_in_the_flags_of_one_rank_is_told_by_it_and_one_of_all_ranks_once(run_each, corpus):
    flags = ["--data-path", corpus, "--distributed-timeout-minutes", "0.1"]
    statuses, errors = run_each(flags, [*flags, "--lr", "high"])
    assert statuses == [1, 2] and len(errors) == 2  # the other is rank 0's, which lost its peer
    assert any("--lr" in error and error.endswith(f"(rank 1 on {HOST})") for error in errors)
    statuses, errors = run_each(*[[*flags, "--lr", "high"]] * 2)
    assert statuses == [2, 2] and len(errors) == 1


def test_ranks_with_other_data_behind_the_path_do_not_train_and_with_a_copy_of_it_they_do(run_each, corpus, tmp_path):
    for name, number in (("copy", 300), ("other", 299)):
        (tmp_path / name).mkdir()
        write_corpus(tmp_path / name, number)
    copy, other = tmp_path / "copy" / "corpus", tmp_path / "other" / "corpus"
    statuses, errors = run_each(["--data-path", corpus], ["--data-path", other])
    assert statuses == [2, 2] and len(errors) == 1
    assert (f"the content of --data-path differs between ranks: rank 0 on {HOST} has {corpus}, rank 1 on {HOST} has "
            f"{other}; copy") in errors[0]
    assert run_each(["--data-path", corpus], ["--data-path", copy]) == ([0, 0], [])


def test_ranks_with_different_labels_are_not_fine_tuned(run_each, corpus, tmp_path):
    assert main([*TINY, "--train-iters", "1", "--data-path", corpus, "--save", str(tmp_path / "run")]) == 0
    for name, last in (("one", 0.5), ("other", 0.6)):
        (tmp_path / f"{name}.csv").write_text(f"sequence,label\nMKTAYIAK,0.1\nMKTAYIAR,0.3\nMKTAYIAH,{last}\n")
    statuses, errors = run_each(*(["--train-data", tmp_path / f"{name}.csv"] for name in ("one", "other")), flags=(
        "own", "--load", tmp_path / "run", "--save", tmp_path / "tuned"), program="tools/finetune.py")
    assert statuses == [2, 2] and len(errors) == 1
    assert f"the content of the task's files differs between ranks: rank 0 on {HOST} has {tmp_path}/one" in errors[0]


def test_ranks_with_different_checkpoints_are_not_fine_tuned(run_each, corpus, tmp_path):
    for name in ("one", "other"):
        assert main([*TINY, "--train-iters", "1", "--data-path", corpus, "--save", str(tmp_path / name)]) == 0
    (tmp_path / "labels.csv").write_text("sequence,label\nMKTAYIAK,0.1\nMKTAYIAR,0.3\nMKTAYIAH,0.5\n")
    statuses, errors = run_each(*(["--load", tmp_path / name] for name in ("one", "other")), flags=(
        "own", "--train-data", tmp_path / "labels.csv", "--save", tmp_path / "tuned"), program="tools/finetune.py")
    assert statuses == [2, 2] and len(errors) == 1
    assert f"the content of --load differs between ranks: rank 0 on {HOST} has {tmp_path}/one" in errors[0]


def test_ranks_with_different_weights_of_another_program_do_not_train(run_each, corpus, tmp_path):
    for seed in ("1", "2"):
        run = tmp_path / f"run-{seed}"
        assert main([*TINY, "--train-iters", "1", "--data-path", corpus, "--save", str(run), "--seed", seed]) == 0
        hf.write(sharded.read(run), tmp_path / f"hf-{seed}")
    statuses, errors = run_each(*(["--load", tmp_path / f"hf-{seed}"] for seed in ("1", "2")), flags=(
        *TINY, "--train-iters", "2", "--data-path", corpus, "--finetune"))
    assert statuses == [2, 2] and len(errors) == 1
    assert f"the content of --load differs between ranks: rank 0 on {HOST} has {tmp_path}/hf-1, rank 1" in errors[0]


def test_ranks_that_ask_for_different_grids_are_neither_fine_tuned_nor_asked(run_each, corpus, tmp_path):
    assert main([*TINY, "--train-iters", "1", "--data-path", corpus, "--save", str(tmp_path / "run")]) == 0
    (tmp_path / "labels.csv").write_text("sequence,label\nMKTAYIAK,0.1\nMKTAYIAR,0.3\nMKTAYIAH,0.5\n")
    tuned = ["own", "--load", tmp_path / "run", "--train-data", tmp_path / "labels.csv", "--save", tmp_path / "tuned"]
    asked = [tmp_path / "run", tmp_path / "labels.csv", tmp_path / "vectors.npz"]
    for program, flags in (("tools/finetune.py", tuned), ("tools/embed.py", asked)):
        statuses, errors = run_each([], ["--tensor-model-parallel-size", "2"], program=program, flags=[
            *flags, "--distributed-timeout-minutes", "0.2"])
        assert statuses == [2, 2] and len(errors) == 1
        assert f"--tensor-model-parallel-size differs between ranks: rank 0 on {HOST} has 1, rank 1" in errors[0]
