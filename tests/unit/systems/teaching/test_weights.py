"""weights.py against Monte-Carlo draws of an independent generator and plain loops; Horvitz-Thompson is unbiased."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import plain_inverse_weights

from titan_attent.foundations.counter_rng import derive_key, gumbel, stream
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.systems.teaching.radix import score_of_key
from titan_attent.systems.teaching.selection import select_top_k, soft_keys
from titan_attent.systems.teaching.weights import inclusion_probabilities, inverse_probability_weights

INF = float("inf")


def weights_of(phi: np.ndarray, chosen: np.ndarray, *, kappa: float, max_weight: float) -> np.ndarray:
    return inverse_probability_weights(
        lambda block: torch.from_numpy(phi)[block],
        chosen=torch.from_numpy(chosen),
        kappa=kappa,
        max_weight=max_weight,
        sharding=ExampleSharding(len(phi)),
    ).numpy()


def soft_draw(phi: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, float]:
    sharding = ExampleSharding(len(phi))
    keys = soft_keys(torch.from_numpy(phi), ids=sharding.local_ids(), seed=(seed,))
    chosen, threshold = select_top_k(keys, k=k, sharding=sharding)
    return chosen.numpy(), score_of_key(threshold)


def test_inclusion_probability_is_the_chance_to_pass_the_threshold():
    phi = np.linspace(-6, 4, 12)
    num_draws, kappa = 200_000, 0.7
    noise = np.random.default_rng(0).gumbel(size=(num_draws, 12))
    frequency = (phi + noise > kappa).mean(axis=0)
    q = inclusion_probabilities(torch.from_numpy(phi), kappa=kappa).numpy()
    assert (np.abs(frequency - q) < 4 * (q * (1 - q) / num_draws) ** 0.5 + 1e-5).all()


def test_inclusion_probability_at_the_ends():
    phi = torch.tensor([INF, 800.0, 0.0, -30.0, -INF], dtype=torch.float64)
    q = inclusion_probabilities(phi, kappa=0.0).tolist()
    assert q[:2] == [1.0, 1.0] and q[2] == pytest.approx(1 - np.exp(-1)) and q[4] == 0.0
    assert q[3] == pytest.approx(np.exp(-30), rel=1e-9)  # 1 - exp(-x) would have lost its digits
    # Everything is drawn: with certainty, also an example whose loss was never finite.
    assert inclusion_probabilities(phi, kappa=-INF).tolist() == [1.0] * 5


def test_horvitz_thompson_estimates_the_population_mean():
    generator = np.random.default_rng(4)
    phi = generator.normal(0, 1.2, 30)
    x = 2 * phi + generator.normal(0, 1, 30)  # what is drawn more often is larger: unweighted means are biased
    ids, num_draws, k = torch.arange(30), 6000, 10
    estimates, plain_means = [], []
    for draw in range(num_draws):
        keys = (torch.from_numpy(phi) + gumbel(ids, derive_key(stream("noise"), draw))).float().numpy()
        order = np.argsort(-keys)
        kappa = float(keys[order[k]])
        if draw % 200 == 0:
            chosen, threshold = soft_draw(phi, k, draw)
            assert set(np.flatnonzero(chosen)) == set(order[:k]) and threshold == kappa
        q = inclusion_probabilities(torch.from_numpy(phi), kappa=kappa).numpy()
        estimates.append((x / q)[order[:k]].sum() / 30)
        plain_means.append(x[order[:k]].mean())
    error = np.std(estimates) / num_draws**0.5
    assert abs(np.mean(estimates) - x.mean()) < 4 * error
    assert abs(np.mean(plain_means) - x.mean()) > 20 * error


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10_000), st.integers(2, 200), st.floats(1.0, 50.0), st.floats(0.0, 10.0), st.data())
def test_weights_are_those_of_a_loop_with_mean_one_and_a_ceiling(seed, size, max_weight, width, data):
    k = data.draw(st.integers(1, size - 1))
    phi = np.random.default_rng(seed).normal(3, width, size)
    chosen, kappa = soft_draw(phi, k, seed)
    weights = weights_of(phi, chosen, kappa=kappa, max_weight=max_weight)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, plain_inverse_weights(phi, chosen, kappa, max_weight), rtol=2e-6)
    assert weights[chosen].mean(dtype=np.float64) == pytest.approx(1, abs=2e-6)
    assert (weights[~chosen] == 0).all() and (weights[chosen] > 0).all()
    assert weights.max() <= max_weight * (1 + 1e-6)


def test_rarer_examples_weigh_more_until_the_ceiling():
    phi = np.array([-8.0, -1.0, 0.0, 1.0, 8.0])
    weights = weights_of(phi, np.ones(5, dtype=bool), kappa=0.0, max_weight=4.0)
    assert (np.diff(weights) < 0).all()
    assert weights[0] / weights[4] == pytest.approx(4.0, rel=1e-5)


def test_unseen_examples_have_the_weight_of_certainty():
    phi = np.array([INF, 0.0, 50.0, -1.0])
    chosen = np.array([True, True, True, False])
    weights = weights_of(phi, chosen, kappa=-0.5, max_weight=4.0)
    np.testing.assert_allclose(weights, plain_inverse_weights(phi, chosen, -0.5, 4.0), rtol=1e-6)
    assert weights[0] == weights[2] < weights[1]


@pytest.mark.parametrize("phi", [[0.3, 2.0, -5.0], [INF, 2.0, -5.0], [0.3, 2.0, -INF], [INF, INF, -INF]])
def test_weights_are_equal_when_everything_is_drawn(phi):
    weights = weights_of(np.array(phi), np.ones(3, dtype=bool), kappa=-INF, max_weight=4.0)
    assert weights.tolist() == [1.0, 1.0, 1.0]
