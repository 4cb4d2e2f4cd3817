"""Expressions, layer factors and the weights of means, against their definitions."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titan_attent.edit.averages import DECAYS, decay_weights, replaced_decay, update_shares
from titan_attent.edit.expression import parse
from titan_attent.edit.layers import check_factors, factor_of, parse_factor


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("base", "base"),
        ("base + 0.4 ft1 - 0.6 ft2", "base + 0.4 (ft1 - base) - 0.6 (ft2 - base)"),
        ("base - ft1", "base - 1 (ft1 - base)"),
        ("c + b from a", "c + 1 (b - a)"),
        ("runs/step-10/ + -0.5 x-1/step-2", "runs/step-10 - 0.5 (x-1/step-2 - runs/step-10)"),
    ],
)
def test_the_words_mean(text: str, meaning: str) -> None:
    assert str(parse(text.split())) == meaning


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a checkpoint is missing"),
        ("+ a", "a checkpoint is expected, and . is none"),
        ("base ft", "base ft: . or - is expected before ft"),
        ("base + 0.4", "a checkpoint is missing after ."),
        ("base + 0.4 0.5 a", "a checkpoint is expected after ., and 0.5 is none"),
        ("base + a from", "a checkpoint is missing after from"),
        ("base + base", "the vector of base from itself is 0"),
        ("base + nan a", "a coefficient must be finite, and nan is not"),
    ],
)
def test_a_wrong_expression_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(" . ", " [+] ").replace("after .", "after [+]")):
        parse(text.split())


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("attention", "layers.3.attention.wq.weight", True),
        ("layers.0-7.attention", "layers.7.attention.wq.weight", True),
        ("layers.0-7", "layers.8.attention.wq.weight", False),
        ("layers.1", "layers.10.attention.wq.weight", False),
        ("norm", "layers.0.attention_norm.weight", False),
        ("norm", "norm.weight", True),
        ("attention.weight", "layers.3.attention.wq.weight", False),
    ],
)
def test_a_pattern_fits_whole_words_next_to_each_other(pattern: str, name: str, fits: bool) -> None:
    assert parse_factor(f"{pattern}=0.5", num_vectors=1).fits(name) == fits


def test_the_last_factor_that_fits_counts() -> None:
    factors = [parse_factor(text, num_vectors=2) for text in ("attention=0.5", "2:layers.0-1=0", "wq=3")]
    assert factor_of(factors, 1, "layers.0.attention.wo.weight") == 0.5
    assert factor_of(factors, 2, "layers.0.attention.wo.weight") == 0
    assert factor_of(factors, 2, "layers.0.attention.wq.weight") == 3
    assert factor_of(factors, 1, "norm.weight") == 1


@pytest.mark.parametrize("text", ["attention", "attention=", "=2", "attention=x", "attention=inf", "a b=1", "3:norm=1"])
def test_a_wrong_factor_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"--scale {text}: (write it as|there is no vector 3)"):
        parse_factor(text, num_vectors=2)


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match='it fits none of the 1 weights; did you mean "attention"'):
        check_factors([parse_factor("atention=0.5", num_vectors=1)], ["layers.0.attention.wq.weight"])


@given(
    steps=st.lists(st.integers(0, 10**6), min_size=2, max_size=12, unique=True).map(sorted),
    decay=st.sampled_from(sorted(DECAYS)),
)
def test_a_mean_scales_the_updates_by_the_decay(steps: list[int], decay: str) -> None:
    """The mean of checkpoints that sum up updates, in a loop, against the updates each scaled by the decay."""
    weights = decay_weights(steps, decay)
    assert sum(weights) == pytest.approx(1) and min(weights) >= 0
    updates = torch.randn(len(steps) - 1, dtype=torch.float64)
    checkpoints = [float(updates[:i].sum()) for i in range(len(steps))]
    mean = sum(weight * value for weight, value in zip(weights, checkpoints, strict=True))
    start, stop = steps[0] - (steps[1] - steps[0]) / 2, steps[-1] + (steps[-1] - steps[-2]) / 2
    at = [((a + b) / 2 - start) / (stop - start) for a, b in pairwise(steps)]
    assert mean == pytest.approx(sum(DECAYS[decay](x) * float(u) for x, u in zip(at, updates, strict=True)))
    assert update_shares(weights) == pytest.approx([DECAYS[decay](x) for x in at])


@pytest.mark.parametrize("num", [1, 2, 5])
def test_equal_weights_are_the_linear_decay(num: int) -> None:
    assert decay_weights(range(100, 100 + 50 * num, 50), "linear") == pytest.approx([1 / num] * num)


def test_the_decay_that_a_mean_replaces_is_said() -> None:
    steps = [800, 850, 900, 950]
    text = replaced_decay(steps, decay_weights(steps, "linear"), decay="linear")
    assert "a linear decay of the learning rate over steps 775 to 975" in text and "count 0.75, 0.5, 0.25 of" in text
