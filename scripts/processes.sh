# Sourced by the quickstarts: sets NUM_PROCESSES, one per GPU or two on the CPU, and the threads of each.

# A power of two up to MAX_PROCESSES (16 by default), which divides the global batch. On the CPU two processes share the
# cores; torchrun would limit each to one.
read -r NUM_PROCESSES THREADS < <(MAX_PROCESSES=${MAX_PROCESSES:-16} python - <<'PYTHON'
import os

import torch
has_gpu = torch.accelerator.is_available()
limit = min(int(os.environ["MAX_PROCESSES"]), torch.accelerator.device_count() if has_gpu else 2)
count = max(n for n in (1, 2, 4, 8, 16) if n <= limit)
print(count, "" if has_gpu else max(1, torch.get_num_threads() // count))
PYTHON
)
if [ -n "$THREADS" ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$THREADS}"
fi
