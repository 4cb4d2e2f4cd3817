"""Confidence intervals of means over few seeds."""

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t


def half_width(values: Sequence[float]) -> float:
    """Half of the mean's 95% interval by Student's t; nan for a single value."""
    n = len(values)
    return float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5 if n > 1 else math.nan


def interval(values: Sequence[float]) -> str:
    """The mean and half of its 95% interval, as text."""
    text = f"{statistics.fmean(values):+.3f}"
    return f"{text} ± {half_width(values):.3f}" if len(values) > 1 else text
