#!/usr/bin/env bash
# Run the tests of tests/gpu and the speed benchmarks on GPUs, in under 11 minutes and without a network. Tables go to
# stdout, their JSON to a folder.
#
#   bash benchmarks/gpu.sh [FOLDER]                     # default: $OUT, or outputs/gpu
#   DEVICE=cpu bash benchmarks/gpu.sh [FOLDER]          # rehearsal of the tests on two gloo processes, no tables
#   LONG_WINDOWS=DIR bash benchmarks/gpu.sh [FOLDER]    # then also benchmarks/long_windows/gpu.py, 15 minutes more
#
# If a part fails, the others still run, and the script ends with exit code 1. PYTHON names the interpreter.
#
# On a machine with torch but no network, the other packages come from a folder of wheels. Fill it beforehand on a machine
# with a network and the same Python:
#   pip download --no-deps --dest wheels torchtitan==0.2.2 torchdata tyro datasets tiktoken tokenizers pyarrow tensorboard \
#       tensorboard-data-server matplotlib tqdm pytest hypothesis ...   # and those that `pip check` names as missing
#   WHEELS=wheels bash benchmarks/gpu.sh
# If torchtitan is missing, the script makes a virtual environment over the system's packages in FOLDER and installs the
# wheels there.
set -uo pipefail
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cuda}
folder=${1:-${OUT:-outputs/gpu}}
mkdir -p "$folder"
export DEVICE PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import torchtitan' 2> /dev/null && [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m venv --system-site-packages "$folder/venv" || exit 1
    PYTHON=$folder/venv/bin/python
    "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || exit 1
fi
if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "torch finds no GPU; DEVICE=cpu runs the tests on CPU" >&2
    exit 1
fi
failed=0

part() { # NAME SECONDS ARGUMENTS...: run the interpreter, with a time limit
    local name=$1 limit=$2
    shift 2
    if [ "$DEVICE" = cpu ]; then limit=$((4 * limit)); fi
    echo && echo "## $name ($*)"
    local start=$SECONDS
    if ! timeout "$limit" "$PYTHON" "$@" 2> "$folder/$name.log"; then
        failed=1
        echo "FAILED; the end of $folder/$name.log:"
        tail -n 15 "$folder/$name.log"
    fi
    echo "$name took $((SECONDS - start)) s"
}

check() { # NAME SECONDS: run a file of tests/gpu
    part "$1" "$2" -m pytest -s -p no:cacheprovider "tests/gpu/test_$1.py"
}

speed() { # NAME SECONDS ARGUMENTS...: run a module of benchmarks/speed
    part "$1" "$2" -m "benchmarks.speed.$1" --device "$DEVICE" --output "$folder/$1.json" "${@:3}"
}

# First the tests that need a GPU.
check host_syncs 130
check cells 90
check async_saves 140
if [ "$DEVICE" = cpu ]; then
    echo && echo "Skipped on CPU: the tables of speed and memory (benchmarks/README.md lists them)."
    exit $failed
fi
speed loss 60
speed folding 60 --rows 4 --length 2048 --rounds 25
speed exchange 30
speed step_time 90 --rounds 9 --variants uniform soft
speed selection 50 --sizes 1000000 10000000
# Its own 15 minutes, with data that `python -m benchmarks.long_windows.gpu --prepare DIR` wrote elsewhere.
if [ -n "${LONG_WINDOWS:-}" ]; then
    part long_windows 900 -m benchmarks.long_windows.gpu --data "$LONG_WINDOWS" --output "$folder/long_windows"
fi
exit $failed
