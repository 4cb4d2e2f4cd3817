#!/usr/bin/env bash
# The whole workflow in one command: environment, token data with real dirt, two small scorers, and two runs of equal
# compute, uniform and taught by the scorers. On all GPUs (NCCL) or two CPU processes (gloo).
#   bash scripts/quickstart.sh [--section.key value ...]     extra arguments go to both training commands
# A second call resumes or, if all is finished, only prints the report; remove outputs/quickstart to start anew.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
DATA=data/quickstart OUT=outputs/quickstart CONFIG=train_configs/quickstart.toml

if [ ! -f "$DATA/validation/index.json" ]; then
    python scripts/quickstart_data.py "$DATA/text"
    write() { python -m titan_attent.data.text "${@:3}" --output "$DATA/$1" --tokenizer "$2"; }
    [ -f "$DATA/train/index.json" ] || write train train:1024 code="$DATA/text/code.jsonl" \
        tables="$DATA/text/tables.jsonl" encoded="$DATA/text/encoded.jsonl"
    [ -f "$DATA/trusted/index.json" ] || write trusted "$DATA/train/tokenizer.tiktoken" "$DATA/text/trusted.jsonl"
    write validation "$DATA/train/tokenizer.tiktoken" "$DATA/text/validation.jsonl"
fi

# The global batch of 4 windows is fixed, so 1, 2 and 4 processes train the same run.
MAX_PROCESSES=4
source scripts/processes.sh
launch() {
    torchrun --standalone --nproc_per_node="$NUM_PROCESSES" --local-ranks-filter 0 -m titan_attent."$@" \
        --job.config_file "$CONFIG" --training.local_batch_size "$((4 / NUM_PROCESSES))"
}
launch score pair --trusted "$DATA/trusted" --output "$OUT/scorers"
launch train "$@"
# Uniform gets the seconds of the scorers as additional steps, rounded up to a multiple of 25, so that its last step is
# validated.
STEPS=$(python scripts/equal_compute.py "$OUT/taught" --multiple 25)
launch train --job.dump_folder "$OUT/uniform" "$@" --teacher.strategy uniform --training.steps "$STEPS"
python -m titan_attent.report "$OUT/uniform" "$OUT/taught" --output "$OUT/curves.png"
