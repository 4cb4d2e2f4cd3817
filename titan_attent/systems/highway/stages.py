"""Highway backpropagation between pipeline stages as a system of a run: it puts its schedule in the place of
torchtitan's (stagewise.py), and steps aside in the last ``exact_fraction`` of the steps.

Cost: that of the schedule. Nothing else happens in a step.
"""

from typing import Any

from titan_attent.systems.highway import checks
from titan_attent.systems.highway.config import HighwayConfig
from titan_attent.systems.highway.stagewise import HighwaySchedule, highway_schedule
from titan_attent.systems.settings import RunSettings
from titan_attent.systems.system import Run, System


class HighwayStages(System):
    """``[highway] cut = "stage"``. It has no state: its steps follow from the configuration."""

    name = "highway"
    former_name = "backward"
    needs = ("tokens", "residual blocks")
    off = 'method = "exact"'

    @classmethod
    def is_on(cls, config: HighwayConfig) -> bool:
        return config.method == "highway" and config.cut == "stage"

    @classmethod
    def check(cls, config: HighwayConfig, settings: RunSettings) -> None:
        config.validate()
        checks.check_stages(settings)

    def __init__(self, run: Run, config: HighwayConfig):
        super().__init__(run, config)
        steps = run.settings.steps
        self.last_cut_step = steps - round(config.exact_fraction * steps)
        self.iterations = config.iterations
        self.own: HighwaySchedule | None = None

    def wrap_schedule(self, schedule: Any) -> Any:
        self.own = highway_schedule(schedule, self.iterations)
        return self.own

    def before_first_step(self) -> None:
        self._set(self.run.step() + 1)

    def after_step(self) -> None:
        self._set(self.run.step() + 1)

    def _set(self, step: int) -> None:
        assert self.own is not None
        self.own.exact = step > self.last_cut_step

    def metrics(self) -> dict[str, float]:
        assert self.own is not None
        is_exact = self.run.step() > self.last_cut_step
        exact_rounds = max(0, self.run.settings.degrees.pipeline - 2)
        rounds = exact_rounds if is_exact else self.own.rounds
        return {"highway/exact": float(is_exact), "highway/iterations": float(rounds)}
