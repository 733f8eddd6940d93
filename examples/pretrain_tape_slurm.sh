#!/usr/bin/env bash
#SBATCH --job-name=proteinlm
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
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
# All machines must see the checkout and CHECKPOINT_PATH. Three minutes before the time is up the tasks are asked to
# stop, and save; a job whose machine fails is queued again. The same command later goes on from the last checkpoint.
# To stop it earlier: scancel --signal=TERM JOB. A bare scancel asks too, and kills after KillWait, 30 seconds as a rule.
#
#     MASTER_ADDR, MASTER_PORT   where the tasks meet (default: the first machine; a port by the job's number)
#
# srun starts each task once. To have tasks that die started again within the job, start torchrun on each machine by
#
#     srun --ntasks-per-node=1 bash -c 'NNODES=$SLURM_NNODES NODE_RANK=$SLURM_NODEID MAX_RESTARTS=3 \
#         MASTER_ADDR=$(scontrol show hostnames | head -n 1) bash examples/pretrain_tape_distributed.sh'
set -euo pipefail

# SLURM runs a copy of this script, from a folder of its own.
examples=${SLURM_SUBMIT_DIR:+$SLURM_SUBMIT_DIR/examples}
run_suffix=-slurm
numbers=(MASTER_PORT:1:65535 SLURM_NTASKS_PER_NODE:1:9999)
source "${examples:-$(dirname "${BASH_SOURCE[0]}")}/pretraining.sh"
share_cores "${SLURM_NTASKS_PER_NODE:-1}"

# What sbatch was told of cores does not reach srun by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
exec srun --kill-on-bad-exit=1 "$python" "$root/pretrain_tape.py" "${flags[@]}" "$@"
