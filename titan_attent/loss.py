"""Per-example cross-entropy: logits and labels -> sums and token counts for every example, and the weighted scalar.

torchtitan's loss is one SUM over all tokens, divided by the global number of valid tokens in the trainer. This module
keeps the examples apart at the same cost: one pass over the fp32 logits, token losses folded to one number a row. The
weighted scalar keeps torchtitan's convention (a SUM; the caller divides), so weights of 1 give its loss.

Cost: [B, L] token losses (4 bytes a token, against 4 V bytes for the logits), [B] sums and counts. No collective.

Shapes: B examples, L tokens, V vocabulary. The plain functions are also the reference that the tests compare with.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
"""The label that counts nowhere; torch's and torchtitan's value."""

WeightedLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def per_example_cross_entropy(logits_BLV: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over each example's valid tokens.

    Args:
        logits_BLV: any float dtype; the loss is computed in fp32.
        labels_BL: int64, ``IGNORE_INDEX`` where a token does not count.

    Returns:
        (sums, counts), both fp32 [B]: nats, and the number of valid tokens. The mean loss of an example is
        sums / counts; an example without a valid token has 0 and 0.
    """
    token_loss = F.cross_entropy(
        logits_BLV.flatten(0, 1).float(), labels_BL.flatten(0, 1), reduction="none", ignore_index=IGNORE_INDEX
    )
    sums_B = token_loss.view_as(labels_BL).sum(dim=1)
    counts_B = (labels_BL != IGNORE_INDEX).sum(dim=1, dtype=torch.float32)
    return sums_B, counts_B


def weighted_cross_entropy(logits_BLV: Tensor, labels_BL: Tensor, weights_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The scalar to differentiate, the unweighted one to log, and each example's mean loss.

    Args:
        logits_BLV, labels_BL: as in :func:`per_example_cross_entropy`.
        weights_B: fp32 [B], importance weights; ones leave the loss as torchtitan's.

    Returns:
        (weighted sum, unweighted sum, mean_B): two fp32 scalars in nats, summed over valid tokens, and fp32 [B] mean
        nats a valid token (0 for an example without one). The last two are detached.
    """
    sums_B, counts_B = per_example_cross_entropy(logits_BLV, labels_BL)
    weighted = (sums_B * weights_B).sum()
    detached_B = sums_B.detach()
    return weighted, detached_B.sum(), detached_B / counts_B.clamp(min=1.0)


def build_weighted_loss(*, compile_loss: bool, backend: str = "inductor") -> WeightedLoss:
    """:func:`weighted_cross_entropy`, compiled into one graph when ``compile_loss`` is set."""
    if not compile_loss:
        return weighted_cross_entropy
    return torch.compile(weighted_cross_entropy, backend=backend, fullgraph=True)
