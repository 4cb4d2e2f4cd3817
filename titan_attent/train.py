"""The command: ``torchrun ... -m titan_attent.train --job.config_file X.toml [--section.key value ...]``.

Parses the configuration, runs every check of preflight.py, registers the model's ``_attent`` twin and hands over to
torchtitan's own ``main``. A user's mistake ends all ranks with exit code 2 and one message, from rank 0.
"""

import contextlib
import io
import os
import sys

CUSTOM_CONFIG = "titan_attent.job_config"


def _option(argv: list[str], name: str) -> str | None:
    """The value of ``--name value`` or ``--name=value``."""
    for i, arg in enumerate(argv):
        key, equals, value = arg.partition("=")
        if key.replace("-", "_") == f"__{name}":
            return value if equals else "".join(argv[i + 1 : i + 2])
    return None


def main() -> None:
    if "LOCAL_RANK" not in os.environ:
        sys.exit(
            "titan_attent: start it with torchrun --nproc_per_node=N -m titan_attent.train --job.config_file X.toml"
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # The TOML may leave out job.custom_config_module. Before torchtitan's import, which copies sys.argv into a default.
    if _option(sys.argv, "job.custom_config_module") is None:
        sys.argv += ["--job.custom_config_module", CUSTOM_CONFIG]
    argv = sys.argv[1:]

    import titan_attent.compat as compat

    from torchtitan.config import ConfigManager
    from torchtitan.protocols.train_spec import register_train_spec
    from torchtitan.train import main as torchtitan_main

    from titan_attent import preflight
    from titan_attent.train_spec import attent_spec
    from titan_attent.trainer import TeachingTrainer

    try:
        config_file = _option(argv, "job.config_file")
        if config_file is not None:
            preflight.check_toml(config_file)
        # tyro reports a bad command line itself and exits; one rank's report is enough.
        with contextlib.nullcontext() if rank == 0 else contextlib.redirect_stderr(io.StringIO()):
            job_config = ConfigManager().parse_args(argv)
        spec = attent_spec(job_config.model.name)
        preflight.check_run(job_config, spec, world_size=world_size)
    except ValueError as error:
        preflight.fail(error)
    register_train_spec(job_config.model.name, spec)
    compat.mend_tensorboard(resumed=preflight.checkpoint_to_load(job_config) is not None)
    torchtitan_main(TeachingTrainer)


if __name__ == "__main__":
    main()
