#!/usr/bin/env bash
# Measures on a machine with a GPU what this project claims of one, in at most eight minutes on one: tables to paste into
# benchmarks/RESULTS.md, on standard output. What takes longer than its share is cut off, says so, and has printed what
# it knew: so the tests of tests/gpu, of which the first ones fit; `python -m pytest tests/gpu` runs all.
# Where there are several GPUs three layouts more take up to five minutes.
#
#     bash benchmarks/gpu.sh > tables.md
#     bash benchmarks/gpu.sh --rehearse     tiny shapes, on any machine: do the programs of training, FP8 and what lies
#                                           between products run? Not the tests, graphs, attention, transformers, or
#                                           several GPUs
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/setup.sh run

rehearse=("$@")
if [ ${#rehearse[@]} -gt 1 ] || { [ $# = 1 ] && [ "$1" != --rehearse ]; }; then fail "gpu.sh takes --rehearse, or nothing"; fi
if [ $# = 0 ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    fail "no GPU that PyTorch can use; --rehearse runs on tiny shapes without one"
fi

# measure SECONDS TITLE COMMAND...: a heading and what the command prints; one that fails or takes longer says so.
measure() {
    local seconds=$1 title=$2
    [ ${#rehearse[@]} = 0 ] || seconds=$((10 * seconds))
    shift 2
    printf '\n### %s\n\n%s\n\n' "$title" "\`$*\`"
    timeout --signal=INT --kill-after=10 "$seconds" "$python" "$@" || printf '\nended with status %s\n' $?
}

machine=$("$python" -c 'import torch, platform
print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no GPU",
      f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}", sep=", ")
print(torch.cuda.device_count())')
gpus=${machine##*$'\n'}
printf '%s, %s\n' "$(date +%F)" "${machine%$'\n'*}"

if [ $# = 0 ] && "$python" -c 'import pytest' 2>/dev/null; then
    measure 90 "Tests, as many as 90 s suffice for: memory, waits, graphs, curves, errors of the kernels" -m pytest -q \
        tests/gpu/test_memory.py tests/gpu/test_gpu.py
fi
measure 80 "Training" benchmarks/training.py --seconds 1 --presets esm2-8m esm2-35m tape proteinlm-200m \
    "${rehearse[@]}"
measure 60 "Training, compiled and by this project's kernels" benchmarks/training.py --seconds 1 \
    --presets 133M esm2-650m --no-compile "${rehearse[@]}"
measure 50 "FP8, whose goal from 3B on is 1.3 times the speed" benchmarks/training.py --presets esm2-3b --fp8 hybrid \
    --seconds 2 "${rehearse[@]}"
if [ $# = 0 ]; then
    measure 30 "Small models as CUDA graphs" benchmarks/training.py --presets esm2-8m esm2-35m --cuda-graph --seconds 1
fi
measure 50 "Between matrix products" benchmarks/pointwise.py "${rehearse[@]}"
if [ $# = 0 ]; then measure 70 "Attention" benchmarks/attention.py; fi
if [ $# = 0 ] && "$python" -c 'import transformers' 2>/dev/null; then
    measure 50 "Beside transformers" benchmarks/esm2_step.py --presets esm2-150m --repeats 5 --bf16
fi
if [ "$gpus" -gt 1 ]; then
    export GPUS_PER_NODE=$gpus PRESET=esm2-650m
    for layout in "" "--data-parallel-sharding parameters" "--tensor-model-parallel-size 2 --sequence-parallel"; do
        printf '\n### %s GPUs, %s\n\n' "$gpus" "${layout:-replicas}"
        folder=$(mktemp -d)
        # shellcheck disable=SC2086  # several flags
        CHECKPOINT_PATH=$folder timeout 90 bash examples/pretrain_tape_distributed.sh --global-batch-size $((16 * gpus)) \
            --train-iters 30 --log-interval 10 --eval-iters 1 $layout | grep -e 'iteration ' || printf 'did not end\n'
        rm -rf "$folder"
    done
fi
