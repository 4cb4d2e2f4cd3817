"""losses/window.py against the rule of Sow et al. in numpy; windows depend on step numbers only."""

import numpy as np
import pytest
import torch

from titan_attent.losses.cross_entropy import build_weighted_loss, per_example_cross_entropy, weighted_cross_entropy
from titan_attent.losses.window import CappedLinear, LossWindow, capped_linear_weights, neutral_statistics

FLUSH, BATCH, TEMPERATURE = 4, 6, 0.5


def plain_weights(losses: np.ndarray, *, low: float, high: float) -> np.ndarray:
    """exp(min(h + 1, 1) / r), h in [-1, 1]; not divided by the mean."""
    return np.exp(np.minimum(np.clip(2 * (losses - low) / (high - low) - 1, -1, 1) + 1, 1) / TEMPERATURE)


def losses_of(step: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(step).gamma(3.0, 1.0, BATCH).astype(np.float32)) + step


def filled(*, last: int, cuts: tuple[int, ...] = ()) -> LossWindow:
    """A window after steps 1 to ``last``, exchanged at multiples of FLUSH and, as for a checkpoint, at ``cuts``."""
    window = LossWindow(flush_every=FLUSH, batch_size=BATCH, temperature=TEMPERATURE)
    pending: list[torch.Tensor] = []
    for step in range(1, last + 1):
        pending.append(losses_of(step))
        if step % FLUSH == 0 or step in cuts or step == last:
            window.write(torch.cat(pending), step=step)
            pending.clear()
    return window


@pytest.mark.parametrize("step, steps_of_window", [(9, (1, 4)), (12, (1, 4)), (13, (5, 8)), (17, (9, 12))])
def test_statistics_are_those_of_the_last_but_one_window(step, steps_of_window):
    losses = torch.cat([losses_of(s) for s in range(steps_of_window[0], steps_of_window[1] + 1)]).numpy()
    low, high = losses.min(), losses.max()
    mean = plain_weights(losses, low=low, high=high).mean()
    window = filled(last=step - 1)
    assert window.statistics(step).tolist() == pytest.approx([low, high, mean], rel=1e-6)
    weights = capped_linear_weights(torch.from_numpy(losses), window.statistics(step), temperature=TEMPERATURE).numpy()
    np.testing.assert_allclose(weights, plain_weights(losses, low=low, high=high) / mean, rtol=1e-5)
    assert weights.mean() == pytest.approx(1.0, rel=1e-5)
    assert weights.max() / weights.min() == pytest.approx(np.exp(1 / TEMPERATURE), rel=1e-4)
    assert (weights[losses > (low + high) / 2] == weights.max()).all()  # all above the middle count alike


def test_a_loss_outside_of_the_old_range_is_clamped():
    statistics = torch.tensor([2.0, 4.0, 1.0])
    weights = capped_linear_weights(torch.tensor([-1.0, 2.0, 3.0, 4.0, 99.0]), statistics, temperature=1.0)
    assert weights.tolist() == pytest.approx([1.0, 1.0, np.e, np.e, np.e])


def test_the_first_two_windows_are_neutral():
    for step in range(1, 2 * FLUSH + 1):
        statistics = filled(last=step - 1).statistics(step)
        assert torch.equal(statistics, neutral_statistics())
        assert torch.equal(capped_linear_weights(losses_of(step), statistics, temperature=1.0), torch.ones(BATCH))


@pytest.mark.parametrize("cuts", [(1,), (2, 3), (5, 6, 7), (10, 11)])
def test_a_checkpoint_does_not_shift_windows(cuts):
    for step in range(1, 20):
        assert torch.equal(filled(last=step - 1, cuts=cuts).statistics(step), filled(last=step - 1).statistics(step))


@pytest.mark.parametrize("cut", [1, 4, 7, 8, 11])
def test_a_resumed_window_continues(cut):
    for step in range(cut + 1, cut + 10):
        window = LossWindow(flush_every=FLUSH, batch_size=BATCH, temperature=TEMPERATURE)
        window.statistics(step)  # the load discards the cached statistics
        window.load_state_dict(filled(last=cut).state_dict())
        for later in range(cut + 1, step):
            window.write(losses_of(later), step=later)
        assert torch.equal(window.statistics(step), filled(last=step - 1).statistics(step))


def test_non_finite_losses_and_a_window_of_equal_losses():
    window = LossWindow(flush_every=2, batch_size=2, temperature=1.0)
    window.write(torch.tensor([1.0, float("nan"), 3.0, float("inf")]), step=2)
    assert window.statistics(5)[:2].tolist() == [1.0, 3.0]
    window.write(torch.full((4,), 2.5), step=4)
    assert torch.equal(window.statistics(7), neutral_statistics())
    window.write(torch.full((4,), float("nan")), step=6)
    assert torch.equal(window.statistics(9), neutral_statistics())


def test_an_example_without_a_label_counts_nowhere() -> None:
    """Its loss is 0, which would be the low end of the range."""
    alone, beside = (LossWindow(flush_every=FLUSH, batch_size=BATCH, temperature=TEMPERATURE) for _ in range(2))
    losses = losses_of(1)
    alone.write(losses[:4], step=FLUSH)
    beside.write(torch.cat((losses[:2], torch.zeros(2), losses[2:4])), step=FLUSH)
    statistics = beside.statistics(2 * FLUSH + 1)
    assert torch.equal(alone.statistics(2 * FLUSH + 1), statistics) and statistics[0] == losses[:4].min()


def test_a_state_of_another_batch_is_refused():
    other = LossWindow(flush_every=FLUSH, batch_size=BATCH + 1, temperature=1.0)
    with pytest.raises(ValueError, match=r"holds \(3, 28\), this run needs \(3, 24\): resume with the global batch"):
        filled(last=4).load_state_dict(other.state_dict())


@pytest.mark.parametrize("compile_loss", [False, True])
def test_the_loss_applies_the_weights(compile_loss):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 11, generator=generator, requires_grad=True)
    labels = torch.randint(11, (3, 5), generator=generator)
    labels[1, 2:] = -100
    weights, statistics = torch.tensor([1.0, 0.5, 2.0]), torch.tensor([2.0, 3.5, 1.3])
    sums, counts = per_example_cross_entropy(logits.double(), labels)
    factors = capped_linear_weights((sums / counts).detach(), statistics, temperature=TEMPERATURE)
    assert factors.min() != factors.max()
    expected = (sums * weights * factors).sum()
    loss = build_weighted_loss(compile_loss=compile_loss, rule=CappedLinear(TEMPERATURE), backend="aot_eager")
    weighted, unweighted, *_ = loss(logits, labels, weights, statistics)
    assert weighted.item() == pytest.approx(expected.item(), rel=1e-5)
    assert unweighted.item() == pytest.approx(sums.sum().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(weighted, logits)
    (plain,) = torch.autograd.grad(expected, logits)  # no gradient flows through the weights
    torch.testing.assert_close(gradient, plain)
    assert weighted_cross_entropy(logits, labels, weights).weighted_sum != weighted
