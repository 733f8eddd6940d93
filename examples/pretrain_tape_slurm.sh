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
# on machines that SLURM gives, one task for each GPU. Its checkpoints go to runs/PRESET-slurm. From the checkout:
#
#     bash examples/setup.sh run                                                 once, where the Internet is in reach
#     PRESET=proteinlm-200m sbatch examples/pretrain_tape_slurm.sh [any flag of pretrain_tape.py]
#
# Options of sbatch stand before the script and win over those above: sbatch --nodes=4 --partition=gpu examples/…
# All machines must see the checkout and CHECKPOINT_PATH. Before tasks are started each machine is asked whether it can
# run them; those that cannot, or do not answer, are named. Five minutes before the time is up the tasks are asked to
# stop, and save, and the job is queued again, under its number, and goes on from there: until its end, as often as it
# takes. So is a job of which a task or a machine has failed, if it has saved since it began; one that ends with 2, 3 or 4
# (docs/runs.md) is not. To stop it for good: scancel --signal=TERM JOB, which saves. A bare scancel asks too, and kills
# after KillWait, 30 seconds as a rule.
#
#     MASTER_ADDR, MASTER_PORT   where the tasks meet (default: the first machine; a port by the job's number)
#
# srun starts each task once. To have tasks that die started again within the job, start a launcher on each machine by
#
#     srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
#         --cpus-per-task="$((${SLURM_CPUS_PER_TASK:-1} * ${SLURM_NTASKS_PER_NODE:-1}))" \
#         bash -c 'NNODES=$SLURM_NNODES NODE_RANK=$SLURM_NODEID MAX_RESTARTS=3 \
#             MASTER_ADDR=$(scontrol show hostnames | head -n 1) bash examples/pretrain_tape_distributed.sh'
#
# (without --ntasks it would start as many as the job has tasks, whatever stands behind it, and the cores of one task
# would be all that a launcher and its ranks have).
set -euo pipefail

# SLURM runs a copy of this script, from a folder of its own.
examples=${SLURM_SUBMIT_DIR:+$SLURM_SUBMIT_DIR/examples}
run_suffix=-slurm
numbers=(MASTER_PORT:1:65535 SLURM_NTASKS_PER_NODE:1:9999)
source "${examples:-$(dirname "${BASH_SOURCE[0]}")}/pretraining.sh"
share_cores "${SLURM_NTASKS_PER_NODE:-1}"

# What sbatch was told of cores does not reach srun by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# Names the machines that cannot load the program, or use their GPUs, within five minutes.
check_machines() {
    local name expected answers missing=()
    expected=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # shellcheck disable=SC2016  # it is for the bash of each machine
    answers=$(timeout 300 srun --ntasks="$(wc -w <<<"$expected")" --ntasks-per-node=1 bash -c \
        '"$1" -c "import torch, sys; sys.path.insert(0, sys.argv[1]); import megatron.errors
sys.exit(torch.cuda.device_count() > 0 and not torch.cuda.is_available())" "$2" &&
            echo "ready: ${SLURMD_NODENAME:-$HOSTNAME}"' check "$python" "$root" || true)
    for name in $expected; do
        if ! [[ $'\n'$answers$'\n' == *$'\n'"ready: $name"$'\n'* ]]; then missing+=("$name"); fi
    done
    if [ ${#missing[@]} -gt 0 ]; then
        echo "error: ${missing[*]}: cannot load the program or use their GPUs, or did not answer in time; look at what" \
            "it says above, and leave out a broken machine by sbatch --exclude=$(IFS=,; echo "${missing[*]}")" >&2
        exit 1
    fi
}

if [ -n "${SLURM_JOB_NODELIST-}" ]; then check_machines; fi

# A path whose content changes as the run saves.
pointer=$checkpoint_path/latest_checkpointed_iteration.txt
saved() { if [ -e "$pointer" ]; then cat "$pointer"; fi; }
before=$(saved) status=0
# Where a task says that it ends with 2, 3 or 4: of the others, which srun then kills, it tells a higher status.
export EXIT_STATUS_FILE=$checkpoint_path/.ended-${SLURM_JOB_ID-}
rm -f "$EXIT_STATUS_FILE"
# On SIGTERM srun ends its tasks by force; SIGUSR1 it passes on.
run_until_asked USR1 srun --kill-on-bad-exit=1 "$python" "$root/pretrain_tape.py" "${flags[@]}" "$@" || status=$?
if [ -s "$EXIT_STATUS_FILE" ]; then status=$(cat "$EXIT_STATUS_FILE"); fi
rm -f "$EXIT_STATUS_FILE"
why=''
if [ "$asked" = USR1 ] && [ "$status" -eq 0 ]; then why="the time is up"; fi
if [ -z "$asked" ] && { [ "$status" -eq 1 ] || [ "$status" -gt 128 ]; }; then why="a task has failed"; fi
if [ -n "$why" ] && [ "$(saved)" != "$before" ]; then
    echo "$why: job $SLURM_JOB_ID is queued again, and goes on from its last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
