#!/usr/bin/env bash
# Preprocesses TAPE's Pfam in the folder PFAM to tape_pfam_all_text_document.bin and .idx there. Reads pfam_all.json if
# it exists, otherwise the LMDB folders; passes further flags on to tools/preprocess_data.py.
set -euo pipefail
PFAM=${PFAM:?give the folder of the Pfam files in PFAM}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
input=("$PFAM/pfam_all.json")
[ -e "${input[0]}" ] || input=("$PFAM"/pfam_{train,valid,holdout}.lmdb)
exec "${PYTHON:-python}" "$here/../tools/preprocess_data.py" --input "${input[@]}" \
    --tokenizer-type BertWordPieceCase --vocab-file "${VOCAB:-$here/iupac_vocab.txt}" \
    --output-prefix "$PFAM/tape_pfam_all" --dataset-impl mmap --workers "${WORKERS:-$(nproc)}" "$@"
