"""Tasks: one command each, with its configuration, which is also its identity; and the TOML of a run on small text.

A run on text is fp32, with a three-layer decoder of 0.9 M parameters (the flavor ``bench``), 32 rows of 96 tokens per
step, a learning rate that falls linearly to zero at the run's own end, and validation on held-out rows.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common.rules import UNBOUNDED
from benchmarks.corpora.stdlib_code import Sizes

Config = dict[str, dict[str, Any]]
"""The TOML of a run, section by section."""

BATCH_SIZE = 32
LEARNING_RATE = 1e-2
"""The best of 3e-3, 6e-3 and 1e-2 for the control on clean text."""
FORWARD_COST = 1 / 3
"""The cost of a forward pass, in training steps on the same batch."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One command: ``torchrun -m module`` with ``config`` as its TOML, in ``folder``; all paths are below DIR.

    ``config`` is also its identity: a result of another configuration is not this task's result.
    """

    folder: str
    module: str
    config: Config
    arguments: tuple[str, ...] = ()
    """Further arguments of the command."""
    labels: dict[str, Any] = field(default_factory=dict)
    """Keys of its result that name it, such as rule and seed."""
    needs: tuple[str, ...] = ()
    """The folders of the tasks that must have finished first."""

    @property
    def steps(self) -> int:
        return self.config["training"]["steps"]


FORMER_KEYS = {"anneal_fraction": "full_data_tail", "shadow": "dry_run"}
"""Key of ``[teacher]`` in earlier results -> its name."""


def in_words_of_today(config: Config, wanted: Config) -> Config:
    """Return a result's configuration with today's keys, to be compared with the ``wanted`` one.

    Earlier results name each scorer's folder by a key of its own, and know no ``max_repeats``: nothing bounded them.
    """
    if "teacher" not in config:
        return config
    teacher = {FORMER_KEYS.get(key, key): value for key, value in config["teacher"].items()}
    folders = [folder for key in ("reference_path", "amateur_path") if (folder := teacher.pop(key, ""))]
    if folders:
        # The folders of a pair were S/expert/losses and S/amateur/losses once, in the vision evidence.
        folders = [re.sub(r"/(expert|amateur)/losses$", r"/losses/\1", folder) for folder in folders]
        teacher["scores"] = folders[0] if len(folders) == 1 else folders[0].rpartition("/")[0]
    if "max_repeats" not in teacher and wanted.get("teacher", {}).get("max_repeats") == UNBOUNDED:
        teacher["max_repeats"] = UNBOUNDED
    return config | {"teacher": teacher}


def divisor(number: int, *, at_most: int) -> int:
    return max(d for d in range(1, at_most + 1) if number % d == 0)


def run_config(folder: str, *, data: str, teacher: dict[str, Any], seed: int, steps: int, lr: float) -> Config:
    """The TOML of a training run on text."""
    seq_len = Sizes().seq_len
    return {
        "job": {"dump_folder": folder, "custom_config_module": "titan_attent.job_config"},
        "model": {"name": "llama3_attent", "flavor": "bench"},
        "data": {"path": f"corpora/{data}", "validation_path": "corpora/validation", "num_workers": 1, "seed": seed},
        "teacher": teacher | {"trace": True, "seed": seed},
        "training": {
            "local_batch_size": BATCH_SIZE,
            "seq_len": seq_len,
            "steps": steps,
            "mixed_precision_param": "float32",
        },
        "optimizer": {"lr": lr},
        "lr_scheduler": {"warmup_steps": max(1, steps // 20), "decay_type": "linear", "min_lr_factor": 0.0},
        # torchtitan logs and validates only at multiples of these: divisors of the steps include the last step.
        "metrics": {"log_freq": divisor(steps, at_most=10), "enable_tensorboard": True},
        "validation": {
            "enable": True,
            "local_batch_size": BATCH_SIZE,
            "seq_len": seq_len,
            "freq": divisor(steps, at_most=100),
            "steps": -1,
        },
        "checkpoint": {"enable": False},
        "activation_checkpoint": {"mode": "none"},
        "debug": {"seed": seed},
    }
