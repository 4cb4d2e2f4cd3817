"""Logs which settings of a resumed run differ from those of the run that wrote its checkpoint.

A checkpoint records the settings of its run beside the geometry of its data (loader.py), as one string of some 8 KB.
What may change is in docs/reference/runs.md: values that must be equal are refused by ``check_geometry`` and
resume_checks.py; learning rate, betas, eps and weight decay are named by resumed_schedule.py; here is the rest.
Checkpoints of earlier versions hold no record, so nothing is logged for them.

Cost: the configuration, once per start.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

SETTINGS = "settings"
"""The key of the record in the geometry that a checkpoint stores."""
PROCESSES = "number of processes"

NO_EFFECT = {"job", "metrics", "profiling", "checkpoint", "comm", "memory_estimation"}
"""Sections that change neither what is learned nor how it is computed."""
NO_EFFECT_KEYS = {
    *("model.hf_assets_path", "model.tokenizer_path", "model.print_after_conversion"),
    *("data.path", "data.num_workers", "data.verify_checksums", "teacher.trace", "teacher.scoring_batch_size"),
    *("training.dataset", "training.dataset_path", "training.gc_freq", "training.gc_debug"),
    *("validation.dataset", "validation.dataset_path"),
}
"""Keys of other sections without such an effect; the data themselves are compared by their fingerprint."""
LOGGED_ELSEWHERE = {f"optimizer.{key}" for key in ("lr", "beta1", "beta2", "eps", "weight_decay")}
"""Settings that resumed_schedule.py compares with the optimizer's own state."""
COMPARED = {"training.seq_len", "training.global_batch_size", "data.seed"}
"""Settings whose effective value must be equal (``geometry_of``); -1 may stand for the same batch size."""
EXECUTION = {"parallelism", "compile", "activation_checkpoint"}
"""Sections that decide how a step is computed, and that change its results by rounding only."""
EXECUTION_KEYS = {
    *("training.local_batch_size", "training.enable_cpu_offload", "optimizer.implementation", "teacher.loss_chunks"),
    PROCESSES,
}


def recorded_settings(job_config: JobConfig) -> dict[str, Any]:
    """The settings that a checkpoint records: "section.key" -> JSON value, and the number of processes."""
    settings = {
        key: value
        for section in fields(job_config)
        if section.name not in NO_EFFECT
        for key, value in _flat(getattr(job_config, section.name), section.name)
        if key not in NO_EFFECT_KEYS | LOGGED_ELSEWHERE | COMPARED and ".dataloader." not in key
    }
    settings[PROCESSES] = int(os.environ.get("WORLD_SIZE", "1"))
    return json.loads(json.dumps(settings, default=str))


def log_changes(stored: object, current: Mapping[str, Any], *, where: str) -> None:
    """Log on rank 0 one line per setting that differs; keys that one of the two does not have are left out.

    Args:
        stored: the record of the checkpoint, None if it has none.
        current: :func:`recorded_settings` of this run.
        where: names the checkpoint.
    """
    if os.environ.get("RANK", "0") != "0" or not isinstance(stored, dict):
        return
    for key, value in current.items():
        if key in stored and stored[key] != value:
            is_execution = key in EXECUTION_KEYS or key.partition(".")[0] in EXECUTION
            logger.log(
                logging.INFO if is_execution else logging.WARNING,
                f"Resuming with {_named(key)} = {json.dumps(value)} instead of {json.dumps(stored[key])}, which "
                f"{where} was written with",
            )


def _named(key: str) -> str:
    section, _, name = key.rpartition(".")
    return f"[{section}] {name}" if section else name


def _flat(section: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of each key of a section, nested sections included."""
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _flat(value, f"{name}.{field.name}")
        else:
            yield f"{name}.{field.name}", value
