"""The interface of a family of models and of its modality; families.py lists the families."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torchtitan.config import JobConfig
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec

from titan_attent.data.examples import Examples
from titan_attent.losses.cross_entropy import WeightedLoss
from titan_attent.systems.system import System
from titan_attent.titan.dataset_cache import DataSets


class Modality(Protocol):
    """The differences between training on text and on images, for the modules that serve both.

    Attributes:
        learner: the type of model, as the report calls it.
        metrics: names of the metrics that :meth:`count_correct` counts in validation.
        is_of_images: whether throughput is logged in images, too.
        writer: the command that writes its data sets.
        systems: systems that only this modality has.
    """

    learner: str
    metrics: tuple[str, ...]
    is_of_images: bool
    writer: str
    systems: tuple[type[System], ...]

    def check(self, job_config: JobConfig) -> None:
        """Refuse settings that the modality does not support; ValueError."""

    def open(self, datasets: DataSets, job_config: JobConfig, *, validation: bool = False) -> Examples:
        """Open the examples of a run; ValueError if there are none."""

    def check_fit(self, examples: Examples, model_args: BaseModelArgs, *, model: str, key: str) -> None:
        """Refuse examples that the model cannot process; ``model`` and ``key`` are names for the message."""

    def example_loss(self, job_config: JobConfig, *, validation: bool = False) -> Callable[..., WeightedLoss]:
        """A function that builds the loss of every example, or the loss that validation averages of it, from the
        arguments of losses/build.py."""

    def loss(self, job_config: JobConfig) -> str:
        """The name of that loss with every setting that changes its value; losses of one name are comparable."""

    def validated(self, job_config: JobConfig) -> str:
        """The name of the loss that ``validation_metrics/loss`` averages, in the form of :meth:`loss`."""

    def measured(self, job_config: JobConfig, examples: Examples) -> dict[str, Any]:
        """The settings that must agree for two runs' validation losses to be comparable.

        The data and the number of examples, which must agree too, are not included.
        """

    def count_correct(self, pred: Tensor, labels: Tensor) -> Tensor:
        """The counts of :attr:`metrics`, fp64 [metrics], summed over a batch."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """The models of one architecture.

    Attributes:
        name: ``model.name`` is "<name>_attent".
        modality: the data that its models read, and how they are evaluated.
        train_spec: returns torchtitan's TrainSpec of the model, as it would train on its own: model, flavors,
            parallelisation, optimizer, schedule and loss. Data, validation and metrics are replaced by the package's
            (titan/train_spec.py). None for the TrainSpec that torchtitan has by this name.
        lacks: unsupported feature -> the reason and the fix. Keys are dimensions of ``[parallelism]`` without
            ``_degree``, and needs of systems (:attr:`System.needs`).
    """

    name: str
    modality: Modality
    train_spec: Callable[[], TrainSpec] | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)
