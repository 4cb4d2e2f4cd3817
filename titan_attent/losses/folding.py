"""Sums token losses per example and applies the weights: the last stage of all losses of this package.

Each row [L] of a batch [B, L] is one example, unless ``example_index`` gives the example of each token. Then several
examples may share a row, one may continue in the next row, and the batch may be one packed row [T].

A sum with an index adds multiples of 2^-36 in fp64, which is exact below 2^17 = 131,072 nats per example. So it does
not depend on the position of an example in the batch, or on the order in which a device adds.

Cost: without an index, one sum over the tokens of each row. With an index, a few fp64 temporaries per token, and one
atomic addition per token and sum: two sums, three with functional gradients. No collective, no host sync, and no shape
depends on values.

Shapes: B rows, L tokens per row, T tokens, N examples; N = B without an index.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_UNIT = 2.0**-36

LossRule = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Weights from the losses within the step: (losses fp32 [N], mean nats per valid token; counts fp32 [N], valid tokens;
what the rule reads beside them) -> weights fp32 [N], all detached."""


class ExampleLosses(NamedTuple):
    """The result of every loss of this package. All but the first are detached.

    Attributes:
        weighted_sum: fp32 scalar to differentiate: nats summed over valid tokens, each times the weight of its example.
        loss_sum: fp32 scalar to log: the same without weights.
        losses: fp32 [N], mean nats per valid token; 0 for an example without valid tokens.
        gradients: fp32 [N], norm of the functional gradient: the root of its mean square over valid tokens. None if it
            was not requested.
        counts: fp32 [N], number of valid tokens.
    """

    weighted_sum: Tensor
    loss_sum: Tensor
    losses: Tensor
    gradients: Tensor | None
    counts: Tensor


def fold(values: Tensor, example_index: Tensor | None, *, num_examples: int) -> Tensor:
    """The sum of the values of each example's tokens, differentiable: fp32 [N].

    Args:
        values: floats or bools [B, L] or [T].
        example_index: int64 of the same shape, in [0, N); None if each row is one example.
        num_examples: N, independent of the values of the index. An example without tokens has a sum of 0.
    """
    if example_index is None:
        return values.sum(dim=1, dtype=torch.float32)
    return _Fold.apply(values, example_index, num_examples)


@torch.library.custom_op("titan_attent::of_tokens", mutates_args=())
def _spread_to_tokens(values_N: Tensor, example_index: Tensor) -> Tensor:
    """The value of each token's example. Opaque to the compiler, which would otherwise repeat the gather per logit."""
    return values_N[example_index]


@_spread_to_tokens.register_fake
def _(values_N: Tensor, example_index: Tensor) -> Tensor:
    return values_N.new_empty(example_index.shape)


class _Fold(torch.autograd.Function):
    """(values, index, N) -> fp32 [N]; its backward pass has no fp64."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, example_index: Tensor, num_examples: int) -> Tensor:
        ctx.save_for_backward(example_index)
        exact = (values.double() / _UNIT).round() * _UNIT
        # Not index_add: compiled on CPU, it adds in an order that depends on the threads.
        return exact.new_zeros(num_examples).scatter_add(0, example_index.flatten(), exact.flatten()).float()

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        (example_index,) = ctx.saved_tensors
        return _spread_to_tokens(grad_N, example_index), None, None


def check_fold(tokens: Tensor, example_index: Tensor | None, *, num_examples: int | None) -> int:
    """The number of examples N; ValueError if the shapes do not match.

    Args:
        tokens: any tensor in the shape of the labels.
        num_examples: N if the caller gives it; required with ``example_index``.
    """
    shape = tuple(tokens.shape)
    if example_index is None:
        if len(shape) != 2:
            raise ValueError(
                f"labels {shape} are not rows [B, L] with one example per row: give example_index, the example of each "
                "token"
            )
        if num_examples not in (None, shape[0]):
            raise ValueError(
                f"{num_examples} examples in labels {shape}: without example_index each row is one example"
            )
        return shape[0]
    if example_index.shape != tokens.shape:
        raise ValueError(
            f"example_index {tuple(example_index.shape)} and labels {shape} differ in shape: give one index per token"
        )
    if num_examples is None:
        raise ValueError("example_index without num_examples: give num_examples, as no shape may depend on values")
    return num_examples


def index_in_batch(example_index: Tensor, *, examples_per_row: int) -> Tensor:
    """The index of packed rows for a loss over the whole batch: the examples of all rows, one after the other.

    Args:
        example_index: int64 [B, L], in [0, M): the example of each token among those of its row.
        examples_per_row: M.

    Returns:
        int64 [B, L], in [0, B M).
    """
    return example_index + torch.arange(len(example_index), device=example_index.device)[:, None] * examples_per_row


def refuse_index(example_index: Tensor | None, *, loss: str) -> None:
    """Raise a ValueError if an index is given to a loss of images."""
    if example_index is not None:
        raise ValueError(
            f"the {loss} takes no example_index: each image is one row, only tokens of text are packed; leave it out"
        )


def finish(
    token_losses: Tensor,
    valid: Tensor,
    weights_N: Tensor,
    statistics: Tensor | None = None,
    *,
    squared_norms: Tensor | None = None,
    rule: LossRule | None = None,
    example_index: Tensor | None = None,
) -> ExampleLosses:
    """Sum the losses of tokens per example, and apply the weights.

    Args:
        token_losses: fp32, with as many elements as ``valid``, differentiable; 0 where a token is not valid.
        valid: bool [B, L], or with ``example_index`` [T] or [B, L]: whether the label of a token counts.
        weights_N: fp32 [N].
        statistics: what ``rule`` reads beside the losses; read only with ``rule``.
        squared_norms: fp32, squared norm of each token's functional gradient, detached; None if not measured. Not read
            where a token is not valid.
        rule: multiply the weights by weights computed from the losses (window.py, worst_case.py).
        example_index: int64 in the shape of ``valid``, in [0, N): the example of each token; any value for tokens that
            are not valid. None if each row is one example.
    """
    num_examples = check_fold(valid, example_index, num_examples=len(weights_N))
    sums_N = fold(token_losses.view_as(valid), example_index, num_examples=num_examples)
    counts_N = fold(valid, example_index, num_examples=num_examples)
    divisors_N = counts_N.clamp(min=1.0)
    losses_N = sums_N.detach() / divisors_N
    gradients_N = None
    if squared_norms is not None:
        squared_norms = torch.where(valid, squared_norms.view_as(valid), 0.0)
        squares_N = fold(squared_norms, example_index, num_examples=num_examples)
        gradients_N = (squares_N / divisors_N).clamp(min=0.0).sqrt()
    if rule is not None:
        assert statistics is not None
        weights_N = weights_N * rule(losses_N, counts_N, statistics)
    return ExampleLosses((sums_N * weights_N).sum(), sums_N.detach().sum(), losses_N, gradients_N, counts_N)
