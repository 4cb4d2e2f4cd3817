"""Squared error per example of predicted patches, for masked autoencoding: the interface of cross_entropy.py.

The loss is that of He et al. 2022 ("Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, section 3):
the mean squared error between predicted and true values of the masked patches. This module returns the sum over values.
The trainer divides it by the number of valid values in the global batch, as it does with tokens of text.

Cost: one pass over predictions and targets in fp32. No collective, no host sync.

Shapes: B examples, M masked patches, D values per patch, K = M D.
"""

from functools import partial

import torch
from torch import Tensor

from titan_attent.losses.cross_entropy import IGNORE_INDEX, WeightedLoss
from titan_attent.losses.folding import ExampleLosses, LossRule, finish, refuse_index


def _squared_errors(pred_BMD: Tensor, labels_BMD: Tensor) -> tuple[Tensor, Tensor]:
    """The squared error of each value, fp32 [B, K], 0 where it is not valid; and whether it is valid, bool [B, K]."""
    valid_BMD = labels_BMD != IGNORE_INDEX
    squared_BMD = torch.where(valid_BMD, pred_BMD.float() - labels_BMD, 0.0).square()
    return squared_BMD.flatten(1), valid_BMD.flatten(1)


def squared_error_sum(pred_BMD: Tensor, labels_BMD: Tensor) -> Tensor:
    """The squared error summed over all valid values, an fp32 scalar; arguments of :func:`weighted_squared_error`."""
    return _squared_errors(pred_BMD, labels_BMD)[0].sum(dim=1).sum()


def weighted_squared_error(
    pred_BMD: Tensor,
    labels_BMD: Tensor,
    weights_B: Tensor,
    statistics: Tensor | None = None,
    *,
    with_gradient: bool = False,
    rule: LossRule | None = None,
    example_index: Tensor | None = None,
) -> ExampleLosses:
    """The scalar to differentiate, the unweighted scalar to log, and the statistics of each example for the buffer.

    Args:
        pred_BMD: any float dtype; the loss is computed in fp32.
        labels_BMD: fp32 targets, ``IGNORE_INDEX`` where a value does not count, as in all of a padding example.
        weights_B, statistics, with_gradient, rule: as in ``weighted_cross_entropy``.
        example_index: must be None, else a ValueError: each image is one row.

    Returns:
        Squared errors; a "token" of :class:`ExampleLosses` is one value here. The functional gradient is prediction -
        target, the gradient of half the squared error.
    """
    refuse_index(example_index, loss="loss of patches")
    errors_BK, valid_BK = _squared_errors(pred_BMD, labels_BMD)
    losses = finish(errors_BK, valid_BK, weights_B, statistics, rule=rule)
    # The squared norm of the gradient is the squared error itself.
    return losses._replace(gradients=losses.losses.sqrt()) if with_gradient else losses


def build_patch_loss(
    *,
    compile_loss: bool,
    with_gradient: bool = False,
    rule: LossRule | None = None,
    backend: str = "inductor",
) -> WeightedLoss:
    """Build :func:`weighted_squared_error` with fixed options, compiled into one graph with ``compile_loss``."""
    loss = partial(weighted_squared_error, with_gradient=with_gradient, rule=rule)
    return torch.compile(loss, backend=backend, fullgraph=True) if compile_loss else loss
