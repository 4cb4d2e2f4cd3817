#!/usr/bin/env bash
# Set up the environment and run the whole test suite (11 to 18 minutes on 2 cores, two test files in parallel).
#   bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile "$@"
