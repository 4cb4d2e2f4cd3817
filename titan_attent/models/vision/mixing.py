"""Mixtures of two images: mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899).

Mixup takes the weighted mean of two images, CutMix pastes a box of one into the other. losses/mixed.py mixes their
labels with the same shares. Both papers draw the share from Beta(alpha, alpha) with a random generator. Here the share
is a quantile of that distribution at a hash of (key, example id). The quantile function, the inverse of the regularised
incomplete beta function, is tabulated once per alpha and interpolated linearly, so it is monotone in the hash.

Quantile table: Beta(alpha, alpha) is symmetric, so one half is enough. With x = t^max(1, 1/alpha) / 2 the density in t
is bounded on [0, 1] for every alpha. The trapezoidal rule on 4096 steps then gives the probability of x to 1e-6.

Shapes: B examples, C channels, S pixels per side.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from titan_attent.foundations.checks import check_number
from titan_attent.foundations.counter_rng import derive_key, uniform
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.models.vision.config import MAX_ALPHA

_STEPS = 4096
_SHARE, _COIN, _ROW, _COLUMN = range(4)
"""The use of a derived key."""


class MixDraws(NamedTuple):
    """The random draws for mixing a batch, each [B].

    Attributes:
        shares: fp32, the share of the example itself, in [0, 1].
        cut: bool, whether CutMix is used instead of mixup.
        rows, columns: fp32 in [0, 1], the centre of the CutMix box, as a fraction of the side.
    """

    shares: Tensor
    cut: Tensor
    rows: Tensor
    columns: Tensor


@lru_cache(maxsize=8)
def _half_table(alpha: float) -> tuple[Tensor, Tensor]:
    """The table, fp64 [steps + 1] each: t on an even grid, and the probability, from 0 to 0.5, of being below x(t)."""
    t = torch.linspace(0.0, 1.0, _STEPS + 1, dtype=torch.float64)
    x = t ** max(1.0, 1.0 / alpha) / 2
    # x^(alpha - 1) (1 - x)^(alpha - 1) dx/dt up to a constant factor, which the division below cancels.
    density = (4 * x * (1 - x)) ** (alpha - 1) if alpha >= 1 else (1 - x) ** (alpha - 1)
    below = torch.cat((t[:1], torch.cumulative_trapezoid(density, t)))
    return t, below / below[-1] / 2


def beta_quantiles(probabilities: Tensor, alpha: float) -> Tensor:
    """The quantiles of Beta(alpha, alpha).

    Args:
        probabilities: fp64, any shape, in [0, 1].
        alpha: above 0, up to 1000; ValueError otherwise.

    Returns:
        fp64 of the same shape, on the same device, in [0, 1], monotone in the probability.
    """
    check_number("alpha", alpha, above=0, at_most=MAX_ALPHA, section="vision")
    t, below = (table.to(probabilities.device) for table in _half_table(float(alpha)))
    lower = torch.minimum(probabilities, 1 - probabilities)
    after = torch.searchsorted(below, lower.contiguous()).clamp(1, _STEPS)
    start, end = below[after - 1], below[after]
    position = t[after - 1] + ((lower - start) / (end - start).clamp(min=1e-300)).clamp(0, 1) / _STEPS
    x = position ** max(1.0, 1.0 / alpha) / 2
    return torch.where(probabilities > 0.5, 1 - x, x)


def keyed_draws(ids: Tensor, key: int, *, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0) -> MixDraws:
    """The draws of examples as hashes of (key, example id).

    Args:
        ids: int64 [B].
        key: key from ``derive_key``, different for each pass.
        mixup_alpha, cutmix_alpha: alpha of the Beta distribution of the shares; 0 disables this type of mixing. If both
            are above 0, a fair coin decides for each example. If both are 0, ValueError.

    Returns:
        :class:`MixDraws` on the device of ``ids``.
    """
    check_number("mixup", mixup_alpha, at_least=0, at_most=MAX_ALPHA, section="vision")
    check_number("cutmix", cutmix_alpha, at_least=0, at_most=MAX_ALPHA, section="vision")
    if not mixup_alpha and not cutmix_alpha:
        raise ValueError("[vision] mixup = 0 and cutmix = 0: nothing to mix. Set one of them above 0")
    share, coin, row, column = (uniform(ids, derive_key(key, use)) for use in (_SHARE, _COIN, _ROW, _COLUMN))
    cut = torch.full_like(ids, bool(cutmix_alpha), dtype=torch.bool)
    if mixup_alpha and cutmix_alpha:
        cut = coin < 0.5
    mixed = beta_quantiles(share, mixup_alpha or cutmix_alpha)
    boxed = beta_quantiles(share, cutmix_alpha or mixup_alpha)
    return MixDraws(torch.where(cut, boxed, mixed).float(), cut, row.float(), column.float())


def _inside(centres: Tensor, widths: Tensor, size: int) -> Tensor:
    """Whether a pixel lies in an interval around each centre, bool [B, size]; centres, widths fp32 [B] in [0, 1]."""
    start, end = (((centres + side * widths / 2) * size + 0.5).floor()[:, None] for side in (-1, 1))
    pixels = torch.arange(size, device=centres.device)
    return (pixels >= start) & (pixels < end)


def mix(
    images: Tensor, labels: Tensor, partner_images: Tensor, partner_labels: Tensor, draws: MixDraws
) -> tuple[Tensor, Tensor]:
    """Mix each image with its partner.

    Mixup: share * image + (1 - share) * partner. CutMix: a box of the partner, with the image's aspect ratio and the
    area 1 - share, clipped at the border. The returned share is then the fraction of the image's own pixels. If either
    label is ``IGNORE_INDEX``, the image is not changed.

    Args:
        images, partner_images: float [B, C, S, S].
        labels, partner_labels: int64 [B].
        draws: from :func:`keyed_draws`.

    Returns:
        (images, shares): same shape and dtype as the images; fp32 [B], the share of the image's own label.
    """
    widths = (1.0 - draws.shares).clamp(min=0.0).sqrt()
    box = (
        _inside(draws.rows, widths, images.shape[2])[:, :, None]
        & _inside(draws.columns, widths, images.shape[3])[:, None]
    )
    own = torch.where(draws.cut[:, None, None], (~box).float(), draws.shares[:, None, None])  # [B, S, S]
    unmixed = (labels == IGNORE_INDEX) | (partner_labels == IGNORE_INDEX)
    own = torch.where(unmixed[:, None, None], 1.0, own)
    weights = own[:, None]
    mixed = weights * images + (1.0 - weights) * partner_images
    shares = torch.where(draws.cut, own.mean(dim=(1, 2)), own[:, 0, 0])
    return mixed.to(images.dtype), shares
