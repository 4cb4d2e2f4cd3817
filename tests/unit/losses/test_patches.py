"""losses/patches.py against float64 loops over values, and the functional gradient against autograd."""

import numpy as np
import pytest
import torch

from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.losses.patches import (
    build_patch_loss,
    squared_error_sum,
    weighted_squared_error,
)
from titan_attent.losses.window import CappedLinear, capped_linear_weights

WEIGHTS_B = torch.tensor([0.25, 1.0, 3.5, 2.0])
STATISTICS = torch.tensor([0.5, 6.5, 1.3])


def batch(*, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Four examples: all patches valid, one patch padding, all padding, one value valid."""
    generator = torch.Generator().manual_seed(0)
    pred_BMD = torch.randn(4, 5, 6, generator=generator).to(dtype)
    labels_BMD = torch.randn(4, 5, 6, generator=generator)
    labels_BMD[1, 3] = IGNORE_INDEX
    labels_BMD[2] = IGNORE_INDEX
    labels_BMD[3].flatten()[1:] = IGNORE_INDEX
    return pred_BMD, labels_BMD


def plain_squares(pred_BMD: torch.Tensor, labels_BMD: torch.Tensor) -> list[list[float]]:
    """For each example, the squared error of each valid value, in float64."""
    rows = []
    for pred, labels in zip(pred_BMD.detach().double(), labels_BMD.double(), strict=True):
        pairs = zip(pred.flatten().tolist(), labels.flatten().tolist(), strict=True)
        rows.append([(p - y) ** 2 for p, y in pairs if y != -100])
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_means_and_counts_are_those_of_a_loop(dtype: torch.dtype) -> None:
    pred_BMD, labels_BMD = batch(dtype=dtype)
    rows = plain_squares(pred_BMD, labels_BMD)
    sums, counts = np.array([sum(row) for row in rows]), [len(row) for row in rows]
    assert counts == [30, 24, 0, 1]
    np.testing.assert_allclose(squared_error_sum(pred_BMD, labels_BMD).item(), sums.sum(), rtol=2e-6)
    outputs = weighted_squared_error(pred_BMD.requires_grad_(), labels_BMD, WEIGHTS_B, with_gradient=True)
    weighted, unweighted, mean_B, norms_B, counts_B = outputs
    assert mean_B.dtype == counts_B.dtype == torch.float32 and counts_B.tolist() == counts
    np.testing.assert_allclose(weighted.item(), (sums * WEIGHTS_B.numpy()).sum(), rtol=2e-6)
    np.testing.assert_allclose(unweighted.item(), sums.sum(), rtol=2e-6)
    np.testing.assert_allclose(mean_B.numpy(), [np.mean(row) if row else 0.0 for row in rows], rtol=2e-6)
    assert norms_B is not None
    assert [output.requires_grad for output in outputs if output is not None] == [True] + 4 * [False]
    assert weighted_squared_error(pred_BMD, labels_BMD, WEIGHTS_B).gradients is None


def test_weights_of_one_leave_torchs_sum() -> None:
    pred_BMD, labels_BMD = batch()
    valid = labels_BMD != IGNORE_INDEX
    torchs = torch.nn.functional.mse_loss(pred_BMD[valid], labels_BMD[valid], reduction="sum")
    for ours in (
        weighted_squared_error(pred_BMD, labels_BMD, torch.ones(4)).weighted_sum,
        squared_error_sum(pred_BMD, labels_BMD),
    ):
        torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=0)


def test_gradients_are_autograds_of_a_plain_loss() -> None:
    pred_BMD, labels_BMD = batch()
    leaf, plain = pred_BMD.clone().requires_grad_(), pred_BMD.double().requires_grad_()
    norms_B = weighted_squared_error(leaf, labels_BMD, WEIGHTS_B, with_gradient=True).gradients
    weighted_squared_error(leaf, labels_BMD, WEIGHTS_B).weighted_sum.backward()
    valid = labels_BMD != IGNORE_INDEX
    half = sum(((plain[i] - labels_BMD[i])[valid[i]] ** 2).sum() / 2 for i in range(4))
    (gradient,) = torch.autograd.grad(half, plain)
    expected = 2 * gradient * WEIGHTS_B[:, None, None]
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-6, atol=1e-6)
    counts = valid.sum(dim=(1, 2)).clamp(min=1)
    torch.testing.assert_close(norms_B.double(), (gradient.square().sum(dim=(1, 2)) / counts).sqrt(), rtol=1e-6, atol=0)
    assert norms_B[2] == 0


def test_padding_may_hold_any_prediction() -> None:
    pred_BMD, labels_BMD = batch()
    pred_BMD[2] = float("inf")
    weighted, *_ = weighted_squared_error(pred_BMD.requires_grad_(), labels_BMD, WEIGHTS_B)
    weighted.backward()
    assert weighted.isfinite() and (pred_BMD.grad[2] == 0).all()


def test_weights_that_follow_the_loss() -> None:
    pred_BMD, labels_BMD = batch()
    rows = plain_squares(pred_BMD, labels_BMD)
    means = torch.tensor([np.mean(row) if row else 0.0 for row in rows])
    factors = capped_linear_weights(means, STATISTICS, temperature=0.7)
    assert len(set(factors.tolist())) > 2
    expected = sum(sum(row) * w * f for row, w, f in zip(rows, WEIGHTS_B.tolist(), factors.tolist(), strict=True))
    ours = weighted_squared_error(pred_BMD, labels_BMD, WEIGHTS_B, STATISTICS, rule=CappedLinear(0.7)).weighted_sum
    assert ours.item() == pytest.approx(expected, rel=1e-5)


def test_compiled_into_one_graph_it_agrees_and_does_not_recompile_for_other_values() -> None:
    pred_BMD, labels_BMD = batch()
    results = {}
    for compile_loss in (False, True):
        options = {"with_gradient": True, "rule": CappedLinear(0.7), "backend": "aot_eager"}
        loss = build_patch_loss(compile_loss=compile_loss, **options)
        leaf = pred_BMD.clone().requires_grad_()
        outputs = loss(leaf, labels_BMD, WEIGHTS_B, STATISTICS)
        outputs.weighted_sum.backward()
        results[compile_loss] = [*(output.detach() for output in outputs if output is not None), leaf.grad]
    torch.testing.assert_close(results[True], results[False], rtol=2e-6, atol=2e-6)
    with torch.compiler.set_stance("fail_on_recompile"):
        loss(pred_BMD.clone().requires_grad_(), labels_BMD.flip(0), WEIGHTS_B.flip(0), STATISTICS)
