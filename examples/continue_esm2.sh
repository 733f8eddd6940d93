#!/usr/bin/env bash
# Continues the pretraining of a published protein language model on your proteins: sets up, preprocesses, trains,
# evaluates before and after, and writes a folder that transformers loads.
#
#     bash examples/continue_esm2.sh MODEL PROTEINS OUT_FOLDER [any flag of pretrain_tape.py]
#
#     MODEL        a transformers folder (ESM-2, ESM-1b, ProtBERT, or an output of this script), or a .pt of fair-esm
#     PROTEINS     a file of proteins: FASTA, one protein a line, or a table or JSON with them under `text`, compressed
#                  or not
#     OUT_FOLDER   receives model (for transformers, rewritten at the end of each run), run (checkpoints, metrics, loss
#                  curves) and data
#
# You can stop it with Ctrl-C, or with SIGTERM, on which it saves. After a stop or a crash, run the same command again
# and it resumes. You can set these variables, as in `EPOCHS=10 bash examples/continue_esm2.sh …`:
#
#     EPOCHS          passes over PROTEINS (default: 3)
#     OLD_PROTEINS    proteins that the model must not forget: a file like PROTEINS, for example of Swiss-Prot, or the
#                     prefix of a preprocessed one. It is mixed in, and evaluated separately (default: none)
#     OLD_SHARE       its share of the rows (default: 0.2)
#     GPUS_PER_NODE   processes that share each batch (default: the GPUs of this machine; 1 if it has none)
#     MAX_RESTARTS    how often to restart from the last checkpoint when a process has died (default: 0)
#
# tools/continued_flags.py derives batch size, learning rate and number of steps from the model and the proteins. Any
# flag overrides them. docs/continue_pretraining.md explains the choices.
set -euo pipefail

refuse() {
    echo "error: $*" >&2
    exit 2
}

if [ $# -lt 3 ] || [[ $1 == -* ]] || [[ $2 == -* ]] || [[ $3 == -* ]]; then
    refuse "say what to go on from, on what and where to: bash examples/continue_esm2.sh MODEL PROTEINS OUT_FOLDER"
fi
model=$1 proteins=$2 out=$3
shift 3
if ! [ -e "$model" ]; then refuse "MODEL $model does not exist; give a folder of transformers, or a .pt of fair-esm"; fi
if ! [ -e "$proteins" ]; then refuse "PROTEINS $proteins does not exist; give a file of proteins, such as FASTA"; fi
old=${OLD_PROTEINS-}
if [ -n "$old" ] && ! [ -e "$old" ] && ! [ -e "$old.idx" ]; then
    refuse "OLD_PROTEINS $old does not exist; give a file of proteins, or the prefix of one that is preprocessed"
fi

numbers=(GPUS_PER_NODE:1:999 MAX_RESTARTS:0:999999)
source "$(dirname "${BASH_SOURCE[0]}")/starting.sh"
processes=${GPUS_PER_NODE:-$((num_gpus > 0 ? num_gpus : 1))}
share_cores "$processes"

ask=("$python" "$root/tools/continued_flags.py" "$model" "$proteins" "$out" --epochs "${EPOCHS:-3}"
    --old-proteins "$old" --old-share "${OLD_SHARE:-0.2}" --processes "$processes" --gpus "$num_gpus")

inputs=("$proteins" new)
if [ -n "$old" ] && ! [ -e "$old.idx" ]; then inputs+=("$old" old); fi
is_checked=''
for ((place = 0; place < ${#inputs[@]}; place += 2)); do
    file=${inputs[place]} prefix=$out/data/${inputs[place + 1]}
    if [ -e "$prefix.stats.json" ]; then continue; fi  # it is written last
    if [ -z "$is_checked" ]; then "${ask[@]}" --check -- "$@"; fi
    is_checked=yes
    mkdir -p "$out/data" 2>/dev/null || fail "OUT_FOLDER $out cannot be written to; give another folder"
    echo "preprocessing: $file -> ${prefix}_text_document.bin and .idx"
    "$python" "$root/tools/preprocess_data.py" --input "$file" --output-prefix "$prefix" --overwrite
done

flags=$("${ask[@]}" -- "$@")
mapfile -t flags <<<"$flags"
start=()
if [ "$processes" -gt 1 ] || [ -n "${MAX_RESTARTS-}" ]; then
    start=(-m megatron.parallel.launch --standalone --nproc_per_node "$processes" --max_restarts "${MAX_RESTARTS:-0}")
fi
run_until_asked TERM "$python" ${start[@]+"${start[@]}"} "$root/pretrain_tape.py" "${flags[@]}"
if [ -n "$asked" ]; then exit; fi
if [[ $("$python" "$root/tools/watch.py" "$out/run" --once) == *": stopped"* ]]; then
    echo "  the run has not come to its end: the same command goes on with it"
    exit
fi

rm -rf "$out/model"
"$python" "$root/tools/convert_checkpoint.py" --load-dir "$out/run" --save-dir "$out/model" --to hf
echo
trust=''
if grep -q '"auto_map"' "$out/model/config.json"; then trust=', trust_remote_code=True'; fi  # the model has its own code
echo "  for transformers    $out/model: AutoModelForMaskedLM.from_pretrained(\"$out/model\"$trust)"
echo "  the run             $out/run"
