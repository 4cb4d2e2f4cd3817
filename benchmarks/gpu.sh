#!/usr/bin/env bash
# The speed benchmarks on one GPU, in under 10 minutes, without a network: tables on stdout, JSON in a folder.
#
#   bash benchmarks/gpu.sh [FOLDER]       # default: $OUT, or outputs/gpu
#
# A failed part does not keep the others from running; the script then ends with exit code 1. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-${OUT:-outputs/gpu}}
mkdir -p "$folder"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
failed=0

part() { # NAME SECONDS ARGUMENTS...: one benchmark with a limit of its own
    local name=$1 limit=$2
    shift 2
    echo && echo "## $name ($*)"
    local start=$SECONDS
    if ! timeout "$limit" "${PYTHON:-python3}" "benchmarks/$1" --device cuda --output "$folder/$name.json" "${@:2}" \
        2> "$folder/$name.log"; then
        failed=1
        echo "FAILED, the end of $folder/$name.log:"
        tail -n 15 "$folder/$name.log"
    fi
    echo "$name took $((SECONDS - start)) s"
}

part loss 120 loss.py
part exchange 60 exchange.py
part sync 120 step_time.py --forbid-sync --variants "soft, gradient" reweighting
part step_time 230 step_time.py --rounds 15 --variants uniform soft reweighting
part selection 60 selection.py
exit $failed
