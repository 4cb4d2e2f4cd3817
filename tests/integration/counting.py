"""A test system that counts steps; it shows everything that an external system needs.

At the end of the run it writes its counts to the file that the environment variable ``COUNTED`` names.
"""

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from titan_attent import job_config
from titan_attent.systems.settings import RunSettings
from titan_attent.systems.system import (
    Batch,
    Columns,
    DataFacts,
    ExampleStats,
    LossFunction,
    Panel,
    Run,
    StepLoss,
    System,
)


@dataclass
class CountingConfig:
    enable: bool = False
    """Whether to count."""

    factor: float = 1.0
    """Factor of the loss."""

    zero_head: bool = False
    """Start with a head of zeros, so that every token of the vocabulary is equally likely."""


@dataclass
class JobConfig(job_config.JobConfig):
    """The sections of titan_attent.job_config, and the section of this system."""

    counting: CountingConfig = field(default_factory=CountingConfig)


class Counting(System):
    name = "counting"
    columns = ("is_odd",)
    keeps_state = True
    panels = (Panel("steps counted", ("counting/steps",), from_zero=True),)

    @classmethod
    def is_on(cls, config: CountingConfig) -> bool:
        return config.enable

    @classmethod
    def check_values(cls, config: CountingConfig) -> None:
        if config.factor <= 0:
            raise ValueError(f"[counting] factor = {config.factor} is not above 0: set 1 for the plain loss")

    @classmethod
    def check(cls, config: CountingConfig, settings: RunSettings) -> None:
        if (degree := settings.degrees.context) > 1:
            raise ValueError(f"[counting] enable = true with context_parallel_degree = {degree}: set it to 1")

    @classmethod
    def check_data(cls, config: CountingConfig, facts: DataFacts) -> None:
        if len(facts.dataset) < 3 * facts.batch_size:
            raise ValueError("[counting] enable = true needs three batches of examples: write more data")

    def __init__(self, run: Run, config: CountingConfig):
        super().__init__(run, config)
        self.steps, self.begun_at = 0, -1
        self.initialised, self.microbatches, self.backwards, self.odd, self.wrong = 0, 0, 0, 0, 0

    def set_initial_weights(self) -> None:
        self.initialised += 1
        if self.config.zero_head:
            for part in self.run.model_parts:
                nn.init.zeros_(part.get_parameter("output.weight"))

    def before_first_step(self) -> None:
        self.begun_at = self.run.step()

    def read_columns(self, example_ids: Any) -> Columns:
        return {"is_odd": example_ids % 2}

    def wrap_loss(self, loss: LossFunction) -> LossFunction:
        def multiplied(pred: Any, batch: Batch) -> StepLoss:
            inner = loss(pred, batch)
            return inner._replace(to_differentiate=inner.to_differentiate * self.config.factor)

        return multiplied

    @contextmanager
    def around_backward(self) -> Any:
        self.backwards += 1
        yield

    def after_microbatch(self, batch: Batch, stats: ExampleStats | None) -> None:
        self.microbatches += 1
        self.odd += int(batch.columns["is_odd"].sum())
        self.wrong += int((batch.columns["is_odd"] != batch.examples % 2).sum())
        assert stats is not None and bool((stats["loss"] > 0).all())  # from the loss of the previous system

    def after_step(self) -> None:
        self.steps += 1

    def metrics(self) -> dict[str, float]:
        return {"counting/steps": float(self.steps)}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def close(self) -> None:
        if self.run.rank == 0:
            names = ("initialised", "steps", "begun_at", "microbatches", "backwards", "odd", "wrong")
            Path(os.environ["COUNTED"]).write_text(json.dumps({name: getattr(self, name) for name in names}))


SYSTEMS = (Counting,)
