"""What differs between learners of text and of images, for the parts that serve both.

Text is here; images are in vision.py. Which one a run is follows from ``model.name``.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torchtitan.config import JobConfig
from torchtitan.protocols import BaseModelArgs

from titan_attent.data.examples import Examples
from titan_attent.data.text.same_tokens import check_same_tokens
from titan_attent.losses.build import build_example_loss
from titan_attent.losses.cross_entropy import WeightedLoss
from titan_attent.scores.reference import CROSS_ENTROPY
from titan_attent.systems.system import System
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.models import vision


class Kind(Protocol):
    """Of a learner.

    Attributes:
        measures: names of what is counted beside the loss in validation.
        writer: the command that makes its data sets.
        systems: that such a learner may have beside those of every run.
    """

    measures: tuple[str, ...]
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

    def count(self, pred: Tensor, labels: Tensor) -> Tensor:
        """fp64 [measures], summed over a batch."""


class Text:
    """Windows of tokens (``[data]`` of titan_attent.data.text), and the next token after each."""

    measures: tuple[str, ...] = ()
    writer = "python -m titan_attent.data.text"
    systems: tuple[type[System], ...] = ()

    def check(self, job_config: JobConfig) -> None:
        """Nothing beside what parallelism.py and value_checks.py refuse."""

    def open(self, datasets: DataSets, job_config: JobConfig, *, validation: bool = False) -> Examples:
        path, section = (
            (job_config.data.validation_path, job_config.validation)
            if validation
            else (job_config.data.path, job_config.training)
        )
        if validation:
            check_same_tokens(datasets.shards(path), datasets.shards(job_config.data.path), what="")
        return datasets.dataset(path, seq_len=section.seq_len)

    def check_fit(self, examples: Any, model_args: Any, *, model: str, key: str) -> None:
        shards, vocab_size = examples.shards, model_args.vocab_size
        if shards.max_token_id >= vocab_size:
            raise ValueError(
                f"[data] {key} = {shards.path} holds token id {shards.max_token_id}, beyond the {vocab_size} of "
                f"{model}: choose a flavor with a larger vocabulary, or write the data with a smaller tokenizer"
            )

    def example_loss(self, job_config: JobConfig) -> Callable[..., WeightedLoss]:
        return build_example_loss

    def loss(self, job_config: JobConfig) -> str:
        return CROSS_ENTROPY

    def validated(self, job_config: JobConfig) -> str:
        return CROSS_ENTROPY

    def count(self, pred: Tensor, labels: Tensor) -> Tensor:
        raise AssertionError("there is nothing to count")


def kind_of(job_config: JobConfig) -> Kind:
    """The kind of a run's learner."""
    return {"vit_attent": vision.Images, "mae_attent": vision.Patches}.get(job_config.model.name, Text)()
