#!/usr/bin/env bash
# Images in one command: environment, real digits with a fifth of the labels wrong, and two runs of a small ViT, uniform
# and taught. On all GPUs (NCCL) or two CPU processes (gloo); two minutes on two cores.
#   bash scripts/quickstart_vision.sh [--section.key value ...]     extra arguments go to both training commands
# A second call resumes or, if all is finished, only prints the report; remove outputs/quickstart_vision to start anew.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
DATA=data/quickstart_vision OUT=outputs/quickstart_vision CONFIG=train_configs/quickstart_vision.toml

if [ ! -f "$DATA/test/index.json" ]; then
    python scripts/quickstart_vision_data.py "$DATA/digits"
    for part in train test; do
        [ -f "$DATA/$part/index.json" ] ||
            python -m titan_attent.data.images "$DATA/digits/$part.npz" --grayscale --output "$DATA/$part"
    done
fi

# The global batch of 64 images is fixed, so any power of two up to 16 processes trains the same run.
source scripts/processes.sh
launch() {
    torchrun --standalone --nproc_per_node="$NUM_PROCESSES" --local-ranks-filter 0 -m titan_attent.train "$@" \
        --job.config_file "$CONFIG" --training.local_batch_size "$((64 / NUM_PROCESSES))"
}
launch "$@"
launch --job.dump_folder "$OUT/uniform" "$@" --teacher.strategy uniform
python -m titan_attent.report "$OUT/uniform" "$OUT/taught" --output "$OUT/curves.png"
