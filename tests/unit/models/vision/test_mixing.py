"""models/vision/mixing.py against loops over pixels; the quantiles against distributions with a closed form."""

import math
from typing import Any

import pytest
import torch

from titan_attent.foundations.counter_rng import derive_key
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.models.vision.mixing import MixDraws, beta_quantiles, keyed_draws, mix

KEY = derive_key(3, 4)
IDS = torch.arange(20_000)


def below(x: torch.Tensor, alpha: int) -> torch.Tensor:
    """P(X < x) for Beta(alpha, alpha) with a whole alpha: at least alpha of 2 alpha - 1 coins are heads."""
    n = 2 * alpha - 1
    return sum((math.comb(n, j) * x**j * (1 - x) ** (n - j) for j in range(alpha, n + 1)), torch.zeros_like(x))


@pytest.mark.parametrize("alpha", [1, 2, 5, 20])
def test_quantiles_of_whole_alphas(alpha: int) -> None:
    p = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(below(beta_quantiles(p, alpha), alpha), p, rtol=0, atol=2e-6)


def test_quantiles_of_the_arcsine_distribution() -> None:
    p = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(beta_quantiles(p, 0.5), (torch.pi * p / 2).sin() ** 2, rtol=0, atol=2e-6)


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.2, 0.5, 0.8, 1.0, 3.3, 40.0, 1000.0])
def test_quantiles_are_monotone_symmetric_and_have_the_variance(alpha: float) -> None:
    p = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    x = beta_quantiles(p, alpha)
    assert (x.diff() >= 0).all() and x.min() >= 0 and x.max() <= 1
    torch.testing.assert_close(x, 1 - x.flip(0), rtol=0, atol=1e-12)
    assert x.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=1e-3)
    assert ((x - 0.5) ** 4).mean().item() == pytest.approx(3 / (16 * (2 * alpha + 1) * (2 * alpha + 3)), rel=2e-3)
    ends = beta_quantiles(torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64), alpha)
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64), rtol=0, atol=1e-12)


def test_draws_depend_on_key_and_id_only() -> None:
    options = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    whole = keyed_draws(IDS, KEY, **options)
    parts = [keyed_draws(part, KEY, **options) for part in IDS.split(7_000)]
    for column, chunks in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(column, torch.cat(chunks))
    other = keyed_draws(IDS, KEY + 1, **options)
    assert all(not torch.equal(a, b) for a, b in zip(whole, other, strict=True))


def test_draws_have_their_distributions() -> None:
    draws = keyed_draws(IDS, KEY, mixup_alpha=0.2, cutmix_alpha=1.0)
    assert draws.cut.double().mean() == pytest.approx(0.5, abs=0.015)
    for cut, alpha in ((False, 0.2), (True, 1.0)):
        shares = draws.shares[draws.cut == cut].double()
        assert shares.mean() == pytest.approx(0.5, abs=0.02)
        assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
    table = torch.stack([column.double() for column in draws])
    assert (torch.corrcoef(table) - torch.eye(4)).abs().max() < 0.03
    for centres in (draws.rows, draws.columns):
        torch.testing.assert_close(centres.sort().values, (IDS + 0.5) / len(IDS), rtol=0, atol=0.015)
    assert not keyed_draws(IDS, KEY, mixup_alpha=0.2).cut.any()
    assert keyed_draws(IDS, KEY, cutmix_alpha=1.0).cut.all()


def test_alphas_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[vision\] mixup = 0 and cutmix = 0.*Set one of them above 0"):
        keyed_draws(IDS, KEY)
    with pytest.raises(ValueError, match=r"\[vision\] mixup = -1"):
        keyed_draws(IDS, KEY, mixup_alpha=-1, cutmix_alpha=1)
    with pytest.raises(ValueError, match=r"\[vision\] alpha = 0"):
        beta_quantiles(torch.tensor([0.5], dtype=torch.float64), 0)


def batch(num: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, partners = (torch.randn(num, 3, 10, 10, generator=generator) for _ in range(2))
    labels, partner_labels = (torch.randint(0, 7, (num,), generator=generator) for _ in range(2))
    return images, labels, partners, partner_labels


def plain_mix(image: torch.Tensor, partner: torch.Tensor, draw: Any) -> tuple[torch.Tensor, float]:
    """One example, pixel by pixel."""
    share, cut, row, column = draw
    if not cut:
        return share * image + (1 - share) * partner, share.item()
    size, mixed, own = image.shape[-1], image.clone(), 0
    half = ((1 - share) ** 0.5 / 2).item()
    edges = [[math.floor((c.item() + side * half) * size + 0.5) for side in (-1, 1)] for c in (row, column)]
    for y in range(size):
        for x in range(size):
            if edges[0][0] <= y < edges[0][1] and edges[1][0] <= x < edges[1][1]:
                mixed[:, y, x] = partner[:, y, x]
            else:
                own += 1
    return mixed, own / size**2


def test_mixing_is_that_of_a_loop_over_pixels() -> None:
    images, labels, partners, partner_labels = batch(40)
    draws = keyed_draws(IDS[:40], KEY, mixup_alpha=0.8, cutmix_alpha=1.0)
    assert 5 < draws.cut.sum() < 35
    before = images.clone()
    mixed, shares = mix(images, labels, partners, partner_labels, draws)
    assert torch.equal(images, before) and shares.dtype == torch.float32
    for b in range(40):
        expected, share = plain_mix(images[b], partners[b], [column[b] for column in draws])
        torch.testing.assert_close(mixed[b], expected, rtol=1e-6, atol=1e-6)
        assert shares[b].item() == pytest.approx(share, abs=1e-6)


def test_a_box_within_the_image_has_its_area_and_one_at_the_border_is_clipped() -> None:
    images, labels, partners, partner_labels = batch(4)
    draws = MixDraws(
        torch.tensor([0.75, 0.75, 0.0, 1.0]),
        torch.ones(4, dtype=torch.bool),
        torch.tensor([0.5, 0.0, 0.5, 0.5]),
        torch.tensor([0.45, 1.0, 0.5, 0.5]),
    )
    mixed, shares = mix(images, labels, partners, partner_labels, draws)
    expected = torch.tensor([0.75, 1 - 6 / 100, 0.0, 1.0])  # 5 x 5 pixels; 3 x 2 of 5 x 5; all; none
    torch.testing.assert_close(shares, expected)
    assert torch.equal(mixed[2], partners[2]) and torch.equal(mixed[3], images[3])


def test_an_example_without_a_label_and_one_without_a_partner_stay_as_they_are() -> None:
    images, labels, partners, partner_labels = batch(40)
    labels[:4], partner_labels[4:9] = IGNORE_INDEX, IGNORE_INDEX
    draws = keyed_draws(IDS[:40], KEY, mixup_alpha=0.8, cutmix_alpha=1.0)
    mixed, shares = mix(images, labels, partners, partner_labels, draws)
    assert torch.equal(mixed[:9], images[:9]) and (shares[:9] == 1).all()
    assert (mixed[9:] != images[9:]).flatten(1).any(dim=1).sum() > 20


def test_mixing_keeps_the_dtype_and_makes_one_graph() -> None:
    images, labels, partners, partner_labels = batch(8)
    draws = keyed_draws(IDS[:8], KEY, mixup_alpha=0.8, cutmix_alpha=1.0)
    compiled = torch.compile(mix, backend="eager", fullgraph=True)
    expected = mix(images, labels, partners, partner_labels, draws)
    torch.testing.assert_close(compiled(images, labels, partners, partner_labels, draws), expected)
    assert mix(images.bfloat16(), labels, partners.bfloat16(), partner_labels, draws)[0].dtype == torch.bfloat16
