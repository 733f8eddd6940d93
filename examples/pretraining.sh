# What the pretraining scripts share. Source it: it runs starting.sh, and with it setup.sh. From PRESET, DATA_PATH,
# CHECKPOINT_PATH and VOCAB_FILE it sets `flags`, the flags of pretrain_tape.py, `checkpoint_path` and
# `default_processes`, preprocesses the shipped proteins where they are needed, and defines `start_ranks`. If --config
# is among the script's arguments, that file replaces the preset, and its name becomes the folder's. No default replaces
# the data or the folder that the file or the arguments name, and a run that is saved in such a folder resumes from it.
# A script may first set, besides what starting.sh reads:
#
#     run_suffix    what follows the preset's name in the name of the checkpoints' folder
# shellcheck shell=bash disable=SC2034,SC2154  # setup.sh sets variables; the sourcing script reads them

source "$(dirname "${BASH_SOURCE[0]}")/starting.sh"

# said ARGUMENTS: prints the file of --config, the folder of --save, and each flag that the file or the arguments set.
said() {
    PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$python" - "$@" <<'PYTHON_CODE'
import signal
import sys

from megatron.config.command_line import read
from megatron.log import exit_status


def tell() -> None:
    given = read(sys.argv[1:])
    print(given.file or "", given.said.get("save") or "", *given.said, sep="\n")


signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in `tell` of setup.sh
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

# start_ranks COMMAND…: runs srun or mpiexec until it is asked to stop, and returns its status, or that of a rank that
# has ended with 2, 3 or 4. For it ends the other ranks, whose status may be higher, and MPICH mixes the bits of all.
status_file=$checkpoint_path/.ended-$HOSTNAME-$$  # a rank writes its status there
start_ranks() {
    local status=0
    export EXIT_STATUS_FILE=$status_file
    rm -f "$status_file"
    run_until_asked USR1 "$@" || status=$?  # on SIGTERM, srun and Open MPI kill the ranks; all pass on SIGUSR1
    if [ -s "$status_file" ]; then status=$(cat "$status_file"); fi
    rm -f "$status_file"
    return "$status"
}
