"""The example scripts besides the two in the README, with tiny models; stand-ins play SLURM and MPI."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from megatron.data.corpus.joined import open_corpus
from megatron.data.rows.data_path import parse_data_path
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


def start(script, corpus, folder, *flags, **environment):
    """Starts the script; output and errors in one pipe."""
    return subprocess.Popen(
        ["bash", str(script), *FLAGS, *map(str, flags)], cwd=ROOT, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHON": sys.executable, "DATA_PATH": corpus, "CHECKPOINT_PATH": str(folder)} | environment)


def wait_for_first_step(process, folder):
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):  # it is there before the first step, empty
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def run(script, corpus, folder, *flags, **environment):
    """Runs the script, whose output is no terminal; the losses of its two iterations, of which one rank tells."""
    process = start(script, corpus, folder, *flags, **environment)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    told = re.findall(r"^ iteration +(\d+)/ +(\d+) \|(?:.*\| time left: ([^|]+) \|)?", output, re.MULTILINE)
    assert [(step, of) for step, of, _ in told] == [("1", "2"), ("2", "2")] and told[0][2] and "\r" not in output
    return losses(folder)


@pytest.fixture
def path_with(tmp_path):
    """A function that puts stand-ins for programs first on PATH; gives PATH."""
    def put(**programs):
        (tmp_path / "bin").mkdir()
        for name, text in programs.items():
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        return f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    return put


def test_mpiexec_starts_the_ranks(corpus, tmp_path, path_with, python):
    path = path_with(mpiexec=STAND_IN.format(OPEN_MPI))
    curve = run(ROOT / "examples" / "pretrain_tape_mpirun.sh", corpus, tmp_path / "run", *TWO_RANKS, PATH=path,
                PYTHON=python, PROCESSES="2", MPIRUN_FLAGS="--host localhost:2")
    assert list(curve) == [1, 2]


@pytest.fixture
def mpiexec_given(corpus, tmp_path, path_with, python):
    """A function that runs the script; gives the words and the environment that mpiexec got, one a line."""
    path = path_with(mpiexec="""#!/usr/bin/env bash\nprintf '%s\\n' "$@"; env\n""")

    def given(**environment):
        process = start(ROOT / "examples" / "pretrain_tape_mpirun.sh", corpus, tmp_path / "run", PATH=path,
                        PYTHON=python, **environment)
        output = process.communicate()[0]
        assert process.returncode == 0, output
        return output.splitlines()

    return given


def test_ranks_that_mpiexec_starts_meet_at_a_port_of_their_own_or_at_the_users(mpiexec_given):
    ports = [next(line for line in mpiexec_given() if line.startswith("MASTER_PORT=")) for _ in range(2)]
    assert len(set(ports)) == 2 and all(10_000 <= int(port.split("=")[1]) < 30_000 for port in ports)
    assert "MASTER_PORT=6001" in mpiexec_given(MASTER_PORT="6001")


def test_no_mpi_binds_a_rank_to_one_core_unless_the_user_asks(mpiexec_given):
    lines = mpiexec_given()
    assert lines[lines.index("--bind-to") + 1] == "none" and "I_MPI_PIN=0" in lines
    assert "I_MPI_PIN=1" in mpiexec_given(I_MPI_PIN="1")


def test_srun_starts_the_ranks_from_the_copy_that_slurm_makes_of_the_script(corpus, tmp_path, path_with, python):
    path = path_with(srun=STAND_IN.format(SRUN))
    script = shutil.copy(ROOT / "examples" / "pretrain_tape_slurm.sh", tmp_path / "slurm_script")
    batch = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NTASKS_PER_NODE": "2",
             "PYTHON": python, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
    curve = run(script, corpus, tmp_path / "run", *TWO_RANKS, PATH=path, **batch)
    assert list(curve) == [1, 2]


def test_of_several_machines_each_is_told_the_address_of_the_first(corpus, tmp_path, python):
    process = start(ROOT / "examples" / "pretrain_tape_distributed.sh", corpus, tmp_path / "run", PYTHON=python,
                    NNODES="2", MASTER_ADDR="")
    assert process.communicate()[0] == "error: NNODES is 2; set MASTER_ADDR too\n"
    assert process.returncode == 2


# As srun and mpiexec do, it passes SIGUSR1 on, waits for both tasks, and ends with the highest of their statuses.
PATIENT = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do case $1 in -np | --bind-to | --host) shift ;; esac; shift; done
for rank in 0 1; do {} "$@" & done
trap 'kill -s USR1 $(jobs -p) 2>/dev/null' USR1
highest=0
for task in $(jobs -p); do
    wait "$task"; status=$?
    while kill -0 "$task" 2>/dev/null; do wait "$task"; status=$?; done
    if [ "$status" -gt "$highest" ]; then highest=$status; fi
done
exit "$highest"
"""
# A shell script that starts mpiexec, as Intel MPI's mpirun: SIGUSR1 ends this script alone.
INTEL_MPIRUN = """#!/bin/sh
mpiexec "$@"
exit $?
"""
# As srun does with --kill-on-bad-exit, whose status a killed task decides.
KILLING_SRUN = f"""#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
for rank in 0 1; do {SRUN} "$@" & done
wait -n && wait -n && exit 0
kill -s KILL $(jobs -p) 2>/dev/null
exit 137
"""
# SLURM's two machines, of which one is this, and a list of the jobs that it was asked to queue again.
SCONTROL = """#!/usr/bin/env bash
case $1 in show) echo "$HOSTNAME"; echo "${OTHER_MACHINE:-$HOSTNAME}" ;; requeue) echo "$2" >>"$REQUEUED" ;; esac
"""


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.table)])
def test_a_request_to_stop_reaches_the_ranks_that_mpiexec_starts(corpus, tmp_path, path_with, python, number):
    process = start(ROOT / "examples" / "pretrain_tape_mpirun.sh", corpus, tmp_path / "run", "--train-iters", 200,
                    *TWO_RANKS, PATH=path_with(mpiexec=PATIENT.format(OPEN_MPI), mpirun=INTEL_MPIRUN), PYTHON=python,
                    PROCESSES="2")
    wait_for_first_step(process, tmp_path / "run")
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "stopped at iteration" in output


@pytest.mark.parametrize(("of_rank", "of_mpiexec", "expected"), [
    ("", 9, 128 + signal.SIGKILL), ("4", 1 | 4, 4), ("2", 1 | 2, 2), ("", 1, 1)])
def test_a_failure_has_the_same_exit_status_under_every_mpi(corpus, tmp_path, path_with, python, of_rank, of_mpiexec,
                                                            expected):
    mpich = f"""#!/usr/bin/env bash
        for word; do case $word in EXIT_STATUS_FILE=*) file=${{word#*=}} ;; esac; done
        mkdir -p "${{file%/*}}"; printf '{of_rank}' >"$file"; exit {of_mpiexec}"""
    process = start(ROOT / "examples" / "pretrain_tape_mpirun.sh", corpus, tmp_path / "run",
                    PATH=path_with(mpiexec=mpich), PYTHON=python)
    output = process.communicate()[0]
    assert process.returncode == expected, output
    assert not list((tmp_path / "run").iterdir())


@pytest.fixture
def start_job(corpus, tmp_path, path_with, python):
    """A function that starts the script as SLURM would."""
    path, script = path_with(srun=PATIENT.format(SRUN), scontrol=SCONTROL), ROOT / "examples" / "pretrain_tape_slurm.sh"

    def one(*flags, **environment):
        return start(script, corpus, tmp_path / "run", *TWO_RANKS, *flags, PATH=path, SLURM_JOB_ID="17",
                     REQUEUED=str(tmp_path / "requeued"), SLURM_NTASKS_PER_NODE="2",
                     PYTHON=python, **environment)

    return one


def queued_again(tmp_path):
    return (tmp_path / "requeued").read_text().split() if (tmp_path / "requeued").exists() else []


@pytest.mark.parametrize(("number", "expected"), [
    (signal.SIGUSR1, ["17"]), pytest.param(signal.SIGTERM, [], marks=pytest.mark.table)])
def test_a_job_whose_time_is_up_saves_and_is_queued_again_and_one_that_is_stopped_is_not(start_job, tmp_path, number,
                                                                                         expected):
    process = start_job("--train-iters", 100000)
    wait_for_first_step(process, tmp_path / "run")
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "stopped at iteration" in output
    assert queued_again(tmp_path) == expected
    assert ("the time is up: job 17 is queued again" in output) == bool(expected)


# Takes 2 seconds, unless it is asked to stop; notes that it has started, and saves first where SAVED is a file.
ASKED_SRUN = """#!/usr/bin/env bash
trap 'exit "${STATUS:-0}"' USR1
if [ -n "${SAVED-}" ]; then mkdir -p "${SAVED%/*}"; echo 3 >"$SAVED"; fi
touch "$REQUEUED.asked"
for i in {1..40}; do sleep 0.05; done
"""


def asked_when_started(process, tmp_path):
    """What a job prints whose time is up as soon as its srun has started."""
    while not (tmp_path / "requeued.asked").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    return process.communicate()[0]


@pytest.mark.parametrize("environment", [
    {}, {"SLURM_JOB_NODELIST": "both"}], ids=["before the first step", "while the machines are checked"])
def test_a_job_whose_time_is_up_before_it_has_saved_fails_and_says_that_it_is_not_queued_again(start_job, tmp_path,
                                                                                             environment):
    (tmp_path / "bin" / "srun").write_text(ASKED_SRUN)
    process = start_job(**environment)
    output = asked_when_started(process, tmp_path)
    assert process.returncode == 1, output
    assert re.search(r"error: the time is up, \d+ s after the start: job 17 is not queued again, as it has saved "
                     r"nothing since it started; allow more --time, or give a later --signal=B:USR1@60, then submit it "
                     r"again\n$", output)
    assert queued_again(tmp_path) == []


def test_a_job_whose_task_fails_while_it_stops_is_queued_again_if_it_has_saved(start_job, tmp_path):
    (tmp_path / "bin" / "srun").write_text(ASKED_SRUN)
    process = start_job(STATUS="1", SAVED=str(tmp_path / "run" / "latest_checkpointed_iteration.txt"))
    output = asked_when_started(process, tmp_path)
    assert process.returncode == 1 and "a task has failed: job 17 is queued again" in output, output
    assert queued_again(tmp_path) == ["17"]


@pytest.mark.parametrize(("fault", "expected"), [
    ("dead@5", ["17"]), pytest.param("dead@2", [], marks=pytest.mark.table)])
def test_a_job_that_fails_is_queued_again_only_where_it_has_come_further(start_job, tmp_path, fault, expected):
    process = start_job("--train-iters", 9, "--save-interval", 4, "--inject-fault", fault)
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGKILL, output
    assert queued_again(tmp_path) == expected
    assert ("error: a task has failed: job 17 is not queued again" in output) != bool(expected)


@pytest.mark.table
def test_a_job_whose_task_ends_by_a_mistake_is_not_queued_again_though_srun_kills_the_others(start_job, tmp_path):
    (tmp_path / "bin" / "srun").write_text(KILLING_SRUN)
    process = start_job("--train-iters", 8, "--save-interval", 4, "--inject-fault", "full-disk@8", "full-disk@7")
    output = process.communicate()[0]
    assert process.returncode == 4, output
    assert (tmp_path / "run" / "iter_0000004").is_dir() and queued_again(tmp_path) == []
    assert not list((tmp_path / "run").glob(".ended-*"))


@pytest.mark.table
def test_a_machine_that_cannot_run_the_program_is_named_before_the_tasks_are_started(start_job, tmp_path):
    process = start_job(SLURM_JOB_NODELIST="both", OTHER_MACHINE="node08")
    output = process.communicate()[0]
    assert process.returncode == 1
    assert "error: node08: cannot load the program or use their GPUs, or did not answer in time" in output
    assert "--exclude=node08" in output
    assert not (tmp_path / "run").exists()


@pytest.fixture
def slim_path(tmp_path):
    """A PATH with the programs of bash and coreutils that the scripts use, and nothing else."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    return str(tmp_path / "bin")


def test_a_request_to_stop_reaches_the_ranks_which_save_and_end_with_success(corpus, tmp_path, slim_path, python):
    # A published model's script, in its layout but for the number of ranks that share a layer.
    process = start(ROOT / "examples" / "pretrain_proteinlm_3b.sh", corpus, tmp_path / "run", "--train-iters", 100000,
                    *TWO_RANKS, PATH=slim_path, PYTHON=python, GPUS_PER_NODE="2")
    wait_for_first_step(process, tmp_path / "run")
    process.send_signal(signal.SIGUSR1)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "stopped at iteration" in output
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").exists()


def test_a_request_to_stop_while_a_script_asks_python_something_prints_nothing(tmp_path, python):
    asked = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(0.5); print(1)"
    process = subprocess.Popen(
        ["bash", "-c", f"source {ROOT}/examples/starting.sh; answer=$(tell '{asked}' {tmp_path}/asked)"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"PYTHON": python})
    while not (tmp_path / "asked").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate()[0] == ""
    assert process.returncode == 0


# Runs a job at once, each task of an array as SLURM would, from a copy of the script; notes what it was asked.
SBATCH = """#!/usr/bin/env bash
echo "$*" >>"$SBATCH_LOG"
tasks='' id=7
while [[ $1 == -* ]]; do case $1 in --array=*) tasks=${1#*=} ;; esac; shift; done
cp "$1" "$SBATCH_LOG.script"
shift
export SLURM_JOB_ID=$id SLURM_SUBMIT_DIR=$PWD
if [ -z "$tasks" ]; then bash "$SBATCH_LOG.script" "$@" >&2; fi
tasks=${tasks%\\%*}
for task in $(seq ${tasks/-/ }); do SLURM_ARRAY_TASK_ID=$task bash "$SBATCH_LOG.script" "$@" >&2; done
echo $id
"""


def test_one_command_preprocesses_a_list_of_files_as_an_array_and_leaves_the_list_that_training_takes(tmp_path):
    parts = []
    for number in (1, 2):
        parts.append(tmp_path / f"part {number}.txt")
        parts[-1].write_text("MKTAYIAKQR\n" * number)
    (tmp_path / "files.txt").write_text("\n".join(map(str, parts)))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable,
                                "SBATCH_LOG": str(tmp_path / "log"),
                                "SLURM_JOB_ID": "3", "SLURM_SUBMIT_DIR": str(tmp_path)}  # asked from within another job
    command = ["bash", "examples/preprocess_slurm.sh", str(tmp_path / "files.txt"), str(tmp_path / "out" / "all")]

    def ran(*flags):
        return subprocess.run([*command, *flags], cwd=ROOT, text=True, capture_output=True, env=environment)

    done = ran("--append-eod")
    assert done.returncode == 0, done.stderr
    array, listing = (tmp_path / "log").read_text().splitlines()
    assert "--array=1-2%64" in array and "--dependency=afterok:7" in listing
    names, weights = parse_data_path((f"@{tmp_path / 'out' / 'all_text_document.txt'}",))[::-1]
    assert len(weights) == 1 and names[0].prefixes == tuple(
        str(tmp_path / "out" / f"all-{number}_text_document") for number in (1, 2))
    for number, prefix in enumerate(names[0].prefixes, start=1):
        assert open_corpus(prefix, (prefix,)).num_documents == number
    parts[1].unlink()
    refused = ran()
    assert refused.returncode == 2 and f"error: {parts[1]}, which" in refused.stderr


@pytest.mark.parametrize(("arguments", "flags"), [
    ([], ["--save", "ROOT/runs/demo", "--load", "ROOT/runs/demo"]),
    (["--save", "mine"], ["--save", "mine", "--load", "mine"]),
    (["--save=mine", "--load=theirs"], ["--save", "mine"]),
    (["--load", "theirs"], ["--save", "ROOT/runs/demo"]),
    (["--config", "a b.toml"], ["--save", "ROOT/runs/a b", "--load", "ROOT/runs/a b"])])
def test_a_folder_that_the_arguments_name_takes_the_place_of_the_scripts_own(tmp_path, python, arguments, flags):
    (tmp_path / "a b.toml").write_text("train_iters = 3\n")
    script = (f"set -euo pipefail; source {ROOT}/examples/pretraining.sh; echo; printf '%s\n' \"${{flags[@]}}\" "
              '"at $checkpoint_path"')
    done = subprocess.run(["bash", "-c", script, "bash", *arguments], cwd=tmp_path, text=True, capture_output=True,
                          env=os.environ | {"PYTHON": python, "PRESET": "", "CHECKPOINT_PATH": "", "DATA_PATH": "x"})
    assert done.returncode == 0, done.stderr
    expected = [word.replace("ROOT", str(ROOT)) for word in flags]
    said = done.stdout.splitlines()
    assert said[said.index("--save"):-1] == expected and said[-1] == f"at {expected[1]}"


def test_where_the_checkout_cannot_be_written_the_script_says_what_to_give(tmp_path, python):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "runs").touch()  # no folder can be made of it, whoever asks
    done = subprocess.run(["bash", str(tmp_path / "examples" / "pretrain_tape.sh")], text=True, capture_output=True,
                          env=os.environ | {"PYTHON": python, "CXX": "no-compiler"})
    assert done.returncode == 2
    assert f"error: {tmp_path}/runs cannot be made" in done.stderr and "DATA_PATH=" in done.stderr


def test_without_home_git_and_compiler_a_checkout_on_a_read_only_disk_serves(corpus, tmp_path, slim_path):
    read_only = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && '
    if shutil.which("unshare") is None or subprocess.run(
            ["unshare", "--mount", "bash", "-c", f"{read_only} true", ROOT], capture_output=True).returncode:
        pytest.skip("making a read-only disk needs root and the command unshare (util-linux)")
    folder = tmp_path / "run"
    environment = [f"PATH={slim_path}", f"PYTHON={sys.executable}", f"DATA_PATH={corpus}", f"CHECKPOINT_PATH={folder}",
                   "OMP_NUM_THREADS=1"]
    script = f'{read_only} ! touch "$0/x" 2>/dev/null && cd "$0" && exec env -i "$@"'
    done = subprocess.run(["unshare", "--mount", "bash", "-c", script, ROOT, *environment, "bash",
                           "examples/pretrain_tape.sh", *FLAGS], text=True, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(losses(folder)) == {1, 2} and (folder / "report.html").exists()
