#!/usr/bin/env bash
# tensorboard 2.21, torch 2.13: of two sessions that start within one second, TensorBoard hides the newer one.
#
# Expected: a resumed run opens its SummaryWriter with purge_step=N, and TensorBoard then shows the older session up to
# N - 1 and the newer one from N on, however soon it was started again.
# Seen: a folder's event files are read in the order of their names, which are the second of their creation, the host and
# the number of the process, as text. Within one second process 10000 sorts before process 9999. Read in that order, the
# older session's start purges every step of the newer one: of steps 3 and 4 that the newer session logged, 4 is missing
# and 3 has the older value. The message speaks of steps that are out of order, and names the step 1.
# So short sessions in one folder, as tests and schedulers make them, lose what they logged last. A writer has to wait
# for a second of its own.
#
# Exit 0 while this is so, 1 once it changes. Needs Python 3.10 or newer and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 tensorboard==2.21.0 \
    "setuptools<81"
"$folder/venv/bin/python" - "$folder" <<'PY'
import os
import sys
import time

import tensorboard
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

print("tensorboard", tensorboard.__version__, "torch", torch.__version__)


def two_sessions(folder, numbers):
    """Steps 1 to 3 by the process of the first number, 3 and 4 by that of the second; what TensorBoard shows."""
    stock = os.getpid
    while time.time() % 1 > 0.5:  # so that both are in one second
        time.sleep(0.05)
    for value, number, steps in ((1.0, numbers[0], (1, 2, 3)), (2.0, numbers[1], (3, 4))):
        os.getpid = lambda number=number: number
        with SummaryWriter(folder, purge_step=steps[0]) as writer:
            for step in steps:
                writer.add_scalar("session", value, step)
    os.getpid = stock
    seconds = {name.split(".")[3] for name in os.listdir(folder)}
    assert len(seconds) == 1, seconds
    return {event.step: event.value for event in EventAccumulator(folder).Reload().Scalars("session")}


rising, falling = two_sessions(f"{sys.argv[1]}/a", (1000, 1001)), two_sessions(f"{sys.argv[1]}/b", (9999, 10000))
print("processes 1000 and 1001: step -> session", rising)
print("processes 9999 and 10000: step -> session", falling)
if rising != {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0} or falling != {1: 1.0, 2: 1.0, 3: 1.0}:
    sys.exit("this has changed")
PY
