#!/usr/bin/env bash
# Installs what the tests need, as the example scripts do, and runs the tests, two files at a time.
#
#     bash tests/run.sh [any argument of pytest]      for example: bash tests/run.sh -k packing
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh" tests
cd "$root"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m pytest -q --durations=20 --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
