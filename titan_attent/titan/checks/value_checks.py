"""Checks values of torchtitan's keys that it accepts silently and then trains wrongly or fails on without naming them.

torchtitan checks types and choices on the command line, but not in a TOML, and few ranges. This module checks every key
against its declared type, and the keys that a user is likely to change against their range. It also checks keys that
depend on each other or on the machine. Values that torchtitan refuses itself are in torchtitan_ranges.py; checks that
need the number of processes are in parallelism.py.

Cost: reads the configuration and the flavor's sizes; lists one or two directories of checkpoints.
"""

import importlib.util
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.model_converter import _registry_model_converter_cls as CONVERTERS
from torchtitan.protocols.train_spec import TrainSpec

from titan_attent.foundations.checks import check_one_of, closest
from titan_attent.titan.checks.load_sources import check_sources
from titan_attent.titan.first_checks import RANGES, check_ranges, check_types
from titan_attent.titan.patches import compat

RANGES_WHERE_ENABLED: dict[str, dict[str, Any]] = {
    "validation.local_batch_size": {"at_least": 1, "whole": True},
    "validation.seq_len": {"at_least": 1, "whole": True},
    "validation.freq": {"at_least": 1, "whole": True},
    "checkpoint.interval": {"at_least": 1, "whole": True},
    "checkpoint.keep_latest_k": {"at_least": 0, "whole": True},
    "checkpoint.load_step": {"at_least": -1, "whole": True},
}
"""Ranges that are checked only if the section's ``enable`` is set."""


def check_values(job_config: JobConfig) -> None:
    """Refuse values that no run can have on this machine; ValueError."""
    for section in fields(job_config):
        check_types(getattr(job_config, section.name), where=section.name)
    check_ranges(job_config, RANGES)
    enabled = {path: bounds for path, bounds in RANGES_WHERE_ENABLED.items() if _is_enabled(job_config, path)}
    check_ranges(job_config, enabled)
    _check_training(job_config)
    if job_config.checkpoint.enable:
        _check_checkpoint(job_config)
    if job_config.compile.enable:
        for name in job_config.compile.components:
            check_one_of("components", name, ("model", "loss"), section="compile")
    _check_machine(job_config)


def _is_enabled(job_config: JobConfig, path: str) -> bool:
    return getattr(job_config, path.partition(".")[0]).enable


def check_flavor(spec: TrainSpec, *, model: str, flavor: str, key: str = "[model] flavor") -> None:
    """Refuse a ``flavor``, the value of ``key``, that ``model``, whose TrainSpec is ``spec``, lacks; ValueError."""
    if flavor not in spec.model_args:
        raise ValueError(
            f'{key} = "{flavor}" is unknown to {model}{closest(flavor, spec.model_args) or "."} '
            f"Known: {', '.join(spec.model_args)}"
        )


def check_fit(job_config: JobConfig, model_args: BaseModelArgs) -> None:
    """Refuse validation examples longer than the model is built for, and attention that needs a GPU on a CPU."""
    validation, training = job_config.validation, job_config.training
    if validation.enable and validation.seq_len > training.seq_len:
        raise ValueError(
            f"[validation] seq_len = {validation.seq_len} is above [training] seq_len = {training.seq_len}, the "
            f"length that the model is built for: give --validation.seq_len {training.seq_len} or less"
        )
    if getattr(model_args, "attn_type", "sdpa") == "varlen" and compat.IS_CPU:
        raise ValueError(
            f'[model] flavor = "{job_config.model.flavor}": its attention (varlen) runs on GPUs only. Choose a flavor '
            "with another attention"
        )


def _check_training(job_config: JobConfig) -> None:
    training, scheduler = job_config.training, job_config.lr_scheduler
    if training.global_batch_size != -1 and training.global_batch_size < 1:
        raise ValueError(
            f"[training] global_batch_size = {training.global_batch_size}: it must be at least 1, or -1 for "
            "local_batch_size x data-parallel ranks"
        )
    if scheduler.total_steps is not None and scheduler.total_steps < training.steps:
        raise ValueError(
            f"[lr_scheduler] total_steps = {scheduler.total_steps} is below [training] steps = {training.steps}: the "
            "learning rate would fall below 0 after total_steps. Raise total_steps, or leave it out"
        )
    for name in job_config.model.converters:
        if name not in CONVERTERS:
            raise ValueError(
                f'[model] converters: "{name}" is unknown. Known: {", ".join(CONVERTERS) or "none"}; a module named by '
                "experimental.custom_import can add others"
            )
    if job_config.comm.mode != "default":
        raise ValueError(
            f'[comm] mode = "{job_config.comm.mode}": a teacher needs the losses of real ranks. Leave it at "default"'
        )


def _check_checkpoint(job_config: JobConfig) -> None:
    config = job_config.checkpoint
    if config.last_save_in_hf and not config.last_save_model_only:  # torchtitan refuses it only at the last save
        raise ValueError(
            "[checkpoint] last_save_in_hf = true: that format holds weights only. Set last_save_model_only = true"
        )
    if (config.last_save_in_hf or config.initial_load_in_hf) and importlib.util.find_spec("safetensors") is None:
        raise ValueError(
            "[checkpoint] last_save_in_hf and initial_load_in_hf need the package safetensors: pip install safetensors"
        )
    folder = Path(job_config.job.dump_folder) / config.folder
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(
            f"[job] dump_folder = {job_config.job.dump_folder}: {nearest} cannot be written to. Choose another folder"
        )
    check_sources(job_config)


def _check_machine(job_config: JobConfig) -> None:
    """Refuse settings that need an accelerator if this machine has none."""
    checkpoint, profiling = job_config.checkpoint, job_config.profiling
    if not compat.IS_CPU:
        return
    if checkpoint.enable and checkpoint.async_mode == "async_with_pinned_mem":
        raise ValueError(
            '[checkpoint] async_mode = "async_with_pinned_mem": there is no accelerator to copy from. Set it to "async"'
        )
    for key in ("enable_profiling", "enable_memory_snapshot"):
        if getattr(profiling, key):
            raise ValueError(f"[profiling] {key} = true: torchtitan profiles accelerators only. Set it to false")
