"""Highway backpropagation between pipeline stages as a system of a run: it puts its schedule in the place of
torchtitan's (stagewise.py), and steps aside in the last ``exact_fraction`` of the steps.

Cost: that of the schedule. Nothing else happens in a step.
"""

from typing import Any

from titan_attent.systems.highway import checks
from titan_attent.systems.highway.config import BackwardConfig
from titan_attent.systems.highway.stagewise import HighwaySchedule, highway_schedule
from titan_attent.systems.system import Run, System


class HighwayStages(System):
    """``[backward] cut = "stage"``. It has no state: its steps follow from the configuration."""

    name = "backward"

    @classmethod
    def is_on(cls, job_config: Any) -> bool:
        return job_config.backward.method == "highway" and job_config.backward.cut == "stage"

    @classmethod
    def check(cls, job_config: Any) -> None:
        job_config.backward.validate()
        checks.check_stages(job_config)

    def __init__(self, run: Run):
        super().__init__(run)
        config: BackwardConfig = run.job_config.backward
        steps = run.job_config.training.steps
        self.last_cut_step = steps - round(config.exact_fraction * steps)
        self.iterations = config.iterations
        self.own: HighwaySchedule | None = None

    def schedule(self, schedule: Any) -> Any:
        self.own = highway_schedule(schedule, self.iterations)
        return self.own

    def begin(self) -> None:
        self._set(self.run.step() + 1)

    def step_done(self) -> None:
        self._set(self.run.step() + 1)

    def _set(self, step: int) -> None:
        assert self.own is not None
        self.own.exact = step > self.last_cut_step

    def metrics(self) -> dict[str, float]:
        assert self.own is not None
        is_exact = self.run.step() > self.last_cut_step
        exact_rounds = max(0, self.run.job_config.parallelism.pipeline_parallel_degree - 2)
        rounds = exact_rounds if is_exact else self.own.rounds
        return {"backward/exact": float(is_exact), "backward/iterations": float(rounds)}
