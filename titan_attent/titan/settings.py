"""Converts torchtitan's JobConfig into the objects that the rest of the package uses: settings, systems, run record.

No module outside titan/ reads a JobConfig; it uses RunSettings of systems/settings.py instead.
"""

import importlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig

from titan_attent.data.examples import Examples
from titan_attent.data.io.reader import batches_ahead
from titan_attent.data.plan.packed import CONCATENATE
from titan_attent.data.run_record import RunRecord, fingerprint_of
from titan_attent.data.text.document_examples import DOCUMENT, DocumentDataset
from titan_attent.data.validation_sets import validation_sets
from titan_attent.job_config import JobConfig as OurSections
from titan_attent.systems.settings import Degrees, RunSettings
from titan_attent.systems.system import System
from titan_attent.systems.system_list import RENAMED, SYSTEMS, SystemOn, check_values, systems_on
from titan_attent.titan.first_checks import CUSTOM_CONFIG
from titan_attent.titan.models.families import family_of

RESERVED = {"model", "optimizer", "lr_scheduler", "dataloader", "train_state", "ledger", "vision", "mot"}
"""Names of the other states of a checkpoint, which no system of another module may have."""

WITHOUT_EFFECT = {
    *("data.path", "data.validation_path", "data.validation_sets", "data.num_workers", "data.verify_checksums"),
    "teacher.trace",
}
"""Keys in which two runs of one result may differ; of data the fingerprints are compared."""


def degrees_of(parallelism: Any, *, world_size: int | None = None) -> Degrees:
    """The degrees of torchtitan's ``[parallelism]``.

    A shard degree of -1 becomes ``world_size`` divided by the other degrees. ``world_size`` defaults to WORLD_SIZE of
    the environment.
    """
    degrees = {
        "replicate": parallelism.data_parallel_replicate_degree,
        "context": parallelism.context_parallel_degree,
        "tensor": parallelism.tensor_parallel_degree,
        "pipeline": parallelism.pipeline_parallel_degree,
    }
    shard = parallelism.data_parallel_shard_degree
    if shard == -1:
        product = 1
        for degree in degrees.values():
            product *= degree
        shard = max(1, (world_size or int(os.environ.get("WORLD_SIZE", "1"))) // product)
    return Degrees(**degrees, shard=shard, expert=parallelism.expert_parallel_degree)


def settings_of(job_config: JobConfig, *, world_size: int | None = None) -> RunSettings:
    """The settings of the run that ``job_config`` describes; its values must have been checked."""
    training, parallelism, compiled = job_config.training, job_config.parallelism, job_config.compile
    return RunSettings(
        family=family_of(job_config).name,
        steps=training.steps,
        seq_len=training.seq_len,
        local_batch_size=training.local_batch_size,
        data_seed=job_config.data.seed,
        dump_folder=Path(job_config.job.dump_folder),
        log_every=job_config.metrics.log_freq,
        degrees=degrees_of(parallelism, world_size=world_size),
        pipeline_schedule=parallelism.pipeline_parallel_schedule,
        compiles_model=compiled.enable and "model" in compiled.components,
        compiles_loss=compiled.enable and "loss" in compiled.components,
        compile_backend=compiled.backend,
        activation_checkpointing=job_config.activation_checkpoint.mode,
        vocab_parallel=parallelism.tensor_parallel_degree > 1 and not parallelism.disable_loss_parallel,
        steps_in_backward=job_config.optimizer.early_step_in_backward,
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        mixes_examples=job_config.vision.mixes,
        cuts_examples=job_config.data.unit == DOCUMENT and job_config.data.packing == CONCATENATE,
        group_size=job_config.data.group_size,
        batches_read_ahead=batches_ahead(job_config.data.num_workers),
    )


def with_validation_set(job_config: JobConfig, path: str) -> JobConfig:
    """The configuration of a run that validates on the one set in the folder ``path``."""
    data: Any = job_config.data
    changed: Any = {"data": replace(data, validation_path=path, validation_sets={})}
    return replace(job_config, **changed)


GROUP_SIZE = "data.group_size"
"""Recorded where examples have groups: without it they have none."""


def document_settings(job_config: JobConfig) -> dict[str, Any]:
    """The settings that decide which documents are trained together, and what each of them sees."""
    data = job_config.data
    groups = {GROUP_SIZE: data.group_size} if data.group_size > 1 else {}
    return {
        "data.unit": DOCUMENT,
        "data.packing": data.packing,
        "data.max_examples_per_window": data.max_examples_per_window,
        "data.document_mask": data.document_mask,
        **groups,
    }


def systems_from(name: str) -> Sequence[type[System]]:
    """The systems that the module ``name`` of ``job.custom_config_module`` lists in ``SYSTEMS``.

    Raises:
        ValueError: an entry is not a System, or its name is empty or taken.
    """
    systems = tuple(getattr(importlib.import_module(name), "SYSTEMS", ()))
    where = f"[job] custom_config_module = {name}"
    taken = {system.name for system in SYSTEMS} | RENAMED.keys() | RESERVED
    for system in systems:
        if not (isinstance(system, type) and issubclass(system, System)):
            raise ValueError(
                f"{where}: {system!r} in its SYSTEMS is not a class derived from titan_attent.systems.system.System"
            )
        if not getattr(system, "name", ""):
            raise ValueError(f"{where}: the system {system.__name__} has no name; set it to the name of its section")
        if system.name in taken:
            raise ValueError(f'{where}: the name "{system.name}" of a system is taken; choose another')
        taken.add(system.name)
    return systems


def systems_of(job_config: JobConfig) -> list[SystemOn]:
    """The systems that take part in a run, each with its section, in the order in which they are called."""
    return systems_on(job_config, from_outside=_extra_systems(job_config))


def check_sections(job_config: JobConfig) -> None:
    """Let every system, on or off, refuse values of its section; ValueError."""
    check_values(job_config, from_outside=_extra_systems(job_config))


def _extra_systems(job_config: JobConfig) -> Sequence[type[System]]:
    """The systems of the run's modality, and those that its ``custom_config_module`` lists."""
    return *family_of(job_config).modality.systems, *systems_from(job_config.job.custom_config_module or CUSTOM_CONFIG)


def describe(
    job_config: JobConfig,
    dataset: Examples,
    *,
    batch_size: int,
    device: torch.device,
    systems: Sequence[type[System]] = (),
) -> RunRecord:
    """The run record that the report reads (data/run_record.py), for a run with these systems."""
    modality, steps, data = family_of(job_config).modality, job_config.validation.steps, job_config.data
    measured = {
        "validation data": _validation_data(data),
        "validated examples": steps * batch_size if steps > 0 else "all",
        "learner": modality.learner,
        **modality.measured(job_config, dataset),
    }
    return RunRecord(
        path=data.path,
        validation_path=data.validation_path,
        fingerprint=dataset.stored.fingerprint,
        batch_size=batch_size,
        tokens_per_example=dataset.tokens_per_example,
        measured=measured,
        setting=setting_of(job_config, dataset, batch_size=batch_size),
        configured=configured_of(job_config),
        devices=_devices(device),
        systems=tuple(_for_report(system) for system in systems if system not in SYSTEMS),
    )


def _validation_data(data: Any) -> Any:
    """The fingerprint of the validation data, with several sets of each, with their names and weights."""
    sets = validation_sets(data)
    if not any(one.name for one in sets):
        return fingerprint_of(data.validation_path)
    return "; ".join(f"{one.name} {fingerprint_of(one.path)} x {one.weight:g}" for one in sets)


def setting_of(job_config: JobConfig, dataset: Examples, *, batch_size: int) -> dict[str, Any]:
    """The settings of a run, beside those of systems, that two runs may differ in."""
    return {
        "model": f"{job_config.model.name} {job_config.model.flavor}",
        "data": dataset.stored.fingerprint,
        "global batch": batch_size,
        "tokens of an example": dataset.tokens_per_example,
        "training.steps": job_config.training.steps,
        "optimizer.lr": job_config.optimizer.lr,
        "debug.seed": job_config.debug.seed,
        "data.seed": job_config.data.seed,
        **(document_settings(job_config) if isinstance(dataset, DocumentDataset) else {}),
    }


def chosen_of(configured: Mapping[str, Any], job_config: JobConfig) -> dict[str, Any]:
    """The keys of ``configured`` (:func:`configured_of`) of the package's and the systems' sections.

    Keys that change no result, and the folders of data, whose fingerprints are recorded, are left out.
    """
    names = {one.name for one in fields(OurSections)} | {system.name for system in _extra_systems(job_config)}
    own = {key: value for key, value in configured.items() if key.partition(".")[0] in names}
    return {key: own[key] for key in sorted(own.keys() - WITHOUT_EFFECT)}


def configured_of(section: Any, prefix: str = "") -> dict[str, Any]:
    """The keys of a configuration that are not at their default, as ``section.key``."""
    configured: dict[str, Any] = {}
    for key in fields(section):
        value, name = getattr(section, key.name), f"{prefix}{key.name}"
        if is_dataclass(value):
            configured |= configured_of(value, f"{name}.")
        elif value != _default(key):
            configured[name] = value if isinstance(value, (str, int, float, type(None))) else str(value)
    return configured


def _default(key: Field[Any]) -> Any:
    return key.default_factory() if key.default_factory is not MISSING else key.default


def _for_report(system: type[System]) -> dict[str, Any]:
    """The name, units and panels of a system of another module, which the report does not know."""
    return {"name": system.name, "units": dict(system.tag_units), "panels": [asdict(panel) for panel in system.panels]}


def _devices(device: torch.device) -> str:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda":
        return f"{world} x {torch.cuda.get_device_name(device)}"
    return f"{world} x {device.type} of {platform.node()}"
