"""Per-example cross-entropy: logits and labels -> sums and token counts for every example, and the weighted scalar.

torchtitan's loss is one SUM over all tokens, divided by the global number of valid tokens in the trainer. This module
keeps the examples apart at the same cost: one pass over the fp32 logits, token losses folded to one number a row. The
weighted scalar keeps torchtitan's convention (a SUM; the caller divides), so weights of 1 give its loss.

Cost: [B, L] token losses (4 bytes a token, against 4 V bytes for the logits), [B] sums and counts. No collective.

Shapes: B examples, L tokens, V vocabulary. The plain functions are also the reference that the tests compare with.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from titan_attent.foundations.checks import check_number
from titan_attent.losses.window import capped_linear_weights

IGNORE_INDEX = -100
"""The label that counts nowhere; torch's and torchtitan's value."""

ExampleLosses = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""What :func:`weighted_cross_entropy` returns."""

WeightedLoss = Callable[[Tensor, Tensor, Tensor, Tensor], ExampleLosses]
"""Of logits, labels, weights and statistics."""


def per_example_cross_entropy(
    logits_BLV: Tensor, labels_BL: Tensor, *, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over each example's valid tokens.

    Args:
        logits_BLV: any float dtype; the loss is computed in fp32.
        labels_BL: int64, ``IGNORE_INDEX`` where a token does not count.
        label_smoothing: s in [0, 1), as in F.cross_entropy: the target is (1 - s) onehot(y) + s / V.

    Returns:
        (sums, counts), both fp32 [B]: nats, and the number of valid tokens. The mean loss of an example is
        sums / counts; an example without a valid token has 0 and 0.
    """
    token_loss = F.cross_entropy(
        logits_BLV.flatten(0, 1).float(),
        labels_BL.flatten(0, 1),
        reduction="none",
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
    )
    sums_B = token_loss.view_as(labels_BL).sum(dim=1)
    counts_B = (labels_BL != IGNORE_INDEX).sum(dim=1, dtype=torch.float32)
    return sums_B, counts_B


def per_example_loss_and_gradient(
    logits_BLV: Tensor, labels_BL: Tensor, *, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`per_example_cross_entropy` and the functional gradient's norm; compiled, in the same two passes.

    For cross-entropy the gradient with respect to the logits of a token is softmax(z) - onehot(y), whose squared norm
    is sum_v p_v^2 - 2 p_y + 1 (AtteNT, section 4: the norm that the teaching rule ranks by). With labels smoothed by s
    the target is q = (1 - s) onehot(y) + s / V, and the squared norm sum p^2 - 2 ((1 - s) p_y + s / V) + sum q^2.

    Returns:
        (sums, counts, norms), fp32 [B]. norms = sqrt(mean over valid tokens of that squared norm), in [0, sqrt(2)],
        detached; 0 for an example without a valid token.
    """
    logits_NV = logits_BLV.flatten(0, 1).float()
    token_loss = F.cross_entropy(
        logits_NV,
        labels_BL.flatten(),
        reduction="none",
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
    )
    # sum p^2 = sum e^2 / (sum e)^2 with e = exp(z - max z), in the operations of log_softmax: a compiler shares them.
    e_NV = (logits_NV.detach() - logits_NV.detach().amax(dim=1, keepdim=True)).exp()
    sum_p_squared = (e_NV.square().sum(dim=1, keepdim=True) / e_NV.sum(dim=1, keepdim=True).square())[:, 0]
    if label_smoothing:
        certain, others = 1.0 - label_smoothing, label_smoothing / logits_NV.shape[1]
        p_label_N = (e_NV.gather(1, labels_BL.flatten().clamp(min=0)[:, None]) / e_NV.sum(dim=1, keepdim=True))[:, 0]
        q_squared = certain * (certain + 2 * others) + label_smoothing * others
        squared_N = sum_p_squared - 2 * (certain * p_label_N + others) + q_squared
    else:
        squared_N = sum_p_squared - 2 * (-token_loss.detach()).exp() + 1
    valid_BL = labels_BL != IGNORE_INDEX
    counts_B = valid_BL.sum(dim=1, dtype=torch.float32)
    mean_squared_B = torch.where(valid_BL, squared_N.view_as(labels_BL), 0.0).sum(dim=1) / counts_B.clamp(min=1.0)
    return token_loss.view_as(labels_BL).sum(dim=1), counts_B, mean_squared_B.clamp(min=0.0).sqrt()


def weighted_cross_entropy(
    logits_BLV: Tensor,
    labels_BL: Tensor,
    weights_B: Tensor,
    statistics: Tensor | None = None,
    *,
    with_gradient: bool = False,
    temperature: float | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The scalar to differentiate, the unweighted one to log, and what the buffer records of each example.

    Args:
        logits_BLV, labels_BL, label_smoothing: as in :func:`per_example_cross_entropy`.
        weights_B: fp32 [B], importance weights; ones leave the loss as torchtitan's.
        statistics: fp32 [3] of :class:`LossWindow`; read with ``temperature`` only.
        with_gradient: also measure the functional gradient.
        temperature: multiply the weights by those that follow from the loss itself (window.py).

    Returns:
        (weighted sum, unweighted sum, mean_B, norms_B): two fp32 scalars in nats, summed over valid tokens; fp32 [B]
        mean nats a valid token (0 for an example without one); the norms of :func:`per_example_loss_and_gradient`, or
        None. All but the first are detached.
    """
    norms_B = None
    if with_gradient:
        sums_B, counts_B, norms_B = per_example_loss_and_gradient(
            logits_BLV, labels_BL, label_smoothing=label_smoothing
        )
    else:
        sums_B, counts_B = per_example_cross_entropy(logits_BLV, labels_BL, label_smoothing=label_smoothing)
    detached_B = sums_B.detach()
    mean_B = detached_B / counts_B.clamp(min=1.0)
    if temperature is not None:
        assert statistics is not None
        weights_B = weights_B * capped_linear_weights(mean_B, statistics, temperature=temperature)
    return (sums_B * weights_B).sum(), detached_B.sum(), mean_B, norms_B


def build_weighted_loss(
    *,
    compile_loss: bool,
    with_gradient: bool = False,
    temperature: float | None = None,
    backend: str = "inductor",
    label_smoothing: float = 0.0,
) -> WeightedLoss:
    """:func:`weighted_cross_entropy` of four arguments, compiled into one graph when ``compile_loss`` is set.

    ValueError for a ``label_smoothing`` outside of [0, 1).
    """
    check_number("label_smoothing", label_smoothing, at_least=0, below=1, section="vision")
    loss = partial(
        weighted_cross_entropy,
        with_gradient=with_gradient,
        temperature=temperature,
        label_smoothing=label_smoothing,
    )
    return torch.compile(loss, backend=backend, fullgraph=True) if compile_loss else loss
