"""The points that a search tried."""

from dataclasses import dataclass

BASE, VECTOR, RANDOM = "base", "vector", "random"


@dataclass(frozen=True)
class Trial:
    """A point of the search.

    Attributes:
        arm: ``VECTOR`` or ``RANDOM``; ``BASE`` for all factors 0.
        factors: one of the grid for each vector.
        target, control: mean losses.
    """

    arm: str
    factors: tuple[float, ...]
    target: float
    control: float


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        base: with all factors 0.
        limit: the largest loss allowed on the control set.
    """

    base: Trial
    trials: tuple[Trial, ...]
    limit: float
    forget: bool

    def allowed(self, trial: Trial) -> bool:
        """Whether a trial keeps the control's loss within the budget."""
        return trial.control <= self.limit

    def best(self, arm: str) -> Trial:
        """The best trial of an arm within the budget; the base if none is better."""
        sign = -1 if self.forget else 1
        allowed = [self.base, *(trial for trial in self.trials if trial.arm == arm and self.allowed(trial))]
        return min(allowed, key=lambda trial: sign * trial.target)
