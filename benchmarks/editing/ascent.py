"""Gradient ascent, the usual baseline of unlearning: a system that turns the sign of the loss around.

It is no part of the product: ``job.custom_config_module = "benchmarks.editing.ascent"`` adds it to a run.
"""

from dataclasses import dataclass, field
from typing import Any

from titan_attent import job_config
from titan_attent.systems.system import Batch, LossFunction, StepLoss, System


@dataclass
class AscentConfig:
    enable: bool = False
    """Whether the loss is to rise."""


@dataclass
class JobConfig(job_config.JobConfig):
    """The sections of titan_attent.job_config, and ``[ascent]``."""

    ascent: AscentConfig = field(default_factory=AscentConfig)


class Ascent(System):
    name = "ascent"

    @classmethod
    def is_on(cls, config: AscentConfig) -> bool:
        return config.enable

    def wrap_loss(self, loss: LossFunction) -> LossFunction:
        def turned(pred: Any, batch: Batch) -> StepLoss:
            inner = loss(pred, batch)
            return inner._replace(to_differentiate=-inner.to_differentiate)

        return turned


SYSTEMS = (Ascent,)
