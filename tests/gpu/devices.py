"""Where the tests of this folder run: on the GPUs of this machine; with ``DEVICE=cpu`` on two gloo processes.

The second is a rehearsal: it shows that the tests run, not what they are for. Without a GPU and without it they are
skipped (tests/conftest.py). Show what they print with ``pytest -s``.
"""

import os

import torch

DEVICE = os.environ.get("DEVICE", "cuda")
IS_GPU = DEVICE == "cuda"


def num_ranks(*, at_most: int) -> int:
    """As many processes as there are GPUs, 1, 2 or 4; two without one."""
    found = torch.cuda.device_count() if IS_GPU else 2
    return max((n for n in (1, 2, 4) if n <= min(found, at_most)), default=2)
