"""Cross-entropy per example: logits and labels -> the weighted scalar, and the mean loss of every example.

torchtitan's loss is one SUM over all tokens; its trainer divides by the global number of valid tokens. This module
computes one loss per example at the same cost: one pass over the fp32 logits, then a sum of the token losses of each
example (folding.py). The weighted scalar is a SUM as well, which the caller divides, so weights of 1 give torchtitan's
loss.

Cost: token losses (4 bytes per token; the logits take 4 V bytes per token) and their sums. No collective.

Shapes: V vocabulary, N examples, T tokens. Labels are [B, L], where each of B rows is one example, or with
``example_index`` [T] or [B, L]; logits have one more dimension, V. The tests use the plain functions as reference.
"""

from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from titan_attent.foundations.checks import check_number
from titan_attent.losses.folding import ExampleLosses, LossRule, check_fold, finish, fold

IGNORE_INDEX = -100
"""The label of tokens without a loss; torch and torchtitan use the same value."""


class WeightedLoss(Protocol):
    """The type that the ``build_*`` functions return; the arguments are those of :func:`weighted_cross_entropy`."""

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        weights_N: Tensor,
        statistics: Tensor | None = None,
        /,
        *,
        example_index: Tensor | None = None,
    ) -> ExampleLosses: ...


def _token_losses(logits_TV: Tensor, labels: Tensor, *, label_smoothing: float) -> Tensor:
    """The loss of each token, fp32 in the shape of ``labels``; 0 where the label is ignored."""
    losses_T = F.cross_entropy(
        logits_TV,
        labels.flatten(),
        reduction="none",
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
    )
    return losses_T.view_as(labels)


def _squared_norms(logits_TV: Tensor, labels: Tensor, token_losses: Tensor, *, label_smoothing: float) -> Tensor:
    """Squared norm of each token's functional gradient: fp32 in the shape of ``labels``; undefined where ignored.

    For cross-entropy, the gradient with respect to the logits of a token is softmax(z) - onehot(y). Its squared norm is
    sum_v p_v^2 - 2 p_y + 1 (AtteNT, section 4: the norm that the teaching rule ranks by). With label smoothing s, the
    target is q = (1 - s) onehot(y) + s / V, and the squared norm is sum p^2 - 2 ((1 - s) p_y + s / V) + sum q^2.
    """
    # sum p^2 = sum e^2 / (sum e)^2 with e = exp(z - max z): log_softmax has the same operations, so a compiler computes
    # them once.
    e_TV = (logits_TV - logits_TV.amax(dim=1, keepdim=True)).exp()
    sum_p_squared = (e_TV.square().sum(dim=1, keepdim=True) / e_TV.sum(dim=1, keepdim=True).square())[:, 0]
    if not label_smoothing:
        return sum_p_squared.view_as(labels) - 2 * (-token_losses).exp() + 1
    certain, spread = 1.0 - label_smoothing, label_smoothing / logits_TV.shape[1]
    p_label_T = (e_TV.gather(1, labels.flatten().clamp(min=0)[:, None]) / e_TV.sum(dim=1, keepdim=True))[:, 0]
    q_squared = certain * (certain + 2 * spread) + label_smoothing * spread
    return (sum_p_squared - 2 * (certain * p_label_T + spread) + q_squared).view_as(labels)


def per_example_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    example_index: Tensor | None = None,
    num_examples: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The cross-entropy summed over the valid tokens of each example.

    Args:
        logits: [B, L, V], or with ``example_index`` [T, V], of any float dtype; the loss is computed in fp32.
        labels: int64 [B, L] or [T], ``IGNORE_INDEX`` where a token does not count.
        label_smoothing: s in [0, 1), as in F.cross_entropy: the target is (1 - s) onehot(y) + s / V.
        example_index: int64 in the shape of the labels, in [0, N): the example of each token. None if each row is one
            example.
        num_examples: N; required with ``example_index``.

    Returns:
        (sums, counts), both fp32 [N]: nats, and the number of valid tokens. The mean loss of an example is
        sums / counts; an example without a valid token has 0 and 0.

    ValueError if the shapes of labels and index do not match.
    """
    num_examples = check_fold(labels, example_index, num_examples=num_examples)
    token_losses = _token_losses(logits.flatten(0, -2).float(), labels, label_smoothing=label_smoothing)
    sums_N = fold(token_losses, example_index, num_examples=num_examples)
    return sums_N, fold(labels != IGNORE_INDEX, example_index, num_examples=num_examples)


def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights_N: Tensor,
    statistics: Tensor | None = None,
    *,
    with_gradient: bool = False,
    rule: LossRule | None = None,
    label_smoothing: float = 0.0,
    example_index: Tensor | None = None,
) -> ExampleLosses:
    """The scalar to differentiate, the unweighted scalar to log, and the statistics of each example for the buffer.

    Args:
        logits, labels, label_smoothing, example_index: as in :func:`per_example_cross_entropy`.
        weights_N: fp32 [N], importance weights; weights of 1 give torchtitan's loss. N is the number of examples.
        statistics: what ``rule`` reads beside the losses; read only with ``rule``.
        with_gradient: also measure the functional gradient; compiled, in the same two passes over the logits.
        rule: multiply the weights by weights computed from the losses (window.py, worst_case.py).

    Returns:
        Losses in nats; the gradients are in [0, sqrt(2)].

    ValueError if the shapes of labels, weights and index do not match.
    """
    logits_TV = logits.flatten(0, -2).float()
    token_losses = _token_losses(logits_TV, labels, label_smoothing=label_smoothing)
    squared_norms = None
    if with_gradient:
        squared_norms = _squared_norms(
            logits_TV.detach(), labels, token_losses.detach(), label_smoothing=label_smoothing
        )
    return finish(
        token_losses,
        labels != IGNORE_INDEX,
        weights_N,
        statistics,
        squared_norms=squared_norms,
        rule=rule,
        example_index=example_index,
    )


def build_weighted_loss(
    *,
    compile_loss: bool,
    with_gradient: bool = False,
    rule: LossRule | None = None,
    backend: str = "inductor",
    label_smoothing: float = 0.0,
) -> WeightedLoss:
    """Build :func:`weighted_cross_entropy` with fixed options, compiled into one graph with ``compile_loss``.

    ValueError for a ``label_smoothing`` outside [0, 1).
    """
    check_number("label_smoothing", label_smoothing, at_least=0, below=1, section="vision")
    loss = partial(
        weighted_cross_entropy,
        with_gradient=with_gradient,
        rule=rule,
        label_smoothing=label_smoothing,
    )
    return torch.compile(loss, backend=backend, fullgraph=True) if compile_loss else loss
