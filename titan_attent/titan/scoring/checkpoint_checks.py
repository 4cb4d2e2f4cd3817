"""``titan_attent.score checkpoint``: its options, the settings that it takes from a run's configuration, and its
checks.
"""

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import TrainSpec

from titan_attent.data.examples import Examples
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.foundations.checks import closest
from titan_attent.scores.stored import ROLES, Scoring
from titan_attent.scores.writer import ScoresWriter
from titan_attent.systems.distillation.config import DistillationConfig
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.titan.checkpoint_metadata import read_metadata
from titan_attent.titan.checks import preflight
from titan_attent.titan.checks.load_sources import check_checkpoint_path, warn_of_pickles
from titan_attent.titan.checks.resume_checks import check_shapes
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.models.families import family_of


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's own options; all other arguments are the run's configuration."""

    output: str
    """Folder to write."""
    role: str = ""
    """The role of the model, one of ``ROLES``, or empty."""


def scoring_config(job_config: JobConfig) -> JobConfig:
    """Return the same object, with the training settings reset: teacher, batch, checkpoints and logs."""
    job_config.teacher = TeacherConfig()  # its scores may be those that this command writes
    job_config.distillation = DistillationConfig()  # its targets, too
    job_config.training.local_batch_size, job_config.training.global_batch_size = 1, -1
    job_config.validation.enable = False
    # The checkpoint manager would load the run's latest checkpoint instead of the one that is named here.
    job_config.checkpoint.enable = False
    job_config.metrics.enable_tensorboard = job_config.metrics.enable_wandb = False
    job_config.activation_checkpoint.mode = "none"  # there is no backward pass
    job_config.job.save_config_file = None
    job_config.comm.trace_buf_size = 0  # else torchtitan creates a folder for traces in the run's folder
    return job_config


def check_scoring(
    job_config: JobConfig,
    spec: TrainSpec,
    options: Options,
    *,
    world_size: int,
    datasets: DataSets | None = None,
) -> None:
    """All checks of a configuration from :func:`scoring_config` against its files; ValueError as in preflight.py."""
    dataset = check_scored_run(job_config, spec, world_size=world_size, datasets=datasets or DataSets())
    writer_of(job_config, dataset, options)


def check_scored_run(job_config: JobConfig, spec: TrainSpec, *, world_size: int, datasets: DataSets) -> Examples:
    """The checks of :func:`check_scoring` without those of the folder that is written. Returns the examples."""
    check_checkpoint_path(job_config.checkpoint.initial_load_path)
    read_metadata(path := str(job_config.checkpoint.initial_load_path))
    warn_of_pickles(path)
    preflight.check_run(job_config, spec, world_size=world_size, datasets=datasets, trains=False)
    if preflight.check_parallelism(job_config, world_size=world_size) != world_size:
        raise ValueError(
            "[parallelism] titan_attent.score supports data parallelism only; the scores do not depend on it. Give "
            "--parallelism.tensor_parallel_degree 1, and so on for pipeline and context"
        )
    if (batch_size := job_config.validation.local_batch_size) < 1:
        raise ValueError(f"[validation] local_batch_size = {batch_size}: it must be at least 1")
    return family_of(job_config).modality.open(datasets, job_config)


def check_weights(weights: dict[str, Tensor], path: str) -> None:
    """Refuse a checkpoint of a model other than that with ``weights``: other names, more layers, or other shapes."""
    check_shapes({name: list(weight.shape) for name, weight in weights.items()}, read_metadata(path), path)


def writer_of(job_config: JobConfig, dataset: Examples, options: Options) -> ScoresWriter:
    """The writer of the losses; a ValueError if the folder belongs to another scoring."""
    return ScoresWriter(options.output, scoring=scoring_of(job_config, dataset, role=options.role))


def parse_options(argv: list[str]) -> tuple[Options, list[str]]:
    """The command's own options, and all other arguments; ValueError for a missing or unknown value."""
    parser = argparse.ArgumentParser(
        prog="torchrun ... -m titan_attent.score checkpoint",
        description="Write the losses of a checkpoint's model on every example of the data. The same command resumes "
        "a killed one. All other options are those of titan_attent.train; checkpoint.initial_load_path names the "
        "weights.",
        allow_abbrev=False,
        add_help="--help" in argv or "-h" in argv,
        exit_on_error=False,
    )
    parser.add_argument("--output", default="", metavar="DIR", help="folder to write")
    parser.add_argument("--role", default="", metavar="|".join(ROLES), help="role of the model for the data")
    try:
        parsed, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error.argument_name}: {error.message}; --role is one of {', '.join(ROLES)}") from None
    if not parsed.output:
        raise ValueError("--output is missing: name the folder to write the losses to")
    if parsed.role and parsed.role not in ROLES:
        raise ValueError(f"--role {parsed.role}{closest(parsed.role, ROLES)} It must be one of {', '.join(ROLES)}")
    return Options(**vars(parsed)), rest


def scoring_of(job_config: JobConfig, dataset: Examples, *, role: str = "") -> Scoring:
    """Everything that determines the losses. ``role``: see :class:`Scoring`."""
    path = Path(job_config.checkpoint.initial_load_path).resolve()
    # A whole document is read in spans, whose length changes its loss a little, but not the data that scores name.
    spans = f", spans of {dataset.seq_len}" if isinstance(dataset, DocumentDataset) else ""
    return Scoring(
        **dataset.scored._asdict(),
        model=f"{job_config.model.name} {job_config.model.flavor}{spans}",
        precision=job_config.training.mixed_precision_param,
        checkpoint=str(path),
        checkpoint_sha256=hashlib.sha256((path / ".metadata").read_bytes()).hexdigest(),
        loss=family_of(job_config).modality.loss(job_config),
        role=role,
    )
