"""All checks of a run before the first process group, so that a mistake costs seconds and one message, not a GPU hour.

They read the configuration, the indexes of the data, the fit of data, batch and model, and the checkpoint that the run
would resume from. Each failure is a ValueError that says what is wrong, where, and how to fix it. Every rank runs the
same checks on the same small files. Shards, of which there may be many, are checked after the process group exists
(:func:`check_files`), each rank its share.

Cost: two small files and the metadata of one checkpoint per rank; over all ranks together one stat per shard, and
4 bytes per example if losses on disk are read.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torchtitan.config import JobConfig
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.logging import logger

from titan_attent.data.examples import Examples
from titan_attent.data.validation_sets import ValidationSet, validation_sets
from titan_attent.foundations.checks import check_number
from titan_attent.systems.settings import SUFFIX, RunSettings
from titan_attent.systems.system import DataFacts, System
from titan_attent.systems.system_list import SystemOn
from titan_attent.titan.checks.dump_folder import check_dump_folder
from titan_attent.titan.checks.groups import check_groups, check_validation_groups
from titan_attent.titan.checks.parallelism import check_parallelism, check_split
from titan_attent.titan.checks.resume_checks import check_checkpoint
from titan_attent.titan.checks.torchtitan_ranges import check_torchtitan_ranges
from titan_attent.titan.checks.value_checks import check_fit, check_flavor, check_values
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.document_mask import check_document_mask
from titan_attent.titan.loader import geometry_of, global_batch_size
from titan_attent.titan.mixtures import check_mixture, proportions_within
from titan_attent.titan.models.families import family_of
from titan_attent.titan.models.family import Family
from titan_attent.titan.settings import check_sections, setting_of, settings_of, systems_of, with_validation_set
from titan_attent.titan.user_errors import on_all_ranks


def check_run(
    job_config: JobConfig,
    spec: TrainSpec,
    *,
    world_size: int,
    datasets: DataSets | None = None,
    trains: bool = True,
    check_frozen: Callable[..., Any] = lambda checkpoint, **model: None,
) -> DataFacts:
    """Run all checks of a parsed configuration, except those of the shards (:func:`check_files`); opens ``datasets``.

    Returns the facts of the run, for its plan.

    Args:
        trains: whether the run trains; scoring does not read the sections of systems.
        check_frozen: the function of frozen_model.py, for systems that run a second model.
    """
    datasets = datasets or DataSets()
    family, model = family_of(job_config), job_config.model

    check_values(job_config)
    check_torchtitan_ranges(job_config)
    check_number("num_workers", job_config.data.num_workers, section="data", at_least=0, whole=True)
    check_number("group_size", job_config.data.group_size, section="data", at_least=1, whole=True)
    dp_degree = check_parallelism(job_config, world_size=world_size)
    family.modality.check(job_config)
    validation_sets(job_config.data)
    if trains:
        check_sections(job_config)

    settings = settings_of(job_config, world_size=world_size)
    systems = systems_of(job_config) if trains else []
    check_needs(family, [system for system, _ in systems])
    check_systems(systems, settings)

    check_flavor(spec, model=model.name, flavor=model.flavor)
    model_args = spec.model_args[model.flavor]
    check_document_mask(job_config, spec)
    check_fit(job_config, model_args)
    check_split(job_config, model_args)

    batch_size = check_batch_size(job_config, dp_degree=dp_degree)
    dataset = open_examples(job_config, datasets, model_args)
    check_one_batch(job_config, dataset, batch_size=batch_size)
    check_mixture(job_config, dataset)
    check_groups(job_config, dataset, batch_size=batch_size)
    facts = DataFacts(
        dataset=dataset,
        batch_size=batch_size,
        open_scores=datasets.scores,
        settings=settings,
        check_frozen=check_frozen,
        proportions=proportions_within(job_config, dataset),
        loss=family.modality.loss(job_config),
        num_ids=getattr(model_args, "vocab_size", 0),
    )
    check_systems_data(systems, facts)
    for one in validated(job_config):
        examples = open_examples(job_config, datasets, model_args, validation=one)
        check_validation_groups(job_config, examples, key=one.key)
    warn_of_unread_keys(job_config)

    check_checkpoint(job_config, spec, geometry_of(job_config, dataset, batch_size=batch_size))
    if trains:
        setting = setting_of(job_config, dataset, batch_size=batch_size)
        check_dump_folder(job_config, setting=setting)
    return facts


def check_needs(family: Family, systems: Iterable[type[System]]) -> None:
    """Refuse a system that needs a feature which the model's family lacks."""
    for system in systems:
        for need in system.needs:
            if need in family.lacks:
                raise ValueError(f"[{system.name}] with {family.name}{SUFFIX}: {family.lacks[need]}. Set {system.off}")


def check_systems(systems: Iterable[SystemOn], settings: RunSettings) -> None:
    """Let every system that is on refuse its section and the run's settings."""
    for system, config in systems:
        system.check(config, settings)


def check_systems_data(systems: Iterable[SystemOn], facts: DataFacts) -> None:
    """Let every system that is on refuse the data."""
    for system, config in systems:
        system.check_data(config, facts)


def check_batch_size(job_config: JobConfig, *, dp_degree: int) -> int:
    """The number of examples per training step; ValueError if it does not split evenly over the ranks."""
    training = job_config.training
    local = training.local_batch_size * dp_degree
    batch_size = global_batch_size(job_config, dp_world_size=dp_degree)
    if batch_size % local:
        raise ValueError(
            f"[training] global_batch_size = {batch_size} must be a multiple of local_batch_size x data-parallel ranks "
            f"= {training.local_batch_size} x {dp_degree} = {local}: change one of the three"
        )
    return batch_size


def validated(job_config: JobConfig) -> tuple[ValidationSet, ...]:
    """The validation sets that a run reads; one without a folder where it validates and names none."""
    if not job_config.validation.enable:
        return ()
    return validation_sets(job_config.data) or (ValidationSet("", ""),)


def open_examples(
    job_config: JobConfig, datasets: DataSets, model_args: BaseModelArgs, *, validation: ValidationSet | None = None
) -> Examples:
    """Open the examples of a run, or of one of its validation sets; ValueError if they are missing or do not fit the
    model."""
    modality, key, path = family_of(job_config).modality, "path", job_config.data.path
    if validation is not None:
        key, path = validation.key, validation.path
    if not path:
        raise ValueError(f"[data] {key} is empty: give the folder of a data set, written by {modality.writer}")
    try:
        if validation is None:
            examples = modality.open(datasets, job_config)
        else:
            examples = modality.open(datasets, with_validation_set(job_config, path), validation=True)
    except (ValueError, OSError) as error:
        raise ValueError(f"[data] {key}: {error}") from None
    model = f"{job_config.model.name} {job_config.model.flavor}"
    modality.check_fit(examples, model_args, model=model, key=key)
    return examples


def check_one_batch(job_config: JobConfig, dataset: Examples, *, batch_size: int) -> None:
    """Refuse data with fewer examples than one global batch."""
    if dataset.num_rows < batch_size:
        raise ValueError(
            f"[data] path = {job_config.data.path} holds {dataset.num_rows} examples of {dataset.tokens_per_example} "
            f"tokens, fewer than one global batch of {batch_size}: write more data, or lower "
            "training.global_batch_size or the number of tokens per example"
        )


def warn_of_unread_keys(job_config: JobConfig) -> None:
    """Warn of torchtitan's own settings of reading that were changed, because they have no effect."""
    stock = JobConfig()
    for section in ("training", "validation"):
        if getattr(job_config, section).dataloader != getattr(stock, section).dataloader:
            logger.warning(f"[{section}] dataloader is not read: titan_attent reads its data as [data] says")


def check_files(job_config: JobConfig, datasets: DataSets) -> None:
    """Check the files of the data, each rank its share.

    The sizes of all shards are compared with their index, and their checksums too if ``data.verify_checksums`` is set.
    Losses on disk are read, and a loss that is not finite is refused. This is the only check that needs the process
    group: one rank finds a damaged shard, and all ranks must end.

    Raises:
        ValueError: the same on all ranks, with the message of the first rank whose check failed.
    """
    modality = family_of(job_config).modality
    opened = [modality.open(datasets, job_config).stored]
    for one in validated(job_config):
        opened.append(modality.open(datasets, with_validation_set(job_config, one.path), validation=True).stored)
    rank, world_size = 0, 1
    if torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def check_share() -> None:
        for stored in opened:
            shards = range(rank, stored.num_shards, world_size)
            stored.check_sizes(shards)
            if job_config.data.verify_checksums:
                stored.verify_checksums(shards)
        datasets.check_scores(rank=rank, num_ranks=world_size)
        if job_config.data.verify_checksums and rank == 0:
            datasets.verify_scores()

    on_all_ranks(check_share)
