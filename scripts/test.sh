#!/usr/bin/env bash
# Environment, install, the whole suite (under 10 minutes on 2 cores).
#   bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
python -m pytest "$@"
