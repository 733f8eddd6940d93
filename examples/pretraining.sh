# What the pretraining scripts share. To be sourced; runs starting.sh and with it setup.sh, sets `default_processes` and
# `flags`, those of pretrain_tape.py, from PRESET, DATA_PATH, CHECKPOINT_PATH and VOCAB_FILE, and preprocesses the shipped
# proteins. What a script may set before, besides what starting.sh takes:
#
#     run_suffix    what its checkpoints' folder has behind the preset's name
# shellcheck shell=bash disable=SC2034,SC2154  # variables come from setup.sh and go to the script that sources this

source "$(dirname "${BASH_SOURCE[0]}")/starting.sh"

if [ "$num_gpus" -gt 0 ]; then default_preset=tape; else default_preset=demo; fi
if [ "$num_gpus" -gt 0 ]; then default_processes=$num_gpus; else default_processes=2; fi
preset=${PRESET:-$default_preset}
checkpoint_path=${CHECKPOINT_PATH:-$root/runs/$preset${run_suffix-}}
vocabulary=(${VOCAB_FILE:+--vocab-file "$VOCAB_FILE"})  # else the preset's

if [ -n "${DATA_PATH-}" ]; then
    if [ -e "$DATA_PATH.idx" ]; then data_path=("$DATA_PATH"); else read -ra data_path <<<"$DATA_PATH"; fi
else
    small="$root/runs/data/small"
    data_path=("${small}_text_document")
    if ! [ -e "${data_path[0]}.idx" ]; then
        echo "preprocessing: examples/proteins/small.fasta.gz -> ${data_path[0]}.bin and .idx"
        mkdir -p "$root/runs/data"
        "$python" "$root/tools/preprocess_data.py" --input "$root/examples/proteins/small.fasta.gz" \
            --output-prefix "$small" --dataset-impl mmap --tokenizer-type BertWordPieceCase
    fi
fi

flags=(--preset "$preset" --data-path "${data_path[@]}" ${vocabulary[@]+"${vocabulary[@]}"}
    --save "$checkpoint_path" --load "$checkpoint_path")
