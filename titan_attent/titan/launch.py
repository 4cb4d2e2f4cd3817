"""Starts a run from a command line: ``python -m titan_attent.train``, and the parsing that the scorer shares with it.

Parses the configuration, sets defaults that depend on the machine, runs every check of preflight.py, registers the
model's ``_attent`` twin and calls torchtitan's own ``main``. A user's mistake ends all ranks with exit code 2 and one
message, from rank 0.
"""

import contextlib
import io
import os
from functools import partial
from typing import Any
from unittest.mock import patch

from torchtitan.config import ConfigManager, JobConfig
from torchtitan.protocols.train_spec import register_train_spec
from torchtitan.tools.logging import init_logger
from torchtitan.train import main as torchtitan_main

from titan_attent.first_checks import arguments, option
from titan_attent.systems.system_list import FORMER_KEYS, RENAMED, check_given
from titan_attent.titan.checks import preflight, toml_checks
from titan_attent.titan.checks.load_sources import check_start, checkpoint_to_load
from titan_attent.titan.checks.resume_checks import finished_message
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.frozen_model import check_frozen
from titan_attent.titan.patches import compat, cpu, log_filter
from titan_attent.titan.settings import CUSTOM_CONFIG
from titan_attent.titan.train_spec import SCORER_FLAVORS, attent_spec
from titan_attent.titan.trainer import TeachingTrainer
from titan_attent.titan.user_errors import end_without_error, fail, wait_for_first_rank


def scored_data(job_config: JobConfig) -> str:
    """``data.path`` if the model is a scorer, which takes its vocabulary from the data; else an empty string."""
    return job_config.data.path if job_config.model.flavor in SCORER_FLAVORS else ""


def given_keys(toml: dict[str, Any], argv: list[str]) -> set[str]:
    """The keys that a TOML file or a command line names, as ``section.key``."""
    in_file = {f"{name}.{key}" for name, section in toml.items() if isinstance(section, dict) for key in section}
    options = (arg.partition("=")[0].removeprefix("--").replace("-", "_") for arg in argv if arg.startswith("--"))
    return in_file | {option.replace(".no_", ".") for option in options}


def parse(argv: list[str]) -> JobConfig:
    """Parse the job configuration; ValueError for a mistake in the TOML. A bad command line ends the process.

    Sets up torchtitan's log format; on a CPU, lines about GPUs are filtered out.
    """
    init_logger()
    if compat.IS_CPU:
        log_filter.install()
    for arg in argv:
        name = arg.partition("=")[0].removeprefix("--").replace("-", "_")
        if (former := name.partition(".")[0]) in RENAMED and arg.startswith(f"--{former}."):
            raise ValueError(f"{arg}: the section [{former}] was renamed to [{RENAMED[former]}]; use that name")
        if arg.startswith("--") and name in FORMER_KEYS:
            raise ValueError(f"{arg}: {FORMER_KEYS[name]}")
    config_file, module = option(argv, "job.config_file"), option(argv, "job.custom_config_module")
    toml = toml_checks.check_toml(config_file, module=module) if config_file is not None else {}
    if module is None and not toml.get("job", {}).get("custom_config_module"):  # the key is optional
        argv = [*argv, "--job.custom_config_module", CUSTOM_CONFIG]
    # tyro reports a bad command line itself and exits; the report of one rank is enough.
    is_first = os.environ["RANK"] == "0"
    with contextlib.nullcontext() if is_first else contextlib.redirect_stderr(io.StringIO()):
        try:
            job_config = ConfigManager().parse_args(argv)
        except AssertionError as error:  # raised by torchtitan's own checks of a section
            raise ValueError(str(error)) from None
        except SystemExit as end:
            if end.code:  # --help exits with 0
                wait_for_first_rank()
            raise
    check_given(job_config, given_keys(toml, argv))
    if compat.IS_CPU:
        training, key = job_config.training, "mixed_precision_param"
        written = key in toml.get("training", {}) or option(argv, f"training.{key}") is not None
        training.mixed_precision_param = cpu.default_precision(training.mixed_precision_param, written=written)
    return job_config


def train() -> None:
    """Run the training command."""
    argv = arguments("titan_attent.train")

    try:
        job_config = parse(argv)
        datasets = DataSets()
        spec = attent_spec(job_config.model.name, datasets, data=scored_data(job_config))
        check_start(job_config)
        preflight.check_run(
            job_config,
            spec,
            world_size=int(os.environ["WORLD_SIZE"]),
            datasets=datasets,
            check_frozen=partial(check_frozen, job_config),
        )
    except ValueError as error:
        fail(error)
    if finished := finished_message(job_config):
        end_without_error(finished)
    register_train_spec(job_config.model.name, spec)
    compat.continue_tensorboard(resumed=checkpoint_to_load(job_config) is not None)
    # torchtitan parses the command line again, which would lose the defaults set here.
    with patch.object(ConfigManager, "parse_args", lambda manager: job_config):
        torchtitan_main(TeachingTrainer)
