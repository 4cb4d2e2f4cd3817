#!/usr/bin/env bash
# Set up the environment and run the default test suite, two test files in parallel (7 minutes on two AMD EPYC cores).
#   bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile "$@"
