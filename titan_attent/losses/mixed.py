"""Cross-entropy per example against two labels by shares, for mixed images: the interface of cross_entropy.py.

Mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899) mix two images. The target is
q = share onehot(a) + (1 - share) onehot(b), with label smoothing (Szegedy et al. 2016) (1 - s) q + s / C. The loss is
-sum q log p; its functional gradient is p - q.

Cost: three fp32 copies of the logits, which are small with one row per example. No collective, no host sync.

Shapes: B examples, L rows of logits per example (1 for a class of an image), C classes.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from titan_attent.foundations.checks import check_number
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.losses.folding import ExampleLosses, LossRule, finish, refuse_index

MixedLoss = Callable[..., ExampleLosses]
"""Takes logits, labels, weights and statistics; for mixtures also the labels and shares of the second images."""


def mixing(columns: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The columns of a batch that the losses here take for mixtures; empty if the batch is not mixed."""
    return (columns["other_label"], columns["share"]) if "share" in columns else ()


def mixed_targets(
    labels_BL: Tensor, other_labels_B: Tensor, shares_B: Tensor, *, num_classes: int, label_smoothing: float
) -> Tensor:
    """q, fp32 [B, L, C], from labels int64 [B, L], second labels int64 [B], and shares of the first label fp32 [B]."""
    classes_C = torch.arange(num_classes, device=labels_BL.device)
    shares_B11 = shares_B.float()[:, None, None]
    first_BLC = (labels_BL[..., None] == classes_C).float()
    other_B1C = (other_labels_B[:, None, None] == classes_C).float()
    certain = 1.0 - label_smoothing
    return certain * (shares_B11 * first_BLC + (1.0 - shares_B11) * other_B1C) + label_smoothing / num_classes


def weighted_mixed_cross_entropy(
    logits_BLC: Tensor,
    labels_BL: Tensor,
    weights_B: Tensor,
    statistics: Tensor | None = None,
    other_labels_B: Tensor | None = None,
    shares_B: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    with_gradient: bool = False,
    rule: LossRule | None = None,
    example_index: Tensor | None = None,
) -> ExampleLosses:
    """The scalar to differentiate, the unweighted scalar to log, and the statistics of each example for the buffer.

    Args:
        logits_BLC: any float dtype; the loss is computed in fp32.
        labels_BL: int64, ``IGNORE_INDEX`` in an example that is padding.
        other_labels_B: int64, labels of the second images; no effect where the share is 1. None if nothing is mixed.
        shares_B: fp32 in [0, 1], shares of the first label; None for shares of 1.
        label_smoothing: s in [0, 1).
        weights_B, statistics, with_gradient, rule: as in ``weighted_cross_entropy``.
        example_index: must be None, else a ValueError: each image is one row.
    """
    refuse_index(example_index, loss="loss of mixed images")
    if other_labels_B is None or shares_B is None:
        other_labels_B, shares_B = labels_BL[:, 0], torch.ones_like(weights_B)
    log_p_BLC = logits_BLC.float().log_softmax(dim=-1)
    q_BLC = mixed_targets(
        labels_BL,
        other_labels_B,
        shares_B,
        num_classes=logits_BLC.shape[-1],
        label_smoothing=label_smoothing,
    )
    valid_BL = labels_BL != IGNORE_INDEX
    return finish(
        torch.where(valid_BL, -(q_BLC * log_p_BLC).sum(dim=-1), 0.0),
        valid_BL,
        weights_B,
        statistics,
        squared_norms=(log_p_BLC.detach().exp() - q_BLC).square().sum(dim=-1) if with_gradient else None,
        rule=rule,
    )


def mixed_cross_entropy_sum(
    logits_BLC: Tensor,
    labels_BL: Tensor,
    other_labels_B: Tensor | None = None,
    shares_B: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The same loss with weights of 1, summed over the valid rows as torchtitan's own loss is: an fp32 scalar."""
    ones_B = logits_BLC.new_ones(len(labels_BL), dtype=torch.float32)
    arguments = (logits_BLC, labels_BL, ones_B, None, other_labels_B, shares_B)
    return weighted_mixed_cross_entropy(*arguments, label_smoothing=label_smoothing).weighted_sum


def build_mixed_loss(
    *,
    label_smoothing: float = 0.0,
    compile_loss: bool,
    with_gradient: bool = False,
    rule: LossRule | None = None,
    backend: str = "inductor",
) -> MixedLoss:
    """Build :func:`weighted_mixed_cross_entropy` with fixed options, compiled into one graph with ``compile_loss``.

    ValueError for a ``label_smoothing`` outside [0, 1).
    """
    check_number("label_smoothing", label_smoothing, at_least=0, below=1, section="vision")
    loss = partial(
        weighted_mixed_cross_entropy,
        label_smoothing=label_smoothing,
        with_gradient=with_gradient,
        rule=rule,
    )
    return torch.compile(loss, backend=backend, fullgraph=True) if compile_loss else loss
