"""The step at which a run first reached a loss or an accuracy, for tables over several seeds. Pure.

Linear between two validations. The report smooths single curves instead (titan_attent/report/curves.py).
"""

import math
from collections.abc import Mapping


def first_passage(curve: Mapping[int, float], target: float, *, rises: bool = False) -> float:
    """The step at which a curve first reached ``target``; inf if it never did.

    Args:
        curve: step -> value, ascending.
        rises: whether larger values are better.
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
