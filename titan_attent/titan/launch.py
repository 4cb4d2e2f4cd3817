"""Starts a run from a command line: ``python -m titan_attent.train``, and the parsing that the scorer shares with it.

Parses the configuration, sets defaults that depend on the machine, runs every check of preflight.py, registers the
model's ``_attent`` twin and calls torchtitan's own ``main``. A user's mistake ends all ranks with exit code 2 and one
message, from rank 0. With ``--check`` only the checks are made, in one process, and the plan of the run is printed.
"""

import contextlib
import io
import os
import sys
from functools import partial
from typing import Any
from unittest.mock import patch

from torchtitan.config import ConfigManager, JobConfig
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.tools.logging import init_logger, logger
from torchtitan.train import main as torchtitan_main

from titan_attent.systems.system import DataFacts
from titan_attent.systems.system_list import FORMER_KEYS, RENAMED, check_given
from titan_attent.titan.checks import preflight, toml_checks
from titan_attent.titan.checks.load_sources import check_start, checkpoint_to_load
from titan_attent.titan.checks.resume_checks import finished_message
from titan_attent.titan.checks.unread_paths import check_unread_paths
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.first_checks import CUSTOM_CONFIG, arguments, check_option, option
from titan_attent.titan.frozen_model import check_frozen
from titan_attent.titan.models.families import add_families, family_of
from titan_attent.titan.patches import compat, cpu, log_filter
from titan_attent.titan.run_plan import lines_of, plan_of
from titan_attent.titan.train_spec import attent_spec
from titan_attent.titan.trainer import TeachingTrainer
from titan_attent.titan.user_errors import end_without_error, fail, wait_for_first_rank


def spec_of(job_config: JobConfig, datasets: DataSets) -> TrainSpec:
    """The TrainSpec of the run's model, with the vocabulary of its data; ValueError for an unknown name.

    If the data cannot be opened, the flavors keep their vocabulary: the checks of the run refuse the data by its key.
    """
    data = "" if family_of(job_config).modality.is_of_images else job_config.data.path
    with contextlib.suppress(ValueError, OSError):
        if data:
            datasets.shards(data)
            return attent_spec(job_config.model.name, datasets, data=data)
    return attent_spec(job_config.model.name, datasets)


def log_vocabulary(job_config: JobConfig, spec: TrainSpec, datasets: DataSets) -> None:
    """Log the vocabulary of the run's model on the first rank if it follows the data; call it after the checks."""
    model, path = job_config.model, job_config.data.path
    if family_of(job_config).modality.is_of_images or os.environ["RANK"] != "0":
        return
    size = vars(spec.model_args[model.flavor])["vocab_size"]
    own = vars(attent_spec(model.name).model_args.get(model.flavor, spec.model_args[model.flavor]))["vocab_size"]
    if own != size:
        num_ids = datasets.shards(path).tokenizer_info["vocab_size"]
        former = f", and not the {own:,} of the flavor" if own else ""
        logger.info(f"{model.name} {model.flavor} has {size:,} token ids{former}: the data {path} has {num_ids:,}")


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
    add_families(job_config.job.custom_config_module)
    given = given_keys(toml, argv)
    check_given(job_config, given)
    check_unread_paths(job_config, given)
    toml_checks.run_custom_import(job_config.experimental.custom_import)
    if compat.IS_CPU:
        training, key = job_config.training, "mixed_precision_param"
        written = key in toml.get("training", {}) or option(argv, f"training.{key}") is not None
        training.mixed_precision_param = cpu.default_precision(training.mixed_precision_param, written=written)
    return job_config


def check(argv: list[str], *, world_size: int) -> int:
    """Check a run of ``world_size`` processes in this process alone, and print its plan; trains and writes nothing.

    All checks of a training run are made, on all shards, except those that need its processes or its weights. Returns
    0, or 1 with the message that would end the run.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0  # started by torchrun: one process is enough
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}  # read by the checks
    try:
        job_config, datasets = parse(argv), DataSets()
        spec = spec_of(job_config, datasets)
        facts = check_configuration(job_config, spec, datasets, world_size=world_size)
        preflight.check_files(job_config, datasets)
        if finished := finished_message(job_config):
            print(f"titan_attent: {finished}")
            return 0
        plan = plan_of(job_config, spec, facts, world_size=world_size)
    except ValueError as error:
        print(f"titan_attent: error: {error}", file=sys.stderr, flush=True)
        return 1
    print("\n".join(lines_of(plan, job_config, facts)))
    return 0


def check_configuration(job_config: JobConfig, spec: TrainSpec, datasets: DataSets, *, world_size: int) -> DataFacts:
    """All checks of a training run before its first process group; ValueError."""
    check_start(job_config)
    return preflight.check_run(
        job_config, spec, world_size=world_size, datasets=datasets, check_frozen=partial(check_frozen, job_config)
    )


def train() -> None:
    """Run the training command."""
    try:
        argv, planned_size = check_option(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"titan_attent: error: {error}")
    if planned_size is not None:
        sys.exit(check(argv, world_size=planned_size))
    argv = arguments("titan_attent.train")

    try:
        job_config = parse(argv)
        datasets = DataSets()
        spec = spec_of(job_config, datasets)
        check_configuration(job_config, spec, datasets, world_size=int(os.environ["WORLD_SIZE"]))
    except ValueError as error:
        fail(error)
    if finished := finished_message(job_config):
        end_without_error(finished)
    log_vocabulary(job_config, spec, datasets)
    register_train_spec(job_config.model.name, spec)
    compat.continue_tensorboard(resumed=checkpoint_to_load(job_config) is not None)
    # torchtitan parses the command line again, which would lose the defaults set here.
    with patch.object(ConfigManager, "parse_args", lambda manager: job_config):
        torchtitan_main(TeachingTrainer)
