"""Highway backpropagation between pipeline stages as a system of a run.

It replaces torchtitan's pipeline schedule by its own (stagewise.py), which runs exact backpropagation in the last
``exact_fraction`` of the steps.

Cost: that of the schedule; it adds nothing else to a step.
"""

from typing import Any

from titan_attent.systems.highway import checks
from titan_attent.systems.highway.config import FORMER_NAME, HighwayConfig
from titan_attent.systems.highway.stagewise import HighwaySchedule, highway_schedule
from titan_attent.systems.settings import RunSettings
from titan_attent.systems.system import Run, System


class HighwayStages(System):
    """The system of ``[highway] cut = "stage"``. It needs no state, as the configuration determines every step."""

    name = "highway"
    former_name = FORMER_NAME
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
        self.schedule: HighwaySchedule | None = None

    def wrap_schedule(self, schedule: Any) -> Any:
        self.schedule = highway_schedule(schedule, self.iterations)
        return self.schedule

    def before_first_step(self) -> None:
        self._prepare(self.run.step() + 1)

    def after_step(self) -> None:
        self._prepare(self.run.step() + 1)

    def _prepare(self, step: int) -> None:
        """Set whether the schedule runs this step exactly."""
        assert self.schedule is not None
        self.schedule.exact = step > self.last_cut_step

    def metrics(self) -> dict[str, float]:
        assert self.schedule is not None
        is_exact = self.run.step() > self.last_cut_step
        exact_rounds = max(0, self.run.settings.degrees.pipeline - 2)
        rounds = exact_rounds if is_exact else self.schedule.rounds
        return {"highway/exact": float(is_exact), "highway/iterations": float(rounds)}
