#!/usr/bin/env bash
# Environment, install, the whole suite (under 10 minutes on 2 cores: two files of tests side by side).
#   bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile "$@"
