"""losses/cross_entropy.py against float64 loops over tokens, and the functional gradient against autograd."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from titan_attent.losses.cross_entropy import (
    IGNORE_INDEX,
    build_weighted_loss,
    per_example_cross_entropy,
    weighted_cross_entropy,
)

WEIGHTS_B = torch.tensor([0.25, 1.0, 3.5, 2.0])


def batch(*, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four rows: all tokens valid, some ignored, none valid, one valid."""
    generator = torch.Generator().manual_seed(0)
    logits_BLV = (torch.randn(4, 9, 31, generator=generator) * scale).to(dtype)
    labels_BL = torch.randint(0, 31, (4, 9), generator=generator)
    labels_BL[1, 3:7] = IGNORE_INDEX
    labels_BL[2] = IGNORE_INDEX
    labels_BL[3, 1:] = IGNORE_INDEX
    return logits_BLV, labels_BL


def plain_token_losses(logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> list[list[float]]:
    """For each row, -log softmax of each valid token, in float64."""
    rows = []
    for logits_LV, labels_L in zip(logits_BLV.double().detach().numpy(), labels_BL.numpy(), strict=True):
        valid = [(z, label) for z, label in zip(logits_LV, labels_L, strict=True) if label != -100]
        rows.append([np.log(np.exp(z - z.max()).sum()) + z.max() - z[label] for z, label in valid])
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums_and_counts_are_those_of_a_loop_over_tokens(dtype):
    logits_BLV, labels_BL = batch(dtype=dtype)
    sums_B, counts_B = per_example_cross_entropy(logits_BLV, labels_BL)
    expected = plain_token_losses(logits_BLV, labels_BL)
    assert sums_B.dtype == counts_B.dtype == torch.float32
    np.testing.assert_allclose(sums_B.numpy(), [sum(row) for row in expected], rtol=2e-6)
    assert counts_B.tolist() == [len(row) for row in expected] == [9, 5, 0, 1]


def test_extreme_logits_stay_finite():
    logits_BLV, labels_BL = batch(scale=3000.0)
    sums_B, _ = per_example_cross_entropy(logits_BLV, labels_BL)
    np.testing.assert_allclose(
        sums_B.numpy(), [sum(row) for row in plain_token_losses(logits_BLV, labels_BL)], rtol=2e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weighted_and_unweighted_sums_and_means(dtype):
    logits_BLV, labels_BL = batch(dtype=dtype)
    weighted, unweighted, mean_B, norms_B, counts_B = weighted_cross_entropy(
        logits_BLV.requires_grad_(), labels_BL, WEIGHTS_B
    )
    assert norms_B is None
    rows = plain_token_losses(logits_BLV, labels_BL)
    sums = np.array([sum(row) for row in rows])
    np.testing.assert_allclose(weighted.item(), (sums * WEIGHTS_B.numpy()).sum(), rtol=2e-6)
    np.testing.assert_allclose(unweighted.item(), sums.sum(), rtol=2e-6)
    np.testing.assert_allclose(mean_B.numpy(), [np.mean(row) if row else 0.0 for row in rows], rtol=2e-6)
    assert counts_B.dtype == torch.float32 and counts_B.tolist() == [9, 5, 0, 1]
    assert weighted.requires_grad and not unweighted.requires_grad and not mean_B.requires_grad


def test_weights_of_one_leave_torchs_sum():
    logits_BLV, labels_BL = batch()
    ours, logged, *_ = weighted_cross_entropy(logits_BLV, labels_BL, torch.ones(4))
    torchs = F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), reduction="sum", ignore_index=-100)
    torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=0)
    torch.testing.assert_close(logged, torchs, rtol=1e-6, atol=0)


def test_gradient_is_weight_times_softmax_minus_onehot():
    logits_BLV, labels_BL = batch()
    weighted_cross_entropy(logits_BLV.requires_grad_(), labels_BL, WEIGHTS_B).weighted_sum.backward()
    expected = np.zeros(logits_BLV.shape)
    z = logits_BLV.detach().double().numpy()
    for b, t in np.ndindex(4, 9):
        if labels_BL[b, t] != -100:
            p = np.exp(z[b, t] - z[b, t].max())
            p /= p.sum()
            p[labels_BL[b, t]] -= 1
            expected[b, t] = WEIGHTS_B[b].item() * p
    np.testing.assert_allclose(logits_BLV.grad.numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_functional_gradient_is_the_norm_of_autograds_gradient(dtype):
    logits_BLV, labels_BL = batch(dtype=dtype)
    leaf = logits_BLV.double().requires_grad_()
    F.cross_entropy(leaf.flatten(0, 1), labels_BL.flatten(), reduction="sum", ignore_index=-100).backward()
    counts = np.array([9, 5, 1, 1])  # the row without a valid token has no gradient either
    expected = np.sqrt(leaf.grad.square().sum(dim=(1, 2)).numpy() / counts)
    losses = weighted_cross_entropy(logits_BLV.requires_grad_(), labels_BL, WEIGHTS_B, with_gradient=True)
    norms_B = losses.gradients
    np.testing.assert_allclose(norms_B.numpy(), expected, rtol=2e-6)
    assert norms_B[2] == 0 and norms_B.max() <= 2**0.5 and not norms_B.requires_grad
    plain = weighted_cross_entropy(logits_BLV, labels_BL, WEIGHTS_B)
    assert plain.gradients is None
    assert all(
        torch.equal(getattr(losses, name), getattr(plain, name)) for name in ("weighted_sum", "losses", "counts")
    )


@pytest.mark.parametrize("smoothing", [0.1, 0.7])
def test_smoothed_labels_are_those_of_a_loop_over_tokens(smoothing):
    logits_BLV, labels_BL = batch()
    leaf = logits_BLV.double().requires_grad_()
    sums, counts, squares = [], [], []
    for z_LV, labels_L in zip(leaf, labels_BL, strict=True):
        losses = []
        for z, label in zip(z_LV, labels_L, strict=True):
            if label != -100:
                target = torch.full((31,), smoothing / 31, dtype=torch.float64)
                target[label] += 1 - smoothing
                losses.append(-(target * (z - z.logsumexp(0))).sum())
        sums.append(sum(losses, torch.zeros((), dtype=torch.float64)))
        counts.append(max(1, len(losses)))
        squares.append(torch.autograd.grad(sums[-1], leaf, retain_graph=True)[0].square().sum() if losses else 0.0)
    expected = torch.stack(sums).detach()
    norms = (torch.tensor(squares) / torch.tensor(counts)).sqrt()

    options = {"label_smoothing": smoothing}
    torch.testing.assert_close(per_example_cross_entropy(logits_BLV, labels_BL, **options)[0].double(), expected)
    norms_B = weighted_cross_entropy(logits_BLV, labels_BL, WEIGHTS_B, with_gradient=True, **options).gradients
    torch.testing.assert_close(norms_B.double(), norms.double(), rtol=2e-6, atol=0)
    compiled = [(True, True)] if smoothing == 0.1 else []
    for compile_loss, with_gradient in [(False, False), (False, True), *compiled]:
        options |= {"compile_loss": compile_loss, "with_gradient": with_gradient, "backend": "aot_eager"}
        loss = build_weighted_loss(**options)
        outputs = loss(logits_BLV, labels_BL, WEIGHTS_B, None)
        torch.testing.assert_close(outputs.weighted_sum.double(), (expected * WEIGHTS_B).sum())
        torch.testing.assert_close(outputs.losses.double(), expected / torch.tensor(counts))
    torch.testing.assert_close(outputs.gradients, norms_B, rtol=2e-6, atol=0)


def test_without_smoothing_every_bit_equals_the_unsmoothed_formula():
    logits_BLV, labels_BL = batch()
    token_loss = F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), reduction="none", ignore_index=-100)
    e_NV = (logits_BLV.flatten(0, 1) - logits_BLV.flatten(0, 1).amax(dim=1, keepdim=True)).exp()
    p_squared = (e_NV.square().sum(dim=1, keepdim=True) / e_NV.sum(dim=1, keepdim=True).square())[:, 0]
    squared_BL = (p_squared - 2 * (-token_loss).exp() + 1).view_as(labels_BL)
    counts_B = (labels_BL != IGNORE_INDEX).sum(dim=1).clamp(min=1)
    norms_B = (torch.where(labels_BL != IGNORE_INDEX, squared_BL, 0.0).sum(dim=1) / counts_B).clamp(min=0.0).sqrt()
    sums_B = token_loss.view_as(labels_BL).sum(dim=1)
    for options in ({}, {"label_smoothing": 0.0}):
        assert torch.equal(per_example_cross_entropy(logits_BLV, labels_BL, **options)[0], sums_B)
        ours = weighted_cross_entropy(logits_BLV, labels_BL, WEIGHTS_B, with_gradient=True, **options)
        assert torch.equal(ours.weighted_sum, (sums_B * WEIGHTS_B).sum())
        assert torch.equal(ours.losses, sums_B / counts_B) and torch.equal(ours.gradients, norms_B)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_smoothing_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=r"\[vision\] label_smoothing = .*at least 0 and below 1"):
        build_weighted_loss(compile_loss=False, label_smoothing=value)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_compiled_into_one_graph_it_agrees_and_does_not_recompile_for_other_values(with_gradient):
    logits_BLV, labels_BL = batch()
    results = {}
    for compile_loss in (False, True):
        compiled = build_weighted_loss(compile_loss=compile_loss, with_gradient=with_gradient)
        leaf = logits_BLV.clone().requires_grad_()
        outputs = compiled(leaf, labels_BL, WEIGHTS_B)
        outputs.weighted_sum.backward()
        assert (outputs.gradients is not None) == with_gradient
        results[compile_loss] = [*(output.detach() for output in outputs if output is not None), leaf.grad]
    torch.testing.assert_close(results[True], results[False], rtol=2e-6, atol=2e-6)

    other_labels = labels_BL.flip(0)  # ignored labels at other positions: other values, the same shape
    with torch.compiler.set_stance("fail_on_recompile"):
        outputs = compiled(logits_BLV.clone().requires_grad_(), other_labels, WEIGHTS_B.flip(0))
    np.testing.assert_allclose(
        outputs.losses.numpy(),
        [np.mean(row) if row else 0.0 for row in plain_token_losses(logits_BLV, other_labels)],
        rtol=2e-6,
    )
