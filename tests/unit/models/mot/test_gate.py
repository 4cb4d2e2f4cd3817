"""The gate of the mixture of transformers: noise, balance, counts, and the labels that do not count."""

from pathlib import Path

import pytest
import torch

from titan_attent.data.text.shards import TokenDataset
from titan_attent.data.text.writer import write_dataset
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.models.mot.config import MotConfig
from titan_attent.models.mot.examples import RoutedWindows
from titan_attent.models.mot.gate import balance_loss, count_routes, decide, exploration, route_keys


def test_noise_depends_on_seed_step_example_layer_and_expert_alone() -> None:
    ids = torch.arange(1000)
    keys = route_keys(ids, seed=1, step=3)
    assert torch.equal(keys[[7, 5]], route_keys(torch.tensor([7, 5]), seed=1, step=3))
    noise = exploration(keys, layer=0, num_experts=4, scale=2.0)
    others = (
        exploration(route_keys(ids, seed=2, step=3), layer=0, num_experts=4, scale=2.0),
        exploration(route_keys(ids, seed=1, step=4), layer=0, num_experts=4, scale=2.0),
        exploration(keys, layer=1, num_experts=4, scale=2.0),
        noise.roll(1, dims=1),
        noise.roll(1, dims=0),
    )
    assert noise.min() >= 0 and noise.max() < 2 and abs(noise.mean() - 1) < 0.03
    for other in others:
        assert abs(torch.corrcoef(torch.stack((noise.flatten(), other.flatten())))[0, 1]) < 0.06


def test_the_route_is_the_largest_noisy_logit_and_the_probability_has_no_noise() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 9, 8), torch.randn(3, 8, requires_grad=True)
    noise = torch.rand(6, 3) * 5
    routing = decide(hidden, weight, prefix=4, noise=noise)
    means = torch.stack([torch.stack([x / x.square().mean().sqrt() for x in one[:4]]).mean(0) for one in hidden])
    logits = means @ weight.T
    assert routing.route.tolist() == (logits + noise).argmax(1).tolist() != logits.argmax(1).tolist()
    expected = logits.softmax(1)[torch.arange(6), routing.route]
    torch.testing.assert_close(routing.probability, expected, rtol=1e-5, atol=1e-6)
    changed = hidden.clone()
    changed[:, 4:] = 0
    assert torch.equal(decide(changed, weight, prefix=4).probabilities, decide(hidden, weight, prefix=4).probabilities)
    routing.probability.sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_the_balance_loss() -> None:
    probabilities, shares = torch.rand(2, 5, 3).softmax(-1), torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    expected = [
        sum(3 * sum(shares[n, e] * probabilities[n, b, e] for e in range(3)) for n in range(2)) / 2 for b in range(5)
    ]
    torch.testing.assert_close(balance_loss(probabilities, shares), torch.stack(expected))  # type: ignore[arg-type]
    even = torch.full((2, 3), 1 / 3)
    torch.testing.assert_close(balance_loss(probabilities, even), torch.ones(5))


def test_counts() -> None:
    counts = count_routes(torch.tensor([[0, 2, 2], [1, 1, 0]]), torch.tensor([4, 1, 8]), num_experts=3)
    assert counts.tolist() == [[4, 0, 9], [8, 5, 0]]


def test_labels_that_the_gate_has_seen_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"some text {i} to be cut into windows " for i in range(60)))
    write_dataset([tmp_path / "text.txt"], output=tmp_path / "data", tokenizer="train:300")
    plain, routed = TokenDataset(tmp_path / "data", seq_len=16), RoutedWindows(tmp_path / "data", seq_len=16, prefix=5)
    ids = torch.tensor([3, 0])
    (inputs, labels), (same, masked) = plain.batch(ids), routed.batch(ids)
    assert torch.equal(inputs, same) and torch.equal(masked[:, 4:], labels[:, 4:])
    assert (masked[:, :4] == IGNORE_INDEX).all()
    assert labels[0, 4] == inputs[0, 5], "the first label that counts is the first token behind the prefix"
    assert torch.equal(routed.read(ids)[1], masked)
    assert torch.equal(RoutedWindows(tmp_path / "data", seq_len=16, prefix=1).batch(ids)[1], labels)
    with pytest.raises(ValueError, match=r"\[mot\] prefix = 17 is more than the 16 tokens"):
        RoutedWindows(tmp_path / "data", seq_len=16, prefix=17)


@pytest.mark.parametrize(
    ("key", "value"), [("num_experts", 0), ("prefix", 0), ("noise", -1.0), ("balance", -0.1), ("noise_steps", -1)]
)
def test_values_that_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"\[mot\] {key} = {value}"):
        MotConfig(**{key: value}).validate()  # type: ignore[arg-type]
