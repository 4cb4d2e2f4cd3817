"""The numbers of the vision experiment: pairs of runs, when a run reached uniform's final accuracy, verdicts.

Pure: results (``result.json``) in, numbers out. Accuracies are shares; differences are taken seed by seed.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.first_passage import first_passage
from benchmarks.common.intervals import half_width
from benchmarks.vision.rules import BATCH_SIZE, RULES, SETS, scorers_charge

Result = dict[str, Any]
Value = Callable[[Result], float]


# -- intervals --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """The mean of ``n`` values and half of its 95% interval by Student's t, which is nan for a single value."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def points(self, *, sign: bool = True) -> str:
        """The interval as text, in percentage points."""
        mean = round(100 * self.mean, 2) + 0.0  # no -0.00
        text = f"{mean:+.2f}" if sign else f"{mean:.2f}"
        return text if math.isnan(self.half) else f"{text} ± {100 * self.half:.2f}"


def interval(values: Sequence[float]) -> Interval | None:
    """The interval of values; None without a value."""
    return Interval(statistics.fmean(values), half_width(values), len(values)) if values else None


def accuracy(result: Result) -> float:
    return result["final_accuracy"]


def rare_accuracy(result: Result) -> float:
    """The mean accuracy of the rarer half of the classes; rarity is by the training images."""
    counts, accuracies = result["class_counts"], result["class_accuracy"]
    rarest = sorted(range(len(counts)), key=lambda number: (counts[number], number))[: len(counts) // 2]
    return statistics.fmean(accuracies[number] for number in rarest)


# -- runs -------------------------------------------------------------------------------------------------------------


class Runs:
    """The results of a set under a condition, by rule and seed."""

    def __init__(self, results: Sequence[Result], name: str, condition: str):
        self.name, self.condition = name, condition
        self.of: dict[str, dict[int, Result]] = {}
        for result in results:
            if (result["set"], result["condition"]) == (name, condition):
                self.of.setdefault(result["rule"], {})[result["seed"]] = result

    @property
    def rules(self) -> list[str]:
        """The rules in the order of the table."""
        return [rule for rule in RULES if rule in self.of]

    def values(self, rule: str, value: Value = accuracy) -> Interval | None:
        return interval([value(result) for _, result in sorted(self.of.get(rule, {}).items())])

    def difference(self, rule: str, control: str, value: Value = accuracy) -> Interval | None:
        """rule - control, over the seeds that both have; None without one, and for a rule that is its own control."""
        own, other = self.of.get(rule, {}), self.of.get(control, {})
        if rule == control:
            return None
        return interval([value(own[seed]) - value(other[seed]) for seed in sorted(own.keys() & other.keys())])

    def compute(self, rule: str) -> float:
        """The mean cost of a run, scoring and scorers included, as a share of uniform's steps."""
        return statistics.fmean(step_equivalents(result) for result in self.of[rule].values()) / SETS[self.name].steps

    def control(self, rule: str) -> str:
        """The rule that is uniform, decayed at the compute of ``rule``."""
        return f"uniform_{round(100 * RULES[rule].share)}" if RULES[rule].share < 1 else "uniform"

    def time_to_uniform(self, rule: str) -> tuple[float, float, float] | None:
        """Median (steps, images, seconds) at which a rule's runs reached uniform's final accuracy of their seed.

        Scoring and scorers are charged in full: a forward pass costs a third of a trained image. Linear between
        validations; a seed that never reached it counts as infinite. None without a seed that both have.
        """
        controls, reached_at = self.of.get("uniform", {}), []
        for seed, result in self.of.get(rule, {}).items():
            if seed not in controls:
                continue
            step = reached(result, accuracy(controls[seed]))
            charge = step_equivalents(result) - result["steps"]
            pace = result["train_seconds"] / result["steps"]
            # The seconds of the scorers are those of the learner steps that they cost.
            seconds = pace * (step + scorers_of(result)) + result["teaching_seconds"]
            reached_at.append((step, (step + charge) * BATCH_SIZE, seconds))
        if not reached_at:
            return None
        step, images, seconds = (statistics.median(column) for column in zip(*reached_at, strict=True))
        return step, images, seconds


def scorers_of(result: Result) -> float:
    """The cost of a run's scorers, in steps of the learner."""
    return scorers_charge(RULES[result["rule"]], SETS[result["set"]])


def step_equivalents(result: Result) -> float:
    """The total cost of a run, in steps of the learner."""
    return result["step_equivalents"] + scorers_of(result)


def reached(result: Result, target: float) -> float:
    """The step at which a run first reached an accuracy, linear between validations; inf if it never did."""
    curve = dict(sorted((int(step), value) for step, value in result["accuracy"].items()))
    return first_passage(curve, target, rises=True)


# -- goals ------------------------------------------------------------------------------------------------------------

SAVINGS = (("clean", 0.8), ("wrong_labels", 0.7), ("copies", 0.7))
"""(condition, share of uniform's compute)."""
ROUNDING = 0.005
MAX_LOST = 0.01
"""An accuracy whose mean is more than a point lower does not count as equal, however wide the interval."""
UNHARMED = 0.005
"""The accuracy that rare classes may lose: half a point."""


def judge_saving(to_full: Interval, to_equal: Interval) -> str:
    """The verdict on a rule at less compute, by its differences to uniform at full compute and at its own compute.

    "met": not below the full run by more than the interval (or a point), and above the equally short one by more.
    """
    equal, better = to_full.high >= 0 and to_full.mean >= -MAX_LOST, to_equal.low > 0
    if math.isnan(to_full.half) or math.isnan(to_equal.half):
        return "one seed"
    if equal and better:
        return "met"
    return "equal, but so is shorter uniform" if equal else "better than shorter uniform only" if better else "missed"


def judge_rare(difference: Interval) -> str:
    """ "met" where the whole interval, "likely" where the mean of the difference to uniform is above -0.5 points."""
    if difference.low >= -UNHARMED:
        return "met"
    return "likely" if difference.mean >= -UNHARMED else "missed"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    goal: str
    rule: str
    compute: float
    to_full: Interval
    to_equal: Interval | None
    verdict: str


def verdicts(results: Sequence[Result], name: str) -> list[Verdict]:
    """The verdicts on every rule that a goal of a set may be judged by."""
    judged = []
    for condition, share in SAVINGS:
        runs = Runs(results, name, condition)
        for rule in runs.rules:
            full, equal = runs.difference(rule, "uniform"), runs.difference(rule, f"uniform_{round(100 * share)}")
            compute = runs.compute(rule)
            if RULES[rule].teacher["strategy"] == "uniform" or full is None or equal is None:
                continue
            if not share - 0.05 <= compute <= share + ROUNDING:
                continue
            goal = f"{1 - share:.0%} less compute, {condition}"
            verdict = judge_saving(full, equal)
            judged.append(Verdict(goal=goal, rule=rule, compute=compute, to_full=full, to_equal=equal, verdict=verdict))
    runs = Runs(results, name, "long_tail")
    for rule in runs.rules:
        rare = runs.difference(rule, "uniform", rare_accuracy)
        if rare is not None:
            equal = runs.difference(rule, runs.control(rule), rare_accuracy)
            judged.append(
                Verdict(
                    goal="rare classes not harmed",
                    rule=rule,
                    compute=runs.compute(rule),
                    to_full=rare,
                    to_equal=equal,
                    verdict=judge_rare(rare),
                )
            )
    return judged
