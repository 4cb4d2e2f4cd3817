"""Inclusion probabilities -> importance weights. Pure but for one integer sum.

Soft selection draws without replacement, and given the threshold kappa (the (k+1)-th largest Gumbel key) example i is
in the sample with q_i = 1 - exp(-exp(phi_i - kappa)) (Kool et al. 2019, "Stochastic Beams and Where to Find Them",
section 4.1; Vieira 2017). Weighting by 1/q_i makes the weighted sum an unbiased estimate of the sum over the pool
(Horvitz-Thompson); clipping trades a little bias for variance, and the division by the mean leaves the learning rate's
meaning alone. Hard selection drops examples with certainty (q = 0): no weight corrects for it.
"""

import torch
from torch import Tensor

from titan_attent.sharding import ExampleSharding

_FIXED_POINT = 1 << 20


def inclusion_probabilities(phi: Tensor, *, kappa: float) -> Tensor:
    """float64 [n] log-probabilities and the threshold key -> float64 [n]; 1 for phi = +inf or kappa = -inf."""
    if kappa == float("-inf"):  # everything is drawn, also what has no finite log-probability
        return torch.ones_like(phi)
    return -torch.expm1(-torch.exp(phi - kappa))


def inverse_probability_weights(
    phi: Tensor, *, chosen: Tensor, kappa: float, max_weight: float, sharding: ExampleSharding
) -> Tensor:
    """Weights 1/q, clipped to ``max_weight``, with mean 1 over the chosen examples of all ranks.

    Args:
        phi: float64 [num_local], the log-probabilities of the draw, floor included; +inf for q = 1.
        chosen: bool [num_local].
        kappa: the (k+1)-th largest key; -inf when everything was drawn.

    Returns:
        fp32 [num_local], 0 where not chosen. None exceeds ``max_weight``: 1/q >= 1, so the mean is at least 1.
    """
    weights = (1.0 / inclusion_probabilities(phi, kappa=kappa)).clamp(max=max_weight)
    return mean_one(torch.where(chosen, weights, 0.0), chosen=chosen, sharding=sharding)


def mean_one(weights: Tensor, *, chosen: Tensor, sharding: ExampleSharding) -> Tensor:
    """float64 [num_local] weights, 0 where not ``chosen``, divided by their mean over the chosen of all ranks -> fp32.

    The mean is taken in 2^-20 fixed point: integer sums are equal for every number of ranks.
    """
    totals = torch.stack(((weights * _FIXED_POINT).round().long().sum(), chosen.sum()))
    total, count = sharding.sum(totals).tolist()
    return (weights / (total / _FIXED_POINT / max(1, count))).float()
