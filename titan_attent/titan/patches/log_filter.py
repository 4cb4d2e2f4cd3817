"""Removes log lines of torchtitan and torch about GPUs from a log on CPU, where they look like errors.

Each entry is the beginning of a line that has no meaning on a CPU, with the reason. All other lines stay, and on a GPU
nothing is removed. Cost: one regular-expression match per log line.
"""

import logging
import re
import warnings

LINES = (
    r"Peak FLOPS used for computing MFU",  # a GPU's peak; that of a CPU is unknown
    r"ENV\[TORCH_NCCL_\w+\] = ",  # NCCL is not used
    # The tokenizer comes with the token shards. Only torchtitan's default path, which no user set, is hidden.
    r"HF assets path \./tests/assets/tokenizer does not exist",
    r"model\.safetensors\.index\.json not found at hf_assets_path: \./tests/assets/tokenizer",
)

WARNINGS = (
    # cpu.py makes random numbers independent of the sharding.
    r"DTensor random operators may not have complete support on cpu",
    r"DTensor manual_seed\(\) may not have complete support on cpu",
    # torchtitan's groups of one rank, which never communicate; the timeout of gloo is set.
    r"Set timeout is now only supported for either nccl or gloo",
)

_LINE = re.compile("|".join(LINES))
_UTILIZATION = re.compile(r"\s+(?:\x1b\[[\d;]*m)?mfu: \S+?%")
"""The utilisation at the end of a step's line, with its color code; the peak that it refers to is unknown."""


class _GpuLineFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if _LINE.match(message):
            return False
        if (shortened := _UTILIZATION.sub("", message)) != message:
            record.msg, record.args = shortened, None
        return True


def install() -> None:
    """Install the filter in torchtitan's logger, which is the root logger, and for Python's warnings."""
    logger = logging.getLogger()
    if not any(isinstance(one, _GpuLineFilter) for one in logger.filters):
        logger.addFilter(_GpuLineFilter())
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
