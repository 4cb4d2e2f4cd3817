"""The devices of the tests in this folder: the GPUs of this machine, or with ``DEVICE=cpu`` two gloo processes.

``DEVICE=cpu`` is a rehearsal: it shows that the tests run, not how GPUs behave. Without a GPU and without
``DEVICE=cpu`` they are skipped (tests/conftest.py). Use ``pytest -s`` to see their output.
"""

import os

import torch

DEVICE = os.environ.get("DEVICE", "cuda")
IS_GPU = DEVICE == "cuda"


def num_ranks(*, at_most: int) -> int:
    """One process per GPU, but 1, 2 or 4; two without a GPU."""
    num_devices = torch.cuda.device_count() if IS_GPU else 2
    return max((n for n in (1, 2, 4) if n <= min(num_devices, at_most)), default=2)
