"""The modules that a decision freezes, against all possible choices."""

import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest

from titan_attent.systems.freezing.config import FreezingConfig
from titan_attent.systems.freezing.policy import History, decide, relative
from titan_attent.systems.freezing.units import Unit, backward_flops, saved_flops

LAYERS = 4


def make_units() -> list[Unit]:
    """A model of 4 layers, with 10 FLOPs of weight gradients per attention, 20 per feed-forward, 15 in the output."""
    units = [Unit("tok_embeddings", "embedding", -1)]
    for layer in range(LAYERS):
        units.append(Unit(f"layers.{layer}.attention", "attention", layer, weight=10, inputs=12, forward=11))
        units.append(Unit(f"layers.{layer}.feed_forward", "feed_forward", layer, weight=20, inputs=20, forward=20))
    return [*units, Unit("output", "output", LAYERS, weight=15, inputs=15, forward=15)]


UNITS = make_units()
TOTAL = backward_flops(UNITS)
VALUES = [5.0, 1.0, 30.0, 4.0, 10.0, 2.0, 40.0, 3.0, 20.0, 7.0]
"""Attention 1, 4, 2, 3; feed-forward 30, 10, 40, 20."""


def config(**values: Any) -> FreezingConfig:
    made = FreezingConfig(**{"policy": "mat", "smoothing": 0.0, "hysteresis": 0.0} | values)
    made.validate()
    return made


def history(values: list[float] = VALUES) -> History:
    made = History(active=[True] * len(UNITS))
    made.update(values, config())
    return made


def frozen(active: list[bool]) -> list[str]:
    return [unit.name for unit, on in zip(UNITS, active, strict=True) if not on]


def saved(active: list[bool]) -> float:
    return sum(saved_flops(UNITS, active))


def test_saved_flops() -> None:
    assert TOTAL == 4 * 62 + 30
    active = [True] * 10
    assert saved(active) == 0
    active[4] = False  # a feed-forward above the first active module: only its weight gradient
    assert saved_flops(UNITS, active) == (20, 0)
    below = [False, False, False, True, False, *[True] * 5]
    assert saved_flops(UNITS, below) == (10 + 20 + 20, 12 + 20)
    assert saved_flops(UNITS, [False] * 10) == (135, 143)


def test_mat_freezes_small_values_within_each_type() -> None:
    """The threshold is the same share of the mean for both types, and the savings are closest to the target."""
    active = decide(UNITS, history(), config(backward_share=0.78))
    # Attention divided by its mean 2.5: .4 1.6 .8 1.2; feed-forward divided by 25: 1.2 .4 1.6 .8.
    assert frozen(active) == [
        "layers.0.attention",
        "layers.1.feed_forward",
        "layers.2.attention",
        "layers.3.feed_forward",
    ]
    assert saved(active) == 60 and abs(60 - 0.22 * TOTAL) < 5
    relatives = relative(UNITS, VALUES)
    alpha = max(value for value, on in zip(relatives, active, strict=True) if not on)
    for unit, value, on in zip(UNITS, relatives, active, strict=True):
        assert on == (value > alpha) or unit.kind in ("embedding", "output")


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.62, 0.8, 0.97, 1.0])
@pytest.mark.parametrize("policy", ["mat", "prefix", "truncated", "gradient_norm", "random"])
def test_the_share_that_is_kept(policy: str, share: float) -> None:
    active = decide(UNITS, history(), config(policy=policy, backward_share=share))
    reachable = 1 - saved([True, *[False] * 3, True, *[False] * 3, True, True]) / TOTAL
    if policy == "prefix":
        assert abs(saved(active) - (1 - share) * TOTAL) <= 20 or share < 0.3
    elif policy == "truncated":
        assert abs(saved(active) - (1 - share) * TOTAL) <= 21 or share < 0.3
    elif share > 0.75:
        assert abs(saved(active) - (1 - share) * TOTAL) <= 20
    assert active[-1]
    if policy not in ("prefix", "truncated"):
        kinds = Counter(unit.kind for unit, on in zip(UNITS, active, strict=True) if on)
        assert set(kinds) == {"embedding", "attention", "feed_forward", "output"}, "one of each type stays active"
    assert share < 1 or all(active)
    assert reachable < 1


def test_prefix_loses_nearly_the_least_value_of_all_choices_that_save_as_much() -> None:
    """Against every choice of a frozen prefix and frozen modules above it."""
    target = 0.4 * TOTAL
    active = decide(UNITS, history(), config(policy="prefix", backward_share=0.6))
    values = relative(UNITS, VALUES)
    ours = sum(value for value, on in zip(values, active, strict=True) if not on)
    assert saved(active) >= target - 0.02 * TOTAL
    best = math.inf
    for choice in itertools.product([True, False], repeat=9):
        mask = [*choice, True]
        if target - 0.02 * TOTAL <= saved(mask) <= saved(active):
            best = min(best, sum(value for value, on in zip(values, mask, strict=True) if not on))
    assert ours <= 1.35 * best, "a greedy choice, not far from the best"


def test_prefix_ends_the_backward_early_where_the_low_layers_have_settled() -> None:
    low = [0.01, 0.1, 1.0, 0.1, 1.0, 5.0, 50.0, 5.0, 50.0, 7.0]
    active = decide(UNITS, history(low), config(policy="prefix", backward_share=0.6))
    assert frozen(active)[:3] == ["tok_embeddings", "layers.0.attention", "layers.0.feed_forward"]
    assert saved_flops(UNITS, active)[1] > 0
    top = [5.0, 5.0, 50.0, 5.0, 50.0, 0.1, 1.0, 0.1, 1.0, 7.0]
    active = decide(UNITS, history(top), config(policy="prefix", backward_share=0.85))
    assert frozen(active)[0].startswith("layers.2") and saved_flops(UNITS, active)[1] == 0


def test_truncated_freezes_all_below_the_closest_cut() -> None:
    """Against every cut of models with random costs; no probe is needed."""
    draw = random.Random(0)
    for _ in range(200):
        units = [Unit("tok_embeddings", "embedding", -1)]
        for layer in range(draw.randint(1, 6)):
            for kind in ("attention", "feed_forward"):
                units.append(Unit(kind, kind, layer, weight=draw.randint(1, 30), inputs=draw.randint(1, 30)))
        units.append(Unit("output", "output", 9, weight=draw.randint(1, 30), inputs=draw.randint(1, 30)))
        costs, share = [unit.weight + unit.inputs for unit in units], draw.uniform(0.01, 1)
        found = decide(units, History(active=[True] * len(units)), config(policy="truncated", backward_share=share))
        first = found.index(True)
        assert found == [False] * first + [True] * (len(units) - first)
        kept = {cut: sum(costs[cut:]) / sum(costs) for cut in range(len(units))}
        nearest = min(abs(one - share) for one in kept.values())
        assert abs(kept[first] - share) == pytest.approx(nearest, abs=1e-12)
        assert all(abs(kept[cut] - share) > nearest + 1e-12 for cut in range(first)), "the lowest of equals"


def test_truncated_uses_no_value_and_does_not_probe() -> None:
    settings = config(policy="truncated", backward_share=0.55)
    assert not settings.probes and config(policy="prefix").probes
    made = history()
    active = decide(UNITS, made, settings)
    assert frozen(active) == [unit.name for unit in UNITS[:5]] and saved(active) == 2 * 62  # kept: 154 of 278
    assert decide(UNITS, history(VALUES[::-1]), settings) == active == decide(UNITS, made, settings)
    assert made.decisions == 2


def test_hysteresis_keeps_a_module_that_is_nearly_as_good() -> None:
    made = history()
    settings = config(backward_share=0.78, hysteresis=0.2)
    made.active = decide(UNITS, made, settings)
    assert frozen(made.active)[2] == "layers.2.attention"  # .8 of its mean
    nearly = list(VALUES)
    nearly[5], nearly[7] = 2.6, 2.4  # the two attentions have narrowly swapped their order
    made.update(nearly, settings)
    assert frozen(decide(UNITS, made, settings))[2] == "layers.2.attention"
    nearly[5], nearly[7] = 3.5, 1.5
    made.update(nearly, settings)
    assert "layers.2.attention" not in frozen(decide(UNITS, made, settings)), "it is active again"


def test_the_temporal_rule() -> None:
    settings = config(beta=0.1, rest=2, backward_share=0.92)
    made = History(active=[True] * 10)
    for change in (0.0, 1.0, 1.05):  # D_1 = 1 for all; the last step moves by 0.05 of it
        values = [value + (change if i == 6 else 3 * change) for i, value in enumerate(VALUES)]
        values[3] += 10 * change**4
        made.update(values, settings)
    settled = [abs(now - before) for now, before in zip(made.distances, made.first_distances, strict=True)]
    expected = [2 if change / first < 0.1 else 0 for change, first in zip(settled, made.first_distances, strict=True)]
    assert made.resting == expected and expected[3] == 0 and expected[6] == 2
    # The feed-forward of the largest eigenvalue is frozen first, as it has settled; the unsettled attention is not.
    assert "layers.1.attention" not in frozen(decide(UNITS, made, settings))
    made.update([value + 9 for value in values], settings)
    assert made.resting[6] == 1, "one of its two decisions is left"


def test_smoothing_and_values_that_are_not_finite() -> None:
    made, settings = History(active=[True] * 2), config(smoothing=0.75)
    for value in (1.0, 5.0, float("nan")):
        made.update([value, 2.0], settings)
    assert made.smooth == [2.0, 2.0] and made.first == [1.0, 2.0]


def test_random_draws_differ_and_depend_on_the_seed() -> None:
    made = history()
    draws = [frozen(decide(UNITS, made, config(policy="random", backward_share=0.8))) for _ in range(20)]
    assert len({tuple(draw) for draw in draws}) > 5
    again = history()
    assert draws == [frozen(decide(UNITS, again, config(policy="random", backward_share=0.8))) for _ in range(20)]
    other = history()
    assert draws != [
        frozen(decide(UNITS, other, config(policy="random", backward_share=0.8, seed=1))) for _ in range(20)
    ]


def test_gradient_norm_keeps_a_sample_in_proportion_to_the_norms() -> None:
    """One of two attentions stays active: in 9 of 10 draws the one with nine times the norm."""
    units = [Unit(f"layers.{i}.attention", "attention", i, weight=1, inputs=0) for i in range(2)]
    made = History(active=[True] * 2, first=[9.0, 1.0], smooth=[9.0, 1.0], resting=[0, 0])
    kept = Counter(
        decide(units, made, config(policy="gradient_norm", backward_share=0.5)).index(True) for _ in range(4000)
    )
    assert kept[0] / 4000 == pytest.approx(0.9, abs=0.02)


def test_shuffled_eigenvalues_keep_the_layout() -> None:
    made = history()
    plain = decide(UNITS, made, config(backward_share=0.78))
    for seed in range(20):
        mixed = decide(UNITS, made, config(backward_share=0.78, shuffle=True, seed=seed))
        assert Counter(unit.kind for unit, on in zip(UNITS, mixed, strict=True) if on) == Counter(
            unit.kind for unit, on in zip(UNITS, plain, strict=True) if on
        )
    assert len({tuple(decide(UNITS, made, config(backward_share=0.78, shuffle=True, seed=s))) for s in range(20)}) > 5


@pytest.mark.parametrize(
    "values, message",
    [
        ({"policy": "matt"}, 'policy = \'matt\' is unknown: use one of "off", "all", "mat"'),
        ({"probe": "nkt"}, "did you mean"),
        ({"backward_share": 0}, "backward_share = 0: it must be a number above 0 and at most 1"),
        ({"warmup_steps": 0}, "warmup_steps = 0: it must be a whole number at least 1"),
        ({"probe_examples": 1}, "probe_examples = 1: it must be a whole number at least 2"),
        ({"hysteresis": 1.0}, "hysteresis = 1.0: it must be a number at least 0 and below 1"),
        ({"beta": float("nan")}, "beta = nan"),
        ({"rest": 0}, "rest = 0"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        FreezingConfig(**values).validate()
    assert str(caught.value).startswith("[freezing] ") and message in str(caught.value)
