"""Schedules: progress in [0, 1] -> the ratio and the interval of a round. Pure.

AtteNT's "complex" recipe moves both along the training: small, quickly renewed selections while losses change fast,
large and longer-lived ones later (the paper's ablation: 0.2 -> 0.8). Read once when a round starts.
"""

import math


def progress(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """(step - warm-up) / (total - warm-up), clipped to [0, 1]."""
    return min(1.0, max(0.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def ratio_at(progress: float, *, schedule: str, initial: float, final: float) -> float:
    """The share of the pool to train on."""
    if schedule == "constant":
        return initial
    if schedule == "cosine":
        return initial + (final - initial) * (1 - math.cos(math.pi * progress)) / 2
    assert schedule == "incremental"
    return initial + (final - initial) * progress


def adaptive_ratio(share: float, *, lowest: float, highest: float) -> float:
    """The ratio from the effective sample size: ``share`` squared, within bounds.

    share = (sum s)^2 / (N sum s^2) of the importances is 1 when all are equal and about m / N when m of them matter. On
    clean data it stays near 1 and the teacher fades to uniform; the square lets it leave out more where few matter.
    """
    return min(highest, max(lowest, share * share))


def interval_at(progress: float, *, schedule: str, initial: int, maximum: int) -> int:
    """Passes over one selection."""
    if schedule == "fixed":
        return initial
    assert schedule == "incremental"
    return initial + round((maximum - initial) * progress)


def selection_size(num_examples: int, *, ratio: float, batch_size: int) -> int:
    """k = round(ratio x pool), down to a multiple of the global batch, at least one batch."""
    return max(batch_size, round(ratio * num_examples) // batch_size * batch_size)
