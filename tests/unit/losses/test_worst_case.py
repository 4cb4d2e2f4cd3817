"""The q-norm over inputs: its gradient by microbatches against autograd of the norm itself, in float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titan_attent.losses.build import build_example_loss
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.losses.worst_case import LARGEST, PowerWeights, WorstCase, scale_gradients

B, L, V, M = 12, 5, 7, 3
"""Rows, tokens, vocabulary, seeds per input."""


def batch(*, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Logits [B, L, V] and labels [B, L] of which some do not count, among them all of row 4 and of input 3."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, L, V, generator=generator) * scale
    labels = torch.randint(V, (B, L), generator=generator)
    labels[torch.rand(B, L, generator=generator) < 0.3] = IGNORE_INDEX
    labels[4] = labels[9:] = IGNORE_INDEX
    return logits, labels


def norm_of_batch(logits: Tensor, labels: Tensor, *, q: float, group_size: int = M) -> Tensor:
    """L_q by a loop over inputs, in float64."""
    terms, num = torch.zeros((), dtype=torch.float64), 0
    for i in range(0, len(labels), group_size):
        rows = labels[i : i + group_size]
        count = int((rows != IGNORE_INDEX).sum())
        if count:
            nats = F.cross_entropy(logits[i : i + group_size].double().flatten(0, 1), rows.flatten(), reduction="sum")
            terms, num = terms + count * (nats / count) ** q, num + count
    return (terms / num) ** (1 / q)


def one_step(
    worst: WorstCase, logits: Tensor, labels: Tensor, *, microbatches: int, num_chunks: int = 1, compiled: bool = False
) -> Tensor:
    """The gradient of a step, as a run computes it: weights within the loss, one scaling at the end."""
    leaf = nn.Parameter(logits.clone())
    options = {"num_chunks": num_chunks, "compile_loss": compiled, "backend": "aot_eager"}
    loss = build_example_loss(rule=worst.rule, **options)
    num = int((labels != IGNORE_INDEX).sum())
    for rows in torch.arange(len(labels)).chunk(microbatches):
        ones = torch.ones(len(rows))
        result = loss(leaf[rows], labels[rows], ones, worst.scale)
        (result.weighted_sum / num).backward()
        worst.add(result.losses, result.counts)
    scale_gradients([leaf, nn.Parameter(torch.zeros(1))], worst.finish())
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("q", [1.0, 2.0, 7.5, 40.0])
@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_a_step_is_the_gradient_of_the_norm(q: float, microbatches: int) -> None:
    logits, labels = batch()
    exact = logits.double().requires_grad_()
    norm = norm_of_batch(exact, labels, q=q)
    norm.backward()
    worst = WorstCase(PowerWeights(q, M), first_scale=2.0, device="cpu")
    ours = one_step(worst, logits, labels, microbatches=microbatches)
    assert exact.grad is not None
    torch.testing.assert_close(ours.double(), exact.grad, rtol=2e-5, atol=1e-8)
    assert worst.scale.item() == pytest.approx(norm.item(), rel=1e-6)
    # The second step's scale is the first one's norm; its gradient is the same but for rounding.
    again = one_step(worst, logits, labels, microbatches=microbatches)
    torch.testing.assert_close(again, ours, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("num_chunks", "compiled"), [(3, False), (1, True)])
def test_other_losses_give_the_same_step(num_chunks: int, compiled: bool) -> None:
    logits, labels = batch()
    steps = [
        one_step(
            WorstCase(PowerWeights(4.0, M), first_scale=2.0, device="cpu"), logits, labels, microbatches=2, **options
        )
        for options in ({}, {"num_chunks": num_chunks, "compiled": compiled})
    ]
    torch.testing.assert_close(steps[1], steps[0], rtol=2e-5, atol=1e-8)


def test_packed_examples_are_inputs_of_their_own_and_empty_slots_count_nowhere() -> None:
    """Each row holds two examples and an empty slot."""
    logits, labels = batch()
    index = (torch.arange(L) >= 2).long().expand(B, -1)
    alone_logits, alone_labels = (
        torch.cat([torch.where((index == i).view(B, L, *one), x, fill) for i in (0, 1)])
        for x, fill, one in ((logits, 0.0, (1,)), (labels, IGNORE_INDEX, ()))
    )
    exact = alone_logits.double().requires_grad_()
    norm_of_batch(exact, alone_labels, q=5.0, group_size=1).backward()
    worst = WorstCase(PowerWeights(5.0), first_scale=2.0, device="cpu")
    leaf = nn.Parameter(logits.clone())
    slots = index + 3 * torch.arange(B)[:, None]
    loss = build_example_loss(rule=worst.rule)
    result = loss(leaf, labels, torch.ones(3 * B), worst.scale, example_index=slots)
    (result.weighted_sum / int((labels != IGNORE_INDEX).sum())).backward()
    worst.add(result.losses, result.counts)
    scale_gradients([leaf], worst.finish())
    assert leaf.grad is not None and exact.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad[:B] + exact.grad[B:], rtol=2e-5, atol=1e-8)


def test_with_q_of_one_every_weight_and_the_factor_are_exactly_one() -> None:
    losses, counts = torch.rand(B), torch.randint(1, 9, (B,)).float()
    worst = WorstCase(PowerWeights(1.0, M), first_scale=0.3, device="cpu")
    assert torch.equal(worst.rule(losses, counts, worst.scale), torch.ones(B))
    worst.add(losses, counts)
    assert worst.finish().item() == 1.0


def test_a_large_norm_is_near_the_worst_input_and_seeds_share_a_weight() -> None:
    losses = torch.tensor([1.0, 1.0, 4.0, 2.0])  # means 1 and 3
    rule = PowerWeights(200.0, 2)
    worst = WorstCase(rule, first_scale=3.0, device="cpu")
    weights = rule(losses, torch.ones(4), worst.scale)
    assert weights[0] == weights[1] < 1e-30 and weights[2] == weights[3] == 1.0
    worst.add(losses, torch.ones(4))
    worst.finish()
    assert worst.scale.item() == pytest.approx(3 * 0.5 ** (1 / 200), rel=1e-12)


def test_a_loss_that_is_not_finite_leaves_the_scale_and_zeros_leave_the_gradient() -> None:
    worst = WorstCase(PowerWeights(3.0), first_scale=2.0, device="cpu")
    for broken in (float("nan"), float("inf")):
        worst.add(torch.tensor([1.0, broken]), torch.ones(2))
        worst.finish()
        assert worst.scale.item() == 2.0
    worst.add(torch.zeros(2), torch.ones(2))
    assert worst.finish().item() == 1.0 and worst.scale.item() == 2.0


def test_a_weight_is_cut_before_it_overflows() -> None:
    weights = PowerWeights(3.0)(torch.tensor([1e30, 1.0]), torch.ones(2), torch.tensor(2.0, dtype=torch.float64))
    assert weights.tolist() == [pytest.approx(LARGEST, rel=1e-6), 0.25]
