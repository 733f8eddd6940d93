"""The example scripts beside the two that the README shows, with tiny models; SLURM and MPI are played by stand-ins."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.golden.training import ROOT, TINY, losses

FLAGS = [*TINY, "--num-attention-heads", "4", "--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters",
         "2", "--lr-decay-iters", "2"]
# Takes flags until the command, as the real ones do, and starts it twice with the variables that they set.
STAND_IN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do case $1 in -np | --bind-to | --host) shift ;; esac; shift; done
for rank in 0 1; do {} "$@" & done
wait -n && wait -n
"""
SRUN = "SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost"
TWO_RANKS = ["--tensor-model-parallel-size", 2]  # one rank alone would be refused
OPEN_MPI = ("OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_LOCAL_RANK=$rank OMPI_COMM_WORLD_SIZE=2 "
            "OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_MCA_ess_base_jobid=$PPID")


def run(script, corpus, folder, *flags, **environment):
    """Runs the script; the losses of its iterations."""
    result = subprocess.run(
        ["bash", str(script), *FLAGS, *map(str, flags)], cwd=ROOT, text=True, timeout=120, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHON": sys.executable, "DATA_PATH": corpus, "CHECKPOINT_PATH": str(folder)} | environment)
    assert result.returncode == 0, result.stdout
    return losses(folder)


@pytest.fixture
def path_with(tmp_path):
    """A function that puts a stand-in for a program first on PATH; gives PATH."""
    def put(name, variables):
        program = tmp_path / "bin" / name
        program.parent.mkdir()
        program.write_text(STAND_IN.format(variables))
        program.chmod(0o755)
        return f"{program.parent}:{os.environ['PATH']}"

    return put


def test_mpirun_starts_the_ranks(corpus, tmp_path, path_with):
    path = path_with("mpirun", OPEN_MPI)
    curve = run(ROOT / "examples" / "pretrain_tape_mpirun.sh", corpus, tmp_path / "run", *TWO_RANKS, PATH=path,
                PROCESSES="2", MPIRUN_FLAGS="--host localhost:2")
    assert list(curve) == [1, 2]


def test_srun_starts_the_ranks_from_the_copy_that_slurm_makes_of_the_script(corpus, tmp_path, path_with):
    path = path_with("srun", SRUN)
    script = shutil.copy(ROOT / "examples" / "pretrain_tape_slurm.sh", tmp_path / "slurm_script")
    batch = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NTASKS_PER_NODE": "2",
             "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
    curve = run(script, corpus, tmp_path / "run", *TWO_RANKS, PATH=path, **batch)
    assert list(curve) == [1, 2]


@pytest.mark.parametrize(("script", "num_ranks"), [("pretrain_proteinlm_200m.sh", 2), ("pretrain_proteinlm_3b.sh", 4)])
def test_the_published_models_train_in_their_layouts(corpus, tmp_path, script, num_ranks):
    curve = run(ROOT / "examples" / script, corpus, tmp_path, GPUS_PER_NODE=str(num_ranks))
    assert list(curve) == [1, 2]
