# What the pretraining scripts share. To be sourced; runs starting.sh and with it setup.sh, sets `default_processes` and
# `flags`, those of pretrain_tape.py, from PRESET, DATA_PATH, CHECKPOINT_PATH and VOCAB_FILE, and preprocesses the shipped
# proteins. Where --config is among the script's arguments, the file takes the preset's place, and gives its name to the
# folder; neither the data nor the folder that it or the arguments say is replaced by a default, and a run that is saved
# in a folder of theirs goes on from there. What a script may set before, besides what starting.sh takes:
#
#     run_suffix    what its checkpoints' folder has behind the preset's name
# shellcheck shell=bash disable=SC2034,SC2154  # variables come from setup.sh and go to the script that sources this

source "$(dirname "${BASH_SOURCE[0]}")/starting.sh"

# said ARGUMENTS: the file of --config, the folder of --save, and a line for each flag that both say: data_path, …
said() {
    PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$python" - "$@" <<'PYTHON_CODE'
import sys

from megatron.config.command_line import read
from megatron.log import exit_status


def tell() -> None:
    given = read(sys.argv[1:])
    print(given.file or "", given.said.get("save") or "", *given.said, sep="\n")


sys.exit(exit_status(tell))
PYTHON_CODE
}

if [ "$num_gpus" -gt 0 ]; then default_preset=tape; else default_preset=demo; fi
if [ "$num_gpus" -gt 0 ]; then default_processes=$num_gpus; else default_processes=2; fi
preset=${PRESET:-$default_preset} all_said=$'\n' config_file='' said_save=''
if [[ " $* " =~ \ --(config|save|load|data-path)[\ =] ]]; then
    all_said=$(said "$@")$'\n'
    { read -r config_file && read -r said_save; } <<<"$all_said"
fi
flags=()
if [ -z "$config_file" ] || [ -n "${PRESET-}" ]; then flags+=(--preset "$preset"); fi
if [ -n "${VOCAB_FILE-}" ]; then flags+=(--vocab-file "$VOCAB_FILE"); fi  # else the preset's

if [ -n "${DATA_PATH-}" ]; then
    if [ -e "$DATA_PATH.idx" ]; then data_path=("$DATA_PATH"); else read -ra data_path <<<"$DATA_PATH"; fi
    flags+=(--data-path "${data_path[@]}")
elif [[ $all_said != *$'\ndata_path\n'* ]]; then
    small="$root/runs/data/small"
    flags+=(--data-path "${small}_text_document")
    if ! [ -e "${small}_text_document.idx" ]; then
        mkdir -p "$root/runs/data" 2>/dev/null || fail "$root/runs cannot be made; preprocess elsewhere:" \
            "python tools/preprocess_data.py --input examples/proteins/small.fasta.gz --output-prefix FOLDER/small," \
            "and give DATA_PATH=FOLDER/small_text_document CHECKPOINT_PATH=FOLDER/run"
        echo "preprocessing: examples/proteins/small.fasta.gz -> ${small}_text_document.bin and .idx"
        "$python" "$root/tools/preprocess_data.py" --input "$root/examples/proteins/small.fasta.gz" \
            --output-prefix "$small" --dataset-impl mmap --tokenizer-type BertWordPieceCase
    fi
fi

name=${config_file##*/}
name=${name:-$preset}
checkpoint_path=${CHECKPOINT_PATH:-${said_save:-$root/runs/${name%.*}${run_suffix-}}}
flags+=(--save "$checkpoint_path")
if [ -n "${CHECKPOINT_PATH-}" ] || [[ $all_said != *$'\nload\n'* ]]; then flags+=(--load "$checkpoint_path"); fi
