#!/usr/bin/env bash
# Converts TAPE's Pfam (pfam_train.lmdb, pfam_valid.lmdb, pfam_holdout.lmdb in the folder PFAM) to pfam_all.json there.
# Not needed for pretraining: tools/preprocess_data.py reads the LMDB folders, or pfam_strings.txt, directly.
set -euo pipefail
PFAM=${1:-${PFAM:?give the folder of pfam_train.lmdb as the first argument or in PFAM}}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python}" "$here/lmdb2json.py" "$PFAM"/pfam_{train,valid,holdout}.lmdb "$PFAM/pfam_all.json"
