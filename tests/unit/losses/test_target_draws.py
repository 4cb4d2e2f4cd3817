"""losses/target_draws.py: the mean over many draws is the source's distribution; top-k is not."""

import pytest
import torch

from titan_attent.losses import target_draws
from titan_attent.losses.target_draws import draw_targets, top_targets

T, V = 6, 23


def logits() -> torch.Tensor:
    found = torch.randn(T, V, generator=torch.Generator().manual_seed(0)) * 3
    found[1, 4:] = -torch.inf  # ids that the source excludes, the last one included
    found[2] = 0.0
    found[3, 7] = 60.0
    return found


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("num", [1, 12])
def test_the_mean_over_many_draws_is_the_distribution_within_its_standard_error(num: int, temperature: float) -> None:
    p, rounds = (logits().double() / temperature).softmax(-1), 3000
    tokens = torch.arange(T * rounds)  # every token of the data set draws for itself
    ids = draw_targets(logits().repeat(rounds, 1), tokens, num=num, temperature=temperature, seed=1)
    counts = torch.zeros(T * rounds, V).scatter_add_(1, ids.long(), torch.ones(ids.shape)).view(rounds, T, V)
    mean = (counts / num).double().mean(dim=0)
    # A count is the whole number below or above N p.
    left = num * p - (num * p).floor()
    error = (left * (1 - left)).sqrt() / num / rounds**0.5
    assert ((mean - p).abs() <= 5 * error + 1e-9).all()
    assert ((counts - num * p).abs() <= 1 + 1e-9).all()


def test_excluded_ids_are_never_drawn() -> None:
    ids = draw_targets(logits(), torch.arange(T), num=64, temperature=1.0, seed=3)
    assert ids[1].max() < 4 and (ids[3] == 7).all()


def test_draws_depend_on_the_token_and_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the batch that a token is in, nor on the chunks."""
    tokens = torch.tensor([5, 90, 3, 12, 8, 77])
    whole = draw_targets(logits(), tokens, num=8, temperature=1.0, seed=3)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    monkeypatch.setattr(target_draws, "CHUNK_NUMBERS", 2 * V)
    assert torch.equal(draw_targets(logits()[order], tokens[order], num=8, temperature=1.0, seed=3), whole[order])
    assert not torch.equal(draw_targets(logits(), tokens, num=8, temperature=1.0, seed=4), whole)
    assert not torch.equal(draw_targets(logits(), tokens + 1, num=8, temperature=1.0, seed=3), whole)


def test_the_largest_probabilities_are_biased() -> None:
    """Normalised, they overstate what they hold, and rare ids are never heard of."""
    p = logits().softmax(-1)
    ids, probabilities = top_targets(logits(), num=5, temperature=1.0)
    expected, order = p.sort(dim=-1, descending=True)
    torch.testing.assert_close(probabilities.float(), expected[:, :5], rtol=1e-3, atol=1e-6)
    assert torch.equal(ids[0].long(), order[0, :5])
    assert (probabilities[0] / probabilities[0].sum() > expected[0, :5] * 1.01).all()
