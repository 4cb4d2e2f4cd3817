"""losses/divergence.py against fp64 brute force, and against faults that other implementations had."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from titan_attent.losses import divergence
from titan_attent.losses.divergence import build_kernels, kl_divergence, largest_id, target_cross_entropy

V = 37


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 tokens, so that the last one is shorter."""
    monkeypatch.setattr(divergence, "CHUNK_NUMBERS", 4 * V)


def logits(seed: int, *, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    return (torch.randn(3, 6, V, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def valid() -> Tensor:
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, 2:5] = mask[1] = False
    return mask


def weights() -> Tensor:
    """Unequal gradients of the tokens, as weights of examples make them."""
    return torch.rand(3, 6, generator=torch.Generator().manual_seed(9)) + 0.1


def plain_kl(student: Tensor, source: Tensor, *, of_student: float, of_source: float) -> Tensor:
    """From the definition, in fp64, with T^2 of the student."""
    log_p, log_q = (source.double() / of_source).log_softmax(-1), (student.double() / of_student).log_softmax(-1)
    terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)
    return torch.where(valid(), terms.sum(-1), 0.0) * of_student**2


def gradient(losses: Tensor, student: Tensor) -> Tensor:
    (found,) = torch.autograd.grad((losses * weights()).sum(), student)
    return found


TEMPERATURES = {"T = 1": (1.0, 1.0), "source alone": (1.0, 0.5), "both": (2.0, 2.0), "different": (1.5, 4.0)}


@pytest.mark.parametrize("name", TEMPERATURES)
def test_values_and_gradients_are_those_of_the_definition(name: str) -> None:
    of_student, of_source = TEMPERATURES[name]
    student, source = logits(0).requires_grad_(), logits(1)
    found = kl_divergence(student, source, valid(), student_temperature=of_student, source_temperature=of_source)
    exact = student.detach().double().requires_grad_()
    expected = plain_kl(exact, source, of_student=of_student, of_source=of_source)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient(found, student).double(), gradient(expected, exact), rtol=1e-5, atol=1e-6)
    assert (found[~valid()] == 0).all() and (found[valid()] > 0.1).all()


def test_the_divergence_is_the_forward_one() -> None:
    """KL(source || student): the two directions differ, and 'reverse' ones that are not were shipped elsewhere."""
    source, student = logits(0), logits(1)
    log_p, log_q = source.double().log_softmax(-1), student.double().log_softmax(-1)
    found = kl_divergence(student, source, torch.ones_like(valid()))
    assert torch.allclose(found.double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-5)
    assert not torch.allclose(found.double(), (log_q.exp() * (log_q - log_p)).sum(-1), rtol=0.1)


def test_equal_logits_have_no_divergence_and_no_gradient() -> None:
    student = logits(0, scale=30.0).requires_grad_()
    found = kl_divergence(student, student.detach() + 7.0, valid())
    assert found.abs().max() < 1e-5 and gradient(found, student).abs().max() < 1e-5


def test_the_squared_temperature_keeps_the_size_of_gradients() -> None:
    """With T^2 a softer comparison has gradients of about the same size; without it they fall with 1 / T^2."""
    student, source = logits(0, scale=0.1).requires_grad_(), logits(1, scale=0.1)
    norms = {}
    for t in (1.0, 8.0):
        found = kl_divergence(student, source, valid(), student_temperature=t, source_temperature=t)
        norms[t] = gradient(found, student).norm().item()
    assert norms[8.0] == pytest.approx(norms[1.0], rel=0.1)


def test_bfloat16_logits_are_widened_before_arithmetic() -> None:
    """The gradient is that of the exact function of the rounded logits, to one rounding (Liger #1432: 4 to 23% off)."""
    student, source = logits(0, dtype=torch.bfloat16).requires_grad_(), logits(1, dtype=torch.bfloat16)
    found = kl_divergence(student, source, valid(), source_temperature=0.7)
    exact = student.detach().double().requires_grad_()
    expected = plain_kl(exact, source, of_student=1.0, of_source=0.7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    of_found = gradient(found, student)
    assert of_found.dtype == torch.bfloat16
    torch.testing.assert_close(of_found.double(), gradient(expected, exact), rtol=2**-8, atol=1e-6)


def test_ids_that_the_source_excludes_are_not_nan() -> None:
    """0 log 0 is 0 (Liger #769: NaN from a logarithm), also where the student excludes the same ids."""
    student, source = logits(0), logits(1)
    source[..., 5:9] = -torch.inf
    student[..., 5] = -torch.inf
    student.requires_grad_()
    found = kl_divergence(student, source, valid())
    exact = student.detach().double().requires_grad_()
    expected = plain_kl(exact, source, of_student=1.0, of_source=1.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert gradient(found, student).isfinite().all()


def test_large_logits_do_not_overflow() -> None:
    student, source = logits(0, scale=1e4).requires_grad_(), logits(1, scale=1e4)
    found = kl_divergence(student, source, valid(), source_temperature=0.01)
    assert found.isfinite().all() and gradient(found, student).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_may_overwrite_the_source(dtype: torch.dtype) -> None:
    """The same gradient, in the source's memory; a second backward is refused, not wrong."""
    student, source = logits(0, dtype=dtype).requires_grad_(), logits(1, dtype=dtype)
    expected = gradient(kl_divergence(student, source, valid()), student)
    losses = kl_divergence(student, source, valid(), overwrite=True)
    (found,) = torch.autograd.grad((losses * weights()).sum(), student, retain_graph=True)
    assert torch.equal(found, expected)
    assert found.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(losses.sum(), student)


def test_a_source_of_another_dtype_is_not_overwritten() -> None:
    student, source = logits(0).requires_grad_(), logits(1, dtype=torch.bfloat16)
    before = source.clone()
    found = gradient(kl_divergence(student, source, valid(), overwrite=True), student)
    assert torch.equal(source, before) and found.dtype == torch.float32


def test_the_source_builds_no_graph() -> None:
    """A source that requires gradients gets none, and the loss does not hold its graph (TRL #6526)."""
    student, source = logits(0).requires_grad_(), logits(1).requires_grad_()
    losses = kl_divergence(student, source * 1.0, valid())
    nodes = [losses.grad_fn]
    for node in nodes:
        nodes += [after for after, _ in node.next_functions if after is not None]  # type: ignore[union-attr]
    assert not any("Mul" in node.name() for node in nodes)  # type: ignore[union-attr]
    losses.sum().backward()
    assert student.grad is not None and source.grad is None


def test_no_copy_of_either_model_in_fp32_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd keeps beside the two logits: 20 bytes per token and the mask; nothing of [tokens x vocabulary]."""
    student, source = logits(0, dtype=torch.bfloat16).requires_grad_(), logits(1, dtype=torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        kl_divergence(student, source, valid())
    large = [tensor for tensor in kept if tensor.numel() >= student.numel()]
    assert {tensor.untyped_storage().data_ptr() for tensor in large} == {
        tensor.untyped_storage().data_ptr() for tensor in (student, source)
    }
    assert sum(tensor.nbytes for tensor in kept if tensor.numel() < student.numel()) <= 20 * student[..., 0].numel()


def test_the_loss_never_waits_for_the_device() -> None:
    """Fake tensors have no values: a host sync in forward or backward would raise (Liger's backward has one)."""
    with FakeTensorMode():
        student, source = torch.randn(2, 5, V, requires_grad=True), torch.randn(2, 5, V)
        mask = torch.ones(2, 5, dtype=torch.bool)
        kl_divergence(student, source, mask, overwrite=True).sum().backward()
        target_cross_entropy(student, largest_id(source), None, mask).sum().backward()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_the_gradient_of_the_head_is_not_accumulated_in_its_dtype(precision: torch.dtype) -> None:
    """Over many chunks, and over microbatches as torchtitan accumulates them, into a weight in fp32 (Liger adds up
    chunks in the weight's dtype: in bf16 a sum of 256 equal numbers no longer grows)."""
    tokens, dim, microbatches = 64, 4, 32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, dim, generator=generator).expand(tokens, dim)
    weight = torch.randn(V, dim, generator=generator).requires_grad_()
    source, mask = torch.randn(1, V, generator=generator).expand(tokens, V), torch.ones(tokens, dtype=torch.bool)
    for _ in range(microbatches):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            student = torch.nn.functional.linear(hidden, weight)
        assert student.dtype == precision
        kl_divergence(student, source.to(precision), mask).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32

    z = (hidden.to(precision).double() @ weight.detach().to(precision).double().T).to(precision).double()
    of_logits = z.softmax(-1) - source.to(precision).double().softmax(-1)
    expected = microbatches * of_logits.T @ hidden.double()
    rounding = 2**-7 if precision == torch.bfloat16 else 1e-5
    largest = expected.abs().max()
    assert ((weight.grad.double() - expected).abs().max() / largest).item() < rounding
    in_bfloat16 = torch.zeros(V, dim, dtype=torch.bfloat16)
    for _ in range(microbatches * tokens):
        in_bfloat16 += (of_logits[0][:, None] * hidden[0]).bfloat16()
    assert ((in_bfloat16.double() - expected).abs().max() / largest).item() > 0.1, "the fault would not be seen"


def test_a_larger_vocabulary_of_the_source_is_refused() -> None:
    """Padding the student's logits with zeros would give padding real probability (Liger)."""
    with pytest.raises(ValueError, match="Nothing is padded"):
        kl_divergence(logits(0), torch.cat((logits(1), logits(2)[..., :3]), dim=-1), valid())


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_temperatures_out_of_range_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="above 0 and finite"):
        kl_divergence(logits(0), logits(1), valid(), source_temperature=temperature)


# -- target ids ------------------------------------------------------------------------------------------------------


def targets() -> tuple[Tensor, Tensor]:
    """Ids, some repeated, and weights that do not sum to 1, some of them 0."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(V, (3, 6, 5), generator=generator, dtype=torch.int32)
    ids[..., 3] = ids[..., 1]
    weights = torch.rand(3, 6, 5, generator=generator)
    weights[..., 4] = 0
    return ids, weights


def plain_targets(student: Tensor, ids: Tensor, weights: Tensor, *, temperature: float) -> Tensor:
    log_q = (student.double() / temperature).log_softmax(-1)
    losses = -(log_q.gather(-1, ids.long()) * weights.double()).sum(-1) * temperature**2
    return torch.where(valid(), losses, 0.0)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_losses_and_gradients_are_those_of_the_definition(dtype: torch.dtype, temperature: float) -> None:
    """Repeated ids add up, and weights are used as they are (normalised twice in axolotl #2700)."""
    student, (ids, of_ids) = logits(0, dtype=dtype).requires_grad_(), targets()
    found = target_cross_entropy(student, ids, of_ids, valid(), student_temperature=temperature)
    exact = student.detach().double().requires_grad_()
    expected = plain_targets(exact, ids, of_ids, temperature=temperature)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(gradient(found, student).double(), gradient(expected, exact), rtol=rounding, atol=1e-6)


def test_compiled_kernels_are_whole_graphs_with_the_same_results() -> None:
    kernels = build_kernels(compiled=True, backend="aot_eager")
    student, source, (ids, of_ids) = logits(0).requires_grad_(), logits(1), targets()
    for function, args in ((kl_divergence, (source, valid())), (target_cross_entropy, (ids, of_ids, valid()))):
        expected, found = function(student, *args), function(student, *args, kernels=kernels)  # type: ignore[operator]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient(found, student), gradient(expected, student))


def test_compiled_kernels_overwrite_the_source() -> None:
    torch._dynamo.reset()  # a graph that was compiled for two tensors would be used for one
    kernels = build_kernels(compiled=True, backend="aot_eager")
    student, source = logits(0).requires_grad_(), logits(1)
    expected = gradient(kl_divergence(student, source, valid()), student)
    found = kl_divergence(student, source, valid(), overwrite=True, kernels=kernels)
    torch.testing.assert_close(gradient(found, student), expected)
    torch.testing.assert_close(source, expected)


def test_draws_count_one_nth_each() -> None:
    student, ids = logits(0), targets()[0]
    expected = plain_targets(student, ids, torch.full(ids.shape, 0.2), temperature=1.0)
    torch.testing.assert_close(target_cross_entropy(student, ids, None, valid()).double(), expected, rtol=1e-5, atol=0)


def test_all_ids_with_the_sources_probabilities_are_kl() -> None:
    """Up to the entropy of the source, which has no gradient."""
    student, source = logits(0).requires_grad_(), logits(1)
    p = source.softmax(-1)
    ids = torch.arange(V).expand(3, 6, V)
    sparse = target_cross_entropy(student, ids, p, valid())
    whole = kl_divergence(student, source, valid())
    entropy = torch.where(valid(), -(p * p.log()).sum(-1), 0.0)
    torch.testing.assert_close(sparse - entropy, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(sparse, student), gradient(whole, student), rtol=1e-4, atol=1e-6)


def test_the_largest_id_is_the_limit_of_a_cold_source() -> None:
    student, source = logits(0).requires_grad_(), logits(1)
    limit = target_cross_entropy(student, largest_id(source), None, valid())
    cold = kl_divergence(student, source, valid(), source_temperature=1e-4)
    torch.testing.assert_close(limit, cold, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(limit, student), gradient(cold, student), rtol=1e-5, atol=1e-6)


def test_of_equal_logits_the_smallest_id_is_the_largest() -> None:
    source = torch.zeros(1, 2, V)
    source[0, 1, [8, 30]] = 4.0
    assert largest_id(source).tolist() == [[[0], [8]]]


def test_ids_that_do_not_fit_the_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="N ids for each token"):
        target_cross_entropy(logits(0), targets()[0][:2], None, valid())
