"""The one-layer model of k-parity: its parts against loops over single values, its stable cells at a small size."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from benchmarks.parity import page
from benchmarks.parity.model import (
    ANSWER_SHARE,
    METHODS,
    RATES,
    Tree,
    answer,
    attend,
    chain_loss,
    consistent_loss,
    draw,
    link,
    teacher_forcing_loss,
    train,
)

TREE = Tree(6, (4, 1, 0, 3))


def perfect(size: float = 50.0) -> torch.Tensor:
    """Weights of the tree's own edges."""
    weights = torch.zeros(3, 9)
    for node, inputs in enumerate([(4, 1), (0, 3), (6, 7)]):
        weights[node, list(inputs)] = size
    return weights


def one_node(weights: torch.Tensor, node: int, values: list[float], positions: range) -> float:
    """A node by a loop: softmax over the positions, their mean, the link."""
    sizes = [math.exp(float(weights[node, position])) for position in positions]
    t = sum(size * values[position] for size, position in zip(sizes, positions, strict=True)) / sum(sizes)
    return 4 * t**2 - 1 if abs(t) < 0.5 else -4 * t**2 + 8 * abs(t) - 3


def test_levels_halve_up_to_the_answer() -> None:
    assert TREE.levels == [range(6, 8), range(8, 9)]
    assert Tree(64, tuple(range(32))).levels == [
        range(64, 80),
        range(80, 88),
        range(88, 92),
        range(92, 94),
        range(94, 95),
    ]


def test_the_last_node_is_the_parity_of_the_hidden_bits() -> None:
    _, bits = draw(6, 4, 50, 0)
    assert torch.equal(TREE.right(bits)[-1], bits[[0, 1, 3, 4]].prod(0))


def test_the_link_gives_the_parity_of_two_from_their_mean() -> None:
    assert link(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [1.0, -1.0, 1.0]
    below, above = link(torch.tensor([0.5 - 1e-6, 0.5 + 1e-6]))
    assert below == pytest.approx(float(above), abs=1e-4)


@pytest.mark.parametrize("by_level", [False, True])
def test_perfect_weights_answer_every_row(by_level: bool) -> None:
    _, bits = draw(6, 4, 64, 1)
    assert torch.allclose(answer(perfect(), TREE, bits, by_level=by_level), TREE.right(bits)[-1], atol=1e-4)


def test_losses_against_loops() -> None:
    _, drawn = draw(6, 4, 5, 2)
    weights = torch.randn(3, 9, generator=torch.Generator().manual_seed(3))
    right = TREE.right(drawn)
    forced = chained = last = 0.0
    for row in range(5):
        bits, truth = drawn[:, row].tolist(), right[:, row].tolist()
        forced += sum((one_node(weights, node, bits + truth, range(6 + node)) - truth[node]) ** 2 for node in range(3))
        low = [one_node(weights, node, bits, range(6)) for node in range(2)]
        high = one_node(weights, 2, bits + low, range(6, 8))
        chained += sum((own - wanted) ** 2 for own, wanted in zip([*low, high], truth, strict=True))
        last += (high - truth[2]) ** 2
    assert teacher_forcing_loss(weights, TREE, drawn, right).item() == pytest.approx(forced / 2 / 5 / 3, rel=1e-5)
    assert chain_loss(weights, TREE, drawn, right).item() == pytest.approx(chained / 2 / 5 / 3, rel=1e-5)
    # A node of the lower level with more than FOUND in one position each: the level above is open.
    sure = weights + perfect(4.0)
    both = chain_loss(sure, TREE, drawn, right) + ANSWER_SHARE / 3 * (
        (answer(sure, TREE, drawn, by_level=True) - right[2]).square().mean() / 2
    )
    assert consistent_loss(sure, TREE, drawn, right).item() == pytest.approx(both.item(), rel=1e-5)


def test_a_closed_level_learns_nothing_and_is_zero() -> None:
    _, bits = draw(6, 4, 40, 4)
    weights = torch.zeros(3, 9, requires_grad=True)
    right = TREE.right(bits)
    loss = consistent_loss(weights, TREE, bits, right)
    (gradient,) = torch.autograd.grad(loss, weights)
    low = torch.stack([link(bits.mean(0))] * 2)
    nodes = torch.cat([low, torch.zeros(1, 40)])
    assert loss.item() == pytest.approx(float((nodes - right).square().mean()) / 2 + ANSWER_SHARE / 2 / 3, rel=1e-5)
    assert gradient[2].abs().max() == 0 and gradient[:2].abs().max() > 0


def test_a_detached_step_has_the_same_loss_and_no_gradient_from_the_step_above() -> None:
    _, bits = draw(6, 4, 40, 5)
    weights = torch.randn(3, 9, generator=torch.Generator().manual_seed(6)).requires_grad_()
    right = TREE.right(bits)
    through, alone = (chain_loss(weights, TREE, bits, right, detached=detached) for detached in (False, True))
    assert torch.equal(through, alone)
    gradients = [torch.autograd.grad(loss, weights)[0] for loss in (through, alone)]
    assert torch.equal(gradients[0][2], gradients[1][2])
    own = (attend(weights, TREE, range(6, 8), range(6), bits) - right[:2]).square().sum() / 2 / right.numel()
    assert torch.allclose(gradients[1][:2], torch.autograd.grad(own, weights)[0][:2], atol=1e-7)
    assert not torch.allclose(gradients[0][:2], gradients[1][:2], atol=1e-3)


def last(name: str, k: int, bits: int, rows: int, epochs: int) -> float:
    tree, drawn = draw(bits, k, rows + 500, 0)
    looks = train(name, tree, drawn[:, :rows], drawn[:, rows:], rate=RATES[8] / 2, epochs=epochs, every=epochs)
    return [accuracy for _, _, accuracy in looks][-1]


@pytest.mark.parametrize("name", ["teacher forcing", "self-consistency"])
def test_supervised_steps_solve_a_small_parity(name: str) -> None:
    assert last(name, 8, 16, 3000, 150) == 1.0


def test_without_them_it_stays_at_chance() -> None:
    assert 0.4 < last("direct", 8, 16, 3000, 150) < 0.6


# -- the page ---------------------------------------------------------------------------------------------------------


def result(name: str, k: int, seed: int, accuracies: list[float]) -> dict[str, Any]:
    looks = [{"epoch": 25 * look, "loss": 0.1, "accuracy": accuracy} for look, accuracy in enumerate(accuracies)]
    return {"method": name, "k": k, "rows": 100, "seed": seed, "looks": looks, "seconds": 1.0, "machine": "a machine"}


def test_solved_means_from_an_epoch_on() -> None:
    assert page.solved_at(result("direct", 8, 0, [0.5, 1.0, 0.9, 1.0, 1.0])) == 75
    assert page.solved_at(result("direct", 8, 0, [0.5, 1.0, 0.9])) is None


def test_verdicts() -> None:
    results = [result("direct", 8, seed, [0.5, 0.51]) for seed in (0, 1)]
    results += [result("teacher forcing", 16, seed, [0.5, 0.6]) for seed in (0, 1)]
    results += [result("chain of thought", 8, 0, [0.5, 1.0, 1.0]), result("chain of thought", 8, 1, [0.5, 0.5, 0.5])]
    text = page.page(results)
    assert "| direct | 8 | not solved | 0 of 2 seeds; accuracy 0.510, 0.510 at epoch 25 | reproduced |" in text
    assert (
        "| teacher forcing | 16 | solved | 0 of 2 seeds; accuracy 0.600, 0.600 at epoch 25 | not reproduced |" in text
    )
    assert "| 1 of 2 seeds, at epoch 25 | depends on the seed: solved by 1 of 2 |" in text
    order = [text.index(f"| {name} |") for name in METHODS if f"| {name} |" in text]
    assert all(a < b for a, b in pairwise(order))
