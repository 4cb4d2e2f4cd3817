#!/usr/bin/env bash
# The checks and speed benchmarks on GPUs, in under 10 minutes, without a network: tables on stdout, JSON in a folder.
#
#   bash benchmarks/gpu.sh [FOLDER]                     # default: $OUT, or outputs/gpu
#   DEVICE=cpu bash benchmarks/gpu.sh [FOLDER]          # rehearsal of the checks on two gloo processes, no tables
#
# A failed part does not keep the others from running; the script then ends with exit code 1. PYTHON names the interpreter.
#
# On a machine with torch and no network the other packages come from a folder of wheels, filled beforehand where there is
# one (for the same Python):
#   pip download --no-deps --dest wheels torchtitan==0.2.2 torchdata tyro datasets tiktoken tokenizers pyarrow tensorboard \
#       tensorboard-data-server matplotlib tqdm pytest hypothesis ...   # and what `pip check` names as missing
#   WHEELS=wheels bash benchmarks/gpu.sh
# If torchtitan is missing, a virtual environment over the system's packages is made in FOLDER and filled from there.
set -uo pipefail
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cuda}
folder=${1:-${OUT:-outputs/gpu}}
mkdir -p "$folder"
export PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import torchtitan' 2> /dev/null && [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m venv --system-site-packages "$folder/venv" || exit 1
    PYTHON=$folder/venv/bin/python
    "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || exit 1
fi
failed=0

part() { # NAME SECONDS ARGUMENTS...: of the interpreter, with a limit of its own
    local name=$1 limit=$2
    shift 2
    echo && echo "## $name ($*)"
    local start=$SECONDS
    if ! timeout "$limit" "$PYTHON" "$@" --device "$DEVICE" --output "$folder/$name.json" \
        2> "$folder/$name.log"; then
        failed=1
        echo "FAILED, the end of $folder/$name.log:"
        tail -n 15 "$folder/$name.log"
    fi
    echo "$name took $((SECONDS - start)) s"
}

# What only a GPU can show comes first.
if [ "$DEVICE" = cpu ]; then
    part sync 240 tests/gpu/host_syncs.py --variants defaults "soft, functional gradient" reweighting # a rehearsal needs not all
else
    part sync 130 tests/gpu/host_syncs.py
fi
part cells 90 tests/gpu/test_cells.py
part resume 140 tests/gpu/test_async_saves.py
if [ "$DEVICE" = cpu ]; then
    echo && echo "Skipped on CPU: the tables of speed and memory (README.md in this folder names them one by one)."
    exit $failed
fi
part loss 60 -m benchmarks.speed.loss
part exchange 30 -m benchmarks.speed.exchange
part step_time 90 -m benchmarks.speed.step_time --rounds 9 --variants uniform soft
part selection 50 -m benchmarks.speed.selection --sizes 1000000 10000000
exit $failed
