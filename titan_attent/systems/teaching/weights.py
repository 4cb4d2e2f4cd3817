"""Inclusion probabilities -> importance weights. Pure, except for one integer sum over the ranks.

Soft selection draws without replacement. Given the threshold kappa (the (k+1)-th largest Gumbel key), example i is in
the sample with q_i = 1 - exp(-exp(phi_i - kappa)) (Kool et al. 2019, "Stochastic Beams and Where to Find Them", section
4.1; Vieira 2017). Weighting by 1/q_i makes the weighted sum an unbiased estimate of the sum over the pool
(Horvitz-Thompson). Clipping trades a little bias for less variance, and dividing by the mean keeps the meaning of the
learning rate. Hard selection drops examples with certainty (q = 0): no weight corrects for that.

Cost: 8 bytes per local example while it runs.
"""

import torch
from torch import Tensor

from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.systems.teaching.radix import BlockValues, blocks
from titan_attent.systems.teaching.tokens import Tokens

_FIXED_POINT = 1 << 20


def inclusion_probabilities(phi: Tensor, *, kappa: float) -> Tensor:
    """Log-probabilities, float64 [n], and the threshold key -> float64 [n]; 1 for phi = +inf or kappa = -inf."""
    if kappa == float("-inf"):  # every example is drawn, those without a finite log-probability too
        return torch.ones_like(phi)
    return (phi - kappa).exp_().neg_().expm1_().neg_()


def inverse_probability_weights(
    phi: BlockValues,
    *,
    chosen: Tensor,
    kappa: float,
    max_weight: float,
    sharding: ExampleSharding,
    tokens: Tokens | None = None,
) -> Tensor:
    """Weights 1/q, clipped to ``max_weight``, with mean 1 over the selected examples of all ranks.

    Args:
        phi: float64 log-probabilities of the draw, raised to the floor; +inf for q = 1.
        chosen: bool [num_local].
        kappa: the largest key that was not drawn; -inf if everything was drawn.
        tokens: as in :func:`mean_one`.

    Returns:
        fp32 [num_local], 0 where not selected. None exceeds ``max_weight``: 1/q >= 1, so the mean is at least 1.
    """
    weights = torch.empty(len(chosen), dtype=torch.float64, device=chosen.device)
    for block in blocks(len(chosen), device=chosen.device):
        inverse = inclusion_probabilities(phi(block), kappa=kappa).reciprocal_().clamp_(max=max_weight)
        torch.mul(inverse, chosen[block].double(), out=weights[block])
    return mean_one(weights, sharding=sharding, tokens=tokens)[0]


def mean_one(weights: Tensor, *, sharding: ExampleSharding, tokens: Tokens | None = None) -> tuple[Tensor, int]:
    """Divide weights, 0 where not selected, by their mean over the selected examples of all ranks.

    The mean is taken in 2^-20 fixed point: integer sums are equal for every number of ranks.

    Args:
        weights: fp32 or float64 [num_local]; fp32 weights are divided in place.
        tokens: tokens of the examples, for a mean over tokens, as that of the loss is; None for one over examples.

    Returns:
        fp32 [num_local], and the number of selected examples of all ranks, or of their tokens.
    """
    sums = torch.zeros(2, dtype=torch.int64, device=weights.device)
    for block in blocks(len(weights), device=weights.device):
        weight = weights[block]
        fixed, counted = (weight.double() * _FIXED_POINT).round_().long(), weight > 0
        if tokens is None:
            sums += torch.stack((fixed.sum(), counted.sum()))
        else:
            of_each = tokens.local[block].long()
            sums += torch.stack(((fixed * of_each).sum(), (of_each * counted).sum()))
    total, count = sharding.total(sums)
    mean = total / _FIXED_POINT / max(1, count)
    result = weights if weights.dtype == torch.float32 else torch.empty_like(weights, dtype=torch.float32)
    for block in blocks(len(weights), device=weights.device):
        result[block] = weights[block].double() / mean
    return result, count
