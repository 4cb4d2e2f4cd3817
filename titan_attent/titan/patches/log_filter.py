"""What torchtitan and torch say about GPUs, kept out of a log on CPU, where a newcomer takes it for an error.

Each entry is the beginning of a line that has no meaning there, with the reason. Everything else stays, and on a GPU
nothing is touched. Cost: one match a line of the log.
"""

import logging
import re
import warnings

LINES = (
    r"Peak FLOPS used for computing MFU",  # of a GPU; a CPU's is not known
    r"ENV\[TORCH_NCCL_\w+\] = ",  # NCCL is not used
    # The tokenizer comes with the token shards. Only torchtitan's default path is hidden, which no user wrote.
    r"HF assets path \./tests/assets/tokenizer does not exist",
    r"model\.safetensors\.index\.json not found at hf_assets_path: \./tests/assets/tokenizer",
)

WARNINGS = (
    # cpu.py draws so that they do.
    r"DTensor random operators may not have complete support on cpu",
    r"DTensor manual_seed\(\) may not have complete support on cpu",
    # torchtitan's groups of one rank, which never communicate; gloo's own timeout is set.
    r"Set timeout is now only supported for either nccl or gloo",
)

_LINE = re.compile("|".join(LINES))
_UTILIZATION = re.compile(r"\s+(?:\x1b\[[\d;]*m)?mfu: \S+?%")
"""The end of a step's line, with the color before it: the share of a peak that is not known."""


class _Quiet(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if _LINE.match(message):
            return False
        if (shorter := _UTILIZATION.sub("", message)) != message:
            record.msg, record.args = shorter, None
        return True


def install() -> None:
    """Put it in force for torchtitan's logger, which is the root one, and for Python's warnings."""
    logger = logging.getLogger()
    if not any(isinstance(known, _Quiet) for known in logger.filters):
        logger.addFilter(_Quiet())
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
