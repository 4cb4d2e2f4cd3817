"""selection.py in one process: keys, the law of the soft draw, its temperature and its floor."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from paper import paper_config
from references import chi_square, chi_square_critical, plain_top_k, plain_top_k_by_hash, sequential_sampling_law

from titan_attent.data.plan.order import Pool
from titan_attent.foundations.counter_rng import derive_key, gumbel, stream
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.systems.teaching import selection
from titan_attent.systems.teaching.candidates import Candidates
from titan_attent.systems.teaching.radix import KEY_OFFSET, UNSEEN_KEY, largest_keys, ordered_keys, score_of_key
from titan_attent.systems.teaching.selection import (
    log_probabilities,
    lowest_log_probability,
    random_keys,
    select_top_k,
    soft_keys,
    unseen_first,
)
from titan_attent.systems.teaching.statistics import Scores
from titan_attent.systems.teaching.strategies import STRATEGIES

FLOATS = st.floats(width=32, allow_nan=False)
LOSSES = torch.tensor([0.2, 3.0, 1.1, 2.2, 0.7, 1.6])
NUM_DRAWS = 8000
"""Detects a law whose 20 frequencies are off by 8% on average; sigmoid for softmax is off by more than 20%."""


def soft_draw(phi: torch.Tensor, k: int, seed: tuple[int, ...]) -> np.ndarray:
    sharding = ExampleSharding(len(phi))
    return select_top_k(soft_keys(phi, ids=sharding.local_ids(), seed=seed), k=k, sharding=sharding)[0].numpy()


def many_soft_draws(phi: torch.Tensor, k: int, *, num_draws: int = NUM_DRAWS, check_every: int = 100) -> np.ndarray:
    """bool [num_draws, N]: the draws of the seeds (11, 0), (11, 1), ... taken in bulk; some checked one by one."""
    ids = torch.arange(len(phi))
    noise = torch.stack([gumbel(ids, derive_key(stream("noise"), 11, i)) for i in range(num_draws)])
    top = (phi + noise).argsort(dim=1, descending=True)[:, :k].numpy()
    chosen = np.zeros((num_draws, len(phi)), dtype=bool)
    np.put_along_axis(chosen, top, True, axis=1)
    for i in range(0, num_draws, check_every):
        np.testing.assert_array_equal(soft_draw(phi, k, (11, i)), chosen[i])
    return chosen


# -- keys ---------------------------------------------------------------------------------------------------------


@given(hnp.arrays(np.float32, st.integers(1, 20), elements=FLOATS))
def test_keys_have_the_order_of_the_scores(scores):
    keys = plain_keys(ordered_keys(torch.from_numpy(scores)))
    assert keys.min() >= 0 and keys.max() <= UNSEEN_KEY < 2**32
    np.testing.assert_array_equal(np.sign(keys[:, None] - keys), np.sign(np.subtract.outer(*[rank(scores)] * 2)))


def plain_keys(keys: torch.Tensor) -> np.ndarray:
    """int32 keys of tensors -> their values in [0, 2^32), int64."""
    return keys.numpy().astype(np.int64) + KEY_OFFSET


def rank(scores: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.unique(scores), scores)


@given(FLOATS)
def test_score_of_key_inverts(score):
    (key,) = plain_keys(ordered_keys(torch.tensor([score], dtype=torch.float32)))
    assert score_of_key(int(key)) == np.float32(score)


def test_keys_at_the_ends():
    largest = torch.finfo(torch.float32).max
    scores = torch.tensor([float("-inf"), -largest, -0.0, 0.0, 1e-45, largest, float("inf")])
    keys = plain_keys(ordered_keys(scores)).tolist()
    assert keys == sorted(keys) and keys[2] == keys[3] == 1 << 31 and keys[-1] == UNSEEN_KEY
    assert len(set(keys)) == 6


# -- top-k --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    hnp.arrays(np.int64, st.integers(1, 300), elements=st.integers(0, 3) | st.integers(0, 2**32 - 1)),
    st.randoms(use_true_random=False),
)
def test_top_k_is_that_of_a_sort(keys, random):
    k = random.randint(1, len(keys))
    sharding = ExampleSharding(len(keys))
    kept = torch.from_numpy((keys - KEY_OFFSET).astype(np.int32))
    chosen, threshold = select_top_k(kept, k=k, sharding=sharding)
    expected, expected_threshold = plain_top_k(keys, k)
    np.testing.assert_array_equal(chosen.numpy(), expected)
    assert threshold == expected_threshold
    kth = int(np.sort(keys)[-k])
    (found,) = largest_keys(lambda block: kept[block], lambda *_: [k], sharding=sharding, device=kept.device)
    assert found == (kth, int((keys > kth).sum()), int((keys == kth).sum()))


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 4), st.integers(0, 99), st.randoms(use_true_random=False))
def test_ties_go_by_a_hash_of_the_draw_and_the_id(size, num_values, seed, random):
    keys = np.array([random.randint(0, num_values) for _ in range(size)])
    ids = np.array(random.sample(range(10_000), size))
    k, sharding = random.randint(1, size), ExampleSharding(size)
    kept = torch.from_numpy((keys - KEY_OFFSET).astype(np.int32))
    chosen, threshold = select_top_k(
        kept, k=k, sharding=sharding, ids=lambda places: torch.from_numpy(ids)[places], seed=(seed, 1)
    )
    np.testing.assert_array_equal(chosen.numpy(), plain_top_k_by_hash(keys, k, ids, (seed, 1)))
    assert threshold == plain_top_k(keys, k)[1] and chosen.sum() == k


def test_among_equals_every_id_is_taken_equally_often():
    num, k, draws = 40, 10, 400
    keys, taken = torch.zeros(num, dtype=torch.int32), np.zeros(num)
    for seed in range(draws):
        taken += select_top_k(keys, k=k, sharding=ExampleSharding(num), ids=lambda at: at, seed=(0, seed))[0].numpy()
    assert taken.sum() == draws * k
    # Counts of draws without replacement vary less than independent ones: a bound from above.
    assert chi_square(taken, np.full(num, draws * k / num)) < chi_square_critical(num - 1)


def test_equal_hashes_go_by_place(monkeypatch):
    monkeypatch.setattr(selection, "hash_ids", lambda ids, key: (ids % 3) << 32)
    keys = torch.zeros(10, dtype=torch.int32)
    for k, expected in ((2, [2, 5]), (3, [2, 5, 8]), (5, [1, 2, 4, 5, 8])):
        chosen, _ = select_top_k(keys, k=k, sharding=ExampleSharding(10), ids=lambda at: at)
        assert chosen.nonzero().flatten().tolist() == expected


# -- the law of the soft draw -------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization, temperature", [("softmax", 1.0), ("softmax", 2.5), ("sigmoid", 0.5)])
def test_soft_selection_follows_the_law_of_sequential_draws(normalization, temperature):
    losses = LOSSES.double().numpy()
    odds = np.exp(losses) if normalization == "softmax" else 1 / (1 + np.exp(-losses))
    law = sequential_sampling_law(odds ** (1 / temperature), 3)
    assert len(law) == 20 and sum(law.values()) == pytest.approx(1)
    phi = log_probabilities(LOSSES, temperature=temperature, normalization=normalization)
    subsets = [tuple(np.flatnonzero(row)) for row in many_soft_draws(phi, 3)]
    observed = np.array([subsets.count(subset) for subset in law])
    assert observed.sum() == NUM_DRAWS
    assert chi_square(observed, NUM_DRAWS * np.array(list(law.values()))) < chi_square_critical(19)


def test_a_tiny_temperature_is_hard_top_k():
    phi = log_probabilities(LOSSES, temperature=1e-3, normalization="softmax")
    assert {tuple(np.flatnonzero(soft_draw(phi, 3, (i,)))) for i in range(200)} == {(1, 3, 5)}


def test_a_huge_temperature_is_uniform():
    phi = log_probabilities(LOSSES, temperature=1e6, normalization="softmax")
    subsets = [tuple(np.flatnonzero(row)) for row in many_soft_draws(phi, 3, num_draws=4000)]
    law = sequential_sampling_law(np.ones(6), 3)
    observed = np.array([subsets.count(subset) for subset in law])
    assert chi_square(observed, np.full(20, 200.0)) < chi_square_critical(19)


@given(hnp.arrays(np.float32, st.integers(1, 10), elements=st.floats(-50, 50, width=32)), st.floats(0.01, 100))
def test_log_probabilities_are_divided_by_the_temperature(scores, temperature):
    scored = torch.from_numpy(scores)
    softmax = log_probabilities(scored, temperature=temperature, normalization="softmax").numpy()
    sigmoid = log_probabilities(scored, temperature=temperature, normalization="sigmoid").numpy()
    exact = scores.astype(np.float64)
    np.testing.assert_allclose(softmax, exact / temperature, rtol=1e-12)
    np.testing.assert_allclose(sigmoid, -np.logaddexp(0, -exact) / temperature, rtol=1e-9)


@pytest.mark.parametrize("normalization", ["softmax", "sigmoid"])
def test_infinite_scores_pass_through(normalization):
    scores = torch.tensor([float("inf"), 1.0, float("-inf")])
    phi = log_probabilities(scores, temperature=3.0, normalization=normalization).tolist()
    assert phi[0] == float("inf") and phi[2] == float("-inf") and abs(phi[1]) < 1


# -- the floor ----------------------------------------------------------------------------------------------------


def plain_floor(phi: np.ndarray, k: int, floor: float) -> np.ndarray:
    """Bisect for the kappa at which the exact q_i, none below the floor, sum to k; raise phi to the floor's."""
    left, right = phi.min() - 50, phi.max() + 50
    for _ in range(200):
        kappa = (left + right) / 2
        q = np.maximum(1 - np.exp(-np.exp(np.minimum(phi - kappa, 30))), floor)
        left, right = (kappa, right) if q.sum() > k else (left, kappa)
    return np.maximum(phi, kappa + np.log(-np.log1p(-floor)))


def floored(phi: np.ndarray, k: int, minimum: float) -> np.ndarray:
    sharding = ExampleSharding(len(phi))
    finite = phi[np.isfinite(phi)]
    lowest = lowest_log_probability(
        lambda block: torch.from_numpy(phi)[block],
        ends=(float(finite.min()), float(finite.max())),
        num_infinite=(int((phi == np.inf).sum()), int((phi == -np.inf).sum())),
        k=k,
        minimum=minimum,
        sharding=sharding,
        device=torch.device("cpu"),
    )
    return np.where(phi == -np.inf, phi, phi.clip(lowest))


def wide_scores(*, size: int = 300) -> np.ndarray:
    return np.random.default_rng(1).normal(3.0, 2.5, size)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.floats(0.1, 20), st.floats(0.05, 0.9), st.floats(0.001, 0.9))
def test_floor_is_that_of_an_exact_bisection(seed, width, ratio, minimum):
    phi = np.random.default_rng(seed).normal(0, width, 400)
    k = max(1, int(ratio * 400))
    tolerance = 2 * np.ptp(phi) / 65536  # two bins of the histogram that the search runs over
    raised = floored(phi, k, minimum)
    if minimum < k / 400:
        np.testing.assert_allclose(raised, plain_floor(phi, k, minimum), atol=tolerance)
    else:  # the uniform draw, whatever the constant
        assert np.ptp(raised) <= tolerance


def test_floor_holds_for_the_least_likely_example():
    phi, k, minimum, num_draws = wide_scores(), 100, 0.05, 4000
    raised = floored(phi, k, minimum)
    with_floor = many_soft_draws(torch.from_numpy(raised), k, num_draws=num_draws).mean(axis=0)
    without = many_soft_draws(torch.from_numpy(phi), k, num_draws=num_draws).mean(axis=0)
    at_floor = raised > phi
    assert 0.1 < at_floor.mean() < 0.9
    error = (minimum / num_draws) ** 0.5
    # Examples on the floor are equally likely: their mean has the sharpest error. 1/k: drawn against expected kappa.
    assert abs(with_floor[at_floor].mean() - minimum) < minimum / k + 4 * error / at_floor.sum() ** 0.5
    assert with_floor[at_floor].min() > minimum - 4.5 * error
    least = phi.argmin()
    assert without[least] < minimum - 4 * error
    assert (without[at_floor] < minimum + 4.5 * error).all()
    assert with_floor.sum() == pytest.approx(k)


def test_floor_cannot_exceed_the_uniform_draw():
    phi, k, num_draws = wide_scores(), 100, 4000
    raised = floored(phi, k, 0.9)
    assert np.ptp(raised) <= np.ptp(phi) / 65536
    counts = many_soft_draws(torch.from_numpy(raised), k, num_draws=num_draws).sum(axis=0)
    # Inclusions have variance p (1 - p); a fixed k takes one degree of freedom.
    statistic = chi_square(counts, np.full(300, num_draws / 3)) / (1 - 1 / 3) * 299 / 300
    assert statistic < chi_square_critical(299)


def all_of(size: int) -> Candidates:
    sharding = ExampleSharding(size)
    return Candidates(Pool.whole(size), owners=sharding, sharding=sharding, device=torch.device("cpu"))


def scored(scores: np.ndarray) -> Scores:
    return Scores(torch.from_numpy(scores), sharding=ExampleSharding(len(scores)))


def test_one_huge_loss_leaves_the_others_their_differences():
    scores = np.random.default_rng(1).normal(3.0, 2.5, 300).astype(np.float32)
    order, counts = np.argsort(scores), {}
    for outlier in (scores.max(), 1e7):
        scores[order[-1]] = outlier  # finite, so it may enter the buffer
        draws = [
            STRATEGIES["soft"](scored(scores), 100, paper_config(), (5, i), all_of(300))[0] > 0 for i in range(200)
        ]
        counts[outlier] = torch.stack(draws).float().mean(dim=0).numpy()
    assert len(counts) == 2
    for frequency in counts.values():
        assert frequency[order[-50:]].mean() > 0.8 and frequency[order[:100]].mean() < 0.15


def test_floor_leaves_what_it_need_not_touch():
    phi = np.random.default_rng(2).normal(0, 3, 50)
    np.testing.assert_array_equal(floored(phi, 20, 0.0), phi)
    np.testing.assert_array_equal(floored(phi, 50, 0.3), phi)  # everything is drawn
    np.testing.assert_array_equal(floored(np.full(50, 2.5), 20, 0.3), 2.5)
    phi[:30] = np.inf  # 30 unseen come first and fill the draw
    np.testing.assert_array_equal(floored(phi, 20, 0.3), phi)


def test_unseen_and_broken_examples_take_no_part_in_the_floor():
    phi = np.random.default_rng(3).normal(0, 4, 400)
    finite = phi.copy()
    phi = np.concatenate((phi, np.full(30, np.inf), np.full(20, -np.inf)))
    raised = floored(phi, 100, 0.05)
    np.testing.assert_array_equal(raised[400:], phi[400:])
    np.testing.assert_allclose(raised[:400], plain_floor(finite, 70, 0.05), atol=2 * np.ptp(finite) / 65536)


# -- unseen, broken, random ---------------------------------------------------------------------------------------


def test_unseen_examples_come_before_any_loss():
    largest = torch.finfo(torch.float32).max
    scores = torch.tensor([largest, float("inf"), 5.0, float("inf"), float("-inf"), float("inf"), 4.0])
    ids = torch.arange(7)
    for seed in range(50):
        phi = log_probabilities(scores, temperature=1e-3, normalization="softmax")
        for keys in (ordered_keys(scores), soft_keys(phi, ids=ids, seed=(seed,))):
            keys = unseen_first(keys, scores == float("inf"), ids=ids, seed=(seed,))
            order = keys.argsort(descending=True).tolist()
            assert set(order[:3]) == {1, 3, 5} and order[3:] == [0, 2, 6, 4]


def test_unseen_examples_come_in_keyed_random_order():
    ids, num_draws = torch.arange(8), 3000
    unseen, keys = torch.arange(8) < 6, ordered_keys(torch.zeros(8))
    draws = [unseen_first(keys, unseen, ids=ids, seed=(3, i)) for i in range(num_draws)]
    subsets = [tuple(keys.argsort(descending=True)[:2].sort().values.tolist()) for keys in draws]
    law = sequential_sampling_law(np.ones(6), 2)
    observed = np.array([subsets.count(subset) for subset in law])
    assert chi_square(observed, np.full(15, num_draws / 15)) < chi_square_critical(14)
    again = unseen_first(keys, unseen, ids=ids, seed=(3, 0))
    assert torch.equal(again, draws[0])


def test_random_keys_draw_every_subset_equally_often():
    sharding, num_draws = ExampleSharding(6), 4000
    subsets = [
        tuple(random_keys(sharding.local_ids(), seed=(i,)).argsort()[:3].sort().values.tolist())
        for i in range(num_draws)
    ]
    law = sequential_sampling_law(np.ones(6), 3)
    observed = np.array([subsets.count(subset) for subset in law])
    assert chi_square(observed, np.full(20, num_draws / 20)) < chi_square_critical(19)
