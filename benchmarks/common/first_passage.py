"""When a run was first at a loss or an accuracy: what the tables of several seeds count. Pure.

Linear between two validations. The report smooths single curves instead (titan_attent/report/curves.py).
"""

import math
from collections.abc import Mapping


def first_passage(curve: Mapping[int, float], target: float, *, rises: bool = False) -> float:
    """The step; inf if the run never was there.

    Args:
        curve: step -> value, ascending.
        rises: whether larger values are the better ones.
    """
    before: int | None = None
    for step, value in curve.items():
        if value >= target if rises else value <= target:  # never for nan
            if before is None or not math.isfinite(value):
                return float(step)
            share = (curve[before] - target) / (curve[before] - value)
            return before + share * (step - before)
        before = step if math.isfinite(value) else None
    return math.inf
