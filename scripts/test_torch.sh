#!/usr/bin/env bash
# Run the test suite on a given torch, in a separate environment, .venv-torch-VERSION, which is created once.
#   bash scripts/test_torch.sh 2.14.1 [pytest arguments]
# pip's own settings hold (index, constraints, PIP_*). For Linux, torch is a CUDA build of several GB unless an index of
# CPU builds is given; it runs on CPUs, too. PYTHON as in environment.sh. What was found: docs/guide/parallelism.md.
set -euo pipefail
version=${1:-}
if [[ ! $version =~ ^[0-9]+\.[0-9]+ ]]; then
    echo "usage: bash scripts/test_torch.sh VERSION [pytest arguments], with a version of torch, as 2.14.1" >&2
    exit 2
fi
shift
VENV=.venv-torch-$version
CONSTRAINTS=$(mktemp)
trap 'rm -f "$CONSTRAINTS"' EXIT
echo "torch==$version" > "$CONSTRAINTS"
source "$(dirname "$0")/environment.sh"
python -c 'import torch; print("torch", torch.__version__)'
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile "$@"
