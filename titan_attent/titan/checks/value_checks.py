"""Values of torchtitan's own keys that it takes without a word and fails on later, or trains wrongly with.

torchtitan checks the command line's types and choices, nothing in a TOML, and few ranges. Here every key is held
against the type that its section declares, the keys that a user is likely to change against their range, and those
that depend on each other or on the machine against that. What needs the number of processes is parallelism.py's.

Cost: reads the configuration and the flavor's sizes; a directory or two of checkpoints.
"""

import importlib.util
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from torchtitan.config import JobConfig
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.model_converter import _registry_model_converter_cls as CONVERTERS
from torchtitan.protocols.train_spec import TrainSpec

from titan_attent.foundations.checks import check_number, check_one_of, closest
from titan_attent.titan.checks.load_sources import check_sources
from titan_attent.titan.patches import compat

RANGES: dict[str, dict[str, Any]] = {
    "training.steps": {"at_least": 0, "whole": True},
    "training.local_batch_size": {"at_least": 1, "whole": True},
    "training.seq_len": {"at_least": 1, "whole": True},
    "training.max_norm": {"above": 0, "finite": False},  # 0 would train nothing, a negative one away from the goal
    "training.gc_freq": {"at_least": 1, "whole": True},
    "optimizer.lr": {"at_least": 0},
    "optimizer.beta1": {"at_least": 0, "below": 1},
    "optimizer.beta2": {"at_least": 0, "below": 1},
    "optimizer.eps": {"at_least": 0},
    "optimizer.weight_decay": {"at_least": 0},
    "lr_scheduler.warmup_steps": {"at_least": 0, "whole": True},
    "lr_scheduler.decay_ratio": {"at_least": 0, "at_most": 1},
    "lr_scheduler.min_lr_factor": {"at_least": 0, "at_most": 1},
    "metrics.log_freq": {"at_least": 1, "whole": True},
    "comm.init_timeout_seconds": {"at_least": 1, "whole": True},
    "comm.train_timeout_seconds": {"at_least": 1, "whole": True},
    "comm.trace_buf_size": {"at_least": 0, "whole": True},
    "activation_checkpoint.memory_budget": {"at_least": 0, "at_most": 1},
    "debug.seed": {"at_least": -(2**63), "below": 2**63, "whole": True},
}
"""Bounds of :func:`check_number`; a key that is None is not looked at."""

RANGES_WHERE_ENABLED: dict[str, dict[str, Any]] = {
    "validation.local_batch_size": {"at_least": 1, "whole": True},
    "validation.seq_len": {"at_least": 1, "whole": True},
    "validation.freq": {"at_least": 1, "whole": True},
    "checkpoint.interval": {"at_least": 1, "whole": True},
    "checkpoint.keep_latest_k": {"at_least": 0, "whole": True},
    "checkpoint.load_step": {"at_least": -1, "whole": True},
}
"""The same, where the section's ``enable`` is set."""

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", type(None): "left out"}


def check_values(job_config: JobConfig) -> None:
    """Refuse values that no run can have on this machine."""
    for section in fields(job_config):
        check_types(getattr(job_config, section.name), where=section.name)
    for path, bounds in (RANGES | RANGES_WHERE_ENABLED).items():
        name, _, key = path.partition(".")
        section_values = getattr(job_config, name)
        value = getattr(section_values, key)
        if value is not None and (path in RANGES or section_values.enable):
            check_number(key, value, section=name, **bounds)
    _check_training(job_config)
    if job_config.checkpoint.enable:
        _check_checkpoint(job_config)
    if job_config.compile.enable:
        _check_compile(job_config)
    _check_activation_checkpoint(job_config)
    _check_debugging(job_config)


def check_types(section: Any, *, where: str) -> None:
    """Refuse what a TOML may hold and the section's declaration does not allow, sections within it included."""
    for declared in fields(section):
        value, kind = getattr(section, declared.name), declared.type
        if is_dataclass(value):
            check_types(value, where=f"{where}.{declared.name}")
            continue
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        if any(kind in KINDS and _is_a(value, kind) for kind in kinds):
            continue
        for kind in kinds:
            if get_origin(kind) is Literal:
                check_one_of(declared.name, value, get_args(kind), section=where)
        if all(kind in KINDS for kind in kinds):
            allowed = " or ".join(KINDS[kind] for kind in kinds if kind is not type(None))
            raise ValueError(f"[{where}] {declared.name} = {value!r}: it must be {allowed}")


def _is_a(value: object, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def check_flavor(spec: TrainSpec, *, model: str, flavor: str) -> None:
    """ValueError for a flavor that ``model`` has not; ``spec`` is the model's."""
    if flavor not in spec.model_args:
        raise ValueError(
            f'[model] flavor = "{flavor}" is unknown to {model}{closest(flavor, spec.model_args)} '
            f"Known: {', '.join(spec.model_args)}"
        )


def check_fit(job_config: JobConfig, model_args: BaseModelArgs) -> None:
    """Refuse what the model cannot take: longer validation examples than it is built for, attention of GPUs."""
    validation, training = job_config.validation, job_config.training
    if validation.enable and validation.seq_len > training.seq_len:
        raise ValueError(
            f"[validation] seq_len = {validation.seq_len} is above [training] seq_len = {training.seq_len}, the "
            f"length that the model is built for: give --validation.seq_len {training.seq_len}, or less"
        )
    if getattr(model_args, "attn_type", "sdpa") == "varlen" and compat.IS_CPU:
        raise ValueError(
            f'[model] flavor = "{job_config.model.flavor}": its attention (varlen) runs on GPUs only. Choose a flavor '
            "without"
        )


def _check_training(job_config: JobConfig) -> None:
    training, scheduler = job_config.training, job_config.lr_scheduler
    if training.global_batch_size != -1 and training.global_batch_size < 1:
        raise ValueError(
            f"[training] global_batch_size = {training.global_batch_size}: it must be at least 1, or -1 for "
            "local_batch_size x data-parallel ranks"
        )
    check_one_of("name", job_config.optimizer.name, ("Adam", "AdamW"), section="optimizer")
    if scheduler.total_steps is not None and scheduler.total_steps < training.steps:
        raise ValueError(
            f"[lr_scheduler] total_steps = {scheduler.total_steps} is below [training] steps = {training.steps}: the "
            "learning rate would fall below 0 in the rest. Raise it, or leave it out"
        )
    module = job_config.experimental.custom_import
    if module and not _is_importable(module):
        raise ValueError(f"[experimental] custom_import = {module}: there is no such module; check PYTHONPATH")
    for name in job_config.model.converters:
        if name not in CONVERTERS and not module:
            raise ValueError(
                f'[model] converters: "{name}" is unknown. Known: {", ".join(CONVERTERS) or "none"}; others come with '
                "the module that experimental.custom_import names"
            )


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _check_checkpoint(job_config: JobConfig) -> None:
    config = job_config.checkpoint
    if config.keep_latest_k == 1:
        raise ValueError(
            "[checkpoint] keep_latest_k = 1: the last one may be half-written when it is needed. Set it to 2 or more, "
            "or to 0 to keep all"
        )
    if config.async_mode == "async_with_pinned_mem" and compat.IS_CPU:
        raise ValueError(
            '[checkpoint] async_mode = "async_with_pinned_mem": there is no accelerator to copy from. Set it to "async"'
        )
    if config.create_seed_checkpoint and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("[checkpoint] create_seed_checkpoint = true: start it with one process")
    if config.last_save_in_hf and not config.last_save_model_only:
        raise ValueError(
            "[checkpoint] last_save_in_hf = true: that format holds a model only. Set last_save_model_only = true"
        )
    if (config.last_save_in_hf or config.initial_load_in_hf) and importlib.util.find_spec("safetensors") is None:
        raise ValueError("[checkpoint] last_save_in_hf, initial_load_in_hf: pip install safetensors first")
    folder = Path(job_config.job.dump_folder) / config.folder
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(
            f"[job] dump_folder = {job_config.job.dump_folder}: {nearest} cannot be written to. Choose another folder"
        )
    check_sources(job_config)


def _check_compile(job_config: JobConfig) -> None:
    import torch._dynamo

    config = job_config.compile
    for name in config.components:
        check_one_of("components", name, ("model", "loss"), section="compile")
    backends = tuple(torch._dynamo.list_backends(exclude_tags=()))
    check_one_of("backend", config.backend, backends, section="compile")


def _check_activation_checkpoint(job_config: JobConfig) -> None:
    config, compiled = job_config.activation_checkpoint, job_config.compile
    if config.mode == "memory_budget" and not (compiled.enable and "model" in compiled.components):
        raise ValueError(
            '[activation_checkpoint] mode = "memory_budget" needs a compiled model: set compile.enable = true, or '
            'another mode, such as "selective"'
        )
    option = config.selective_ac_option
    if config.mode == "selective" and option != "op" and not (option.isdigit() and int(option) > 0):
        raise ValueError(
            f'[activation_checkpoint] selective_ac_option = "{option}": it must be "op" or every how many layers, '
            'such as "2"'
        )


def _check_debugging(job_config: JobConfig) -> None:
    profiling = job_config.profiling
    if compat.IS_CPU:
        for key in ("enable_profiling", "enable_memory_snapshot"):
            if getattr(profiling, key):
                raise ValueError(f"[profiling] {key} = true: torchtitan profiles accelerators only. Set it to false")
    least = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < least:
        raise ValueError(
            f"[profiling] profile_freq = {profiling.profile_freq} must be at least profiler_warmup + profiler_active = "
            f"{least}"
        )
    if job_config.comm.mode != "default":
        raise ValueError(
            f'[comm] mode = "{job_config.comm.mode}": a teacher needs the losses of real ranks. Leave it at "default"'
        )
