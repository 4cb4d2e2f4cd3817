"""Values that torchtitan 0.2.2, or torch below it, refuses itself with an error that names the problem.

torchtitan raises these errors after the process groups exist, as a traceback on every rank. Here they are one message
before. Nothing would train wrongly without this module: it is written for torchtitan 0.2.2, and it can be removed with
the support for that version. Each group of checks names the code that refuses the value.

Cost: reads the configuration.
"""

import os
from typing import Any

from torchtitan.config import JobConfig

from titan_attent.foundations.checks import check_one_of
from titan_attent.titan.first_checks import check_ranges

RANGES: dict[str, dict[str, Any]] = {
    "training.gc_freq": {"at_least": 1, "whole": True},  # torchtitan.tools.utils.GarbageCollection
    # torch.optim.Adam, torch.optim.AdamW
    "optimizer.lr": {"at_least": 0},
    "optimizer.beta1": {"at_least": 0, "below": 1},
    "optimizer.beta2": {"at_least": 0, "below": 1},
    "optimizer.eps": {"at_least": 0},
    "optimizer.weight_decay": {"at_least": 0},
    "activation_checkpoint.memory_budget": {"at_least": 0, "at_most": 1},  # torch._functorch.partitioners
}
"""Arguments of :func:`check_number`; a key that is None is not checked."""


def check_torchtitan_ranges(job_config: JobConfig) -> None:
    """Refuse values that torchtitan 0.2.2 or torch would refuse later; ValueError."""
    check_ranges(job_config, RANGES)
    check_one_of("name", job_config.optimizer.name, ("Adam", "AdamW"), section="optimizer")  # build_optimizers
    if job_config.checkpoint.enable:
        _check_checkpoint(job_config)
    if job_config.compile.enable:
        _check_backend(job_config)
    _check_activation_checkpoint(job_config)
    _check_profiling(job_config)


def _check_checkpoint(job_config: JobConfig) -> None:
    """CheckpointManager.__init__ and torchtitan.train.main refuse these."""
    config = job_config.checkpoint
    if config.keep_latest_k == 1:
        raise ValueError(
            "[checkpoint] keep_latest_k = 1: a run killed during a save would have no complete checkpoint. Set it to 2 "
            "or more, or to 0 to keep all"
        )
    if config.create_seed_checkpoint and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("[checkpoint] create_seed_checkpoint = true: start it with one process")


def _check_backend(job_config: JobConfig) -> None:
    """torch.compile refuses an unknown backend."""
    import torch._dynamo

    backends = tuple(torch._dynamo.list_backends(exclude_tags=()))
    check_one_of("backend", job_config.compile.backend, backends, section="compile")


def _check_activation_checkpoint(job_config: JobConfig) -> None:
    """torchtitan.distributed.activation_checkpoint refuses these."""
    config, compiled = job_config.activation_checkpoint, job_config.compile
    if config.mode == "memory_budget" and not (compiled.enable and "model" in compiled.components):
        raise ValueError(
            '[activation_checkpoint] mode = "memory_budget" needs a compiled model: set compile.enable = true, or '
            'another mode, such as "selective"'
        )
    option = config.selective_ac_option
    if config.mode == "selective" and option != "op" and not (option.isdigit() and int(option) > 0):
        raise ValueError(
            f'[activation_checkpoint] selective_ac_option = "{option}": it must be "op" or a number n, such as "2", '
            "for every n-th layer"
        )


def _check_profiling(job_config: JobConfig) -> None:
    """torchtitan.tools.profiling refuses a period that is shorter than the profile."""
    profiling = job_config.profiling
    min_freq = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < min_freq:
        raise ValueError(
            f"[profiling] profile_freq = {profiling.profile_freq} must be at least profiler_warmup + profiler_active = "
            f"{min_freq}"
        )
