"""losses/folding.py, with every loss that takes an index: packed tokens against a float64 loop over tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titan_attent.losses.build import build_example_loss
from titan_attent.losses.chunked import chunked_weighted_cross_entropy
from titan_attent.losses.cross_entropy import IGNORE_INDEX, per_example_cross_entropy, weighted_cross_entropy
from titan_attent.losses.folding import ExampleLosses, finish, fold
from titan_attent.losses.mixed import build_mixed_loss
from titan_attent.losses.patches import build_patch_loss
from titan_attent.losses.window import CappedLinear, capped_linear_weights

V = 7
STATISTICS = torch.tensor([0.5, 4.0, 1.3])


class Packed(NamedTuple):
    """A batch with the example of each token."""

    logits: Tensor
    labels: Tensor
    weights: Tensor
    index: Tensor


@st.composite
def packed_batches(draw: st.DrawFn) -> Packed:
    """Random spans of examples: spans cross the ends of rows; an example may have several spans or none."""
    shape = draw(st.sampled_from([(1,), (13,), (40,), (1, 9), (3, 8), (4, 11)]))
    num_tokens, num_examples = torch.Size(shape).numel(), draw(st.integers(1, 6))
    index: list[int] = []
    while len(index) < num_tokens:
        index += [draw(st.integers(0, num_examples - 1))] * draw(st.integers(1, 12))
    ignored = draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    return packed(shape, index[:num_tokens], ignored, num_examples, seed=draw(st.integers(0, 99)))


def packed(shape: tuple[int, ...], index: list[int], ignored: list[bool], num_examples: int, *, seed: int) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, V, generator=generator) * 3
    labels = torch.randint(V, shape, generator=generator)
    labels[torch.tensor(ignored).view(shape)] = IGNORE_INDEX
    return Packed(logits, labels, torch.rand(num_examples, generator=generator) * 4, torch.tensor(index).view(shape))


def random_packed(seed: int, shape: tuple[int, ...] = (3, 50), num_examples: int = 9) -> Packed:
    """The last example has no token."""
    generator = torch.Generator().manual_seed(1000 + seed)
    num_tokens = torch.Size(shape).numel()
    lengths = torch.randint(1, 30, (num_tokens,), generator=generator)
    index = torch.randint(num_examples - 1, (num_tokens,), generator=generator).repeat_interleave(lengths)[:num_tokens]
    ignored = torch.rand(num_tokens, generator=generator) < 0.2
    return packed(shape, index.tolist(), ignored.tolist(), num_examples, seed=seed)


class Expected(NamedTuple):
    """The fields of :class:`ExampleLosses`, and the gradient of the weighted sum with respect to the logits."""

    losses: ExampleLosses
    logits_gradient: Tensor
    sums: Tensor


def by_hand(batch: Packed, *, temperature: float | None = None) -> Expected:
    """A loop over tokens in float64."""
    num = len(batch.weights)
    sums, squares, counts = ([0.0] * num for _ in range(3))
    gradients = torch.zeros(batch.labels.numel(), V, dtype=torch.float64)
    tokens = list(zip(batch.logits.double().view(-1, V), batch.labels.flatten(), batch.index.flatten(), strict=True))
    for position, (z, label, example) in enumerate(tokens):
        if label != IGNORE_INDEX:
            log_p = z - z.logsumexp(0)
            gradient = log_p.exp()
            gradient[label] -= 1
            sums[example] -= log_p[label].item()
            squares[example] += gradient.square().sum().item()
            counts[example] += 1
            gradients[position] = gradient
    means = [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]
    norms = [(square / max(count, 1)) ** 0.5 for square, count in zip(squares, counts, strict=True)]
    weights = batch.weights.double()
    if temperature is not None:
        weights = weights * capped_linear_weights(torch.tensor(means), STATISTICS.double(), temperature=temperature)
    for position, (_, _, example) in enumerate(tokens):
        gradients[position] *= weights[example]
    total = torch.tensor(sums, dtype=torch.float64)
    losses = ExampleLosses((total * weights).sum(), total.sum(), *map(torch.tensor, (means, norms, counts)))
    return Expected(losses, gradients.view_as(batch.logits), total)


def rule_of(temperature: float | None) -> CappedLinear | None:
    return None if temperature is None else CappedLinear(temperature)


def run(loss: Callable[..., ExampleLosses], batch: Packed, **options: Any) -> tuple[ExampleLosses, Tensor]:
    leaf = batch.logits.clone().requires_grad_()
    losses = loss(leaf * 1, batch.labels, batch.weights, STATISTICS, **options)
    losses.weighted_sum.backward()
    assert leaf.grad is not None
    return losses, leaf.grad


def assert_by_hand(actual: tuple[ExampleLosses, Tensor], expected: Expected) -> None:
    losses, logits_gradient = actual
    for name, ours, plain in zip(ExampleLosses._fields, losses, expected.losses, strict=True):
        assert ours.dtype == torch.float32 and ours.requires_grad == (name == "weighted_sum")
        torch.testing.assert_close(ours.double(), plain.double(), rtol=5e-6, atol=5e-6)
    torch.testing.assert_close(logits_gradient.double(), expected.logits_gradient, rtol=1e-5, atol=5e-6)


@given(batch=packed_batches(), num_chunks=st.integers(1, 5), temperature=st.sampled_from([None, 0.7]))
@settings(max_examples=60, deadline=None)
def test_packed_tokens_are_those_of_a_loop(batch: Packed, num_chunks: int, temperature: float | None) -> None:
    expected = by_hand(batch, temperature=temperature)
    options: dict[str, Any] = {"example_index": batch.index, "with_gradient": True, "rule": rule_of(temperature)}
    assert_by_hand(run(weighted_cross_entropy, batch, **options), expected)
    for overwrite in (False, True):
        chunks = {"num_chunks": num_chunks, "overwrite": overwrite}
        assert_by_hand(run(chunked_weighted_cross_entropy, batch, **options, **chunks), expected)


@given(batch=packed_batches())
@settings(max_examples=30, deadline=None)
def test_sums_of_packed_tokens_and_their_gradients_are_those_of_a_loop(batch: Packed) -> None:
    expected, leaf = by_hand(batch), batch.logits.clone().requires_grad_()
    sums, counts = per_example_cross_entropy(
        leaf, batch.labels, example_index=batch.index, num_examples=len(batch.weights)
    )
    torch.testing.assert_close(sums.double(), expected.sums, rtol=5e-6, atol=5e-6)
    assert torch.equal(counts.double(), expected.losses.counts.double())
    (sums * batch.weights).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), expected.logits_gradient, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(("num_chunks", "backend"), [(1, "inductor"), (4, "aot_eager")])
def test_compiled_into_one_graph_it_agrees_and_other_spans_do_not_recompile(num_chunks: int, backend: str) -> None:
    options: dict[str, Any] = {"with_gradient": True, "num_chunks": num_chunks, "backend": backend}
    loss = build_example_loss(compile_loss=True, rule=CappedLinear(0.7), **options)
    batch = random_packed(0)
    assert_by_hand(run(loss, batch, example_index=batch.index), by_hand(batch, temperature=0.7))
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(1, 5):
            batch = random_packed(seed)
            assert_by_hand(run(loss, batch, example_index=batch.index), by_hand(batch, temperature=0.7))


@pytest.mark.parametrize("temperature", [None, 0.7])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_without_an_index_each_row_is_one_example(num_chunks: int, temperature: float | None) -> None:
    loss = build_example_loss(with_gradient=True, num_chunks=num_chunks, rule=rule_of(temperature))
    batch = random_packed(0)
    batch = batch._replace(weights=batch.weights[:3], index=torch.arange(3)[:, None].expand(3, 50))
    batch.labels[1] = IGNORE_INDEX
    rows, rows_gradient = run(loss, batch)
    indexed, indexed_gradient = run(loss, batch, example_index=batch.index)
    flat = Packed(batch.logits.flatten(0, 1), batch.labels.flatten(), batch.weights, batch.index.flatten())
    packed, packed_gradient = run(loss, flat, example_index=flat.index)
    torch.testing.assert_close(indexed, rows, rtol=1e-6, atol=0)
    assert all(torch.equal(one, other) for one, other in zip(packed, indexed, strict=True))
    assert torch.equal(packed_gradient.view_as(indexed_gradient), indexed_gradient)
    assert torch.equal(indexed.counts, rows.counts)
    if temperature is None:
        assert torch.equal(indexed_gradient, rows_gradient)


@given(batch=packed_batches(), order=st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_no_bit_depends_on_the_position_of_a_token(batch: Packed, order: Any) -> None:
    values = batch.logits[..., 0].flatten().square()  # values of many magnitudes
    positions = list(range(len(values)))
    order.shuffle(positions)
    results = []
    for at in (torch.arange(len(values)), torch.tensor(positions)):
        valid, index = batch.labels.flatten()[at] != IGNORE_INDEX, batch.index.flatten()[at]
        norms = values[at].sqrt()
        results.append(finish(values[at], valid, batch.weights, squared_norms=norms, example_index=index))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_no_order_of_additions_changes_a_bit() -> None:
    """In plain fp64 the two smallest values are lost when added one by one; added together they change the fp32 sum."""
    token_losses = torch.tensor([1.0, 2.0**-24, 2.0**-53, 2.0**-53])
    folded = [
        fold(values, torch.zeros(4, dtype=torch.int64), num_examples=1)
        for values in (token_losses, token_losses.flip(0))
    ]
    assert torch.equal(*folded)


def test_a_non_finite_loss_changes_only_its_own_example() -> None:
    batch = random_packed(0)
    broken = batch.index.flatten()[70]
    for value in (float("nan"), float("inf")):
        token_losses = torch.rand(150)
        token_losses[70] = value
        valid = torch.ones(150, dtype=torch.bool)
        losses = finish(token_losses, valid, batch.weights, example_index=batch.index.flatten()).losses
        assert torch.isfinite(losses).tolist() == (torch.arange(9) != broken).tolist()


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_no_shape_depends_on_values(num_chunks: int) -> None:
    """Tensors on the meta device have no values, and a host sync raises."""
    loss = build_example_loss(with_gradient=True, num_chunks=num_chunks)
    batch = Packed(*(tensor.to("meta") for tensor in random_packed(0)))
    losses, logits_gradient = run(loss, batch, example_index=batch.index)
    assert losses.losses.shape == losses.gradients.shape == losses.counts.shape == (9,)
    assert logits_gradient.shape == batch.logits.shape


def test_shapes_that_do_not_match_are_refused() -> None:
    logits, labels, weights, index = random_packed(0)
    with pytest.raises(ValueError, match=r"labels \(150,\) are not rows \[B, L\] .*: give example_index"):
        weighted_cross_entropy(logits.flatten(0, 1), labels.flatten(), weights)
    with pytest.raises(ValueError, match=r"9 examples in labels \(3, 50\): without example_index each row is one"):
        weighted_cross_entropy(logits, labels, weights)
    with pytest.raises(
        ValueError, match=r"example_index \(150,\) and labels \(3, 50\) differ in shape: give one index"
    ):
        chunked_weighted_cross_entropy(logits, labels, weights, num_chunks=2, example_index=index.flatten())
    with pytest.raises(ValueError, match="example_index without num_examples"):
        per_example_cross_entropy(logits, labels, example_index=index)
    for build in (build_mixed_loss, build_patch_loss):
        with pytest.raises(ValueError, match="takes no example_index: each image is one row"):
            build(compile_loss=False)(logits, labels, weights, None, example_index=index)
