"""What the server of forked processes has imported, for this tier and for tests/distributed.

Not the commands themselves, which run as ``__main__``, and nothing that keeps state of a run.
"""

import titan_attent.titan.patches.compat  # noqa: F401

import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401
import torch.distributed.tensor  # noqa: F401
import torchtitan.train  # noqa: F401
from parsing import skip_missing_sources
from torchtitan.config import ConfigManager

import titan_attent.titan.checks.preflight  # noqa: F401
import titan_attent.titan.launch  # noqa: F401
import titan_attent.titan.train_spec  # noqa: F401
import titan_attent.titan.trainer  # noqa: F401

# Once for all workers: tyro keeps the documentation that it reads from the sources.
skip_missing_sources()
ConfigManager().parse_args(["--job.custom_config_module", "titan_attent.job_config"])
