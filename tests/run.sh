#!/usr/bin/env bash
# Sets up what the tests need, as the example scripts do, and runs them.
#
#     bash tests/run.sh [any argument of pytest]      for example: bash tests/run.sh -k packing
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh" tests
cd "$root"
exec "$python" -m pytest -q "$@"
