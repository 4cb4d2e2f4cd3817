#!/usr/bin/env bash
# The whole way in one command: environment, token data from the Python standard library's sources, training with the
# soft teacher on all GPUs (NCCL) or two CPU processes (gloo), curves and a table.
#   bash scripts/quickstart.sh [--section.key value ...]     extra arguments go to the training command
# A second call resumes or, once finished, only reports; remove outputs/quickstart to start anew.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

STDLIB=$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
if [ ! -f data/quickstart/train/index.json ]; then
    python -m titan_attent.data.writer asyncio="$STDLIB/asyncio" email="$STDLIB/email" logging="$STDLIB/logging" \
        --output data/quickstart/train --tokenizer train:4096
fi
if [ ! -f data/quickstart/validation/index.json ]; then
    python -m titan_attent.data.writer "$STDLIB"/{http,json} \
        --output data/quickstart/validation --tokenizer data/quickstart/train/tokenizer.tiktoken
fi

# The global batch of 16 sequences is fixed, so any power of two up to 16 of processes trains the same run. On CPU the two
# processes share the cores; torchrun would give each of them one.
read -r NUM_PROCESSES THREADS < <(python - <<'PYTHON'
import torch
has_gpu = torch.accelerator.is_available()
count = max(n for n in (1, 2, 4, 8, 16) if n <= (torch.accelerator.device_count() if has_gpu else 2))
print(count, "" if has_gpu else max(1, torch.get_num_threads() // count))
PYTHON
)
if [ -n "$THREADS" ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$THREADS}"
fi
torchrun --standalone --nproc_per_node="$NUM_PROCESSES" --local-ranks-filter 0 -m titan_attent.train \
    --job.config_file train_configs/quickstart.toml --training.local_batch_size "$((16 / NUM_PROCESSES))" "$@"
python -m titan_attent.report outputs/quickstart
