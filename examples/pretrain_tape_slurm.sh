#!/usr/bin/env bash
#SBATCH --job-name=proteinlm
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Pretrains as examples/pretrain_tape.sh does (PRESET, DATA_PATH, CHECKPOINT_PATH and VOCAB_FILE are explained there),
# as a SLURM job with one task for each GPU. It saves checkpoints in runs/PRESET-slurm. From the checkout:
#
#     bash examples/setup.sh run                                                 once, with Internet access
#     PRESET=proteinlm-200m sbatch examples/pretrain_tape_slurm.sh [any flag of pretrain_tape.py]
#
# Put options of sbatch before the script; they override those above: sbatch --nodes=4 --partition=gpu examples/…
# All machines must see the checkout and CHECKPOINT_PATH. Before it starts the tasks, the script checks each machine. It
# names the machines that cannot run the program or do not answer.
#
# Five minutes before the time limit, the tasks save and stop, and the job is queued again under its number and resumes,
# as often as it takes. (With a --time below five minutes, SLURM asks at once: give --signal=B:USR1@60 too.) A job in
# which a task or a machine has failed is queued again too. A job that has saved nothing since it started is not queued
# again: it says so, and exits with a status other than 0. Nor is one that exits with status 2, 3 or 4 (docs/runs.md).
# To stop a job for good, with a save: scancel --signal=TERM JOB. A plain scancel asks it to stop as well, but kills it
# after KillWait, usually 30 seconds.
#
#     MASTER_ADDR, MASTER_PORT   where the tasks meet (default: the first machine; a port derived from the job's number)
#
# srun starts each task once. To restart dead tasks within the job, start a launcher on each machine with
#
#     srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
#         --cpus-per-task="$((${SLURM_CPUS_PER_TASK:-1} * ${SLURM_NTASKS_PER_NODE:-1}))" \
#         bash -c 'NNODES=$SLURM_NNODES NODE_RANK=$SLURM_NODEID MAX_RESTARTS=3 \
#             MASTER_ADDR=$(scontrol show hostnames | head -n 1) bash examples/pretrain_tape_distributed.sh'
#
# (Without --ntasks, srun would start as many launchers as the job has tasks. Without --cpus-per-task, a launcher and
# its ranks would have the cores of one task.)
set -euo pipefail

# SLURM runs a copy of this script, in another folder.
examples=${SLURM_SUBMIT_DIR:+$SLURM_SUBMIT_DIR/examples}
run_suffix=-slurm

# not_queued WHY REMEDY: says that this job is not queued again.
not_queued() {
    echo "error: $1: job ${SLURM_JOB_ID-} is not queued again, as it has saved nothing since it started; $2" >&2
}

# time_was_short: says that this job was asked to stop before it had saved anything, and is not queued again.
time_was_short() {
    not_queued "the time is up, $SECONDS s after the start" \
        "allow more --time, or give a later --signal=B:USR1@60, then submit it again"
}

# shellcheck disable=SC2034  # starting.sh reads it
asked_early="time_was_short; exit 1"
numbers=(MASTER_PORT:1:65535 SLURM_NTASKS_PER_NODE:1:9999)
source "${examples:-$(dirname "${BASH_SOURCE[0]}")}/pretraining.sh"
share_cores "${SLURM_NTASKS_PER_NODE:-1}"

# srun does not take over the number of cores that sbatch was given.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# check_machines: refuses, by name, the machines that cannot load the program or use their GPUs within five minutes.
check_machines() {
    local name expected answers missing=()
    expected=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # shellcheck disable=SC2016  # the bash of each machine expands it
    answers=$(timeout 300 srun --ntasks="$(wc -w <<<"$expected")" --ntasks-per-node=1 bash -c \
        '"$1" -c "import torch, sys; sys.path.insert(0, sys.argv[1]); import megatron.errors
sys.exit(torch.cuda.device_count() > 0 and not torch.cuda.is_available())" "$2" &&
            echo "ready: ${SLURMD_NODENAME:-$HOSTNAME}"' check "$python" "$root" || true)
    for name in $expected; do
        if ! [[ $'\n'$answers$'\n' == *$'\n'"ready: $name"$'\n'* ]]; then missing+=("$name"); fi
    done
    if [ ${#missing[@]} -gt 0 ]; then
        echo "error: ${missing[*]}: cannot load the program or use their GPUs, or did not answer in time; see the" \
            "messages above, and leave out a broken machine with sbatch --exclude=$(IFS=,; echo "${missing[*]}")" >&2
        exit 1
    fi
}

if [ -n "${SLURM_JOB_NODELIST-}" ]; then check_machines; fi

# The content of this file changes with each save.
pointer=$checkpoint_path/latest_checkpointed_iteration.txt
saved() { if [ -e "$pointer" ]; then cat "$pointer"; fi; }
before=$(saved) status=0
start_ranks srun --kill-on-bad-exit=1 "$python" "$root/pretrain_tape.py" "${flags[@]}" "$@" || status=$?
why=''
if [ -z "$asked" ] || [ "$asked" = USR1 ]; then
    if [ "$status" -eq 1 ] || [ "$status" -gt 128 ]; then
        why="a task has failed"
    elif [ -n "$asked" ] && [ "$status" -eq 0 ]; then
        why="the time is up"
    fi
fi
if [ -n "$why" ] && [ "$(saved)" != "$before" ]; then
    echo "$why: job $SLURM_JOB_ID is queued again, and resumes from its last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
elif [ -n "$why" ] && [ "$status" -eq 0 ]; then
    time_was_short
    status=1  # else jobs that depend on this one would start
elif [ -n "$why" ]; then
    not_queued "$why" "see the messages above, then submit it again"
fi
exit "$status"
