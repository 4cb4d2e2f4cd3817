"""What the parts of titan/ must know of a family of models: one object each, listed in families.py."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torchtitan.config import JobConfig
from torchtitan.protocols import BaseModelArgs

from titan_attent.data.examples import Examples
from titan_attent.losses.cross_entropy import WeightedLoss
from titan_attent.systems.system import System
from titan_attent.titan.dataset_cache import DataSets


class Modality(Protocol):
    """What differs between learners of text and of images, for the parts that serve both.

    Attributes:
        learner: what such a learner is, for the report.
        metrics: names of what is counted beside the loss in validation.
        is_of_images: whether throughput is told in images, too.
        writer: the command that makes its data sets.
        systems: that such a learner may have beside those of every run.
    """

    learner: str
    metrics: tuple[str, ...]
    is_of_images: bool
    writer: str
    systems: tuple[type[System], ...]

    def check(self, job_config: JobConfig) -> None:
        """Refuse what such a learner cannot do; ValueError."""

    def open(self, datasets: DataSets, job_config: JobConfig, *, validation: bool = False) -> Examples:
        """The examples of a run; ValueError if there are none."""

    def check_fit(self, examples: Examples, model_args: BaseModelArgs, *, model: str, key: str) -> None:
        """Refuse examples that the model cannot take; ``model`` and ``key`` are names for the message."""

    def example_loss(self, job_config: JobConfig) -> Callable[..., WeightedLoss]:
        """What builds the loss of every example, by the arguments of losses/build.py."""

    def loss(self, job_config: JobConfig) -> str:
        """What that loss is called, with what changes its value: two of one name may be compared."""

    def validated(self, job_config: JobConfig) -> str:
        """What ``validation_metrics/loss`` is the mean of, whatever the run is taught by: as :meth:`loss`."""

    def measured(self, job_config: JobConfig, examples: Examples) -> dict[str, Any]:
        """What two runs must share for their validations to compare, beside data and number of examples."""

    def count_correct(self, pred: Tensor, labels: Tensor) -> Tensor:
        """fp64 [metrics], summed over a batch."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one architecture.

    Attributes:
        name: ``model.name`` is "<name>_attent".
        modality: what its learners read, and how they are judged.
        lacks: what it cannot do -> why, and what to set instead. Keys are dimensions of ``[parallelism]`` without their
            ``_degree``, and what systems need (:attr:`System.needs`).
    """

    name: str
    modality: Modality
    lacks: Mapping[str, str] = field(default_factory=dict)
