"""Checks before the first process group: a mistake costs seconds and one message, not a GPU hour.

Everything a run reads is looked at once: the configuration, the token shards, the fit of data, batch and model, and the
checkpoint that it would resume from. Each failure is a ValueError that says what is wrong, where, and how to mend it.
Every rank runs the same checks on the same small files. The shards, of which there may be many, are shared out over
the ranks as soon as these can talk to each other.

Cost: two small files and the metadata of one checkpoint a rank; over all ranks together one stat per shard, and 4 bytes
per example where losses on disk are read.
"""

import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.logging import logger

from titan_attent.data.examples import Examples
from titan_attent.foundations.checks import closest
from titan_attent.job_config import JobConfig as OurSections
from titan_attent.systems.settings import SUFFIX
from titan_attent.systems.system import DataFacts, System
from titan_attent.systems.system_list import FORMER_KEYS, RENAMED
from titan_attent.titan.checks.parallelism import check_parallelism, check_split
from titan_attent.titan.checks.resume_checks import check_checkpoint
from titan_attent.titan.checks.value_checks import check_fit, check_flavor, check_values
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.loader import geometry_of, global_batch_size
from titan_attent.titan.models.families import family_of
from titan_attent.titan.models.family import Family
from titan_attent.titan.settings import CUSTOM_CONFIG, check_sections, settings_of, systems_from, systems_of
from titan_attent.titan.user_errors import on_all_ranks

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def sections_of(module: str) -> type:
    """The JobConfig of ``job.custom_config_module``; a ValueError if it has not this package's sections."""
    try:
        custom = importlib.import_module(module).JobConfig
    except (ImportError, AttributeError) as error:
        raise ValueError(f"[job] custom_config_module = {module}: {error}; check the name, and PYTHONPATH") from None
    missing = {f.name for f in fields(OurSections)} - {f.name for f in fields(custom)}
    if missing:
        raise ValueError(
            f"[job] custom_config_module = {module}: its JobConfig lacks {', '.join(sorted(missing))}; derive it from "
            f"that of {CUSTOM_CONFIG}"
        )
    for system in systems_from(module):
        if system.name not in {f.name for f in fields(custom)}:
            raise ValueError(
                f'[job] custom_config_module = {module}: its JobConfig has no section "{system.name}" for the system '
                f"{system.__name__}; add it"
            )
    return custom


def check_toml(path: str, *, module: str | None = None) -> dict[str, Any]:
    """The values of a TOML file; refuses a missing or malformed one and keys that no section has, with a hint.

    ``module``: of the sections beside torchtitan's own, if the command line names one.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"the config file {path} does not exist: check --job.config_file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    job = values.get("job")
    named = job.get("custom_config_module") if isinstance(job, dict) else None
    custom = sections_of(module or named or CUSTOM_CONFIG)
    for former in RENAMED.keys() & values.keys() - {f.name for f in fields(custom)}:
        raise ValueError(f"{path}: the section [{former}] is named [{RENAMED[former]}] now; rename it")
    _check_keys(values, ConfigManager._merge_configs(JobConfig, custom), where="", path=path)
    return values


def _check_keys(values: dict[str, Any], section: type, *, where: str, path: str) -> None:
    known = {f.name: f.type for f in fields(section)}
    for key, value in values.items():
        place = f"[{where}]" if where else "the top level"
        if key not in known and (instead := FORMER_KEYS.get(f"{where}.{key}")):
            raise ValueError(f"{path}: [{where}] {key}: {instead}")
        if key not in known:
            raise ValueError(
                f'{path}: unknown key "{key}" in {place}{closest(key, known)} Known there: {", ".join(sorted(known))}'
            )
        kind = known[key]
        if isinstance(kind, type) and is_dataclass(kind):
            name = f"{where}.{key}" if where else key
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {name} is a section: write [{name}] and its keys below it")
            _check_keys(value, kind, where=name, path=path)


def _check_batch_size(job_config: JobConfig, *, dp_degree: int) -> int:
    """Examples of a training step; refuses one that does not split evenly."""
    training = job_config.training
    local = training.local_batch_size * dp_degree
    batch_size = global_batch_size(job_config, dp_world_size=dp_degree)
    if batch_size % local:
        raise ValueError(
            f"[training] global_batch_size = {batch_size} must be a multiple of local_batch_size x data-parallel ranks "
            f"= {training.local_batch_size} x {dp_degree} = {local}: change one of the three"
        )
    return batch_size


def _open(
    job_config: JobConfig, datasets: DataSets, model_args: BaseModelArgs, *, validation: bool = False
) -> Examples:
    """The examples of a run, which its model can take."""
    modality, key = family_of(job_config).modality, "validation_path" if validation else "path"
    if not getattr(job_config.data, key):
        raise ValueError(f"[data] {key} is empty: give the folder of a data set, written by {modality.writer}")
    try:
        examples = modality.open(datasets, job_config, validation=validation)
    except (ValueError, OSError) as error:
        raise ValueError(f"[data] {key}: {error}") from None
    model = f"{job_config.model.name} {job_config.model.flavor}"
    modality.check_fit(examples, model_args, model=model, key=key)
    return examples


def warn_of_unread_keys(job_config: JobConfig) -> None:
    """torchtitan's own data settings have no effect here; say so to whoever set them."""
    stock = JobConfig()
    for section in ("training", "validation"):
        for key in ("dataset", "dataset_path", "dataloader"):
            if vars(getattr(job_config, section))[key] != vars(getattr(stock, section))[key]:
                logger.warning(f"[{section}] {key} is not read: titan_attent reads its data as [data] says")


def check_needs(family: Family, systems: Iterable[type[System]]) -> None:
    """Refuse a system that needs what the learner's family lacks."""
    for system in systems:
        for need in system.needs:
            if need in family.lacks:
                raise ValueError(f"[{system.name}] with {family.name}{SUFFIX}: {family.lacks[need]}. Set {system.off}")


def check_run(
    job_config: JobConfig,
    spec: TrainSpec,
    *,
    world_size: int,
    datasets: DataSets | None = None,
    trains: bool = True,
    check_frozen: Callable[..., Any] = lambda checkpoint, **model: None,
) -> None:
    """All checks of a parsed configuration, except those of the shards (:func:`check_files`); opens ``datasets``.

    Args:
        trains: whether the run trains; scoring does not read the sections of systems.
        check_frozen: of frozen_model.py, for systems that run a second model.
    """
    datasets = datasets or DataSets()
    data = job_config.data
    check_values(job_config)
    dp_degree = check_parallelism(job_config, world_size=world_size)
    family_of(job_config).modality.check(job_config)
    if trains:
        check_sections(job_config)
    settings = settings_of(job_config, world_size=world_size)
    systems = systems_of(job_config) if trains else []
    check_needs(family_of(job_config), [system for system, _ in systems])
    for system, config in systems:
        system.check(config, settings)
    batch_size = _check_batch_size(job_config, dp_degree=dp_degree)
    flavor = job_config.model.flavor
    check_flavor(spec, model=job_config.model.name, flavor=flavor)
    check_fit(job_config, spec.model_args[flavor])
    check_split(job_config, spec.model_args[flavor])
    dataset = _open(job_config, datasets, spec.model_args[flavor])
    if len(dataset) < batch_size:
        raise ValueError(
            f"[data] path = {data.path} holds {len(dataset)} examples of {dataset.tokens_per_example} tokens, fewer "
            f"than one global batch of {batch_size}: write more data, or lower training.global_batch_size or the "
            "size of an example"
        )
    loss = family_of(job_config).modality.loss(job_config)
    facts = DataFacts(
        dataset=dataset,
        batch_size=batch_size,
        open_reference=datasets.reference,
        settings=settings,
        check_frozen=check_frozen,
        loss=loss,
    )
    for system, config in systems:
        system.check_data(config, facts)
    if job_config.validation.enable:
        _open(job_config, datasets, spec.model_args[flavor], validation=True)
    if data.num_workers < 0:
        raise ValueError(f"[data] num_workers = {data.num_workers}: it must be at least 0")
    warn_of_unread_keys(job_config)
    check_checkpoint(job_config, spec, geometry_of(job_config, dataset, batch_size=batch_size))


def check_files(job_config: JobConfig, datasets: DataSets) -> None:
    """Compare the sizes of all shards with their index, each rank its part, and their checksums if the run asks for it.
    Losses on disk are read, each rank its part: one that is not finite is refused.

    The only check that needs the process group: a damaged shard is known to one rank, and must end them all.

    Raises:
        ValueError: the same on all ranks: the message of the first rank that found something or could not look.
    """
    modality = family_of(job_config).modality
    opened = [modality.open(datasets, job_config).stored]
    if job_config.validation.enable:
        opened.append(modality.open(datasets, job_config, validation=True).stored)
    rank, world_size = 0, 1
    if torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def look() -> None:
        for stored in opened:
            mine = range(rank, stored.num_shards, world_size)
            stored.check_sizes(mine)
            if job_config.data.verify_checksums:
                stored.verify_checksums(mine)
        datasets.check_references(rank=rank, num_ranks=world_size)
        if job_config.data.verify_checksums and rank == 0:
            datasets.verify_references()

    on_all_ranks(look)
