"""losses/chunked.py against the plain functions of losses/cross_entropy.py and float64 autograd."""

import pytest
import torch
from test_cross_entropy import WEIGHTS_B, batch

from titan_attent.losses.chunked import build_chunked_loss, chunked_weighted_cross_entropy
from titan_attent.losses.cross_entropy import weighted_cross_entropy
from titan_attent.losses.window import CappedLinear

# A gradient in bf16 is rounded once in each of the two losses, by half a unit in the last of 8 bits.
GRADIENT_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative norm of the difference; fails if the length differs more than rounding of single elements explains."""
    actual, expected = actual.double(), expected.double()
    length = ((actual * expected).sum() / expected.square().sum()).item()
    assert abs(length - 1) < 1e-3, f"{length} times too long"
    return ((actual - expected).norm() / expected.norm()).item()


def assert_same_losses(actual, expected):
    for ours, plain in zip(actual, expected, strict=True):
        assert (ours is None) == (plain is None)
        if plain is not None:
            assert ours.dtype == plain.dtype == torch.float32
            torch.testing.assert_close(ours, plain, rtol=2e-6, atol=2e-6)
    assert actual[0].requires_grad and not any(t.requires_grad for t in actual[1:] if t is not None)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("num_chunks", [1, 4, 7, 100])  # 36 tokens: whole, equal, a shorter last one, one each
@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE)
def test_the_chunked_loss_equals_the_plain_loss(dtype, num_chunks, with_gradient, overwrite):
    logits_BLV, labels_BL = batch(dtype=dtype)
    results = []
    for chunked in (False, True):
        leaf = logits_BLV.clone().requires_grad_()
        logits = leaf * 1  # not a leaf, like the logits of a model
        if chunked:
            outputs = chunked_weighted_cross_entropy(
                logits, labels_BL, WEIGHTS_B, num_chunks=num_chunks, with_gradient=with_gradient, overwrite=overwrite
            )
        else:
            outputs = weighted_cross_entropy(logits, labels_BL, WEIGHTS_B, with_gradient=with_gradient)
        (outputs.weighted_sum / 7).backward()
        results.append((outputs, leaf.grad))
    (expected, expected_grad), (actual, grad) = results
    assert_same_losses(actual, expected)
    assert grad.dtype == dtype and relative(grad, expected_grad) < GRADIENT_TOLERANCE[dtype]
    assert grad[2].count_nonzero() == grad[1, 3:7].count_nonzero() == 0  # ignored labels


def test_weights_that_follow_the_loss():
    logits_BLV, labels_BL = batch()
    statistics = torch.tensor([1.0, 9.0, 1.7])
    results = []
    for loss, options in ((weighted_cross_entropy, {}), (chunked_weighted_cross_entropy, {"num_chunks": 3})):
        leaf = logits_BLV.clone().requires_grad_()
        outputs = loss(leaf, labels_BL, WEIGHTS_B, statistics, rule=CappedLinear(0.5), **options)
        outputs.weighted_sum.backward()
        results.append((outputs, leaf.grad))
    assert_same_losses(results[1][0], results[0][0])
    assert relative(results[1][1], results[0][1]) < 1e-6


def test_extreme_logits_stay_finite_and_exact():
    logits_BLV, labels_BL = batch(scale=3000.0)
    leaf = logits_BLV.clone().requires_grad_()
    plain = logits_BLV.clone().requires_grad_()
    actual = chunked_weighted_cross_entropy(leaf, labels_BL, WEIGHTS_B, num_chunks=3, with_gradient=True)
    expected = weighted_cross_entropy(plain, labels_BL, WEIGHTS_B, with_gradient=True)
    assert_same_losses(actual, expected)
    actual.weighted_sum.backward()
    expected.weighted_sum.backward()
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=2e-6, atol=2e-6)


def test_a_common_offset_of_the_logits_costs_no_digits():
    generator = torch.Generator().manual_seed(0)
    whole_BLV = torch.randint(-8, 8, (4, 9, 31), generator=generator).float()  # exact in fp32 with the offset, too
    _, labels_BL = batch()
    results = [
        chunked_weighted_cross_entropy(whole_BLV + offset, labels_BL, WEIGHTS_B, num_chunks=3) for offset in (0, 2**16)
    ]
    torch.testing.assert_close(results[1][:3], results[0][:3], rtol=1e-6, atol=0)


def test_the_gradient_overwrites_the_logits_only_with_overwrite():
    logits_BLV, labels_BL = batch()
    for overwrite in (False, True):
        seen = []
        leaf = logits_BLV.clone().requires_grad_()
        logits = leaf * 1
        logits.register_hook(seen.append)
        args = (labels_BL, WEIGHTS_B)
        chunked_weighted_cross_entropy(logits, *args, num_chunks=3, overwrite=overwrite).weighted_sum.backward()
        assert (seen[0].data_ptr() == logits.data_ptr()) == overwrite
        assert torch.equal(logits.detach(), logits_BLV) == (not overwrite)
        # A leaf is the user's own: never overwritten.
        leaf.grad = None
        chunked_weighted_cross_entropy(leaf, *args, num_chunks=3, overwrite=overwrite).weighted_sum.backward()
        assert torch.equal(leaf.detach(), logits_BLV)


def test_a_backward_that_needs_overwritten_logits_raises():
    logits_BLV, labels_BL = batch()
    logits = logits_BLV.requires_grad_() * 1
    loss = chunked_weighted_cross_entropy(logits, labels_BL, WEIGHTS_B, num_chunks=3, overwrite=True).weighted_sum
    other = logits.square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled_kernels_agree_and_do_not_recompile_for_other_values():
    logits_BLV, labels_BL = batch(dtype=torch.bfloat16)
    losses = [
        build_chunked_loss(num_chunks=4, compile_loss=compile_loss, with_gradient=True)
        for compile_loss in (False, True)
    ]

    def run(loss, labels, weights):
        leaf = logits_BLV.clone().requires_grad_()
        outputs = loss(leaf * 1, labels, weights)
        outputs.weighted_sum.backward()
        return [*(output.detach() for output in outputs if output is not None), leaf.grad]

    expected, actual = (run(loss, labels_BL, WEIGHTS_B) for loss in losses)
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(losses[1], labels_BL.flip(0), WEIGHTS_B.flip(0))


def test_zero_chunks_are_refused():
    logits_BLV, labels_BL = batch()
    with pytest.raises(ValueError, match="num_chunks = 0"):
        chunked_weighted_cross_entropy(logits_BLV, labels_BL, WEIGHTS_B, num_chunks=0)
