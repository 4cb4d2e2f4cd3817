"""Inclusion probabilities -> importance weights. Pure, except for one integer sum over the ranks.

Soft selection draws without replacement, and given the threshold kappa (the (k+1)-th largest Gumbel key) example i is
in the sample with q_i = 1 - exp(-exp(phi_i - kappa)) (Kool et al. 2019, "Stochastic Beams and Where to Find Them",
section 4.1; Vieira 2017). Weighting by 1/q_i makes the weighted sum an unbiased estimate of the sum over the pool
(Horvitz-Thompson); clipping trades a little bias for variance, and the division by the mean leaves the learning rate's
meaning alone. Hard selection drops examples with certainty (q = 0): no weight corrects for it.

Cost: 8 bytes a local example while it runs.
"""

import torch
from torch import Tensor

from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.systems.teaching.radix import BlockValues, blocks

_FIXED_POINT = 1 << 20


def inclusion_probabilities(phi: Tensor, *, kappa: float) -> Tensor:
    """float64 [n] log-probabilities and the threshold key -> float64 [n]; 1 for phi = +inf or kappa = -inf."""
    if kappa == float("-inf"):  # everything is drawn, also what has no finite log-probability
        return torch.ones_like(phi)
    return (phi - kappa).exp_().neg_().expm1_().neg_()


def inverse_probability_weights(
    phi: BlockValues, *, chosen: Tensor, kappa: float, max_weight: float, sharding: ExampleSharding
) -> Tensor:
    """Weights 1/q, clipped to ``max_weight``, with mean 1 over the chosen examples of all ranks.

    Args:
        phi: float64 log-probabilities of the draw, floor included; +inf for q = 1.
        chosen: bool [num_local].
        kappa: the (k+1)-th largest key; -inf when everything was drawn.

    Returns:
        fp32 [num_local], 0 where not chosen. None exceeds ``max_weight``: 1/q >= 1, so the mean is at least 1.
    """
    weights = torch.empty(len(chosen), dtype=torch.float64, device=chosen.device)
    for block in blocks(len(chosen), device=chosen.device):
        inverse = inclusion_probabilities(phi(block), kappa=kappa).reciprocal_().clamp_(max=max_weight)
        torch.mul(inverse, chosen[block].double(), out=weights[block])
    return mean_one(weights, num_chosen=torch.count_nonzero(chosen), sharding=sharding)[0]


def mean_one(weights: Tensor, *, num_chosen: Tensor, sharding: ExampleSharding) -> tuple[Tensor, int]:
    """Weights, 0 where not chosen, divided by their mean over the chosen of all ranks.

    The mean is taken in 2^-20 fixed point: integer sums are equal for every number of ranks.

    Args:
        weights: fp32 or float64 [num_local]; fp32 ones are divided in place.
        num_chosen: int64 [], this rank's chosen.

    Returns:
        fp32 [num_local], and how many are chosen.
    """
    fixed = torch.zeros_like(num_chosen)
    for block in blocks(len(weights), device=weights.device):
        fixed += (weights[block].double() * _FIXED_POINT).round_().long().sum()
    total, count = sharding.total(torch.stack((fixed, num_chosen)))
    mean = total / _FIXED_POINT / max(1, count)
    result = weights if weights.dtype == torch.float32 else torch.empty_like(weights, dtype=torch.float32)
    for block in blocks(len(weights), device=weights.device):
        result[block] = weights[block].double() / mean
    return result, count
