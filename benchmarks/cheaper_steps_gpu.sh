#!/usr/bin/env bash
# How fast cheaper steps are on one GPU: a llama3 of 160 M parameters, bf16, 16 x 1,024 tokens a step. Prints a Markdown
# table, and writes its numbers to outputs/gpu_steps.json. Takes speed/gpu_steps.py's arguments. On a machine without a GPU, to
# see that it works; PYTHON names the interpreter:
#
#     bash benchmarks/cheaper_steps_gpu.sh --flavor bench --seq-len 96 --batch 8 --steps 15 --log-every 3 --rounds 1
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" -m benchmarks.speed.gpu_steps --output outputs/gpu_steps.json "$@"
