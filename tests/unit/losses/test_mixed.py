"""losses/mixed.py against float64 loops over examples, torch's soft cross-entropy, and autograd."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from titan_attent.losses.cross_entropy import IGNORE_INDEX, weighted_cross_entropy
from titan_attent.losses.mixed import build_mixed_loss, mixed_targets, weighted_mixed_cross_entropy
from titan_attent.losses.window import CappedLinear, capped_linear_weights

WEIGHTS_B = torch.tensor([0.25, 1.0, 3.5, 2.0, 0.5])
LABELS_B1 = torch.tensor([[3], [0], [IGNORE_INDEX], [5], [2]])
OTHERS_B = torch.tensor([1, 0, 4, IGNORE_INDEX, 6])  # different, the same, of padding, none, different
SHARES_B = torch.tensor([0.3, 0.6, 0.5, 1.0, 0.0])
STATISTICS = torch.tensor([0.5, 3.5, 1.3])
RULE = CappedLinear(0.7)


def logits_of(*, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> torch.Tensor:
    return (torch.randn(5, 1, 7, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)


def plain_losses(logits_BLC: torch.Tensor, smoothing: float) -> list[float]:
    """The loss of each example in float64: share x the first smoothed cross-entropy + (1 - share) x the second."""
    losses = []
    for z, a, b, share in zip(
        logits_BLC[:, 0].double().tolist(),
        LABELS_B1[:, 0].tolist(),
        OTHERS_B.tolist(),
        SHARES_B.double().tolist(),
        strict=True,
    ):
        if a == IGNORE_INDEX:
            losses.append(0.0)
            continue
        log_p = [value - max(z) - math.log(sum(math.exp(v - max(z)) for v in z)) for value in z]
        average = sum(log_p) / len(log_p)
        parts = [
            part * -((1 - smoothing) * log_p[label] + smoothing * average)
            for label, part in ((a, share), (b, 1 - share))
            if part
        ]
        losses.append(sum(parts))
    return losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_means_are_those_of_a_loop(dtype: torch.dtype, smoothing: float) -> None:
    logits = logits_of(dtype=dtype).requires_grad_()
    outputs = weighted_mixed_cross_entropy(
        logits, LABELS_B1, WEIGHTS_B, None, OTHERS_B, SHARES_B, label_smoothing=smoothing
    )
    expected = torch.tensor(plain_losses(logits.detach(), smoothing))
    torch.testing.assert_close(outputs.weighted_sum, (expected * WEIGHTS_B).sum(), rtol=2e-6, atol=0)
    torch.testing.assert_close(outputs.loss_sum, expected.sum(), rtol=2e-6, atol=0)
    torch.testing.assert_close(outputs.losses, expected, rtol=2e-6, atol=0)
    assert outputs.gradients is None
    assert [output.requires_grad for output in outputs[:3]] == [True, False, False]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradients_and_their_norms_are_autograds(smoothing: float) -> None:
    leaf, plain = logits_of().requires_grad_(), logits_of().double().requires_grad_()
    weighted, _, _, norms_B, _ = weighted_mixed_cross_entropy(
        leaf,
        LABELS_B1,
        WEIGHTS_B,
        None,
        OTHERS_B,
        SHARES_B,
        label_smoothing=smoothing,
        with_gradient=True,
    )
    weighted.backward()
    shares = SHARES_B.double()
    first, other = (
        F.cross_entropy(plain[:, 0], labels, reduction="none", ignore_index=IGNORE_INDEX, label_smoothing=smoothing)
        for labels in (LABELS_B1[:, 0], OTHERS_B)
    )
    valid = LABELS_B1[:, 0] != IGNORE_INDEX
    (gradient,) = torch.autograd.grad((shares * first + (1 - shares) * other)[valid].sum(), plain)
    torch.testing.assert_close(leaf.grad.double(), gradient * WEIGHTS_B[:, None, None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norms_B.double(), gradient[:, 0].norm(dim=1), rtol=1e-5, atol=1e-7)
    assert norms_B[2] == 0 and not norms_B.requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_are_those_of_torchs_soft_cross_entropy(smoothing: float) -> None:
    targets = mixed_targets(
        torch.tensor([[3], [0]]),
        torch.tensor([1, 0]),
        torch.tensor([0.3, 0.6]),
        num_classes=7,
        label_smoothing=smoothing,
    )
    hard = torch.tensor([[0, 0.7, 0, 0.3, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(targets[:, 0], (1 - smoothing) * hard + smoothing / 7)
    logits = logits_of()[:2]
    outputs = weighted_mixed_cross_entropy(
        logits,
        torch.tensor([[3], [0]]),
        torch.ones(2),
        None,
        torch.tensor([1, 0]),
        torch.tensor([0.3, 0.6]),
        label_smoothing=smoothing,
    )
    torchs = F.cross_entropy(logits[:, 0], hard, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(outputs.losses, torchs, rtol=2e-6, atol=0)


@pytest.mark.parametrize("shares", [torch.ones(5), torch.tensor([0.1, 0.4, 0.7, 0.9, 0.0])], ids=["one", "any"])
def test_where_both_labels_are_the_same_it_is_the_cross_entropy(shares: torch.Tensor) -> None:
    options: dict[str, Any] = {"label_smoothing": 0.1, "with_gradient": True}
    logits = logits_of()
    ours = weighted_mixed_cross_entropy(logits, LABELS_B1, WEIGHTS_B, None, LABELS_B1[:, 0], shares, **options)
    torch.testing.assert_close(
        ours, weighted_cross_entropy(logits, LABELS_B1, WEIGHTS_B, **options), rtol=1e-5, atol=1e-6
    )


def test_weights_that_follow_the_loss() -> None:
    logits = logits_of()
    losses = torch.tensor(plain_losses(logits, 0.0))
    factors = capped_linear_weights(losses, STATISTICS, temperature=0.7)
    assert len(set(factors.tolist())) > 2
    arguments = (logits, LABELS_B1, WEIGHTS_B, STATISTICS, OTHERS_B, SHARES_B)
    ours = weighted_mixed_cross_entropy(*arguments, rule=RULE)
    torch.testing.assert_close(ours.weighted_sum, (losses * factors * WEIGHTS_B).sum(), rtol=1e-5, atol=0)


def test_compiled_into_one_graph_it_agrees_and_does_not_recompile_for_other_values() -> None:
    results = {}
    for compile_loss in (False, True):
        loss = build_mixed_loss(
            label_smoothing=0.1, compile_loss=compile_loss, with_gradient=True, rule=RULE, backend="aot_eager"
        )
        leaf = logits_of().requires_grad_()
        outputs = loss(leaf, LABELS_B1, WEIGHTS_B, STATISTICS, OTHERS_B, SHARES_B)
        outputs.weighted_sum.backward()
        results[compile_loss] = [*(output.detach() for output in outputs if output is not None), leaf.grad]
    torch.testing.assert_close(results[True], results[False], rtol=2e-6, atol=2e-6)
    with torch.compiler.set_stance("fail_on_recompile"):
        leaf = logits_of().requires_grad_()
        loss(leaf, LABELS_B1.flip(0), WEIGHTS_B.flip(0), STATISTICS, OTHERS_B.flip(0), SHARES_B.flip(0))


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_smoothing_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"\[vision\] label_smoothing = .*at least 0 and below 1"):
        build_mixed_loss(label_smoothing=value, compile_loss=False)
